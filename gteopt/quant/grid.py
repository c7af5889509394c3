"""Encode values as codes of a grid, and decode them: integers, 8-bit floats and NF4.

A weight [O, I] is cut along I into G groups a row. Each group has a float16 scale s and an integer
zero point z, and a code c stands for the value (c - z) * s. In the format e4m3, a code is the byte
of an 8-bit float f; in nf4, it is the index of one of NF4's 16 numbers f. Both stand for f * s.
Refuses to know: how a grid is chosen, how codes are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from gteopt.config.recipe import GroupSize, LayerScheme, NumberFormat
from gteopt.errors import InputError

E4M3_MAX = 448.0
"""The largest finite number of the 8-bit float e4m3fn."""
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4's numbers: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), appendix E."""
SMALLEST_SCALE = 2.0**-24
"""The least positive float16. No scale is smaller, so a group of tiny weights has no scale 0."""
_NF4_CELLS = 16
"""Cells of equal width between 0 and 1, by which `_nearest_nf4` looks up the nearest number."""
_LARGEST: Mapping[NumberFormat, float] = {"e4m3": E4M3_MAX, "nf4": 1.0}


def encode(values: Tensor, scale: Tensor, zero: Tensor, scheme: LayerScheme) -> Tensor:
    """The nearest code of each value, ties to even, clipped to the grid.

    Args:
        values: float32 [O, G, I/G], or any other shape.
        scale: float32, of a shape that broadcasts with `values`.
        zero: whole numbers in float32, shaped like `scale`.
        scheme: the number format, and the range of codes.

    Returns:
        Codes as float32 of the broadcast shape.
    """
    shares = values / scale
    if scheme.number_format == "e4m3":
        # Without the clamp, a value that is too large would become NaN.
        return shares.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).float()
    if scheme.number_format == "nf4":
        return _nearest_nf4(shares)
    return shares.round_().add_(zero).clamp_(*code_range(scheme))


def decode(codes: Tensor, scale: Tensor, zero: Tensor, scheme: LayerScheme) -> Tensor:
    """The values that codes of `encode` stand for, float32; arguments and shapes as in `encode`."""
    if scheme.number_format == "e4m3":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float().mul_(scale)
    if scheme.number_format == "nf4":
        levels = nf4_levels(str(codes.device))
        return levels.index_select(0, codes.flatten().long()).view(codes.shape).mul_(scale)
    return (codes - zero).mul_(scale)


def _nearest_nf4(shares: Tensor) -> Tensor:
    """Index, float32, of the NF4 number nearest to each value; the lower index at a tie.

    A cell of width 1/16 holds at most one of the 15 boundaries between numbers. So two look-ups and
    a comparison replace a binary search, in a fifth of its time.
    """
    below, within = _nf4_cells(str(shares.device))
    # If rounding moves a value into the next cell, no boundary lies between the two.
    cells = shares.clamp(-1, 1).nan_to_num_().mul_(_NF4_CELLS).add_(_NF4_CELLS).long().flatten()
    beyond = shares > within.index_select(0, cells).view(shares.shape)
    return below.index_select(0, cells).view(shares.shape).add_(beyond)


@lru_cache
def nf4_levels(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """NF4's 16 numbers on a device; cached, so they must not be changed."""
    with torch.inference_mode(False):
        return torch.tensor(NF4_LEVELS, device=device).to(dtype)


@lru_cache
def _nf4_cells(device: str) -> tuple[Tensor, Tensor]:
    """For each cell, the number of boundaries below it, and the boundary inside it or infinity."""
    with torch.inference_mode(False):
        levels = nf4_levels(device)
        boundaries = (levels[1:] + levels[:-1]) / 2
        edges = torch.arange(-_NF4_CELLS, _NF4_CELLS + 2, device=device) / _NF4_CELLS
        below = torch.bucketize(edges, boundaries)
        is_within = below[1:] > below[:-1]
        within = torch.where(is_within, boundaries[below[:-1].clamp_max(14)], torch.inf)
        return below.float(), within


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    dtype: torch.dtype,
    *,
    number_format: NumberFormat = "int",
) -> Tensor:
    """(codes - zero) * scale in `dtype`; for e4m3 and nf4, the codes' numbers * scale.

    Args:
        codes: uint8 [O, I].
        scale: float16 [O, G].
        zero: uint8 [O, G], or a shape that broadcasts to it.
        dtype: dtype of the result and of the arithmetic.
        number_format: format of the codes.

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
    # In int16, because subtractions in float16 and bfloat16 are not vectorized.
    steps = codes.reshape(grouped).to(torch.int16).sub_(zero[..., None])  # [O, G, I/G]
    return steps.to(dtype).mul_(scale[..., None].to(dtype)).flatten(1)


def nf4_numbers(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """NF4's numbers without scale: uint8 [O, I / 2], two codes a byte, to `dtype` [O, I].

    Both numbers of a byte are looked up at once, as one wider integer. This is many times faster
    than a look-up for each code.
    """
    pair = {2: torch.int32, 4: torch.int64}[dtype.itemsize]
    levels = torch.tensor(NF4_LEVELS, dtype=dtype, device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([levels[byte & 15], levels[byte >> 4]], dim=-1).view(pair).flatten()
    numbers = pairs.index_select(0, packed.flatten().int())
    return numbers.view(dtype).view(len(packed), -1)


def code_range(scheme: LayerScheme) -> tuple[int, int]:
    """The least and greatest code. Symmetric 8-bit codes omit 0, which would be -128 in int8."""
    return int(scheme.symmetric and scheme.bits == 8), (1 << scheme.bits) - 1


def symmetric_zero_point(scheme: LayerScheme) -> int:
    """The zero point of every symmetric group."""
    return 1 << (scheme.bits - 1)


def group_width(in_features: int, group_size: GroupSize) -> int:
    """Input features of a group.

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
        in_features: input features of each layer by its name.
        group_size: as in the scheme; "per_channel" fits every layer.
    """
    if group_size == "per_channel":
        return []
    return [
        f"{name}: {n} input features are not a multiple of group_size {group_size}"
        for name, n in in_features.items()
        if n % group_size
    ]


def grid_of_range(low: Tensor, high: Tensor, scheme: LayerScheme) -> tuple[Tensor, Tensor]:
    """The grid that spans low <= 0 <= high: scale float16 [O, G] and zero uint8 [O, G]."""
    if scheme.number_format != "int":
        step = torch.maximum(-low, high) / _LARGEST[scheme.number_format]
        scale = torch.where(step > 0, step, 1.0).clamp_min(SMALLEST_SCALE).half()
        return scale, torch.full_like(scale, symmetric_zero_point(scheme), dtype=torch.uint8)
    lowest, highest = code_range(scheme)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    step = torch.where(span > 0, span / (highest - lowest), 1.0)
    scale = step.clamp_min(SMALLEST_SCALE).half()
    if scheme.symmetric:
        return scale, torch.full_like(scale, symmetric_zero_point(scheme), dtype=torch.uint8)
    zero = torch.round(-low / scale.float()).clamp_(lowest, highest)
    return scale, zero.to(torch.uint8)
