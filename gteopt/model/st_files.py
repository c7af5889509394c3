"""The files of Sentence Transformers: modules, prompts, similarity, lengths, each with its type.

What a folder says is kept whole, so that an artifact says it again. Hides: file names and options
of older releases. Refuses to know: torch, families, how modules run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator

from gteopt.errors import InputError, IntegrityError, UnsupportedError
from gteopt.model.families import Pooling
from gteopt.model.foreign import ForeignFile, inside, parse, read_any_json, read_json, shorten

SETTINGS_FILE = "config_sentence_transformers.json"
MODULES_FILE = "modules.json"
VECTOR_MODULES = "vectors_"
"""Folders of an artifact whose name starts so are the Sentence Transformers form of what
`vectors.safetensors` says; gteopt itself applies the latter."""
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
_TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""In the order in which Sentence Transformers concatenates them."""
STATIC = "StaticEmbedding"
"""A table of token vectors, which stands in place of the transformer and its pooling."""
_RUN = ("Transformer", STATIC, "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
_REFUSED = {
    "WeightedLayerPooling": "it reads every layer's output, which no kernel of gteopt gives out",
    "Router": "it sends queries and documents through different modules; quantize each route's "
    "folder by itself",
    "Asym": "it sends queries and documents through different modules; quantize each route's "
    "folder by itself",
}


class Settings(ForeignFile):
    """`config_sentence_transformers.json`: what holds for the whole model."""

    prompts: dict[str, str | None] = Field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: Similarity | None = None
    truncate_dim: int | None = Field(default=None, ge=1)
    model_type: str | None = None
    versions: dict[str, Any] = Field(default_factory=dict, alias="__version__")
    requirements: Any = None

    @property
    def similarity(self) -> Similarity:
        """How vectors of this model are compared."""
        return self.similarity_fn_name or "cosine"


class TransformerSettings(ForeignFile):
    """`sentence_bert_config.json`: how texts reach the transformer."""

    max_seq_length: int | None = Field(default=None, ge=1)
    do_lower_case: bool = False
    query_length: int | None = Field(default=None, ge=1)
    document_length: int | None = Field(default=None, ge=1)
    processing_kwargs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    transformer_task: str = "feature-extraction"
    modality_config: dict[str, Any] | None = None
    module_output_name: str | None = None
    unpad_inputs: bool | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    model_args: dict[str, Any] = Field(default_factory=dict)
    processor_kwargs: dict[str, Any] = Field(default_factory=dict)
    tokenizer_args: dict[str, Any] = Field(default_factory=dict)

    @field_validator("max_seq_length", "query_length", "document_length", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("must be a whole number")
        return value

    @field_validator("processing_kwargs")
    @classmethod
    def _has_a_length(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        length = value.get("text", {}).get("max_length")
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError("text.max_length must be a number of tokens")
        return value

    @property
    def max_length(self) -> int | None:
        """The length that `processing_kwargs` cuts texts to."""
        stated: int | None = self.processing_kwargs.get("text", {}).get("max_length")
        return stated


Dimensions = Annotated[int, Field(ge=1, le=1 << 20, strict=True)]


class PoolingFile(ForeignFile):
    """`config.json` of a Pooling module, of any release."""

    word_embedding_dimension: Dimensions | None = None
    embedding_dimension: Dimensions | None = None
    pooling_mode: str | list[str] | None = None
    include_prompt: StrictBool = True
    pooling_mode_cls_token: StrictBool = False
    pooling_mode_max_tokens: StrictBool = False
    pooling_mode_mean_tokens: StrictBool = False
    pooling_mode_mean_sqrt_len_tokens: StrictBool = False
    pooling_mode_weightedmean_tokens: StrictBool = False
    pooling_mode_lasttoken: StrictBool = False


class DenseFile(ForeignFile):
    """`config.json` of a Dense module."""

    in_features: Dimensions
    out_features: Dimensions
    bias: StrictBool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    module_input_name: str | None = None
    module_output_name: str | None = None
    use_residual: StrictBool = False


class LayerNormFile(ForeignFile):
    """`config.json` of a LayerNorm module."""

    dimension: Dimensions


class NormalizeFile(ForeignFile):
    """`config.json` of a Normalize module; older releases wrote none."""

    dim: int | None = None
    p: float | None = None
    module_input_name: str | None = None
    module_output_name: str | None = None


class DropoutFile(ForeignFile):
    """`config.json` of a Dropout module, which does nothing after training."""

    dropout: float | None = None


@dataclass(frozen=True)
class ModuleEntry:
    """One line of `modules.json`.

    Attributes:
        kind: the class, as "Pooling".
        type: its full name, as the file writes it.
        path: its folder inside the model's, "" where it has none.
        config: what its config.json says.
    """

    kind: str
    type: str
    path: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StFolder:
    """What the Sentence Transformers files of a folder say.

    Attributes:
        modules: in the order in which they run; none where there is no modules.json.
        remote: types of modules whose code is not Sentence Transformers' own.
    """

    settings: Settings
    transformer: TransformerSettings
    modules: tuple[ModuleEntry, ...]
    remote: tuple[str, ...]

    @property
    def pooling(self) -> Pooling | None:
        """How token vectors become one vector; None where no module says.

        "modules" is whatever gteopt has no forward pass of its own for.
        """
        kinds = [each.kind for each in self.modules if each.kind != "Dropout"]
        if STATIC in kinds:
            return "mean"
        poolings = [each for each in self.modules if each.kind == "Pooling"]
        if not poolings:
            return None
        modes = pooling_modes(poolings[0].config)
        is_plain = (
            len(poolings) == 1
            and kinds[:2] == ["Transformer", "Pooling"]
            and len(modes) == 1
            and poolings[0].config.get("include_prompt", True)
            and all(
                module.config.get("module_input_name", "sentence_embedding") == "sentence_embedding"
                for module in self.modules
                if module.kind == "Dense"
            )
        )
        if is_plain and modes[0] == "mean":
            return "mean"
        if is_plain and modes[0] == "cls":
            return "cls"
        if is_plain and modes[0] == "lasttoken":
            return "lasttoken"
        return "modules"

    @property
    def table(self) -> ModuleEntry | None:
        """The table of token vectors that stands in place of a transformer."""
        return next((each for each in self.modules if each.kind == STATIC), None)

    @property
    def normalises(self) -> bool:
        """Whether vectors have unit length behind the last module that changes it."""
        behind = [each.kind for each in self.modules if each.kind != "Dropout"]
        return bool(behind) and behind[-1] == "Normalize"

    @property
    def excludes_prompt(self) -> bool:
        """Whether pooling leaves out the tokens of the prompt."""
        return any(
            each.kind == "Pooling" and each.config.get("include_prompt") is False
            for each in self.modules
        )


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modes of a Pooling module, of any release, in the order of their vectors."""
    stated = config.get("pooling_mode")
    if stated is None:
        modes = tuple(mode for key, mode in _LEGACY_MODES.items() if config.get(key) is True)
        return modes or ("mean",)
    return (stated,) if isinstance(stated, str) else tuple(map(str, stated))


def read_st_folder(folder: Path) -> StFolder:
    """Read and check every Sentence Transformers file of a model folder.

    Raises:
        InputError: a field of a wrong type, or a default prompt that is not among the prompts.
        IntegrityError: no JSON, or a module path that leads out of the folder.
        UnsupportedError: a module or option that gteopt would run otherwise.
    """
    path = folder / SETTINGS_FILE
    settings = parse(Settings, read_json(path, optional=True), path)
    if settings.model_type not in (None, "", "SentenceTransformer"):
        raise UnsupportedError(
            f"{folder} is a {shorten(settings.model_type)}, not a SentenceTransformer; gteopt "
            f"takes models that give one vector a text"
        )
    name = settings.default_prompt_name
    if name is not None and name not in settings.prompts:
        raise InputError(
            f"{path}: default_prompt_name {shorten(name)!r} is none of the prompts "
            f"({', '.join(map(shorten, settings.prompts)) or 'there are none'})"
        )
    transformer = _read_transformer_settings(folder)
    modules, remote = _read_modules(folder)
    return StFolder(settings, transformer, modules, remote)


def _read_transformer_settings(folder: Path) -> TransformerSettings:
    for name in _TRANSFORMER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path)
        settings = parse(TransformerSettings, content, path)
        odd = [
            f"{key}.{inner}"
            for key, inner in _options(settings)
            if (key, inner) not in _KNOWN_OPTIONS and inner != "trust_remote_code"
        ]
        if settings.transformer_task != "feature-extraction":
            odd.append("transformer_task")
        if settings.module_output_name not in (None, "token_embeddings"):
            odd.append("module_output_name")
        text = (settings.modality_config or {}).get("text")
        if settings.modality_config and (
            not isinstance(text, dict)
            or text.get("method") != "forward"
            or text.get("method_output_name") not in ("last_hidden_state", ["last_hidden_state"])
        ):
            odd.append("modality_config")
        if odd:
            raise UnsupportedError(
                f"{path} has options that gteopt does not know: {', '.join(map(shorten, odd))}; a "
                f"model that needs them would get other vectors"
            )
        return settings
    return TransformerSettings()


_KNOWN_OPTIONS = {
    ("processing_kwargs.text", "max_length"),
    ("processing_kwargs.text", "truncation"),
    ("processing_kwargs.text", "padding"),
    ("processing_kwargs.common", "return_tensors"),
    *(
        (group, option)
        for group in ("model_kwargs", "model_args", "processor_kwargs", "tokenizer_args")
        for option in ("dtype", "torch_dtype", "attn_implementation", "padding_side", "use_fast")
    ),
}


def _options(settings: TransformerSettings) -> list[tuple[str, str]]:
    """Every option of the nested groups that says something."""
    groups: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("model_kwargs", "model_args", "processor_kwargs", "tokenizer_args")
    }
    for name, inner in settings.processing_kwargs.items():
        groups[f"processing_kwargs.{name}"] = inner
    return [
        (group, option)
        for group, inner in groups.items()
        for option, value in inner.items()
        if value is not None
    ]


def _read_modules(folder: Path) -> tuple[tuple[ModuleEntry, ...], tuple[str, ...]]:
    path = folder / MODULES_FILE
    if not path.is_file():
        return (), ()
    rows = read_any_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise IntegrityError(f"{path} should hold a list of modules")
    if not rows:
        raise InputError(f"{path} lists no modules")
    modules, remote = [], []
    for row in rows:
        kind_name, where = row.get("type"), row.get("path", "")
        if not isinstance(kind_name, str):
            raise InputError(f"{path}: a module without a type: {shorten(row)}")
        at = inside(folder, where, of=MODULES_FILE)
        if str(where).startswith(VECTOR_MODULES):
            continue
        kind = kind_name.rsplit(".", maxsplit=1)[-1]
        if not kind_name.startswith("sentence_transformers."):
            remote.append(shorten(kind_name))
            continue
        if kind not in _RUN:
            why = _REFUSED.get(kind, "gteopt would give other vectors without it")
            raise UnsupportedError(
                f"{folder}: module {shorten(kind_name)} is not supported: {why} (supported: "
                f"{', '.join(_RUN)})"
            )
        if kind == "Transformer" and where not in ("", "."):
            raise UnsupportedError(
                f"{folder} has its transformer in {shorten(where)}, as old releases saved it; "
                f"write it anew: SentenceTransformer('{folder}').save('NEW_FOLDER')"
            )
        config = {}
        if kind not in ("Transformer", STATIC):
            config = read_json(at / "config.json", optional=kind in ("Normalize", "Dropout"))
            _check_module(kind, config, at)
        modules.append(ModuleEntry(kind, kind_name, str(where), config))
    kinds = [each.kind for each in modules]
    if not remote and STATIC in kinds:
        if kinds[0] != STATIC or {"Transformer", "Pooling"} & {*kinds} or kinds.count(STATIC) > 1:
            raise UnsupportedError(
                f"{path}: {STATIC} should come first, without a Transformer or Pooling beside it"
            )
        return tuple(modules), ()
    if not remote and kinds.count("Transformer") != 1:
        raise UnsupportedError(f"{path} should name one Transformer module")
    if not remote and not any(each.kind == "Pooling" for each in modules):
        raise UnsupportedError(f"{folder}: modules.json names no Pooling module")
    return tuple(modules), tuple(remote)


_MODES = frozenset(_LEGACY_MODES.values())
_SAFE_ACTIVATIONS = ("torch.nn.modules.activation.", "torch.nn.modules.linear.Identity")
_MODULE_FILES: dict[str, type[ForeignFile]] = {
    "Pooling": PoolingFile,
    "Dense": DenseFile,
    "LayerNorm": LayerNormFile,
    "Normalize": NormalizeFile,
    "Dropout": DropoutFile,
}


def _check_module(kind: str, config: Mapping[str, Any], at: Path) -> None:
    """Refuse what a module's config says and its class would not do, or not safely."""
    read = parse(_MODULE_FILES[kind], config, at / "config.json")
    if kind == "Pooling":
        modes = pooling_modes(config)
        if not set(modes) <= _MODES or not modes:
            raise UnsupportedError(
                f"{at}: pooling {shorten(' + '.join(modes) or 'none')} is not supported "
                f"(supported: {', '.join(sorted(_MODES))})"
            )
        if config.get("include_prompt") is False and "weightedmean" in modes:
            raise UnsupportedError(f"{at}: weightedmean without the prompt's tokens is no option")
    if isinstance(read, DenseFile) and not read.activation_function.startswith(_SAFE_ACTIVATIONS):
        raise UnsupportedError(
            f"{at}: activation function {shorten(read.activation_function)} is none of torch's own"
        )
    if kind in ("Dense", "LayerNorm") and not (at / "model.safetensors").is_file():
        raise UnsupportedError(
            f"{at} has no model.safetensors. Weights in a pickle (pytorch_model.bin) can run code "
            f"when opened and are never read; save the model anew with sentence-transformers"
        )


def prompt_of(settings: Settings, role: str) -> str:
    """What precedes a text of a role: its own prompt, else the default one, else nothing."""
    own = settings.prompts.get(role)
    if own:
        return own
    name = settings.default_prompt_name
    # A default that is the other role's prompt stays with that role.
    if name is None or name in ("query", "document", "passage", "corpus"):
        return ""
    return settings.prompts.get(name) or ""
