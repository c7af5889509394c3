"""Builds the transformer of a checkpoint without weights, and names its tensors in the files.

Hides: which class of transformers runs an architecture, its attention, the names of weights in a
checkpoint. Refuses to know: how weights are read or quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from gteopt.encoder.static_table import StaticTable
from gteopt.encoder.tokenization import import_transformers
from gteopt.errors import IntegrityError, UnsupportedError, shorten_value
from gteopt.model.checkpoint import Checkpoint
from gteopt.model.foreign import foreign_errors

_Held = TypeVar("_Held")
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}
"""Classes for the encoder alone of encoder-decoder architectures."""
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq", "masked_bias", "attn.bias")
"""Name endings of buffers that older files store and newer classes compute."""


def build_hf_config(checkpoint: Checkpoint) -> Any:
    """The config object of transformers, with its cache off.

    Raises:
        UnsupportedError: transformers has no such architecture without remote code.
        IntegrityError: transformers refuses the values.
    """
    fields = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in ("model_type", "quantization_config")  # gteopt applies the latter itself
    }
    window = fields.get("sliding_window")
    halved = fields.get("use_bidirectional_attention")  # the class then halves the window
    if isinstance(window, int) and window >= checkpoint.max_tokens and not halved:
        # No text reaches the window, but transformers would still make a mask.
        fields["sliding_window"] = None
    kind = str(checkpoint.config["model_type"])
    transformers = import_transformers()
    if kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            f"{checkpoint.folder}: transformers has no architecture '{shorten_value(kind)}' of "
            f"its own"
        )
    with foreign_errors(checkpoint.folder / "config.json", "reading"):
        config = transformers.AutoConfig.for_model(kind, **fields)
        # With a cache, a replayed block would see the keys and values of its earlier runs.
        config.use_cache = False
        return config


def build_whole_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's config, with the defaults that config.json leaves out."""
    return {**checkpoint.config, **build_hf_config(checkpoint).to_dict()}


def find_model_class(checkpoint: Checkpoint, config: Any) -> Any:
    """The class of transformers that computes token vectors.

    Raises:
        UnsupportedError: transformers has no such class for this architecture.
    """
    transformers = import_transformers()
    if (name := _ENCODERS.get(config.model_type)) is not None:
        return getattr(transformers, name)
    known = transformers.MODEL_MAPPING
    if type(config) not in known:
        raise UnsupportedError(
            f"{checkpoint.folder}: transformers has no encoder of the architecture "
            f"'{shorten_value(config.model_type)}'"
        )
    classes = known[type(config)]
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{checkpoint.folder} is an encoder-decoder model ({shorten_value(config.model_type)})"
            f"; gteopt supports {', '.join(_ENCODERS)} of this kind"
        )
    return classes[0] if isinstance(classes, tuple) else classes


def attention_implementation(kind: Any) -> str:
    """Torch's fused attention if the class supports it, else the class's own."""
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def build_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The transformer with every parameter on the meta device and real buffers.

    Raises:
        UnsupportedError: transformers has no such architecture.
        IntegrityError: the config is invalid for this architecture.
    """
    from accelerate import init_empty_weights

    if checkpoint.is_table:
        with init_empty_weights():
            return StaticTable(checkpoint.config["vocab_size"], checkpoint.config["hidden_size"])
    config = build_hf_config(checkpoint)
    architecture = find_model_class(checkpoint, config)
    with foreign_errors(checkpoint.folder, f"building the architecture {config.model_type}"):
        config._attn_implementation = attention_implementation(architecture)
        with init_empty_weights(include_buffers=False):
            module: nn.Module = architecture(config)
        # Parameters moved to the meta device one by one are no longer tied.
        module.tie_weights()  # type: ignore[operator]
    return module


def explain_missing_tensors(checkpoint: Checkpoint, names: Sequence[str]) -> IntegrityError:
    """The error for tensors that the architecture has and the files lack."""
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return IntegrityError(
        f"{checkpoint.folder}: {len(names)} tensors of the architecture are not in its "
        f"weight files ({shown}); the download is incomplete or config.json belongs to "
        f"another model"
    )


def check_unexpected_tensors(
    checkpoint: Checkpoint, module: nn.Module, names: Iterable[str]
) -> None:
    """Refuse tensors of the transformer's own parts that the architecture has no place for.

    Heads of other tasks (`lm_head`, `cls`) are outside these parts, and no vector needs them.

    Args:
        checkpoint: for the error.
        module: the architecture.
        names: tensors that were not loaded, named as in the bare transformer.

    Raises:
        IntegrityError: config.json describes another model, for example one with fewer layers.
    """
    parts = {name for name, _ in module.named_children()} - {"pooler"}
    extra = sorted(
        name for name in names if name.split(".")[0] in parts and not name.endswith(_BUFFERS)
    )
    if extra:
        shown = ", ".join(map(shorten_value, extra[:5])) + (" ..." if len(extra) > 5 else "")
        raise IntegrityError(
            f"{checkpoint.folder}: its weight files hold {len(extra)} tensors that the "
            f"architecture of config.json has no place for ({shown}); config.json belongs to "
            f"another model"
        )


def find_stored_names(
    checkpoint: Checkpoint, module: nn.Module, names: Iterable[str]
) -> dict[str, str]:
    """The name in the weight files of each parameter that they have; see `map_bare_names`."""
    prefix = f"{checkpoint.prefix}{getattr(module, 'base_model_prefix', '')}."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        prefix = checkpoint.prefix
    candidates = {name: f"{prefix}{name}" for name in names}
    return {name: stored for name, stored in candidates.items() if stored in checkpoint.tensors}


def drop_pooler_(module: nn.Module, lacking: Sequence[str]) -> bool:
    """Remove the pooler head if only its weights are missing; says whether it did."""
    if not all(name.startswith("pooler.") for name in lacking):
        return False
    setattr(module, "pooler", None)  # noqa: B010 - modules declare no such attribute
    return True


def map_bare_names(files: dict[str, _Held], module: nn.Module) -> dict[str, _Held]:
    """The values of `files` under the names of the bare transformer.

    A checkpoint with a head stores the transformer as `model.layers.0...` beside `lm_head`. The
    head is left out, because no embedding needs it.
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    inside = {n.removeprefix(prefix): t for n, t in files.items() if n.startswith(prefix)}
    return inside or files


def find_tied_names(module: nn.Module) -> dict[str, str]:
    """Second name of each parameter that an architecture uses twice, with its first name."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return ties


def tie_parameters_(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Tie parameters again after their values were assigned; `ties` is from `find_tied_names`."""
    for second, name in ties.items():
        parent, _, leaf = second.rpartition(".")
        setattr(module.get_submodule(parent), leaf, module.get_parameter(name))
