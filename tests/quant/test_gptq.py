"""The GPTQ solver against round-to-nearest and against a slow textbook version written here."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from gteopt.config.recipe import Bits, GroupSize, LayerScheme
from gteopt.errors import NumericsError
from gteopt.quant import gptq
from gteopt.quant.affine import QuantizedWeight, quantize_rtn
from gteopt.quant.gptq import GptqOptions, is_finite, output_snr_db, solve
from gteopt.quant.grid import encode
from gteopt.quant.grid_search import fit_grids
from gteopt.quant.hessian import HessianAccumulator
from gteopt.quant.inverse_factor import factorise_inverse

ALL_BITS: tuple[Bits, ...] = (2, 3, 4, 8)
GROUP_SIZES: tuple[GroupSize, ...] = (32, 64, 128, "per_channel")
SCHEMES = [
    LayerScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits, group_size, symmetric in itertools.product(ALL_BITS, GROUP_SIZES, (True, False))
]
NF4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
E4M3 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, number_format="e4m3")


def correlated(n_rows: int, n_features: int, seed: int) -> torch.Tensor:
    """Inputs with a decaying spectrum and a few large features, as transformers have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_features, n_features, generator=generator)
    spectrum = torch.arange(1, n_features + 1) ** -0.7
    x = torch.randn(n_rows, n_features, generator=generator) * spectrum @ mix
    x[:, :: n_features // 4] *= 8
    return x


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    accumulator = HessianAccumulator(x.shape[1])
    accumulator.add(x)
    return accumulator.hessian


def output_error(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> float:
    error = (weight - quantized.dequantize()).double()
    return float(torch.einsum("oi,ij,oj->", error, hessian.double(), error))


def textbook_codes(
    weight: torch.Tensor, hessian: torch.Tensor, grid: QuantizedWeight, damping: float, order: bool
) -> torch.Tensor:
    """Column by column in float64, removing each rounded column from H^-1 by elimination.

    Frantar et al. 2022, eq. 2 and 3: no Cholesky factor, no blocks.
    """
    work, inverse = weight.double().clone(), hessian.double().clone()
    diagonal = hessian.diagonal()
    inverse += torch.eye(len(inverse), dtype=torch.float64) * damping * diagonal.double().mean()
    inverse = torch.linalg.inv(inverse)
    columns = torch.argsort(diagonal, descending=True, stable=True) if order else None
    width = weight.shape[1] // grid.scale.shape[1]
    codes = torch.zeros_like(weight)
    for column in range(weight.shape[1]) if columns is None else columns.tolist():
        scale = grid.scale[:, column // width].double()
        zero = grid.zero[:, column // width].double()
        codes[:, column] = encode(work[:, column], scale, zero, grid.scheme)
        error = work[:, column] - (codes[:, column] - zero) * scale
        work -= torch.outer(error / inverse[column, column], inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1  # eliminated: its row and column are zero from here on
    return codes


@pytest.mark.parametrize("scheme", [*SCHEMES, NF4, E4M3], ids=str)
def test_an_identity_hessian_gives_round_to_nearest_bit_for_bit(scheme: LayerScheme) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    for act_order, clip_search in itertools.product((True, False), (True, False)):
        solved = solve(
            weight,
            torch.eye(256),
            scheme,
            GptqOptions(act_order=act_order, clip_search=clip_search),
        ).weight
        rounded = quantize_rtn(weight, scheme, clip_search=clip_search)
        assert torch.equal(solved.codes, rounded.codes)
        assert torch.equal(solved.scale, rounded.scale)
        assert torch.equal(solved.zero, rounded.zero)


@pytest.mark.parametrize("scheme", [*SCHEMES, NF4, E4M3], ids=str)
def test_the_output_error_is_never_above_round_to_nearests(scheme: LayerScheme) -> None:
    for seed, (act_order, clip_search) in enumerate(
        itertools.product((True, False), (True, False), repeat=1)
    ):
        for trial in range(3):
            x = correlated(300 if trial else 60, 128, seed=10 * seed + trial)
            generator = torch.Generator().manual_seed(trial)
            weight, hessian = torch.randn(16, 128, generator=generator), hessian_of(x)
            solved = solve(
                weight,
                hessian,
                scheme,
                GptqOptions(act_order=act_order, clip_search=clip_search),
            ).weight
            rounded = quantize_rtn(weight, scheme, clip_search=clip_search)
            ours = output_error(weight, solved, hessian)
            assert ours <= output_error(weight, rounded, hessian) * (1 + 1e-5)


def test_the_gain_over_round_to_nearest_is_several_dB_on_correlated_inputs() -> None:
    scheme = LayerScheme(bits=4, group_size=128, symmetric=False)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    hessian = hessian_of(correlated(2000, 256, seed=3))
    solved = solve(weight, hessian, scheme, GptqOptions()).weight
    rounded = quantize_rtn(weight, scheme, clip_search=True)
    ours = output_snr_db(weight, solved.dequantize(), hessian)
    assert ours > output_snr_db(weight, rounded.dequantize(), hessian) + 5


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_codes_are_those_of_the_textbook_in_float64(bits: Bits, act_order: bool) -> None:
    scheme = LayerScheme(bits=bits, group_size=32, symmetric=False)
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(bits))
    hessian = hessian_of(correlated(500, 96, seed=bits))
    solved = solve(
        weight,
        hessian,
        scheme,
        GptqOptions(act_order=act_order, damping=0.02, clip_search=False, block_size=40),
    ).weight
    expected = textbook_codes(weight, hessian, solved, 0.02, act_order)
    rounded = quantize_rtn(weight, scheme).codes
    ours = (solved.codes == expected).float().mean(1)
    # A row may be the kept round-to-nearest one; in the others a near-tie may fall either way.
    kept = (solved.codes == rounded).all(1)
    assert kept.float().mean() < 0.2
    assert ours[~kept].mean() > 0.995


def test_block_size_changes_no_code() -> None:
    scheme = LayerScheme(bits=3, group_size=64, symmetric=True)
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(5))
    hessian = hessian_of(correlated(600, 192, seed=5))
    results = [
        solve(
            weight,
            hessian,
            scheme,
            GptqOptions(block_size=block_size),
        ).weight.codes
        for block_size in (192, 64, 50, 1)
    ]
    for codes in results[1:]:
        # Sums in another order may tip a tie, and a tipped code moves those after it in its row.
        assert (codes == results[0]).all(1).float().mean() >= 0.9


def test_the_solver_is_deterministic_and_leaves_its_inputs_alone() -> None:
    scheme = LayerScheme(bits=4, group_size=32, symmetric=False)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    hessian = hessian_of(correlated(100, 64, seed=0))
    before = weight.clone(), hessian.clone()
    first, second = (solve(weight, hessian, scheme, GptqOptions()) for _ in range(2))
    assert torch.equal(first.weight.codes, second.weight.codes)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_features_that_were_always_zero_are_counted_and_rounded_to_nearest() -> None:
    scheme = LayerScheme(bits=4, group_size="per_channel", symmetric=False)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    x = correlated(200, 64, seed=1)
    x[:, [3, 40]] = 0
    result = solve(weight, hessian_of(x), scheme, GptqOptions(clip_search=False))
    assert result.n_dead == 2
    rounded = quantize_rtn(weight, scheme)
    assert torch.equal(result.weight.codes[:, [3, 40]], rounded.codes[:, [3, 40]])
    all_dead = solve(
        weight,
        torch.zeros(64, 64),
        scheme,
        GptqOptions(),
    )
    expected = quantize_rtn(weight, scheme, clip_search=True)
    assert torch.equal(all_dead.weight.codes, expected.codes)


def test_damping_is_raised_tenfold_until_the_hessian_factorises() -> None:
    scheme = LayerScheme(bits=4, group_size="per_channel", symmetric=False)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05  # least eigenvalue -0.05, mean diagonal 1
    result = solve(weight, hessian, scheme, GptqOptions(clip_search=False))
    assert result.damping == pytest.approx(0.1)
    hessian[0, 1] = hessian[1, 0] = 30.0
    with pytest.raises(NumericsError, match=r"not positive definite .* 0\.01 to 1 "):
        solve(weight, hessian, scheme, GptqOptions(clip_search=False))


def test_the_factor_of_a_wide_layers_inverse_is_that_of_float64() -> None:
    """Fewer rows than features: the Hessian is as badly conditioned as damping allows.

    The error of float32 is of the order of 2^-24 * cond(L).
    """
    hessian = hessian_of(correlated(700, 1100, seed=4))
    hessian = (hessian + hessian.T) / 2  # to the last bit
    inverse = factorise_inverse(hessian, act_order=True, damping=0.01)
    order, factor = inverse.order, inverse.upper
    assert torch.equal(order, torch.argsort(hessian.diagonal(), descending=True, stable=True))
    damped = hessian.double()[order][:, order]
    damped += inverse.damping * damped.diagonal().mean() * torch.eye(1100, dtype=torch.float64)
    cond = torch.linalg.cond(damped)
    assert cond > 1e4
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.equal(factor, factor.triu())
    rows = expected.norm(dim=1)
    assert ((factor.double() - expected).norm(dim=1) / rows).max() < 10 * 2**-24 * cond.sqrt()


def test_nan_and_infinity_are_seen_wherever_they_are() -> None:
    values = torch.zeros(3, 5)
    assert is_finite(values)
    assert is_finite(torch.zeros(0))
    for bad in (math.nan, math.inf, -math.inf):
        for at in range(values.numel()):
            values.view(-1)[at] = bad
            assert not is_finite(values)
            values.view(-1)[at] = 3.4e38


def test_fewer_rows_than_features_still_solve() -> None:
    scheme = LayerScheme(bits=4, group_size=128, symmetric=False)
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    hessian = hessian_of(correlated(20, 256, seed=0))
    result = solve(weight, hessian, scheme, GptqOptions())
    assert result.damping == 0.01
    assert result.output_snr_db > 25
    assert result.output_snr_db == pytest.approx(
        output_snr_db(weight, result.weight.dequantize(), hessian), abs=1e-3
    )


@pytest.mark.parametrize("n_rows", [20, 300, 4000])
def test_the_loop_knows_the_output_error_of_each_row(n_rows: int) -> None:
    """The oracle is tr(E H E^T) of each row in float64; the Hessian may have far too few rows."""
    scheme = LayerScheme(bits=4, group_size=128, symmetric=False)
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    hessian = hessian_of(correlated(n_rows, 256, seed=0))
    options = GptqOptions()
    factor = gptq.prepare_gptq(hessian, options)
    assert factor.dtype == torch.float64
    scale, zero = fit_grids(weight, scheme, [None], clip_search=False)[0]
    grid = QuantizedWeight(torch.empty(0), scale, zero, scheme, None)
    codes, squares = gptq._round_columns(weight, factor, grid, options.block_size)
    error = (replace(grid, codes=codes).dequantize() - weight).double()
    damped = hessian.double() + factor.added * torch.eye(256)
    exact = ((error @ damped) * error).sum(1)
    torch.testing.assert_close(squares.double(), exact, rtol=1e-4, atol=0)


def test_nan_in_weight_or_hessian_is_refused() -> None:
    scheme = LayerScheme(bits=4, group_size="per_channel", symmetric=False)
    weight, hessian = torch.ones(2, 8), torch.eye(8)
    with pytest.raises(NumericsError, match="Hessian"):
        solve(
            weight,
            hessian * math.nan,
            scheme,
            GptqOptions(),
        )
    with pytest.raises(NumericsError, match="weight"):
        solve(
            weight * math.inf,
            hessian,
            scheme,
            GptqOptions(),
        )


def test_the_accumulated_hessian_is_the_mean_outer_product_of_all_rows() -> None:
    x = correlated(101, 24, seed=7)
    accumulator = HessianAccumulator(24)
    for part in (x[:1], x[1:1], x[1:60], x[60:]):
        accumulator.add(part)
    expected = (x.double().T @ x.double()) / 101
    assert accumulator.n_rows == 101
    assert torch.allclose(accumulator.hessian.double(), expected, rtol=1e-5, atol=1e-5)


def drifted(
    n_rows: int, seed: int = 5, through: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, HessianAccumulator]:
    """Inputs of the original model, inputs of a quantized one, and statistics of both."""
    exact = correlated(n_rows, 64, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = exact + exact @ torch.randn(64, 64, generator=generator) / 30
    x = x + torch.randn(n_rows, 64, generator=generator) / 10  # no weight can compensate noise
    accumulator = HessianAccumulator(64, through=through)
    for rows in (slice(0, n_rows // 3), slice(n_rows // 3, None)):
        accumulator.add(x[rows], exact[rows])
    return exact, x, accumulator


EIGHT_BITS = LayerScheme(bits=8, group_size=32, symmetric=False)


def solved_for(
    weight: torch.Tensor, statistics: HessianAccumulator, share: float = 1.0
) -> torch.Tensor:
    """The dequantized solution of GPTQ for inputs that deviate from the original's."""
    solved = solve(
        weight,
        statistics.hessian,
        EIGHT_BITS,
        GptqOptions(damping=1e-6, clip_search=False, gptaq_strength=share),
        cross_term=statistics.cross_term(weight),
    )
    return solved.weight.dequantize()


@pytest.mark.parametrize("through", [False, True])
def test_the_compensated_weight_is_the_least_squares_fit_of_the_originals_outputs(
    through: bool,
) -> None:
    """Eight bits make the rounding error negligible."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(7))
    exact, x, statistics = drifted(400, through=weight if through else None)
    outputs = (exact @ weight.T).double()
    best = torch.linalg.lstsq(x.double(), outputs).solution.T
    compensated = solved_for(weight, statistics)
    left, least, before = (
        float((x.double() @ candidate.double().T - outputs).square().sum())
        for candidate in (compensated, best, weight)
    )
    assert left <= 1.02 * least
    assert least < 0.5 * before
    half = solved_for(weight, statistics, share=0.5)
    assert (half - (weight + compensated) / 2).norm() < 0.1 * (compensated - weight).norm()


def test_the_cross_term_is_the_same_from_sums_before_and_behind_the_weight() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(7))
    exact, x, before = drifted(400)
    _, _, behind = drifted(400, through=weight)
    expected = weight.double() @ (exact - x).double().T @ x.double() / 400
    for statistics in (before, behind):
        cross_term = statistics.cross_term(weight)
        assert cross_term is not None
        torch.testing.assert_close(cross_term.double(), expected, rtol=1e-4, atol=1e-4)


def test_without_an_error_in_the_inputs_nothing_is_compensated() -> None:
    x = correlated(200, 64, seed=3)
    statistics, plain = HessianAccumulator(64), HessianAccumulator(64)
    statistics.add(x, x)
    plain.add(x)
    assert plain.cross_term(torch.ones(16, 64)) is None
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(solved_for(weight, statistics), solved_for(weight, plain))


def test_codes_for_the_compensated_weight_are_closer_to_the_originals_outputs() -> None:
    """On rows that the solver has not seen, the error falls by more than a tenth."""
    scheme = LayerScheme(bits=4, group_size=32, symmetric=False)
    exact, x, _ = drifted(4000)
    statistics = HessianAccumulator(64)
    statistics.add(x[:2000], exact[:2000])
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(7))
    errors = []
    for cross_term in (None, statistics.cross_term(weight)):
        codes = solve(
            weight,
            statistics.hessian,
            scheme,
            GptqOptions(),
            cross_term=cross_term,
        ).weight
        left = x[2000:] @ codes.dequantize().T - exact[2000:] @ weight.T
        errors.append(float(left.square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_output_snr_is_the_signal_to_noise_of_the_layers_output() -> None:
    x = correlated(50, 16, seed=2)
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    approximation = weight + 0.01
    outputs, errors = (
        x.double() @ weight.double().T,
        x.double() @ (weight - approximation).T.double(),
    )
    expected = 10 * math.log10(float(outputs.square().sum() / errors.square().sum()))
    snr = output_snr_db(weight, approximation, hessian_of(x))
    assert snr == pytest.approx(expected, abs=1e-3)
    assert output_snr_db(weight, weight, hessian_of(x)) == math.inf
