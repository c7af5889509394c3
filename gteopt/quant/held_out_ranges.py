"""Choose a fixed grid for a layer's inputs, and judge it on kinds of text that it did not see.

A grid that fits the calibration texts clips the inputs of other texts. So each kind of text (a
language, or code) is left out in turn: a grid that is fitted on the other kinds rounds its inputs.
The error is compared with that of rounding by each token's own range, which clips nothing.

Refuses to know: models, texts, and how the weight is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import torch
from torch import Tensor

from gteopt.quant.affine import quantize_tokens
from gteopt.quant.static_activations import InputGrid, SeenInputs, fit_input_grid

LARGEST_LOSS = 4.0
"""The largest error of a fixed grid on the worst kind, as a multiple of the error of rounding by
token. Layers above it round by token."""
_STRENGTHS = (0.35, 0.5, 0.65, 0.8)
_HEADROOMS = (1.05, 1.25, 1.5, 2.0, 2.5)


@dataclass(frozen=True)
class KindInputs:
    """The inputs of a layer for one kind of text.

    Attributes:
        seen: ranges and moments of all inputs.
        rows: float32 [n, I], a sample of the inputs.
    """

    seen: SeenInputs
    rows: Tensor


@dataclass(frozen=True)
class HeldOutGrid:
    """A grid that is fitted on all kinds, and the loss of its form on a kind that is left out.

    Attributes:
        grid: the grid of the inputs.
        loss: squared error of the layer's outputs on the worst kind when that kind is left out,
            divided by the error of rounding by token. 0 if there is only one kind.
    """

    grid: InputGrid
    loss: float


def fit_held_out(kinds: Sequence[KindInputs], weight_squares: Tensor) -> HeldOutGrid:
    """Choose the strength and headroom of `fit_input_grid` with the least loss on kinds left out.

    The mean over kinds and the worst kind count alike. Errors of different features are taken as
    independent, so the error of the outputs follows from the squared weights of each feature.

    Args:
        kinds: inputs of the layer, by kind of text.
        weight_squares: float32 [I], sum of the squared weights of each input feature.

    Example:
        >>> rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> seen = [SeenInputs(8), SeenInputs(8)]
        >>> for one, part in zip(seen, rows.split(50)):
        ...     one.add(part)
        >>> kinds = [KindInputs(one, part) for one, part in zip(seen, rows.split(50))]
        >>> fit_held_out(kinds, torch.ones(8)).grid.scale.shape
        torch.Size([8])
    """
    kinds = [kind for kind in kinds if len(kind.rows)]
    together = reduce(SeenInputs.union, [kind.seen for kind in kinds])
    if len(kinds) == 1:
        return HeldOutGrid(fit_input_grid(together), 0.0)
    by_token = [_error(kind.rows, _round_tokens(kind.rows), weight_squares) for kind in kinds]
    others = [
        reduce(SeenInputs.union, [other.seen for other in kinds if other is not kind])
        for kind in kinds
    ]
    best = HeldOutGrid(fit_input_grid(together), torch.inf)
    least = torch.inf
    for strength, headroom in product(_STRENGTHS, _HEADROOMS):
        losses = []
        for kind, rest, yardstick in zip(kinds, others, by_token, strict=True):
            grid = fit_input_grid(rest, strength=strength, headroom=headroom)
            rounded = grid.steps(kind.rows).mul_(grid.scale)
            losses.append(_error(kind.rows, rounded, weight_squares) / yardstick)
        worst = max(losses)
        if (total := sum(losses) / len(losses) + worst) < least:
            least = total
            grid = fit_input_grid(together, strength=strength, headroom=headroom)
            best = HeldOutGrid(grid, worst)
    return best


def _error(x: Tensor, rounded: Tensor, weight_squares: Tensor) -> float:
    """Expected squared error of the outputs for inputs [n, I]; `rounded` is overwritten."""
    squares = rounded.sub_(x).square_().sum(0)
    return max(float(squares @ weight_squares), torch.finfo(torch.float32).tiny)


def _round_tokens(x: Tensor) -> Tensor:
    """Inputs [n, I] rounded to 8 bits by each token's range."""
    codes, scale, zero = quantize_tokens(x, symmetric=False)
    assert zero is not None
    return (codes.float() - zero).mul_(scale)
