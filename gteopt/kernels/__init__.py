"""Runtime linear layers for packed weights, and the choice between them.

Every layer has a `kernel` name, `in_features`, `out_features`, holds packed buffers and no float
copy of its weight, and maps [..., I] to [..., O] in its input's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gteopt.kernels.cpu import (
    DenseLinearCpu,
    Int4LinearCpu,
    Int8LinearCpu,
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


def _cuda_kernel(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> _Kernel | None:
    """The GPU layer that holds this weight; None where the portable ones are all there is."""
    scheme = weight.scheme
    # Triton comes with torch where there is a GPU, and wants tensor cores for these types.
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None
    from gteopt.kernels import cuda

    if scheme.element == "e4m3" and scheme.activation_bits == 8:
        fits = capability >= (8, 9) and dtype == torch.bfloat16 and cuda.fp8_fits(weight)
        return cuda.Fp8LinearCuda if fits else None
    if scheme.activation_bits == 8:
        return cuda.Int8LinearCuda if scheme.activation_outliers is None else None
    return cuda.Int4LinearCuda if scheme.bits == 4 and cuda.int4_fits(weight) else None


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
