"""The GPU kernels against float64 and the portable layers; without a GPU, Triton interprets them.

The interpreter has two faults. It multiplies bfloat16 operands as bit patterns, so products of
decoded 4-bit weights are checked in float32. Its conversions to 8-bit floats truncate or drop
carries, so their error is checked. `benchmarks/gpu_layers.py` checks both on a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gteopt.config.recipe import LayerScheme
from gteopt.kernels.reference import Fp8Reference, Int8Reference
from gteopt.quant import affine, grid
from gteopt.quant.affine import PackedWeight, pack, quantize_rtn

W8A8 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
TOKEN_ZEROS = W8A8.model_copy(update={"activation_symmetric": False})
FP8 = W8A8.model_copy(update={"number_format": "e4m3"})
INT4 = LayerScheme(bits=4, group_size=64, symmetric=False)
SYMMETRIC = LayerScheme(bits=4, group_size=128, symmetric=True)
ROW = LayerScheme(bits=4, group_size="per_channel", symmetric=False)
NF4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")
    return importlib.import_module("gteopt.kernels.cuda")


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def packed(out_features: int, in_features: int, scheme: LayerScheme) -> PackedWeight:
    return pack(quantize_rtn(seeded(out_features, in_features, seed=out_features) / 8, scheme))


def relative_error(computed: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (computed.double() - exact.double()).norm()
    return float(difference / exact.double().norm()) if exact.numel() else float(difference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_get_exactly_the_codes_of_the_portable_rounding(
    cuda: ModuleType, symmetric: bool, dtype: torch.dtype
) -> None:
    for width in (16, 200, 5000):
        x = (seeded(9, width) * 3 + 1).to(dtype)
        x[1] *= 1e4
        x[2] = 0
        x[3] = x[3].abs()
        codes, scale, zero = cuda.quantize_tokens_cuda(x, symmetric=symmetric)
        wanted_codes, wanted_scale, wanted_zero = affine.quantize_tokens(x, symmetric=symmetric)
        assert torch.equal(codes, wanted_codes)
        assert torch.equal(scale, wanted_scale)
        if wanted_zero is None:
            assert zero is None
        else:
            assert torch.equal(zero.float(), wanted_zero[:, 0])


@pytest.mark.parametrize("rounding", ["symmetric", "zero points", "fp8"])
def test_a_nan_in_a_token_stays_a_nan_and_leaves_other_tokens_alone(
    cuda: ModuleType, rounding: str
) -> None:
    """A broken activation must not become a finite wrong vector."""
    x = seeded(4, 5000)
    whole = x.clone()
    x[1, 4321] = torch.nan
    x[2] = torch.nan
    if rounding == "fp8":
        rounded, before = cuda.round_tokens(x), cuda.round_tokens(whole)
    else:
        is_symmetric = rounding == "symmetric"
        rounded = cuda.quantize_tokens_cuda(x, symmetric=is_symmetric)
        before = cuda.quantize_tokens_cuda(whole, symmetric=is_symmetric)
    assert rounded[1].flatten().isnan().tolist() == [False, True, True, False]
    for part, wanted in zip(rounded, before, strict=True):
        if part is not None:
            for token in (0, 3):
                assert torch.equal(part[token].float(), wanted[token].float())


@pytest.mark.parametrize("scheme", [W8A8, TOKEN_ZEROS], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_int8_product_equals_the_float_reference(
    cuda: ModuleType, dtype: torch.dtype, scheme: LayerScheme
) -> None:
    for (out_features, in_features), biased in (((70, 200), True), ((33, 37), False)):
        weight = packed(out_features, in_features, scheme)
        bias = seeded(out_features, seed=1) if biased else None
        layer, reference = cuda.Int8LinearCuda(weight, bias), Int8Reference(weight, bias)
        for shape in ((1,), (2, 3), (0,), (70,)):
            x = (seeded(*shape, in_features, seed=3) * 5 + 3).to(dtype)
            y = layer(x)
            assert y.dtype == dtype
            assert y.shape == (*shape, out_features)
            bound = 2e-6 if dtype == torch.float32 else 6e-3
            assert relative_error(y, reference(x)) <= bound


@pytest.mark.parametrize("scheme", [W8A8, TOKEN_ZEROS, INT4, NF4], ids=str)
def test_random_shapes_multiply_as_float64_does(cuda: ModuleType, scheme: LayerScheme) -> None:
    source = random.Random(0)
    width = scheme.group_size if isinstance(scheme.group_size, int) else 1
    make = cuda.Int8LinearCuda if scheme.bits == 8 else cuda.Int4LinearCuda
    for _ in range(4):
        out_features = source.randint(1, 200)
        in_features = width * source.randint(1, 1 + 300 // width)
        weight = packed(out_features, in_features, scheme)
        bias = source.choice([None, seeded(out_features, seed=1)])
        x = seeded(source.randint(1, 80), in_features, seed=2) * 3 + 1
        rounded = x.double()
        if scheme.activation_bits == 8:
            symmetric = scheme.activation_symmetric
            codes, scale, zero = affine.quantize_tokens(x, symmetric=symmetric)
            rounded = (codes.double() - (0 if zero is None else zero.double())) * scale.double()
        exact = rounded @ weight.unpack().dequantize().double().T
        exact = exact if bias is None else exact + bias.double()
        assert relative_error(make(weight, bias)(x), exact) <= 2e-6


def test_every_tile_of_the_int8_product_gives_the_same_bits(cuda: ModuleType) -> None:
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
    for scheme in (W8A8, TOKEN_ZEROS):
        weight = packed(70, 272, scheme)
        layer = cuda.Int8LinearCuda(weight, seeded(70, seed=1))
        for n_tokens in (3, 150):
            codes = layer.quantize(seeded(n_tokens, 272, seed=2) + 1)
            operands = (layer.weight, layer.scale, layer.row_sum, layer.bias, torch.float32)
            first = cuda.int8_product(*codes, *operands, cuda.int8_tile(n_tokens))
            for tile in cuda.LARGE_TILES:
                if not tile.copies or capability >= (9, 0):
                    assert torch.equal(cuda.int8_product(*codes, *operands, tile), first)


@pytest.mark.parametrize("n_tokens", [0, 1, 20, 100])
@pytest.mark.parametrize("scheme", [INT4, SYMMETRIC, ROW, NF4], ids=["g64", "g128", "row", "nf4"])
def test_4_bit_weights_multiply_as_float64_does(
    cuda: ModuleType, scheme: LayerScheme, n_tokens: int
) -> None:
    for out_features, in_features in ((70, 256), (8, 1024)):
        weight = packed(out_features, in_features, scheme)
        assert cuda.Int4LinearCuda.fits(weight, torch.float32)
        bias = seeded(out_features, seed=1)
        x = seeded(n_tokens, in_features, seed=2)
        exact = x.double() @ weight.unpack().dequantize().double().T + bias.double()
        y = cuda.Int4LinearCuda(weight, bias)(x)
        assert y.shape == exact.shape
        assert relative_error(y, exact) <= 2e-6


@pytest.mark.parametrize("scheme", [INT4, SYMMETRIC, ROW, NF4], ids=["g64", "g128", "row", "nf4"])
def test_a_decoded_layer_is_exactly_the_dequantized_one(
    cuda: ModuleType, scheme: LayerScheme
) -> None:
    weight = packed(70, 256, scheme)
    decoded = cuda.Int4LinearCuda(weight, None).decoded(torch.float32)
    assert torch.equal(decoded, weight.unpack().dequantize())


def test_weights_whose_groups_no_step_fits_are_left_to_the_portable_layer(
    cuda: ModuleType,
) -> None:
    kind, four, eight = torch.bfloat16, cuda.Int4LinearCuda, cuda.Fp8LinearCuda
    assert not four.fits(packed(8, 96, ROW), kind)  # a row of 96: its step is no power of two
    assert not four.fits(packed(8, 128, W8A8), kind)
    assert not eight.fits(packed(8, 128, FP8), kind)
    assert eight.fits(packed(48, 128, FP8), kind)
    assert not eight.fits(packed(48, 128, FP8), torch.float32)


def skip_without_row_scales() -> None:
    """Torch 2.11 has a product with a scale for each row on GPUs only."""
    ones = torch.ones(16, 16).to(DEVICE, torch.float8_e4m3fn)
    scale = torch.ones(16, 1, device=DEVICE)
    try:
        torch._scaled_mm(
            *(ones, ones.t()), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16
        )
    except RuntimeError:
        if DEVICE == "cuda":
            raise
        pytest.skip("this build of torch scales 8-bit floats on a CPU by one number only")


def test_8_bit_float_products_err_no_more_than_their_rounding(cuda: ModuleType) -> None:
    skip_without_row_scales()
    weight = packed(64, 256, FP8)
    bias = seeded(64, seed=1).bfloat16()
    x = seeded(33, 256, seed=2).bfloat16()
    floats, scale = cuda.round_tokens(x)
    most = torch.full_like(scale, grid.E4M3_MAX)  # a GPU divides by a tensor exactly
    assert torch.equal(scale, x.float().abs().amax(1, keepdim=True) / most)
    # Three bits of fraction: at most 1/16 of a value, twice that where the carry is dropped.
    assert float(((floats.float() * scale - x.float()).abs() / x.float().abs()).median()) <= 1 / 16
    layer, reference = cuda.Fp8LinearCuda(weight, bias), Fp8Reference(weight, bias)
    exact = x.double() @ weight.unpack().dequantize().double().T + bias.double()
    assert relative_error(reference(x), exact) <= 0.03
    assert relative_error(layer(x), exact) <= 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_and_rotary_embedding_round_float64_once(cuda: ModuleType, dtype: torch.dtype) -> None:
    bound = 6e-7 if dtype == torch.float32 else 4e-3
    for shape in ((7, 200), (1, 1024), (0, 64)):
        gate, up = (seeded(*shape, seed=i).mul(3).to(dtype) for i in (1, 2))
        exact = torch.nn.functional.silu(gate.double()) * up.double()
        assert relative_error(cuda.gate_(gate, up), exact) <= bound
    for n_tokens, n_heads, width in ((5, 3, 64), (1, 2, 128), (0, 2, 16)):
        x = seeded(n_tokens, n_heads, width, seed=3).to(dtype)
        angles = seeded(n_tokens, 1, width // 2, seed=4).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        a, b = x.double().chunk(2, dim=-1)
        exact = x.double() * cos.double() + torch.cat([-b, a], -1) * sin.double()
        assert relative_error(cuda.rotate_(x, cos, sin), exact) <= bound


@pytest.mark.parametrize("n_inputs", [37, 5000])
def test_what_comes_before_a_rounding_is_computed_in_float32(
    cuda: ModuleType, n_inputs: int
) -> None:
    x, up = (seeded(6, n_inputs, seed=i).mul(3).bfloat16() for i in (1, 2))
    weight = seeded(n_inputs, seed=3).add(1).bfloat16()
    wide = x.float()
    mean = wide.pow(2).mean(1, keepdim=True)
    for before, exact in (
        (cuda.FusedStep(up=up), torch.nn.functional.silu(wide) * up.float()),
        (cuda.FusedStep(norm=weight, epsilon=1e-3), wide * (mean + 1e-3).rsqrt() * weight.float()),
    ):
        for symmetric in (True, False):
            codes, scale, zero = cuda.quantize_tokens_cuda(x, symmetric=symmetric, before=before)
            steps = codes.float() if zero is None else codes.float() - zero[:, None]
            # Half a step plus float32 rounding: a value next to a tie may get either code.
            assert float(((steps * scale - exact).abs() / scale).max()) <= 0.502
            assert (
                float(
                    (scale / affine.quantize_tokens(exact, symmetric=symmetric)[1] - 1).abs().max()
                )
                <= 2e-6
            )
        floats, scale = cuda.round_tokens(x, before=before)
        assert torch.allclose(scale[:, 0], exact.abs().amax(1) / grid.E4M3_MAX, rtol=2e-6)
        # Three bits of fraction: at most 1/16 of a value, twice that where the carry is dropped.
        large = exact.abs() > scale
        wrong = (floats.float() * scale - exact).abs() / exact.abs()
        assert float(wrong[large].median()) <= 1 / 16


def test_what_operators_say_of_their_results_is_what_they_return(cuda: ModuleType) -> None:
    """Schema, aliasing, and shapes without data, on odd numbers of tokens and features."""
    ops = torch.ops.gteopt
    x, bias = seeded(5, 256), seeded(70, seed=1)
    eight, four, nf4 = (packed(70, 256, scheme) for scheme in (TOKEN_ZEROS, INT4, NF4))
    layer = cuda.Int8LinearCuda(eight, bias)
    codes, scale, zero = ops.quantize_tokens(x, False, None, None, 0.0)
    int8 = (codes, scale, zero, layer.weight, layer.scale, layer.row_sum, layer.bias)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.quantize_tokens, (x, True, None, None, 0.0)),
        (ops.quantize_tokens, (x, False, x + 1, None, 0.0)),
        (ops.round_tokens, (x, None, x[0] + 1, 1e-6)),
        (ops.int8_product, (*int8, torch.float32, [32, 64, 256, 4, 4])),
        (ops.int8_product, (*int8, torch.float32, [])),
        (ops.gate_, (seeded(3, 50), seeded(3, 50, seed=1))),
        (ops.rotate_, (seeded(3, 2, 16), seeded(3, 1, 16), seeded(3, 1, 16))),
    ]
    for weight in (four, nf4):
        int4_layer = cuda.Int4LinearCuda(weight, bias)
        operands = (int4_layer.qweight, int4_layer.scale, int4_layer.zero, int4_layer.levels)
        calls.append(
            (ops.int4_product, (x, *operands, bias, int4_layer.middle, [16, 32, 128, 4, 4]))
        )
        calls.append((ops.decode_int4, (*operands, int4_layer.middle, torch.float32)))
    for operator, arguments in calls:
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    "scheme", [W8A8, TOKEN_ZEROS, INT4, NF4, FP8], ids=["int8", "zero points", "int4", "nf4", "fp8"]
)
def test_torch_compile_takes_a_layer_whole(cuda: ModuleType, scheme: LayerScheme) -> None:
    weight, dtype = packed(64, 256, scheme), torch.float32
    if scheme is FP8:
        skip_without_row_scales()
        layer, dtype = cuda.Fp8LinearCuda(weight, seeded(64, seed=1)), torch.bfloat16
    else:
        make = cuda.Int8LinearCuda if scheme.bits == 8 else cuda.Int4LinearCuda
        layer = make(weight, seeded(64, seed=1))
    compiled: Any = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_tokens in (5, 33, 70):  # the last decodes 4-bit weights
        x = seeded(n_tokens, 256, seed=2).to(dtype)
        assert torch.equal(compiled(x), layer(x))


def test_the_benchmark_of_layers_runs_to_its_end_and_writes_what_it_found(tmp_path: Path) -> None:
    """Triton interprets the kernels, and nothing is timed."""
    pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")
    root, out = Path(__file__).resolve().parent.parent.parent, tmp_path / "layers.json"
    script = str(root / "benchmarks" / "gpu_layers.py")
    options = ["--device", "cpu", "--shapes", "80x256", "--tokens", "1", "70", "--tiles"]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, script, *options, "--out", str(out)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert not record["ended_early"]
    assert {row["tokens"] for row in record["rows"]} == {1, 70}
    for row in record["rows"]:
        assert row["failure"] is None, row
        # int8 layers round activations; the others compute in float32.
        assert row["error"] <= (0.02 if "int8" in row["layer"] else 2e-6), row
    compiled = {row["layer"] for row in record["rows"] if row["compiled_error"] == row["error"]}
    assert compiled >= {"ours int8", "ours int8, token zero points", "ours int4", "ours nf4"}


def test_kernels_compile_for_an_h100_to_tensor_core_products_that_fit_it(tmp_path: Path) -> None:
    """Shared memory of 227 KiB: CUDA C++ Programming Guide, compute capability 9.0."""
    pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parent.parent / "support" / "compiled_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script), "90"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for kernel in json.loads(done.stdout):
        assert kernel["shared_bytes"] <= 227 << 10, kernel
        assert kernel["spills"] == 0, kernel
        if kernel["kernel"] == "_panel_kernel":
            # 65,536 registers a multiprocessor: at least 12 programs of one warp are resident.
            assert kernel["registers"] <= 168, kernel
            assert kernel["shared_bytes"] <= 4 << 10, kernel
        if kernel["kernel"] in ("_int8_kernel", "_int8_copy_kernel", "_int4_kernel"):
            assert kernel["tensor_core_products"] > 0, kernel
        if kernel["kernel"] in ("_int8_kernel", "_int8_copy_kernel"):
            assert kernel["int8_products"] > 0, kernel
        assert (kernel["copies"] > 0) == (kernel["kernel"] == "_int8_copy_kernel"), kernel
