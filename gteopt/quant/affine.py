"""Affine quantization: grids, rounding, dense bit packing, signal-to-noise.

A weight [O, I] is cut along I into G groups a row; each group has a float16 scale s and an integer
zero point z, and a code c stands for the value (c - z) * s. In format e4m3 a code is the byte
of an 8-bit float f; in nf4 it is the place of a number f among the 16 of NF4. Both stand for f * s.
Hides: how a grid is chosen, how codes are packed into bytes.
Refuses to know: layers, models, files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gteopt.config.recipe import GroupSize, LayerScheme, NumberFormat
from gteopt.errors import InputError, IntegrityError, NumericsError, join_problems
from gteopt.quant.double_quantization import (
    BLOCK_SIZE,
    DoubleQuantizedScale,
    double_quantized_bytes,
    quantize_scale,
)
from gteopt.quant.static_activations import InputGrid

E4M3_MAX = 448.0
"""The largest finite 8-bit float of the kind e4m3fn."""
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), appendix E."""
_NF4_CELLS = 16
"""Cells of equal width that the numbers from 0 to 1 are cut into, on the way to NF4's nearest."""
_LARGEST: Mapping[NumberFormat, float] = {"e4m3": E4M3_MAX, "nf4": 1.0}
_CHUNK_WEIGHTS, _CHUNK_WEIGHTS_CPU = 1 << 21, 1 << 19
"""Weights whose grids are searched at a time: few enough for a CPU's cache (NF4 in half the time),
many enough for a GPU to be busy with."""
_SNR_ROWS = 1024
PARTS = (
    *("qweight", "scale", "scale_code", "scale_largest", "scale_offset", "qzero"),
    *("input_scale", "input_zero"),
)
"""What the tensors of a packed weight may be called."""
SMALLEST_SCALE = 2.0**-24
"""The least positive float16: a group too small for it keeps a scale that is not zero."""
_CLIP_RATIOS = tuple(i / 40 for i in range(44, 15, -1))
"""Candidate ranges as shares of a group's own range, 1.1 down to 0.4. Above 1 because a symmetric
range [-8, 7] * s reaches a positive extreme only with a larger step."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes, one byte each: the form that solvers produce.

    Attributes:
        codes: uint8 [O, I], each in `code_range(scheme)`.
        scale: float16 [O, G], positive.
        zero: uint8 [O, G]; 2^(bits-1) everywhere when the scheme is symmetric.
        scheme: bits and groups.
        double: how `scale` is stored, where the scheme has doubly quantized scales.
        inputs: how inputs are rounded, where activations are static; codes stand for weights times
            the inputs' scales then.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: LayerScheme
    double: DoubleQuantizedScale | None = None
    inputs: InputGrid | None = None

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        return QuantizedWeight(
            self.codes.to(device),
            self.scale.to(device),
            self.zero.to(device),
            self.scheme,
            None if self.double is None else self.double.to(device),
            None if self.inputs is None else self.inputs.to(device),
        )

    def rows(self, start: int, end: int) -> QuantizedWeight:
        """Some of the output features, as a view."""
        part = slice(start, end)
        return QuantizedWeight(self.codes[part], self.scale[part], self.zero[part], self.scheme)

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
    """A weight as it lies on disk and in memory.

    Attributes:
        qweight: uint8 [O, ceil(I * bits / 8)], codes packed along I by `pack_codes`.
        scale: float16 [O, G].
        qzero: uint8 [O, ceil(G * bits / 8)], zero points packed along G; None when symmetric.
        scheme: bits and groups.
        in_features: I, which the packed width alone does not tell.
        double: how `scale` is stored, where the scheme has doubly quantized scales.
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
        """O."""
        return self.qweight.shape[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, scales and zero points included."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scales and zero points included."""
        return 8 * self.n_bytes / (self.out_features * self.in_features)

    @property
    def zero(self) -> Tensor:
        """Zero points uint8 [O, G]."""
        if self.qzero is None:
            return torch.full_like(self.scale, middle(self.scheme), dtype=torch.uint8)
        return unpack_codes(self.qzero, self.scheme.bits, self.scale.shape[1])

    def unpack(self) -> QuantizedWeight:
        """The codes again, exactly those that were packed."""
        codes = unpack_codes(self.qweight, self.scheme.bits, self.in_features)
        return QuantizedWeight(codes, self.scale, self.zero, self.scheme, self.double, self.inputs)

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name: "qweight", "scale" and, when asymmetric, "qzero".

        Doubly quantized scales are as they are stored: "scale_code", "scale_largest",
        "scale_offset".
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
        """Rebuild from `to_tensors()`, checking every name, dtype and shape.

        Raises:
            IntegrityError: the tensors do not belong to this scheme and width.
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
            found = tensors.get(name)
            if found is not None and (found.dtype, tuple(found.shape)) != (dtype, shape):
                problems.append(
                    f"'{name}' is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
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
    """Round to nearest: each weight to the closest code of its group's grid.

    Args:
        weight: [O, I], any float dtype; computed in float32.
        scheme: bits and groups.
        clip_search: search each group's range for the least squared error.

    Raises:
        NumericsError: the weight holds NaN or infinity, or a scale exceeds float16.
    """
    scale, zero = fit_grid(weight, scheme, clip_search=clip_search, importance=None)
    double = quantize_scale(scale) if scheme.double_quantization else None
    scale = scale if double is None else double.scale()
    return round_to_grid(weight, QuantizedWeight(torch.empty(0), scale, zero, scheme, double))


def round_to_grid(weight: Tensor, grid: QuantizedWeight) -> QuantizedWeight:
    """The nearest codes of a weight [O, I] on a given grid, whose own codes are ignored."""
    scheme = grid.scheme
    width = group_width(weight.shape[1], scheme.group_size)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for at, rows in _row_chunks(weight):
        grouped = rows.reshape(len(rows), -1, width)  # [O, G, I/G]
        step, offset = grid.scale[at].float()[..., None], grid.zero[at].float()[..., None]
        codes[at] = encode(grouped, step, offset, scheme).flatten(1).to(torch.uint8)
    return replace(grid, codes=codes)


def fit_grid(
    weight: Tensor, scheme: LayerScheme, *, clip_search: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Choose each group's scale and zero point.

    The scale is rounded to float16 before anything is derived from it, so that codes are fitted to
    the grid that is stored. Every grid holds the value 0; a group of zeros gets scale 1.

    Args:
        weight: [O, I], any float dtype; computed in float32.
        scheme: bits and groups.
        clip_search: try narrower ranges than min to max and keep, for each group, the one with
            the least sum of importance * squared error.
        importance: [I], not negative, such as a Hessian's diagonal; None weighs all alike.

    Returns:
        scale float16 [O, G] and zero uint8 [O, G].

    Raises:
        NumericsError: the weight holds NaN or infinity, or a scale exceeds float16.
    """
    share = torch.ones(weight.shape[1], device=weight.device)
    if importance is not None:
        share = importance.float()
    grids = [
        _fit_rows(rows, scheme, clip_search=clip_search, share=share)
        for _, rows in _row_chunks(weight)
    ]
    scale, zero = (torch.cat(parts) for parts in zip(*grids, strict=True))
    return scale, zero


def search_bytes(n_weights: int) -> int:
    """Most that fitting the grid of so many weights takes: float32 values, codes and errors of the
    best grid so far and of the one on trial.
    """
    return 8 * 4 * min(n_weights, _CHUNK_WEIGHTS)


def _row_chunks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight in float32, a few million values at a time: rows do not know each other."""
    most = _CHUNK_WEIGHTS_CPU if weight.device.type == "cpu" else _CHUNK_WEIGHTS
    n_rows = max(1, most // max(1, weight.shape[1]))
    for start in range(0, len(weight), n_rows):
        at = slice(start, start + n_rows)
        yield at, weight[at].detach().float()


def _fit_rows(
    weight: Tensor, scheme: LayerScheme, *, clip_search: bool, share: Tensor
) -> tuple[Tensor, Tensor]:
    """`fit_grid` of a weight float32 [O, I] at once; `share` [I] weighs each feature's error."""
    width = group_width(weight.shape[1], scheme.group_size)
    grouped = weight.reshape(len(weight), -1, width)  # [O, G, I/G]
    low = grouped.amin(-1).clamp_max(0)
    high = grouped.amax(-1).clamp_min(0)
    if not torch.isfinite(high - low).all():
        raise NumericsError("the weight holds NaN or infinite values; it cannot be quantized")
    scale, zero = _grid_of_range(low, high, scheme)
    if clip_search:
        share = share.view(-1, width)  # [G, I/G]
        best = _weighted_error(grouped, scale, zero, share, scheme)
        for ratio in _CLIP_RATIOS:
            trial = _grid_of_range(low * ratio, high * ratio, scheme)
            error = _weighted_error(grouped, *trial, share, scheme)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, trial[0], scale)
            zero = torch.where(better, trial[1], zero)
    if scheme.double_quantization and bool((used := high > low).any()):
        # The 1 of a group of zeros would be an outlier among the scales that are stored with it.
        scale = torch.where(used, scale, scale[used].float().mean().half())
    if not torch.isfinite(scale).all():
        raise NumericsError(
            f"a weight range of {(high - low).max().item():.4g} needs a scale beyond float16's "
            f"65504; leave this layer unquantized (`skip`)"
        )
    return scale, zero


