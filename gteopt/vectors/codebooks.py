"""Codebooks of product quantization that few texts can fit: bits go where variance is.

The dimensions of a PCA hardly depend on one another and are close to normally distributed. So a
byte's 256 points are placed for the normal distribution with each dimension's measured mean and
variance, and moved by the calibration vectors. Two numbers a dimension take a few hundred texts,
while k-means alone wants some 39 a point (10,000 texts).

Refuses to know: projections, how codes are searched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gteopt.errors import InputError

Doubles = npt.NDArray[np.float64]

_MORE_BITS = {0: 1, 1: 2, 2: 3, 3: 4, 4: 8}
"""Widths that fill bytes: two of 4 bits, or one alone. Of 5 to 7 bits the rest would lie idle."""
_BYTE = 8
_N_DRAWN = 4096
_LLOYD_STEPS = 10


@dataclass(frozen=True)
class Codebook:
    """What `ProductQuantizer` needs.

    Attributes:
        dimensions: [D] of the given dimensions, those that get bits, in order.
        points: float32 [M, 256, S].
        places: int32 [D], where in a row of M * S values each of `dimensions` stands.
    """

    dimensions: npt.NDArray[np.intp]
    points: npt.NDArray[np.float32]
    places: npt.NDArray[np.int32]


def fit_codebook(z: npt.NDArray[np.float32], n_bytes: int) -> Codebook:
    """Allot bits to dimensions, put dimensions together to bytes, and place each byte's points.

    Args:
        z: [N, P] calibration vectors on uncorrelated dimensions (a PCA's), not renormalised.
        n_bytes: M, of a code.

    Raises:
        InputError: so few dimensions vary that they cannot fill the bytes.
    """
    rows = z.astype(np.float64)
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    # What varies less than float32 can tell apart does not vary.
    std[std < 1e-6 * np.sqrt(np.square(rows).sum(axis=1).mean())] = 0
    variance, spread = np.square(std), std.sum()
    # An error e in a dimension moves scores by q e, so squared errors count by E[q^2]. The mean is
    # what queries and documents share: in a narrow cone nearly all of a query. Of the rest, queries
    # are only like the documents, so their energy is spread by its square root, half way between
    # counting errors by the documents' variance and counting all alike.
    counts = np.square(mean) + std * (variance.sum() / spread if spread > 0 else 0.0)
    value = variance * counts
    if np.count_nonzero(value) < n_bytes:
        raise InputError(
            f"a product code of {n_bytes} bytes needs at least {n_bytes} dimensions that vary, "
            f"found {np.count_nonzero(value)} in {len(rows)} calibration vectors of {z.shape[1]} "
            f"dimensions; take fewer bytes or more texts"
        )
    bits, groups = _bytes_of(value, n_bytes)
    size = max(map(len, groups))
    points = np.zeros((n_bytes, 2**_BYTE, size), np.float32)
    place = np.full(len(value), -1, np.int32)
    for index, group in enumerate(groups):
        points[index, :, : len(group)] = _points(rows[:, group], bits[group])
        place[group] = index * size + np.arange(len(group))
    dimensions = np.flatnonzero(place >= 0)
    return Codebook(dimensions, points, place[dimensions])


def allot_bits(value: Doubles, n_bits: int) -> npt.NDArray[np.intp]:
    """Bits [D] that leave the least sum of value * distortion: the next bit where it pays most.

    Distortions are those of the best scalar quantizer for a normal distribution (Max 1960,
    doi:10.1109/TIT.1960.1057548).

    Args:
        value: [D], the variance of a dimension times what its error counts.
        n_bits: in all; fewer are given where nothing pays.
    """
    bits = np.zeros(len(value), np.intp)
    gain = value * _gain(0)
    left = n_bits
    while left > 0 and gain.max(initial=0) > 0:
        best = int(gain.argmax())
        wider = _MORE_BITS[int(bits[best])]
        if wider - bits[best] > left:
            gain[best] = 0
            continue
        left -= wider - int(bits[best])
        bits[best] = wider
        gain[best] = value[best] * _gain(wider)
    return bits


def _bytes_of(
    value: Doubles, n_bytes: int
) -> tuple[npt.NDArray[np.intp], list[npt.NDArray[np.intp]]]:
    """Bits [D], and the dimensions of each of `n_bytes` bytes."""
    n_bits = _BYTE * n_bytes
    while True:
        bits = allot_bits(value, n_bits)
        groups = _first_fit(bits)
        if len(groups) <= n_bytes:
            break
        n_bits -= 1  # widths that do not fit together: fewer bits, and what is left is spent below
    while len(groups) < n_bytes:  # all have 8 bits but those that share: part the fullest
        fullest = max(range(len(groups)), key=lambda i: len(groups[i]))
        groups.append(groups[fullest][1:])
        groups[fullest] = groups[fullest][:1]
    for group in groups:
        while (room := _BYTE - int(bits[group].sum())) > 0:
            steps = [
                (value[d] * _gain(int(bits[d])), d)
                for d in group
                if int(bits[d]) in _MORE_BITS and _MORE_BITS[int(bits[d])] - bits[d] <= room
            ]
            if not steps:
                break
            widest = max(steps)[1]
            bits[widest] = _MORE_BITS[int(bits[widest])]
    return bits, groups


def _first_fit(bits: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """Dimensions put together to bytes, widest first, each into the first byte that has room."""
    groups: list[list[int]] = []
    room: list[int] = []
    for dimension in np.argsort(-bits, kind="stable"):
        width = int(bits[dimension])
        if width == 0:
            break
        index = next((i for i, free in enumerate(room) if free >= width), len(groups))
        if index == len(groups):
            groups.append([])
            room.append(_BYTE)
        groups[index].append(int(dimension))
        room[index] -= width
    return [np.array(group, np.intp) for group in groups]


def _points(rows: Doubles, bits: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    """256 points [256, S] for dimensions [N, S] that share a byte.

    Lloyd's algorithm on seeded draws from the normal distribution and the vectors themselves, from
    the grid of each dimension's own levels. A point that none is nearest to stays.
    """
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    levels = [normal_levels(int(b)) * s + m for b, s, m in zip(bits, std, mean, strict=True)]
    points = np.stack([axis.ravel() for axis in np.meshgrid(*levels, indexing="ij")], axis=1)
    if rows.shape[1] > 1:
        drawn = np.random.default_rng(0).normal(size=(_N_DRAWN, rows.shape[1])) * std + mean
        data = np.concatenate([drawn, rows])
        narrow = data.astype(np.float32)
        for _ in range(_LLOYD_STEPS):
            c = points.astype(np.float32)
            nearest = (np.square(c).sum(axis=1) - 2 * narrow @ c.T).argmin(axis=1)
            counts = np.bincount(nearest, minlength=len(points))
            sums = np.stack(
                [np.bincount(nearest, weights=v, minlength=len(points)) for v in data.T], axis=1
            )
            used = counts > 0
            points[used] = sums[used] / counts[used, None]
    # Fewer than 256 where no width filled the byte; of equally near points the first is taken.
    fill = np.repeat(points[-1:], 2**_BYTE - len(points), axis=0)
    return np.concatenate([points, fill]).astype(np.float32)


@lru_cache
def normal_levels(bits: int) -> Doubles:
    """The 2^bits levels [L] of the scalar quantizer with the least squared error on N(0, 1).

    Lloyd-Max: each level is the mean of the values that it is nearest to. It starts from quantiles
    of N(0, 3), whose density is the cube root of the normal one: the best for many levels (Panter
    and Dite 1951, doi:10.1109/JRPROC.1951.230419).
    """
    from scipy.stats import norm  # most of a second; only where codebooks are fitted

    n = 2**bits
    levels: Doubles = np.sqrt(3) * norm.ppf((np.arange(n) + 0.5) / n)
    for _ in range(200):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        share = np.diff(norm.cdf(edges))
        levels = -np.diff(norm.pdf(edges)) / share
    return levels


@lru_cache
def distortion(bits: int) -> float:
    """Mean squared error of `normal_levels` on N(0, 1); 1 without bits."""
    from scipy.stats import norm

    levels = normal_levels(bits)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    share, first_moment = np.diff(norm.cdf(edges)), -np.diff(norm.pdf(edges))
    return float(1 - 2 * levels @ first_moment + share @ np.square(levels))


def _gain(bits: int) -> float:
    """How much less distortion a further bit leaves, on average up to the next width."""
    if bits not in _MORE_BITS:
        return 0.0
    wider = _MORE_BITS[bits]
    return (distortion(bits) - distortion(wider)) / (wider - bits)
