"""Linear layers for the CPU that multiply packed weights without dequantizing them first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from gteopt.kernels.reference import take_outliers
from gteopt.quant.affine import PackedWeight, QuantizedWeight, quantize_tokens

_FEW_TOKENS = 96
"""Up to here torch's 4-bit product is faster than dequantizing and multiplying densely (384 to 2048
features, bfloat16, one core of a Zen 5 server: 2 to 3 times at 16 tokens, equal near 100)."""
_TOKEN_BLOCK = 256
"""Tokens an int8 product takes at once: the float32 intermediates of more leave the cache, which
costs up to half the speed (measured with 64 to 1024 on the same machine)."""
_TILES = (64, 32)
"""Output features that torch's 4-bit layout interleaves: on AVX-512, on AVX2."""
_WEIGHT_ROWS = 256
"""Rows of a 16-bit weight that are widened at once for few tokens, so that they stay in the cache
(1.3 to 4.5 times as fast as widening the whole weight, 16 tokens, one core of a Zen 3 server)."""


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it; without, torch's product is 10 times slower than
    float32's.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class DenseLinearCpu(nn.Linear):
    """A linear layer of a weight that is not quantized; parameters and gradients are `nn.Linear`'s.

    bfloat16 weights are multiplied in float32 where the CPU has no instructions for bfloat16, a
    few rows at a time where tokens are few. float32 goes through oneDNN on AVX-512, where MKL is
    slow on AMD's processors.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        kind = linear.weight.dtype
        self._widen = kind == torch.bfloat16 and not multiplies_bfloat16()
        self._onednn = kind == torch.float32 and torch.cpu._is_avx512_supported()
        self.kernel = "torch.linear"
        if self._widen:
            self.kernel = "cpu.bf16 (multiplied in fp32: no AVX512-BF16)"
        elif self._onednn:
            self.kernel = "cpu.fp32 (oneDNN)"

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        if self.weight.is_meta or (torch.is_grad_enabled() and self._has_gradient(x)):
            return nn.functional.linear(x, self.weight, self.bias)
        if self._widen:
            return self._widened(x.reshape(-1, self.in_features)).view(
                *x.shape[:-1], self.out_features
            )
        if self._onednn and x.dtype == torch.float32 and x.numel():
            product: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return product
        return nn.functional.linear(x, self.weight, self.bias)

    def _has_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or self.weight.requires_grad

    def _widened(self, x: Tensor) -> Tensor:
        wide = x.float()
        bias = None if self.bias is None else self.bias.float()
        if len(x) > _FEW_TOKENS:
            return nn.functional.linear(wide, self.weight.float(), bias).to(x.dtype)
        y = wide.new_empty(self.out_features, len(x))
        for start in range(0, self.out_features, _WEIGHT_ROWS):
            rows = self.weight[start : start + _WEIGHT_ROWS].float()
            torch.mm(rows, wide.t(), out=y[start : start + _WEIGHT_ROWS])
        product = y.t() if bias is None else y.t() + bias
        return product.to(x.dtype, memory_format=torch.contiguous_format)


@lru_cache(maxsize=1)
def activation_bits() -> int:
    """Bits of the activations whose products with int8 weights this CPU sums exactly: 8, or 7.

    Without VNNI, x86 adds two products of an unsigned and a signed byte in 16 bits and saturates:
    255 * 127 * 2 does not fit, 127 * 127 * 2 does. Found out by multiplying the extremes.
    """
    ones, zeros = torch.ones(256), torch.zeros(256, dtype=torch.int32)
    extreme = torch.full((64, 256), 255, dtype=torch.uint8)
    weight = _prepack(torch.full((256, 256), 127, dtype=torch.int8))
    found = _multiply(extreme, weight, ones, zeros)
    return 8 if bool((found == 255 * 127 * 256).all()) else 7


def _prepack(weight: Tensor) -> Tensor:
    """int8 [O, I] in oneDNN's own order, an opaque tensor of as many bytes."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def _multiply(codes: Tensor, packed: Tensor, scale: Tensor, no_zeros: Tensor) -> Tensor:
    """float32 [tokens, O]: int32 sums of uint8 codes [tokens, I] times weights, times scale [O]."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scale, no_zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@dataclass(frozen=True)
class TokenCodes:
    """What an int8 product takes: tokens rounded by their own range, x ~ (codes - zero) * scale.

    Attributes:
        codes: uint8 [tokens, I], of `activation_bits` bits.
        scale, zero: float32 [tokens, 1].
        outliers, columns: see `take_outliers`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    outliers: Tensor
    columns: Tensor


