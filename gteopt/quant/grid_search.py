"""Choose a grid for each group: from its range, or by a search for the least squared error.

Refuses to know: layers, models, files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.errors import NumericsError
from gteopt.quant.grid import (
    E4M3_MAX,
    NF4_LEVELS,
    code_range,
    grid_of_range,
    group_width,
    symmetric_zero_point,
)

_CHUNK_WEIGHTS, _CHUNK_WEIGHTS_CPU = 1 << 21, 1 << 18
"""Weights that are searched at a time: enough to use a GPU fully, few enough for a CPU's cache."""
_CLIP_RATIOS = tuple(i / 40 for i in range(44, 15, -1) if i != 40)
"""Ranges to try, as shares of a group's own range: 1.1 down to 0.4, without 1. A share above 1
helps, because a symmetric range [-8, 7] * s reaches a positive extreme only with a larger step."""
_NF4_CELLS = 2048
"""Cells between 0 and 1 by which NF4's rounding error is looked up. Near a boundary, the wrong one
of two neighbours may be taken; the error then changes by less than the width of a cell."""
Grid = tuple[Tensor, Tensor]
"""scale float16 [O, G] and zero uint8 [O, G]."""


def fit_grid(
    weight: Tensor, scheme: LayerScheme, *, clip_search: bool, importance: Tensor | None
) -> Grid:
    """Choose each group's scale and zero point.

    The scale is rounded to float16 first, so that zero points and codes fit the grid that is
    stored. Every grid holds the value 0; a group of zeros gets scale 1.

    Args:
        weight: [O, I], any float dtype; computed in float32.
        scheme: bits and groups.
        clip_search: try other ranges than min to max, and keep for each group the range with the
            least sum of importance * squared error.
        importance: [I], not negative, such as a Hessian's diagonal; None gives all features weight
            1.

    Returns:
        scale float16 [O, G] and zero uint8 [O, G].

    Raises:
        NumericsError: the weight holds NaN or infinity, or a scale exceeds float16.
    """
    return fit_grids(weight, scheme, [importance], clip_search=clip_search)[0]


def fit_grids(
    weight: Tensor,
    scheme: LayerScheme,
    importances: Sequence[Tensor | None],
    *,
    clip_search: bool,
) -> list[Grid]:
    """`fit_grid` for several importances in one search, which rounds to each range once."""
    rows = [
        _fit_rows(part, scheme, importances, clip_search=clip_search)
        for _, part in row_chunks(weight)
    ]
    grids = []
    for of_importance in zip(*rows, strict=True):
        scales, zeros = zip(*of_importance, strict=True)
        grids.append((torch.cat(scales), torch.cat(zeros)))
    return grids


def search_bytes(n_weights: int) -> int:
    """Peak bytes of fitting the grid of `n_weights` weights.

    Memory holds float32 values, codes and errors of the best grid so far and of the grid on trial.
    """
    return 8 * 4 * min(n_weights, _CHUNK_WEIGHTS)


def row_chunks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight at a time, in float32, with their slice; rows are independent."""
    most = _CHUNK_WEIGHTS_CPU if weight.device.type == "cpu" else _CHUNK_WEIGHTS
    n_rows = max(1, most // max(1, weight.shape[1]))
    for start in range(0, len(weight), n_rows):
        at = slice(start, start + n_rows)
        yield at, weight[at].detach().float()


def _fit_rows(
    weight: Tensor,
    scheme: LayerScheme,
    importances: Sequence[Tensor | None],
    *,
    clip_search: bool,
) -> list[Grid]:
    """`fit_grids` for a weight float32 [O, I] that is processed at once."""
    width = group_width(weight.shape[1], scheme.group_size)
    grouped = weight.reshape(len(weight), -1, width)  # [O, G, I/G]
    low = grouped.amin(-1).clamp_max(0)
    high = grouped.amax(-1).clamp_min(0)
    if not torch.isfinite(high - low).all():
        raise NumericsError("the weight holds NaN or infinite values; it cannot be quantized")
    grids = [grid_of_range(low, high, scheme)] * len(importances)
    if clip_search:
        shares = [
            None if importance is None else importance.float().view(-1, width)
            for importance in importances
        ]
        best = _errors(grouped, grids[0], shares, scheme)
        for ratio in _CLIP_RATIOS:
            trial = grid_of_range(low * ratio, high * ratio, scheme)
            for i, error in enumerate(_errors(grouped, trial, shares, scheme)):
                is_better = error < best[i]
                best[i] = torch.where(is_better, error, best[i])
                scale, zero = grids[i]
                grids[i] = (
                    torch.where(is_better, trial[0], scale),
                    torch.where(is_better, trial[1], zero),
                )
    return [(_checked(scale, low, high, scheme), zero) for scale, zero in grids]


def _checked(scale: Tensor, low: Tensor, high: Tensor, scheme: LayerScheme) -> Tensor:
    """The scales [O, G]; with double quantization, groups of zeros get the mean scale.

    Raises:
        NumericsError: a scale exceeds float16.
    """
    if scheme.double_quantization and bool((used := high > low).any()):
        # A group of zeros has scale 1, which would be an outlier in its block of scales.
        scale = torch.where(used, scale, scale[used].float().mean().half())
    if not torch.isfinite(scale).all():
        raise NumericsError(
            f"a weight range of {(high - low).max().item():.4g} needs a scale above 65504, the "
            f"largest float16; leave this layer unquantized (`skip`)"
        )
    return scale


def _errors(
    grouped: Tensor, grid: Grid, shares: Sequence[Tensor | None], scheme: LayerScheme
) -> list[Tensor]:
    """For each share, the sum over each group of share * squared rounding error: [O, G].

    Args:
        grouped: float32 [O, G, I/G].
        grid: as `fit_grid` returns it.
        shares: float32 [G, I/G]; None gives all features weight 1.
        scheme: the number format, and the range of codes.
    """
    scale, zero = grid
    step = scale.float()
    steps = grouped / step[..., None]  # in units of the scale, so that it enters once a group
    if scheme.number_format == "e4m3":
        nearest = steps.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    elif scheme.number_format == "nf4":
        cells = steps.clamp(-1, 1).add_(1).mul_(_NF4_CELLS).long().flatten()
        nearest = _nf4_of_cells(str(steps.device)).index_select(0, cells).view(steps.shape)
    elif scheme.symmetric:
        lowest, highest = code_range(scheme)
        nearest = steps.round().clamp_(
            lowest - symmetric_zero_point(scheme), highest - symmetric_zero_point(scheme)
        )
    else:
        steps.add_(zero[..., None])
        nearest = steps.round().clamp_(*code_range(scheme))
    squares = steps.sub_(nearest).square_()
    area = step.square_()
    sums = [
        squares.sum(-1) if share is None else torch.mul(squares, share, out=nearest).sum(-1)
        for share in shares
    ]
    return [error.mul_(area) for error in sums]


@lru_cache
def _nf4_of_cells(device: str) -> Tensor:
    """The NF4 number nearest to the middle of each cell from -1 to 1: float32 [2 * cells + 1]."""
    with torch.inference_mode(False):
        levels = torch.tensor(NF4_LEVELS)
        middles = (torch.arange(2 * _NF4_CELLS + 1) + 0.5) / _NF4_CELLS - 1
        return levels[torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2)].to(device)
