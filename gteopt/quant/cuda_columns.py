"""GPU kernel that rounds a panel of GPTQ's columns in one launch.

`columns.round_one_by_one` launches dozens of kernels for each column, and a launch takes longer
than a column's arithmetic. The kernel is here and not among the layers of `kernels`, because
`solve` chooses it, and `quant` knows no layer.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gteopt.config.recipe import NumberFormat
from gteopt.quant.columns import Columns
from gteopt.quant.grid import E4M3_MAX, code_range, nf4_levels

PANEL = 128
"""Most columns that one launch rounds."""
_ROWS = 8
"""Rows of a program. They fit the registers of one warp, so no column waits for another warp."""


class _Tensors(NamedTuple):
    """See `Columns`; `numbers` is the result of `_numbers`."""

    work: Tensor
    codes: Tensor
    upper: Tensor
    group: Tensor
    steps: Tensor
    offsets: Tensor
    numbers: Tensor | None


class _Sizes(NamedTuple):
    """The panel's first column and its number of columns, and the range of codes or floats."""

    n_rows: int
    n_features: int
    start: int
    n_columns: int
    lowest: float
    highest: float


def round_panel(columns: Columns, start: int, end: int) -> None:
    """Round at most `PANEL` columns in place, as `columns.round_one_by_one` does.

    Corrections are summed in another order, so a value next to a tie may get the other code.
    """
    assert end - start <= PANEL
    assert columns.work.is_contiguous()
    assert columns.upper.is_contiguous()
    work, number_format = columns.work, columns.scheme.number_format
    lowest, highest = code_range(columns.scheme)
    if number_format == "e4m3":
        lowest, highest = -int(E4M3_MAX), int(E4M3_MAX)
    tensors = _Tensors(
        *(work, columns.codes, columns.upper, columns.group, columns.steps, columns.offsets),
        numbers=_numbers(number_format, str(work.device)),
    )
    n_rows, n_features = work.shape
    sizes = _Sizes(n_rows, n_features, start, end - start, float(lowest), float(highest))
    on_gpu = torch.cuda.device(work.device) if work.is_cuda else nullcontext()
    with on_gpu:  # Triton launches on the current GPU
        _panel_kernel[(triton.cdiv(len(work), _ROWS),)](
            tensors, sizes, FORMAT=number_format, ROWS=_ROWS, COLUMNS=PANEL, num_warps=1
        )


@lru_cache
def _numbers(number_format: NumberFormat, device: str) -> Tensor | None:
    """The numbers that codes stand for, float32, on a device; None for whole numbers.

    NF4's 16 numbers are followed by the 15 boundaries between them.
    """
    with torch.inference_mode(False):
        if number_format == "e4m3":
            codes = torch.arange(256, dtype=torch.uint8, device=device)
            return codes.view(torch.float8_e4m3fn).float()
        if number_format == "nf4":
            levels = nf4_levels(device)
            return torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
        return None


@triton.jit
def _rounded(x):
    # Adding 1.5 * 2^23 leaves no fraction bits: rounds to even, like torch.round, up to 2^22.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3_code(shares):
    """The byte of the nearest 8-bit float to numbers up to 448, ties to even; 127 for NaN.

    It is computed from the bits of the float32, because Triton's conversion needs a newer GPU than
    the other formats do.
    """
    bits = shares.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 20 of the 23 fraction bits are dropped, and the exponent's bias falls from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = _rounded(tl.abs(shares) * 512.0).to(tl.int32)  # below 2^-6 in steps of 2^-9
    code = tl.where(size < (121 << 23), subnormal, normal)
    return tl.where(shares == shares, code, 127) | ((bits >> 24) & 128)


@triton.jit
def _code(shares, offset, sizes, numbers, FORMAT: tl.constexpr):
    """`grid.encode` of values in units of the scale, int32; the same codes for NaN, too."""
    if FORMAT == "e4m3":
        within = tl.minimum(tl.maximum(shares, sizes.lowest), sizes.highest)
        code = _e4m3_code(tl.where(shares == shares, within, shares))  # the clamp drops a NaN
    elif FORMAT == "nf4":
        number = tl.where(shares == shares, shares, 0.0)
        code = tl.zeros(shares.shape, tl.int32)
        for bit in tl.static_range(3, -1, -1):  # binary search among the 15 boundaries
            boundary = tl.load(numbers + 16 + code + (1 << bit) - 1)
            code += (number > boundary).to(tl.int32) << bit
    else:
        moved = _rounded(shares) + offset
        within = tl.minimum(tl.maximum(moved, sizes.lowest), sizes.highest)
        code = tl.where(shares == shares, within, 0.0).to(tl.int32)
    return code


@triton.jit
def _panel_kernel(tensors, sizes, FORMAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: ROWS rows of the panel, in registers until all their columns are rounded."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, COLUMNS)
    is_row = row < sizes.n_rows
    inside = is_row[:, None] & (at < sizes.n_columns)[None, :]
    where = row.to(tl.int64)[:, None] * sizes.n_features + sizes.start + at[None, :]
    panel = tl.load(tensors.work + where, mask=inside, other=0.0)
    rounded = tl.zeros((ROWS, COLUMNS), tl.int32)
    for i in range(sizes.n_columns):
        corner = tensors.upper + (sizes.start + i).to(tl.int64) * sizes.n_features + sizes.start
        later = (at > i) & (at < sizes.n_columns)
        corrections = tl.load(corner + at, mask=later, other=0.0)
        of_row = tl.load(tensors.group + sizes.start + i) * sizes.n_rows + row
        step = tl.load(tensors.steps + of_row, mask=is_row, other=1.0)
        offset = tl.load(tensors.offsets + of_row, mask=is_row, other=0.0)
        # The sum of one value and zeros. As whole numbers, it keeps the sign of a zero.
        is_column = (at == i)[None, :]
        bits = tl.sum(tl.where(is_column, panel.to(tl.int32, bitcast=True), 0), axis=1)
        column = bits.to(tl.float32, bitcast=True)
        code = _code(tl.div_rn(column, step), offset, sizes, tensors.numbers, FORMAT)
        if FORMAT == "int":
            number = code.to(tl.float32) - offset
        else:
            number = tl.load(tensors.numbers + code)
        pivot = tl.load(corner + i)
        error = tl.div_rn(column - number * step, tl.broadcast_to(pivot, (ROWS,)))
        rounded = tl.where(is_column, code[:, None], rounded)
        corrected = panel - error[:, None] * corrections[None, :]
        # Selected, not multiplied by zero, so that NaN reaches no earlier column.
        panel = tl.where(later[None, :], corrected, panel)
        panel = tl.where(is_column, error[:, None], panel)
    tl.store(tensors.work + where, panel, mask=inside)
    tl.store(tensors.codes + where, rounded.to(tl.uint8), mask=inside)
