"""Every runtime layer against a float64 product of the dequantized weight.

Where a scheme rounds activations, the product is that of the rounded activations.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import nn

import gteopt.kernels
from gteopt.config.recipe import Bits, GroupSize, LayerScheme
from gteopt.kernels import KERNELS, choose_kernel, make_linear
from gteopt.kernels.cpu import (
    DenseLinearCpu,
    Int8LinearCpu,
    activation_bits,
)
from gteopt.kernels.cpu_int4 import Int4LinearCpu, int4_runs_here
from gteopt.kernels.reference import (
    DequantLinear,
    Fp8Reference,
    Int8Reference,
    PackedEmbedding,
    take_outliers,
)
from gteopt.quant.affine import PackedWeight, pack, quantize_rtn, quantize_tokens, token_scale
from gteopt.quant.grid import E4M3_MAX, NF4_LEVELS
from gteopt.quant.static_activations import InputGrid

CPU = torch.device("cpu")
W8A8 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
TOKEN_ZEROS = W8A8.model_copy(update={"activation_symmetric": False})
FP8 = W8A8.model_copy(update={"number_format": "e4m3"})
OUTLIERS = W8A8.model_copy(update={"activation_outliers": 6.0})
NF4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
INT4 = LayerScheme(bits=4, group_size=128, symmetric=False)
INT3 = LayerScheme(bits=3, group_size=64, symmetric=False)
STATIC = TOKEN_ZEROS.model_copy(update={"activation_static": True})
TOKENS: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (2, 3), (130,), (259,), (0,), (0, 5))
# Relative Frobenius error; bfloat16 keeps 8 bits, and its scales and offsets are rounded too.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(out_features: int, in_features: int, scheme: LayerScheme) -> PackedWeight:
    return pack(quantize_rtn(seeded(out_features, in_features, seed=out_features) / 8, scheme))


def relative_error(computed: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (computed.double() - exact).norm()
    return float(difference / exact.norm()) if exact.numel() else float(difference)


def exact_product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    product = x.double() @ weight.unpack().dequantize().double().T
    return product if bias is None else product + bias.double()


def rounded_product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> Any:
    """The float64 product of x, rounded as its scheme rounds activations on this machine."""
    scheme, flat = weight.scheme, x.reshape(-1, weight.in_features)
    if scheme.activation_static:
        assert weight.inputs is not None
        rounded = weight.inputs.steps(flat).double()
    elif scheme.number_format == "e4m3" and scheme.activation_bits == 8:
        scale = token_scale(flat.float().abs().amax(-1, keepdim=True) / E4M3_MAX)
        short = (flat.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        rounded = short.double() * scale.double()
    elif scheme.activation_bits == 8:
        rest, outliers, columns = take_outliers(flat, scheme.activation_outliers)
        codes, scale, zero = quantize_tokens(
            rest, symmetric=scheme.activation_symmetric, bits=activation_bits()
        )
        steps = codes.double() if zero is None else codes.double() - zero.double()
        rounded = steps * scale.double()
        rounded[:, columns] += outliers.double()
    else:
        rounded = flat.double()
    return exact_product(rounded, weight, bias).view(*x.shape[:-1], weight.out_features)


def as_here(reference: Int8Reference) -> Int8Reference:
    """Set the bits of activations that this CPU multiplies exactly."""
    reference.bits = activation_bits()
    return reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, "per_channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_16_bit_activations_multiply_as_float64_does(
    bits: Bits, group_size: GroupSize, dtype: torch.dtype
) -> None:
    for symmetric, biased in itertools.product((True, False), repeat=2):
        scheme = LayerScheme(bits=bits, group_size=group_size, symmetric=symmetric)
        for out_features, in_features in ((64, 128), (192, 256), (5, 128)):
            weight = packed(out_features, in_features, scheme)
            bias = seeded(out_features, seed=1).to(dtype) if biased else None
            layer = make_linear(weight, bias, device=CPU, dtype=dtype)
            for shape in TOKENS:
                x = seeded(*shape, in_features, seed=2).to(dtype)
                y = layer(x)
                assert y.dtype == dtype
                assert y.shape == (*shape, out_features)
                assert relative_error(y, exact_product(x, weight, bias)) <= BOUND[dtype]


@pytest.mark.parametrize("scheme", [W8A8, TOKEN_ZEROS, FP8, NF4, INT4], ids=str)
def test_layers_of_a_16_bit_model_take_wide_activations(scheme: LayerScheme) -> None:
    """The runtime computes in float32 where a CPU has no bfloat16; biases stay as they are."""
    weight, bias = packed(64, 128, scheme), seeded(64, seed=1).bfloat16()
    layer = make_linear(weight, bias, device=CPU, dtype=torch.bfloat16)
    for n_tokens in (3, 200):
        x = seeded(n_tokens, 128, seed=2)
        assert layer(x).dtype == torch.float32
        assert relative_error(layer(x), exact_product(x, weight, bias)) <= 0.05


def test_a_row_group_of_odd_width_multiplies_as_float64_does() -> None:
    for bits in (2, 3, 4, 8):
        weight = packed(7, 37, LayerScheme(bits=bits, group_size="per_channel", symmetric=False))
        x = seeded(3, 37)
        layer = make_linear(weight, None, device=CPU, dtype=torch.float32)
        assert relative_error(layer(x), exact_product(x, weight, None)) <= BOUND[torch.float32]


@pytest.mark.parametrize(
    "scheme", [W8A8, TOKEN_ZEROS, OUTLIERS], ids=["symmetric", "zero points", "outliers"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_integer_product_equals_its_float_reference(
    dtype: torch.dtype, scheme: LayerScheme
) -> None:
    for (out_features, in_features), biased in itertools.product(
        ((64, 128), (33, 37), (1, 8), (384, 1536)), (True, False)
    ):
        weight = packed(out_features, in_features, scheme)
        bias = seeded(out_features, seed=1).to(dtype) if biased else None
        fast, reference = Int8LinearCpu(weight, bias), as_here(Int8Reference(weight, bias))
        for shape in TOKENS:
            x = (seeded(*shape, in_features, seed=3) * 5 + 3).to(dtype)
            y = fast(x)
            assert y.dtype == dtype
            assert y.shape == (*shape, out_features)
            # Sums are exact in int32; only the order of float32 roundings differs.
            bound = 2e-6 if dtype == torch.float32 else 4e-3
            assert relative_error(y, reference(x).double()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "scheme", [W8A8, TOKEN_ZEROS, OUTLIERS, STATIC, FP8, NF4, INT4, INT3], ids=str
)
def test_every_scheme_multiplies_as_float64_does_on_random_shapes(
    scheme: LayerScheme, dtype: torch.dtype
) -> None:
    """Both the layer that is chosen for the scheme and the portable one."""
    source = random.Random(0)
    width = scheme.group_size if isinstance(scheme.group_size, int) else 1
    for _ in range(6):
        out_features = source.choice([source.randint(1, 200), 64 * source.randint(1, 3)])
        in_features = width * source.randint(1, 1 + 300 // width)
        weight = packed(out_features, in_features, scheme)
        if scheme.activation_static:
            scale = seeded(in_features, seed=5).abs() / 8 + 0.02
            zero = seeded(in_features, seed=6).mul(9).add(128).round().clamp(0, 255)
            weight = dataclasses.replace(weight, inputs=InputGrid(scale, zero))
        bias = source.choice([None, seeded(out_features, seed=1).to(dtype)])
        x = (seeded(source.randint(1, 140), in_features, seed=2) * 3 + 1).to(dtype)
        exact = rounded_product(x, weight, bias)
        layers = [make_linear(weight, bias, device=CPU, dtype=dtype)]
        if isinstance(portable := KERNELS[gteopt.kernels.product_of(scheme), "any"], type):
            layers.append(portable(weight, bias))
        for layer in layers:
            if isinstance(layer, Int8Reference):
                as_here(layer)
            if scheme.activation_static and activation_bits() < 8:
                continue  # test_static_activations.py checks 7 bits
            assert relative_error(layer(x), exact) <= BOUND[dtype]


@pytest.mark.parametrize("scheme", [W8A8, TOKEN_ZEROS, OUTLIERS, STATIC, FP8, NF4, INT4], ids=str)
def test_torch_compile_changes_no_bit(scheme: LayerScheme) -> None:
    """A layer compiles as a whole unless a library holds its weights in a private layout."""
    weight = packed(64, 256, scheme)
    if scheme.activation_static:
        grid = InputGrid(torch.full((256,), 0.05), torch.full((256,), 128.0))
        weight = dataclasses.replace(weight, inputs=grid)
    layer = make_linear(weight, seeded(64, seed=1), device=CPU, dtype=torch.bfloat16)
    whole = not hasattr(layer, "packed_bytes")
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, fullgraph=whole, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for n_tokens in (5, 33, 130):  # the last decodes 4-bit weights
            x = seeded(n_tokens, 256, seed=2).bfloat16()
            assert torch.equal(compiled(x), layer(x))


def test_torch_compile_takes_dense_layers_and_packed_tables_whole() -> None:
    torch.compiler.reset()
    for dtype in (torch.float32, torch.bfloat16):
        table = PackedEmbedding(packed(50, 256, W8A8), dtype)
        dense = DenseLinearCpu(nn.Linear(256, 64).to(dtype))
        for layer, x in ((table, torch.tensor([3, 49, 3])), (dense, seeded(7, 256).to(dtype))):
            compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
            with torch.inference_mode():
                assert torch.equal(compiled(x), layer(x))


def test_a_table_in_8_bits_looks_up_what_float64_does() -> None:
    weight = packed(50, 33, W8A8)
    ids = torch.tensor([[3, 49], [0, 3]])
    exact = weight.unpack().dequantize().double()[ids]
    for dtype in (torch.float32, torch.bfloat16):
        rows = PackedEmbedding(weight, dtype)(ids)
        assert rows.dtype == dtype
        assert relative_error(rows, exact) <= BOUND[dtype]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
def test_a_gpu_gets_what_its_capability_multiplies(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test needs no GPU: it sets the capability that a GPU would report."""
    pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")
    cuda = importlib.import_module("gteopt.kernels.cuda")
    has_cores = capability >= (8, 0)
    monkeypatch.setattr(gteopt.kernels, "gpu_kernels", lambda device: cuda if has_cores else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device, kind = torch.device("cuda"), torch.bfloat16
    wanted = {
        W8A8: cuda.Int8LinearCuda if has_cores else Int8Reference,
        TOKEN_ZEROS: cuda.Int8LinearCuda if has_cores else Int8Reference,
        OUTLIERS: Int8Reference,
        STATIC: Int8Reference,
        FP8: cuda.Fp8LinearCuda if capability >= (8, 9) else Fp8Reference,
        NF4: cuda.Int4LinearCuda if has_cores else DequantLinear,
        INT4: cuda.Int4LinearCuda if has_cores else DequantLinear,
        INT3: DequantLinear,
    }
    for scheme, kernel in wanted.items():
        assert choose_kernel(packed(64, 256, scheme), device, kind) is kernel
    assert choose_kernel(packed(64, 256, FP8), device, torch.float32) is Fp8Reference
    assert (
        choose_kernel(packed(20, 256, FP8), device, kind) is Fp8Reference
    )  # 20 is no multiple of 16


def test_the_integer_product_is_close_to_the_unquantized_one() -> None:
    dense = seeded(256, 384) / 16
    weight = pack(quantize_rtn(dense, W8A8))
    x = seeded(50, 384, seed=1)
    y = make_linear(weight, None, device=CPU, dtype=torch.float32)(x)
    # Rounding noise of two int8 operands with ranges of about 3 sigma: near 1 percent.
    assert relative_error(y, x.double() @ dense.double().T) <= 0.02


def test_the_largest_codes_are_summed_exactly() -> None:
    """x86 without VNNI saturates at 16 bits, so activations have fewer bits there."""
    extreme = PackedWeight(
        qweight=torch.full((64, 512), 255, dtype=torch.uint8),  # code 127
        scale=torch.ones(64, 1, dtype=torch.float16),
        qzero=None,
        scheme=TOKEN_ZEROS,
        in_features=512,
    )
    most = (1 << activation_bits()) - 1
    for n_tokens in (1, 3, 64, 300):
        x = torch.full((n_tokens, 512), float(most))
        x[:, 0] = 0
        y = Int8LinearCpu(extreme, None)(x)
        assert torch.equal(y, torch.full_like(y, 127.0 * most * 511))


def test_layers_of_one_input_may_share_its_codes() -> None:
    x = seeded(9, 128)
    layers = [Int8LinearCpu(packed(o, 128, TOKEN_ZEROS), None) for o in (64, 33)]
    codes = layers[0].quantize(x)
    for layer in layers:
        assert torch.equal(layer.multiply(codes, x.dtype), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_layers_multiply_as_float64_does_and_pass_gradients(dtype: torch.dtype) -> None:
    for biased, (out_features, in_features) in itertools.product(
        (True, False), ((64, 128), (300, 37), (16, 8))
    ):
        linear = nn.Linear(in_features, out_features, bias=biased).to(dtype)
        layer = DenseLinearCpu(linear)
        assert [p.data_ptr() for p in layer.parameters()] == [
            p.data_ptr() for p in linear.parameters()
        ]
        bias = linear.bias.detach().double() if biased else 0
        for shape, inputs in itertools.product(TOKENS, {dtype, torch.float32}):
            x = seeded(*shape, in_features, seed=2).to(inputs)
            with torch.inference_mode():
                if inputs == dtype or layer.kernel != "torch.linear":
                    y = layer(x)
                    exact = x.double() @ linear.weight.double().T + bias
                    assert (y.dtype, y.shape) == (inputs, (*shape, out_features))
                    assert relative_error(y, exact) <= BOUND[dtype]
        x = seeded(3, in_features).to(dtype).requires_grad_()
        layer(x).float().sum().backward()
        assert x.grad is not None
        exact = linear.weight.detach().double().sum(0).expand(3, -1)
        assert relative_error(x.grad, exact) <= 2e-2


def test_tokens_are_rounded_by_their_own_range_only() -> None:
    x = seeded(4, 64)
    x[1] *= 1e4
    x[2] = 0
    codes, scale, _ = quantize_tokens(x, symmetric=True)
    assert torch.equal(codes.abs().amax(1), torch.tensor([127, 127, 0, 127], dtype=torch.int8))
    assert ((codes * scale - x).abs() <= scale * 0.5001).all()
    alone, *_ = quantize_tokens(x[3:], symmetric=True)
    assert torch.equal(codes[3:], alone)
    layer = make_linear(packed(16, 64, W8A8), None, device=CPU, dtype=torch.float32)
    assert (layer(x)[2] == 0).all()
    assert torch.equal(layer(x)[3], layer(x[3]))


def test_zero_points_give_a_one_sided_token_all_256_codes() -> None:
    x = seeded(6, 64).abs() + 0.1  # one-sided, as behind GELU
    x[1] = -x[1]
    x[2] = 0
    x[3, :32] = 0
    x[4] = 5  # one value: its range still reaches to zero
    codes, scale, zero = quantize_tokens(x, symmetric=False)
    assert zero is not None
    assert torch.equal(zero, zero.round())
    assert ((zero >= -128) & (zero <= 127)).all()
    restored = (codes.double() - zero.double()) * scale.double()
    assert ((restored - x).abs() <= 0.5001 * scale).all()
    assert (restored[x == 0] == 0).all()
    _, symmetric, _ = quantize_tokens(x, symmetric=True)
    one_sided = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(scale[one_sided] * 255, symmetric[one_sided] * 127)


def test_outliers_are_multiplied_as_they_are() -> None:
    """LLM.int8(): the integer product of small activations plus the float product of outliers."""
    weight = packed(96, 64, OUTLIERS)
    x = seeded(20, 64)
    x[:, 7] *= 40
    x[3, 9] = -100
    x[5] = 0
    large = x.abs() >= 6
    dense = weight.unpack().dequantize().double()
    plain = as_here(Int8Reference(pack(weight.unpack()), None))
    plain.scheme = W8A8
    exact = plain(x.masked_fill(large, 0)).double() + (x * large).double() @ dense.T
    for layer in (Int8LinearCpu(weight, None), as_here(Int8Reference(weight, None))):
        assert relative_error(layer(x), exact) <= 2e-6
        torch.testing.assert_close(layer(x)[:4], layer(x[:4]), rtol=1e-5, atol=1e-5)
    whole = exact_product(x, weight, None)
    assert relative_error(Int8LinearCpu(weight, None)(x), whole) < 0.3 * relative_error(
        plain(x), whole
    )


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_multiplies_as_float64_does(dtype: torch.dtype, group_size: GroupSize) -> None:
    weight = packed(96, 256, NF4.model_copy(update={"group_size": group_size}))
    numbers = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    codes = weight.unpack().codes.view(96, -1, int(group_size))
    dense = (numbers[codes.int()] * weight.scale.double()[..., None]).flatten(1)
    x = seeded(40, 256).to(dtype)
    layer = make_linear(weight, None, device=CPU, dtype=dtype)
    assert layer.kernel == "reference.dequant"
    assert relative_error(layer(x), x.double() @ dense.T) <= BOUND[dtype]


def e4m3(code: int) -> float:
    """The number of a byte by Micikevicius et al. 2022, table 1; NaN for 0x7f and 0xff."""
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return math.nan if code & 127 == 127 else sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_the_8_bit_float_product_is_its_definition_in_float64() -> None:
    """The oracle decodes bytes bit by bit and rounds inputs to the nearest, ties to even."""
    floats = torch.tensor([e4m3(code) for code in range(127)], dtype=torch.float64)
    weight = packed(96, 64, FP8)
    table = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
    dense = table[weight.qweight.int()] * weight.scale.double()
    torch.testing.assert_close(weight.unpack().dequantize().double(), dense, rtol=1e-6, atol=0)
    x = seeded(40, 64, seed=2) * 10 ** seeded(40, 64, seed=3)
    x[3] = 0
    step = x.abs().amax(1, keepdim=True) / 448
    step[3] = 1
    distance = (floats - (x / step).abs().double()[..., None]).abs()
    even = torch.arange(127).remainder(2) * 1e-12  # the even one of two equally near
    rounded = floats[(distance + even).argmin(-1)] * x.sign()
    bias = seeded(96, seed=1)
    exact = (rounded * step.double()) @ dense.T + bias.double()
    layer = make_linear(weight, bias, device=CPU, dtype=torch.float32)
    assert isinstance(layer, Fp8Reference)
    assert relative_error(layer(x), exact) <= 2e-6
    assert layer(x[:0]).shape == (0, 96)
    assert relative_error(layer(x.bfloat16()), exact_product(x, weight, bias)) < 0.05


@pytest.mark.parametrize("scheme", [W8A8, FP8, NF4, INT4, INT3], ids=str)
def test_a_weight_that_is_decoded_in_parts_is_the_same_weight(
    scheme: LayerScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = packed(192, 256, scheme)
    makers: list[Any] = [DequantLinear]
    if int4_runs_here(weight):
        makers.append(Int4LinearCpu)
    for make, dtype in itertools.product(makers, (torch.float32, torch.bfloat16)):
        found = []
        for most in (1 << 18, 192 * 128, 5 * 256):
            monkeypatch.setattr("gteopt.kernels.reference.DECODED_AT_ONCE", most)
            monkeypatch.setattr("gteopt.kernels.cpu_int4.DECODED_AT_ONCE", most)
            layer = make(weight, None)
            decode = layer._dequantized if make is Int4LinearCpu else layer.dequantized
            found.append(decode(dtype))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_few_and_many_tokens_agree_in_4_bits() -> None:
    weight = packed(192, 256, INT4)
    if not int4_runs_here(weight):
        pytest.skip("torch's 4-bit layout on this CPU is neither that of AVX-512 nor of AVX2")
    layer = Int4LinearCpu(weight, seeded(192).bfloat16())
    for dtype in (torch.bfloat16, torch.float32):
        x = seeded(200, 256, seed=1).to(dtype)
        assert relative_error(layer(x)[:9], layer(x[:9]).double()) <= BOUND[torch.bfloat16]


def test_what_the_4_bit_kernel_cannot_hold_falls_back_to_dequantizing() -> None:
    for out_features, scheme, dtype in (
        (33, INT4, torch.bfloat16),
        (64, INT4, torch.float32),
        (64, LayerScheme(bits=3, group_size=128, symmetric=False), torch.bfloat16),
    ):
        layer = make_linear(packed(out_features, 128, scheme), None, device=CPU, dtype=dtype)
        assert layer.kernel == "reference.dequant"


def test_each_layer_names_its_kernel_and_its_size() -> None:
    layers: list[nn.Module] = [
        make_linear(packed(64, 128, W8A8), None, device=CPU, dtype=torch.float32),
        DequantLinear(packed(64, 128, INT4), None),
        Int8Reference(packed(64, 128, W8A8), None),
    ]
    kernels = [str(layer.kernel).split()[0] for layer in layers]
    assert kernels == ["cpu.int8", "reference.dequant", "reference.int8"]
    assert [layer.in_features for layer in layers] == [128] * 3
    assert [layer.out_features for layer in layers] == [64] * 3


@pytest.mark.parametrize("scheme", [W8A8, TOKEN_ZEROS, OUTLIERS, FP8, NF4, INT4, INT3], ids=str)
def test_a_kernel_is_named_before_there_is_a_layer(scheme: LayerScheme) -> None:
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), ((64, 256), (33, 128))):
        named = gteopt.kernels.kernel_name(scheme, *shape, device=CPU, dtype=dtype)
        layer = make_linear(packed(*shape, scheme), None, device=CPU, dtype=dtype)
        few = getattr(layer, "few_tokens", None)
        more = "" if few is None else f" (to {few} tokens from the codes, decoded beyond)"
        assert named == f"{layer.kernel}{more}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", [W8A8, TOKEN_ZEROS, FP8, NF4, INT4], ids=str)
def test_memory_is_packed(scheme: LayerScheme, dtype: torch.dtype) -> None:
    layer = make_linear(packed(384, 384, scheme), None, device=CPU, dtype=dtype)
    n_bytes = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    n_bytes += int(getattr(layer, "packed_bytes", 0))
    assert not list(layer.parameters())
    assert scheme.bits <= n_bytes * 8 / 384**2 <= scheme.bits + 0.3
