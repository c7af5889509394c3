"""Fixed grids of a layer's inputs, against kinds of text that they were not fitted on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gteopt.quant.held_out_ranges import LARGEST_LOSS, KindInputs, fit_held_out
from gteopt.quant.static_activations import InputGrid, SeenInputs, fit_input_grid

N_FEATURES = 48


def inputs_of_kind(seed: int, *, spread: float, n_rows: int = 400) -> Tensor:
    """Inputs of one kind of text: every kind stretches the features in its own way."""
    generator = torch.Generator().manual_seed(seed)
    stretch = (spread * torch.randn(N_FEATURES, generator=generator)).exp()
    return torch.randn(n_rows, N_FEATURES, generator=generator) * stretch


def seen_of(x: Tensor) -> SeenInputs:
    seen = SeenInputs(x.shape[1])
    seen.add(x)
    return seen


def kinds_of(parts: Sequence[Tensor]) -> list[KindInputs]:
    return [KindInputs(seen_of(part), part) for part in parts]


def weight_squares() -> Tensor:
    return torch.linspace(0.5, 2, N_FEATURES)


def expected_error(x: Tensor, grid: InputGrid) -> float:
    """Float64: expected squared error of outputs, of inputs that a grid rounds."""
    codes = (x.double() / grid.scale.double() + grid.zero.double()).round().clamp(0, 255)
    error = (codes - grid.zero.double()) * grid.scale.double() - x.double()
    return float(error.square().sum(0) @ weight_squares().double())


def error_by_token(x: Tensor) -> float:
    """Float64: the same where each token's range, with 0 in it, has 255 steps."""
    full = x.double()
    low, high = full.amin(1, keepdim=True).clamp_max(0), full.amax(1, keepdim=True).clamp_min(0)
    step = (high - low) / 255
    error = ((full / step).round() * step) - full
    return float(error.square().sum(0) @ weight_squares().double())


def test_a_union_is_what_one_would_have_seen_of_both() -> None:
    first, second = inputs_of_kind(1, spread=0.5), inputs_of_kind(2, spread=0.5, n_rows=100)
    both = seen_of(first).union(seen_of(second))
    alone = seen_of(torch.cat([first, second]))
    assert both.n_rows == alone.n_rows == 500
    for field in ("low", "high", "mean", "square"):
        torch.testing.assert_close(getattr(both, field), getattr(alone, field))


def test_the_loss_is_that_of_the_worst_kind_left_out() -> None:
    parts = [inputs_of_kind(seed, spread=0.3) for seed in range(4)]
    fitted = fit_held_out(kinds_of(parts), weight_squares())
    # The form that was taken is found again by the grid that it gives for all kinds.
    forms = [(a, h) for a in (0.35, 0.5, 0.65, 0.8) for h in (1.05, 1.25, 1.5, 2.0, 2.5)]
    (form,) = [
        form
        for form in forms
        if torch.equal(
            fit_input_grid(seen_of(torch.cat(parts)), strength=form[0], headroom=form[1]).scale,
            fitted.grid.scale,
        )
    ]
    losses = []
    for i, part in enumerate(parts):
        rest = torch.cat([other for j, other in enumerate(parts) if j != i])
        grid = fit_input_grid(seen_of(rest), strength=form[0], headroom=form[1])
        losses.append(expected_error(part, grid) / error_by_token(part))
    assert abs(fitted.loss / max(losses) - 1) < 0.02


def test_the_worst_of_new_kinds_loses_less_than_by_the_tight_ranges() -> None:
    parts = [inputs_of_kind(seed, spread=0.8) for seed in range(6)]
    fitted = fit_held_out(kinds_of(parts), weight_squares()).grid
    tight = fit_input_grid(seen_of(torch.cat(parts)))
    new = [inputs_of_kind(seed, spread=0.8) for seed in range(20, 40)]
    losses = [
        max(expected_error(x, grid) / error_by_token(x) for x in new) for grid in (fitted, tight)
    ]
    assert losses[0] < 0.5 * losses[1]


def test_kinds_that_are_alike_keep_tight_ranges() -> None:
    parts = [torch.cat([inputs_of_kind(0, spread=0.3)]).roll(i, 0) for i in range(4)]
    fitted = fit_held_out(kinds_of(parts), weight_squares())
    assert fitted.loss < LARGEST_LOSS
    tight = fit_input_grid(seen_of(torch.cat(parts)), headroom=1.05)
    assert float((fitted.grid.scale / tight.scale).mean()) < 1.3


def test_tokens_of_very_different_size_are_left_to_their_own_ranges() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = []
    for seed in range(4):
        sizes = (2 * torch.randn(400, 1, generator=generator)).exp()
        parts.append(inputs_of_kind(seed, spread=0.1) * sizes)
    assert fit_held_out(kinds_of(parts), weight_squares()).loss > LARGEST_LOSS


def test_one_kind_alone_keeps_the_form_that_needs_no_other() -> None:
    part = inputs_of_kind(0, spread=0.3)
    fitted = fit_held_out(
        [*kinds_of([part]), KindInputs(SeenInputs(N_FEATURES), part[:0])], weight_squares()
    )
    assert fitted.loss == 0
    assert torch.equal(fitted.grid.scale, fit_input_grid(seen_of(part)).scale)
