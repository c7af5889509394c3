"""Linear layers for the CPU that multiply packed weights without dequantizing them first."""

from __future__ import annotations

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
_TILE = 64
"""Output features that torch's 4-bit layout interleaves on AVX-512."""


class Int8LinearCpu(nn.Module):
    """int8 weights times int8 activations, summed in int32 by oneDNN (VNNI or AMX where present).

    Each token's input is rounded by its own range (`quantize_tokens`). A token's zero point z
    changes every sum by z times the sum of the weight's row, which is subtracted in int32. Token
    scale, weight scale and bias are applied in float32, rounded once to x's dtype.
    Buffers: weight int8 [O, I], row_sum int32 [O] or None, scale float32 [O], bias float32 [O] or
    None.
    """

    kernel = "cpu.int8"
    weight: Tensor
    row_sum: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.symmetric = weight.scheme.activation_symmetric
        self.outliers = weight.scheme.activation_outliers
        # Flipping the top bit of an unsigned code subtracts the zero point 128.
        self.register_buffer("weight", (weight.qweight ^ 128).view(torch.int8))
        row_sum = None if self.symmetric else self.weight.sum(1, dtype=torch.int32)
        self.register_buffer("row_sum", row_sum)
        self.register_buffer("scale", weight.scale[:, 0].float())
        self.register_buffer("bias", None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        flat = x.reshape(-1, self.in_features)
        y = x.new_empty(len(flat), self.out_features)
        for start in range(0, len(flat), _TOKEN_BLOCK):
            rest, outliers, columns = take_outliers(
                flat[start : start + _TOKEN_BLOCK], self.outliers
            )
            codes, token_scale, zero = quantize_tokens(rest, symmetric=self.symmetric)
            sums = torch._int_mm(codes, self.weight.t())  # int32 [tokens, O]
            if zero is not None and self.row_sum is not None:
                sums.addcmul_(zero.int(), self.row_sum, value=-1)
            product = torch.mul(sums, self.scale).mul_(token_scale)
            if len(columns):
                dense = self.weight[:, columns].float().mul_(self.scale[:, None])
                product.addmm_(outliers.float(), dense.t())
            if self.bias is not None:
                product.add_(self.bias)
            y[start : start + _TOKEN_BLOCK] = product
        return y.view(*x.shape[:-1], self.out_features)


class Int4LinearCpu(nn.Module):
    """4-bit weights in torch's CPU layout, bfloat16 activations, sums in float32.

    Few tokens use torch's 4-bit product. For many, the weight is dequantized from the same layout
    and multiplied densely, so that one packed copy serves both.
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
        """bfloat16 [..., I] to bfloat16 [..., O]."""
        flat = x.reshape(-1, self.in_features)
        if len(flat) <= _FEW_TOKENS:
            width = self.in_features // len(self.grid)
            product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat.contiguous(), self.qweight, width, self.grid
            )
        else:
            # [tokens, I] @ [O/64, I, 64]: the tiles stay where the layout has them.
            tiles = torch.matmul(flat, self._dequantized_tiles())
            product = tiles.transpose(0, 1).reshape(-1, self.out_features)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def _dequantized_tiles(self) -> Tensor:
        """The transposed weight in tiles of 64 output features: bfloat16 [O/64, I, 64]."""
        n_groups, n_tiles = len(self.grid), self.out_features // _TILE
        codes = _from_torch_layout(self.qweight).view(n_tiles, n_groups, -1, _TILE)
        steps = codes.view(torch.int8).sub_(8).to(torch.bfloat16)  # [O/64, G, I/G, 64]
        grid = self.grid.view(n_groups, n_tiles, _TILE, 2).permute(3, 1, 0, 2).contiguous()
        scale, offset = grid.unsqueeze(3)  # each [O/64, G, 1, 64]
        return torch.addcmul(offset, steps, scale).view(n_tiles, -1, _TILE)


def int4_runs_here(weight: QuantizedWeight) -> bool:
    """Whether `Int4LinearCpu` can hold this weight on this machine.

    Torch's 4-bit layout depends on the machine's vector width. Only the AVX-512 one is read back
    here, and that it is the one in use is tested on this very weight.
    """
    out_features, in_features = weight.codes.shape
    width = in_features // weight.scale.shape[1]
    if (weight.scheme.bits, weight.scheme.element) != (4, "int"):
        return False
    if out_features % _TILE or width not in (32, 64, 128, 256):
        return False
    tiles = _from_torch_layout(_to_torch_layout(weight.codes))
    return torch.equal(tiles.transpose(1, 2).reshape(out_features, in_features), weight.codes)


def _to_torch_layout(codes: Tensor) -> Tensor:
    """uint8 codes [O, I] to torch's packed uint8 [O, I / 2]."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


def _from_torch_layout(packed: Tensor) -> Tensor:
    """Torch's packed uint8 [O, I / 2] to uint8 codes [O/64, I, 64].

    For each tile of 64 output features and each input feature lie 32 bytes; byte i holds output
    feature i in its low half and 32 + i in its high half.
    """
    tiles = packed.view(len(packed) // _TILE, -1, _TILE // 2)
    return torch.cat([tiles & 15, tiles >> 4], dim=-1)
