"""The format of `quant_method: gptq`, begun by AutoGPTQ; GPTQModel and optimum read it.

vLLM and SGLang read what is symmetric in 4 or 8 bits.

A layer NAME of O output and I input features in G groups has

    NAME.qweight  int32 [I * bits / 32, O]  codes packed densely along I, lowest bits first
    NAME.qzeros   int32 [G, O * bits / 32]  zero points packed densely along O; version 1 stores
                                            them less one, version 2 as they are
    NAME.scales   float16 [G, O]
    NAME.g_idx    int32 [I]                 the group of each input feature
    NAME.bias     [O]                       where there is one

and stands for (code - zero) * scale. Hides: packing order and what the versions do to zero points.
Source: GPTQModel 7.6, `nn_modules/qlinear/__init__.py` (pack_block) and `utils/model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.errors import UnsupportedError
from gteopt.formats.packed import (
    Activations,
    Config,
    ReadLayer,
    Shape,
    StoredCodes,
    as_bytes,
    as_words,
    assemble,
    check_tensors,
    cut,
    feature_order,
    zero_points,
)
from gteopt.quant.affine import PackedWeight
from gteopt.quant.grid import group_width
from gteopt.quant.packing import pack_codes, unpack_codes

Version = Literal[1, 2]
_VERSIONS: dict[str, Version] = {"gptq": 1, "gptq_v2": 2}


def problems(schemes: Mapping[str, LayerScheme], shapes: Mapping[str, Shape]) -> list[str]:
    """Why these layers cannot be written so that every engine opens them; empty when they can."""
    found = [
        f"{name}: {shape.out_features} x {shape.in_features} features; both must be multiples of 32"
        for name, shape in shapes.items()
        if shape.out_features % 32 or shape.in_features % 32
    ]
    if any(scheme.activation_bits == 8 for scheme in schemes.values()):
        found.append("8-bit activations: the format knows weights only")
    found += [
        f"number_format {number_format}: the format knows whole numbers only"
        for number_format in sorted({scheme.number_format for scheme in schemes.values()} - {"int"})
    ]
    if any((s.bits, s.group_size) == (4, "per_channel") for s in schemes.values()):
        found.append("4 bits in one group a row: GPTQModel's CPU kernel needs groups of 32 to 256")
    if len(set(schemes.values())) > 1:
        found.append("layers differ in bits or groups: the format has one scheme for all of them")
    return found


def version_of(scheme: LayerScheme) -> Version:
    """The version a scheme is written in: 1, which every engine reads, where it is exact.

    Version 1 cannot hold the zero point 0, which asymmetric groups of positive weights have.
    """
    return 1 if scheme.symmetric else 2


def to_tensors(weight: PackedWeight, *, version: Version | None = None) -> dict[str, Tensor]:
    """The layer's tensors without its bias; `from_tensors` gives exactly the same weight back.

    Raises:
        UnsupportedError: features that are no multiples of 32; a zero point 0 in version 1.
    """
    scheme, (out_features, in_features) = weight.scheme, (weight.out_features, weight.in_features)
    version = version or version_of(scheme)
    if out_features % 32 or in_features % 32:
        raise UnsupportedError(
            f"a gptq checkpoint cannot hold {out_features} x {in_features} features: both must be "
            f"multiples of 32"
        )
    zero = zero_points(weight)
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
    schemes: Mapping[str, LayerScheme], left: Sequence[str], blocks: str, made_by: str
) -> dict[str, Any]:
    """What config.json says of a model whose layers `to_tensors` wrote.

    Args:
        schemes: the quantized layers.
        left: linear layers that are not quantized; those outside the blocks need no word.
        blocks: name of the list of transformer blocks, which optimum cannot guess for a bare
            encoder.
        made_by: name and version of the writer.
    """
    (scheme,) = set(schemes.values())
    version = next(name for name, v in _VERSIONS.items() if v == version_of(scheme))
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
    left = [name for name in left if name.startswith(f"{blocks}.")]
    if left:
        # optimum reads the first, GPTQModel and vLLM the second.
        config["modules_in_block_to_quantize"] = [list(schemes)]
        config["dynamic"] = {f"-:.*{re.escape(name)}$": {} for name in left}
    return config


def layers_in(names: Iterable[str]) -> list[str]:
    """The quantized layers among a checkpoint's tensor names."""
    return sorted(name.removesuffix(".qweight") for name in names if name.endswith(".qweight"))


def from_tensors(
    config: Config, name: str, shape: Shape, tensors: Mapping[str, Tensor]
) -> ReadLayer:
    """Read a layer's tensors (without its bias) of any maker.

    Bits and groups are read off the shapes, so that GPTQModel's `dynamic` layers are understood.
    A checkpoint that says `sym: true` has one zero point everywhere; it is believed over the
    version, which optimum 2.3 writes wrongly for exactly these (version 2, tensors of version 1).

    Raises:
        IntegrityError: tensors are missing or of another shape.
        UnsupportedError: another packing, or bits and groups that gteopt's kernels do not have.
    """
    label = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if label not in _VERSIONS:
        raise UnsupportedError(
            f"gptq checkpoint in the format '{label}' (supported: {', '.join(_VERSIONS)})"
        )
    subject = f"gptq layer {name}"
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
    qweight = cut(as_bytes(tensors["qweight"].t()), bits, n_in)
    order = None
    if "g_idx" in tensors:
        order = feature_order(subject, tensors["g_idx"], n_groups)
    if order is not None:
        qweight = pack_codes(unpack_codes(qweight, bits, n_in)[:, order], bits)
    zero = _zero_points(tensors["qzeros"], bits, n_out, _VERSIONS[label], config.get("sym", False))
    scale = tensors["scales"].t().contiguous()  # [O, G]
    codes = StoredCodes(qweight, n_in, scale, zero.t().contiguous(), bits)
    return ReadLayer(assemble(subject, codes, Activations()), order)


def _zero_points(
    qzeros: Tensor, bits: int, out_features: int, version: Version, symmetric: bool
) -> Tensor:
    """uint8 [G, O] of int32 [G, O * bits / 32]."""
    stored = unpack_codes(as_bytes(qzeros), bits, out_features)
    middle = 1 << (bits - 1)
    if symmetric and bool(((stored == middle) | (stored == middle - 1)).all()):
        return torch.full_like(stored, middle)
    if version == 2:
        return stored
    if bits == 3:
        return (stored + 1).bitwise_and_(7)
    # GPTQModel subtracts one from all fields of a word at once: a zero point 0 borrows from its
    # neighbour, and only the same addition gives both back.
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return unpack_codes(as_bytes(qzeros + ones), bits, out_features)
