"""Quantize weights to codes, pack the codes, and measure the distance from the original.

`grid` defines the value of a code. Refuses to know: layers, models, files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.errors import IntegrityError, join_problems
from gteopt.quant.double_quantization import (
    BLOCK_SIZE,
    DoubleQuantizedScale,
    double_quantized_bytes,
    quantize_scale,
)
from gteopt.quant.grid import dequantize, encode, group_width, symmetric_zero_point
from gteopt.quant.grid_search import fit_grid, row_chunks
from gteopt.quant.packing import pack_codes, packed_width, unpack_codes
from gteopt.quant.static_activations import InputGrid

_SNR_ROWS = 1024
PARTS = (
    *("qweight", "scale", "scale_code", "scale_largest", "scale_offset", "qzero"),
    *("input_scale", "input_zero"),
)
"""Names that the tensors of a packed weight may have."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes of one byte each, as solvers produce it.

    Attributes:
        codes: uint8 [O, I], each in `code_range(scheme)`.
        scale: float16 [O, G], positive.
        zero: uint8 [O, G]; 2^(bits-1) everywhere when the scheme is symmetric.
        scheme: bits and groups.
        double: how `scale` is stored, if the scheme has doubly quantized scales.
        inputs: how inputs are rounded, if activations are static. The codes then stand for the
            weight times the inputs' scales.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: LayerScheme
    double: DoubleQuantizedScale | None = None
    inputs: InputGrid | None = None

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return QuantizedWeight(
            self.codes.to(device),
            self.scale.to(device),
            self.zero.to(device),
            self.scheme,
            None if self.double is None else self.double.to(device),
            None if self.inputs is None else self.inputs.to(device),
        )

    def rows(self, at: slice | Tensor) -> QuantizedWeight:
        """Some rows (output features): a view for a slice, a copy for their numbers.

        Doubly quantized scales are left out, because rows share their blocks.
        """
        return QuantizedWeight(self.codes[at], self.scale[at], self.zero[at], self.scheme)

    def dequantize(self) -> Tensor:
        """The values that the codes stand for: float32 [O, I]."""
        return dequantize(
            self.codes,
            self.scale,
            self.zero,
            torch.float32,
            number_format=self.scheme.number_format,
        )


