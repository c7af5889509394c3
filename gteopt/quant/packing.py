"""Pack codes of 1 to 8 bits densely into bytes.

Refuses to know: the values of codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely along the last axis, the first code in the lowest bits.

    Code i takes bits i * bits to (i + 1) * bits - 1 of the row. Bit k of the row is bit k % 8 of
    byte k // 8, so 3-bit codes cross bytes. Unused bits of the last byte are 0.

    Args:
        codes: uint8 [..., n], each below 2^bits.
        bits: bits a code.

    Returns:
        uint8 [..., ceil(n * bits / 8)]; codes of 8 bits are returned unchanged.
    """
    if bits == 8:
        # `contiguous` may keep odd strides of an axis of length 1; this gives the usual strides.
        return codes.contiguous().flatten().view(codes.shape)
    n_codes, n_bytes = _period(bits)
    n = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -n % n_codes)) if n % n_codes else codes
    if bits == 4:
        flat = padded.contiguous().flatten()
        if flat.storage_offset() % 2:  # an int16 cannot begin at an odd byte
            flat = flat.clone()
        wide = flat.view(torch.int16)  # little-endian: the first code of a pair is the lower byte
        return (wide | wide >> 4).to(torch.uint8).view(*codes.shape[:-1], padded.shape[-1] // 2)
    padded = padded.reshape(*codes.shape[:-1], -1, n_codes)
    packed = torch.zeros(
        (*padded.shape[:-1], n_bytes), dtype=torch.uint8, device=codes.device
    )  # [..., ceil(n / n_codes), n_bytes]
    for i in range(n_codes):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= padded[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= padded[..., i] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_width(n, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack_codes`: uint8 [..., ceil(n * bits / 8)] to uint8 [..., n].

    Kernels call it in their forward pass, so 4 and 2 bits have a faster path. Each byte is spread
    over a wider integer whose bytes, in little-endian order, are the codes. This writes memory
    contiguously, which is several times faster than writing codes with a stride.
    """
    if bits == 8:
        return packed
    if bits == 4:
        wide = packed.to(torch.int16)
        wide |= wide << 4
        return wide.bitwise_and_(0x0F0F).view(torch.uint8)[..., :n]
    if bits == 2:
        wide = packed.to(torch.int32)
        wide |= wide << 12
        wide |= wide << 6
        return wide.bitwise_and_(0x03030303).view(torch.uint8)[..., :n]
    n_codes, n_bytes = _period(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % n_bytes))
    words = padded.reshape(*packed.shape[:-1], -1, n_bytes)  # [..., ceil(n / n_codes), n_bytes]
    codes = torch.empty((*words.shape[:-1], n_codes), dtype=torch.uint8, device=packed.device)
    for i in range(n_codes):
        byte, shift = divmod(i * bits, 8)
        code = words[..., byte] >> shift
        if shift + bits > 8:
            code |= words[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, (1 << bits) - 1, out=codes[..., i])
    return codes.flatten(-2)[..., :n]


def packed_width(n: int, bits: int) -> int:
    """Bytes that `n` packed codes take."""
    return (n * bits + 7) // 8


def _period(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and the number of those bytes."""
    n_codes = 8 // math.gcd(bits, 8)
    return n_codes, n_codes * bits // 8
