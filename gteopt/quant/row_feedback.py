"""Correct the rows of a weight for the errors of the rows that were rounded before them.

GPTQ's rows are independent, because it measures errors by their size at the layer's output. The
error of a vector is g^T E x instead, with the weight error E [O, I], the layer's input x, and the
gradient g of a vector by the layer's output. If g and x are independent, its mean square is
tr(G E H E^T), with the second moments G [O, O] of g and H [I, I] of x: a Kronecker-factored Hessian
(Martens and Grosse 2015, arXiv:1503.05671). Rounding with feedback along both of its factors is the
method of Tseng et al. 2025, "Model-Preserving Adaptive Rounding" (arXiv:2505.22988). Here blocks of
rows correct later blocks. Refuses to know: how a block is rounded, where gradients come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gteopt.errors import NumericsError
from gteopt.quant.inverse_factor import factorise_inverse
from gteopt.quant.products import add_product_

_ROW_BLOCKS = 8
"""Blocks of the rows that correct each other. Most of the gain comes with the first few."""
_DAMPING = 1e-3


@dataclass(frozen=True)
class RowFeedback:
    """How the error of each row moves the rows that are rounded later.

    Attributes:
        parts: for each run of consecutive rows that correct each other, the upper triangular factor
            of its inverse Hessian, float32 [o, o], and the order [o] of its rows.
    """

    parts: Sequence[tuple[Tensor, Tensor]]


def prepare_row_feedback(output_hessians: Sequence[Tensor], share: float) -> RowFeedback:
    """Factorize G for each run of consecutive rows; rows with large gradients come first.

    Few texts estimate G poorly, and it varies between texts. So only a share of its off-diagonal
    elements is used (shrinkage towards the diagonal, Ledoit and Wolf 2004).

    Args:
        output_hessians: G of each run of consecutive rows, float [o, o], in the order of rows. Its
            scale does not matter.
        share: from 0, which corrects nothing, to 1.

    Raises:
        NumericsError: a matrix holds NaN or infinity.
    """
    parts = []
    for matrix in output_hessians:
        hessian = matrix.float()
        if not bool(torch.isfinite(hessian).all()):
            raise NumericsError(
                "the gradients of the vectors hold NaN or infinity; load the model with dtype "
                "float32, or set weights.row_feedback to 0"
            )
        diagonal = hessian.diagonal()
        mean = diagonal.mean()
        if mean == 0:  # no vector depends on these rows
            hessian, mean = torch.eye(len(hessian), device=hessian.device), mean + 1
            diagonal = hessian.diagonal()
        shrunk = share * hessian + ((1 - share) * diagonal).diag()
        factor = factorise_inverse(shrunk / mean, act_order=True, damping=_DAMPING)
        parts.append((factor.upper, factor.order))
    return RowFeedback(parts)


def round_row_blocks(
    weight: Tensor, feedback: RowFeedback, round_rows: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Round all rows, block by block, each corrected for the blocks before it.

    With U^T U = G^-1, the error D of a block's rows b moves the later rows r by U_br^T U_bb^-T D,
    which makes tr(G E H E^T) least if no later row were rounded.

    Args:
        weight: float32 [O, I].
        feedback: made for the same rows.
        round_rows: rounds rows of the weight; it is given the corrected rows [n, I] and their
            numbers [n], and returns the values of their codes [n, I].
    """
    first = 0
    for upper, order in feedback.parts:
        rows = order + first
        moved = weight.index_select(0, rows)  # in the order in which rows are rounded
        width = -(-len(order) // _ROW_BLOCKS)
        for start in range(0, len(order), width):
            end = start + width
            error = round_rows(moved[start:end], rows[start:end]) - moved[start:end]
            if end < len(order):
                corner = upper[start:end, start:end].T
                spread = torch.linalg.solve_triangular(corner, error, upper=False)
                below = upper[start:end, end:].T.contiguous()
                add_product_(moved[end:], below, spread.T.contiguous(), alpha=1)
        first += len(order)
