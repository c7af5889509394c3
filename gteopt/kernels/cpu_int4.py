"""The 4-bit linear layer for the CPU, and the layout of torch's 4-bit product."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from gteopt.kernels.cpu import FEW_TOKENS, CpuProducts, multiplies_bfloat16
from gteopt.kernels.reference import DECODED_AT_ONCE
from gteopt.quant.affine import PackedWeight
from gteopt.quant.packing import pack_codes

_TILES = (64, 32)
"""Output features that torch's 4-bit layout interleaves: on AVX-512, on AVX2."""
_LAYOUT_ROWS = 512
"""Rows that are converted to torch's 4-bit layout at once: whole tiles, which stay in the cache."""
CODES, EACH_CALL, KEPT = INT4_PRODUCTS = ("codes", "decoded in each call", "kept decoded")
"""Products of a 4-bit layer: torch's of the codes; a dense one of the weight, which each call
decodes; a dense one of the weight, which the layer has decoded once."""
AS_PACKED = CpuProducts(CODES, EACH_CALL)
"""The products of a layer that nothing was measured for; it holds its codes alone."""


class Int4LinearCpu(nn.Module):
    """4-bit weights in torch's CPU layout, bfloat16 or float32 inputs, sums in float32.

    Few tokens use torch's 4-bit product of bfloat16 inputs. For many tokens, the weight is decoded
    from the same layout and multiplied densely, so that one packed copy serves both. A layer may
    keep the decoded weight beside its codes, which takes four or eight times their memory.

    Buffers: qweight uint8 [O, I / 2] in torch's layout; grid bfloat16 [G, O, 2], holding scale s
    and offset (8 - zero) * s of the value (code - 8) * s + offset; bias bfloat16 [O] or None;
    decoded bfloat16 or float32 [O, I] or None.
    """

    kernel = "cpu.int4"
    few_tokens = FEW_TOKENS
    qweight: Tensor
    grid: Tensor
    bias: Tensor | None
    decoded: Tensor | None

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, products: CpuProducts | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.kernel = self.name_here(products)
        self._products = products or AS_PACKED
        # Queried here, because torch.compile can trace neither call.
        self._tile = int4_tile()
        self._kind = torch.bfloat16 if multiplies_bfloat16() else torch.float32
        scale = weight.scale.float()
        offset = (8 - weight.zero.float()) * scale
        grid = torch.stack([scale, offset], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("qweight", _to_torch_layout(weight.qweight.cpu(), self._tile))
        self.register_buffer("grid", grid.bfloat16())
        self.register_buffer("bias", None if bias is None else bias.bfloat16())
        keeps = KEPT in (self._products.few, self._products.many)
        decoded = self._dequantized(self._kind).t().contiguous() if keeps else None
        self.register_buffer("decoded", decoded)

    @classmethod
    def name_here(cls, products: CpuProducts | None = None) -> str:
        """`kernel` of a layer on this machine."""
        return cls.kernel if products is None else f"{cls.kernel} ({products})"

    @property
    def decodes(self) -> bool:
        """Whether a call with many tokens decodes the weight."""
        return self._products.many == EACH_CALL

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether torch's 4-bit product takes this weight and a model of this dtype."""
        return dtype == torch.bfloat16 and int4_runs_here(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        flat = x.reshape(-1, self.in_features)
        how = self._products.few if len(flat) <= FEW_TOKENS else self._products.many
        if how == CODES:
            width = self.in_features // len(self.grid)
            product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat.bfloat16().contiguous(), self.qweight, width, self.grid
            ).to(x.dtype)
        elif self.decoded is not None:
            product = nn.functional.linear(flat.to(self._kind), self.decoded).to(x.dtype)
        else:
            product = torch.mm(flat.to(self._kind), self._dequantized(self._kind)).to(x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        """The transposed weight [I, O] in `dtype`."""
        n_groups, width = len(self.grid), self.in_features // len(self.grid)
        # Contiguous copies, because torch multiplies strided values eight times as slowly.
        scale, offset = (
            part.contiguous() for part in self.grid.to(dtype).unsqueeze(1).unbind(-1)
        )  # each [G, 1, O]
        values = scale.new_empty(n_groups, width, self.out_features)
        n = max(1, DECODED_AT_ONCE // (width * self.out_features))
        for first in range(0, n_groups, n):
            groups = slice(first, first + n)
            features = slice(first * width, (first + n) * width)
            codes = _from_torch_layout(self.qweight, self._tile, features)  # [O/tile, I', tile]
            steps = codes.transpose(0, 1).reshape(-1, width, self.out_features).view(torch.int8)
            part = values[groups].copy_(steps.sub_(8))
            part.mul_(scale[groups]).add_(offset[groups])
        return values.view(self.in_features, self.out_features)


def int4_runs_here(weight: PackedWeight) -> bool:
    """Whether `Int4LinearCpu` can hold this weight on this machine."""
    width = weight.in_features // weight.scale.shape[1]
    if (weight.scheme.bits, weight.scheme.number_format) != (4, "int"):
        return False
    tile = int4_tile()
    return tile > 0 and weight.out_features % tile == 0 and width in (32, 64, 128, 256)


@lru_cache(maxsize=1)
def int4_tile() -> int:
    """Output features that torch's 4-bit layout interleaves here; 0 if the layout is unknown.

    The layout depends on the machine's vector width, so each known layout is compared with torch's.
    """
    codes = torch.arange(64 * 64).mul(7).remainder(16).to(torch.uint8).view(64, 64)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    for tile in _TILES:
        if torch.equal(_to_torch_layout(pack_codes(codes, 4), tile), theirs):
            return tile
    return 0


def _to_torch_layout(qweight: Tensor, tile: int) -> Tensor:
    """Packed codes uint8 [O, I / 2] to torch's packed uint8 [O, I / 2].

    `_convert_weight_to_int4pack_for_cpu` does the same in five times the time, from codes of four
    bytes. Each tile of output features has tile / 2 bytes for each input feature. Byte i holds
    output feature i in its low half, and tile / 2 + i in its high half.
    """
    packed = torch.empty_like(qweight)
    parts = (torch.split(matrix, _LAYOUT_ROWS) for matrix in (qweight, packed))
    for rows, out in zip(*parts, strict=True):
        halves = rows.view(len(rows) // tile, 2, tile // 2, -1)
        low, high = halves.unbind(1)  # [O/tile, tile/2, I/2], two input features a byte
        pairs = out.view(len(low), -1, 2, tile // 2)  # [O/tile, I/2, 2, tile/2]
        pairs[:, :, 0] = (low & 15 | high << 4).transpose(1, 2)
        pairs[:, :, 1] = (low >> 4 | high & 240).transpose(1, 2)
    return packed


def _from_torch_layout(packed: Tensor, tile: int, features: slice) -> Tensor:
    """Torch's packed uint8 [O, I / 2] to uint8 codes [O/tile, I', tile] of I' input features."""
    tiles = packed.view(len(packed) // tile, -1, tile // 2)[:, features]
    return torch.cat([tiles & 15, tiles >> 4], dim=-1)
