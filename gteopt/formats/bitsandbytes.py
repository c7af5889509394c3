"""Read and write the format of `quant_method: bitsandbytes`.

transformers and vLLM read it. A layer NAME has O output and I input features. It is either NF4:
weights are flattened and split into blocks of B, two codes per byte, the first in the high half

    NAME.weight                 uint8 [O * I / 2, 1]
    NAME.weight.absmax          float32 [O * I / B], or uint8 with double quantization
    NAME.weight.quant_map       float32 [16], the numbers of NF4
    NAME.weight.quant_state.bitsandbytes__nf4   a JSON text as uint8: block size, shape, dtype;
                                with double quantization also the scales' block size, dtype and mean
    NAME.weight.nested_absmax, NAME.weight.nested_quant_map   with double quantization only

or LLM.int8(), where a weight is code * SCB / 127

    NAME.weight         int8 [O, I]
    NAME.SCB            float32 [O]
    NAME.weight_format  uint8 [], 0: row-major order

Hides: these tensor names.
Source: bitsandbytes 0.50, `functional.QuantState`, `nn.modules.Linear8bitLt`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gteopt.config.recipe import GroupSize, LayerScheme
from gteopt.errors import IntegrityError, UnsupportedError, shorten_value
from gteopt.formats.packed import (
    Activations,
    Config,
    LinearShape,
    ReadLayer,
    StoredCodes,
    assemble_weight,
    check_tensors,
)
from gteopt.quant.affine import PackedWeight
from gteopt.quant.double_quantization import BLOCK_SIZE, dynamic_map
from gteopt.quant.grid import NF4_LEVELS

_STATE = "weight.quant_state.bitsandbytes__nf4"
_BLOCK_SIZES = (64, 128)


def problems(schemes: Mapping[str, LayerScheme], shapes: Mapping[str, LinearShape]) -> list[str]:
    """Reasons why the format cannot hold these layers; empty when it can."""
    del shapes
    kinds = set(schemes.values())
    reasons = []
    if any(not _is_nf4(s) and s.activation_outliers is None for s in kinds):
        reasons.append("the format holds only NF4 weights, and 8-bit weights with LLM.int8()")
    if len(kinds) > 1:
        reasons.append("layers differ in bits or groups: the format has one scheme for all layers")
    return reasons


def to_tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """The layer's tensors without its bias; `from_tensors` gives exactly the same weight back."""
    scale = weight.scale.float()
    if not _is_nf4(weight.scheme):
        return {
            "weight": (weight.qweight ^ 128).view(torch.int8),
            "SCB": scale[:, 0] * 127,
            "weight_format": torch.zeros((), dtype=torch.uint8),
        }
    packed = weight.qweight.reshape(-1, 1)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.scheme.group_size,
        "dtype": "bfloat16",
        "shape": [weight.out_features, weight.in_features],
    }
    tensors = {
        "weight": packed << 4 | packed >> 4,  # gteopt has the first code in the low half
        "weight.absmax": scale.flatten(),
        "weight.quant_map": torch.tensor(NF4_LEVELS),
    }
    if weight.double is not None:
        state |= {
            "nested_blocksize": BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.double.offset.item(),
        }
        tensors["weight.absmax"] = weight.double.codes.flatten()
        tensors["weight.nested_absmax"] = weight.double.largest
        tensors["weight.nested_quant_map"] = dynamic_map()
    tensors[_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def quantization_config(
    schemes: Mapping[str, LayerScheme], skipped: Sequence[str], blocks: str, made_by: str
) -> dict[str, Any]:
    """The `quantization_config` entry for a model whose layers `to_tensors` wrote.

    Args:
        schemes: the quantized layers; all have the same scheme.
        skipped: all linear layers of the model that are not quantized.
        blocks: not used here.
        made_by: not used here; the format has no field for it.
    """
    del blocks, made_by
    scheme = next(iter(schemes.values()))
    nf4 = _is_nf4(scheme)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": nf4,
        "load_in_8bit": not nf4,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": scheme.double_quantization,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": scheme.activation_outliers or 0.0,
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def layers_in(names: Iterable[str]) -> list[str]:
    """Names of the quantized layers, from a checkpoint's tensor names."""
    ends = (".weight.absmax", ".SCB")
    return sorted(name.removesuffix(end) for name in names for end in ends if name.endswith(end))


def from_tensors(
    config: Config, name: str, shape: LinearShape, tensors: Mapping[str, Tensor]
) -> ReadLayer:
    """Read one layer from its tensors, without its bias. Any writer of the format will do.

    Raises:
        IntegrityError: tensors are missing or of another shape.
        UnsupportedError: FP4, or a block size that gteopt's kernels do not have.
    """
    subject = f"bitsandbytes layer {shorten_value(name)}"
    if "SCB" in tensors:
        return ReadLayer(_read_int8(subject, config, shape, tensors), None)
    return ReadLayer(_read_nf4(subject, shape, tensors), None)


def _read_int8(
    subject: str, config: Config, shape: LinearShape, tensors: Mapping[str, Tensor]
) -> PackedWeight:
    wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "weight": (torch.int8, (shape.out_features, shape.in_features)),
        "SCB": (torch.float32, (shape.out_features,)),
        "weight_format": (torch.uint8, ()),
    }
    check_tensors(subject, tensors, wanted, frozenset({"weight_format"}))
    if int(tensors.get("weight_format", torch.tensor(0))) != 0:
        raise UnsupportedError(f"{subject}: 'weight_format' is not 0 (supported: 0, row-major)")
    # Flipping the top bit of a signed code adds the zero point 128.
    qweight = tensors["weight"].contiguous().view(torch.uint8) ^ 128
    scale = tensors["SCB"][:, None] / 127
    threshold = float(config.get("llm_int8_threshold", 6.0))
    zero = torch.full_like(scale, 128, dtype=torch.uint8)
    codes = StoredCodes(qweight, shape.in_features, scale, zero, 8)
    return assemble_weight(subject, codes, Activations(8, outliers=threshold or None))


