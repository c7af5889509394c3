"""Round the columns of a weight in order, and correct each for the errors of those before it.

GPTQ's loop (Frantar et al. 2022, arXiv:2210.17323, Algorithm 1). Hides: how columns are grouped
into panels and products. Refuses to know: how the order, the factor and the grid were found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.quant.affine import QuantizedWeight
from gteopt.quant.grid import decode, encode, group_width
from gteopt.quant.inverse_factor import InverseFactor
from gteopt.quant.products import add_product_


@dataclass(frozen=True)
class Columns:
    """The columns of one weight, in the order in which they are rounded.

    Attributes:
        work: float32 [O, I]. A rounded column is replaced by its error, divided by U[i, i].
        codes: uint8 [O, I], filled as columns are rounded.
        upper: U, the upper triangular factor of the inverse Hessian: float32 [I, I].
        group: int64 [I], the group of each column.
        steps: the scales, float32 [G, O].
        offsets: the zero points, float32 [G, O].
        scheme: the number format, and the range of codes.
    """

    work: Tensor
    codes: Tensor
    upper: Tensor
    group: Tensor
    steps: Tensor
    offsets: Tensor
    scheme: LayerScheme

    @staticmethod
    def of(weight: Tensor, factor: InverseFactor, grid: QuantizedWeight) -> Columns:
        """The columns of a weight before the first is rounded.

        Args:
            weight: float32 [O, I]; copied.
            factor: factor of the inverse Hessian.
            grid: scales and zero points; its codes are ignored.
        """
        work = weight.index_select(1, factor.order)
        return Columns(
            work=work,
            codes=torch.empty_like(work, dtype=torch.uint8),
            upper=factor.upper,
            group=factor.order // group_width(weight.shape[1], grid.scheme.group_size),
            steps=grid.scale.float().T.contiguous(),
            offsets=grid.zero.float().T.contiguous(),
            scheme=grid.scheme,
        )


PanelRounding = Callable[[Columns, int, int], None]
"""Rounds the columns from start to end in place, once they are corrected for those before start."""


def round_in_halves(columns: Columns, panel_width: int, round_panel: PanelRounding) -> None:
    """Round all columns in place, as a recursion over halves.

    One half is rounded, a matrix product corrects the other half, and then that half is rounded. So
    nearly all of the work is in large products.

    Args:
        columns: the columns; `work` and `codes` are overwritten.
        panel_width: most columns of a panel.
        round_panel: rounds one panel.
    """
    work, upper = columns.work, columns.upper

    def round_span(start: int, end: int) -> None:
        if end - start <= panel_width:
            round_panel(columns, start, end)
            return
        n_panels = -(-(end - start) // panel_width)
        middle = start + panel_width * (n_panels // 2)
        round_span(start, middle)
        below = upper[start:middle, middle:end].contiguous().T
        add_product_(work[:, middle:end], work[:, start:middle], below, alpha=-1)
        round_span(middle, end)

    round_span(0, work.shape[1])


def round_one_by_one(columns: Columns, start: int, end: int) -> None:
    """Round the columns of a panel in a loop; a column is corrected when its turn comes."""
    panel = columns.work[:, start:end].T.contiguous()  # [n, O]: a column is contiguous in memory
    rounded = torch.empty_like(panel, dtype=torch.uint8)
    corner = columns.upper[start:end, start:end].T.contiguous()
    groups = columns.group[start:end].tolist()
    for i, (column, group) in enumerate(zip(panel, groups, strict=True)):
        if i:
            column.addmv_(panel[:i].T, corner[i, :i], alpha=-1)
        step, offset = columns.steps[group], columns.offsets[group]
        code = encode(column, step, offset, columns.scheme)
        rounded[i] = code
        column.sub_(decode(code, step, offset, columns.scheme)).div_(corner[i, i])
    columns.work[:, start:end] = panel.T
    columns.codes[:, start:end] = rounded.T
