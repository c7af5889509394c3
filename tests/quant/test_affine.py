"""Grids, rounding and packing against definitions written out here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gteopt.config.recipe import Bits, GroupSize, LayerScheme
from gteopt.errors import InputError, IntegrityError, NumericsError
from gteopt.quant.affine import PackedWeight, pack, quantize_rtn, snr_db
from gteopt.quant.grid import NF4_LEVELS, code_range, encode, group_size_problems
from gteopt.quant.grid_search import fit_grid
from gteopt.quant.packing import pack_codes, packed_width, unpack_codes

ALL_BITS: tuple[Bits, ...] = (2, 3, 4, 8)
GROUP_SIZES: tuple[GroupSize, ...] = (32, 64, 128, "per_channel")


def all_schemes() -> list[LayerScheme]:
    return [
        LayerScheme(bits=bits, group_size=group_size, symmetric=symmetric)
        for bits, group_size, symmetric in itertools.product(ALL_BITS, GROUP_SIZES, (True, False))
    ]


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_column_of_a_wider_matrix_packs_like_a_copy_of_it(bits: Bits) -> None:
    wide = torch.arange(12, dtype=torch.uint8).view(6, 2) & ((1 << bits) - 1)
    column = wide[:, :1]
    assert torch.equal(pack_codes(column, bits), pack_codes(column.clone(), bits))
    assert pack_codes(column, bits).stride() == (1, 1)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_packing_any_number_of_codes_is_exact_and_dense(bits: Bits) -> None:
    generator = torch.Generator().manual_seed(bits)
    for n in (1, 2, 3, 5, 7, 8, 9, 31, 64, 129):
        codes = torch.randint(0, 1 << bits, (3, n), generator=generator, dtype=torch.uint8)
        packed = pack_codes(codes, bits)
        assert packed.shape == (3, math.ceil(n * bits / 8))
        assert torch.equal(unpack_codes(packed, bits, n), codes)
        # Views that begin at an odd byte, or whose rows are not contiguous.
        for part in (codes.flatten()[1:], codes.t(), codes.flatten()[::2], codes[:, :1].t()):
            unpacked = unpack_codes(pack_codes(part, bits), bits, part.shape[-1])
            assert torch.equal(unpacked, part)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_packed_bits_lie_in_little_endian_order(bits: Bits) -> None:
    codes = torch.randint(
        0, 1 << bits, (11,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    number = sum(code << (i * bits) for i, code in enumerate(codes.tolist()))
    expected = number.to_bytes(packed_width(11, bits), "little")
    assert bytes(pack_codes(codes, bits).tolist()) == expected


@pytest.mark.parametrize("scheme", all_schemes(), ids=str)
def test_a_packed_weight_unpacks_and_reloads_exactly(scheme: LayerScheme) -> None:
    in_features = 37 if scheme.group_size == "per_channel" else 384
    weight = quantize_rtn(seeded(5, in_features), scheme)
    packed = pack(weight)
    reloaded = PackedWeight.from_tensors(scheme, in_features, packed.to_tensors()).unpack()
    assert torch.equal(reloaded.codes, weight.codes)
    assert torch.equal(reloaded.scale, weight.scale)
    assert torch.equal(reloaded.zero, weight.zero)
    assert packed.bits_per_weight == pytest.approx(packed.n_bytes * 8 / (5 * in_features))


def test_4_bit_groups_of_128_take_at_most_a_quarter_bit_more_than_4() -> None:
    scheme = LayerScheme(bits=4, group_size=128, symmetric=False)
    assert pack(quantize_rtn(seeded(64, 1024), scheme)).bits_per_weight <= 4.25


@pytest.mark.parametrize("scheme", all_schemes(), ids=str)
def test_each_code_is_the_nearest_point_of_its_stored_grid(scheme: LayerScheme) -> None:
    weight = seeded(6, 128)
    quantized = quantize_rtn(weight, scheme)
    lowest, highest = code_range(scheme)
    n_groups = quantized.scale.shape[1]
    points = torch.arange(lowest, highest + 1) - quantized.zero.double()[..., None]
    points = points * quantized.scale.double()[..., None]  # [O, G, codes]
    values = weight.double().reshape(6, n_groups, -1)
    nearest = (values[..., None] - points[:, :, None]).abs().amin(-1)
    distance = (values - quantized.dequantize().double().reshape(values.shape)).abs()
    assert torch.allclose(distance, nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scheme", all_schemes(), ids=str)
def test_values_inside_the_range_are_off_by_at_most_half_a_step(scheme: LayerScheme) -> None:
    weight = seeded(8, 256)
    quantized = quantize_rtn(weight, scheme)
    steps = quantized.scale.float().repeat_interleave(256 // quantized.scale.shape[1], dim=1)
    # Rounding the zero point may push one end of an asymmetric range out by another half step.
    # Rounding the scale to float16, a relative 2^-11, moves the end by that share of all codes.
    bound = (0.5 if scheme.symmetric else 1.0) + (1 << scheme.bits) / 2048
    assert ((quantized.dequantize() - weight).abs() <= steps * bound).all()


@pytest.mark.parametrize("scheme", all_schemes(), ids=str)
def test_clip_search_never_raises_the_error_of_a_group(scheme: LayerScheme) -> None:
    weight = seeded(16, 256) ** 3
    errors = [
        (quantize_rtn(weight, scheme, clip_search=search).dequantize() - weight)
        .square()
        .reshape(16, 1 if scheme.group_size == "per_channel" else 256 // scheme.group_size, -1)
        .sum(-1)
        for search in (True, False)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < errors[1].sum()


def test_clip_search_spends_accuracy_where_the_importance_is() -> None:
    scheme = LayerScheme(bits=3, group_size="per_channel", symmetric=False)
    weight = seeded(32, 64)
    weight[:, 0] *= 20
    unimportant = torch.ones(64)
    unimportant[0] = 0
    scale, _ = fit_grid(weight, scheme, clip_search=True, importance=unimportant)
    scale_all, _ = fit_grid(weight, scheme, clip_search=True, importance=None)
    assert scale.float().mean() < scale_all.float().mean()


def test_symmetric_8_bit_uses_no_code_that_int8_negation_overflows() -> None:
    scheme = LayerScheme(bits=8, group_size="per_channel", symmetric=True)
    for search in (True, False):
        codes = quantize_rtn(seeded(64, 64) ** 5, scheme, clip_search=search).codes
        assert codes.min() >= 1


def test_8_bit_floats_keep_four_digits_of_every_weight() -> None:
    """The bound is half a step: a share of a normal number, a constant for subnormal ones."""
    scheme = LayerScheme(bits=8, group_size="per_channel", symmetric=True, number_format="e4m3")
    weight = seeded(64, 256) ** 3
    weight[0] = 0
    weight[1, 0] = 1e4  # values beside an outlier keep their digits, unlike in int8
    quantized = quantize_rtn(weight, scheme)
    scale = quantized.scale.double()
    bound = (weight.abs().double() / 16).maximum(scale * 2**-10) * (1 + 1e-6)
    assert ((quantized.dequantize() - weight).abs().double() <= bound).all()
    assert (quantized.codes & 127 != 127).all()  # NaN
    assert (quantized.dequantize()[0] == 0).all()
    again = quantize_rtn(quantized.dequantize(), scheme).dequantize()
    torch.testing.assert_close(again, quantized.dequantize(), rtol=1 / 16, atol=0)
    assert torch.equal(pack(quantized).unpack().codes, quantized.codes)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        quantize_rtn(weight / 0, scheme)


@pytest.mark.parametrize("group_size", [64, 128])
def test_nf4_takes_the_nearest_of_its_16_numbers(group_size: GroupSize) -> None:
    scheme = LayerScheme(bits=4, group_size=group_size, symmetric=True, number_format="nf4")
    weight = seeded(32, 256)
    weight[0] = 0
    weight[1, ::2] = 0
    quantized = quantize_rtn(weight, scheme)
    largest = weight.view(32, -1, int(group_size)).abs().amax(-1)
    torch.testing.assert_close(quantized.scale[1:], largest[1:].half(), rtol=0, atol=0)
    numbers = (
        torch.tensor(NF4_LEVELS)
        * quantized.scale.float().repeat_interleave(int(group_size), 1)[..., None]
    )
    nearest = (numbers - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((quantized.dequantize() - weight).abs(), nearest)
    assert (quantized.dequantize()[weight == 0] == 0).all()
    assert torch.equal(pack(quantized).unpack().codes, quantized.codes)
    searched = quantize_rtn(weight, scheme, clip_search=True).dequantize()
    assert (searched - weight).square().sum() < (quantized.dequantize() - weight).square().sum()


def test_nf4_codes_are_those_of_a_search_among_the_boundaries_to_the_last_bit() -> None:
    """At every boundary and cell edge, just beside them, and outside the range of weights."""
    scheme = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
    levels = torch.tensor(NF4_LEVELS)
    boundaries = (levels[1:] + levels[:-1]) / 2
    points = torch.cat([boundaries, torch.arange(-33, 34) / 32, seeded(8, 512).flatten()])
    up, down = (points.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    extremes = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -1e-45])
    shares = torch.cat([points, up, down, extremes])
    codes = encode(shares, torch.tensor(1.0), torch.tensor(0.0), scheme)
    assert torch.equal(codes.long(), torch.bucketize(shares, boundaries))


@pytest.mark.parametrize("scheme", all_schemes(), ids=str)
def test_every_grid_represents_zero_exactly(scheme: LayerScheme) -> None:
    weight = seeded(4, 128).abs() + 1
    weight[:, ::2] = 0
    values = quantize_rtn(weight, scheme, clip_search=True).dequantize()
    assert (values[:, ::2] == 0).all()


def test_zero_and_denormal_groups_stay_finite() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1e-12
    for scheme in all_schemes():
        if scheme.group_size == 128:
            continue
        quantized = quantize_rtn(weight, scheme, clip_search=True)
        assert (quantized.scale > 0).all()
        assert (quantized.dequantize().abs() <= 1e-7).all()


def test_weights_that_no_grid_can_hold_are_refused() -> None:
    scheme = LayerScheme(bits=4, group_size="per_channel", symmetric=False)
    with pytest.raises(NumericsError, match="65504"):
        quantize_rtn(torch.full((1, 32), 2e6), scheme)
    for bad in (math.nan, math.inf):
        weight = torch.ones(2, 32)
        weight[1, 3] = bad
        with pytest.raises(NumericsError, match="NaN or infinite"):
            quantize_rtn(weight, scheme)


def test_layers_that_the_group_size_does_not_divide_are_all_named() -> None:
    layers = {"a.query": 384, "a.out": 1000, "b.out": 33}
    problems = group_size_problems(layers, 128)
    assert [p.split(":")[0] for p in problems] == ["a.out", "b.out"]
    assert "1000" in problems[0]
    assert group_size_problems(layers, "per_channel") == []
    scheme = LayerScheme(bits=4, group_size=128, symmetric=True)
    with pytest.raises(InputError, match="1000"):
        quantize_rtn(seeded(2, 1000), scheme)


def test_tensors_that_do_not_belong_together_are_refused_with_every_reason() -> None:
    scheme = LayerScheme(bits=4, group_size=32, symmetric=False)
    tensors = pack(quantize_rtn(seeded(4, 64), scheme)).to_tensors()
    with pytest.raises(IntegrityError, match="'qzero' is missing"):
        PackedWeight.from_tensors(scheme, 64, {k: v for k, v in tensors.items() if k != "qzero"})
    damaged = {**tensors, "scale": tensors["scale"].float(), "qzero": tensors["qzero"][:, :0]}
    with pytest.raises(IntegrityError) as caught:
        PackedWeight.from_tensors(scheme, 64, damaged)
    assert "'scale'" in str(caught.value)
    assert "'qzero'" in str(caught.value)
    with pytest.raises(IntegrityError, match="'extra' does not belong"):
        PackedWeight.from_tensors(scheme, 64, {**tensors, "extra": tensors["scale"]})


def test_snr_follows_its_definition() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert snr_db(reference, reference + torch.tensor([0.5, 0.0])) == pytest.approx(20.0)
    assert snr_db(reference, reference) == math.inf
    assert snr_db(torch.zeros(2), reference) == -math.inf


def test_more_bits_give_about_6_dB_each() -> None:
    weight = torch.rand(32, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    snr = {}
    for bits in ALL_BITS:
        scheme = LayerScheme(bits=bits, group_size="per_channel", symmetric=False)
        snr[bits] = snr_db(weight, quantize_rtn(weight, scheme).dequantize())
        # Uniform values on a uniform grid of 2^bits - 1 steps.
        assert snr[bits] == pytest.approx(20 * math.log10((1 << bits) - 1), abs=0.7)
