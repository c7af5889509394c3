"""Read and write the format of `quant_method: compressed-tensors`.

llm-compressor, transformers and vLLM use it. A layer NAME has O output and I input features in
G groups. It is either packed (`pack-quantized`)

    NAME.weight_packed      int32 [O, ceil(I * bits / 32)]  codes packed densely along I
    NAME.weight_scale       [O, G], float
    NAME.weight_shape       int64 [2]                       O and I
    NAME.weight_zero_point  int32 [ceil(O * bits / 32), G]  packed densely along O; asymmetric only
    NAME.weight_g_idx       int32 [I]                       older act-order checkpoints only

or has one byte per weight (`int-quantized`, which 8-bit activations need)

    NAME.weight             int8 [O, I]
    NAME.weight_scale       [O, G], float
    NAME.weight_zero_point  int8 [O, G]                     asymmetric only

or has one 8-bit float per weight (`float-quantized`)

    NAME.weight             float8_e4m3fn [O, I]
    NAME.weight_scale       [O, 1], float

Unpacked integers are signed here and unsigned in gteopt: an unsigned code is 2^(bits - 1) more.
Packed codes are unsigned in both.
Hides: which layer has which scheme (`config_groups`, `targets`, `ignore`).
Source: compressed-tensors 0.20, `compressors/pack_quantized`, `compressors/naive_quantized`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme, NumberFormat
from gteopt.errors import UnsupportedError, shorten_value
from gteopt.formats.packed import (
    Activations,
    Config,
    LinearShape,
    ReadLayer,
    StoredCodes,
    as_bytes,
    as_words,
    assemble_weight,
    check_tensors,
    feature_order,
    trim_codes,
)
from gteopt.quant.affine import PackedWeight
from gteopt.quant.packing import pack_codes, packed_width, unpack_codes

_CHOICES, _MOST_CHOICES, _LONGEST_PATTERN = re.compile(r"[*+{(]|(?<!\()\?"), 5, 200
_REPEATED_GROUP = re.compile(r"\)[*+{]")
"""Python tries all combinations of what repetitions and groups may match. A few choices in a short
pattern take a power of the name's length; a repeated group takes exponential time."""
_Wanted = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


def problems(schemes: Mapping[str, LayerScheme], shapes: Mapping[str, LinearShape]) -> list[str]:
    """Reasons why the format cannot hold these layers; empty when it can."""
    del shapes
    reasons = []
    if any(scheme.number_format == "nf4" for scheme in schemes.values()):
        reasons.append("number_format nf4: the format holds integers and 8-bit floats only")
    if any(scheme.activation_static for scheme in schemes.values()):
        reasons.append("activation_static: the format has no scale per input feature")
    if any(scheme.activation_outliers is not None for scheme in schemes.values()):
        reasons.append("activation_outliers: the format quantizes every feature of a token")
    return reasons


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """The layer's tensors without its bias; `from_tensors` gives exactly the same weight back."""
    bits = weight.scheme.bits
    scale = weight.scale.contiguous()
    if weight.scheme.number_format == "e4m3":
        return {"weight": weight.qweight.view(torch.float8_e4m3fn), "weight_scale": scale}
    if weight.scheme.activation_bits == 8:
        return {"weight": (weight.qweight ^ 128).view(torch.int8), "weight_scale": scale}
    tensors = {
        "weight_packed": as_words(weight.qweight),
        "weight_scale": scale,
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if weight.qzero is not None:
        zero = weight.unpack().zero.t().contiguous()  # [G, O]
        tensors["weight_zero_point"] = as_words(pack_codes(zero, bits)).t().contiguous()
    return tensors


def quantization_config(
    schemes: Mapping[str, LayerScheme], skipped: Sequence[str], blocks: str, made_by: str
) -> dict[str, Any]:
    """The `quantization_config` entry for a model whose layers `to_tensors` wrote.

    Args:
        schemes: the quantized layers.
        skipped: all linear layers of the model that are not quantized.
        blocks: not used here.
        made_by: not used here; the format has no field for it.
    """
    del blocks, made_by
    kinds = list(dict.fromkeys(schemes.values()))
    groups = {}
    for i, scheme in enumerate(kinds):
        # Every engine understands a class name; layer names are needed only where schemes differ.
        targets = ["Linear"] if len(kinds) == 1 else [n for n, s in schemes.items() if s == scheme]
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": {
                "num_bits": scheme.bits,
                "type": _type(scheme),
                "symmetric": scheme.symmetric,
                "strategy": "channel" if scheme.group_size == "per_channel" else "group",
                "group_size": None if scheme.group_size == "per_channel" else scheme.group_size,
                "dynamic": False,
            },
            "input_activations": _token_scheme(scheme) if scheme.activation_bits == 8 else None,
            "output_activations": None,
            "format": _format(scheme),
        }
    formats = sorted({_format(scheme) for scheme in kinds})
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": list(skipped),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        # transformers decompresses in a hook of `model(...)`. sentence-transformers 6.2 calls
        # `model.forward(...)`, which skips the hook. `dequantize` decompresses at load.
        "dequantize": True,
    }


