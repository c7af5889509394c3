"""A base model or an artifact as a folder: what it is, learned without loading its weights.

Hides: where a name leads (embedded model, folder, hub directory, Hub), the file layouts of Sentence
Transformers, and which facts win when the family table and the folder disagree. Refuses to know:
torch. Code named by a folder is never imported; pickled weights are never opened.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from gteopt.errors import InputError, IntegrityError, UnsupportedError, join_problems, suggest
from gteopt.model import hub
from gteopt.model.artifact import (
    MANIFEST,
    artifact_sha256,
    hash_file,
    is_artifact,
    read_manifest,
    verifying,
)
from gteopt.model.families import (
    FAMILIES,
    PUBLISHED,
    Attention,
    Family,
    Pooling,
    Published,
    family_of,
)
from gteopt.paths import ASSETS
from gteopt.records.manifest import Manifest

NANO = "nano"
VECTORS_FILE = "vectors.safetensors"
VECTOR_MODULES = "vectors_"
"""Folders of an artifact whose name starts so are the Sentence Transformers form of what
`vectors.safetensors` says; gteopt itself applies the latter."""

LATENT_FILE = "pooling.safetensors"
"""Where an artifact keeps the tensors of a latent-attention pooling."""
LATENT_PREFIX = "latent_attention_model."
_NESTED_PREFIX = "embedding_model."
# What NV-Embed's config.json may leave out: the defaults of its classes.
_NESTED_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
}
DECODERS = frozenset({"qwen2", "qwen3", "mistral", "llama", "gemma", "gemma2", "phi", "phi3"})
"""Architectures that attend causally unless config.json says otherwise."""
_POOLING: dict[str, Pooling] = {
    "lasttoken": "lasttoken",
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
}
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.md")
"""What describes a model on the Hub."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, described.

    Attributes:
        id: what it was asked for by.
        config: the transformer's part of `config.json`, without remote-code entries and with the
            attention direction set.
        latent: what `config.json` says of a latent-attention pooling; None without one.
        pooling, normalise, dense: the modules behind the transformer; `dense` are folders.
        start_token: put before each text once, where there is an `end_token`.
        end_token: appended to each text once; None leaves special tokens to the tokenizer.
        query_template: prefix of a query, with `{instruction}`; None takes no instruction.
        prompts: fixed prefixes by role where there is no template.
        dims: dimensions of the model's output, before an artifact's own vectors are made.
        matryoshka_dims: shorter lengths that the model was trained for, longest first.
        revision: commit of a download from the Hub; else what was asked for.
        weight_files: safetensors files of the transformer; none where only their headers were
            fetched.
        tensors: name -> shape of everything in them.
        notes: what a reader of `inspect` should know.
    """

    id: str
    folder: Path
    revision: str | None
    config: Mapping[str, Any]
    family: Family | None
    attention: Attention
    pooling: Pooling
    normalise: bool
    dense: tuple[Path, ...]
    latent: Mapping[str, Any] | None
    start_token: str | None
    end_token: str | None
    query_template: str | None
    default_instruction: str | None
    prompts: Mapping[str, str]
    lower_case: bool
    dims: int
    matryoshka_dims: tuple[int, ...]
    max_tokens: int
    license: str | None
    published: Published | None
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, tuple[int, ...]]
    manifest: Manifest | None
    notes: tuple[str, ...]

    @property
    def hub_id(self) -> str | None:
        """`<org>/<name>`, where it was asked for by that, or lies where `hf download --local-dir
        <org>/<name>` puts it; what is published of a model is looked up by it.
        """
        if self.manifest is not None or self.id == NANO:
            return None
        return self.id if "/" in self.id else "/".join(self.folder.absolute().parts[-2:])

    @cached_property
    def sha256(self) -> str:
        """Identifies the content: an artifact's own hash, else over weights, configs, tokenizer."""
        if self.manifest is not None:
            return artifact_sha256(self.folder)
        assert self.weight_files, "only headers were fetched"
        digest = hashlib.sha256()
        for path in sorted([*self.weight_files, *self.side_files]):
            known = path.stat()
            found = _hash_unchanged(path.resolve(), known.st_size, known.st_ctime_ns)
            digest.update(f"{path.relative_to(self.folder).as_posix()}:{found}\n".encode())
        return digest.hexdigest()

    @cached_property
    def weights_sha256(self) -> str:
        """Identifies what the vectors at full dimension depend on; artifacts that differ only in
        what happens to vectors after the model share it.
        """
        if self.manifest is None:
            config = json.dumps(dict(self.config), sort_keys=True)
            family = self.family.name if self.family else ""
            return hashlib.sha256(f"{self.sha256}\n{config}\n{family}".encode()).hexdigest()
        # The card, too, says how vectors are stored, and config.json what they may be cut to.
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
        """Whether any layer is packed, by us or by another library."""
        ours = self.manifest is not None and bool(self.manifest.layers)
        return ours or bool(self.quantization)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What config.json says of weights that are quantized in another library's format."""
        found: Mapping[str, Any] | None = self.config.get("quantization_config")
        return found

    @property
    def prefix(self) -> str:
        """What stands before the transformer's names in the weight files of a nested model."""
        return _NESTED_PREFIX if self.latent is not None and self.manifest is None else ""

    @property
    def artifact_config(self) -> dict[str, Any]:
        """`config.json` of an artifact: nested where the model is, and nothing else opens it."""
        if self.latent is None:
            return dict(self.config)
        return {
            "model_type": "nvembed",
            "text_config": dict(self.config),
            "latent_attention_config": dict(self.latent),
        }

    @property
    def side_files(self) -> list[Path]:
        """Tokenizer, module and prompt files, which an artifact takes over as they are."""
        names = [
            "modules.json",
            "config_sentence_transformers.json",
            "sentence_bert_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.txt",
            "vocab.json",
            "merges.txt",
            "tokenizer.model",
            "sentencepiece.bpe.model",
        ]
        found = [self.folder / name for name in names if (self.folder / name).is_file()]
        for module in _module_folders(self.folder):
            found += [path for path in sorted(module.glob("*")) if path.suffix in _SIDE_SUFFIXES]
        return found


