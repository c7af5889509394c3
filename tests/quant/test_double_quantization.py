"""Double quantization against its definition, and in each format that stores it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gteopt
from gteopt.config.recipe import LayerScheme, load_recipe
from gteopt.errors import IntegrityError
from gteopt.formats import FORMATS
from gteopt.formats.packed import LinearShape
from gteopt.quant import gptq
from gteopt.quant.affine import PackedWeight, pack, packed_bytes, quantize_rtn, round_to_grid
from gteopt.quant.double_quantization import dynamic_map, quantize_scale

SCHEME = LayerScheme(
    bits=4, group_size=64, symmetric=True, number_format="nf4", double_quantization=True
)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_dynamic_map_is_what_its_definition_says() -> None:
    expected = [0.0, 1.0]
    for decade in range(7):
        for part in range(2**decade):
            middle = 0.1 + 0.9 * (part + 0.5) / 2**decade
            expected += [sign * middle * 10.0 ** (decade - 6) for sign in (-1, 1)]
    assert dynamic_map().tolist() == pytest.approx(sorted(expected), rel=1e-6)


def test_every_scale_has_the_nearest_number_of_its_block() -> None:
    scale = seeded(30, 21).abs() / 50 + 1e-3  # 630: two whole blocks and a part of one
    nested = quantize_scale(scale)
    numbers = dynamic_map()
    shifted = torch.split(scale.flatten() - scale.mean(), 256)
    for block, largest, codes in zip(
        shifted, nested.largest, torch.split(nested.codes.flatten(), 256), strict=True
    ):
        assert largest == block.abs().max()
        distances = (block[:, None] - numbers * largest).abs()
        chosen = distances.gather(1, codes.long()[:, None])[:, 0]
        assert bool((chosen <= distances.amin(1) + 1e-9).all())
    error = (nested.scale().float() - scale).abs()
    assert float(error.max()) < 0.01 * float((scale - scale.mean()).abs().max())


def test_scales_that_are_all_alike_stay_so() -> None:
    assert torch.equal(
        quantize_scale(torch.full((4, 4), 0.5)).scale(), torch.full((4, 4), 0.5).half()
    )


def test_a_group_of_zeros_does_not_spoil_the_scales_beside_it() -> None:
    weight = seeded(64, 256)
    with_zeros = weight.clone()
    with_zeros[5, 64:128] = 0
    plain, quantized = quantize_rtn(weight, SCHEME), quantize_rtn(with_zeros, SCHEME)
    assert bool((quantized.dequantize()[5, 64:128] == 0).all())
    rest = torch.arange(64) != 5
    assert (quantized.dequantize() - weight)[rest].norm() < 1.01 * (plain.dequantize() - weight)[
        rest
    ].norm()


def test_packing_and_the_layout_keep_codes_and_scales_exactly() -> None:
    weight = quantize_rtn(seeded(96, 256), SCHEME)
    packed = pack(weight)
    assert packed.n_bytes == packed_bytes(96, 256, SCHEME)
    assert packed.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.01)
    again = PackedWeight.from_tensors(SCHEME, 256, packed.to_tensors())
    tensors = FORMATS["bitsandbytes"].to_tensors(packed)
    read = FORMATS["bitsandbytes"].from_tensors({}, "a", LinearShape(96, 256), tensors).weight
    for reloaded in (again.unpack(), read.unpack()):
        assert torch.equal(reloaded.dequantize(), weight.dequantize())
        assert torch.equal(reloaded.scale, weight.scale)


def test_nested_scales_of_another_shape_are_refused() -> None:
    tensors = pack(quantize_rtn(seeded(96, 256), SCHEME)).to_tensors()
    tensors["scale_largest"] = tensors["scale_largest"][:1]
    with pytest.raises(
        IntegrityError, match=r"'scale_largest' is .* expected torch\.float32 \[2\]"
    ):
        PackedWeight.from_tensors(SCHEME, 256, tensors)


def test_gptq_on_nested_scales_never_loses_to_rounding_on_the_same_grid() -> None:
    weight, x = seeded(48, 128), seeded(400, 128, seed=1) @ seeded(128, 128, seed=2)
    hessian = x.T @ x / len(x)
    solved = gptq.solve(weight, hessian, SCHEME, gptq.GptqOptions()).weight
    assert solved.double is not None
    assert torch.equal(solved.scale, solved.double.scale())
    rounded = round_to_grid(weight, replace(solved, codes=torch.empty(0)))
    error, worst = (
        ((quantized.dequantize() - weight) @ hessian * (quantized.dequantize() - weight)).sum(1)
        for quantized in (solved, rounded)
    )
    assert bool((error <= worst * (1 + 1e-5)).all())
    assert float(error.sum()) < 0.9 * float(worst.sum())


@pytest.mark.parametrize("format", ["auto", "gteopt"])
def test_an_artifact_takes_a_tenth_of_a_bit_for_its_scales(tmp_path: Path, format: str) -> None:
    recipe = load_recipe("nf4-dq").model_copy(update={"format": format})
    manifest = gteopt.quantize("nano", recipe, tmp_path / "dq")
    assert manifest.format == ("bitsandbytes" if format == "auto" else "gteopt")
    bits = {round(layer.bits_per_weight, 2) for layer in manifest.layers}
    assert bits == {4.13}
    gteopt.quantize("nano", "nf4", tmp_path / "plain")
    texts = ["a bridge", "ein Fluss", "the sea at night"]
    a, b = (gteopt.load(tmp_path / name).encode(texts) for name in ("dq", "plain"))
    assert math.isclose(1, float((a * b).sum(1).min()), abs_tol=2e-3)
    assert not (a == b).all()
