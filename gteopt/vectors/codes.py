"""Codes that store vectors: each class maps float rows to bytes and back.

| code | bytes of D dimensions | what a code stands for |
|---|---|---|
| float32 | 4 D | itself |
| int8 | D | 256 even levels from low to high, by dimension |
| int4 | D / 2 | 16 even levels from low to high, by dimension |
| binary | D / 8 | the sign |
| rabitq | B D / 8 + 2 | centre + factor * grid point, B bits a dimension |
| pq | M | for each byte one of 256 points in the dimensions that share the byte |

Hides: how codes lie in bytes. Refuses to know: how ranges and codebooks are fitted, searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gteopt.config.recipe import VectorCode

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]
"""Stored vectors, a row each: float32 [N, D], int8 [N, D], or uint8 [N, bytes]."""

_BLOCK_ROWS = 1 << 11  # bounds the float64 memory of encoding to some tens of megabytes
_RABITQ_SCALES = 48
_FACTOR_BYTES = 2


class Code(Protocol):
    """A map from float rows [N, D] to stored vectors, and back."""

    @property
    def dtype(self) -> npt.DTypeLike:
        """The dtype of a stored vector's items."""

    @property
    def width(self) -> int:
        """How many items a stored vector has."""

    def encode(self, rows: Floats) -> Codes:
        """Code rows [N, D] to [N, width]; a row's code does not depend on the rows beside it."""

    def decode(self, codes: Codes) -> Floats:
        """The vectors [N, D] that codes [N, width] stand for."""


@dataclass(frozen=True)
class Float32Code:
    """Vectors as they are."""

    dims: int

    @property
    def dtype(self) -> npt.DTypeLike:
        """The dtype of a stored vector's items."""
        return np.float32

    @property
    def width(self) -> int:
        """How many items a stored vector has."""
        return self.dims

    def encode(self, rows: Floats) -> Codes:
        """The rows themselves."""
        return rows

    def decode(self, codes: Codes) -> Floats:
        """The codes themselves."""
        return codes