_SIDE_SUFFIXES = (".json", ".safetensors")


def open_checkpoint(
    source: str | Path,
    *,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
    headers_only: bool = False,
) -> Checkpoint:
    """Describe the model that `source` means; an artifact is verified file by file first.

    Args:
        source: "nano" (the embedded model), a folder, or `<org>/<name>`.
        hub_dir: where `<org>/<name>` lies on disk; given, the network is never touched.
        revision: commit, branch or tag on the Hub.
        family: name of the family that it belongs to, where neither its files nor its name tell
            (see `family_of`); an artifact has it in its manifest.
        headers_only: of a model on the Hub whose weights are not here, fetch no weights but only
            what describes them; `notes` says so. Such a checkpoint cannot be loaded or hashed.

    Raises:
        InputError: no such model or family, or the folder is not a Sentence Transformers model.
        IntegrityError: weights are truncated or missing, or an artifact was altered.
        UnsupportedError: it needs remote code, pickled weights or modules that gteopt lacks.
    """
    found = _resolve(str(source), hub_dir, revision, headers_only)
    with _checked(found) as manifest:
        return _describe(found, manifest, family)


@contextmanager
def opening(
    source: str | Path,
    *,
    hub_dir: Path | None = None,
    revision: str | None = None,
    family: str | None = None,
) -> Iterator[Checkpoint]:
    """`open_checkpoint` for a block that reads the weights; see `artifact.verifying`.

    Args:
        source: see `open_checkpoint`, as for the others.
        hub_dir: see `open_checkpoint`.
        revision: see `open_checkpoint`.
        family: see `open_checkpoint`.

    Raises:
        InputError, IntegrityError, UnsupportedError: see `open_checkpoint`.
    """
    found = _resolve(str(source), hub_dir, revision, headers_only=False)
    with _checked(found) as manifest:
        yield _describe(found, manifest, family)


def _checked(found: _Source) -> AbstractContextManager[Manifest | None]:
    """An artifact's manifest; its files, where they are here, are whole when the block ends."""
    if not is_artifact(found.folder):
        return nullcontext()
    if found.remote is not None:
        return nullcontext(read_manifest(found.folder))
    return verifying(found.folder)


