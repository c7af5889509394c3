"""GPTQ: round a weight column by column, correcting the columns still to come.

After Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323), Algorithm 1: minimise tr(E H E^T), E the weight error [O, I] and
H the second moment of the layer's inputs [I, I]. Hides: factorisation, order, damping, lazy
updates. Refuses to know: where inputs come from, how codes are packed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.errors import NumericsError
from gteopt.quant.affine import (
    QuantizedWeight,
    decode,
    encode,
    fit_grid,
    group_width,
    quantize_rtn,
    ratio_db,
    round_to_grid,
    search_bytes,
)
from gteopt.quant.double_quantization import quantize_scale

_MOST_DAMPING = 1.0
"""Past the mean of its own diagonal, what is factorised is no longer the Hessian."""
_STRIP = 1024
"""Columns of a matrix [I, I] that are worked on at a time, so that no second one is needed."""
_CHUNK_WEIGHTS = 1 << 22
"""Weights whose errors are worked out at a time."""


class HessianAccumulator:
    """The running mean of x x^T over the inputs x of one layer, in float32.

    A mean, not a sum, so that its magnitude does not grow with the calibration set. Only the lower
    triangle is summed, strip by strip; the upper one is its mirror image.

    Args:
        in_features: I.
        device: where the sums lie.
        through: the weight [O, I] of the layer that reads these inputs, where it is the only one:
            with fewer outputs than inputs it is cheaper to sum what it makes of a difference.

    Attributes:
        n_rows: inputs seen so far.
        mean: float32 [I], of the inputs seen so far.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        *,
        through: Tensor | None = None,
    ) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self.mean = torch.zeros(in_features, device=device)
        self._is_mirrored = True
        is_narrow = through is not None and len(through) < in_features
        self._through = through if is_narrow else None
        self._shift: Tensor | None = None
        self.n_rows = 0

    def to(self, device: torch.device | str) -> HessianAccumulator:
        """The same statistics on another device; itself where they are there already."""
        here = self.hessian
        if here.device == torch.device(device):
            return self
        other = copy.copy(self)
        other._sum = here.to(device)
        other._shift = None if self._shift is None else self._shift.to(device)
        return other

    @property
    def hessian(self) -> Tensor:
        """The mean so far, float32 [I, I]; not a copy."""
        if not self._is_mirrored:
            with torch.inference_mode():  # where it was summed, as often as not
                for start, end in _spans(len(self._sum), _STRIP):
                    self._sum[start:end, end:] = self._sum[end:, start:end].T
            self._is_mirrored = True
        return self._sum

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Count more inputs in.

        Args:
            x: [n, I], any float dtype. Padding must not be among them.
            original: x0 [n, I], what the original model feeds the layer in place of x; of every
                call or of none.
        """
        if not len(x):
            return
        x = x.to(self._sum)
        total = self.n_rows + len(x)
        for start, end in _spans(len(self._sum), _STRIP):
            self._sum[start:, start:end].addmm_(
                x[:, start:].T, x[:, start:end], beta=self.n_rows / total, alpha=1 / total
            )
        self.mean.lerp_(x.mean(0), len(x) / total)
        self._is_mirrored = False
        if original is not None:
            left = original.to(x) - x
            if self._through is not None:
                left = left @ self._through.to(x).T  # [n, O]
            if self._shift is None:
                self._shift = torch.zeros(left.shape[1], x.shape[1], device=x.device)
            self._shift.addmm_(left.T, x, beta=self.n_rows / total, alpha=1 / total)
        self.n_rows = total

    def lack(self, weight: Tensor) -> Tensor | None:
        """What a layer's outputs lack beside the original's: the mean of W (x0 - x) x^T.

        Args:
            weight: W, float32 [O, I]; the one that was given as `through`, where one was.

        Returns:
            float32 [O, I], not to be changed; None where `add` was told no x0.
        """
        if self._shift is None or self._through is not None:
            return self._shift
        return weight @ self._shift


@dataclass(frozen=True)
class GptqResult:
    """What the solver found.

    Attributes:
        weight: the codes and their grid.
        damping: the share that was used: the one asked for, or raised until the Hessian factorised.
        n_dead: input features that were zero in every calibration row.
        output_snr_db: as the function of that name has it.
    """

    weight: QuantizedWeight
    damping: float
    n_dead: int
    output_snr_db: float


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: LayerScheme,
    *,
    act_order: bool,
    damping: float,
    clip_search: bool,
    lack: Tensor | None = None,
    share: float = 1.0,
    block_size: int = 128,
) -> GptqResult:
    """Quantize one weight against the second moment of its inputs.

    Groups are static: scales are fitted on the original weight's column groups before the first
    column is rounded, so that the order of rounding leaves no trace at run time. Greedy rounding
    can lose to plain rounding on single rows; rows are independent, so each row keeps whichever of
    the two has the smaller output error. Input features that were always zero carry no error and
    are rounded to nearest, which is the best guess should they ever wake.

    With `lack` it is GPTAQ (Li et al. 2025, arXiv:2504.02692), which solves min |W x0 - Q x|^2 over
    the codes Q, x0 being the original model's inputs, where GPTQ has min |W x - Q x|^2. Completing
    the square leaves GPTQ's problem for another weight: W + L H^-1 with L = mean W (x0 - x) x^T.
    Few texts say little about L, so only a share of the correction is taken, and H is the damped
    one, whose factor is there.

    Args:
        weight: [O, I], any float dtype; computed in float32 and left unchanged.
        hessian: float32 [I, I], mean of x x^T.
        scheme: bits and groups.
        act_order: round the input features with the largest Hessian diagonal first.
        damping: share of the mean Hessian diagonal added to the diagonal; raised tenfold while the
            factorisation fails.
        clip_search: search each group's range, weighing a feature's squared error by
            1 / [H^-1]_ii: what that error costs after the other features have compensated for it
            (arXiv:2210.17323, eq. 2).
        lack: L, float32 [O, I].
        share: of the correction by L, 0 to 1.
        block_size: columns between two updates of all later columns; changes speed, not codes.

    Raises:
        NumericsError: NaN or infinity in the weight or the Hessian, a Hessian that no damping up
            to its mean diagonal makes positive definite, or a scale beyond float16.
    """
    weight = weight.detach().float()
    if not is_finite(hessian):
        raise NumericsError(
            "the Hessian of a layer's inputs holds NaN or infinite values: the model's activations "
            "overflow on the calibration texts; load it in bfloat16 or float32"
        )
    diagonal = hessian.diagonal()
    n_features = len(diagonal)
    order = torch.arange(n_features, device=weight.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    factor, used = _inverse_factor(hessian, order, damping)
    if lack is not None:
        weight = _compensated(weight, lack, factor, order, share)

    importance = torch.empty_like(diagonal)
    importance[order] = 1 / factor.square().sum(0)  # 1 / [H^-1]_ii
    scale, zero = fit_grid(
        weight, scheme, clip_search=clip_search, importance=importance / importance.max()
    )
    double = quantize_scale(scale) if scheme.double_quantization else None
    scale = scale if double is None else double.scale()
    group = torch.arange(n_features, device=weight.device) // group_width(
        n_features, scheme.group_size
    )
    ordered = _round_columns(
        weight.T[order], factor, scale.float(), zero.float(), group[order], scheme, block_size
    )
    del factor
    codes = torch.empty_like(ordered)
    codes[order] = ordered
    del ordered
    solved = QuantizedWeight(codes.T.contiguous(), scale, zero, scheme, double)
    if double is None:
        rounded = quantize_rtn(weight, scheme, clip_search=clip_search)
    else:  # scales of several rows hang together: both must have the same
        rounded = round_to_grid(weight, solved)
    kept, noise = _better_rows(solved, rounded, weight, hessian)
    return GptqResult(
        weight=kept,
        damping=used,
        n_dead=int((diagonal == 0).sum()),
        output_snr_db=ratio_db(_output_power(weight, hessian), noise),
    )


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; without a tensor of truth values, so many times faster.

    NaN and infinity survive as the least or the greatest.
    """
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def work_bytes(out_features: int, in_features: int, *, n_lacking: int = 0) -> int:
    """Most that `solve` holds beside the weight that it is given; the statistics are counted in.

    The Hessian and the factor in float32, what the factor is made from in float64 and a strip of it
    twice in float32; then, without the latter two, the weight in float32, its codes twice and what
    searching ranges takes.

    Args:
        out_features: O.
        in_features: I.
        n_lacking: rows of what the accumulator summed for `lack`, 0 without.
    """
    square, weights = in_features * in_features, out_features * in_features
    strip = 2 * 4 * min(_STRIP, in_features) * in_features
    held = 4 * n_lacking * in_features
    if n_lacking not in (0, out_features):
        held += 4 * weights  # the product with the weight
    compensating = held + 4 * weights if n_lacking else 0
    return max(
        held + (4 + 8 + 4) * square + strip,
        max(held, compensating) + (4 + 4) * square + (4 + 1 + 1) * weights + search_bytes(weights),
    )


