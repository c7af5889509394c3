"""Rows that correct each other: against elimination in float64, and against independent rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.errors import NumericsError
from gteopt.quant.gptq import GptqOptions, solve
from gteopt.quant.row_feedback import prepare_row_feedback, round_row_blocks

INT3 = LayerScheme(bits=3, group_size=32, symmetric=False)
NF4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
NF4_DQ = NF4.model_copy(update={"double_quantization": True})


def moments(n: int, seed: int) -> Tensor:
    """Second moments of correlated numbers of very different size: float32 [n, n]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) * torch.arange(1, n + 1) ** -0.7
    x = torch.randn(8 * n, n, generator=generator) @ mix.T
    return x.T @ x / len(x)


def vector_error(weight: Tensor, codes: Tensor, outputs: Tensor, inputs: Tensor) -> float:
    """tr(G E H E^T)."""
    error = (codes - weight).double()
    return float(torch.einsum("op,pi,ij,oj->", outputs.double(), error, inputs.double(), error))


def test_later_rows_move_as_far_as_makes_the_error_least() -> None:
    """The oracle eliminates every block in float64, in the order of falling diagonals."""
    hessian, share = moments(48, seed=1), 0.7
    weight = torch.randn(48, 20, generator=torch.Generator().manual_seed(2))
    shrunk = share * hessian + (1 - share) * hessian.diagonal().diag()
    shrunk = shrunk.double() + 1e-3 * shrunk.diagonal().mean() * torch.eye(48).double()
    seen: list[tuple[Tensor, Tensor]] = []
    rounded = torch.zeros_like(weight)

    def round_rows(rows: Tensor, at: Tensor) -> Tensor:
        seen.append((rows.clone(), at))
        rounded[at] = (2 * rows).round() / 2
        return rounded[at]

    round_row_blocks(weight, prepare_row_feedback([hessian], share), round_rows)
    done: list[int] = []
    for rows, at in seen:
        expected = weight[at].double()
        if done:
            left = [i for i in range(48) if i not in done]
            error = (rounded - weight).double()[done]
            moved = torch.linalg.solve(shrunk[left][:, left], shrunk[left][:, done] @ error)
            expected = weight[left].double() - moved
            expected = expected[[left.index(i) for i in at.tolist()]]
        assert torch.allclose(rows.double(), expected, atol=1e-4)
        done += at.tolist()
    assert len(seen) == 8
    order = hessian.diagonal()[torch.tensor(done)]
    assert torch.equal(order, order.sort(descending=True).values)
    assert sorted(done) == list(range(48))


@pytest.mark.parametrize("scheme", [INT3, NF4, NF4_DQ], ids=["int3", "nf4", "nf4-dq"])
def test_the_error_of_vectors_is_far_below_that_of_independent_rows(scheme: LayerScheme) -> None:
    inputs, outputs = moments(128, seed=3), moments(64, seed=4)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    feedback = prepare_row_feedback([outputs], 0.9)
    alone = solve(weight, inputs, scheme, GptqOptions())
    together = solve(weight, inputs, scheme, GptqOptions(row_feedback=feedback))
    ours, independent = (
        vector_error(weight, solved.weight.dequantize(), outputs, inputs)
        for solved in (together, alone)
    )
    assert ours < 0.6 * independent
    assert together.output_snr_db < alone.output_snr_db  # what it costs at the layer's own output
    error = (together.weight.dequantize() - weight).double()
    noise = torch.einsum("oi,ij,oj->", error, inputs.double(), error)
    signal = torch.einsum("oi,ij,oj->", weight.double(), inputs.double(), weight.double())
    assert together.output_snr_db == pytest.approx(
        float(10 * torch.log10(signal / noise)), abs=0.01
    )


@pytest.mark.parametrize("scheme", [INT3, NF4_DQ], ids=["int3", "nf4-dq"])
def test_rows_without_correlation_get_the_codes_of_independent_rows(scheme: LayerScheme) -> None:
    """With an identity for inputs, no sum has another order."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(6))
    alone = solve(weight, torch.eye(64), scheme, GptqOptions())
    outputs = moments(40, seed=7)
    for hessian, share in ((outputs, 0.0), (outputs.diagonal().diag(), 0.5), (0 * outputs, 0.5)):
        feedback = prepare_row_feedback([hessian], share)
        together = solve(weight, torch.eye(64), scheme, GptqOptions(row_feedback=feedback))
        assert torch.equal(together.weight.codes, alone.weight.codes)
        assert torch.equal(together.weight.scale, alone.weight.scale)
        assert torch.equal(together.weight.zero, alone.weight.zero)


def test_parts_correct_their_own_rows_only() -> None:
    inputs, outputs = moments(64, seed=8), moments(48, seed=9)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(10))
    parts = [outputs[:30, :30], outputs[30:, 30:]]
    whole = solve(weight, inputs, INT3, GptqOptions(row_feedback=prepare_row_feedback(parts, 0.5)))
    for rows, part in ((slice(0, 30), parts[0]), (slice(30, 48), parts[1])):
        alone = solve(
            weight[rows],
            inputs,
            INT3,
            GptqOptions(row_feedback=prepare_row_feedback([part], 0.5)),
        )
        same = (whole.weight.codes[rows] == alone.weight.codes).float().mean()
        assert same > 0.99  # a near-tie may fall either way


def test_gradients_with_nan_are_refused() -> None:
    broken = moments(8, seed=11)
    broken[3, 4] = torch.nan
    with pytest.raises(NumericsError, match="row_feedback to 0"):
        prepare_row_feedback([broken], 0.5)
