"""Linear layers for NVIDIA GPUs, in Triton and torch's own 8-bit float product.

Hides: how packed codes become operands of a product. The kernels are in `cuda_tokens`, `cuda_int8`
and `cuda_int4`; this file exports the names that callers use. It imports triton, which torch
installs for GPUs, so `kernels/__init__.py` imports it only for layers on a GPU. Under
TRITON_INTERPRET=1 the same kernels run on the CPU; tests without a GPU use that.

No layer waits for the GPU or reads a number from it, so all can be recorded in a CUDA graph.

Shapes: T tokens, O output features, I input features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gteopt.kernels.cuda_int4 import FEW_TOKENS, INT4_TILE
from gteopt.kernels.cuda_int8 import LARGE_TILES, fastest_tiles, int8_product, int8_tile
from gteopt.kernels.cuda_operators import Tile
from gteopt.kernels.cuda_tokens import FusedStep, gate_, quantize_tokens_cuda, rotate_, round_tokens
from gteopt.quant.affine import PackedWeight
from gteopt.quant.grid import NF4_LEVELS, group_width, symmetric_zero_point
from gteopt.quant.packing import unpack_codes

__all__ = [
    "LARGE_TILES",
    "Fp8LinearCuda",
    "FusedStep",
    "Int4LinearCuda",
    "Int8LinearCuda",
    "Tile",
    "fastest_tiles",
    "gate_",
    "int8_product",
    "int8_tile",
    "quantize_tokens_cuda",
    "rotate_",
    "round_tokens",
]


class Int8LinearCuda(nn.Module):
    """int8 weights times int8 activations on the tensor cores, summed in int32.

    The arithmetic is that of `Int8LinearCpu`. A token's zero point times the sum of the weight's
    row is subtracted in int32. Token scale, weight scale and bias are applied in float32 before the
    sum leaves the registers, and the result is rounded once to x's dtype. No int32 sum is stored.
    Layers with the same input may share its codes: `multiply(quantize(x))` is `forward(x)`.

    Buffers: weight int8 [O, I], row_sum int32 [O] or None, scale float32 [O], bias float32 [O] or
    None.
    """

    kernel = "cuda.int8"
    weight: Tensor
    row_sum: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        symmetric = weight.scheme.activation_symmetric
        self.rounding = ("int8", symmetric)
        # Flipping the top bit of an unsigned code subtracts the zero point 128.
        self.register_buffer("weight", (weight.qweight ^ 128).view(torch.int8))
        row_sum = None if symmetric else self.weight.sum(1, dtype=torch.int32)
        self.register_buffer("row_sum", row_sum)
        self.register_buffer("scale", weight.scale[:, 0].float())
        self.register_buffer("bias", None if bias is None else bias.float())

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """True: this layer takes every weight that `KERNELS` sends here."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O], in x's dtype."""
        y = self.multiply(self.quantize(x.reshape(-1, self.in_features)), x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def quantize(
        self, x: Tensor, before: FusedStep | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Round x [T, I] of any float dtype, after `before`, to what `multiply` takes."""
        return quantize_tokens_cuda(x.contiguous(), symmetric=self.row_sum is None, before=before)

    def multiply(self, x: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype) -> Tensor:
        """Multiply by the weight: [T, O] in `dtype`."""
        return int8_product(*x, self.weight, self.scale, self.row_sum, self.bias, dtype)


class Fp8LinearCuda(nn.Module):
    """e4m3 weights times e4m3 activations through `torch._scaled_mm`; capability 8.9 and up.

    Each output feature and each token has a scale; sums are in float32. The fast accumulation of
    Hopper's tensor cores (14 bits between promotions) is off unless `fast` is set. Over 18,944
    inputs it loses digits that the 8-bit operands still have. `benchmarks/gpu_layers.py` measures
    both. Layers with the same input may share its floats.

    Buffers: weight e4m3 [O, I], scale float32 [1, O], bias bfloat16 [O] or None.
    """

    kernel = "cuda.fp8"
    rounding = ("fp8",)
    fast = False
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.register_buffer("weight", weight.qweight.view(torch.float8_e4m3fn))
        self.register_buffer("scale", weight.scale[:, 0].float()[None])
        self.register_buffer("bias", None if bias is None else bias.bfloat16())

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether `torch._scaled_mm` takes this weight: bfloat16, both sides multiples of 16."""
        whole = weight.in_features % 16 == 0 and weight.out_features % 16 == 0
        return dtype == torch.bfloat16 and whole

    def forward(self, x: Tensor) -> Tensor:
        """Map bfloat16 [..., I] to bfloat16 [..., O]."""
        y = self.multiply(self.quantize(x.reshape(-1, self.in_features)), x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def quantize(self, x: Tensor, before: FusedStep | None = None) -> tuple[Tensor, Tensor]:
        """Round bfloat16 x [T, I], after `before`, to what `multiply` takes."""
        return round_tokens(x.contiguous(), before=before)

    def multiply(self, x: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """Multiply by the weight: [T, O] in `dtype`; computed in bfloat16."""
        floats, scale = x
        product = torch._scaled_mm(
            floats,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=self.fast,
        )
        return product.to(dtype)


class Int4LinearCuda(nn.Module):
    """4-bit weights, whole numbers or NF4, times 16-bit activations; sums in float32.

    With few tokens, codes are decoded in registers, and a group's scale is applied to its sum. With
    many, the layer is decoded into x's dtype and cuBLAS multiplies. One packed copy serves both.
    Buffers: qweight uint8 [O, I / 2], scale float16 [O, G], zero uint8 [O, G] or None, bias [O] or
    None.
    """

    kernel = "cuda.int4"
    few_tokens = FEW_TOKENS
    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.nf4 = weight.scheme.number_format == "nf4"
        self.middle = symmetric_zero_point(weight.scheme)
        zero = None
        if weight.qzero is not None:
            zero = unpack_codes(weight.qzero, 4, weight.scale.shape[1]).contiguous()
        levels = torch.tensor(NF4_LEVELS, device=weight.qweight.device) if self.nf4 else None
        self.register_buffer("qweight", weight.qweight)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", zero)
        self.register_buffer("levels", levels)
        self.register_buffer("bias", bias)

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether a group is a whole number of tensor-core steps."""
        width = group_width(weight.in_features, weight.scheme.group_size)
        step = min(128, width)
        return weight.scheme.bits == 4 and step >= 16 and not step & (step - 1) and not width % step

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O], in x's dtype."""
        flat = x.reshape(-1, self.in_features).contiguous()
        if len(flat) > FEW_TOKENS:
            y = nn.functional.linear(flat, self.decoded(x.dtype), self.bias)
        else:
            y = self.multiply(flat)
        return y.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor, tile: Tile = INT4_TILE) -> Tensor:
        """Map contiguous [T, I] to [T, O] directly from the codes; for few tokens."""
        own = (self.qweight, self.scale, self.zero, self.levels, self.bias, self.middle)
        y: Tensor = torch.ops.gteopt.int4_product(x, *own, tile)
        return y

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in `dtype`, rounded once."""
        weight: Tensor = torch.ops.gteopt.decode_int4(
            self.qweight, self.scale, self.zero, self.levels, self.middle, dtype
        )
        return weight
