"""Compute the triangular factor of a Hessian's inverse, which gives GPTQ its corrections.

Hides: order, damping, and the precision of the factorization. Refuses to know: weights and codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gteopt.errors import NumericsError
from gteopt.quant.products import STRIP, block_spans, cholesky_, invert_lower_

_MOST_DAMPING = 1.0
"""Largest damping; a larger one would outweigh the Hessian."""
_FLOAT32_FEATURES = 4096
"""With more input features, float32 is tried first; with fewer, float64 is fast enough."""
_MOST_DEVIATION = 0.01
"""Largest relative distance of U H U^T z from z that is accepted. GPTQ's loop misjudges an error by
about this share."""
_N_PROBES = 4


@dataclass(frozen=True)
class InverseFactor:
    """U with U^T U = (H + damping * mean diagonal)^-1, with the features of H in `order`.

    Attributes:
        upper: U, upper triangular float32 [I, I].
        order: [I], the input features in the order in which they are rounded.
        damping: the damping that was used; larger than asked for if it had to be raised.
        added: what was added to the diagonal of H.
        dtype: dtype of the factorization, float32 or float64.
    """

    upper: Tensor
    order: Tensor
    damping: float
    added: float
    dtype: torch.dtype

    def importance(self) -> Tensor:
        """1 / [H^-1]_ii of each input feature i, in the original order of features: float32 [I].

        It is the cost of a feature's squared error after the other features have compensated for it
        (Frantar et al. 2022, arXiv:2210.17323, eq. 2).
        """
        importance = torch.empty(len(self.order), device=self.upper.device)
        importance[self.order] = 1 / self.upper.square().sum(0)
        return importance


def factorise_inverse(hessian: Tensor, *, act_order: bool, damping: float) -> InverseFactor:
    """Factorize the inverse of a damped Hessian.

    If J reverses an axis and J H J = L L^T, then U = J L^-1 J. This takes one factorization and one
    triangular inverse, in the memory of one matrix, without forming H^-1. Large matrices are
    factorized in float32, at four times the speed. The factor is kept if U H U^T z = z holds for
    random signs z; otherwise it is computed again in float64. A step of refinement would cost as
    much, because it needs the product L L^T in float64.

    Args:
        hessian: H, float32 [I, I]; not changed.
        act_order: round the input features with the largest diagonal first.
        damping: share of the mean diagonal that is added to the diagonal; raised tenfold while the
            factorization fails.

    Raises:
        NumericsError: no damping up to the mean diagonal makes the matrix positive definite.
    """
    n = len(hessian)
    diagonal = hessian.diagonal()
    order = torch.arange(n, device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    mean = diagonal.double().mean().item()
    if n > _FLOAT32_FEATURES:
        added = _added(damping, mean)
        upper = _inverse_upper(hessian, order, added, torch.float32)
        if upper is not None and _deviation(upper, hessian, order, added) < _MOST_DEVIATION:
            return InverseFactor(upper, order, damping, added, torch.float32)
        del upper
    used = damping
    while used <= _MOST_DAMPING:
        added = _added(used, mean)
        upper = _inverse_upper(hessian, order, added, torch.float64)
        if upper is not None:
            return InverseFactor(upper, order, used, added, torch.float64)
        used *= 10
    raise NumericsError(
        f"the Hessian [{n}, {n}] of a layer's inputs is not positive "
        f"definite with damping {damping:g} to {used / 10:g} (mean diagonal {mean:.4g}, "
        f"least {diagonal.min().item():.4g}); use more calibration texts or more damping"
    )


def factor_bytes(in_features: int) -> int:
    """Peak bytes of `factorise_inverse`, including the Hessian and the factor.

    The factor is computed from a float64 matrix, with two float32 copies of a strip.
    """
    return (4 + 8 + 4) * in_features**2 + 2 * 4 * min(STRIP, in_features) * in_features


def _added(damping: float, mean: float) -> float:
    """What is added to the diagonal; without inputs, its mean is 0 and the sum is the identity."""
    return damping * mean if mean else 1.0


def _inverse_upper(
    hessian: Tensor, order: Tensor, added: float, dtype: torch.dtype
) -> Tensor | None:
    """U float32 [I, I] from a Cholesky factor in `dtype`; None if the factorization fails."""
    n = len(hessian)
    backwards = order.flip(0)
    work = torch.empty(n, n, dtype=dtype, device=hessian.device)
    for start, end in block_spans(n, STRIP):  # only the lower triangle is read
        rows = hessian.index_select(0, backwards[start:end])
        work[start:end, :end] = rows.index_select(1, backwards[:end])
    del rows
    work.diagonal().add_(added)
    if not cholesky_(work):
        return None
    lower = work.float()  # L's condition is the square root of H's, so float32 suffices from here
    del work
    invert_lower_(lower)
    return lower.flip(0, 1)


def _deviation(upper: Tensor, hessian: Tensor, order: Tensor, added: float) -> float:
    """|U (H + added) U^T z - z| / |z| for random signs z; NaN if the factor holds NaN."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(order), _N_PROBES), generator=generator)
    z = (2.0 * signs - 1).to(hessian)
    back = upper.T @ z
    through = torch.empty_like(back)
    through[order] = back
    through = (hessian @ through)[order] + added * back
    deviation = (upper @ through - z).norm() / z.norm()
    return float(deviation.item())
