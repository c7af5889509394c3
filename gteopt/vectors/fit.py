"""Fit a projection and a code on vectors; choices keep the most neighbours of held-out vectors.

The defaults come from benchmarks/results/vector_choices.json and vector_codes.json. Refuses to
know: torch, models, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from gteopt.config.recipe import Dims, DimsMethod, VectorCode, Vectors
from gteopt.errors import InputError
from gteopt.records.manifest import CodeTrial, Similarity
from gteopt.vectors.codebooks import fit_codebook
from gteopt.vectors.codes import code_bytes
from gteopt.vectors.search import search_vectors
from gteopt.vectors.transform import Floats, VectorTransform, checked_rows, identity_transform

_MIN_RANGE_VECTORS = 16
_FOLDS = 4
_MIN_HELD_OUT = 50
_VECTORS_PER_NEIGHBOUR = 100
_RANGE_STD = {"int8": 5.0, "int4": 2.5}
"""A range is the mean plus and minus this many standard deviations. Clipping costs int8 more than
coarse steps do. For 16 even levels, 2.5 is the best for a normal distribution (Max 1960,
doi:10.1109/TIT.1960.1057548, table II)."""
_ROTATION_STEPS = 50
_MOST_ITQ_DIMS = 1024
_ROTATED_CODES: tuple[VectorCode, ...] = ("binary", "int4")

_Way = Literal["slice", "pca", "pca rotated"]
"""How vectors are shortened; "pca rotated" is for binary and int4 codes only."""
_WAYS: dict[DimsMethod, tuple[_Way, ...]] = {
    "slice": ("slice",),
    "pca": ("pca", "pca rotated"),
    "auto": ("slice", "pca", "pca rotated"),
}
"""The ways that a method chooses among; the first of equally good ways wins."""


def fit_vector_transform(
    x: npt.ArrayLike, dims: Dims | None, vectors: Vectors, *, similarity: Similarity = "cosine"
) -> VectorTransform:
    """Fit projection and code on calibration vectors.

    PCA projects on the leading right singular vectors of `x` without subtracting the mean, because
    centring would change the cosine. Where several ways are possible, some calibration vectors are
    held out from the fit. The way that keeps the most of their nearest neighbours is chosen.

    Args:
        x: [N, F] unit rows of the model, in full dimension.
        dims: how to shorten; None keeps all F, or leaves the choice to `vectors.bytes`.
        vectors: how a vector is stored.
        similarity: "dot" for a model whose vectors keep their length; see `VectorTransform`.

    Raises:
        InputError: the model or the calibration vectors have fewer dimensions than asked for, there
            are too few vectors for the code, or no code has that many bytes.
        NumericsError: NaN or infinity in `x`.

    Example:
        >>> transform = fit(calibration_vectors, None, Vectors(bytes=48))
        >>> stored = transform.quantize(transform.project(vectors))  # uint8 [N, 48]
    """
    rows = checked_rows(x, None, "calibration vectors")
    if vectors.bytes is not None:
        return _fit_bytes(rows, vectors, vectors.bytes, similarity)
    if dims is None:
        return _coded(identity_transform(rows.shape[1], similarity=similarity), rows, vectors)
    ways = _ways(rows, dims, vectors)
    if len(ways) == 1:
        return _shortened(_Basis(rows), dims.n, ways[0], vectors, similarity)
    fits = [
        partial(_shortened, n_dims=dims.n, way=way, vectors=vectors, similarity=similarity)
        for way in ways
    ]
    kept = _neighbours_kept(rows, fits, similarity)
    best = ways[int(np.argmax(kept))]
    chosen = _shortened(_Basis(rows), dims.n, best, vectors, similarity)
    return replace(chosen, neighbours_kept=dict(zip(ways, kept, strict=True)))


def check_vector_bytes(full_dims: int, n_bytes: int) -> None:
    """Refuse a size that no code of vectors with F dimensions has.

    Every size up to F bytes has a code. Above F bytes, only float32 of all dimensions is left.

    Raises:
        InputError: no code has `n_bytes` bytes; the message names the nearest sizes.
    """
    if n_bytes > full_dims and n_bytes != 4 * full_dims:
        nearest = f"{full_dims} and {4 * full_dims}"
        if n_bytes > 4 * full_dims:
            nearest = str(4 * full_dims)
        raise InputError(
            f"vectors.bytes is {n_bytes}, but no code of vectors with {full_dims} dimensions has "
            f"that size; nearest: {nearest} bytes"
        )


class _Basis:
    """Calibration vectors and their singular value decomposition, which is computed once."""

    def __init__(self, rows: Floats) -> None:
        """Keep the vectors [N, F]."""
        self.rows = rows

    def principal(self, n_dims: int) -> VectorTransform:
        """The PCA to the `n_dims` leading dimensions; to N if there are fewer vectors than that."""
        basis = self._directions[:n_dims]
        x = self.rows.astype(np.float64)
        centred = x - x.mean(axis=0)
        variance = float(np.square(centred).sum())
        kept = float(np.square(centred @ basis.T).sum())
        return VectorTransform(
            full_dims=self.rows.shape[1],
            dims=len(basis),
            method="pca",
            explained_variance_ratio=min(1.0, kept / variance) if variance > 0 else 1.0,
            projection=basis.astype(np.float32),
        )

    @cached_property
    def _directions(self) -> npt.NDArray[np.float64]:
        """Right singular vectors [min(N, F), F] in float64."""
        basis = np.linalg.svd(self.rows.astype(np.float64), full_matrices=False)[2]
        # Signs of singular vectors are arbitrary. A fixed sign makes builds equal across LAPACKs.
        largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
        signed: npt.NDArray[np.float64] = basis * np.sign(largest)
        return signed


_Fit = Callable[[_Basis], VectorTransform]
"""Fits one way of shortening and coding on the given calibration vectors."""


def _ways(rows: Floats, dims: Dims, vectors: Vectors) -> tuple[_Way, ...]:
    """The ways that the method chooses among, if there are enough vectors for them.

    Raises:
        InputError: the model has fewer dimensions, or there are too few vectors to choose or fit.
    """
    n, full_dims = rows.shape
    if dims.n > full_dims:
        raise InputError(f"dims.n is {dims.n}, but the model's vectors have {full_dims} dimensions")
    n_held_out = len(rows[::_FOLDS])
    enough = n_held_out >= _MIN_HELD_OUT
    if dims.method == "auto" and not enough:
        raise InputError(
            f"dims.method auto needs at least {_FOLDS * _MIN_HELD_OUT} calibration texts to choose "
            f"by, found {n}; raise calibration.n_texts, or set dims.method to slice or pca"
        )
    if dims.method == "pca" and dims.n > n:
        raise InputError(
            f"a PCA to {dims.n} dimensions needs at least {dims.n} calibration texts, found {n}; "
            f"raise calibration.n_texts or lower dims.n"
        )
    ways = _WAYS[dims.method]
    if vectors.code not in _ROTATED_CODES:
        ways = tuple(way for way in ways if way != "pca rotated")
    # The first way is taken if there are too few vectors to compare ways on held-out ones.
    return ways if enough and dims.n <= n - n_held_out else ways[:1]


def _shortened(
    basis: _Basis,
    n_dims: int,
    way: _Way,
    vectors: Vectors,
    similarity: Similarity = "cosine",
) -> VectorTransform:
    """The transform that shortens in the given way, fitted on all vectors of `basis`."""
    if way == "slice":
        full_dims = basis.rows.shape[1]
        transform = VectorTransform(full_dims=full_dims, dims=n_dims, method="slice")
    else:
        transform = basis.principal(n_dims)
    transform = replace(transform, similarity=similarity)
    if way == "pca rotated":
        transform = _rotated(transform, basis.rows, vectors.code)
    return _coded(transform, basis.rows, vectors)


def _rotated(transform: VectorTransform, rows: Floats, code: str) -> VectorTransform:
    """The transform with rotated dimensions: for binary towards the signs, otherwise at random."""
    projection = transform.projection
    if projection is None:
        projection = np.eye(transform.dims, transform.full_dims, dtype=np.float32)
    if code == "binary":
        turn = _towards_signs(transform.project(rows))
    else:
        turn = _random_rotation(transform.dims)
    return replace(transform, projection=(turn.T @ projection).astype(np.float32), rotated=True)


def _coded(transform: VectorTransform, rows: Floats, vectors: Vectors) -> VectorTransform:
    """The transform with its code, whose ranges or centre are fitted on `rows` [N, F].

    Raises:
        InputError: too few vectors for the code.
    """
    code = vectors.code
    assert code != "auto"  # _fit_bytes fits auto and pq
    assert code != "pq"
    if code == "rabitq" and not transform.rotated:
        transform = _rotated(transform, rows, code)
    transform = replace(transform, code=code, rescore=vectors.rescore)
    if code == "float32" or (code == "binary" and not vectors.centred):
        return transform
    if len(rows) < _MIN_RANGE_VECTORS:
        fitted = "mean" if code in ("binary", "rabitq") else "ranges"
        raise InputError(
            f"{code} vectors need at least {_MIN_RANGE_VECTORS} calibration texts to fit their "
            f"{fitted}, found {len(rows)}; raise calibration.n_texts"
        )
    z = transform.project(rows).astype(np.float64)
    centre = z.mean(axis=0)
    if code == "rabitq":
        return replace(transform, bits=vectors.bits or 1, centre=centre.astype(np.float32))
    if code == "binary":
        spread = np.abs(z - centre).mean(axis=0)
    else:
        spread = _RANGE_STD[code] * z.std(axis=0)
    return replace(
        transform,
        low=(centre - spread).astype(np.float32),
        high=(centre + spread).astype(np.float32),
    )


@dataclass(frozen=True)
class _Candidate:
    """A way to shorten and code vectors to a given number of bytes."""

    method: Literal["full", "slice", "pca"]
    dims: int
    vectors: Vectors
    rotated: bool = False
    similarity: Similarity = "dot"

    def fitted(self, basis: _Basis) -> VectorTransform:
        """The transform of this candidate, fitted on all vectors of `basis`.

        Raises:
            InputError: too few vectors, or too few dimensions that vary.
        """
        if self.vectors.code == "pq":
            assert self.vectors.bytes is not None
            return _product_coded(basis, self.vectors.bytes, self.dims)
        if self.method == "pca":
            transform = replace(basis.principal(self.dims), similarity=self.similarity)
        else:
            full_dims = basis.rows.shape[1]
            transform = VectorTransform(
                full_dims=full_dims,
                dims=self.dims,
                method=self.method,
                similarity=self.similarity,
            )
        if self.rotated:
            transform = _rotated(transform, basis.rows, self.vectors.code)
        return _coded(transform, basis.rows, self.vectors)

    def trial(self, transform: VectorTransform, kept: float) -> CodeTrial:
        """The record of this candidate."""
        record = transform.record()
        names = CodeTrial.model_fields.keys() - {"neighbours_kept"}
        return CodeTrial(**{name: getattr(record, name) for name in names}, neighbours_kept=kept)


def _product_coded(basis: _Basis, n_bytes: int, most_dims: int) -> VectorTransform:
    """A product code with a PCA to the dimensions that the code gives bits to."""
    plain = replace(basis.principal(most_dims), similarity="dot")
    book = fit_codebook(plain.project(basis.rows), n_bytes)
    kept = basis.principal(int(book.dimensions.max()) + 1)
    assert plain.projection is not None
    return replace(
        kept,
        dims=len(book.dimensions),
        similarity="dot",
        projection=plain.projection[book.dimensions],
        code="pq",
        codebook=book.points,
        places=book.places,
    )


def _candidates(n_bytes: int, full_dims: int, n_fitted: int, vectors: Vectors) -> list[_Candidate]:
    """Candidates of `n_bytes` for vectors of F dimensions, if `n_fitted` vectors are fitted on."""
    most_dims = min(full_dims, n_fitted)
    product = _Candidate("pca", min(8 * n_bytes, most_dims), Vectors(code="pq", bytes=n_bytes))
    candidates = [product] if n_bytes <= most_dims else []
    if vectors.code == "pq":
        return candidates
    dims_of: dict[VectorCode, int] = {"int8": n_bytes, "int4": 2 * n_bytes, "binary": 8 * n_bytes}
    if n_bytes % 4 == 0:
        dims_of["float32"] = n_bytes // 4
    for code, dims in dims_of.items():
        plain = Vectors(code=code, rescore=vectors.rescore)
        if dims == full_dims:
            candidates.append(_Candidate("full", dims, plain, similarity="cosine"))
        elif dims < full_dims:
            candidates.append(_Candidate("slice", dims, plain, similarity="cosine"))
        if code == "binary" and dims <= full_dims:
            centred = plain.model_copy(update={"centred": True})
            method = candidates[-1].method
            candidates.append(_Candidate(method, dims, centred, similarity="cosine"))
        if dims <= most_dims and (code != "float32" or dims < full_dims):
            candidates += [_Candidate("pca", dims, plain, similarity=s) for s in ("dot", "cosine")]
            if code in _ROTATED_CODES and (code != "binary" or dims <= _MOST_ITQ_DIMS):
                candidates.append(_Candidate("pca", dims, plain, rotated=True))
    for bits in range(1, 9):
        # Two of the bytes hold the factor. A size that leaves over a tenth of the bytes unused is
        # no candidate.
        dims = min(8 * (n_bytes - 2) // bits, most_dims)
        if dims >= bits and code_bytes("rabitq", dims, bits) >= 0.9 * n_bytes:
            candidates.append(
                _Candidate("pca", dims, Vectors(code="rabitq", bits=bits), rotated=True)
            )
    return candidates


def _fit_bytes(
    rows: Floats, vectors: Vectors, n_bytes: int, similarity: Similarity
) -> VectorTransform:
    """The candidate of `n_bytes` that keeps the most neighbours of held-out vectors.

    Raises:
        InputError: too few vectors to choose by, or no code has that many bytes.
    """
    n, full_dims = rows.shape
    check_vector_bytes(full_dims, n_bytes)
    if n_bytes == 4 * full_dims:
        return identity_transform(full_dims, similarity=similarity)
    n_held_out = len(rows[::_FOLDS])
    if n_held_out < _MIN_HELD_OUT:
        raise InputError(
            f"vectors.bytes needs at least {_FOLDS * _MIN_HELD_OUT} calibration texts to choose "
            f"by, found {n}; raise calibration.n_texts"
        )
    candidates = _candidates(n_bytes, full_dims, n - n_held_out, vectors)
    if similarity == "dot":  # lengths matter, so no candidate normalises them away
        dots = (replace(candidate, similarity=similarity) for candidate in candidates)
        candidates = list(dict.fromkeys(dots))
    kept = _neighbours_kept(rows, [candidate.fitted for candidate in candidates], similarity)
    if not candidates or max(kept) < 0:
        raise InputError(
            f"vectors.bytes is {n_bytes}, but {n} calibration texts are too few or too much "
            f"alike for a code of {n_bytes} bytes. It needs at least as many texts as bytes, and "
            f"as many dimensions that differ between texts; raise calibration.n_texts or lower "
            f"vectors.bytes"
        )
    basis = _Basis(rows)
    order = [int(i) for i in np.argsort([-share for share in kept], kind="stable") if kept[i] >= 0]
    best = candidates[order[0]].fitted(basis)
    trials = tuple(
        candidates[i].trial(best if i == order[0] else candidates[i].fitted(basis), kept[i])
        for i in order
    )
    return replace(best, trials=trials)


def _towards_signs(z: Floats) -> npt.NDArray[np.float64]:
    """The orthogonal matrix R [D, D] that brings z R close to its signs.

    Iterative quantization (ITQ, Gong and Lazebnik 2011, section 3.2), from a seeded random
    rotation. Two steps alternate: B = sign(z R), then the R nearest to it (Procrustes: z' B = U S
    V' gives R = U V'). |B - z R|^2 falls at each step. As in the PCA, the mean is not subtracted.

    Args:
        z: [N, D] projected vectors.
    """
    rows = z.astype(np.float64)
    turn = _random_rotation(rows.shape[1])
    for _ in range(_ROTATION_STEPS):
        signs = np.where(rows @ turn > 0, 1.0, -1.0)
        left, _, right = np.linalg.svd(rows.T @ signs)
        turn = left @ right
    return turn


def _random_rotation(n_dims: int) -> npt.NDArray[np.float64]:
    """A seeded random orthogonal matrix [D, D]."""
    seed = np.random.default_rng(0).normal(size=(n_dims, n_dims))
    turn: npt.NDArray[np.float64] = np.linalg.qr(seed)[0]
    return turn


def _neighbours_kept(rows: Floats, fits: Sequence[_Fit], similarity: Similarity) -> list[float]:
    """Share of the nearest neighbours of held-out vectors that each fit keeps; -1 if a fit failed.

    Each quarter of the vectors is held out in turn, and the fit uses the other three. The quarter
    is searched in itself, with stored codes and rescoring. One neighbour counts for every hundred
    vectors, the same share as ten of a thousand. A larger share would favour codes that are too
    coarse.
    """
    kept: list[list[float]] = [[] for _ in fits]
    exact = identity_transform(rows.shape[1], similarity=similarity)
    for start in range(_FOLDS):
        held_out = rows[start::_FOLDS]
        basis = _Basis(np.delete(rows, np.s_[start::_FOLDS], axis=0))
        k = max(1, round(len(held_out) / _VECTORS_PER_NEIGHBOUR))
        wanted = _nearest_others(exact, held_out, k)
        for shares, fitted in zip(kept, fits, strict=True):
            try:
                nearest = _nearest_others(fitted(basis), held_out, k)
            except InputError:  # too few dimensions vary for this candidate
                shares.append(-np.inf)
                continue
            pairs = zip(nearest, wanted, strict=True)
            shares += [len(np.intersect1d(a, b)) / k for a, b in pairs]
    return [max(-1.0, float(np.mean(shares))) for shares in kept]


def _nearest_others(transform: VectorTransform, rows: Floats, k: int) -> list[npt.NDArray[np.intp]]:
    """The k nearest other rows of each of `rows` [N, F], by their stored codes."""
    z = transform.project(rows)
    nearest, _ = search_vectors(transform, z, transform.quantize(z), k + 1)
    return [neighbours[neighbours != i][:k] for i, neighbours in enumerate(nearest)]
