"""Measured times choose the int8 product of a layer; the choice never changes a bit."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gteopt.kernels.measured
from gteopt.config.recipe import LayerScheme
from gteopt.errors import InputError
from gteopt.kernels import arithmetic, kernel_name, make_linear
from gteopt.kernels.cpu import INT8_PRODUCTS, Products, exact_products
from gteopt.kernels.measured import (
    DETERMINISTIC,
    KernelTimes,
    Layer,
    LayerTimes,
    Ways,
    decoding_wins,
    kept_times,
    pick,
    ways_for,
)
from gteopt.machine import machine
from gteopt.quant.affine import pack, quantize_rtn
from gteopt.records.files import read_record

CPU = torch.device("cpu")
W8A8 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
ZEROS = W8A8.model_copy(update={"activation_symmetric": False})
NF4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
LAYER = Layer(W8A8, 64, 128)
KEY = LAYER.key(torch.bfloat16)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ways_of(scheme: LayerScheme, products: Products | None, dtype: torch.dtype) -> Ways:
    return Ways({Layer(scheme, 64, 128).key(dtype): products}, decodes=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [W8A8, ZEROS], ids=["symmetric", "zero points"])
def test_every_exact_product_gives_the_same_bits(scheme: LayerScheme, dtype: torch.dtype) -> None:
    weight, bias = pack(quantize_rtn(seeded(64, 128), scheme)), seeded(64, seed=1)
    first = make_linear(weight, bias, device=CPU, dtype=dtype)
    names = exact_products()
    assert names, "this build of torch has an int8 product"
    for few, many in itertools.product(names, repeat=2):
        ways = ways_of(scheme, Products(few, many), dtype)
        layer = make_linear(weight, bias, device=CPU, dtype=dtype, ways=ways)
        for n_tokens in (1, 16, 97, 200):
            x = seeded(n_tokens, 128, seed=2).to(dtype)
            assert torch.equal(layer(x), first(x)), (few, many, n_tokens)


@pytest.mark.parametrize("scheme", [W8A8, NF4], ids=["int8", "nf4"])
def test_a_decoded_weight_multiplies_as_float64_does(scheme: LayerScheme) -> None:
    dtype, bound = torch.float32, 1e-6
    weight, bias = pack(quantize_rtn(seeded(64, 128), scheme)), seeded(64, seed=1)
    layer = make_linear(weight, bias, device=CPU, dtype=dtype, ways=ways_of(scheme, None, dtype))
    x = seeded(40, 128, seed=2)
    exact = x.double() @ weight.unpack().dequantize().double().T + bias.double()
    assert (layer(x).double() - exact).norm() <= bound * exact.norm()
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
    times = kept_times({KEY: LAYER}, torch.bfloat16, tmp_path)[KEY]
    assert times.few["slow"] > 10_000 > times.few["fbgemm"]
    assert "slow" not in str(pick(times))


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
    first = ways_for([LAYER], torch.bfloat16, "measured", folder=tmp_path)
    (file,) = tmp_path.glob("*.json")
    measured: list[Layer] = []
    really = gteopt.kernels.measured._measure

    def counted(layer: Layer, dtype: torch.dtype) -> LayerTimes:
        measured.append(layer)
        return really(layer, dtype)

    monkeypatch.setattr(gteopt.kernels.measured, "_measure", counted)
    assert ways_for([LAYER], torch.bfloat16, "measured", folder=tmp_path) == first
    assert measured == []
    here = machine()
    other = here.model_copy(update={"cpu": "another processor"})
    monkeypatch.setattr("gteopt.kernels.measured.machine", lambda: other)
    ways_for([LAYER], torch.bfloat16, "measured", folder=tmp_path)
    assert measured == [LAYER]
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert read_record(file, KernelTimes).processor == here.cpu


@pytest.mark.parametrize("damage", ["cut short", "of another processor"])
def test_a_file_that_is_not_ours_is_ignored_with_a_reason(tmp_path: Path, damage: str) -> None:
    kept_times({KEY: LAYER}, torch.bfloat16, tmp_path)
    (file,) = tmp_path.glob("*.json")
    content = file.read_text()
    if damage == "cut short":
        file.write_text(content[: len(content) // 2])
    else:
        cpu = machine().cpu
        file.write_text(content.replace(cpu, "another processor"))
    with pytest.warns(UserWarning, match="kernels are measured anew"):
        times = kept_times({KEY: LAYER}, torch.bfloat16, tmp_path)
    assert times.keys() == {KEY}
    assert read_record(file, KernelTimes).layers == times


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="every load measures anew"):
        times = kept_times({KEY: LAYER}, torch.bfloat16, tmp_path / "file")
    assert times.keys() == {KEY}


def test_a_second_copy_must_pay_and_decoding_must_win_clearly() -> None:
    few, many = {"fbgemm": 10.0, "onednn": 12.0}, {"fbgemm": 130.0, "onednn": 100.0}
    near = LayerTimes(few=few | {"decoded": 11.0}, many=many | {"decoded": 95.0})
    assert pick(near) == Products("onednn", "onednn")
    assert not decoding_wins({"layer": 3}, {"layer": near})
    far = LayerTimes(few=few | {"decoded": 8.0}, many={"fbgemm": 300.0, "onednn": 100.0})
    assert pick(far.model_copy(update={"few": {"fbgemm": 5.0, "onednn": 12.0}})) == Products(
        "fbgemm", "onednn"
    )
    slow = LayerTimes(few=few | {"decoded": 5.0}, many=many | {"decoded": 50.0})
    assert decoding_wins({"layer": 3}, {"layer": slow})


def test_decoded_layers_change_the_key_of_caches() -> None:
    dtype = torch.bfloat16
    exact = Ways({KEY: Products("fbgemm", "onednn")})
    assert arithmetic(CPU, exact) == arithmetic(CPU, DETERMINISTIC)
    decoded = ways_for([LAYER], dtype, "decoded")
    assert arithmetic(CPU, decoded) != arithmetic(CPU, DETERMINISTIC)
    assert ways_for([LAYER], dtype, "deterministic") == DETERMINISTIC


def test_an_unknown_kernel_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match="onednn"):
        ways_for([LAYER], torch.bfloat16, "onednm")