@dataclass(frozen=True, eq=False)
class ScalarCode:
    """int8 and int4: even levels by dimension.

    code = clip(round((2^B - 1) (z - low) / (high - low)), 0, 2^B - 1), so a value out of range
    saturates. int8 stores code - 128 as a signed byte. int4 stores two codes a byte, the first
    dimension in the lower four bits, as faiss does.

    Attributes:
        bits: 8 or 4.
        low, high: [D], the values of the lowest and the highest code.
    """

    bits: int
    low: Floats
    high: Floats

    @property
    def dtype(self) -> npt.DTypeLike:
        """The dtype of a stored vector's items."""
        return np.int8 if self.bits == 8 else np.uint8

    @property
    def width(self) -> int:
        """How many items a stored vector has."""
        return -(-len(self.low) * self.bits // 8)

    def encode(self, rows: Floats) -> Codes:
        """Nearest level of each value; [N, width]."""
        low, step = self._low_and_step()
        # A dimension that was constant in calibration has no step; all its values get one code.
        levels = np.divide(rows - low, step, out=np.zeros(rows.shape), where=step > 0)
        levels = np.clip(np.rint(levels), 0, 2**self.bits - 1)
        if self.bits == 8:
            return (levels - 128).astype(np.int8)
        nibbles = np.zeros((len(rows), 2 * self.width), np.uint8)
        nibbles[:, : rows.shape[1]] = levels
        return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)

    def decode(self, codes: Codes) -> Floats:
        """The levels of codes, [N, D]; not renormalised."""
        low, step = self._low_and_step()
        if self.bits == 8:
            levels = codes.astype(np.float64) + 128
        else:
            pairs = np.stack([codes & 15, codes >> 4], axis=2)
            levels = pairs.reshape(len(codes), 2 * self.width)[:, : len(low)].astype(np.float64)
        return (low + levels * step).astype(np.float32)

    def _low_and_step(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        return low, (high - low) / (2**self.bits - 1)


@dataclass(frozen=True, eq=False)
class BinaryCode:
    """Signs, eight a byte, first dimension in the highest bit (`np.packbits`).

    Attributes:
        dims: how many signs.
        low, high: [D], the values of the bits 0 and 1, if the mean was subtracted before the signs
            were taken. (low + high) / 2 is that mean. None stands for -1 / sqrt(D) and 1 / sqrt(D).
    """

    dims: int
    low: Floats | None = None
    high: Floats | None = None

    @property
    def dtype(self) -> npt.DTypeLike:
        """The dtype of a stored vector's items."""
        return np.uint8

    @property
    def width(self) -> int:
        """How many items a stored vector has."""
        return -(-self.dims // 8)

    def encode(self, rows: Floats) -> Codes:
        """1 for values above zero, or above the mean; [N, width]."""
        return np.packbits(rows > self.threshold, axis=1)

    def decode(self, codes: Codes) -> Floats:
        """The values of the bits, [N, D]."""
        bits = np.unpackbits(codes, axis=1, count=self.dims)
        if self.low is not None and self.high is not None:
            return np.where(bits == 1, self.high, self.low)
        unit: Floats = (bits.astype(np.float32) * 2 - 1) / np.sqrt(np.float32(self.dims))
        return unit

    @property
    def threshold(self) -> Floats:
        """[D], the values above which a bit is 1."""
        if self.low is None or self.high is None:
            return np.zeros(self.dims, np.float32)
        middle: Floats = (self.low + self.high) / np.float32(2)
        return middle


@dataclass(frozen=True, eq=False)
class RaBitQ:
    """B bits a dimension and one factor a vector, which estimate dot products without bias.

    Let r = z - centre. The code g is a point of the grid {-(2^B - 1) / 2, ..., (2^B - 1) / 2}^D,
    the closest to r in direction. For one bit it has the signs of r (Gao and Long 2024,
    arXiv:2405.12497). For more bits it is the best over scales of the grid (Gao et al. 2025,
    arXiv:2409.09913). The factor is |r|^2 / <g, r>. Then <q, centre> + factor <q, g> estimates
    <q, z> without bias over random rotations (equation 12 of the first paper). The rotation is part
    of the projection. The factor is stored as float16 after the bits.

    Attributes:
        bits: B, 1 to 8.
        centre: [D], subtracted before coding.
    """

    bits: int
    centre: Floats

    @property
    def dtype(self) -> npt.DTypeLike:
        """The dtype of a stored vector's items."""
        return np.uint8

    @property
    def width(self) -> int:
        """How many items a stored vector has."""
        return -(-len(self.centre) * self.bits // 8) + _FACTOR_BYTES

    def encode(self, rows: Floats) -> Codes:
        """Grid points and factors, [N, width]."""
        codes = np.empty((len(rows), self.width), np.uint8)
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            residual = rows[part].astype(np.float64) - self.centre
            grid = self._closest(residual)
            levels = (grid + (2**self.bits - 1) / 2).astype(np.uint8)
            bits = np.unpackbits(levels[:, :, None], axis=2)[:, :, 8 - self.bits :]
            codes[part, :-_FACTOR_BYTES] = np.packbits(bits.reshape(len(levels), -1), axis=1)
            aligned = (grid * residual).sum(axis=1)
            squares = np.square(residual).sum(axis=1)
            factor = np.divide(squares, aligned, out=np.zeros(len(grid)), where=aligned > 0)
            largest_float16 = float(np.finfo(np.float16).max)
            halves = np.minimum(factor, largest_float16).astype("<f2")
            codes[part, -_FACTOR_BYTES:] = halves[:, None].view(np.uint8)
        return codes

    def decode(self, codes: Codes) -> Floats:
        """The points centre + factor * g, [N, D]."""
        dims = len(self.centre)
        bits = np.unpackbits(codes[:, :-_FACTOR_BYTES], axis=1, count=dims * self.bits)
        powers = (1 << np.arange(self.bits)[::-1]).astype(np.float64)
        levels = bits.reshape(len(codes), dims, self.bits) @ powers
        factor = np.ascontiguousarray(codes[:, -_FACTOR_BYTES:]).view("<f2").astype(np.float64)
        points: Floats = (self.centre + factor * (levels - (2**self.bits - 1) / 2)).astype(
            np.float32
        )
        return points

    def _closest(self, residual: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Grid points [N, D] with the greatest cosine to their residuals, over grid scales."""
        if self.bits == 1:
            return np.where(residual > 0, 0.5, -0.5)
        half = 2.0 ** (self.bits - 1)
        largest = np.abs(residual).max(axis=1, keepdims=True)
        largest = np.where(largest > 0, largest, 1.0)
        best = np.full(residual.shape, 0.5)
        best_cosine = np.full(len(residual), -np.inf)
        for share in np.linspace(0.15, 1.0, _RABITQ_SCALES):
            grid = np.floor(residual * (half / (largest * share))) + 0.5
            np.clip(grid, 0.5 - half, half - 0.5, out=grid)
            cosine = (grid * residual).sum(axis=1) / np.sqrt(np.square(grid).sum(axis=1))
            better = cosine > best_cosine
            best[better], best_cosine[better] = grid[better], cosine[better]
        return best


@dataclass(frozen=True, eq=False)
class ProductQuantizer:
    """A byte for each group of dimensions: the nearest of the group's 256 points.

    This is product quantization (Jégou et al. 2011, doi:10.1109/TPAMI.2010.57) over groups of
    unequal size. Dimensions with more variance get more bits, as in transform coding (Brandt 2010,
    doi:10.1109/CVPR.2010.5539852).

    Attributes:
        codebook: [M, 256, S]; a group of fewer than S dimensions is padded with zeros.
        places: int32 [D], the position of each dimension in a row of M * S values.
    """

    codebook: Floats
    places: npt.NDArray[np.int32]

    @property
    def dtype(self) -> npt.DTypeLike:
        """The dtype of a stored vector's items."""
        return np.uint8

    @property
    def width(self) -> int:
        """How many items a stored vector has."""
        return len(self.codebook)

    def encode(self, rows: Floats) -> Codes:
        """The nearest point of each group, [N, M]; the first of equally near points."""
        n_groups, _, size = self.codebook.shape
        codes = np.empty((len(rows), n_groups), np.uint8)
        for start in range(0, len(rows), _BLOCK_ROWS):
            part = rows[start : start + _BLOCK_ROWS].astype(np.float64)
            spread = np.zeros((len(part), n_groups * size))
            spread[:, self.places] = part
            used = np.zeros(n_groups * size, bool)
            used[self.places] = True
            for group in range(n_groups):
                distance = np.zeros((len(part), 256))
                for i in np.flatnonzero(used[group * size : (group + 1) * size]):
                    values = spread[:, group * size + i, None]
                    distance += np.square(values - self.codebook[group, :, i].astype(np.float64))
                codes[start : start + len(part), group] = distance.argmin(axis=1)
        return codes

    def decode(self, codes: Codes) -> Floats:
        """The points that codes stand for, [N, D]."""
        n_groups, _, size = self.codebook.shape
        points = self.codebook[np.arange(n_groups), codes].reshape(len(codes), n_groups * size)
        decoded: Floats = points[:, self.places]
        return decoded


def code_bytes(code: VectorCode, dims: int, bits: int = 1, n_bytes: int | None = None) -> int:
    """Bytes of one stored vector.

    Args:
        code: how it is stored.
        dims: dimensions after shortening.
        bits: bits a dimension; rabitq only.
        n_bytes: bytes of a vector; pq only, because its size does not follow from its dimensions.
    """
    if code == "pq":
        assert n_bytes is not None
        return n_bytes
    item_bits = {"float32": 32, "int8": 8, "int4": 4, "binary": 1, "rabitq": bits}[code]
    return -(-dims * item_bits // 8) + (_FACTOR_BYTES if code == "rabitq" else 0)