def _read_nf4(subject: str, shape: LinearShape, tensors: Mapping[str, Tensor]) -> PackedWeight:
    if _STATE not in tensors:
        raise UnsupportedError(f"{subject}: '{_STATE}' is missing; only NF4 is supported, not FP4")
    state = json.loads(bytes(tensors[_STATE].tolist()))
    width = int(state["blocksize"])
    if width not in _BLOCK_SIZES or shape.in_features % width:
        raise UnsupportedError(
            f"{subject}: blocks of {width} in rows of {shape.in_features} features (supported: "
            f"{' and '.join(map(str, _BLOCK_SIZES))}, if they divide the number of features)"
        )
    n_weights = shape.out_features * shape.in_features
    n_blocks = n_weights // width
    double = "weight.nested_absmax" in tensors
    absmax_dtype = torch.uint8 if double else torch.float32
    wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "weight": (torch.uint8, (n_weights // 2, 1)),
        "weight.absmax": (absmax_dtype, (n_blocks,)),
        "weight.quant_map": (torch.float32, (16,)),
        _STATE: (torch.uint8, tuple(tensors[_STATE].shape)),
    }
    if double:
        step = int(state["nested_blocksize"])
        wanted["weight.nested_absmax"] = (torch.float32, (-(-n_blocks // step),))
        wanted["weight.nested_quant_map"] = (torch.float32, (256,))
    check_tensors(subject, tensors, wanted)
    levels = tensors["weight.quant_map"]
    if not torch.allclose(levels, torch.tensor(NF4_LEVELS).to(levels), rtol=0, atol=1e-6):
        raise IntegrityError(f"{subject}: 'weight.quant_map' does not hold the numbers of NF4")
    absmax = tensors["weight.absmax"]
    if double:
        shares = tensors["weight.nested_quant_map"][absmax.int()]
        sizes = tensors["weight.nested_absmax"].repeat_interleave(step)[:n_blocks]
        absmax = shares * sizes + float(state["nested_offset"])
    packed = tensors["weight"].reshape(shape.out_features, -1)
    qweight = (packed >> 4).bitwise_or_(packed << 4)  # the file has the first code in the high half
    scale = absmax.view(shape.out_features, -1)
    zero = torch.full_like(scale, 8, dtype=torch.uint8)
    codes = StoredCodes(qweight, shape.in_features, scale, zero, 4)
    group_size = cast(GroupSize, width)
    return assemble_weight(
        subject, codes, Activations(), number_format="nf4", group_size=group_size
    )


def _is_nf4(scheme: LayerScheme) -> bool:
    return scheme.number_format == "nf4"
