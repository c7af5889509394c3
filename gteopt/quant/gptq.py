"""Quantize a weight by GPTQ: round it column by column, and correct the remaining columns.

Algorithm 1 of Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (arXiv:2210.17323). It minimizes tr(E H E^T), with the weight error E [O,
I] and the second moment H [I, I] of the layer's inputs. Hides: the order of the updates, and which
of two roundings a row keeps. Refuses to know: where inputs come from, how codes are packed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.errors import NumericsError
from gteopt.quant.affine import QuantizedWeight, ratio_db, round_to_grid
from gteopt.quant.columns import Columns, round_in_halves, round_one_by_one
from gteopt.quant.double_quantization import quantize_scale
from gteopt.quant.grid_search import fit_grids, search_bytes
from gteopt.quant.inverse_factor import InverseFactor, factor_bytes, factorise_inverse
from gteopt.quant.products import inverse_order, quadratic_forms, row_spans, times_inverse
from gteopt.quant.row_feedback import RowFeedback, round_row_blocks
from gteopt.quant.triton_devices import runs_triton

_ROW_WEIGHTS = 1 << 25
"""How many weights have their errors computed at a time."""


@dataclass(frozen=True)
class GptqOptions:
    """How `solve` rounds.

    Attributes:
        act_order: round the input features with the largest Hessian diagonal first.
        damping: share of the mean Hessian diagonal that is added to the diagonal; raised tenfold
            while the factorization fails.
        clip_search: search the range of each group. The squared error of feature i has weight
            1 / [H^-1]_ii (see `InverseFactor.importance`).
        gptaq_strength: share of GPTAQ's correction that is applied, 0 to 1.
        block_size: columns that are rounded one by one before a matrix product updates later
            columns. It changes speed, not codes. The kernel for GPUs has its own number.
        row_feedback: how the rows of one weight correct each other; None keeps them independent.
    """

    act_order: bool = True
    damping: float = 0.01
    clip_search: bool = True
    gptaq_strength: float = 1.0
    block_size: int = 32
    row_feedback: RowFeedback | None = None


@dataclass(frozen=True)
class GptqResult:
    """The result of `solve`.

    Attributes:
        weight: the codes and their grid.
        damping: the damping that was used; larger than the option's if it had to be raised.
        n_dead: input features that were zero in every calibration row.
        output_snr_db: see the function `output_snr_db`.
    """

    weight: QuantizedWeight
    damping: float
    n_dead: int
    output_snr_db: float


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: LayerScheme,
    options: GptqOptions,
    *,
    cross_term: Tensor | None = None,
    factor: InverseFactor | None = None,
) -> GptqResult:
    """Quantize one weight against the second moment of its inputs.

    Groups are static: scales are fitted on the original weight before the first column is rounded.
    So the order of rounding does not matter at run time. For a single row, greedy rounding can be
    worse than rounding to nearest. Rows are independent, so each row keeps the rounding with the
    smaller output error. Input features that were always zero carry no error; they are rounded to
    nearest, because other texts may use them.

    With `cross_term` it is GPTAQ (Li et al. 2025, arXiv:2504.02692). GPTQ solves min |W x - Q x|^2
    over the codes Q; GPTAQ solves min |W x0 - Q x|^2, with the original model's inputs x0.
    Completing the square leaves GPTQ's problem for another weight: W + (W dX X^T) H^-1. Here dX X^T
    is the mean of (x0 - x) x^T, and H the damped Hessian. Few texts estimate the correction poorly,
    so only a share of it is applied.

    With `options.row_feedback`, blocks of rows are rounded one after the other, and each is
    corrected for the errors of those before it; see `quant/row_feedback.py`. The error at the
    layer's output is then larger, and the vectors' error is smaller.

    Args:
        weight: [O, I], any float dtype; computed in float32 and left unchanged.
        hessian: float32 [I, I], mean of x x^T.
        scheme: bits and groups.
        options: how to round.
        cross_term: W dX X^T, float32 [O, I]; see `HessianAccumulator.cross_term`.
        factor: the result of `prepare_gptq` for this Hessian and these options, if several layers
            share it.

    Raises:
        NumericsError: the weight or the Hessian holds NaN or infinity; no damping up to the mean
            diagonal makes the Hessian positive definite; or a scale is beyond float16.
    """
    weight = weight.detach().float()
    if factor is None:
        factor = prepare_gptq(hessian, options)
    if cross_term is not None:
        weight = _corrected(weight, cross_term, factor, options.gptaq_strength)
    grids = fit_grids(
        weight, scheme, [_relative(factor.importance()), None], clip_search=options.clip_search
    )
    double = quantize_scale(grids[0][0]) if scheme.double_quantization else None
    scale, zero = (grids[0][0] if double is None else double.scale()), grids[0][1]
    grid = QuantizedWeight(weight.new_empty(len(weight), 0), scale, zero, scheme, double)
    # Doubly quantized scales of several rows share a block, so both roundings need equal scales.
    nearest = grid if double is not None else replace(grid, scale=grids[1][0], zero=grids[1][1])
    if options.row_feedback is None:
        kept, noise = _round_rows(weight, hessian, factor, grid, nearest, options.block_size)
    else:
        kept = replace(
            grid,
            codes=torch.empty_like(weight, dtype=torch.uint8),
            scale=torch.empty_like(grid.scale),
            zero=torch.empty_like(grid.zero),
        )

        def round_rows(rows: Tensor, at: Tensor) -> Tensor:
            of_rows, _ = _round_rows(
                rows, hessian, factor, grid.rows(at), nearest.rows(at), options.block_size
            )
            kept.codes[at], kept.scale[at] = of_rows.codes, of_rows.scale
            kept.zero[at] = of_rows.zero
            return of_rows.dequantize()

        round_row_blocks(weight, options.row_feedback, round_rows)
        noise = 0.0
        for start, end in row_spans(weight, _ROW_WEIGHTS):
            error = kept.rows(slice(start, end)).dequantize() - weight[start:end]
            noise += _output_power(error, hessian)
    used, n_dead = factor.damping, int((hessian.diagonal() == 0).sum())
    signal = _output_power(weight, hessian)
    return GptqResult(kept, used, n_dead, ratio_db(signal, noise))


def _round_rows(
    weight: Tensor,
    hessian: Tensor,
    factor: InverseFactor,
    grid: QuantizedWeight,
    nearest: QuantizedWeight,
    block_size: int,
) -> tuple[QuantizedWeight, float]:
    """Round rows that do not depend on each other, each in the better of two ways.

    Args:
        weight: float32 [n, I].
        hessian: float32 [I, I].
        factor: factor of its inverse.
        grid: scales and zero points of GPTQ's rounding; its codes are ignored.
        nearest: scales and zero points of rounding to nearest.
        block_size: see `GptqOptions`.

    Returns:
        The rows, and the sum of their errors, tr(E H E^T).
    """
    codes, squares = _round_columns(weight, factor, grid, block_size)
    # A factor in float32 misjudges errors by up to a hundredth.
    damped = _DampedErrors(squares, factor.added) if factor.dtype == torch.float64 else None
    return _better_rows(
        replace(grid, codes=codes), round_to_grid(weight, nearest), weight, hessian, damped=damped
    )


def prepare_gptq(hessian: Tensor, options: GptqOptions) -> InverseFactor:
    """The factor that `solve` needs; layers that read the same inputs can share it.

    Raises:
        NumericsError: see `solve`, for the Hessian.
    """
    if not is_finite(hessian):
        raise NumericsError(
            "the Hessian of a layer's inputs holds NaN or infinite values: the model's activations "
            "overflow on the calibration texts; load it in bfloat16 or float32"
        )
    return factorise_inverse(hessian, act_order=options.act_order, damping=options.damping)


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    Reading the least and the greatest value is many times faster than `isfinite` of every value.
    """
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def gptq_work_bytes(out_features: int, in_features: int, *, n_cross_rows: int = 0) -> int:
    """Peak bytes of `solve` and of the statistics, without the weight.

    The peak is either in the factorization or after it. Then memory holds the Hessian, the factor,
    the corrected weight, a reordered copy, the codes twice, and the search of ranges.

    Args:
        out_features: O.
        in_features: I.
        n_cross_rows: rows of the accumulator's sum for GPTAQ's cross term; 0 without GPTAQ.
    """
    square, weights = in_features * in_features, out_features * in_features
    statistics = 4 * n_cross_rows * in_features
    if n_cross_rows not in (0, out_features):
        statistics += 4 * weights  # the product with the weight
    corrected = statistics + 4 * weights if n_cross_rows else 0
    return max(
        statistics + factor_bytes(in_features),
        max(statistics, corrected)
        + (4 + 4) * square
        + (4 + 1 + 1) * weights
        + search_bytes(weights),
    )


