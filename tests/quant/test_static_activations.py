"""Static activations: the grid of a layer's inputs, its error, and the layers that use it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gteopt.kernels.cpu
from gteopt.config.recipe import GptqWeights, LayerScheme, RtnWeights
from gteopt.errors import IntegrityError
from gteopt.kernels import make_linear
from gteopt.kernels.cpu import StaticInt8LinearCpu
from gteopt.kernels.reference import Int8Reference
from gteopt.quant.affine import PackedWeight, pack, packed_bytes, quantize_rtn
from gteopt.quant.static_activations import InputGrid, SeenInputs, fit_input_grid

CPU = torch.device("cpu")
STATIC = LayerScheme(
    bits=8,
    group_size="per_channel",
    symmetric=True,
    activation_bits=8,
    activation_symmetric=False,
    activation_static=True,
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlying(n: int, in_features: int, seed: int = 0) -> Tensor:
    """Inputs whose features differ in scale and mean, as behind a LayerNorm."""
    sizes = torch.logspace(-1, 1, in_features)[
        torch.randperm(in_features, generator=torch.Generator().manual_seed(9))
    ]
    return (seeded(n, in_features, seed=seed) + 0.7 * seeded(in_features, seed=8)) * sizes


def seen_of(x: Tensor) -> SeenInputs:
    inputs = SeenInputs(x.shape[1])
    for part in torch.split(x, 37):
        inputs.add(part)
    return inputs


def output_error(x: Tensor, weight: Tensor, grid: InputGrid) -> float:
    """|y_q - y|^2 / |y|^2, the weight rounded to nearest and the bias corrected, in float64."""
    codes = quantize_rtn(weight * grid.scale, STATIC).dequantize().double()
    exact = x.double() @ weight.double().T
    error = grid.steps(x).double() @ codes.T - exact
    return float((error - error.mean(0)).square().sum() / exact.square().sum())


def static_weight(out_features: int, in_features: int, x: Tensor) -> tuple[PackedWeight, Tensor]:
    """A packed layer for inputs x, and the float64 weight that its codes stand for."""
    weight = seeded(out_features, in_features, seed=3) / 8
    grid = fit_input_grid(seen_of(x))
    rounded = quantize_rtn(weight * grid.scale, STATIC)
    codes = pack(rounded)
    packed = PackedWeight(codes.qweight, codes.scale, None, STATIC, in_features, inputs=grid)
    return packed, rounded.dequantize().double()


def between_ties(n: int, grid: InputGrid) -> Tensor:
    """Inputs [n, I] that no rounding error moves to another code."""
    codes = torch.randint(
        -20, 275, (n, len(grid.scale)), generator=torch.Generator().manual_seed(7)
    )
    return (codes + seeded(*codes.shape).clamp(-0.4, 0.4) - grid.zero) * grid.scale


def test_ranges_and_moments_are_those_of_all_inputs() -> None:
    x = outlying(500, 24)
    inputs = seen_of(x)
    assert inputs.n_rows == 500
    torch.testing.assert_close(inputs.low, x.amin(0))
    torch.testing.assert_close(inputs.high, x.amax(0))
    torch.testing.assert_close(inputs.mean.double(), x.double().mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        inputs.square.double(), x.double().square().mean(0), rtol=1e-4, atol=0
    )


def test_what_calibration_showed_is_off_by_at_most_half_a_scale() -> None:
    x = outlying(500, 24)
    grid = fit_input_grid(seen_of(x))
    back = grid.steps(x).double() * grid.scale.double()
    assert bool(((back - x.double()).abs() <= grid.scale.double() * (0.5 + 1e-5)).all())
    beyond = grid.steps(100 * x) + grid.zero  # codes saturate, they do not wrap around
    assert bool(((beyond > -1e-3) & (beyond < 255 + 1e-3)).all())


def test_fitted_scales_beat_one_range_for_all_and_a_range_for_each_feature() -> None:
    inputs = seen_of(outlying(4000, 96))
    fresh = outlying(4000, 96, seed=5)  # other inputs of the same kind
    weight = seeded(64, 96, seed=2)
    span, middle = inputs.high - inputs.low, (inputs.high + inputs.low) / 2
    fitted_error = output_error(fresh, weight, fit_input_grid(inputs))
    for scale, share in ((span.max().expand(96) / 255, 0.4), (span / 255, 0.8)):
        assert fitted_error < share * output_error(
            fresh, weight, InputGrid(scale, 128 - middle / scale)
        )


def test_features_that_never_moved_stay_finite_and_bounded() -> None:
    x = outlying(200, 16)
    x[:, 3] = 0.0
    x[:, 5] = 2.5
    weight = seeded(8, 16, seed=2)
    grid = fit_input_grid(seen_of(x))
    assert bool(torch.isfinite(grid.scale).all() & torch.isfinite(grid.zero).all())
    assert output_error(x, weight, grid) < 1e-3
    nothing = fit_input_grid(seen_of(torch.zeros(50, 16)))
    assert bool((nothing.steps(torch.zeros(2, 16)) * nothing.scale == 0).all())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tokens", [(), (1,), (7,), (2, 3), (259,), (0, 5)], ids=str)
def test_layers_multiply_the_rounded_inputs_as_float64_does(
    tokens: tuple[int, ...], biased: bool
) -> None:
    x = outlying(300, 48)
    weight, codes = static_weight(40, 48, x)
    bias = seeded(40, seed=4) if biased else None
    assert weight.inputs is not None
    asked = between_ties(torch.Size(tokens).numel(), weight.inputs).view(*tokens, 48)
    exact = weight.inputs.steps(asked.reshape(-1, 48)).double() @ codes.T
    exact = (exact if bias is None else exact + bias.double()).view(*tokens, 40)
    layer = make_linear(weight, bias, device=CPU, dtype=torch.float32)
    assert isinstance(layer, StaticInt8LinearCpu)
    for int8_layer in (layer, Int8Reference(weight, bias)):
        y = int8_layer(asked)
        assert y.shape == (*tokens, 40)
        assert (y.double() - exact).norm() <= 2e-6 * exact.norm() + 1e-9


def test_without_vnni_every_second_code_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = outlying(300, 48)
    weight, codes = static_weight(40, 48, x)
    assert weight.inputs is not None
    monkeypatch.setattr(gteopt.kernels.cpu, "activation_bits", lambda: 7)
    layer = StaticInt8LinearCpu(weight, None)
    coarse = InputGrid(2 * weight.inputs.scale, weight.inputs.zero / 2)
    asked = between_ties(300, coarse)
    steps = (asked / coarse.scale + coarse.zero).round().clamp(0, 127) - coarse.zero
    exact = 2 * steps.double() @ codes.T
    assert (layer(asked).double() - exact).norm() <= 2e-6 * exact.norm()
    assert "7 bits" in layer.kernel


def test_a_packed_layer_reloads_with_its_grid_and_not_without() -> None:
    weight, _ = static_weight(40, 48, outlying(300, 48))
    tensors = weight.to_tensors()
    back = PackedWeight.from_tensors(STATIC, 48, tensors)
    assert back.inputs is not None
    assert weight.inputs is not None
    assert torch.equal(back.inputs.scale, weight.inputs.scale)
    assert torch.equal(back.unpack().codes, weight.unpack().codes)
    assert weight.n_bytes == packed_bytes(40, 48, STATIC)
    del tensors["input_zero"]
    with pytest.raises(IntegrityError, match="'input_zero' is missing"):
        PackedWeight.from_tensors(STATIC, 48, tensors)


def test_recipes_that_contradict_static_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="needs calibration texts; use method: gptq"):
        RtnWeights(method="rtn", scheme=STATIC)
    with pytest.raises(ValueError, match="static inputs already have a scale for each feature"):
        GptqWeights(method="gptq", scheme=STATIC, smooth=True)
    with pytest.raises(ValueError, match="gptaq_strength: 0"):
        GptqWeights(method="gptq", scheme=STATIC, gptaq_strength=0.5)
    with pytest.raises(ValueError, match="needs activation_symmetric: false"):
        LayerScheme.model_validate({**STATIC.model_dump(), "activation_symmetric": True})
