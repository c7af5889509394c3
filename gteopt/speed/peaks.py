"""Measure the peak speed of this machine's matrix products for each number type.

Hides: which of torch's products is the fastest of its type. Refuses to know: models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gteopt.config.recipe import LayerScheme
from gteopt.kernels import make_linear
from gteopt.kernels.cpu import Int8LinearCpu
from gteopt.quant.affine import pack, quantize_rtn
from gteopt.speed.clock import time_call


def peak_gflops(device: torch.device) -> dict[str, float]:
    """10^9 operations a second of large matrix products, by number type."""
    kinds: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    m, k, n = (1024, 1024, 4096) if device.type == "cpu" else (8192, 8192, 8192)
    peaks: dict[str, float] = {}
    if device.type == "cuda":
        for name, product in _short_products(n, device).items():
            time_call(product, device)  # libraries load and choose their kernels
            peaks[name] = 2 * n**3 / min(time_call(product, device) for _ in range(5)) / 1e9
    for name, kind in kinds.items():
        x, w = (torch.randn(shape, device=device).to(kind) for shape in ((m, k), (n, k)))
        seconds = [time_call(partial(nn.functional.linear, x, w), device) for _ in range(5)]
        peaks[name] = 2 * m * k * n / min(seconds) / 1e9
    if device.type == "cpu":
        codes = quantize_rtn(torch.randn(n, k), _INT8)
        layer = make_linear(pack(codes), None, device=device, dtype=torch.float32)
        if not isinstance(layer, Int8LinearCpu):  # a build of torch without such a product
            return peaks
        tokens = layer.quantize(torch.randn(m, k))
        seconds = [
            time_call(partial(layer.multiply, tokens, torch.float32), device) for _ in "12345"
        ]
        peaks["int8"] = 2 * m * k * n / min(seconds) / 1e9
    return peaks


_INT8 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)


def _short_products(n: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Products of n x n matrices of 8-bit numbers that torch has for this GPU."""
    products: dict[str, Callable[[], Tensor]] = {}
    if torch.version.cuda is None:
        return products
    x = torch.randn(n, n, device=device)
    codes = (x * 40).clamp_(-127, 127).to(torch.int8)
    products["int8"] = lambda: torch._int_mm(codes, codes.t())
    if torch.cuda.get_device_capability(device) >= (8, 9):
        floats, ones = x.to(torch.float8_e4m3fn), torch.ones((n, 1), device=device)
        products["fp8"] = lambda: torch._scaled_mm(
            *(floats, floats.t()),
            scale_a=ones,
            scale_b=ones.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,  # as in `Fp8LinearCuda`
        )
    return products