def layers_in(names: Iterable[str]) -> list[str]:
    """Names of the quantized layers, from a checkpoint's tensor names."""
    suffix = ".weight_scale"
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def from_tensors(
    config: Config, name: str, shape: LinearShape, tensors: Mapping[str, Tensor]
) -> ReadLayer:
    """Read one layer from its tensors, without its bias. Any writer of the format will do.

    Raises:
        IntegrityError: tensors are missing or of another shape.
        UnsupportedError: gteopt's kernels do not have the scheme.
    """
    subject = f"compressed-tensors layer {shorten_value(name)}"
    group = _group_of(config, name)
    weights = group.get("weights") or {}
    bits = int(weights.get("num_bits", 8))
    kind = weights.get("type", "int")
    if kind != "int" and (kind, bits) != ("float", 8):
        raise UnsupportedError(
            f"{subject}: {bits}-bit {shorten_value(kind)} weights are not supported (supported: "
            f"int, 8-bit float)"
        )
    activations = _activations(subject, group.get("input_activations"), kind)
    scale = tensors.get("weight_scale", torch.empty(0, 1))
    scale = scale.reshape(1, 1).expand(shape.out_features, 1) if scale.numel() == 1 else scale
    tensors, order = {**tensors, "weight_scale": scale}, None
    number_format: NumberFormat = "int" if kind == "int" else "e4m3"
    if "weight_packed" in tensors:
        qweight, zero, order = _read_packed(subject, shape, bits, tensors)
    elif number_format == "e4m3":
        qweight, zero = _read_float8(subject, shape, tensors)
    else:
        qweight, zero = _read_bytes(subject, shape, bits, tensors)
    codes = StoredCodes(qweight, shape.in_features, scale.contiguous(), zero.contiguous(), bits)
    return ReadLayer(
        assemble_weight(subject, codes, activations, number_format=number_format), order
    )


