"""Read and write the format of `quant_method: gptq`, which AutoGPTQ defined.

GPTQModel and optimum read it. vLLM and SGLang read its symmetric layers of 4 or 8 bits.

A layer NAME of O output and I input features in G groups has

    NAME.qweight  int32 [I * bits / 32, O]  codes packed densely along I, lowest bits first
    NAME.qzeros   int32 [G, O * bits / 32]  zero points packed densely along O; version 1 stores
                                            zero point - 1, version 2 the zero point
    NAME.scales   float16 [G, O]
    NAME.g_idx    int32 [I]                 the group of each input feature
    NAME.bias     [O]                       only if the layer has a bias

and a weight is (code - zero) * scale. Hides: packing order and how versions store zero points.
Source: GPTQModel 7.6, `nn_modules/qlinear/__init__.py` (pack_block) and `utils/model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
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
    stored_zero_points,
    trim_codes,
)
from gteopt.quant.affine import PackedWeight
from gteopt.quant.grid import group_width
from gteopt.quant.packing import pack_codes, unpack_codes

Version = Literal[1, 2]
_VERSIONS: dict[str, Version] = {"gptq": 1, "gptq_v2": 2}


def problems(schemes: Mapping[str, LayerScheme], shapes: Mapping[str, LinearShape]) -> list[str]:
    """Reasons why some engine could not open these layers in this format; empty when all can."""
    reasons = [
        f"{name}: {shape.out_features} x {shape.in_features} features; both must be multiples of 32"
        for name, shape in shapes.items()
        if shape.out_features % 32 or shape.in_features % 32
    ]
    if any(scheme.activation_bits == 8 for scheme in schemes.values()):
        reasons.append("8-bit activations: the format quantizes weights only")
    reasons += [
        f"number_format {number_format}: the format holds integers only"
        for number_format in sorted({scheme.number_format for scheme in schemes.values()} - {"int"})
    ]
    if any((s.bits, s.group_size) == (4, "per_channel") for s in schemes.values()):
        reasons.append("4-bit per_channel: GPTQModel's CPU kernel needs groups of 32 to 256")
    if len(set(schemes.values())) > 1:
        reasons.append("layers differ in bits or groups: the format has one scheme for all layers")
    return reasons


def gptq_version(scheme: LayerScheme) -> Version:
    """The version of the format to write: 1 for symmetric schemes, 2 for asymmetric ones.

    Every engine reads version 1. It cannot hold the zero point 0, which an asymmetric group of
    positive weights has.
    """
    return 1 if scheme.symmetric else 2


def to_tensors(weight: PackedWeight, *, version: Version | None = None) -> dict[str, Tensor]:
    """The layer's tensors without its bias; `from_tensors` gives exactly the same weight back.

    Raises:
        UnsupportedError: the features are no multiples of 32, or version 1 has a zero point of 0.
    """
    scheme, (out_features, in_features) = weight.scheme, (weight.out_features, weight.in_features)
    version = version or gptq_version(scheme)
    if out_features % 32 or in_features % 32:
        raise UnsupportedError(
            f"a gptq checkpoint cannot hold {out_features} x {in_features} features: both must be "
            f"multiples of 32"
        )
    zero = stored_zero_points(weight)
    if version == 1:
        if bool((zero == 0).any()):
            raise UnsupportedError(
                "version 1 of the gptq format cannot hold a zero point of 0; use version 2"
            )
        zero = zero - 1
    width = group_width(in_features, scheme.group_size)
    return {
        "qweight": as_words(weight.qweight).t().contiguous(),
        "qzeros": as_words(pack_codes(zero.t().contiguous(), scheme.bits)),
        "scales": weight.scale.t().contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // width,
    }


def quantization_config(
    schemes: Mapping[str, LayerScheme], skipped: Sequence[str], blocks: str, made_by: str
) -> dict[str, Any]:
    """The `quantization_config` entry for a model whose layers `to_tensors` wrote.

    Args:
        schemes: the quantized layers.
        skipped: linear layers that are not quantized; only those inside the blocks are written.
        blocks: name of the list of transformer blocks; optimum cannot guess it for a bare encoder.
        made_by: name and version of the program that writes the checkpoint.
    """
    (scheme,) = set(schemes.values())
    version = next(name for name, v in _VERSIONS.items() if v == gptq_version(scheme))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": -1 if scheme.group_size == "per_channel" else scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "format": version,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": False,
        "block_name_to_quantize": blocks,
        "meta": {"quantizer": [made_by]},
    }
    skipped = [name for name in skipped if name.startswith(f"{blocks}.")]
    if skipped:
        # optimum reads `modules_in_block_to_quantize`; GPTQModel and vLLM read `dynamic`.
        config["modules_in_block_to_quantize"] = [list(schemes)]
        config["dynamic"] = {f"-:.*{re.escape(name)}$": {} for name in skipped}
    return config


def layers_in(names: Iterable[str]) -> list[str]:
    """Names of the quantized layers, from a checkpoint's tensor names."""
    return sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))


