"""Fit the codebook of a product code on few texts: dimensions with more variance get more bits.

The dimensions of a PCA hardly depend on one another and are close to normally distributed. A byte's
256 points are therefore placed for a normal distribution, and then moved by the calibration
vectors. The distribution has the measured mean and variance of each dimension, which a few hundred
texts determine. k-means alone needs about 39 texts for each point, which is 10,000 texts in all.

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
"""The next wider code of each width. 5 to 7 bits are left out, because the rest of their byte would
be unused."""
_BYTE = 8
_N_DRAWN = 4096
_LLOYD_STEPS = 10


@dataclass(frozen=True)
class Codebook:
    """The points of a product code, and the dimensions that the code keeps.

    Attributes:
        dimensions: [D], which of the P dimensions get bits, in ascending order.
        points: float32 [M, 256, S].
        places: int32 [D], the position of each kept dimension in a row of M * S values.
    """

    dimensions: npt.NDArray[np.intp]
    points: npt.NDArray[np.float32]
    places: npt.NDArray[np.int32]


def fit_codebook(z: npt.NDArray[np.float32], n_bytes: int) -> Codebook:
    """Allot bits to dimensions, group dimensions into bytes, and place each byte's points.

    Args:
        z: [N, P] calibration vectors on uncorrelated dimensions (a PCA's), not renormalised.
        n_bytes: M, the bytes of one code.

    Raises:
        InputError: fewer dimensions vary than a code has bytes.
    """
    rows = z.astype(np.float64)
    mean, std = rows.mean(axis=0), rows.std(axis=0)
    # Variation below float32's precision counts as zero.
    std[std < 1e-6 * np.sqrt(np.square(rows).sum(axis=1).mean())] = 0
    variance, spread = np.square(std), std.sum()
    # An error e in a dimension moves a score by q e, so squared errors are weighted by E[q^2].
    # Many models' vectors lie in a narrow cone: queries and documents share a large mean. The rest
    # of a query only resembles the documents. Its energy is spread by their standard deviation,
    # which is half way between their variance and equal weights.
    weight = np.square(mean) + std * (variance.sum() / spread if spread > 0 else 0.0)
    value = variance * weight
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
    """Bits [D] with the least sum of value * distortion.

    The bits are allotted one by one, each to the dimension that gains most from it.

    The best scalar quantizer for a normal distribution gives the distortions (Max 1960,
    doi:10.1109/TIT.1960.1057548).

    Args:
        value: [D], the variance of a dimension times the weight of its error.
        n_bits: in all; fewer are used if no bit gains anything.
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
        n_bits -= (
            1  # the widths do not fit into the bytes; the loop below spends the bits left over
        )
    while len(groups) < n_bytes:  # split the byte that most dimensions share
        fullest = max(range(len(groups)), key=lambda i: len(groups[i]))
        groups.append(groups[fullest][1:])
        groups[fullest] = groups[fullest][:1]
    for group in groups:
        while (free_bits := _BYTE - int(bits[group].sum())) > 0:
            steps = [
                (value[d] * _gain(int(bits[d])), d)
                for d in group
                if int(bits[d]) in _MORE_BITS and _MORE_BITS[int(bits[d])] - bits[d] <= free_bits
            ]
            if not steps:
                break
            widest = max(steps)[1]
            bits[widest] = _MORE_BITS[int(bits[widest])]
    return bits, groups


def _first_fit(bits: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """Dimensions grouped into bytes, widest first, each in the first byte with enough free bits."""
    groups: list[list[int]] = []
    free_bits: list[int] = []
    for dimension in np.argsort(-bits, kind="stable"):
        width = int(bits[dimension])
        if width == 0:
            break
        index = next((i for i, free in enumerate(free_bits) if free >= width), len(groups))
        if index == len(groups):
            groups.append([])
            free_bits.append(_BYTE)
        groups[index].append(int(dimension))
        free_bits[index] -= width
    return [np.array(group, np.intp) for group in groups]


def _points(rows: Doubles, bits: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    """256 points [256, S] for dimensions [N, S] that share a byte.

    Lloyd's algorithm starts at the grid of the levels of each dimension. Its data are seeded draws
    from the normal distribution, and the vectors. A point that is nearest to no vector stays.
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
    # Fewer than 8 bits have fewer than 256 points. Encoding takes the first of equal points.
    fill = np.repeat(points[-1:], 2**_BYTE - len(points), axis=0)
    return np.concatenate([points, fill]).astype(np.float32)


@lru_cache
def normal_levels(bits: int) -> Doubles:
    """The 2^bits levels [L] of the scalar quantizer with the least squared error on N(0, 1).

    Lloyd-Max: each level is the mean of the values that it is nearest to. The start is quantiles of
    N(0, 3), whose density is the cube root of the normal density. That is the best for many levels
    (Panter and Dite 1951, doi:10.1109/JRPROC.1951.230419).
    """
    from scipy.stats import norm  # the import takes most of a second, and only fitting needs it

    n = 2**bits
    levels: Doubles = np.sqrt(3) * norm.ppf((np.arange(n) + 0.5) / n)
    for _ in range(200):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        share = np.diff(norm.cdf(edges))
        levels = -np.diff(norm.pdf(edges)) / share
    return levels


@lru_cache
def normal_distortion(bits: int) -> float:
    """Mean squared error of `normal_levels` on N(0, 1); 1 for no bits."""
    from scipy.stats import norm

    levels = normal_levels(bits)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    share, first_moment = np.diff(norm.cdf(edges)), -np.diff(norm.pdf(edges))
    return float(1 - 2 * levels @ first_moment + share @ np.square(levels))


def _gain(bits: int) -> float:
    """How much a further bit reduces distortion, on average up to the next width."""
    if bits not in _MORE_BITS:
        return 0.0
    wider = _MORE_BITS[bits]
    return (normal_distortion(bits) - normal_distortion(wider)) / (wider - bits)
