"""Runtime linear layers for packed weights, and the choice between them.

`KERNELS` lists the layers by product and device. Every layer has a `kernel` name, `in_features` and
`out_features`, and maps [..., I] to [..., O] in its input's dtype. Except for `DecodedLinearCpu`,
it holds packed buffers and no float copy of its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gteopt.config.recipe import LayerScheme
from gteopt.kernels.cpu import (
    DecodedLinearCpu,
    DenseLinearCpu,
    Int8LinearCpu,
    StaticInt8LinearCpu,
    activation_bits,
    multiplies_bfloat16,
)
from gteopt.kernels.cpu_int4 import Int4LinearCpu
from gteopt.kernels.measured import (
    DETERMINISTIC,
    KernelWays,
    MeasuredLayer,
    memory_holds_copies,
)
from gteopt.kernels.reference import DequantLinear, Fp8Reference, Int8Reference
from gteopt.quant.affine import PackedWeight
from gteopt.quant.triton_devices import runs_triton

Product = Literal["int8", "int8 static", "int8 outliers", "fp8", "4-bit", "weights"]
"""What a scheme multiplies: 8-bit numbers on both sides, 4-bit weights, or any other weights with
activations of 16 bits and more."""
DeviceKind = Literal["cuda 8.9", "cuda 8.0", "cpu", "any"]
"""A GPU of at least that compute capability, a CPU, or any device of torch."""
_Kernel = Callable[[PackedWeight, Tensor | None], nn.Module]
KERNELS: dict[tuple[Product, DeviceKind], _Kernel | str] = {
    ("int8", "cuda 8.0"): "Int8LinearCuda",
    ("int8", "cpu"): Int8LinearCpu,
    ("int8", "any"): Int8Reference,
    ("int8 static", "cpu"): StaticInt8LinearCpu,
    ("int8 static", "any"): Int8Reference,
    ("int8 outliers", "cpu"): Int8LinearCpu,
    ("int8 outliers", "any"): Int8Reference,
    ("fp8", "cuda 8.9"): "Fp8LinearCuda",
    ("fp8", "any"): Fp8Reference,
    ("4-bit", "cuda 8.0"): "Int4LinearCuda",
    ("4-bit", "cpu"): Int4LinearCpu,
    ("4-bit", "any"): DequantLinear,
    ("weights", "any"): DequantLinear,
}
"""The layer classes; those of `kernels.cuda` by name. A layer may choose its product by the number
of tokens in a call: up to `few_tokens` it multiplies the codes, beyond that it decodes them first.
`int8_tile` has the tiles of a GPU's int8 product. A comparison of recipes removes the CPU's int8
layers, because some processors round to 7 bits, which says nothing about the recipe."""


def make_linear(
    weight: PackedWeight,
    bias: Tensor | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    order: Tensor | None = None,
    ways: KernelWays = DETERMINISTIC,
) -> nn.Module:
    """The layer that computes this weight on this device.

    Args:
        weight: packed codes and grid, on any device.
        bias: [O] or None, any float dtype.
        device: where the layer will run.
        dtype: dtype of its inputs.
        order: int64 [I], the input feature that each column of the weight multiplies; None if
            they are in order.
        ways: the chosen products of layers on a CPU.
    """
    make = choose_kernel(weight, device, dtype, ways)
    layer = make(weight, None if bias is None else bias.detach().to(dtype)).to(device)
    if order is not None:
        layer.register_buffer("order", order.to(device))
        layer.register_forward_pre_hook(_reorder)
    return layer


def choose_kernel(
    weight: PackedWeight, device: torch.device, dtype: torch.dtype, ways: KernelWays = DETERMINISTIC
) -> _Kernel:
    """The constructor of a weight's layer: the first of `KERNELS` that fits, with its product."""
    kernel = _first(weight, device, dtype)
    if device.type != "cpu":
        return kernel
    decoded = partial(DecodedLinearCpu, dtype=dtype)
    if kernel in (Int8LinearCpu, StaticInt8LinearCpu, Int4LinearCpu):
        key = MeasuredLayer(weight.scheme, weight.out_features, weight.in_features).key(dtype)
        if weight.scheme.activation_outliers is not None or key not in ways.products:
            return kernel
        products = ways.products[key]
        if products is None:
            return decoded
        return partial(kernel, products=products)
    if kernel is DequantLinear and ways.decodes:
        return decoded
    return kernel


