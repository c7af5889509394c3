"""Reads the files of Sentence Transformers: modules, prompts, similarity, lengths.

Every setting is kept, so that an artifact can repeat it. Hides: file names and options of older
releases. Refuses to know: torch, families, how modules run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator

from gteopt.errors import InputError, IntegrityError, UnsupportedError, shorten_value
from gteopt.model.families import Pooling
from gteopt.model.foreign import (
    ForeignFile,
    parse_foreign,
    path_inside_folder,
    read_any_json,
    read_json,
)

SETTINGS_FILE = "config_sentence_transformers.json"
MODULES_FILE = "modules.json"
VECTOR_MODULES = "vectors_"
"""Prefix of an artifact's module folders that repeat `vectors.safetensors` for Sentence
Transformers; gteopt itself reads `vectors.safetensors`."""
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
"""Older names of pooling modes, in the order in which Sentence Transformers concatenates them."""
STATIC = "StaticEmbedding"
"""A table of token vectors, used instead of a transformer and its pooling."""
_SUPPORTED = ("Transformer", STATIC, "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
_REFUSED = {
    "WeightedLayerPooling": "it reads every layer's output, which no kernel of gteopt returns",
    "Router": "it sends queries and documents through different modules; quantize each route's "
    "folder by itself",
    "Asym": "it sends queries and documents through different modules; quantize each route's "
    "folder by itself",
}


class StSettings(ForeignFile):
    """`config_sentence_transformers.json`: settings of the whole model."""

    prompts: dict[str, str | None] = Field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity_fn_name: Similarity | None = None
    truncate_dim: int | None = Field(default=None, ge=1)
    model_type: str | None = None
    versions: dict[str, Any] = Field(default_factory=dict, alias="__version__")
    requirements: Any = None

    @property
    def similarity(self) -> Similarity:
        """How vectors of this model are compared; cosine if the file states nothing."""
        return self.similarity_fn_name or "cosine"


class TransformerSettings(ForeignFile):
    """`sentence_bert_config.json`: how texts are prepared for the transformer."""

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
        """The limit in tokens that `processing_kwargs` states."""
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
    """An entry of `modules.json`.

    Attributes:
        kind: the name of the class, for example "Pooling".
        type: the full name of the class, as in the file.
        path: the module's folder inside the model folder; "" without one.
        config: content of the module's config.json.
    """

    kind: str
    type: str
    path: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StFolder:
    """The content of a folder's Sentence Transformers files.

    Attributes:
        modules: in the order in which they run; empty without a modules.json.
        remote: types of modules whose code is not Sentence Transformers' own.
    """

    settings: StSettings
    transformer: TransformerSettings
    modules: tuple[ModuleEntry, ...]
    remote: tuple[str, ...]

    @property
    def pooling(self) -> Pooling | None:
        """How token vectors become one vector; None if no module says it.

        "modules" means that gteopt has no pooling of its own for these modules.
        """
        kinds = [module.kind for module in self.modules if module.kind != "Dropout"]
        if STATIC in kinds:
            return "mean"
        poolings = [module for module in self.modules if module.kind == "Pooling"]
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
        """The table of token vectors, if the model has one instead of a transformer."""
        return next((module for module in self.modules if module.kind == STATIC), None)

    @property
    def normalises(self) -> bool:
        """Whether the last module that changes vectors scales them to unit length."""
        kinds = [module.kind for module in self.modules if module.kind != "Dropout"]
        return bool(kinds) and kinds[-1] == "Normalize"

    @property
    def excludes_prompt(self) -> bool:
        """Whether pooling leaves out the tokens of the prompt."""
        return any(
            module.kind == "Pooling" and module.config.get("include_prompt") is False
            for module in self.modules
        )

    def output_dims(self, dims: int) -> int:
        """Dimensions of the modules' output for token vectors of `dims`."""
        for module in self.modules:
            if module.kind == "Dense":
                dims = int(module.config["out_features"])
            elif module.kind == "Pooling":
                dims *= len(pooling_modes(module.config))
        return dims


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
        InputError: a field has a wrong type, or the default prompt is not among the prompts.
        IntegrityError: a file is not JSON, or a module path leads out of the folder.
        UnsupportedError: gteopt does not support a module or an option.
    """
    path = folder / SETTINGS_FILE
    settings = parse_foreign(StSettings, read_json(path, optional=True), path)
    if settings.model_type not in (None, "", "SentenceTransformer"):
        raise UnsupportedError(
            f"{folder} is a {shorten_value(settings.model_type)}, not a SentenceTransformer; "
            f"gteopt takes models that give one vector a text"
        )
    name = settings.default_prompt_name
    if name is not None and name not in settings.prompts:
        raise InputError(
            f"{path}: default_prompt_name {shorten_value(name)!r} is none of the prompts "
            f"({', '.join(map(shorten_value, settings.prompts)) or 'there are none'})"
        )
    transformer = _read_transformer_settings(folder)
    modules, remote = _read_modules(folder)
    return StFolder(settings, transformer, modules, remote)


def check_similarity(folder: Path, st: StFolder, normalise: bool) -> None:
    """Refuse a distance that ranks in another way than the cosine or the dot product.

    Args:
        folder: for the error.
        st: its files.
        normalise: whether vectors have unit length; Euclidean distance then ranks as the cosine.

    Raises:
        UnsupportedError: such a distance.
    """
    similarity = st.settings.similarity
    if similarity == "manhattan" or (similarity == "euclidean" and not normalise):
        raise UnsupportedError(
            f"{folder} compares vectors by {similarity} distance; gteopt ranks by cosine or dot "
            f"product, which would give another order"
        )


def _read_transformer_settings(folder: Path) -> TransformerSettings:
    for name in _TRANSFORMER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path)
        settings = parse_foreign(TransformerSettings, content, path)
        unknown = [
            f"{group}.{option}"
            for group, option in _options(settings)
            if (group, option) not in _KNOWN_OPTIONS and option != "trust_remote_code"
        ]
        if settings.transformer_task != "feature-extraction":
            unknown.append("transformer_task")
        if settings.module_output_name not in (None, "token_embeddings"):
            unknown.append("module_output_name")
        text = (settings.modality_config or {}).get("text")
        if settings.modality_config and (
            not isinstance(text, dict)
            or text.get("method") != "forward"
            or text.get("method_output_name") not in ("last_hidden_state", ["last_hidden_state"])
        ):
            unknown.append("modality_config")
        if unknown:
            raise UnsupportedError(
                f"{path} has options that gteopt does not know: "
                f"{', '.join(map(shorten_value, unknown))}; a model that needs them would get "
                f"other vectors"
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
    """Every option of the nested groups that is set, with its group."""
    groups: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("model_kwargs", "model_args", "processor_kwargs", "tokenizer_args")
    }
    for name, options in settings.processing_kwargs.items():
        groups[f"processing_kwargs.{name}"] = options
    return [
        (group, option)
        for group, options in groups.items()
        for option, value in options.items()
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
        full_name, place = row.get("type"), row.get("path", "")
        if not isinstance(full_name, str):
            raise InputError(f"{path}: a module without a type: {shorten_value(row)}")
        module_folder = path_inside_folder(folder, place, of=MODULES_FILE)
        if str(place).startswith(VECTOR_MODULES):
            continue
        kind = full_name.rsplit(".", maxsplit=1)[-1]
        if not full_name.startswith("sentence_transformers."):
            remote.append(shorten_value(full_name))
            continue
        if kind not in _SUPPORTED:
            reason = _REFUSED.get(kind, "gteopt would give other vectors without it")
            raise UnsupportedError(
                f"{folder}: module {shorten_value(full_name)} is not supported: {reason} "
                f"(supported: {', '.join(_SUPPORTED)})"
            )
        if kind == "Transformer" and place not in ("", "."):
            raise UnsupportedError(
                f"{folder} has its transformer in {shorten_value(place)}, as old releases saved "
                f"it; save it again: SentenceTransformer('{folder}').save('NEW_FOLDER')"
            )
        config = {}
        if kind not in ("Transformer", STATIC):
            is_optional = kind in ("Normalize", "Dropout")
            config = read_json(module_folder / "config.json", optional=is_optional)
            _check_module(kind, config, module_folder)
        modules.append(ModuleEntry(kind, full_name, str(place), config))
    kinds = [module.kind for module in modules]
    if not remote and STATIC in kinds:
        if kinds[0] != STATIC or {"Transformer", "Pooling"} & {*kinds} or kinds.count(STATIC) > 1:
            raise UnsupportedError(
                f"{path}: {STATIC} should come first, without a Transformer or Pooling beside it"
            )
        return tuple(modules), ()
    if not remote and kinds.count("Transformer") != 1:
        raise UnsupportedError(f"{path} should name one Transformer module")
    if not remote and "Pooling" not in kinds:
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


def _check_module(kind: str, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a module's config that its class does not support or that is not safe."""
    settings = parse_foreign(_MODULE_FILES[kind], config, folder / "config.json")
    if kind == "Pooling":
        modes = pooling_modes(config)
        if not set(modes) <= _MODES or not modes:
            raise UnsupportedError(
                f"{folder}: pooling {shorten_value(' + '.join(modes) or 'none')} is not supported "
                f"(supported: {', '.join(sorted(_MODES))})"
            )
        if config.get("include_prompt") is False and "weightedmean" in modes:
            raise UnsupportedError(
                f"{folder}: weightedmean without the prompt's tokens is not supported"
            )
    if isinstance(settings, DenseFile):
        activation = settings.activation_function
        if not activation.startswith(_SAFE_ACTIVATIONS):
            raise UnsupportedError(
                f"{folder}: activation function {shorten_value(activation)} is none of torch's own"
            )
    if kind in ("Dense", "LayerNorm") and not (folder / "model.safetensors").is_file():
        raise UnsupportedError(
            f"{folder} has no model.safetensors. Weights in a pickle (pytorch_model.bin) can run "
            f"code when opened and are never read; save the model again with "
            f"sentence-transformers"
        )


def prompt_of_role(settings: StSettings, role: str) -> str:
    """The text before a text of a role: the role's prompt, else the default one, else nothing."""
    prompt = settings.prompts.get(role)
    if prompt:
        return prompt
    name = settings.default_prompt_name
    # A default prompt that belongs to the other role is not used for this one.
    if name is None or name in ("query", "document", "passage", "corpus"):
        return ""
    return settings.prompts.get(name) or ""