def _describe(found: _Source, manifest: Manifest | None, family: str | None) -> Checkpoint:
    folder, identifier = found.folder, found.id
    config = _read_json(folder / "config.json")
    st_config = _read_json(folder / "config_sentence_transformers.json", optional=True)
    prompts = {k: v for k, v in st_config.get("prompts", {}).items() if isinstance(v, str)}
    known = _family(config, folder, identifier, prompts, manifest, family)
    notes: list[str] = []
    remote = sorted({str(v) for v in (config.pop("auto_map", None) or {}).values()})
    config, latent = _unnest(config, folder)
    pooling, normalise, dense, remote_modules = _read_modules(folder, known)
    remote += remote_modules
    if remote:
        if known is None:
            raise UnsupportedError(
                f"{identifier} needs code from its own folder ({', '.join(remote)}), which gteopt "
                f"never runs, and belongs to no family that gteopt knows; use a model whose "
                f"architecture ships with transformers"
            )
        notes.append(f"remote code ignored ({', '.join(remote)}): {known.name} runs natively")
    if manifest is None and "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        notes.append(f"weights are already quantized by {method}; quantize the model they are from")
    attention = _attention(config, known)
    if attention == "bidirectional" and config["model_type"] in DECODERS:
        config["is_causal"] = False  # transformers 5 reads it; see design.md
    elif config["model_type"] in DECODERS:
        config.pop("is_causal", None)
    if config["model_type"] in DECODERS:
        # Published configs ask for a cache of keys and values, which no encoder reads; a block that
        # is replayed would see those of its earlier runs.
        config["use_cache"] = False
    if found.remote is None:
        weight_files = _weight_files(folder, manifest)
        tensors = _read_headers(weight_files)
    else:
        weight_files, tensors = (), dict(found.remote.shapes)
    bert_config = _read_json(folder / "sentence_bert_config.json", optional=True)
    tokenizer_config = _read_json(folder / "tokenizer_config.json", optional=True)
    dims = _output_dims(config, dense)
    published_id = manifest.base.id if manifest else identifier
    published = PUBLISHED.get(published_id)
    max_tokens = _max_tokens(config, bert_config, tokenizer_config, known)
    said = bert_config.get("max_seq_length")
    if known is not None and manifest is None and isinstance(said, int) and said < max_tokens:
        notes.append(
            f"Sentence Transformers cuts texts at {said:,} tokens here; gteopt takes the family's "
            f"{max_tokens:,}"
        )
    if found.remote is not None:
        unchecked = "" if manifest is None else "; files are not checked against their hashes"
        notes.append(
            f"the weights are not here ({found.remote.n_bytes / 1e9:.2f} GB to download): only "
            f"their headers were read{unchecked}"
        )
    return Checkpoint(
        id=identifier,
        folder=folder,
        revision=found.revision,
        config=config,
        family=known,
        attention=attention,
        pooling=pooling,
        normalise=normalise or (known is not None),
        dense=dense,
        latent=latent,
        start_token=known.start_token if known else None,
        end_token=known.end_token if known else None,
        query_template=known.query_template if known else None,
        default_instruction=known.default_instruction if known else None,
        prompts=prompts,
        lower_case=bool(bert_config.get("do_lower_case", False)),
        dims=dims,
        matryoshka_dims=_matryoshka_dims(config, dims, known, manifest),
        max_tokens=max_tokens,
        license=_license(folder) or (published.license if published else None),
        published=published,
        weight_files=weight_files,
        tensors=tensors,
        manifest=manifest,
        notes=tuple(notes),
    )


def _family(
    config: Mapping[str, Any],
    folder: Path,
    identifier: str,
    prompts: Mapping[str, str],
    manifest: Manifest | None,
    asked: str | None,
) -> Family | None:
    """The family that was asked for, that the manifest names, or that the files show."""
    if asked is not None:
        if asked not in FAMILIES:
            raise InputError(f"unknown family '{asked}': {suggest(asked, FAMILIES)}")
        is_nested = "latent_attention_config" in config or config.get("model_type") == "nvembed"
        if (FAMILIES[asked].pooling == "latent") != is_nested:
            raise InputError(
                f"{identifier} is no {asked} model: its config.json "
                f"{'has' if is_nested else 'lacks'} a latent_attention_config"
            )
        return FAMILIES[asked]
    if manifest is not None and manifest.base.family in FAMILIES:
        return FAMILIES[manifest.base.family]
    pooling = ""
    path = folder / "modules.json"
    if path.is_file():
        for entry in json.loads(path.read_text(encoding="utf-8")):
            if str(entry["type"]).endswith(".Pooling"):
                found = _read_json(folder / str(entry.get("path", "")) / "config.json")
                last = found.get("pooling_mode_lasttoken") or found.get("pooling_mode")
                pooling = "lasttoken" if last in (True, "lasttoken") else "other"
    return family_of(config, name=identifier, prompts=prompts.values(), pooling=pooling)


