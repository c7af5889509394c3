"""Fit a projection and code ranges on vectors, judged by the neighbours that held-out vectors keep.

Refuses to know: torch, models, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from gteopt.config.recipe import Dims, DimsMethod, Vectors
from gteopt.errors import InputError
from gteopt.vectors.search import search
from gteopt.vectors.transform import Floats, VectorTransform, _rows, identity

_MIN_RANGE_VECTORS = 16
_FOLDS = 4
_MIN_HELD_OUT = 50
_VECTORS_PER_NEIGHBOUR = 100
_RANGE_STD = 5.0
_ROTATION_STEPS = 50

_Way = Literal["slice", "pca", "pca rotated"]
"""How vectors are shortened; the last one for binary codes only."""
_WAYS: dict[DimsMethod, tuple[_Way, ...]] = {
    "slice": ("slice",),
    "pca": ("pca", "pca rotated"),
    "auto": ("slice", "pca", "pca rotated"),
}
"""What a method chooses among; of equals the first one."""


def fit(x: npt.ArrayLike, dims: Dims | None, vectors: Vectors) -> VectorTransform:
    """Fit projection and code ranges on calibration vectors.

    PCA projects on the leading right singular vectors of `x` as it is, not mean-centred. int8
    ranges are the mean -+ 5 standard deviations of each dimension. binary keeps signs; before, the
    dimensions of a PCA are turned so that signs keep more of them (see `_rotation`), if they then
    do. What there is to choose is chosen by the neighbours of calibration vectors held out from the
    fit.

    These choices were measured as the share of the 10 nearest neighbours of the float vectors that
    remain, on Cranfield (225 queries, 1400 documents) | Banking77 (300 queries, 4000 texts), with
    all-MiniLM-L6-v2 fitted on 1500 STS-B sentences and, where named, gte-nano on 1500 of STS-B in
    four languages and Banking77:

    - PCA to 128 dimensions 0.740|0.825, mean-centred 0.737|0.825, slice 0.679|0.831; nDCG@10 on
      Cranfield 0.383, 0.382, 0.364 (0.395 in full). Centring alone, with no dimension dropped,
      loses 4|2 % of the neighbours: it changes what the cosine measures.
    - PCA needs many times as many texts as dimensions, above all on a Matryoshka model: gte-nano
      to 128 by PCA on 256 texts 0.610|0.870, on 1500 texts 0.664|0.896, slice 0.651|0.886.
    - int8 of a PCA to 128 fitted on 256 texts: range from min to max 0.912|0.925, mean -+ 4
      standard deviations 0.961|0.972, -+ 5 0.985|0.987, -+ 6 0.984|0.987. Uncut vectors keep
      0.995|0.994 with -+ 5; 16 texts are enough for 0.992|0.994.
    - binary with `rescore` 4, threshold zero 0.727|0.830, calibration median 0.719|0.829; gte-nano
      0.473|0.742, 0.465|0.731. Decoding a bit to the mean of its side instead of +-1 gives
      0.728|0.828; gte-nano 0.450|0.733. A random rotation before taking signs changes the share by
      -0.023 to 0.012 in full dimension, by down to -0.085 after slicing or PCA.
    - binary by codes alone | with `rescore` 4, fitted on every second text of a collection, its
      queries searched among the others. Cranfield, all-MiniLM-L6-v2 to 128: slice 0.410|0.509, PCA
      0.338|0.494, turned 0.539|0.627; to 64 0.267|0.359, 0.340|0.478, 0.450|0.541; gte-nano to 128
      0.255|0.342, 0.219|0.352, 0.301|0.398; to 64 0.154|0.205, 0.215|0.324, 0.240|0.303. Banking77,
      all-MiniLM-L6-v2 to 128 0.471|0.552, 0.415|0.538, 0.568|0.647; gte-nano 0.461|0.554,
      0.338|0.472, 0.540|0.607. In 32 dimensions turning changes the share by -0.031 to 0.026, and
      in any by -0.031 to 0.031 where it is fitted on other texts (STS-B, the builtin ones).
    - a projection learned from the PCA's (Adam, 600 steps, squared error of cosines and the
      divergence of their softmax, 1332 texts) keeps 0.005 less to 0.006 more than the PCA on
      Cranfield with all-MiniLM-L6-v2 in 192, 96 and 48 dimensions: no method of its own. On every
      second text of a collection, its queries searched among the others, the PCA keeps 0.936,
      0.846, 0.744 of Cranfield (slice 0.766, 0.624, 0.442) and a projection learned there, from 700
      texts, 0.936, 0.842, 0.751; of Banking77, from 2000 texts, 0.960, 0.888, 0.763 (slice 0.799,
      0.685, 0.524) and 0.961, 0.905, 0.791. It begins to pay with some thousand texts.

    Args:
        x: [N, F] unit rows of the model, in full dimension.
        dims: how to shorten; None keeps all F.
        vectors: how a vector is stored.

    Raises:
        InputError: more dimensions than the model or the calibration vectors have, or too few
            vectors to fit int8 ranges on.
        NumericsError: NaN or infinity in `x`.
    """
    rows = _rows(x, None, "calibration vectors")
    if dims is None:
        return _coded(identity(rows.shape[1]), rows, vectors)
    ways = _ways(rows, dims, vectors)
    if len(ways) == 1:
        return _shortened(rows, dims.n, ways[0], vectors)
    kept = _neighbours_kept(rows, dims.n, ways, vectors)
    best = max(ways, key=lambda way: kept[way])
    return replace(_shortened(rows, dims.n, best, vectors), neighbours_kept=kept)


def _ways(rows: Floats, dims: Dims, vectors: Vectors) -> tuple[_Way, ...]:
    """What the method chooses among, as far as there are vectors to fit it on.

    Raises:
        InputError: more dimensions than there are, or too few vectors to choose by or to fit on.
    """
    n, full_dims = rows.shape
    if dims.n > full_dims:
        raise InputError(f"dims.n is {dims.n}, but the model's vectors have {full_dims} dimensions")
    n_held_out = len(rows[::_FOLDS])
    enough = n_held_out >= _MIN_HELD_OUT
    if dims.method == "auto" and not enough:
        raise InputError(
            f"dims.method auto needs at least {_FOLDS * _MIN_HELD_OUT} calibration texts to choose "
            f"by, found {n}; raise calibration.n_texts, or say slice or pca"
        )
    if dims.method == "pca" and dims.n > n:
        raise InputError(
            f"a PCA to {dims.n} dimensions needs at least {dims.n} calibration texts, found {n}; "
            f"raise calibration.n_texts or lower dims.n"
        )
    ways = _WAYS[dims.method]
    if vectors.code != "binary":
        ways = tuple(way for way in ways if way != "pca rotated")
    # What cannot be tried on vectors held out is not chosen.
    return ways if enough and dims.n <= n - n_held_out else ways[:1]


def _shortened(rows: Floats, n_dims: int, way: _Way, vectors: Vectors) -> VectorTransform:
    """The transform fitted on all of `rows` [N, F], nothing left to choose."""
    if way == "slice":
        transform = VectorTransform(full_dims=rows.shape[1], dims=n_dims, method="slice")
    else:
        transform = _principal(rows, n_dims)
    if way == "pca rotated":
        assert transform.projection is not None
        turn = _rotation(transform.project(rows))
        projection = (turn.T @ transform.projection).astype(np.float32)
        transform = replace(transform, projection=projection, rotated=True)
    return _coded(transform, rows, vectors)


def _coded(transform: VectorTransform, rows: Floats, vectors: Vectors) -> VectorTransform:
    """The transform with its code; int8 ranges are fitted on `rows` [N, F]."""
    transform = replace(transform, code=vectors.code, rescore=vectors.rescore)
    if vectors.code != "int8":
        return transform
    if len(rows) < _MIN_RANGE_VECTORS:
        raise InputError(
            f"int8 vectors need at least {_MIN_RANGE_VECTORS} calibration texts to fit their "
            f"ranges on, found {len(rows)}; raise calibration.n_texts"
        )
    z = transform.project(rows).astype(np.float64)
    centre, spread = z.mean(axis=0), _RANGE_STD * z.std(axis=0)
    return replace(
        transform,
        low=(centre - spread).astype(np.float32),
        high=(centre + spread).astype(np.float32),
    )


def _principal(rows: Floats, n_dims: int) -> VectorTransform:
    """PCA by a float64 singular value decomposition of `rows` [N, F]."""
    x = rows.astype(np.float64)
    basis = np.linalg.svd(x, full_matrices=False)[2][:n_dims]
    # The sign of a singular vector is arbitrary; fixing it keeps builds equal across LAPACKs.
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    basis = basis * np.sign(largest)
    centred = x - x.mean(axis=0)
    variance = float(np.square(centred).sum())
    kept = float(np.square(centred @ basis.T).sum())
    return VectorTransform(
        full_dims=rows.shape[1],
        dims=n_dims,
        method="pca",
        explained_variance_ratio=min(1.0, kept / variance) if variance > 0 else 1.0,
        projection=basis.astype(np.float32),
    )


def _rotation(z: Floats) -> npt.NDArray[np.float64]:
    """The orthogonal R [D, D] for which z R lies close to the signs that are kept of it.

    Iterative quantization (ITQ, Gong and Lazebnik 2011, section 3.2), from a seeded random
    rotation: B = sign(z R), then the R nearest to it (Procrustes: of z' B = U S V', R = U V'), in
    turn. |B - z R|^2 falls at each step. Vectors are not mean-centred, as in the PCA before.

    Args:
        z: [N, D] projected vectors.
    """
    rows = z.astype(np.float64)
    seed = np.random.default_rng(0).normal(size=(rows.shape[1], rows.shape[1]))
    turn: npt.NDArray[np.float64] = np.linalg.qr(seed)[0]
    for _ in range(_ROTATION_STEPS):
        signs = np.where(rows @ turn > 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(rows.T @ signs)
        turn = left @ right
    return turn


def _neighbours_kept(
    rows: Floats, n_dims: int, ways: Sequence[_Way], vectors: Vectors
) -> dict[str, float]:
    """Share of nearest neighbours that each way keeps of vectors that it has not seen.

    Each quarter of the vectors is searched among itself, as it will be stored and rescored, by what
    was fitted on the others. One neighbour of a hundred vectors counts, as ten of a thousand do in
    a search: how ten lie among a hundred is told by what is too coarse for that. With ten, turning
    a PCA to 32 dimensions seemed to keep 0.2 to 0.3 more of Banking77, where it keeps 0.03 less;
    with one the best way of the three was chosen in all of 16 trials, on texts of the same kind.
    (1500 vectors of 3584 dimensions, binary to 256: 44 s on one core for all three ways.)
    """
    kept: dict[str, list[float]] = {way: [] for way in ways}
    for start in range(_FOLDS):
        held_out = rows[start::_FOLDS]
        others = np.delete(rows, np.s_[start::_FOLDS], axis=0)
        k = max(1, round(len(held_out) / _VECTORS_PER_NEIGHBOUR))
        wanted = _nearest_others(identity(rows.shape[1]), held_out, k)
        for way in ways:
            found = _nearest_others(_shortened(others, n_dims, way, vectors), held_out, k)
            pairs = zip(found, wanted, strict=True)
            kept[way] += [len(np.intersect1d(a, b)) / k for a, b in pairs]
    return {way: float(np.mean(shares)) for way, shares in kept.items()}


def _nearest_others(transform: VectorTransform, rows: Floats, k: int) -> list[npt.NDArray[np.intp]]:
    """The k nearest of each of `rows` [N, F] among the others, by what is stored of them."""
    z = transform.project(rows)
    found, _ = search(transform, z, transform.quantize(z), k + 1)
    return [each[each != i][:k] for i, each in enumerate(found)]