@dataclass(frozen=True)
class PackedWeight:
    """A weight as it is stored on disk and in memory.

    Attributes:
        qweight: uint8 [O, ceil(I * bits / 8)], codes packed along I by `pack_codes`.
        scale: float16 [O, G].
        qzero: uint8 [O, ceil(G * bits / 8)], zero points packed along G; None when symmetric.
        scheme: bits and groups.
        in_features: I; the packed width does not determine it.
        double: how `scale` is stored, if the scheme has doubly quantized scales.
        inputs: as in `QuantizedWeight`.
    """

    qweight: Tensor
    scale: Tensor
    qzero: Tensor | None
    scheme: LayerScheme
    in_features: int
    double: DoubleQuantizedScale | None = None
    inputs: InputGrid | None = None

    @property
    def out_features(self) -> int:
        """Output features O."""
        return self.qweight.shape[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, including scales and zero points."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits for each weight, including scales and zero points."""
        return 8 * self.n_bytes / (self.out_features * self.in_features)

    @property
    def zero(self) -> Tensor:
        """Zero points uint8 [O, G]."""
        if self.qzero is None:
            return torch.full_like(self.scale, symmetric_zero_point(self.scheme), dtype=torch.uint8)
        return unpack_codes(self.qzero, self.scheme.bits, self.scale.shape[1])

    def unpack(self) -> QuantizedWeight:
        """The codes that were packed, exactly."""
        codes = unpack_codes(self.qweight, self.scheme.bits, self.in_features)
        return QuantizedWeight(codes, self.scale, self.zero, self.scheme, self.double, self.inputs)

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name: "qweight", "scale" and, when asymmetric, "qzero".

        Doubly quantized scales are stored as "scale_code", "scale_largest" and "scale_offset".
        Static activations have "input_scale" and "input_zero".
        """
        if self.double is not None:
            return {"qweight": self.qweight, **self.double.to_tensors()}
        tensors = {"qweight": self.qweight, "scale": self.scale}
        if self.qzero is not None:
            tensors["qzero"] = self.qzero
        return tensors if self.inputs is None else {**tensors, **self.inputs.to_tensors()}

    @staticmethod
    def from_tensors(
        scheme: LayerScheme, in_features: int, tensors: Mapping[str, Tensor]
    ) -> PackedWeight:
        """Undo `to_tensors`, and check every name, dtype and shape.

        Raises:
            IntegrityError: the tensors do not fit this scheme and number of input features.
        """
        n_groups = in_features // group_width(in_features, scheme.group_size)
        rows = tensors["qweight"].shape[0] if "qweight" in tensors else 0
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "qweight": (torch.uint8, (rows, packed_width(in_features, scheme.bits)))
        }
        if scheme.double_quantization:
            n_blocks = -(-rows * n_groups // BLOCK_SIZE)
            wanted["scale_code"] = (torch.uint8, (rows, n_groups))
            wanted["scale_largest"] = (torch.float32, (n_blocks,))
            wanted["scale_offset"] = (torch.float32, (1,))
        else:
            wanted["scale"] = (torch.float16, (rows, n_groups))
        if not scheme.symmetric:
            wanted["qzero"] = (torch.uint8, (rows, packed_width(n_groups, scheme.bits)))
        if scheme.activation_static:
            wanted |= dict.fromkeys(("input_scale", "input_zero"), (torch.float32, (in_features,)))
        problems = [f"'{name}' is missing" for name in wanted if name not in tensors]
        problems += [f"'{name}' does not belong here" for name in tensors if name not in wanted]
        for name, (dtype, shape) in wanted.items():
            tensor = tensors.get(name)
            if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                problems.append(
                    f"'{name}' is {tensor.dtype} {list(tensor.shape)}, expected {dtype} "
                    f"{list(shape)}"
                )
        if problems:
            subject = f"packed {scheme.bits}-bit weight with {in_features} input features"
            raise IntegrityError(join_problems(subject, problems))
        double = DoubleQuantizedScale.from_tensors(tensors) if scheme.double_quantization else None
        scale = tensors["scale"] if double is None else double.scale()
        inputs = InputGrid.from_tensors(tensors) if scheme.activation_static else None
        return PackedWeight(
            tensors["qweight"], scale, tensors.get("qzero"), scheme, in_features, double, inputs
        )


def quantize_rtn(
    weight: Tensor, scheme: LayerScheme, *, clip_search: bool = False
) -> QuantizedWeight:
    """Round each weight to the nearest code of its group's grid (round to nearest, RTN).

    Args:
        weight: [O, I], any float dtype; computed in float32.
        scheme: bits and groups.
        clip_search: search the range of each group that has the least squared error.

    Raises:
        NumericsError: the weight holds NaN or infinity, or a scale exceeds float16.
    """
    scale, zero = fit_grid(weight, scheme, clip_search=clip_search, importance=None)
    double = quantize_scale(scale) if scheme.double_quantization else None
    scale = scale if double is None else double.scale()
    return round_to_grid(weight, QuantizedWeight(torch.empty(0), scale, zero, scheme, double))


def round_to_grid(weight: Tensor, grid: QuantizedWeight) -> QuantizedWeight:
    """Round a weight [O, I] to the nearest codes of a grid; the grid's own codes are ignored."""
    scheme = grid.scheme
    width = group_width(weight.shape[1], scheme.group_size)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for at, rows in row_chunks(weight):
        grouped = rows.reshape(len(rows), -1, width)  # [O, G, I/G]
        step, offset = grid.scale[at].float()[..., None], grid.zero[at].float()[..., None]
        codes[at] = encode(grouped, step, offset, scheme).flatten(1).to(torch.uint8)
    return replace(grid, codes=codes)


def quantize_tokens(
    x: Tensor, *, symmetric: bool, bits: int = 8
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round each token to integers of its own range, so that x is about (codes - zero) * scale.

    Args:
        x: [..., I], any float dtype; computed in float32.
        symmetric: codes -127 to 127 span -max |x| to max |x|, without a zero point; otherwise codes
            -128 to 127 span min(x, 0) to max(x, 0).
        bits: at most 8. With fewer bits, 127 becomes 2^(bits-1) - 1, and -128 becomes -2^(bits-1).

    Returns:
        Codes int8 [..., I], scales float32 [..., 1], and zero points float32 [..., 1], which are
        whole numbers, or None. A token whose scale would be zero or denormal has scale 1.
    """
    x = x.float()
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    high = x.amax(-1, keepdim=True).clamp_min_(0)
    low = x.amin(-1, keepdim=True).clamp_max_(0)
    # A tensor, because on a GPU, torch would multiply with the rounded reciprocal of a number.
    span = torch.full((), float(most if symmetric else most - least), device=x.device)
    if symmetric:
        scale = token_scale(torch.maximum(high, -low).div_(span))
        # No clamp is needed: |x| / scale exceeds its bound by a rounding error at most.
        return (x / scale).round_().to(torch.int8), scale, None
    scale = token_scale((high - low).div_(span))
    zero = (least - low / scale).round_().clamp_(least, most)
    codes = (x / scale).round_().add_(zero).clamp_(least, most)
    return codes.to(torch.int8), scale, zero


def token_scale(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 instead of a scale that is zero or denormal."""
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Pack codes and zero points densely; `unpack` undoes it exactly."""
    bits = weight.scheme.bits
    return PackedWeight(
        qweight=pack_codes(weight.codes, bits),
        scale=weight.scale.contiguous(),
        qzero=None if weight.scheme.symmetric else pack_codes(weight.zero, bits),
        scheme=weight.scheme,
        in_features=weight.codes.shape[1],
        double=weight.double,
        inputs=weight.inputs,
    )


def packed_bytes(out_features: int, in_features: int, scheme: LayerScheme) -> int:
    """Bytes of a `PackedWeight` of this shape: codes, scales and zero points."""
    groups = in_features // group_width(in_features, scheme.group_size)
    zero_bytes = 0 if scheme.symmetric else packed_width(groups, scheme.bits)
    if scheme.double_quantization:
        codes = out_features * packed_width(in_features, scheme.bits)
        return codes + double_quantized_bytes(out_features * groups)
    input_bytes = 8 * in_features if scheme.activation_static else 0
    row_bytes = packed_width(in_features, scheme.bits) + 2 * groups + zero_bytes
    return out_features * row_bytes + input_bytes


def snr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-noise ratio 10 log10(|R|^2 / |R - A|^2) in dB, in float64; inf when equal."""
    signal = noise = 0.0
    parts = (torch.split(matrix, _SNR_ROWS) for matrix in (reference, approximation))
    for rows, approximate in zip(*parts, strict=True):
        signal += rows.double().square().sum().item()
        noise += (rows.double() - approximate.double()).square().sum().item()
    return ratio_db(signal, noise)


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, -inf without signal."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
