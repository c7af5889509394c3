"""Linear layers on packed weights that run on any device: the oracles of the fast kernels.

They hold only packed tensors; a float weight exists for the length of one call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gteopt.quant.affine import PackedWeight, dequantize, middle, unpack_codes


class DequantLinear(nn.Module):
    """x W^T + bias with W dequantized into x's dtype in each call. Any bits, any device.

    Buffers: qweight uint8 [O, ceil(I * bits / 8)], scale float16 [O, G], qzero uint8
    [O, ceil(G * bits / 8)] or None, bias [O] or None.
    """

    kernel = "reference.dequant"
    qweight: Tensor
    scale: Tensor
    qzero: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.scheme = weight.scheme
        self.register_buffer("qweight", weight.qweight)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("qzero", weight.qzero)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        return nn.functional.linear(x, self.dequantized(x.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in `dtype`."""
        bits = self.scheme.bits
        codes = unpack_codes(self.qweight, bits, self.in_features)
        if self.qzero is None:
            zero = torch.full((1, 1), middle(self.scheme), dtype=torch.uint8, device=codes.device)
        else:
            zero = unpack_codes(self.qzero, bits, self.scale.shape[1])
        return dequantize(codes, self.scale, zero, dtype)


class Int8Reference(DequantLinear):
    """The arithmetic of an int8 product, carried out in float32. Any device.

    Each token's input is rounded to int8 by its own scale, max |x| / 127; products are summed in
    float32 and rounded once to x's dtype.
    """

    kernel = "reference.int8"

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        codes, scale = quantize_tokens(x)
        product = nn.functional.linear(codes.float() * scale, self.dequantized(torch.float32))
        return (product if self.bias is None else product + self.bias.float()).to(x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token to int8, symmetric, by its own range.

    Args:
        x: [..., I], any float dtype; computed in float32.

    Returns:
        int8 [..., I] in -127 to 127, and float32 scale [..., 1] with x ~ codes * scale; a token of
        zeros (or of numbers whose scale is denormal) has scale 1.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).div_(127)
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 1.0)
    # No clamp: |x| / scale exceeds 127 by a rounding error at most.
    return (x / scale).round_().to(torch.int8), scale
