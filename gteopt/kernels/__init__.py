"""Runtime linear layers for packed weights, and the choice between them.

Every layer has a `kernel` name, `in_features`, `out_features`, holds packed buffers and no float
copy of its weight, and maps [..., I] to [..., O] in its input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

from gteopt.kernels.cpu import (
    DenseLinearCpu,
    Int4LinearCpu,
    Int8LinearCpu,
    StaticInt8LinearCpu,
    activation_bits,
    int4_runs_here,
    multiplies_bfloat16,
)
from gteopt.kernels.reference import DequantLinear, Fp8Reference, Int8Reference
from gteopt.quant.affine import PackedWeight

_Kernel = Callable[[PackedWeight, Tensor | None], nn.Module]
INT8_ACTIVATIONS: dict[str, _Kernel] = {"cpu": Int8LinearCpu}
"""By device type; elsewhere `Int8Reference` computes the same numbers in float32. A comparison of
recipes empties it: whether a processor rounds to 7 bits is not the recipe's doing."""


def make_linear(
    weight: PackedWeight,
    bias: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> nn.Module:
    """The fastest layer that can compute this weight on this device.

    Args:
        weight: packed codes and grid, on any device.
        bias: [O] or None, any float dtype.
        device: where the layer is to run.
        dtype: of the inputs that it will be given.
        order: int64 [I], the input feature that each column of the weight multiplies; None when
            they are in order.
    """
    kernel: _Kernel = DequantLinear
    if (on_gpu := _cuda_kernel(weight, device, dtype)) is not None:
        kernel = on_gpu
    elif weight.scheme.element == "e4m3":
        kernel = Fp8Reference if weight.scheme.activation_bits == 8 else DequantLinear
    elif weight.scheme.activation_bits == 8:
        kernel = INT8_ACTIVATIONS.get(device.type, Int8Reference)
        # 0 bits: a build of torch without an int8 product. LLM.int8() is there to be compared with
        # bitsandbytes, whose activations have 8.
        least = 1 if weight.scheme.activation_outliers is None else 8
        if kernel is Int8LinearCpu and activation_bits() < least:
            kernel = Int8Reference
        if kernel is Int8LinearCpu and weight.scheme.activation_static:
            kernel = StaticInt8LinearCpu
    elif device.type == "cpu" and dtype == torch.bfloat16 and int4_runs_here(weight):
        kernel = Int4LinearCpu
    layer = kernel(weight, None if bias is None else bias.detach().to(dtype)).to(device)
    if order is not None:
        layer.register_buffer("order", order.to(device))
        layer.register_forward_pre_hook(_reorder)
    return layer


def arithmetic(device: torch.device) -> str:
    """What decides the rounding of a product on a kind of device, besides weights and dtype.

    Of a CPU it is this machine's: one rounds activations to 8 bits where another rounds to 7.
    """
    if device.type != "cpu":
        return device.type
    return f"int8 x {activation_bits()} bits, {'bf16' if multiplies_bfloat16() else 'fp32'}"


@lru_cache
def gpu_kernels(device: torch.device) -> ModuleType | None:
    """`kernels.cuda` for a GPU that runs it; None elsewhere.

    It wants tensor cores for short types, and Triton, which torch brings along on Linux only.
    """
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return import_module("gteopt.kernels.cuda")


def _cuda_kernel(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> _Kernel | None:
    """The GPU layer that holds this weight; None where the portable ones are all there is."""
    scheme, cuda = weight.scheme, gpu_kernels(device)
    if cuda is None:
        return None
    capability = torch.cuda.get_device_capability(device)
    kernel: _Kernel | None = None
    if scheme.element == "e4m3" and scheme.activation_bits == 8:
        if capability >= (8, 9) and dtype == torch.bfloat16 and cuda.fp8_fits(weight):
            kernel = cuda.Fp8LinearCuda
    elif scheme.activation_bits == 8:
        if scheme.activation_outliers is None and not scheme.activation_static:
            kernel = cuda.Int8LinearCuda
    elif scheme.bits == 4 and cuda.int4_fits(weight):
        kernel = cuda.Int4LinearCuda
    return kernel


def speed_up_linears_(module: nn.Module, device: torch.device) -> None:
    """Replace the plain linear layers inside `module` by those of this device, weights shared."""
    if device.type != "cpu":
        return
    for name, linear in list(module.named_modules()):
        if type(linear) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, DenseLinearCpu(linear))


def _reorder(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Put the input features into the order of the layer's columns."""
    assert isinstance(layer.order, Tensor)
    return (inputs[0][..., layer.order],)