def _first(weight: PackedWeight, device: torch.device, dtype: torch.dtype) -> _Kernel:
    product, cuda = product_of(weight.scheme), gpu_kernels(device)
    places: list[DeviceKind] = ["cpu"] if device.type == "cpu" else []
    if cuda is not None:
        newer = torch.cuda.get_device_capability(device) >= (8, 9)
        places = ["cuda 8.9", "cuda 8.0"] if newer else ["cuda 8.0"]
    for place in places:
        entry = KERNELS.get((product, place))
        kernel: Any = getattr(cuda, entry) if isinstance(entry, str) else entry
        if kernel is not None and kernel.fits(weight, dtype):
            return cast("_Kernel", kernel)
    return cast("_Kernel", KERNELS[product, "any"])


def kernel_name(
    scheme: LayerScheme,
    out_features: int,
    in_features: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ways: KernelWays = DETERMINISTIC,
) -> str:
    """The `kernel` name of a weight's layer, with the most tokens for which it multiplies codes."""
    without_data = MeasuredLayer(scheme, out_features, in_features).without_data()
    kernel: Any = choose_kernel(without_data, device, dtype, ways)
    if isinstance(kernel, partial):
        if kernel.func is DecodedLinearCpu:
            return DecodedLinearCpu.decoded_name(scheme, dtype)
        return str(cast("Any", kernel.func).name_here(**kernel.keywords))
    name = str(kernel.name_here() if hasattr(kernel, "name_here") else kernel.kernel)
    few = getattr(kernel, "few_tokens", None)
    return name if few is None else f"{name} (to {few} tokens from the codes, decoded beyond)"


def product_of(scheme: LayerScheme) -> Product:
    """What a layer of this scheme multiplies."""
    if scheme.number_format == "e4m3":
        return "fp8" if scheme.activation_bits == 8 else "weights"
    if scheme.activation_bits == 8:
        if scheme.activation_static:
            return "int8 static"
        return "int8" if scheme.activation_outliers is None else "int8 outliers"
    return "4-bit" if scheme.bits == 4 else "weights"


def arithmetic_name(device: torch.device, ways: KernelWays = DETERMINISTIC) -> str:
    """A name for everything that decides the rounding of a product, besides weights and dtype.

    For a CPU it describes this machine: processors differ in the bits of activations (8 or 7), and
    in whether they decode weights or multiply their codes.
    """
    if device.type != "cpu":
        return device.type
    decoded = f", decoded: {ways.rounding}" if ways.rounding else ""
    short = "bf16" if multiplies_bfloat16() else "fp32"
    return f"int8 x {activation_bits()} bits, {short}{decoded}"


@lru_cache
def gpu_kernels(device: torch.device) -> ModuleType | None:
    """`kernels.cuda` for a GPU that supports it; None otherwise."""
    return import_module("gteopt.kernels.cuda") if runs_triton(device) else None


def speed_up_linears_(
    module: nn.Module, device: torch.device, ways: KernelWays = DETERMINISTIC
) -> None:
    """Replace plain linear layers inside `module` with those of this device; weights are shared."""
    if device.type != "cpu":
        return
    plain = {n: linear for n, linear in module.named_modules() if type(linear) is nn.Linear}
    n_bytes = sum(linear.weight.numel() * linear.weight.element_size() for linear in plain.values())
    packs = ways.packs and memory_holds_copies(n_bytes)
    for name, linear in plain.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, DenseLinearCpu(linear, packs=packs))


def _reorder(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Put the input features into the order of the layer's columns."""
    assert isinstance(layer.order, Tensor)
    return (inputs[0][..., layer.order],)