def encode(values: Tensor, scale: Tensor, zero: Tensor, scheme: LayerScheme) -> Tensor:
    """The nearest code of each value, ties to even, clipped into the grid.

    Args:
        values: float32 [O, G, I/G], or any other shape.
        scale: float32, of a shape that broadcasts with values.
        zero: float32 whole numbers, shaped like scale.
        scheme: bounds the codes.

    Returns:
        float32 whole numbers of the broadcast shape.
    """
    shares = values / scale
    if scheme.number_format == "e4m3":
        # What is too large would become NaN.
        return shares.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).float()
    if scheme.number_format == "nf4":
        return _nearest_nf4(shares)
    return shares.round_().add_(zero).clamp_(*code_range(scheme))


def decode(codes: Tensor, scale: Tensor, zero: Tensor, scheme: LayerScheme) -> Tensor:
    """What `encode`'s codes stand for, float32; arguments and shapes as there."""
    if scheme.number_format == "e4m3":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float().mul_(scale)
    if scheme.number_format == "nf4":
        levels = torch.tensor(NF4_LEVELS, device=codes.device)
        return levels.index_select(0, codes.flatten().int()).view(codes.shape).mul_(scale)
    return (codes - zero).mul_(scale)


def _nearest_nf4(shares: Tensor) -> Tensor:
    """Places among NF4's numbers, float32, of the nearest to each value; of two, the lower.

    A value's cell of width 1/16 holds one of the 15 boundaries at most, so that two look-ups and a
    comparison find what a binary search would, in a fifth of its time (a processor guesses half of
    a search's branches wrong: 21 ns a value, one core of a Zen 5 server).
    """
    levels = torch.tensor(NF4_LEVELS, device=shares.device)
    boundaries = (levels[1:] + levels[:-1]) / 2
    edges = torch.arange(-_NF4_CELLS, _NF4_CELLS + 2, device=shares.device) / _NF4_CELLS
    below = torch.bucketize(edges, boundaries)  # boundaries below each cell's lower edge
    within = torch.where(below[1:] > below[:-1], boundaries[below[:-1].clamp_max(14)], torch.inf)
    # A value that rounding lifts into the next cell has no boundary between itself and there.
    cells = shares.clamp(-1, 1).nan_to_num_().mul_(_NF4_CELLS).add_(_NF4_CELLS).int().flatten()
    beyond = shares > within.index_select(0, cells).view(shares.shape)
    return below.float().index_select(0, cells).view(shares.shape).add_(beyond)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    dtype: torch.dtype,
    *,
    number_format: NumberFormat = "int",
) -> Tensor:
    """(codes - zero) * scale in `dtype`; of the other elements the codes' numbers * scale.

    Args:
        codes: uint8 [O, I].
        scale: float16 [O, G].
        zero: uint8 [O, G], or a shape that broadcasts to it.
        dtype: of the result and of the arithmetic.
        number_format: what the codes are.

    Returns:
        [O, I] in `dtype`. The difference is exact; bfloat16 rounds the scale and the product.
    """
    grouped = (*scale.shape, codes.shape[1] // scale.shape[1])
    if number_format == "e4m3":
        floats = codes.view(torch.float8_e4m3fn).to(dtype).reshape(grouped)
        return floats.mul_(scale[..., None].to(dtype)).flatten(1)
    if number_format == "nf4":
        levels = torch.tensor(NF4_LEVELS, dtype=dtype, device=codes.device)
        numbers = levels.index_select(0, codes.flatten().int()).view(grouped)
        return numbers.mul_(scale[..., None].to(dtype)).flatten(1)
    # Small integers vectorise; float16 and bfloat16 subtractions do not.
    steps = codes.reshape(grouped).to(torch.int16).sub_(zero[..., None])  # [O, G, I/G]
    return steps.to(dtype).mul_(scale[..., None].to(dtype)).flatten(1)


def quantize_tokens(
    x: Tensor, *, symmetric: bool, bits: int = 8
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round each token to integers by its own range, x ~ (codes - zero) * scale.

    Args:
        x: [..., I], any float dtype; computed in float32.
        symmetric: codes -127 to 127 span -max |x| to max |x|, without a zero point; otherwise codes
            -128 to 127 span min(x, 0) to max(x, 0).
        bits: 8, or fewer with codes -2^(bits-1) to 2^(bits-1) - 1 in the same way.

    Returns:
        int8 [..., I], float32 scale [..., 1], and float32 whole zero points [..., 1] or None. A
        token of zeros (or of numbers whose scale is denormal) has scale 1.
    """
    x = x.float()
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    high = x.amax(-1, keepdim=True).clamp_min_(0)
    low = x.amin(-1, keepdim=True).clamp_max_(0)
    # A GPU divides by a tensor as a processor does; by a number it multiplies with its reciprocal.
    span = torch.full((), float(most if symmetric else most - least), device=x.device)
    if symmetric:
        scale = token_scale(torch.maximum(high, -low).div_(span))
        # No clamp: |x| / scale exceeds its bound by a rounding error at most.
        return (x / scale).round_().to(torch.int8), scale, None
    scale = token_scale((high - low).div_(span))
    zero = (least - low / scale).round_().clamp_(least, most)
    codes = (x / scale).round_().add_(zero).clamp_(least, most)
    return codes.to(torch.int8), scale, zero


def token_scale(scale: Tensor) -> Tensor:
    """Scales to divide by: 1 where a token is nothing but zeros (or its scale is denormal)."""
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)


def code_range(scheme: LayerScheme) -> tuple[int, int]:
    """The least and greatest code; symmetric 8-bit leaves out 0, so that int8 has no -128."""
    return int(scheme.symmetric and scheme.bits == 8), (1 << scheme.bits) - 1


def middle(scheme: LayerScheme) -> int:
    """The zero point of every symmetric group."""
    return 1 << (scheme.bits - 1)


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Pack codes and zero points densely; `unpack` gives exactly the same back."""
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


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely along the last axis, the first code in the lowest bits.

    Code i takes bits i * bits to (i + 1) * bits - 1 of the row, bit k being bit k % 8 of byte
    k // 8; 3-bit codes cross bytes. Unused bits of the last byte are 0.

    Args:
        codes: uint8 [..., n], each below 2^bits.
        bits: bits a code.

    Returns:
        uint8 [..., ceil(n * bits / 8)]; of 8 bits the codes themselves.
    """
    if bits == 8:
        return codes.contiguous().flatten().view(codes.shape)  # with strides that say so
    n_codes, n_bytes = _period(bits)
    n = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -n % n_codes)) if n % n_codes else codes
    if bits == 4:
        flat = padded.contiguous().flatten()
        if flat.storage_offset() % 2:  # a wider integer cannot begin there
            flat = flat.clone()
        wide = flat.view(torch.int16)  # little-endian: the first code of a pair is the lower byte
        return (wide | wide >> 4).to(torch.uint8).view(*codes.shape[:-1], padded.shape[-1] // 2)
    padded = padded.reshape(*codes.shape[:-1], -1, n_codes)
    packed = torch.zeros(
        (*padded.shape[:-1], n_bytes), dtype=torch.uint8, device=codes.device
    )  # [..., ceil(n / n_codes), n_bytes]
    for i in range(n_codes):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= padded[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= padded[..., i] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_width(n, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack_codes`: uint8 [..., ceil(n * bits / 8)] to uint8 [..., n].

    Runs inside the forward pass of the kernels, hence the path of its own for 4 and 2 bits: each
    byte is spread over a wider integer whose bytes, little-endian, are its codes. That touches
    memory contiguously and is several times faster than writing codes with a stride.
    """
    if bits == 8:
        return packed
    if bits == 4:
        wide = packed.to(torch.int16)
        wide |= wide << 4
        return wide.bitwise_and_(0x0F0F).view(torch.uint8)[..., :n]
    if bits == 2:
        wide = packed.to(torch.int32)
        wide |= wide << 12
        wide |= wide << 6
        return wide.bitwise_and_(0x03030303).view(torch.uint8)[..., :n]
    n_codes, n_bytes = _period(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % n_bytes))
    words = padded.reshape(*packed.shape[:-1], -1, n_bytes)  # [..., ceil(n / n_codes), n_bytes]
    codes = torch.empty((*words.shape[:-1], n_codes), dtype=torch.uint8, device=packed.device)
    for i in range(n_codes):
        byte, shift = divmod(i * bits, 8)
        code = words[..., byte] >> shift
        if shift + bits > 8:
            code |= words[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., i])
    return codes.flatten(-2)[..., :n]