def _unnest(
    config: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The transformer's config inside NV-Embed's, and that of its pooling; else the config alone.

    The transformer is a Mistral whose code calls itself `bidir_mistral`; its attention sees every
    token, so a sliding window that the config still names does not apply.
    """
    if "latent_attention_config" not in config and config.get("model_type") != "nvembed":
        return config, None
    inner = config.get("text_config")
    latent = config.get("latent_attention_config") or {}
    if not isinstance(inner, dict) or not isinstance(latent, dict):
        raise InputError(f"{folder}/config.json names no text_config for its latent attention")
    kept = {k: v for k, v in inner.items() if k not in ("auto_map", "_name_or_path")}
    flat = {**_NESTED_DEFAULTS, **kept, "model_type": "mistral", "sliding_window": None}
    return flat, latent


def _matryoshka_dims(
    config: Mapping[str, Any], dims: int, family: Family | None, manifest: Manifest | None
) -> tuple[int, ...]:
    """The lengths that config.json states, or halves down to the family's least.

    An artifact's config.json states those that its own vectors still have; the manifest the base's.
    """
    if manifest is not None and manifest.base.matryoshka_dims:
        return manifest.base.matryoshka_dims
    stated = {int(d) for d in config.get("matryoshka_dimensions", []) if d <= dims}
    if not stated and family is not None and family.least_dims is not None:
        while dims >= family.least_dims:
            stated.add(dims)
            dims //= 2
    return tuple(sorted(stated, reverse=True))


@dataclass(frozen=True)
class _Source:
    """What a name leads to.

    Attributes:
        id: the name to record.
        revision: as in `Checkpoint`.
        remote: what is known of weights that are not in the folder; None where they are.
    """

    folder: Path
    id: str
    revision: str | None
    remote: hub.RemoteTensors | None = None


def _resolve(
    source: str, hub_dir: Path | None, revision: str | None, headers_only: bool
) -> _Source:
    if source == NANO:
        return _Source(ASSETS / "nano", NANO, revision)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    if hub_dir is not None and is_hub_id and (hub_dir / source).is_dir():
        return _Source(hub_dir / source, source, revision)
    if Path(source).is_dir():
        return _Source(Path(source), Path(source).resolve().name, revision)
    if Path(source).is_file():
        raise InputError(f"{source} is a file; give the folder of a model")
    if hub_dir is not None:
        present = sorted(p.relative_to(hub_dir).as_posix() for p in hub_dir.glob("*/*"))
        raise InputError(
            f"no model {source}: it is no folder and {hub_dir / source} does not exist; "
            f"{suggest(source, [NANO, *present])} To add it: hf download {source} --local-dir "
            f"{hub_dir / source}"
        )
    if not is_hub_id:
        raise InputError(
            f"unknown model '{source}': not a folder and not a Hub id (<org>/<name>); "
            f"{suggest(source, [NANO, *PUBLISHED])}"
        )
    try:
        return _download(source, revision, headers_only)
    except InputError as error:
        raise InputError(
            f"there is no folder {source}, and no model of that name could be fetched from the "
            f"hub: {error}. Or download it elsewhere and give --hub-dir. "
            f"{suggest(source, [NANO, *PUBLISHED])}"
        ) from error


def _download(hub_id: str, revision: str | None, headers_only: bool) -> _Source:
    """What describes the model, and then the rest: all that an artifact's manifest lists, or a
    base's safetensors.
    """
    described = hub.snapshot(hub_id, _SIDE_FILES, revision)
    folder, commit = described.folder, described.commit
    if is_artifact(folder):
        wanted = [each.path for each in read_manifest(folder).files]
    elif (folder / _INDEX).is_file():
        wanted = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
    else:
        wanted = ["model.safetensors"]
    if headers_only and not all((folder / path).is_file() for path in wanted):
        weights = [path for path in wanted if path.endswith(".safetensors")]
        return _Source(folder, hub_id, commit, hub.read_headers(hub_id, weights, commit))
    if not headers_only:
        rest = [*map(glob.escape, wanted)] if is_artifact(folder) else ["*.safetensors"]
        hub.snapshot(hub_id, rest, commit)
    return _Source(folder, hub_id, commit)


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if optional:
            return {}
        raise InputError(
            f"{path.parent} is not a model folder: it has no {path.name}; give a folder that "
            f"transformers or sentence-transformers saved, or an artifact"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise IntegrityError(f"{path} should hold a JSON object, found {type(data).__name__}")
    return data


@lru_cache(maxsize=256)
def _hash_unchanged(path: Path, n_bytes: int, ctime_ns: int) -> str:
    """A base's file is hashed once a process: a plan opens a 28 GB checkpoint several times."""
    del n_bytes, ctime_ns  # they make a changed file another key
    return hash_file(path)


def _module_folders(folder: Path) -> list[Path]:
    """Folders of the modules behind the transformer, vector modules of an artifact left out."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    paths = [str(entry.get("path", "")) for entry in entries]
    return [folder / p for p in paths if p and not p.startswith(VECTOR_MODULES)]


def _read_modules(
    folder: Path, family: Family | None
) -> tuple[Pooling, bool, tuple[Path, ...], list[str]]:
    """Pooling, normalisation, dense folders and remote-code modules that `modules.json` names."""
    path = folder / "modules.json"
    if not path.is_file():
        if family is None:
            raise InputError(
                f"{folder} has no modules.json and belongs to no family that its files or its name "
                f"show, so its pooling is unknown; name the family (--family, one of "
                f"{', '.join(FAMILIES)}) or save it once with sentence-transformers"
            )
        return family.pooling, True, (), []
    pooling: Pooling | None = family.pooling if family else None
    normalise, dense, remote = False, [], []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        kind = str(entry["type"])
        name = kind.rsplit(".", maxsplit=1)[-1]
        module_path = str(entry.get("path", ""))
        if module_path.startswith(VECTOR_MODULES):
            continue
        if not kind.startswith("sentence_transformers."):
            remote.append(kind)
        elif name == "Pooling":
            found = _read_pooling(folder / module_path)
            pooling = family.pooling if family else found
        elif name == "Normalize":
            normalise = True
        elif name == "Dense":
            dense.append(folder / module_path)
        elif name != "Transformer":
            raise UnsupportedError(
                f"{folder}: module {kind} is not supported (supported: Transformer, Pooling, "
                f"Dense, Normalize)"
            )
    if pooling is None:
        if not remote:
            raise UnsupportedError(f"{folder}: modules.json names no Pooling module")
        pooling = "mean"  # the caller refuses remote code of an unknown family
    return pooling, normalise, tuple(dense), remote


def _read_pooling(folder: Path) -> Pooling:
    config = _read_json(folder / "config.json")
    modes = [
        key.removeprefix("pooling_mode_")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise UnsupportedError(
            f"{folder}: pooling {' + '.join(modes) or 'none'} is not supported (supported, one at "
            f"a time: {', '.join(sorted(set(_POOLING.values())))})"
        )
    if config.get("include_prompt") is False:
        raise UnsupportedError(f"{folder}: pooling without the prompt's tokens is not supported")
    return _POOLING[modes[0]]


def _attention(config: Mapping[str, Any], family: Family | None) -> Attention:
    if family is not None:
        return family.attention
    if config.get("model_type") in DECODERS and config.get("is_causal", True):
        return "causal"
    return "bidirectional"


def _weight_files(folder: Path, manifest: Manifest | None) -> tuple[Path, ...]:
    if manifest is not None and manifest.format == "gteopt":
        return tuple(sorted((folder / "weights").glob("*.safetensors")))
    index = folder / _INDEX
    single = folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [f"{name} is missing" for name in names if not (folder / name).is_file()]
        if missing:
            raise IntegrityError(
                join_problems(f"{folder} is incomplete; download it again", missing)
            )
        return tuple(folder / name for name in names)
    if single.is_file():
        return (single,)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{folder} has its weights only as pickle ({', '.join(pickles)}), which can run code "
            f"when opened; convert them to safetensors first (save_pretrained does)"
        )
    raise InputError(
        f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json"
        + (f" nor {MANIFEST}" if manifest is None else "")
    )


def _read_headers(files: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    problems = []
    for path in files:
        try:
            with safe_open(path, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
        except SafetensorError as error:
            problems.append(f"{path.name} ({path.stat().st_size} bytes): {error}")
    if problems:
        subject = f"{files[0].parent} has broken weight files; download them again"
        raise IntegrityError(join_problems(subject, problems))
    return shapes


def _output_dims(config: Mapping[str, Any], dense: tuple[Path, ...]) -> int:
    if dense:
        return int(_read_json(dense[-1] / "config.json")["out_features"])
    dims = config.get("hidden_size", config.get("dim"))
    if not isinstance(dims, int):
        raise UnsupportedError("config.json names no hidden_size; this architecture is unknown")
    return dims


def _max_tokens(
    config: Mapping[str, Any],
    bert_config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    family: Family | None,
) -> int:
    """The least of the limits that are stated; tokenizers state absurd ones for 'no limit'.

    What a family was trained for outranks what its Sentence Transformers files cut at (8,192 of
    gte-Qwen2's 32,768).
    """
    stated = [
        None if family else bert_config.get("max_seq_length"),
        tokenizer_config.get("model_max_length"),
        config.get("max_position_embeddings"),
        family.max_tokens if family else None,
    ]
    return min(int(limit) for limit in stated if isinstance(limit, int | float) and limit > 0)


def _license(folder: Path) -> str | None:
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.S)
    if match is None:
        return None
    try:
        front = yaml.safe_load(match.group(1))
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return str(found) if found else None
