"""Measured times choose the product of a layer; the choice changes no more than it says."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gteopt.kernels.measured
from gteopt.config.recipe import GroupSize, LayerScheme
from gteopt.errors import InputError
from gteopt.kernels import arithmetic_name, kernel_name, make_linear, speed_up_linears_
from gteopt.kernels.cpu import (
    INT8_PRODUCTS,
    CpuProducts,
    DecodedLinearCpu,
    DenseLinearCpu,
    activation_bits,
    exact_products,
    multiplies_bfloat16,
)
from gteopt.kernels.cpu_int4 import (
    CODES,
    EACH_CALL,
    INT4_PRODUCTS,
    KEPT,
    Int4LinearCpu,
    int4_runs_here,
)
from gteopt.kernels.measured import (
    DETERMINISTIC,
    KernelTimes,
    KernelWays,
    LayerTimes,
    MeasuredLayer,
    choose_kernel_ways,
    decoding_wins,
    measured_layer_times,
    pick_int4,
    pick_int8,
)
from gteopt.machine import describe_machine
from gteopt.quant.affine import pack, quantize_rtn, quantize_tokens
from gteopt.records.files import read_record

CPU = torch.device("cpu")
W8A8 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
ZEROS = W8A8.model_copy(update={"activation_symmetric": False})
NF4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
STATIC = ZEROS.model_copy(update={"activation_static": True})
FP8 = W8A8.model_copy(update={"number_format": "e4m3"})
INT4 = LayerScheme(bits=4, group_size=128, symmetric=False)
INT3 = LayerScheme(bits=3, group_size=64, symmetric=False)
LAYER = MeasuredLayer(W8A8, 64, 128)
KEY = LAYER.key(torch.bfloat16)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ways_of(scheme: LayerScheme, products: CpuProducts | None, dtype: torch.dtype) -> KernelWays:
    return KernelWays({MeasuredLayer(scheme, 64, 128).key(dtype): products}, decodes=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [W8A8, ZEROS], ids=["symmetric", "zero points"])
def test_every_exact_product_gives_the_same_bits(scheme: LayerScheme, dtype: torch.dtype) -> None:
    weight, bias = pack(quantize_rtn(seeded(64, 128), scheme)), seeded(64, seed=1)
    first = make_linear(weight, bias, device=CPU, dtype=dtype)
    names = exact_products()
    assert names, "this build of torch has an int8 product"
    for few, many in itertools.product(names, repeat=2):
        ways = ways_of(scheme, CpuProducts(few, many), dtype)
        layer = make_linear(weight, bias, device=CPU, dtype=dtype, ways=ways)
        for n_tokens in (1, 16, 97, 200):
            x = seeded(n_tokens, 128, seed=2).to(dtype)
            assert torch.equal(layer(x), first(x)), (few, many, n_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(INT8_PRODUCTS))
def test_every_int8_product_multiplies_codes_as_float64_does(name: str, dtype: torch.dtype) -> None:
    if name not in exact_products():
        pytest.skip(f"{name} does not sum exactly on this processor")
    weight, bias = pack(quantize_rtn(seeded(64, 128), ZEROS)), seeded(64, seed=1)
    ways = ways_of(ZEROS, CpuProducts(name, name), dtype)
    layer = make_linear(weight, bias, device=CPU, dtype=dtype, ways=ways)
    x = seeded(120, 128, seed=2).abs().to(dtype)  # one-sided, so that zero points matter
    codes, scale, zero = quantize_tokens(x, symmetric=False, bits=activation_bits())
    assert zero is not None
    rounded = (codes.double() - zero.double()) * scale.double()
    exact = rounded @ weight.unpack().dequantize().double().T + bias.to(dtype).double()
    bound = 2e-6 if dtype == torch.float32 else 4e-3
    for n in (1, 120):
        assert (layer(x[:n]).double() - exact[:n]).norm() <= bound * exact[:n].norm()


@pytest.mark.parametrize("group_size", [32, 128, "per_channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_product_of_a_4_bit_layer_multiplies_as_float64_does(
    group_size: GroupSize, symmetric: bool
) -> None:
    scheme = LayerScheme(bits=4, group_size=group_size, symmetric=symmetric)
    weight, bias = pack(quantize_rtn(seeded(64, 128), scheme)), seeded(64, seed=1).bfloat16()
    if not int4_runs_here(weight):
        pytest.skip("torch's 4-bit layout on this CPU is neither that of AVX-512 nor of AVX2")
    choices = [*itertools.starmap(CpuProducts, itertools.product(INT4_PRODUCTS, repeat=2)), None]
    for products in choices:
        ways = ways_of(scheme, products, torch.bfloat16)
        layer = make_linear(weight, bias, device=CPU, dtype=torch.bfloat16, ways=ways)
        for n_tokens in (1, 96, 97, 300):
            x = seeded(n_tokens, 128, seed=2).bfloat16()
            exact = x.double() @ weight.unpack().dequantize().double().T + bias.double()
            assert (layer(x).double() - exact).norm() <= 8e-3 * exact.norm(), (products, n_tokens)
        named = kernel_name(scheme, 64, 128, device=CPU, dtype=torch.bfloat16, ways=ways)
        assert named == layer.kernel


def test_a_kept_weight_takes_memory_and_is_not_decoded_again() -> None:
    weight = pack(quantize_rtn(seeded(64, 128), INT4))
    if not int4_runs_here(weight):
        pytest.skip("torch's 4-bit layout on this CPU is neither that of AVX-512 nor of AVX2")
    kept = Int4LinearCpu(weight, None, CpuProducts(CODES, KEPT))
    packed = Int4LinearCpu(weight, None)
    extra = sum(t.nbytes for t in kept.buffers()) - sum(t.nbytes for t in packed.buffers())
    assert extra in (2 * 64 * 128, 4 * 64 * 128)
    assert (packed.decodes, kept.decodes) == (True, False)
    for n_tokens in (16, 200):
        x = seeded(n_tokens, 128, seed=1).bfloat16()
        torch.testing.assert_close(kept(x), packed(x), rtol=1e-2, atol=1e-2)


def test_a_4_bit_layer_is_never_slower_than_its_decoded_weight_where_memory_allows() -> None:
    def times(few: tuple[float, float], many: tuple[float, float, float]) -> LayerTimes:
        codes, dense = few
        return LayerTimes(
            few={CODES: codes, EACH_CALL: codes, "decoded": dense},
            many=dict(zip((CODES, EACH_CALL, "decoded"), many, strict=True)),
        )

    usual = times((10, 30), (300, 200, 100))
    assert pick_int4(usual) == CpuProducts(CODES, KEPT)
    assert pick_int4(usual, may_grow=False) == CpuProducts(CODES, EACH_CALL)
    slow_codes = times((30, 25), (300, 200, 100))
    assert pick_int4(slow_codes) is None
    fast_codes = times((10, 30), (90, 200, 100))
    assert pick_int4(fast_codes) == CpuProducts(CODES, CODES)
    assert pick_int4(fast_codes, may_grow=False) == CpuProducts(CODES, CODES)


def test_a_4_bit_layer_keeps_its_weight_decoded_only_where_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MeasuredLayer(INT4, 64, 128)
    if not int4_runs_here(layer.without_data()):
        pytest.skip("torch's 4-bit layout on this CPU is neither that of AVX-512 nor of AVX2")
    key = layer.key(torch.bfloat16)
    times = LayerTimes(
        few={CODES: 1.0, EACH_CALL: 1.0, "decoded": 2.0},
        many={CODES: 9.0, EACH_CALL: 4.0, "decoded": 2.0},
    )
    monkeypatch.setattr(gteopt.kernels.measured, "_measure", lambda layer, dtype: times)
    ways = choose_kernel_ways([layer], torch.bfloat16, "measured", folder=tmp_path)
    assert ways.products == {key: CpuProducts(CODES, KEPT)}
    assert key in ways.rounding
    small = describe_machine().model_copy(update={"memory_bytes": 8 * 64 * 128})
    monkeypatch.setattr("gteopt.kernels.measured.describe_machine", lambda: small)
    ways = choose_kernel_ways([layer], torch.bfloat16, "measured", folder=tmp_path)
    assert (ways.products, ways.decodes) == ({}, False)  # as without measuring
    assert choose_kernel_ways([layer], torch.bfloat16, "decoded").products == {key: None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unquantized_layers_are_packed_only_if_measured_and_where_memory_allows(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = choose_kernel_ways([], dtype, "measured", folder=tmp_path)
    assert ways.rounding != DETERMINISTIC.rounding == ""

    def sped_up(ways: KernelWays) -> DenseLinearCpu:
        linear = nn.Linear(128, 64, dtype=dtype).requires_grad_(False)
        linear.weight.copy_(seeded(64, 128))
        linear.bias.copy_(seeded(64, seed=1))
        module = nn.Sequential(linear)
        speed_up_linears_(module, CPU, ways)
        (layer,) = module
        assert isinstance(layer, DenseLinearCpu)
        return layer

    plain, packed = sped_up(DETERMINISTIC), sped_up(ways)
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        assert packed.kernel == plain.kernel
        pytest.skip("this processor multiplies no bfloat16, so there is nothing to pack")
    if dtype == torch.float32 and not torch.cpu._is_avx512_supported():
        assert packed.kernel == plain.kernel
        pytest.skip("float32 takes oneDNN's product on AVX-512 only, so there is nothing to pack")
    n_bytes = 64 * 128 * dtype.itemsize
    assert (plain.packed_bytes, packed.packed_bytes) == (0, n_bytes)
    assert packed.kernel == "torch.linear (oneDNN, packed once)" != plain.kernel
    for n_tokens in (0, 1, 16, 300):
        x = seeded(n_tokens, 128, seed=2).to(dtype)
        exact = x.double() @ plain.weight.double().T + plain.bias.double()
        assert (packed(x).double() - exact).norm() <= 4e-3 * exact.norm()
    x = seeded(3, 128).to(dtype).requires_grad_()
    packed(x).float().sum().backward()
    assert x.grad is not None
    exact = plain.weight.double().sum(0).expand(3, -1)
    assert (x.grad.double() - exact).norm() <= 4e-3 * exact.norm()
    small = describe_machine().model_copy(update={"memory_bytes": 8 * n_bytes - 1})
    monkeypatch.setattr("gteopt.kernels.measured.describe_machine", lambda: small)
    assert sped_up(ways).packed_bytes == 0


@pytest.mark.parametrize("scheme", [W8A8, ZEROS, STATIC, NF4, INT4, INT3, FP8], ids=str)
def test_a_random_layer_of_any_scheme_computes_numbers(scheme: LayerScheme) -> None:
    weight = MeasuredLayer(scheme, 64, 128).random()
    layer = make_linear(weight, None, device=CPU, dtype=torch.bfloat16)
    assert layer(seeded(3, 128).bfloat16()).isfinite().all()


@pytest.mark.parametrize("scheme", [W8A8, NF4], ids=["int8", "nf4"])
def test_a_decoded_weight_multiplies_as_float64_does(scheme: LayerScheme) -> None:
    dtype, bound = torch.float32, 1e-6
    weight, bias = pack(quantize_rtn(seeded(64, 128), scheme)), seeded(64, seed=1)
    layer = make_linear(weight, bias, device=CPU, dtype=dtype, ways=ways_of(scheme, None, dtype))
    decoded = weight.unpack().dequantize().double()
    for n_tokens in (0, 1, 40, 300):
        x = seeded(n_tokens, 128, seed=2)
        exact = x.double() @ decoded.T + bias.double()
        assert (layer(x).double() - exact).norm() <= bound * exact.norm()
    # It is in memory once, in the file's order or in oneDNN's.
    assert isinstance(layer, DecodedLinearCpu)
    plain = sum(parameter.nbytes for parameter in layer.parameters()) - bias.nbytes
    assert plain + layer.packed_bytes == 4 * 64 * 128
    x = seeded(3, 128).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    exact = decoded.sum(0).expand(3, -1)
    assert (x.grad.double() - exact).norm() <= bound * exact.norm()
    assert str(layer.kernel).startswith("decoded (")
    named = kernel_name(scheme, 64, 128, device=CPU, dtype=dtype, ways=ways_of(scheme, None, dtype))
    assert named == layer.kernel


def test_a_slow_product_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, weight: Tensor, scale: Tensor) -> None:
            self._fast = INT8_PRODUCTS["fbgemm"](weight, scale)

        def __call__(self, codes: Tensor, zero: int) -> Tensor:
            time.sleep(0.02)
            return self._fast(codes, zero)

    # The slow product comes first, so a choice without measurement would take it.
    others = dict(INT8_PRODUCTS)
    for name in others:
        monkeypatch.delitem(INT8_PRODUCTS, name)
    monkeypatch.setitem(INT8_PRODUCTS, "slow", Slow)
    for name, kind in others.items():
        monkeypatch.setitem(INT8_PRODUCTS, name, kind)
    times = measured_layer_times({KEY: LAYER}, torch.bfloat16, tmp_path)[KEY]
    assert times.few["slow"] > 10_000 > times.few["fbgemm"]
    assert "slow" not in str(pick_int8(times))


def test_an_inexact_product_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(weight: Tensor, scale: Tensor) -> object:
        exact = INT8_PRODUCTS["fbgemm"](weight, scale)
        return lambda codes, zero: exact(codes, zero).clamp_max_(1e6)

    monkeypatch.setitem(INT8_PRODUCTS, "saturating", saturating)
    assert "fbgemm" in exact_products()
    assert "saturating" not in exact_products()


def test_times_are_kept_and_another_processor_measures_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose_kernel_ways([LAYER], torch.bfloat16, "measured", folder=tmp_path)
    (file,) = tmp_path.glob("*.json")
    measured: list[MeasuredLayer] = []
    really = gteopt.kernels.measured._measure

    def counted(layer: MeasuredLayer, dtype: torch.dtype) -> LayerTimes:
        measured.append(layer)
        return really(layer, dtype)

    monkeypatch.setattr(gteopt.kernels.measured, "_measure", counted)
    assert choose_kernel_ways([LAYER], torch.bfloat16, "measured", folder=tmp_path) == first
    assert measured == []
    here = describe_machine()
    other = here.model_copy(update={"cpu": "another processor"})
    monkeypatch.setattr("gteopt.kernels.measured.describe_machine", lambda: other)
    choose_kernel_ways([LAYER], torch.bfloat16, "measured", folder=tmp_path)
    assert measured == [LAYER]
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert read_record(file, KernelTimes).processor == here.cpu


@pytest.mark.parametrize("damage", ["cut short", "of another processor"])
def test_a_file_that_is_not_ours_is_ignored_with_a_reason(tmp_path: Path, damage: str) -> None:
    measured_layer_times({KEY: LAYER}, torch.bfloat16, tmp_path)
    (file,) = tmp_path.glob("*.json")
    content = file.read_text()
    if damage == "cut short":
        file.write_text(content[: len(content) // 2])
    else:
        cpu = describe_machine().cpu
        file.write_text(content.replace(cpu, "another processor"))
    with pytest.warns(UserWarning, match="kernels are measured anew"):
        times = measured_layer_times({KEY: LAYER}, torch.bfloat16, tmp_path)
    assert times.keys() == {KEY}
    assert read_record(file, KernelTimes).layers == times


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="every process measures anew"):
        times = measured_layer_times({KEY: LAYER}, torch.bfloat16, tmp_path / "file")
    assert times.keys() == {KEY}
    with pytest.warns(UserWarning, match="every process measures anew"):
        assert measured_layer_times({KEY: LAYER}, torch.bfloat16, tmp_path / "file") == times


def test_a_second_copy_must_pay_and_decoding_must_win_clearly() -> None:
    few, many = {"fbgemm": 10.0, "onednn": 12.0}, {"fbgemm": 130.0, "onednn": 100.0}
    near = LayerTimes(few=few | {"decoded": 11.0}, many=many | {"decoded": 95.0})
    assert pick_int8(near) == CpuProducts("onednn", "onednn")
    assert not decoding_wins({"layer": 3}, {"layer": near})
    far = LayerTimes(few=few | {"decoded": 8.0}, many={"fbgemm": 300.0, "onednn": 100.0})
    assert pick_int8(
        far.model_copy(update={"few": {"fbgemm": 5.0, "onednn": 12.0}})
    ) == CpuProducts("fbgemm", "onednn")
    slow = LayerTimes(few=few | {"decoded": 5.0}, many=many | {"decoded": 50.0})
    assert decoding_wins({"layer": 3}, {"layer": slow})


def test_decoded_layers_change_the_key_of_caches() -> None:
    dtype = torch.bfloat16
    exact = KernelWays({KEY: CpuProducts("fbgemm", "onednn")})
    assert arithmetic_name(CPU, exact) == arithmetic_name(CPU, DETERMINISTIC)
    decoded = choose_kernel_ways([LAYER], dtype, "decoded")
    assert arithmetic_name(CPU, decoded) != arithmetic_name(CPU, DETERMINISTIC)
    assert choose_kernel_ways([LAYER], dtype, "deterministic") == DETERMINISTIC


def test_an_unknown_kernel_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match="onednn"):
        choose_kernel_ways([LAYER], torch.bfloat16, "onednm")