class Int8LinearCpu(nn.Module):
    """int8 weights times rounded activations, summed in int32 by oneDNN (VNNI or AMX if present).

    Each token's input is rounded by its own range (`quantize_tokens`) to as many bits as this CPU
    multiplies exactly (`activation_bits`), as unsigned codes whose zero point z changes every sum
    by z times the sum of the weight's row. oneDNN applies the weight's scale; zero point, token
    scale and bias follow in float32, rounded once to x's dtype. Layers of the same input may share
    its codes: `multiply(quantize(x))` is `forward(x)`.
    The weight lies in oneDNN's order, in no buffer; `packed_bytes` counts it. Layers that multiply
    outliers keep it in the plain order as well.
    Buffers: scale float32 [O]; correction float32 [2, O], minus the row's sum times its scale, and
    bias; weight int8 [O, I] where there are outliers.
    """

    kernel = "cpu.int8"
    weight: Tensor | None
    scale: Tensor
    correction: Tensor

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.symmetric = weight.scheme.activation_symmetric
        self.outliers = weight.scheme.activation_outliers
        # Flipping the top bit of an unsigned code subtracts the zero point 128.
        codes = (weight.qweight ^ 128).view(torch.int8)
        scale = weight.scale[:, 0].float()
        row = codes.sum(1, dtype=torch.int32).float() * scale
        rest = torch.zeros_like(scale) if bias is None else bias.float()
        self.bits = activation_bits()
        if self.bits < 8:
            self.kernel = f"cpu.int8 (activations of {self.bits} bits: no VNNI)"
        self._packed = _prepack(codes.contiguous())
        self._no_zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self.packed_bytes = codes.numel()
        self.register_buffer("scale", scale)
        self.register_buffer("correction", torch.stack([-row, rest]))
        self.register_buffer("weight", None if self.outliers is None else codes)

    def quantize(self, x: Tensor) -> TokenCodes:
        """[tokens, I] of any float dtype to what `multiply` takes."""
        rest, outliers, columns = take_outliers(x, self.outliers)
        codes, scale, zero = quantize_tokens(rest, symmetric=self.symmetric, bits=self.bits)
        middle = 1 << (self.bits - 1)
        # Adds the middle to a signed byte, which at 8 bits flips its top bit: one quick pass.
        unsigned = codes.add_(middle) if self.bits < 8 else codes.bitwise_xor_(-128)
        shifted = torch.full_like(scale, middle) if zero is None else zero.add_(middle)
        return TokenCodes(unsigned.view(torch.uint8), scale, shifted, outliers, columns)

    def multiply(self, x: TokenCodes, dtype: torch.dtype) -> Tensor:
        """[tokens, O] of a dtype."""
        product = _multiply(x.codes, self._packed, self.scale, self._no_zeros)
        # (sum - zero * row) * scale + bias, the last two as one product of rank 2.
        factors = torch.cat([x.zero * x.scale, torch.ones_like(x.scale)], dim=1)
        product.mul_(x.scale).addmm_(factors, self.correction)
        if self.weight is not None and len(x.columns):
            dense = self.weight[:, x.columns].float().mul_(self.scale[:, None])
            product.addmm_(x.outliers.float(), dense.t())
        return product.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        flat = x.reshape(-1, self.in_features)
        if len(flat) <= _TOKEN_BLOCK:
            y = self.multiply(self.quantize(flat), x.dtype)
        else:
            y = x.new_empty(len(flat), self.out_features)
            for start in range(0, len(flat), _TOKEN_BLOCK):
                block = flat[start : start + _TOKEN_BLOCK]
                y[start : start + _TOKEN_BLOCK] = self.multiply(self.quantize(block), x.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class Int4LinearCpu(nn.Module):
    """4-bit weights in torch's CPU layout, bfloat16 or float32 inputs, sums in float32.

    Few tokens use torch's 4-bit product of bfloat16 inputs. For many, the weight is dequantized
    from the same layout and multiplied densely, so that one packed copy serves both.
    Buffers: qweight uint8 [O, I / 2] in torch's layout; grid bfloat16 [G, O, 2], holding scale s
    and offset (8 - zero) * s of the value (code - 8) * s + offset; bias bfloat16 [O] or None.
    """

    kernel = "cpu.int4"
    qweight: Tensor
    grid: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        unpacked = weight.unpack()
        scale = unpacked.scale.float()
        offset = (8 - unpacked.zero.float()) * scale
        grid = torch.stack([scale, offset], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("qweight", _to_torch_layout(unpacked.codes))
        self.register_buffer("grid", grid.bfloat16())
        self.register_buffer("bias", None if bias is None else bias.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        flat = x.reshape(-1, self.in_features)
        if len(flat) <= _FEW_TOKENS:
            width = self.in_features // len(self.grid)
            product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat.bfloat16().contiguous(), self.qweight, width, self.grid
            ).to(x.dtype)
        else:
            kind = torch.bfloat16 if multiplies_bfloat16() else torch.float32
            product = torch.mm(flat.to(kind), self._dequantized(kind)).to(x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        """The transposed weight [I, O] in `dtype`."""
        n_groups, tile = len(self.grid), torch_tile()
        codes = _from_torch_layout(self.qweight, tile)  # [O/tile, I, tile]
        steps = codes.transpose(0, 1).reshape(n_groups, -1, self.out_features)  # [G, I/G, O]
        scale, offset = self.grid.to(dtype).unsqueeze(1).unbind(-1)  # each [G, 1, O]
        values = steps.view(torch.int8).sub_(8).to(dtype).mul_(scale).add_(offset)
        return values.view(self.in_features, self.out_features)


def int4_runs_here(weight: QuantizedWeight) -> bool:
    """Whether `Int4LinearCpu` can hold this weight on this machine."""
    out_features, in_features = weight.codes.shape
    width = in_features // weight.scale.shape[1]
    if (weight.scheme.bits, weight.scheme.element) != (4, "int"):
        return False
    tile = torch_tile()
    return tile > 0 and out_features % tile == 0 and width in (32, 64, 128, 256)


@lru_cache(maxsize=1)
def torch_tile() -> int:
    """Output features interleaved in torch's 4-bit layout here, 0 where it is not known how.

    The layout depends on the machine's vector width; which it is, is found out by reading back.
    """
    codes = torch.arange(64 * 64).mul(7).remainder(16).to(torch.uint8).view(64, 64)
    for tile in _TILES:
        tiles = _from_torch_layout(_to_torch_layout(codes), tile)
        if torch.equal(tiles.transpose(1, 2).reshape(64, 64), codes):
            return tile
    return 0


def _to_torch_layout(codes: Tensor) -> Tensor:
    """uint8 codes [O, I] to torch's packed uint8 [O, I / 2]."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


def _from_torch_layout(packed: Tensor, tile: int) -> Tensor:
    """Torch's packed uint8 [O, I / 2] to uint8 codes [O/tile, I, tile].

    For each tile of output features and each input feature lie tile / 2 bytes; byte i holds output
    feature i in its low half and tile / 2 + i in its high half.
    """
    tiles = packed.view(len(packed) // tile, -1, tile // 2)
    return torch.cat([tiles & 15, tiles >> 4], dim=-1)
