"""GPTQ: round a weight column by column, correcting the columns still to come.

After Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323), Algorithm 1: minimise tr(E H E^T), E the weight error [O, I] and
H the second moment of the layer's inputs [I, I]. Hides: factorisation, order, damping, lazy
updates. Refuses to know: where inputs come from, how codes are packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gteopt.errors import NumericsError
from gteopt.quant.affine import (
    QuantizedWeight,
    decode,
    encode,
    fit_grid,
    group_width,
    quantize_rtn,
    ratio_db,
)
from gteopt.recipe import LayerScheme

_MOST_DAMPING = 1.0
"""Past the mean of its own diagonal, what is factorised is no longer the Hessian."""


class HessianAccumulator:
    """The running mean of x x^T over the inputs x of one layer, in float32.

    A mean, not a sum, so that its magnitude does not grow with the calibration set.

    Attributes:
        hessian: float32 [I, I].
        n_rows: inputs seen so far.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.hessian = torch.zeros(in_features, in_features, device=device)
        self.n_rows = 0

    def add(self, x: Tensor) -> None:
        """Count more inputs in: [n, I], any float dtype. Padding must not be among them."""
        if not len(x):
            return
        x = x.to(self.hessian)
        total = self.n_rows + len(x)
        self.hessian.addmm_(x.T, x, beta=self.n_rows / total, alpha=1 / total)
        self.n_rows = total


@dataclass(frozen=True)
class GptqResult:
    """What the solver found.

    Attributes:
        weight: the codes and their grid.
        damping: the share that was used: the one asked for, or raised until the Hessian factorised.
        n_dead: input features that were zero in every calibration row.
    """

    weight: QuantizedWeight
    damping: float
    n_dead: int


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: LayerScheme,
    *,
    act_order: bool,
    damping: float,
    clip_search: bool,
    block_size: int = 128,
) -> GptqResult:
    """Quantize one weight against the second moment of its inputs.

    Groups are static: scales are fitted on the original weight's column groups before the first
    column is rounded, so that the order of rounding leaves no trace at run time. Greedy rounding
    can lose to plain rounding on single rows; rows are independent, so each row keeps whichever of
    the two has the smaller output error. Input features that were always zero carry no error and
    are rounded to nearest, which is the best guess should they ever wake.

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
        block_size: columns between two updates of all later columns; changes speed, not codes.

    Raises:
        NumericsError: NaN or infinity in the weight or the Hessian, a Hessian that no damping up
            to its mean diagonal makes positive definite, or a scale beyond float16.
    """
    weight = weight.detach().float()
    if not torch.isfinite(hessian).all():
        raise NumericsError(
            "the Hessian of a layer's inputs holds NaN or infinite values: the model's activations "
            "overflow on the calibration texts; load it in bfloat16 or float32"
        )
    diagonal = hessian.diagonal()
    n_features = len(diagonal)
    order = torch.arange(n_features, device=weight.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    factor, used = _inverse_factor(hessian[order][:, order], damping)

    importance = torch.empty_like(diagonal)
    importance[order] = 1 / factor.square().sum(0)  # 1 / [H^-1]_ii
    scale, zero = fit_grid(
        weight, scheme, clip_search=clip_search, importance=importance / importance.max()
    )
    group = torch.arange(n_features, device=weight.device) // group_width(
        n_features, scheme.group_size
    )
    codes = torch.empty_like(weight)
    codes[:, order] = _round_columns(
        weight[:, order], factor, scale.float(), zero.float(), group[order], scheme, block_size
    )
    solved = QuantizedWeight(codes.to(torch.uint8), scale, zero, scheme)
    rounded = quantize_rtn(weight, scheme, clip_search=clip_search)
    return GptqResult(
        weight=_better_rows(solved, rounded, weight, hessian),
        damping=used,
        n_dead=int((diagonal == 0).sum()),
    )


def output_snr_db(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Signal-to-noise of the layer's output, 10 log10(tr(W H W^T) / tr(E H E^T)) in dB.

    Args:
        weight: W, [O, I].
        approximation: the dequantized weight, [O, I]; E = W - approximation.
        hessian: H, float32 [I, I], mean of x x^T over the inputs.
    """
    weight = weight.float()
    signal = _row_errors(weight, hessian).double().sum().item()
    noise = _row_errors(weight - approximation.float(), hessian).double().sum().item()
    return ratio_db(signal, noise)


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U with U^T U = (H + damping * mean diagonal)^-1, and the damping used.

    With J reversing an axis and J H J = L L^T, U = (J L J)^-1: one factorisation and one triangular
    inverse, without forming H^-1. Both in float64; the result is float32.

    Raises:
        NumericsError: no damping up to `_MOST_DAMPING` makes the matrix positive definite.
    """
    mean = hessian.diagonal().double().mean()
    reversed_ = hessian.double().flip(0, 1)
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    used = damping
    while used <= _MOST_DAMPING:
        # Without any input there is nothing to scale by; every damping then gives the identity.
        lower, info = torch.linalg.cholesky_ex(
            reversed_ + identity * (used * mean if mean else 1.0)
        )
        if not info.item():
            upper = lower.flip(0, 1)
            return torch.linalg.solve_triangular(upper, identity, upper=True).float(), used
        used *= 10
    raise NumericsError(
        f"the Hessian [{len(hessian)}, {len(hessian)}] of a layer's inputs is not positive "
        f"definite with damping {damping:g} to {used / 10:g} (mean diagonal {mean.item():.4g}, "
        f"least {hessian.diagonal().min().item():.4g}); use more calibration texts or more damping"
    )


def _round_columns(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    scheme: LayerScheme,
    block_size: int,
) -> Tensor:
    """GPTQ's loop (Algorithm 1) on columns already in order: float32 whole codes [O, I].

    Args:
        weight: float32 [O, I].
        factor: U of `_inverse_factor`, float32 [I, I].
        scale: float32 [O, G].
        zero: float32 [O, G].
        group: which group each column belongs to, [I].
        scheme: bounds the codes.
        block_size: columns a block.
    """
    # Features first, so that a column of the weight is contiguous in memory.
    weight = weight.T.contiguous()  # [I, O]
    steps, offsets = scale.T[group], zero.T[group]  # [I, O]
    codes = torch.empty_like(weight)
    for start in range(0, len(weight), block_size):
        end = min(start + block_size, len(weight))
        errors = torch.empty_like(weight[start:end])
        for i in range(start, end):
            codes[i] = encode(weight[i], steps[i], offsets[i], scheme)
            error = weight[i] - decode(codes[i], steps[i], offsets[i], scheme)
            error /= factor[i, i]
            weight[i + 1 : end] -= torch.outer(factor[i, i + 1 : end], error)
            errors[i - start] = error
        weight[end:] -= factor[start:end, end:].T @ errors
    return codes.T


def _better_rows(
    first: QuantizedWeight, second: QuantizedWeight, weight: Tensor, hessian: Tensor
) -> QuantizedWeight:
    """Row by row the one with the smaller output error; the first where they are equal."""
    error_first = _row_errors(first.dequantize() - weight, hessian)
    error_second = _row_errors(second.dequantize() - weight, hessian)
    take = (error_second < error_first)[:, None]
    return QuantizedWeight(
        codes=torch.where(take, second.codes, first.codes),
        scale=torch.where(take, second.scale, first.scale),
        zero=torch.where(take, second.zero, first.zero),
        scheme=first.scheme,
    )


def _row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """diag(E H E^T): float32 [O]."""
    return (error @ hessian).mul_(error).sum(1)
