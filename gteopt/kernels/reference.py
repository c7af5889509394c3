"""Linear layers on packed weights that run on any device: the oracles of the fast kernels.

They hold only packed tensors; a float weight exists during a call only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gteopt.quant.affine import PackedWeight, quantize_tokens, token_scale
from gteopt.quant.grid import E4M3_MAX, dequantize, nf4_numbers, symmetric_zero_point
from gteopt.quant.packing import unpack_codes
from gteopt.quant.static_activations import InputGrid

DECODED_AT_ONCE = 1 << 18
"""Weights that a CPU decodes at once. They stay in the cache, so that a wide layer takes a quarter
of the time."""


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
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantized(x.dtype), bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in `dtype`."""
        n = DECODED_AT_ONCE // self.in_features if self.qweight.device.type == "cpu" else 0
        if not 0 < n < self.out_features:
            return self._dequantized_rows(slice(None), dtype)
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype)
        for first in range(0, self.out_features, n):
            rows = slice(first, first + n)
            weight[rows] = self._dequantized_rows(rows, dtype)
        return weight

    def _dequantized_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        qweight, scale, bits = self.qweight[rows], self.scale[rows], self.scheme.bits
        if self.scheme.number_format == "nf4" and dtype != torch.float64:
            numbers = nf4_numbers(qweight, dtype).view(*scale.shape, -1)
            return numbers.mul_(scale[..., None].to(dtype)).flatten(1)
        codes = unpack_codes(qweight, bits, self.in_features)
        if self.qzero is None:
            zero = torch.full(
                (1, 1), symmetric_zero_point(self.scheme), dtype=torch.uint8, device=codes.device
            )
        else:
            zero = unpack_codes(self.qzero[rows], bits, scale.shape[1])
        return dequantize(codes, scale, zero, dtype, number_format=self.scheme.number_format)


class PackedEmbedding(nn.Module):
    """An embedding table with packed rows; only rows that are looked up are dequantized.

    Buffers: qweight uint8 [V, D], scale float16 [V, 1].
    """

    kernel = "reference.embedding"
    qweight: Tensor
    scale: Tensor

    def __init__(self, table: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.out_features, table.in_features
        self.scheme, self.dtype = table.scheme, dtype
        self.register_buffer("qweight", table.qweight)
        self.register_buffer("scale", table.scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] to vectors [..., D] in the model's dtype."""
        flat = ids.reshape(-1)
        zero = torch.full(
            (1, 1), symmetric_zero_point(self.scheme), dtype=torch.uint8, device=ids.device
        )
        rows = dequantize(self.qweight[flat], self.scale[flat], zero, self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)


class Int8Reference(DequantLinear):
    """The arithmetic of an int8 product, carried out in float32. Any device.

    Each token's input is rounded to int8 by its own range (`quantize_tokens`). Static activations
    are rounded by the weight's grid of inputs. Products are summed in float32 and rounded once to
    x's dtype. Inputs beyond the scheme's `activation_outliers` are not rounded. Activations have
    `bits` bits: 8, or fewer to imitate a CPU that multiplies fewer exactly.
    """

    kernel = "reference.int8"
    bits = 8
    input_scale: Tensor
    input_zero: Tensor

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        if weight.inputs is not None:
            for name, tensor in weight.inputs.to_tensors().items():
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        if self.scheme.activation_static:
            grid = InputGrid(self.input_scale, self.input_zero)
            bias = None if self.bias is None else self.bias.float()
            weight = self.dequantized(torch.float32)
            return nn.functional.linear(grid.steps(x), weight, bias).to(x.dtype)
        rest, outliers, columns = take_outliers(x, self.scheme.activation_outliers)
        symmetric = self.scheme.activation_symmetric
        codes, scale, zero = quantize_tokens(rest, symmetric=symmetric, bits=self.bits)
        steps = codes.float() if zero is None else codes.float() - zero
        weight = self.dequantized(torch.float32)
        product = nn.functional.linear(steps * scale, weight)
        if len(columns):
            product.add_(nn.functional.linear(outliers.float(), weight[:, columns]))
        return (product if self.bias is None else product + self.bias.float()).to(x.dtype)


class Fp8Reference(DequantLinear):
    """The arithmetic of an 8-bit float product, carried out in float32. Any device.

    Each token's input is rounded to e4m3 by its own scale, max |x| / 448. Products of two such
    numbers are exact in float32, which sums them; the sum is rounded once to x's dtype.
    """

    kernel = "reference.fp8"

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        full = x.float()
        scale = token_scale(full.abs().amax(-1, keepdim=True).div_(E4M3_MAX))
        # Division may round up beyond the largest number, which e4m3fn would turn into NaN.
        floats = (full / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        weight = self.qweight.view(torch.float8_e4m3fn).float()
        product = nn.functional.linear(floats.float(), weight).mul_(self.scale[:, 0].float())
        product = product.mul_(scale)
        return (product if self.bias is None else product + self.bias.float()).to(x.dtype)


def take_outliers(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split inputs into small values and outliers.

    Whether a value is an outlier depends on that value only, so a text's vector does not depend on
    its batch. (bitsandbytes takes a whole column if one token needs it.)

    Args:
        x: [..., I].
        limit: least size of an outlier; None splits nothing.

    Returns:
        x with zeros for outliers [..., I]; the outliers in the K columns that have any, with zeros
        for all other values [..., K]; int64 [K], those columns.
    """
    if limit is None:
        return x, x[..., :0], torch.empty(0, dtype=torch.int64, device=x.device)
    large = x.abs() >= limit
    columns = large.reshape(-1, x.shape[-1]).any(0).nonzero()[:, 0]
    outliers = x[..., columns] * large[..., columns]
    return x.masked_fill(large, 0), outliers, columns