def _read_packed(
    subject: str, shape: LinearShape, bits: int, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes [O, B], zero points [O, G] and feature order [I] of a `pack-quantized` layer."""
    n_groups = tensors["weight_scale"].shape[-1]
    grid = (shape.out_features, n_groups)
    zero_words = (packed_width(shape.out_features, bits) + 3) // 4
    wanted: _Wanted = {
        "weight_packed": (torch.int32, (shape.out_features, (shape.in_features * bits + 31) // 32)),
        "weight_scale": (None, grid),
        "weight_shape": (None, (2,)),
        "weight_zero_point": (torch.int32, (zero_words, n_groups)),
        "weight_g_idx": (None, (shape.in_features,)),
    }
    optional = frozenset({"weight_shape", "weight_zero_point", "weight_g_idx"})
    check_tensors(subject, tensors, wanted, optional)
    qweight, order = trim_codes(as_bytes(tensors["weight_packed"]), bits, shape.in_features), None
    groups = tensors.get("weight_g_idx")
    if groups is not None and not bool((groups == -1).all()):  # all -1 means no order is stored
        order = feature_order(subject, groups, n_groups)
    if order is not None:
        codes = unpack_codes(qweight, bits, shape.in_features)
        qweight = pack_codes(codes[:, order], bits)
    packed_zero = tensors.get("weight_zero_point")
    if packed_zero is None:
        return qweight, _middle(grid, bits, qweight), order
    return qweight, unpack_codes(as_bytes(packed_zero.t()), bits, shape.out_features).t(), order


def _read_float8(
    subject: str, shape: LinearShape, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and zero points [O, G] of a `float-quantized` layer."""
    grid = (shape.out_features, tensors["weight_scale"].shape[-1])
    wanted: _Wanted = {
        "weight": (torch.float8_e4m3fn, (shape.out_features, shape.in_features)),
        "weight_scale": (None, grid),
    }
    check_tensors(subject, tensors, wanted)
    qweight = tensors["weight"].contiguous().view(torch.uint8)
    return qweight, _middle(grid, 8, qweight)


def _read_bytes(
    subject: str, shape: LinearShape, bits: int, tensors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and zero points [O, G] of an `int-quantized` layer."""
    grid = (shape.out_features, tensors["weight_scale"].shape[-1])
    wanted: _Wanted = {
        "weight": (torch.int8, (shape.out_features, shape.in_features)),
        "weight_scale": (None, grid),
        "weight_zero_point": (torch.int8, grid),
    }
    check_tensors(subject, tensors, wanted, frozenset({"weight_zero_point"}))
    offset = 1 << (bits - 1)
    # Flipping the top bit of a signed code adds the zero point 128.
    qweight = tensors["weight"].contiguous().view(torch.uint8) ^ offset
    stored = tensors.get("weight_zero_point", torch.zeros(grid, dtype=torch.int8))
    return qweight, (stored.to(torch.int16) + offset).to(torch.uint8).to(qweight.device)


def _middle(grid: tuple[int, int], bits: int, like: Tensor) -> Tensor:
    """The zero points [O, G] of a symmetric layer."""
    return torch.full(grid, 1 << (bits - 1), dtype=torch.uint8, device=like.device)


def _type(scheme: LayerScheme) -> str:
    return "float" if scheme.number_format == "e4m3" else "int"


def _token_scheme(scheme: LayerScheme) -> dict[str, Any]:
    """The entry for 8-bit activations: a dynamic scale for each token."""
    return {
        "num_bits": 8,
        "type": _type(scheme),
        "symmetric": scheme.activation_symmetric,
        "strategy": "token",
        "dynamic": True,
    }


def _format(scheme: LayerScheme) -> str:
    if scheme.number_format == "e4m3":
        return "float-quantized"
    return "int-quantized" if scheme.activation_bits == 8 else "pack-quantized"


def _group_of(config: Config, name: str) -> Mapping[str, Any]:
    """The config group of a linear layer. A group that names the layer goes before `Linear`."""
    groups = list((config.get("config_groups") or {}).values())
    for group in groups:
        if any(_matches(target, name) for target in group.get("targets", ())):
            return dict(group)
    for group in groups:
        if "Linear" in group.get("targets", ()):
            return dict(group)
    raise UnsupportedError(
        f"compressed-tensors layer {shorten_value(name)}: no entry of config_groups lists this "
        f"layer as a target"
    )


def _matches(target: str, name: str) -> bool:
    """Whether a target of a config group names the layer.

    Raises:
        UnsupportedError: the target is a regular expression that could take hours.
    """
    if target.startswith("re:"):
        pattern = target.removeprefix("re:")
        is_long = len(pattern) > _LONGEST_PATTERN or len(_CHOICES.findall(pattern)) > _MOST_CHOICES
        if is_long or _REPEATED_GROUP.search(pattern):
            raise UnsupportedError(
                f"compressed-tensors target {shorten_value(target)!r} repeats a group, or has more "
                f"than {_MOST_CHOICES} repetitions and groups or {_LONGEST_PATTERN} characters, so "
                f"that matching it could take hours"
            )
        return re.match(pattern, name) is not None
    return name == target or name.endswith(f".{target}")


def _activations(subject: str, activations: Mapping[str, Any] | None, kind: str) -> Activations:
    """Read how the layer's inputs are quantized."""
    if activations is None:
        return Activations()
    symmetric = activations.get("symmetric", True)
    wanted = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}
    stated = {key: activations.get(key) for key in wanted}
    if stated != wanted or (kind == "float" and not symmetric):
        shown = ", ".join(f"{key}: {activations.get(key)}" for key in (*wanted, "symmetric"))
        raise UnsupportedError(
            f"{subject}: activations with {shorten_value(shown)} are not supported (supported: "
            f"8 bits of the weights' type, with a dynamic scale per token)"
        )
    return Activations(8, bool(symmetric))
