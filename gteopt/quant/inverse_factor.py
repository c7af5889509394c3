"""The triangular factor of a Hessian's inverse, which GPTQ's loop reads its corrections from.

Hides: order, damping, and the precision of the factorisation. Refuses to know: weights and codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gteopt.errors import NumericsError
from gteopt.quant.products import STRIP, cholesky_, invert_lower_, spans

_MOST_DAMPING = 1.0
"""With more than the mean of its diagonal added, the matrix is no longer the Hessian."""
_FLOAT32_FEATURES = 4096
"""Input features above which float32 is tried first. Below, float64 takes less than a second."""
_MOST_DEVIATION = 0.01
"""Most relative distance of U H U^T z from z, by which the loop misjudges an error."""
_N_PROBES = 4


@dataclass(frozen=True)
class InverseFactor:
    """U with U^T U = (H + damping * mean diagonal)^-1, H having its features in `order`.

    Attributes:
        upper: U, upper triangular float32 [I, I].
        order: [I], the input features in the order in which they are rounded.
        damping: the share that was used: the one asked for, or raised until H factorised.
        dtype: float32 or float64, of the factorisation.
    """

    upper: Tensor
    order: Tensor
    damping: float
    dtype: torch.dtype

    def importance(self) -> Tensor:
        """1 / [H^-1]_ii of each input feature in its own order: float32 [I].

        It is what a feature's squared error costs after the others have compensated for it
        (Frantar et al. 2022, arXiv:2210.17323, eq. 2).
        """
        importance = torch.empty(len(self.order), device=self.upper.device)
        importance[self.order] = 1 / self.upper.square().sum(0)
        return importance


def factorise_inverse(hessian: Tensor, *, act_order: bool, damping: float) -> InverseFactor:
    """Factorise the inverse of a damped Hessian.

    If J reverses an axis and J H J = L L^T, then U = J L^-1 J. This takes one factorisation and one
    triangular inverse, in the memory of one matrix, without forming H^-1. Large matrices are
    factorised in float32, at four times the speed. The factor is kept if U H U^T z = z holds on
    random signs z; otherwise it is computed again in float64. A step of refinement would cost as
    much, because it needs the product L L^T in float64.

    Args:
        hessian: H, float32 [I, I]; not changed.
        act_order: round the input features with the largest diagonal first.
        damping: share of the mean diagonal added to the diagonal; raised tenfold while the
            factorisation fails.

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
        # Without inputs the mean is 0, and every damping gives the identity.
        upper = _inverse_upper(hessian, order, damping * mean if mean else 1.0, torch.float32)
        if (
            upper is not None
            and _deviation(upper, hessian, order, damping * mean) < _MOST_DEVIATION
        ):
            return InverseFactor(upper, order, damping, torch.float32)
        del upper
    used = damping
    while used <= _MOST_DAMPING:
        upper = _inverse_upper(hessian, order, used * mean if mean else 1.0, torch.float64)
        if upper is not None:
            return InverseFactor(upper, order, used, torch.float64)
        used *= 10
    raise NumericsError(
        f"the Hessian [{n}, {n}] of a layer's inputs is not positive "
        f"definite with damping {damping:g} to {used / 10:g} (mean diagonal {mean:.4g}, "
        f"least {diagonal.min().item():.4g}); use more calibration texts or more damping"
    )


def factor_bytes(in_features: int) -> int:
    """Most memory that `factorise_inverse` takes, with the Hessian and the factor.

    The factor is computed from a float64 matrix, of which a strip lies twice in float32.
    """
    return (4 + 8 + 4) * in_features**2 + 2 * 4 * min(STRIP, in_features) * in_features


def _inverse_upper(
    hessian: Tensor, order: Tensor, added: float, dtype: torch.dtype
) -> Tensor | None:
    """U float32 [I, I] from a Cholesky factor in `dtype`; None if the matrix has none."""
    n = len(hessian)
    backwards = order.flip(0)
    work = torch.empty(n, n, dtype=dtype, device=hessian.device)
    for start, end in spans(n, STRIP):  # only the lower triangle is read
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
    """|U (H + added) U^T z - z| / |z| for random signs z; NaN where the factor holds NaN."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (len(order), _N_PROBES), generator=generator)
    z = (2.0 * signs - 1).to(hessian)
    back = upper.T @ z
    through = torch.empty_like(back)
    through[order] = back
    through = (hessian @ through)[order] + added * back
    deviation = (upper @ through - z).norm() / z.norm()
    return float(deviation.item())