def _compensated(
    weight: Tensor, lack: Tensor, factor: Tensor, order: Tensor, share: float
) -> Tensor:
    """W + share * L (U^T U), the features of L and W in their own order: a new float32 [O, I]."""
    found = torch.empty_like(weight)
    for start, end in _row_spans(weight):
        correction = lack[start:end, order] @ factor.T @ factor  # [rows, I], in `order`
        found[start:end, order] = weight[start:end, order].add_(correction, alpha=share)
    return found


def output_snr_db(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Signal-to-noise of the layer's output, 10 log10(tr(W H W^T) / tr(E H E^T)) in dB.

    Args:
        weight: W, [O, I].
        approximation: the dequantized weight, [O, I]; E = W - approximation.
        hessian: H, float32 [I, I], mean of x x^T over the inputs.
    """
    noise = _output_power(weight.float() - approximation.float(), hessian)
    return ratio_db(_output_power(weight, hessian), noise)


def _output_power(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T), some rows at a time."""
    return sum(
        _row_errors(weight[start:end].float(), hessian).double().sum().item()
        for start, end in _row_spans(weight)
    )


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping * mean diagonal)^-1, and the damping used.

    H stands for the Hessian with its rows and columns in `order`. With J reversing an axis and
    J H J = L L^T, U = J L^-1 J: one factorisation in float64, in the memory of one matrix, and one
    triangular inverse in float32 (the condition of L is the square root of H's), without forming
    H^-1.

    Raises:
        NumericsError: no damping up to `_MOST_DAMPING` makes the matrix positive definite.
    """
    n = len(hessian)
    mean = hessian.diagonal().double().mean()
    backwards = order.flip(0)
    work = torch.empty(n, n, dtype=torch.float64, device=hessian.device)
    used = damping
    while used <= _MOST_DAMPING:
        for start, end in _spans(n, _STRIP):  # only the lower triangle is read
            rows = hessian.index_select(0, backwards[start:end])
            work[start:end, :end] = rows.index_select(1, backwards[:end])
        del rows
        # Without any input there is nothing to scale by; every damping then gives the identity.
        work.diagonal().add_(used * mean if mean else 1.0)
        if _cholesky_(work):
            lower = work.float()
            del work
            _invert_lower_(lower)
            return lower.flip(0, 1), used
        used *= 10
    raise NumericsError(
        f"the Hessian [{n}, {n}] of a layer's inputs is not positive "
        f"definite with damping {damping:g} to {used / 10:g} (mean diagonal {mean.item():.4g}, "
        f"least {hessian.diagonal().min().item():.4g}); use more calibration texts or more damping"
    )


def _cholesky_(matrix: Tensor) -> bool:
    """Replace a symmetric matrix [n, n] by its lower Cholesky factor; False where it has none.

    Blocked and right-looking (Golub and Van Loan, Matrix Computations, 4.2.9): a library routine
    would need a second matrix. The upper triangle is not read, and set to zero.
    """
    n = len(matrix)
    for start, end in _spans(n, _STRIP // 4):
        corner, info = torch.linalg.cholesky_ex(matrix[start:end, start:end])
        if info.item():
            return False
        matrix[start:end, start:end] = corner
        panel = torch.linalg.solve_triangular(corner, matrix[end:, start:end].T, upper=False).T
        matrix[end:, start:end] = panel
        for first, last in _spans(n - end, _STRIP):
            matrix[end + first :, end + first : end + last].addmm_(
                panel[first:], panel[first:last].T, alpha=-1
            )
    matrix.tril_()
    return True


def _invert_lower_(lower: Tensor) -> None:
    """Replace a lower triangular matrix [n, n] by its inverse, the last columns first.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], C^-1 being there already.
    """
    n = len(lower)
    identity = torch.eye(min(n, _STRIP // 4), dtype=lower.dtype, device=lower.device)
    for start, end in reversed(_spans(n, _STRIP // 4)):
        one = identity[: end - start, : end - start]
        corner = torch.linalg.solve_triangular(lower[start:end, start:end], one, upper=False)
        below = lower[end:, start:end] @ corner
        for first, last in _spans(n - end, _STRIP):
            rows = lower[end + first : end + last, end : end + last]
            lower[end + first : end + last, start:end] = -(rows @ below[:last])
        lower[start:end, start:end] = corner


def _round_columns(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    scheme: LayerScheme,
    block_size: int,
) -> Tensor:
    """GPTQ's loop (Algorithm 1) on features already in order: uint8 codes [I, O].

    Args:
        weight: float32 [I, O], features first so that one of them is contiguous in memory; used up.
        factor: U of `_inverse_factor`, float32 [I, I].
        scale: float32 [O, G].
        zero: float32 [O, G].
        group: which group each feature belongs to, [I].
        scheme: bounds the codes.
        block_size: features a block.
    """
    steps, offsets, of = scale.T.contiguous(), zero.T.contiguous(), group.tolist()  # [G, O]
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for start in range(0, len(weight), block_size):
        end = min(start + block_size, len(weight))
        errors = torch.empty_like(weight[start:end])
        for i in range(start, end):
            step, offset = steps[of[i]], offsets[of[i]]
            code = encode(weight[i], step, offset, scheme)
            codes[i] = code
            error = weight[i] - decode(code, step, offset, scheme)
            error /= factor[i, i]
            weight[i + 1 : end] -= torch.outer(factor[i, i + 1 : end], error)
            errors[i - start] = error
        weight[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes


def _better_rows(
    first: QuantizedWeight, second: QuantizedWeight, weight: Tensor, hessian: Tensor
) -> tuple[QuantizedWeight, float]:
    """Row by row the one with the smaller output error; the first where they are equal.

    Returns:
        The rows, and the sum of their errors, tr(E H E^T).
    """
    taken, noise = [], 0.0
    for start, end in _row_spans(weight):
        rows = weight[start:end]
        ours, plain = (
            _row_errors(each.rows(start, end).dequantize() - rows, hessian)
            for each in (first, second)
        )
        taken.append(plain < ours)
        noise += torch.minimum(ours, plain).double().sum().item()
    take = torch.cat(taken)[:, None]
    kept = QuantizedWeight(
        codes=torch.where(take, second.codes, first.codes),
        scale=torch.where(take, second.scale, first.scale),
        zero=torch.where(take, second.zero, first.zero),
        scheme=first.scheme,
        double=first.double,
    )
    return kept, noise


def _row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """diag(E H E^T): float32 [O]; from the lower triangle of H, in half the products."""
    sums = torch.zeros(len(error), device=error.device)
    for start, end in _spans(len(hessian), _STRIP // 2):
        own = error[:, start:end]
        strip = own @ hessian[start:end, start:end]
        strip.addmm_(error[:, end:], hessian[end:, start:end], alpha=2)
        sums += strip.mul_(own).sum(1)
    return sums


def _spans(n: int, width: int) -> list[tuple[int, int]]:
    """0 to n cut into pieces of at most `width`."""
    return [(start, min(start + width, n)) for start in range(0, n, width)]


def _row_spans(weight: Tensor) -> list[tuple[int, int]]:
    return _spans(len(weight), max(1, _CHUNK_WEIGHTS // weight.shape[1]))
