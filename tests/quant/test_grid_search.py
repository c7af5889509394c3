"""Searching several grids at once."""

from __future__ import annotations

import pytest
import torch

from gteopt.config.recipe import LayerScheme
from gteopt.quant.affine import quantize_rtn
from gteopt.quant.grid_search import fit_grid, fit_grids

SCHEMES = [
    LayerScheme(bits=4, group_size=64, symmetric=False),
    LayerScheme(bits=3, group_size=32, symmetric=True),
    LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4"),
    LayerScheme(bits=8, group_size="per_channel", symmetric=True, number_format="e4m3"),
]


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_one_search_for_two_importances_gives_the_grids_of_two_searches(
    scheme: LayerScheme,
) -> None:
    weight, importance = seeded(40, 128), seeded(128, seed=1).square()
    both = fit_grids(weight, scheme, [importance, None], clip_search=True)
    for grid, wanted in zip(both, (importance, None), strict=True):
        alone = fit_grid(weight, scheme, clip_search=True, importance=wanted)
        assert all(torch.equal(*pair) for pair in zip(grid, alone, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_that_the_search_counts_is_no_worse_than_that_of_the_whole_range(
    scheme: LayerScheme,
) -> None:
    """Full rounding judges both, without the table of cells that the search uses."""
    weight = seeded(200, 128)
    searched, whole = (
        (quantize_rtn(weight, scheme, clip_search=search).dequantize() - weight).square()
        for search in (True, False)
    )
    assert (searched.sum(1) <= whole.sum(1) * (1 + 1e-3)).all()
    assert searched.sum() < whole.sum()
