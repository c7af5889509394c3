"""The GPU kernel for a panel of columns against the loop; without a GPU, Triton interprets it.

Its machine code is checked in `tests/kernels/test_cuda.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from gteopt.config.recipe import LayerScheme
from gteopt.quant.affine import QuantizedWeight
from gteopt.quant.columns import Columns, round_in_halves, round_one_by_one
from gteopt.quant.grid import NF4_LEVELS, code_range, encode
from gteopt.quant.grid_search import fit_grid
from gteopt.quant.inverse_factor import InverseFactor, factorise_inverse

SCHEMES = {
    "int2": LayerScheme(bits=2, group_size=128, symmetric=False),
    "int3": LayerScheme(bits=3, group_size=64, symmetric=True),
    "int4": LayerScheme(bits=4, group_size=32, symmetric=False),
    "int8": LayerScheme(bits=8, group_size="per_channel", symmetric=False),
    "int8 symmetric": LayerScheme(bits=8, group_size="per_channel", symmetric=True),
    "nf4": LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4"),
    "e4m3": LayerScheme(bits=8, group_size="per_channel", symmetric=True, number_format="e4m3"),
}
FORMATS = ("int4", "nf4", "e4m3")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
over_schemes = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
over_formats = pytest.mark.parametrize("scheme", [SCHEMES[name] for name in FORMATS], ids=FORMATS)


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")
    return importlib.import_module("gteopt.quant.cuda_columns")


def problem(
    n_rows: int, n_features: int, scheme: LayerScheme
) -> tuple[torch.Tensor, torch.Tensor, InverseFactor, QuantizedWeight]:
    """A weight, a Hessian whose features correlate, its factor in act-order, and a grid."""
    generator = torch.Generator().manual_seed(n_rows + n_features)
    spectrum = torch.arange(1, n_features + 1) ** -0.7
    mix = torch.randn(n_features, n_features, generator=generator)
    x = torch.randn(2 * n_features, n_features, generator=generator) * spectrum @ mix
    weight = torch.randn(n_rows, n_features, generator=generator)
    hessian = (x.T @ x / len(x)).to(DEVICE)
    weight = weight.to(DEVICE)
    scale, zero = fit_grid(weight, scheme, clip_search=False, importance=None)
    grid = QuantizedWeight(torch.empty(0), scale, zero, scheme)
    return weight, hessian, factorise_inverse(hessian, act_order=True, damping=0.01), grid


def panel_of(values: torch.Tensor, scheme: LayerScheme, *, upper: torch.Tensor) -> Columns:
    """Columns float32 [O, I] with scales 1, so that values are in units of the scale."""
    middle = float(1 << (scheme.bits - 1))
    ones = torch.ones(1, len(values))
    columns = Columns(
        work=values.clone(),
        codes=torch.zeros(values.shape, dtype=torch.uint8),
        upper=upper,
        group=torch.zeros(values.shape[1], dtype=torch.int64),
        steps=ones,
        offsets=ones * middle,
        scheme=scheme,
    )
    return on_device(columns)


def on_device(columns: Columns) -> Columns:
    """A copy on the device of the tests."""
    return Columns(
        work=columns.work.clone().to(DEVICE),
        codes=columns.codes.clone().to(DEVICE),
        upper=columns.upper.to(DEVICE),
        group=columns.group.to(DEVICE),
        steps=columns.steps.to(DEVICE),
        offsets=columns.offsets.to(DEVICE),
        scheme=columns.scheme,
    )


@over_schemes
def test_a_panel_gets_the_codes_and_errors_of_the_loop(
    cuda: ModuleType, scheme: LayerScheme
) -> None:
    """Sums in another order may tip a tie, and a tipped code moves those after it in its row."""
    weight, _, factor, grid = problem(11, 128, scheme)
    looped = Columns.of(weight, factor, grid)
    fused = on_device(looped)
    round_one_by_one(looped, 0, 128)
    cuda.round_panel(fused, 0, 128)
    equal = (fused.codes == looped.codes).all(1)
    assert equal.float().mean() >= 0.9
    # A column is a sum of at most 128 terms, and its error is divided by U[i, i].
    difference = (fused.work - looped.work)[equal] * factor.upper.diagonal()
    assert float(difference.abs().max() / weight.abs().max()) <= 128 * 2**-23


@over_formats
@pytest.mark.parametrize("n_columns", [1, 5, 127])
def test_a_narrow_panel_leaves_all_other_columns_alone(
    cuda: ModuleType, scheme: LayerScheme, n_columns: int
) -> None:
    weight, _, factor, grid = problem(3, 256, scheme)
    looped = Columns.of(weight, factor, grid)
    fused, before = on_device(looped), on_device(looped)
    start, end = 96, 96 + n_columns
    round_one_by_one(looped, start, end)
    cuda.round_panel(fused, start, end)
    assert torch.equal(fused.codes[:, start:end], looped.codes[:, start:end])
    torch.testing.assert_close(fused.work, looped.work, rtol=1e-5, atol=1e-5)
    fused.work[:, start:end] = before.work[:, start:end]
    assert torch.equal(fused.work, before.work)


@over_formats
def test_whole_weights_have_the_loops_output_error(cuda: ModuleType, scheme: LayerScheme) -> None:
    """Three panels with products between them; the last panel is narrower."""
    weight, hessian, factor, grid = problem(11, 320, scheme)
    ways: list[tuple[int, Callable[[Columns, int, int], None]]] = [
        (32, round_one_by_one),
        (cuda.PANEL, cuda.round_panel),
    ]
    codes, errors = [], []
    for width, round_panel in ways:
        columns = Columns.of(weight, factor, grid)
        round_in_halves(columns, width, round_panel)
        codes.append(columns.codes)
        restored = torch.empty_like(columns.codes)
        restored[:, factor.order] = columns.codes
        error = (replace(grid, codes=restored).dequantize() - weight).double()
        errors.append(float(torch.einsum("oi,ij,oj->", error, hessian.double(), error)))
    assert (codes[0] == codes[1]).all(1).float().mean() >= 0.8
    assert errors[1] <= 1.001 * errors[0]


def edge_values(scheme: LayerScheme) -> torch.Tensor:
    """Every number of a format, what lies between two of them, and float32's next to both."""
    if scheme.number_format == "nf4":
        numbers = torch.tensor(NF4_LEVELS)
    elif scheme.number_format == "e4m3":
        codes = torch.arange(256, dtype=torch.uint8)
        numbers = codes.view(torch.float8_e4m3fn).float()
        numbers = numbers[numbers.isfinite()].sort().values
    else:
        lowest, highest = code_range(scheme)
        numbers = torch.arange(lowest, highest + 1.0) - (1 << (scheme.bits - 1))
    middles = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, middles, torch.tensor([-0.0, 1e-30, -1e-30, 1e30, -1e30])])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    return torch.cat([values, values.nextafter(up), values.nextafter(down)])


