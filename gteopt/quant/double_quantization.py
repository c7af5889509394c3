"""Store the scales of a weight in 8 bits each (double quantization).

QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), section 3, as bitsandbytes implements it. The mean
of all scales is subtracted. Then the scales, in the order of the weight's rows, are cut into blocks
of 256. Each is divided by the largest absolute value of its block. The quotient is stored as the
index of the nearest number in the "dynamic map" (Dettmers 2015, arXiv:1511.04561). Refuses to know:
weights, codes, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 256
"""Scales of a block, which share one factor."""
_EXPONENTS = 7


def dynamic_map() -> Tensor:
    """The 256 numbers of the map: float32, ascending, from -0.993 to 1.

    There are seven decades. The i-th decade has 2^i numbers of each sign: the middles of equal
    parts between a tenth of its end and its end. The numbers 0 and 1 are added.
    """
    positive = []
    for i in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive.append(10.0 ** (i + 1 - _EXPONENTS) * (edges[:-1] + edges[1:]) / 2)
    numbers = torch.cat(positive)
    return torch.cat([-numbers, numbers, torch.tensor([0.0, 1.0])]).sort().values


@dataclass(frozen=True)
class DoubleQuantizedScale:
    """Scales [O, G] in their stored form.

    Attributes:
        codes: uint8 [O, G], indices into `dynamic_map`.
        largest: float32 [ceil(O * G / 256)], the factor of each block.
        offset: float32 [1], added after the product with the factor.
    """

    codes: Tensor
    largest: Tensor
    offset: Tensor

    def scale(self) -> Tensor:
        """The scales that the codes stand for: float16 [O, G], as kernels need them."""
        numbers = dynamic_map().to(self.largest.device)[self.codes.int()].flatten()
        factors = self.largest.repeat_interleave(BLOCK_SIZE)[: numbers.numel()]
        return (numbers * factors + self.offset).view(self.codes.shape).half()

    def to(self, device: torch.device | str) -> DoubleQuantizedScale:
        """The same scales on another device."""
        return DoubleQuantizedScale(
            self.codes.to(device), self.largest.to(device), self.offset.to(device)
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {
            "scale_code": self.codes,
            "scale_largest": self.largest,
            "scale_offset": self.offset,
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> DoubleQuantizedScale:
        """Undo `to_tensors`."""
        return DoubleQuantizedScale(
            tensors["scale_code"], tensors["scale_largest"], tensors["scale_offset"]
        )


def quantize_scale(scale: Tensor) -> DoubleQuantizedScale:
    """Round scales [O, G], any float dtype, to the nearest numbers that can be stored."""
    flat = scale.detach().float().flatten()
    offset = flat.mean()
    shifted = flat - offset
    padded = torch.nn.functional.pad(shifted, (0, -len(shifted) % BLOCK_SIZE))
    largest = padded.view(-1, BLOCK_SIZE).abs().amax(1)
    # 0 only if all scales of the block equal the mean; then every divisor gives 0.
    factors = torch.where(largest > 0, largest, 1.0).repeat_interleave(BLOCK_SIZE)[: len(flat)]
    numbers = dynamic_map().to(flat.device)
    codes = torch.bucketize(shifted / factors, (numbers[1:] + numbers[:-1]) / 2)
    return DoubleQuantizedScale(codes.to(torch.uint8).view(scale.shape), largest, offset.view(1))


def double_quantized_bytes(n_scales: int) -> int:
    """Bytes that `n_scales` scales take in the stored form."""
    return n_scales + 4 * -(-n_scales // BLOCK_SIZE) + 4
