"""The transformer of a checkpoint without weights: its class, its config, what its files may lack.

Hides: which class of transformers runs an architecture, how it attends, what a checkpoint calls a
weight. Refuses to know: how weights are read or quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from gteopt.encoder.static_table import StaticTable
from gteopt.encoder.tokenization import import_transformers
from gteopt.errors import IntegrityError, UnsupportedError
from gteopt.model.checkpoint import Checkpoint
from gteopt.model.foreign import foreign_errors, shorten

_Held = TypeVar("_Held")
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}
"""Encoder-decoder architectures of which the encoder alone makes vectors."""
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq", "masked_bias", "attn.bias")
"""Ends of names that older files store and newer classes compute."""


def hf_config(checkpoint: Checkpoint) -> Any:
    """The config object of transformers, with caches off.

    Raises:
        UnsupportedError: transformers has no such architecture of its own.
        IntegrityError: it refuses the values.
    """
    fields = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in ("model_type", "quantization_config")  # the latter is ours to apply
    }
    window = fields.get("sliding_window")
    halved = fields.get("use_bidirectional_attention")  # the class itself makes two sides of it
    if isinstance(window, int) and window >= checkpoint.max_tokens and not halved:
        # It is never reached; transformers would make a mask all the same.
        fields["sliding_window"] = None
    kind = str(checkpoint.config["model_type"])
    transformers = import_transformers()
    if kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            f"{checkpoint.folder}: transformers has no architecture '{shorten(kind)}' of its own"
        )
    with foreign_errors(checkpoint.folder / "config.json", "reading"):
        config = transformers.AutoConfig.for_model(kind, **fields)
        # A block that is replayed would see the keys and values of its earlier runs.
        config.use_cache = False
        return config


def whole_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's config with what config.json leaves to defaults."""
    return {**checkpoint.config, **hf_config(checkpoint).to_dict()}


def model_class(checkpoint: Checkpoint, config: Any) -> Any:
    """The class of transformers that gives token vectors.

    Raises:
        UnsupportedError: transformers has none for this architecture.
    """
    transformers = import_transformers()
    if (name := _ENCODERS.get(config.model_type)) is not None:
        return getattr(transformers, name)
    known = transformers.MODEL_MAPPING
    if type(config) not in known:
        raise UnsupportedError(
            f"{checkpoint.folder}: transformers has no encoder of the architecture "
            f"'{shorten(config.model_type)}'"
        )
    found = known[type(config)]
    kind = found[0] if isinstance(found, tuple) else found
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{checkpoint.folder} is an encoder-decoder model ({shorten(config.model_type)}); of "
            f"these gteopt takes {', '.join(_ENCODERS)}"
        )
    return kind


def attention_implementation(kind: Any) -> str:
    """Torch's fused attention where the class has it, else its own."""
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def build_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The transformer with every parameter on the meta device and its buffers real.

    Raises:
        UnsupportedError: transformers has no such architecture.
        IntegrityError: the config does not make one.
    """
    from accelerate import init_empty_weights

    if checkpoint.is_table:
        with init_empty_weights():
            return StaticTable(checkpoint.config["vocab_size"], checkpoint.config["hidden_size"])
    config = hf_config(checkpoint)
    kind = model_class(checkpoint, config)
    with foreign_errors(checkpoint.folder, f"building the architecture {config.model_type}"):
        config._attn_implementation = attention_implementation(kind)
        with init_empty_weights(include_buffers=False):
            module: nn.Module = kind(config)
        # Moving parameters to the meta device one by one makes two of a tied one.
        module.tie_weights()  # type: ignore[operator]
    return module


def missing_tensors(checkpoint: Checkpoint, names: Sequence[str]) -> IntegrityError:
    """The error for tensors that the architecture has and the files lack."""
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return IntegrityError(
        f"{checkpoint.folder}: {len(names)} tensors of the architecture are not in its "
        f"weight files ({shown}); the download is incomplete or config.json belongs to "
        f"another model"
    )


def check_unexpected(checkpoint: Checkpoint, module: nn.Module, names: Iterable[str]) -> None:
    """Refuse tensors of the transformer's own parts that the architecture has no place for.

    Heads of other tasks (`lm_head`, `cls`) lie beside these parts and are no part of a vector.

    Args:
        checkpoint: for the error.
        module: the architecture.
        names: as in the bare transformer, without those that were loaded.

    Raises:
        IntegrityError: config.json describes another model: one with fewer layers, say.
    """
    parts = {name for name, _ in module.named_children()} - {"pooler"}
    odd = sorted(
        name for name in names if name.split(".")[0] in parts and not name.endswith(_BUFFERS)
    )
    if odd:
        shown = ", ".join(map(shorten, odd[:5])) + (" ..." if len(odd) > 5 else "")
        raise IntegrityError(
            f"{checkpoint.folder}: its weight files hold {len(odd)} tensors that the architecture "
            f"of config.json has no place for ({shown}); config.json belongs to another model"
        )


def stored_names(checkpoint: Checkpoint, module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What the weight files call each parameter, as far as they have it; see `bare_names`."""
    prefix = f"{checkpoint.prefix}{getattr(module, 'base_model_prefix', '')}."
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        prefix = checkpoint.prefix
    stored = {name: f"{prefix}{name}" for name in names}
    return {name: each for name, each in stored.items() if each in checkpoint.tensors}


def drop_pooler_(module: nn.Module, lacking: Sequence[str]) -> bool:
    """Take out a head of other tasks where only its weights are lacking; some files have none."""
    if not all(name.startswith("pooler.") for name in lacking):
        return False
    setattr(module, "pooler", None)  # noqa: B010 - modules declare no such attribute
    return True


def bare_names(files: dict[str, _Held], module: nn.Module) -> dict[str, _Held]:
    """What belongs to tensors, by names as in the bare transformer, where a checkpoint has it
    inside a model with a head (`model.layers.0...` beside `lm_head`); the head is no part of the
    embedding.
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    inside = {n.removeprefix(prefix): t for n, t in files.items() if n.startswith(prefix)}
    return inside or files


def tied_names(module: nn.Module) -> dict[str, str]:
    """Second names of parameters that an architecture uses twice, with the first of each."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return ties


def tie_(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Make parameters one again after their values were assigned."""
    for second, name in ties.items():
        parent, _, leaf = second.rpartition(".")
        setattr(module.get_submodule(parent), leaf, module.get_parameter(name))
