"""Describes the folder of a base model or an artifact without loading its weights.

The folder's own files decide. A family's row fills in what they leave out, and `notes` names each
contradiction. Refuses to know: torch. Code named by a folder is never imported; pickled weights are
never opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from gteopt.errors import InputError, UnsupportedError, shorten_value, suggest_names
from gteopt.model.artifact import (
    artifact_sha256,
    hash_file,
    is_artifact,
    read_manifest,
    verify_while_reading,
)
from gteopt.model.card import stated_license
from gteopt.model.config_file import (
    DECODERS,
    attention_of,
    check_config,
    config_of_table,
    hidden_dims,
    position_limit,
    unnest_config,
)
from gteopt.model.families import (
    FAMILIES,
    PUBLISHED,
    Attention,
    Family,
    Pooling,
    PublishedModel,
    family_of,
)
from gteopt.model.foreign import check_link, read_json
from gteopt.model.hub import RemoteTensors
from gteopt.model.sources import NANO, ModelSource, resolve_source
from gteopt.model.st_files import (
    VECTOR_MODULES,
    ModuleEntry,
    Similarity,
    StFolder,
    check_similarity,
    pooling_modes,
    prompt_of_role,
    read_st_folder,
)
from gteopt.model.weight_files import INDEX, SINGLE, find_weight_files, read_weight_headers
from gteopt.records.manifest import Manifest

__all__ = ["NANO", "VECTOR_MODULES", "Checkpoint", "describe_artifact"]
__all__ += ["open_checkpoint", "opening_checkpoint"]
VECTORS_FILE = "vectors.safetensors"
LATENT_FILE = "pooling.safetensors"
"""The file of an artifact with the tensors of a latent-attention pooling."""
LATENT_PREFIX = "latent_attention_model."
_NESTED_PREFIX = "embedding_model."
_READ_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
_UNLIMITED = 32_768
"""Longest text in tokens of a model whose files state no limit."""
_UNCUT = 1 << 20
"""Longest text in tokens of a table of token vectors, which has no positions."""
_NO_LIMIT = 1_000_000
"""A longer model_max_length means "no limit"."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, described.

    Attributes:
        id: the name that the caller gave.
        revision: commit of a download from the Hub; otherwise the requested revision.
        config: the transformer's part of `config.json`, without remote-code entries and with the
            attention direction set.
        pooling: how token vectors become one; with "modules", Sentence Transformers' modules pool.
        normalise: whether the modules end in unit vectors.
        st: content of the Sentence Transformers files.
        tokenizer_config: content of `tokenizer_config.json`.
        latent: config of a latent-attention pooling; None without one.
        start_token: put before each text once, if there is an `end_token`.
        end_token: appended to each text once; None leaves special tokens to the tokenizer.
        query_template: prefix of a query, with `{instruction}`; None takes no instruction.
        dims: dimensions of the model's output, before an artifact shortens its vectors.
        matryoshka_dims: lengths that the model was trained for, longest first.
        weight_files: safetensors files of the transformer; empty if only headers were fetched.
        tensors: name -> shape of every tensor in the weight files.
        stored_bytes: bytes of these tensors in their files.
        notes: facts that `inspect` shows to its reader.
    """

    id: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    family: Family | None
    attention: Attention
    pooling: Pooling
    normalise: bool
    st: StFolder
    tokenizer_config: Mapping[str, Any]
    latent: Mapping[str, Any] | None
    start_token: str | None
    end_token: str | None
    query_template: str | None
    default_instruction: str | None
    dims: int
    matryoshka_dims: tuple[int, ...]
    max_tokens: int
    license: str | None
    published: PublishedModel | None
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, tuple[int, ...]]
    stored_bytes: int
    manifest: Manifest | None
    notes: tuple[str, ...]

    @property
    def modules(self) -> tuple[ModuleEntry, ...]:
        """Sentence Transformers' modules in their order; empty without a modules.json."""
        return self.st.modules

    @property
    def is_table(self) -> bool:
        """Whether the model is a table of token vectors instead of a transformer."""
        return self.st.table is not None

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer's files."""
        return self.folder / (self.st.table.path if self.st.table is not None else "")

    @property
    def similarity(self) -> Similarity:
        """How the model's vectors are compared."""
        return self.st.settings.similarity

    @property
    def unit_vectors(self) -> bool:
        """Whether vectors have unit length: modules normalise them, or the cosine compares them."""
        return self.normalise or self.similarity == "cosine"

    @property
    def truncate_dim(self) -> int | None:
        """The length to which the folder's own settings cut vectors."""
        stated = self.st.settings.truncate_dim
        return stated if self.manifest is None and stated and stated < self.dims else None

    @property
    def lower_case(self) -> bool:
        """Whether texts are put in lower case before they are tokenized."""
        return self.st.transformer.do_lower_case

    def prompt(self, role: str) -> str:
        """The text that the folder puts before a text of a role."""
        prompt = prompt_of_role(self.st.settings, role)
        if prompt or role != "document" or self.family is None:
            return prompt
        return self.family.document_prompt

    @property
    def excludes_prompt(self) -> bool:
        """Whether pooling leaves out the tokens of the prompt."""
        by_family = self.family is not None and self.family.excludes_prompt and not self.modules
        return by_family or self.st.excludes_prompt

    def limit(self, role: str) -> int:
        """The longest input of a role, in tokens."""
        of_role = self.st.transformer.query_length
        if role == "document":
            of_role = self.st.transformer.document_length
        return min(of_role or self.max_tokens, self.max_tokens)

    @property
    def hub_id(self) -> str | None:
        """`<org>/<name>`, the key of published facts; None for an artifact and for "nano".

        For a folder these are its last two parts, as in `hf download --local-dir <org>/<name>`.
        """
        if self.manifest is not None or self.id == NANO:
            return None
        return self.id if "/" in self.id else "/".join(self.folder.absolute().parts[-2:])

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: an artifact's own, else that of weights, configs and tokenizer."""
        if self.manifest is not None:
            return artifact_sha256(self.folder)
        assert self.weight_files, "only headers were fetched"
        digest = hashlib.sha256()
        for path in sorted([*self.weight_files, *self.side_files]):
            check_link(self.folder, path)
            stat = path.stat()
            sha256 = _hash_unchanged(path.resolve(), stat.st_size, stat.st_ctime_ns)
            digest.update(f"{path.relative_to(self.folder).as_posix()}:{sha256}\n".encode())
        return digest.hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """Hash of everything that vectors at full dimension depend on.

        Artifacts that differ only in what happens to vectors after the model share it.
        """
        if self.manifest is None:
            config = json.dumps(dict(self.config), sort_keys=True)
            family = self.family.name if self.family else ""
            return hashlib.sha256(f"{self.sha256}\n{config}\n{family}".encode()).hexdigest()
        # The card and config.json also describe how vectors are stored and cut.
        settings = "config_sentence_transformers.json"
        after = (VECTORS_FILE, VECTOR_MODULES, "modules.json", "README.md", "config.json", settings)
        kept = {k: v for k, v in self.config.items() if k != "matryoshka_dimensions"}
        if (path := self.folder / settings).is_file():
            kept[settings] = {**json.loads(path.read_text()), "similarity_fn_name": None}
        base = self.manifest.base
        about = f"{base.sha256}\n{base.family}\n{json.dumps(kept, sort_keys=True)}\n"
        digest = hashlib.sha256(about.encode())
        for file in self.manifest.files:
            if not file.path.startswith(after):
                digest.update(f"{file.path}:{file.sha256}\n".encode())
        return digest.hexdigest()

    @property
    def is_quantized(self) -> bool:
        """Whether any layer is packed, by gteopt or by another library."""
        by_gteopt = self.manifest is not None and bool(self.manifest.layers)
        return by_gteopt or bool(self.quantization)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config` of another library's format in config.json."""
        quantization: Mapping[str, Any] | None = self.config.get("quantization_config")
        return quantization

    @property
    def prefix(self) -> str:
        """Prefix of the transformer's tensor names in the weight files of a nested model."""
        return _NESTED_PREFIX if self.latent is not None and self.manifest is None else ""

    @property
    def artifact_config(self) -> dict[str, Any]:
        """`config.json` for an artifact; nested for NV-Embed, which only gteopt then opens."""
        if self.latent is None:
            return dict(self.config)
        return {
            "model_type": "nvembed",
            "text_config": dict(self.config),
            "latent_attention_config": dict(self.latent),
        }

    @property
    def side_files(self) -> list[Path]:
        """Every other file that could change a vector: configs, tokenizer, modules."""
        weights = set(self.weight_files)
        folders = [self.folder, *(self.folder / m.path for m in self.modules if m.path)]
        return sorted(
            {
                path
                for folder in folders
                for path in folder.glob("*")
                if path.suffix in _READ_SUFFIXES and path not in weights and path.is_file()
                if folder != self.folder
                or path.suffix != ".safetensors"
                or path.name == LATENT_FILE
            }
        )


def open_checkpoint(
    source: str | Path,
    *,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
    headers_only: bool = False,
) -> Checkpoint:
    """Describe the model that `source` names; every file of an artifact is verified.

    Args:
        source: "nano" (the embedded model), a folder, or `<org>/<name>`.
        hub_dir: folder with `<org>/<name>` inside; if given, the network is never used.
        revision: commit, branch or tag on the Hub.
        family: name of the model's family, if neither its files nor its name show it (see
            `family_of`). An artifact's manifest states the family.
        headers_only: for a model on the Hub, fetch only the headers of weights that are not on
            this machine; `notes` says so. Such a checkpoint cannot be loaded or hashed.

    Raises:
        InputError: there is no such model or family, or the folder is not a Sentence Transformers
            model.
        IntegrityError: weights are truncated or missing, or an artifact was altered.
        UnsupportedError: the model needs remote code, pickled weights or modules that gteopt lacks.
    """
    location = resolve_source(str(source), hub_dir, revision, headers_only)
    with _checked(location) as manifest:
        return _describe(location, manifest, family)


@contextmanager
def opening_checkpoint(
    source: str | Path,
    *,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
) -> Iterator[Checkpoint]:
    """`open_checkpoint` for a `with` block that reads the weights; see `verify_while_reading`.

    Raises:
        InputError, IntegrityError, UnsupportedError: see `open_checkpoint`.
    """
    location = resolve_source(str(source), hub_dir, revision, headers_only=False)
    with _checked(location) as manifest:
        yield _describe(location, manifest, family)


def describe_artifact(folder: Path) -> Checkpoint:
    """Describe an artifact by its manifest and settings, without its weights.

    No file is verified. The result names no tensors, and cannot be loaded or hashed.

    Raises:
        InputError: the folder is not an artifact, or a setting has a wrong type.
        IntegrityError: the manifest or a file of settings is damaged.
    """
    source = ModelSource(folder, folder.resolve().name, None, has_weights=False)
    return _describe(source, read_manifest(folder), None)


def _checked(source: ModelSource) -> AbstractContextManager[Manifest | None]:
    """An artifact's manifest; files on this machine are verified when the block ends."""
    if not is_artifact(source.folder):
        return nullcontext()
    if source.remote is not None:
        return nullcontext(read_manifest(source.folder))
    return verify_while_reading(source.folder)


def _describe(source: ModelSource, manifest: Manifest | None, family: str | None) -> Checkpoint:
    folder, identifier = source.folder, source.id
    if (folder / "adapter_config.json").is_file():
        find_weight_files(folder, None)  # its error says how to merge an adapter
    st = read_st_folder(folder)
    config = read_json(folder / "config.json", optional=st.table is not None)
    notes: list[str] = []
    known = _family(config, identifier, st, manifest, family)
    remote_code = {shorten_value(value) for value in _values(config.pop("auto_map", None))}
    config, latent = unnest_config(config, folder)
    _check_remote_code(identifier, remote_code | set(st.remote), known, notes)
    weights_folder = folder if st.table is None else folder / st.table.path
    weight_files, tensors, stored_bytes = _weights(source, weights_folder, manifest, notes)
    if st.table is not None and source.has_weights:
        config = (config if manifest is not None else {}) | config_of_table(weights_folder, tensors)
    check_config(config, folder / "config.json", len(tensors))
    _note_quantized(config, manifest, notes)
    attention = _set_attention(config, known)
    pooling = _pooling(folder, st, known, latent is not None, notes)
    tokenizer_config = read_json(folder / "tokenizer_config.json", optional=True)
    dims = st.output_dims(hidden_dims(config))
    published = PUBLISHED.get(manifest.base.id if manifest else identifier)
    normalise = st.normalises if st.modules else known is not None
    check_similarity(folder, st, normalise)
    adds_end = known is not None and (
        pooling in ("lasttoken", "latent") or tokenizer_config.get("add_eos_token") is True
    )
    max_tokens = _table_max_tokens(weights_folder) if st.table is not None else 0
    limit_notes = notes if manifest is None else []  # an artifact's limit is as intended
    max_tokens = max_tokens or _max_tokens(config, st, tokenizer_config, known, limit_notes)
    if source.remote is not None:
        notes.append(_remote_note(source.remote, manifest))
    return Checkpoint(
        id=identifier,
        folder=folder,
        revision=source.revision,
        config=config,
        family=known,
        attention=attention,
        pooling=pooling,
        normalise=normalise,
        st=st,
        tokenizer_config=tokenizer_config,
        latent=latent,
        start_token=known.start_token if known and adds_end else None,
        end_token=known.end_token if known and adds_end else None,
        query_template=known.query_template if known else None,
        default_instruction=known.default_instruction if known else None,
        dims=dims,
        matryoshka_dims=_matryoshka_dims(config, dims, known, manifest, published),
        max_tokens=max_tokens,
        license=stated_license(folder) or (published.license if published else None),
        published=published,
        weight_files=weight_files,
        tensors=tensors,
        stored_bytes=stored_bytes,
        manifest=manifest,
        notes=tuple(notes),
    )


def _check_remote_code(
    identifier: str, remote_code: set[str], family: Family | None, notes: list[str]
) -> None:
    """Note that code from the folder is ignored.

    Raises:
        UnsupportedError: the model belongs to no family that gteopt computes without this code.
    """
    if not remote_code:
        return
    names = ", ".join(sorted(remote_code))
    if family is None:
        raise UnsupportedError(
            f"{identifier} needs code from its own folder ({names}), which gteopt never runs, and "
            f"belongs to no family that gteopt knows; use a model whose architecture ships with "
            f"transformers"
        )
    notes.append(f"remote code ignored ({names}): {family.name} runs natively")


def _note_quantized(config: Mapping[str, Any], manifest: Manifest | None, notes: list[str]) -> None:
    """Note that another library has quantized the weights."""
    quantized = config.get("quantization_config")
    if manifest is None and isinstance(quantized, dict):
        method = shorten_value(quantized.get("quant_method", "an unnamed method"))
        notes.append(f"weights are already quantized by {method}; quantize the model they are from")


def _values(mapping: object) -> list[object]:
    return list(mapping.values()) if isinstance(mapping, Mapping) else []


def _weights(
    source: ModelSource, folder: Path, manifest: Manifest | None, notes: list[str]
) -> tuple[tuple[Path, ...], dict[str, tuple[int, ...]], int]:
    """Weight files, the shapes in them and their bytes; remote weights have no files."""
    if not source.has_weights:
        return (), {}, 0
    if source.remote is None:
        files = find_weight_files(folder, manifest)
        if files == (folder / SINGLE,) and (folder / INDEX).is_file():
            notes.append(f"the folder holds two sets of weights: {SINGLE} is read, {INDEX} is not")
        return files, read_weight_headers(files), sum(path.stat().st_size for path in files)
    return (), dict(source.remote.shapes), source.remote.n_bytes


def _remote_note(remote: RemoteTensors, manifest: Manifest | None) -> str:
    unchecked = "" if manifest is None else "; files are not checked against their hashes"
    return (
        f"the weights are not on this machine ({remote.n_bytes / 1e9:.2f} GB to download): only "
        f"their headers were read{unchecked}"
    )


def _set_attention(config: dict[str, Any], family: Family | None) -> Attention:
    """Write the attention direction of a family into the config, and return the direction.

    transformers 5 reads `is_causal`. The cache of keys and values is turned off, because no encoder
    reads it.
    """
    if family is not None and family.attention is not None:
        config.pop("is_causal", None)
        if family.attention == "bidirectional":
            config["is_causal"] = False
            if config.get("model_type") == "mistral":  # the authors' code then has no window
                config["sliding_window"] = None
    if config["model_type"] in DECODERS or "use_cache" in config:
        config["use_cache"] = False
    return attention_of(config)


def _pooling(
    folder: Path, st: StFolder, family: Family | None, is_latent: bool, notes: list[str]
) -> Pooling:
    """The pooling by config.json's latent attention, by the modules, or by the family."""
    if is_latent:
        return "latent"
    stated = st.pooling
    if stated is None:
        if family is not None and family.pooling is not None:
            return family.pooling
        raise InputError(
            f"{folder} has no modules.json and belongs to no family that its files or its name "
            f"show, so its pooling is unknown; name the family (--family, one of "
            f"{', '.join(FAMILIES)}) or save it once with sentence-transformers"
        )
    if family is not None and family.pooling is not None and stated != family.pooling:
        modes = [m for e in st.modules if e.kind == "Pooling" for m in pooling_modes(e.config)]
        notes.append(
            f"the folder pools by {' + '.join(modes)}, other models of {family.name} by "
            f"{family.pooling}; gteopt follows the folder"
        )
    return stated


def _max_tokens(
    config: Mapping[str, Any],
    st: StFolder,
    tokenizer_config: Mapping[str, Any],
    family: Family | None,
    notes: list[str],
) -> int:
    """The folder's limit, or the family's if no file states one; the positions may lower it.

    A limit in Sentence Transformers' files overrides the tokenizer's.
    """
    st_limit = st.transformer.max_length or st.transformer.max_seq_length
    if st_limit is None:
        stated = tokenizer_config.get("model_max_length")
        limits = [stated] if isinstance(stated, int) and 0 < stated < _NO_LIMIT else []
        limits += [family.max_tokens] if family else []
    else:
        limits = [st_limit]
        if family is not None and st_limit < family.max_tokens:
            notes.append(
                f"the folder cuts texts at {st_limit:,} tokens, though {family.name} was trained "
                f"for {family.max_tokens:,}"
            )
    limit = position_limit(config)
    limits += [limit] if limit is not None and limit > 0 else []
    if not limits:
        notes.append(f"no file states a longest text; {_UNLIMITED:,} tokens are assumed")
    return min(limits, default=_UNLIMITED)


def _table_max_tokens(folder: Path) -> int:
    """Longest text in tokens of a table: the truncation in tokenizer.json, if there is one."""
    truncation = read_json(folder / "tokenizer.json", optional=True).get("truncation")
    length = truncation.get("max_length") if isinstance(truncation, Mapping) else None
    return length if isinstance(length, int) and length > 0 else _UNCUT


def _family(
    config: Mapping[str, Any],
    identifier: str,
    st: StFolder,
    manifest: Manifest | None,
    requested: str | None,
) -> Family | None:
    """The family by request, by the manifest, by a published name, or by the model's files."""
    if requested is not None:
        if requested not in FAMILIES:
            raise InputError(f"unknown family '{requested}': {suggest_names(requested, FAMILIES)}")
        is_nested = "latent_attention_config" in config or config.get("model_type") == "nvembed"
        if (FAMILIES[requested].pooling == "latent") != is_nested:
            raise InputError(
                f"{identifier} is no {requested} model: its config.json "
                f"{'has' if is_nested else 'lacks'} a latent_attention_config"
            )
        return FAMILIES[requested]
    if manifest is not None and manifest.base.family in FAMILIES:
        return FAMILIES[manifest.base.family]
    if (published := PUBLISHED.get(identifier)) is not None and published.family is not None:
        return FAMILIES[published.family]
    prompts = [text for text in st.settings.prompts.values() if text]
    return family_of(config, name=identifier, prompts=prompts, pooling=st.pooling or "")


def _matryoshka_dims(
    config: Mapping[str, Any],
    dims: int,
    family: Family | None,
    manifest: Manifest | None,
    published: PublishedModel | None,
) -> tuple[int, ...]:
    """Trained lengths: by config.json, by the authors, or halves down to the family's least.

    An artifact's manifest states the base's lengths; its config.json lists only those that its own
    vectors can still be cut to.
    """
    if manifest is not None and manifest.base.matryoshka_dims:
        return manifest.base.matryoshka_dims
    listed = config.get("matryoshka_dimensions") or ()
    stated = {d for d in listed if isinstance(d, int) and 1 <= d <= dims}
    stated = stated or {d for d in (published.trained_dims if published else ()) if d <= dims}
    if not stated and family is not None and family.least_dims is not None:
        while dims >= family.least_dims:
            stated.add(dims)
            dims //= 2
    return tuple(sorted(stated, reverse=True))


@lru_cache(maxsize=256)
def _hash_unchanged(path: Path, n_bytes: int, ctime_ns: int) -> str:
    """Hash a base's file once a process, since a plan opens a large checkpoint several times."""
    del n_bytes, ctime_ns  # part of the cache key: a changed file is hashed again
    return hash_file(path)