@over_schemes
def test_every_number_and_tie_is_encoded_as_the_grid_does(
    cuda: ModuleType, scheme: LayerScheme
) -> None:
    """A correction by zero may change the sign of a zero, so both zeros of e4m3 count as one."""
    values = edge_values(scheme)
    padded = torch.nn.functional.pad(values, (0, -len(values) % cuda.PANEL))
    columns = panel_of(padded.view(-1, cuda.PANEL), scheme, upper=torch.eye(cuda.PANEL))
    expected = encode(columns.work, columns.steps[0, 0], columns.offsets[0, 0], scheme)
    cuda.round_panel(columns, 0, cuda.PANEL)
    codes = columns.codes.float()
    if scheme.number_format == "e4m3":
        codes, expected = (torch.where(part == 128, 0.0, part) for part in (codes, expected))
    assert torch.equal(codes, expected)


def test_a_negative_zero_keeps_its_sign_as_an_8_bit_float(cuda: ModuleType) -> None:
    values = torch.tensor([[-0.0], [0.0], [-1e-30]])
    columns = panel_of(values, SCHEMES["e4m3"], upper=torch.ones(1, 1))
    cuda.round_panel(columns, 0, 1)
    assert columns.codes.flatten().tolist() == [128, 0, 128]


@over_schemes
def test_nan_stays_nan_in_its_row_and_changes_no_other_and_no_earlier_column(
    cuda: ModuleType, scheme: LayerScheme
) -> None:
    values = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    upper = torch.full((6, 6), 0.1).triu() + torch.eye(6)
    whole = panel_of(values, scheme, upper=upper)
    values[1, 2] = torch.nan
    looped = panel_of(values, scheme, upper=upper)
    fused = panel_of(values, scheme, upper=upper)
    round_one_by_one(looped, 0, 6)
    for columns in (whole, fused):
        cuda.round_panel(columns, 0, 6)
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[1, 2:] = True
    assert torch.equal(fused.work.isnan().cpu(), expected)
    assert torch.equal(fused.codes, looped.codes)
    sound = ~expected.to(DEVICE)
    assert torch.equal(fused.codes[sound], whole.codes[sound])
    assert torch.equal(fused.work[sound], whole.work[sound])
