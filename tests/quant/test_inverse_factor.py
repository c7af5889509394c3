"""The precision that a Hessian is factorised in, and its effect on the solver's error."""

from __future__ import annotations

import pytest
import torch

from gteopt.config.recipe import LayerScheme
from gteopt.quant import inverse_factor
from gteopt.quant.gptq import GptqOptions, prepare_gptq, solve
from gteopt.quant.inverse_factor import factorise_inverse


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def float32_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inverse_factor, "_FLOAT32_FEATURES", 0)


@pytest.mark.usefixtures("float32_first")
def test_float32_is_kept_where_it_holds_and_float64_made_where_it_does_not() -> None:
    x = seeded(400, 96) @ seeded(96, 96, seed=1)
    hessian = x.T @ x / len(x)
    assert factorise_inverse(hessian, act_order=True, damping=0.01).dtype == torch.float32
    # One direction is over a million times as large as the mean diagonal.
    direction = torch.ones(96)
    hessian += 1e6 * hessian.diagonal().mean() * torch.outer(direction, direction)
    used = factorise_inverse(hessian, act_order=True, damping=1e-9)
    assert used.dtype == torch.float64


def test_the_error_with_a_float32_factor_is_that_of_a_float64_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheme = LayerScheme(bits=4, group_size=64, symmetric=False)
    x = seeded(300, 256) @ (seeded(256, 256, seed=1) * torch.arange(1, 257) ** -0.7)
    hessian, weight = x.T @ x / len(x), seeded(64, 256, seed=2)
    snr = []
    for limit in (0, 4096):
        monkeypatch.setattr(inverse_factor, "_FLOAT32_FEATURES", limit)
        factor = prepare_gptq(hessian, GptqOptions())
        assert factor.dtype == (torch.float32 if limit == 0 else torch.float64)
        shared = solve(weight, hessian, scheme, GptqOptions(), factor=factor)
        alone = solve(weight, hessian, scheme, GptqOptions())
        assert torch.equal(shared.weight.codes, alone.weight.codes)
        snr.append(shared.output_snr_db)
    assert snr[0] == pytest.approx(snr[1], abs=0.05)