def packed_width(n: int, bits: int) -> int:
    """Bytes that `n` packed codes take."""
    return (n * bits + 7) // 8


def packed_bytes(out_features: int, in_features: int, scheme: LayerScheme) -> int:
    """Bytes of a `PackedWeight` of this shape: codes, scales and zero points."""
    groups = in_features // group_width(in_features, scheme.group_size)
    zero_bytes = 0 if scheme.symmetric else packed_width(groups, scheme.bits)
    if scheme.double_quantization:
        codes = out_features * packed_width(in_features, scheme.bits)
        return codes + double_quantized_bytes(out_features * groups)
    input_bytes = 8 * in_features if scheme.activation_static else 0
    a_row = packed_width(in_features, scheme.bits) + 2 * groups + zero_bytes
    return out_features * a_row + input_bytes


def nf4_numbers(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """NF4's numbers, not yet scaled: uint8 [O, I / 2], two codes a byte, to `dtype` [O, I].

    Both numbers of a byte are looked up at once, as one wider integer: 17 times as fast in bfloat16
    as looking up codes (4864 x 896, one core of a Zen 5 server).
    """
    pair = {2: torch.int32, 4: torch.int64}[dtype.itemsize]
    levels = torch.tensor(NF4_LEVELS, dtype=dtype, device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([levels[byte & 15], levels[byte >> 4]], dim=-1).view(pair).flatten()
    found = pairs.index_select(0, packed.flatten().int())
    return found.view(dtype).view(len(packed), -1)


def group_width(in_features: int, group_size: GroupSize) -> int:
    """Input features a group.

    Raises:
        InputError: the group size does not divide `in_features`.
    """
    if group_size == "per_channel":
        return in_features
    if in_features % group_size:
        raise InputError(
            f"group_size {group_size} does not divide {in_features} input features; choose another "
            f"group_size, or `fallback: per_channel` or `fallback: skip` in the recipe"
        )
    return group_size


def group_size_problems(in_features: Mapping[str, int], group_size: GroupSize) -> list[str]:
    """One line for each layer whose input features the group size does not divide.

    Args:
        in_features: input features by layer name.
        group_size: as in the scheme; "per_channel" fits every layer.
    """
    if group_size == "per_channel":
        return []
    return [
        f"{name}: {n} input features are not a multiple of group_size {group_size}"
        for name, n in in_features.items()
        if n % group_size
    ]


def snr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-noise ratio 10 log10(|R|^2 / |R - A|^2) in dB, in float64; inf when equal."""
    signal = noise = 0.0
    parts = (torch.split(each, _SNR_ROWS) for each in (reference, approximation))
    for rows, other in zip(*parts, strict=True):
        signal += rows.double().square().sum().item()
        noise += (rows.double() - other.double()).square().sum().item()
    return ratio_db(signal, noise)


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, -inf without signal."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _period(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and of those bytes."""
    n_codes = 8 // math.gcd(bits, 8)
    return n_codes, n_codes * bits // 8


def _grid_of_range(low: Tensor, high: Tensor, scheme: LayerScheme) -> tuple[Tensor, Tensor]:
    """The grid whose codes span low <= 0 <= high: scale float16 [O, G], zero uint8 [O, G]."""
    if scheme.number_format != "int":
        step = torch.maximum(-low, high) / _LARGEST[scheme.number_format]
        scale = torch.where(step > 0, step, 1.0).clamp_min(SMALLEST_SCALE).half()
        return scale, torch.full_like(scale, middle(scheme), dtype=torch.uint8)
    lowest, highest = code_range(scheme)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    step = torch.where(span > 0, span / (highest - lowest), 1.0)
    scale = step.clamp_min(SMALLEST_SCALE).half()
    if scheme.symmetric:
        return scale, torch.full_like(scale, middle(scheme), dtype=torch.uint8)
    zero = torch.round(-low / scale.float()).clamp_(lowest, highest)
    return scale, zero.to(torch.uint8)


def _weighted_error(
    grouped: Tensor, scale: Tensor, zero: Tensor, share: Tensor, scheme: LayerScheme
) -> Tensor:
    """Sum over each group of share * squared rounding error: [O, G].

    Args:
        grouped: float32 [O, G, I/G].
        scale: float16 [O, G].
        zero: uint8 [O, G].
        share: float32 [G, I/G].
        scheme: bounds the codes.
    """
    step, offset = scale.float()[..., None], zero.float()[..., None]
    values = decode(encode(grouped, step, offset, scheme), step, offset, scheme)
    return values.sub_(grouped).square_().mul_(share).sum(-1)