def output_snr_db(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Signal-to-noise of the layer's output, 10 log10(tr(W H W^T) / tr(E H E^T)) in dB.

    Args:
        weight: W, [O, I].
        approximation: the dequantized weight, [O, I]; E = W - approximation.
        hessian: H, float32 [I, I], mean of x x^T over the inputs.
    """
    noise = _output_power(weight.float() - approximation.float(), hessian)
    return ratio_db(_output_power(weight, hessian), noise)


def _relative(importance: Tensor) -> Tensor:
    return importance / importance.max()


def _corrected(weight: Tensor, cross_term: Tensor, factor: InverseFactor, share: float) -> Tensor:
    """The weight W + share * C (U^T U) with GPTAQ's cross term C: a new tensor float32 [O, I]."""
    corrected = weight.clone()
    for start, end in row_spans(weight, _ROW_WEIGHTS):
        correction = times_inverse(cross_term[start:end], factor.upper, factor.order)
        corrected[start:end].add_(correction, alpha=share)
    return corrected


def _output_power(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T), computed for some rows at a time."""
    return sum(
        quadratic_forms(weight[start:end].float(), hessian).double().sum().item()
        for start, end in row_spans(weight, _ROW_WEIGHTS)
    )


def _round_columns(
    weight: Tensor, factor: InverseFactor, grid: QuantizedWeight, block_size: int
) -> tuple[Tensor, Tensor]:
    """GPTQ's loop (Algorithm 1): uint8 codes [O, I], and the errors of `_DampedErrors`.

    Args:
        weight: float32 [O, I].
        factor: factor of the inverse Hessian.
        grid: scales and zero points; its codes are ignored.
        block_size: see `GptqOptions`.
    """
    columns = Columns.of(weight, factor, grid)
    if runs_triton(weight.device):
        from gteopt.quant.cuda_columns import PANEL, round_panel

        round_in_halves(columns, PANEL, round_panel)
    else:
        round_in_halves(columns, block_size, round_one_by_one)
    squares = torch.linalg.vector_norm(columns.work, dim=1).square_()
    return columns.codes.index_select(1, inverse_order(factor.order)), squares


class _DampedErrors(NamedTuple):
    """The output errors of GPTQ's rounding under the damped Hessian, as its loop has them.

    A column's error e_i is divided by U[i, i], so the errors of a row are E = e U. With
    U^T U = (H + a)^-1, E (H + a) E^T is the sum of all e_i^2.

    Attributes:
        squares: the sum of each row, float32 [O].
        added: a, which was added to the diagonal.
    """

    squares: Tensor
    added: float


def _better_rows(
    first: QuantizedWeight,
    second: QuantizedWeight,
    weight: Tensor,
    hessian: Tensor,
    *,
    damped: _DampedErrors | None = None,
) -> tuple[QuantizedWeight, float]:
    """Take each row from the rounding with the smaller output error; from the first if equal.

    Args:
        first: one rounding.
        second: the other one.
        weight: float32 [O, I].
        hessian: float32 [I, I].
        damped: errors of the first rounding, which save a product with the Hessian.

    Returns:
        The weight of these rows, and the sum of their errors, tr(E H E^T).
    """
    is_second, noise = [], 0.0
    for start, end in row_spans(weight, _ROW_WEIGHTS):
        rows = weight[start:end]
        error = first.rows(slice(start, end)).dequantize() - rows
        if damped is None:
            of_first = quadratic_forms(error, hessian)
        else:
            undamped = damped.squares[start:end] - damped.added * error.square_().sum(1)
            of_first = undamped.clamp_min_(0)
        nearest = second.rows(slice(start, end)).dequantize()
        of_second = quadratic_forms(nearest - rows, hessian)
        is_second.append(of_second < of_first)
        noise += torch.minimum(of_first, of_second).double().sum().item()
    take = torch.cat(is_second)[:, None]
    kept = replace(
        first,
        codes=torch.where(take, second.codes, first.codes),
        scale=torch.where(take, second.scale, first.scale),
        zero=torch.where(take, second.zero, first.zero),
    )
    return kept, noise