def from_tensors(
    config: Config, name: str, shape: LinearShape, tensors: Mapping[str, Tensor]
) -> ReadLayer:
    """Read one layer from its tensors, without its bias. Any writer of the format will do.

    Bits and groups follow from the shapes, because GPTQModel's `dynamic` may set them per layer.
    With `sym: true`, all zero points are the middle code, whatever the stated version.
    The version is not reliable there: optimum 2.3 states version 2 but writes version 1.

    Raises:
        IntegrityError: tensors are missing or of another shape.
        UnsupportedError: another packing, or bits or groups that gteopt's kernels do not have.
    """
    label = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if label not in _VERSIONS:
        raise UnsupportedError(
            f"gptq checkpoint in the format '{shorten_value(label)}' (supported: "
            f"{', '.join(_VERSIONS)})"
        )
    subject = f"gptq layer {shorten_value(name)}"
    n_in, n_out = shape.in_features, shape.out_features
    bits = int(config.get("bits", 0))
    if "qweight" in tensors and tensors["qweight"].ndim == 2:
        bits = tensors["qweight"].shape[0] * 32 // n_in
    n_groups = tensors["scales"].shape[0] if "scales" in tensors else 1
    wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "qweight": (torch.int32, (n_in * bits // 32, n_out)),
        "qzeros": (torch.int32, (n_groups, n_out * bits // 32)),
        "scales": (None, (n_groups, n_out)),
        "g_idx": (None, (n_in,)),
    }
    check_tensors(subject, tensors, wanted, optional=frozenset({"g_idx"}))
    qweight = trim_codes(as_bytes(tensors["qweight"].t()), bits, n_in)
    order = None
    if "g_idx" in tensors:
        order = feature_order(subject, tensors["g_idx"], n_groups)
    if order is not None:
        qweight = pack_codes(unpack_codes(qweight, bits, n_in)[:, order], bits)
    zero = _zero_points(tensors["qzeros"], bits, n_out, _VERSIONS[label], config.get("sym", False))
    scale = tensors["scales"].t().contiguous()  # [O, G]
    codes = StoredCodes(qweight, n_in, scale, zero.t().contiguous(), bits)
    return ReadLayer(assemble_weight(subject, codes, Activations()), order)


def _zero_points(
    qzeros: Tensor, bits: int, out_features: int, version: Version, symmetric: bool
) -> Tensor:
    """Zero points, uint8 [G, O], from packed int32 [G, O * bits / 32]."""
    stored = unpack_codes(as_bytes(qzeros), bits, out_features)
    middle = 1 << (bits - 1)
    if symmetric and bool(((stored == middle) | (stored == middle - 1)).all()):
        return torch.full_like(stored, middle)
    if version == 2:
        return stored
    if bits == 3:
        return (stored + 1).bitwise_and_(7)
    # GPTQModel subtracts one from all fields of a word at once, so a zero point of 0 borrows from
    # its neighbour. Adding one to all fields of the word at once restores both.
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return unpack_codes(as_bytes(qzeros + ones), bits, out_features)
