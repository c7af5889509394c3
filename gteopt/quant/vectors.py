"""What happens to an embedding after the model: shorten it, code it, search the codes.

Hides: how projections and code ranges are fitted, stored and applied, how codes are searched.
Refuses to know: torch, models, files.

Everything that depends on data is fitted once, on calibration vectors, and stored; coding a vector
never looks at the other vectors of its batch. (sentence-transformers' `quantize_embeddings` takes
its int8 ranges from the batch at hand unless given others, so that queries and documents get
different maps; it floors, which decodes half a step low; and until its pull request 3847 it cast
to int8 without clipping, so that a value just above the range came out as the most negative one.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gteopt.errors import InputError, IntegrityError, NumericsError, join_problems
from gteopt.recipe import Dims, DimsMethod, VectorCode, Vectors
from gteopt.records import VectorRecord

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]
"""float32 [N, D], int8 [N, D] or uint8 [N, ceil(D / 8)], as `VectorTransform.code` says."""
Products = Callable[[Floats], Callable[[Floats], Floats]]
"""Takes stored vectors [N, D] and gives what multiplies queries [Q, D] with them to [Q, N], summed
in float32 or better: where that is done, and how."""

_MIN_RANGE_VECTORS = 16
_FOLDS = 4
_MIN_HELD_OUT = 50
_VECTORS_PER_NEIGHBOUR = 100
_RANGE_STD = 5.0
_ROTATION_STEPS = 50
_BLOCK_SCORES = 1 << 22
_BLOCK_VECTORS = 1 << 14
_BLOCK_PAIRS = 1 << 7  # a few megabytes in float64, which a core's cache holds
# A pair takes as long by itself as this many do in a float64 matrix product (about 20 on one core).
_PAIR_COST = 32

_Way = Literal["slice", "pca", "pca rotated"]
"""How vectors are shortened; the last one for binary codes only."""
_WAYS: dict[DimsMethod, tuple[_Way, ...]] = {
    "slice": ("slice",),
    "pca": ("pca", "pca rotated"),
    "auto": ("slice", "pca", "pca rotated"),
}
"""What a method chooses among; of equals the first one."""


@dataclass(frozen=True, eq=False)
class VectorTransform:
    """A fitted map from the model's vectors to shorter, cheaper ones. Shapes: F full, D kept dims.

    Attributes:
        rescore: `search` fetches `rescore * k` candidates by codes and reorders them.
        explained_variance_ratio: share of the calibration vectors' variance that a PCA keeps.
        rotated: whether the PCA's dimensions were turned for binary codes; cosines are the same.
        neighbours_kept: what a choice among ways to shorten was made by; None without one.
        projection: PCA only: [D, F], orthonormal rows (the weight of a linear layer F -> D).
        low, high: int8 only: [D], what the codes -128 and 127 stand for.
    """

    full_dims: int
    dims: int
    method: Literal["full", "slice", "pca"] = "full"
    code: VectorCode = "float32"
    rescore: int = 1
    explained_variance_ratio: float | None = None
    rotated: bool = False
    neighbours_kept: Mapping[str, float] | None = None
    projection: Floats | None = None
    low: Floats | None = None
    high: Floats | None = None

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of one stored code."""
        return {"float32": 4 * self.dims, "int8": self.dims, "binary": -(-self.dims // 8)}[
            self.code
        ]

    def project(self, x: npt.ArrayLike) -> Floats:
        """Shorten vectors [N, F] to unit rows [N, D].

        Sums run in float64, so that a row does not depend on the rows beside it. A row that the
        projection maps to zero stays zero.

        Raises:
            InputError: wrong shape.
            NumericsError: NaN or infinity in `x`.
        """
        z = _rows(x, self.full_dims, "vectors").astype(np.float64)
        if self.projection is None:
            z = z[:, : self.dims]
        else:
            z = z @ self.projection.T.astype(np.float64)
        norm = np.linalg.norm(z, axis=1, keepdims=True)
        return (z / np.where(norm > 0, norm, 1.0)).astype(np.float32)

    def quantize(self, z: npt.ArrayLike) -> Codes:
        """Code projected vectors [N, D] for storage.

        int8 rounds to the nearest of 256 evenly spaced values from `low` to `high`,

            code = clip(round(255 (z - low) / (high - low)) - 128, -128, 127),

        so a value out of range saturates and never wraps around. binary keeps the sign, 1 for
        positive, first dimension in the highest bit of the first byte (`np.packbits`).

        Raises:
            InputError: wrong shape.
            NumericsError: NaN or infinity in `z`.
        """
        rows = _rows(z, self.dims, "projected vectors")
        if self.code == "float32":
            return rows
        if self.code == "binary":
            return np.packbits(rows > 0, axis=1)
        low, step = self._low_and_step()
        # A dimension that was constant in calibration has no step; every value gets its one code.
        levels = np.divide(rows - low, step, out=np.zeros(rows.shape), where=step > 0)
        return (np.clip(np.rint(levels), 0, 255) - 128).astype(np.int8)

    def dequantize(self, codes: Codes) -> Floats:
        """The vectors [N, D] that codes stand for.

        float32: themselves. int8: low + (code + 128) (high - low) / 255, not renormalised.
        binary: +-1 / sqrt(D), unit rows.

        Raises:
            InputError: codes of another shape or dtype than `quantize` makes.
            NumericsError: NaN or infinity in float32 codes.
        """
        self._check_codes(codes)
        if self.code == "float32":
            return codes
        if self.code == "binary":
            signs = np.unpackbits(codes, axis=1, count=self.dims).astype(np.float32) * 2 - 1
            unit: Floats = signs / np.sqrt(np.float32(self.dims))
            return unit
        low, step = self._low_and_step()
        return (low + (codes.astype(np.float64) + 128) * step).astype(np.float32)

    def search(
        self, queries: npt.ArrayLike, codes: Codes, k: int
    ) -> tuple[npt.NDArray[np.intp], Floats]:
        """The k best stored vectors of each query, best first; ties in order of their index.

        The candidates are the `rescore * k` best by codes alone (the query is coded too): least
        Hamming distance H, as 1 - 2 H / D, for binary; largest dot product of what the codes stand
        for, for int8. They are then ordered by the dot product of the *float* query with what the
        document's code stands for (asymmetric rescoring as in BPR, Yamada et al. 2021,
        arXiv:2106.00882). With `rescore` 1, or float32 codes, the first order stays.

        Memory is bounded by blocks over queries and vectors.

        Args:
            queries: [Q, D] projected, float.
            codes: [N, D] or packed, as `quantize` made them.
            k: how many; all N where there are fewer.

        Returns:
            Indices and scores, both [Q, min(k, N)]. Scores approximate the cosine.

        Raises:
            InputError: wrong shapes, or k below 1.
            NumericsError: NaN or infinity in `queries` or float32 codes.
        """
        search = Search(self, queries, k)
        search.add(codes)
        return search.found()

    def score_pairs(self, queries: Floats, codes: Codes) -> tuple[Floats, Floats]:
        """Scores of corresponding rows: by codes alone, and as rescored; see `search`.

        Args:
            queries: [P, D] projected, float.
            codes: [P, D] or packed.

        Returns:
            Both [P]; the same twice where nothing is rescored.
        """
        self._check_codes(codes)
        if self.code == "binary":
            differing = np.bitwise_count(self.quantize(queries) ^ codes).sum(axis=1, dtype=np.int32)
            by_code = self._of_hamming(differing)
        else:
            coded = queries if self.code == "float32" else self.dequantize(self.quantize(queries))
            by_code = _paired_dot(coded, self.dequantize(codes))
        rescored = _paired_dot(queries, self.dequantize(codes)) if self._rescores else by_code
        return by_code, rescored

    def best_of(self, by_code: Floats, rescored: Floats, k: int) -> npt.NDArray[np.intp]:
        """The k best of candidates that `score_pairs` scored, [min(k, N)], as `search` has them."""
        candidates = np.argsort(-by_code, kind="stable")[: self.n_candidates(k)]
        candidates.sort()
        order = np.argsort(-rescored[candidates], kind="stable")
        best: npt.NDArray[np.intp] = candidates[order[:k]]
        return best

    def n_candidates(self, k: int) -> int:
        """How many stored vectors a search for k looks at again after the codes."""
        return k * self.rescore if self._rescores else k

    def _of_hamming(self, distances: npt.NDArray[np.int32]) -> Floats:
        """1 - 2 H / D."""
        # Rounded at once: what is compared later with scores of another block has been, too.
        return (1 - distances * np.float32(2 / self.dims)).astype(np.float32)

    @property
    def _rescores(self) -> bool:
        return self.rescore > 1 and self.code != "float32"

    def record(self) -> VectorRecord:
        """What the manifest says of this transform."""
        return VectorRecord(
            dims=self.dims,
            method=self.method,
            explained_variance_ratio=self.explained_variance_ratio,
            rotated=self.rotated,
            neighbours_kept=dict(self.neighbours_kept) if self.neighbours_kept else None,
            code=self.code,
            rescore=self.rescore,
            bytes_per_vector=self.bytes_per_vector,
        )

    def sha256(self) -> str:
        """Identifies what the transform does to vectors and to a search, to the last bit."""
        rescore = self.rescore if self.code != "float32" else 1
        about = f"{self.full_dims}:{self.dims}:{self.code}:{rescore}\n"
        digest = hashlib.sha256(about.encode())
        for name, array in sorted(self.to_tensors().items()):
            digest.update(f"{name}:{array.shape}\n".encode() + array.tobytes())
        return digest.hexdigest()

    def to_tensors(self) -> dict[str, Floats]:
        """The fitted arrays by name; empty where nothing was fitted."""
        named = {
            "projection": self.projection,
            "low": self.low,
            "high": self.high,
        }
        return {name: array for name, array in named.items() if array is not None}

    @staticmethod
    def from_tensors(
        record: VectorRecord, full_dims: int, tensors: Mapping[str, npt.NDArray[Any]]
    ) -> VectorTransform:
        """The transform that `record` and `to_tensors` describe.

        Raises:
            IntegrityError: a tensor is missing, unknown, of wrong shape or dtype, or not finite.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        if record.method == "pca":
            shapes["projection"] = (record.dims, full_dims)
        if record.code == "int8":
            shapes["low"] = shapes["high"] = (record.dims,)
        problems = [f"tensor '{name}' is missing" for name in sorted(shapes.keys() - tensors)]
        problems += [f"tensor '{name}' is unknown" for name in sorted(tensors.keys() - shapes)]
        for name in sorted(shapes.keys() & tensors.keys()):
            found = tensors[name]
            if found.shape != shapes[name] or found.dtype != np.float32:
                problems.append(
                    f"tensor '{name}' is {found.dtype} {found.shape}, must be float32 "
                    f"{shapes[name]}"
                )
            elif not np.isfinite(found).all():
                problems.append(f"tensor '{name}' holds NaN or infinity")
        if not problems and record.code == "int8" and (tensors["low"] > tensors["high"]).any():
            problems.append("tensor 'low' exceeds 'high'")
        if record.dims > full_dims or (record.method == "full" and record.dims != full_dims):
            problems.append(f"{record.dims} dimensions do not fit the model's {full_dims}")
        if problems:
            raise IntegrityError(join_problems("the vector transform is damaged", problems))
        transform = VectorTransform(
            full_dims=full_dims,
            dims=record.dims,
            method=record.method,
            code=record.code,
            rescore=record.rescore,
            explained_variance_ratio=record.explained_variance_ratio,
            rotated=record.rotated,
            neighbours_kept=record.neighbours_kept,
            **{name: tensors[name] for name in shapes},
        )
        if transform.bytes_per_vector != record.bytes_per_vector:
            raise IntegrityError(
                f"the vector transform is damaged: {record.bytes_per_vector} bytes a vector "
                f"recorded, {transform.bytes_per_vector} follow from its dimensions and code"
            )
        return transform

    def _low_and_step(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        assert self.low is not None
        assert self.high is not None
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        return low, (high - low) / 255

    def _check_codes(self, codes: Codes) -> None:
        dtype = {"float32": np.float32, "int8": np.int8, "binary": np.uint8}[self.code]
        width = self.bytes_per_vector // np.dtype(dtype).itemsize
        if codes.ndim != 2 or codes.shape[1] != width or codes.dtype != dtype:
            raise InputError(
                f"codes are {codes.dtype} {list(codes.shape)}; {self.code} vectors of {self.dims} "
                f"dimensions are {np.dtype(dtype).name} [N, {width}]"
            )
        if self.code == "float32":
            _rows(codes, width, "stored vectors")


def on_cpu(stored: Floats) -> Callable[[Floats], Floats]:
    """`Products` by numpy."""
    columns = stored.T
    return lambda queries: queries @ columns


class Search:
    """`VectorTransform.search` over stored vectors that come block by block.

    What is kept between blocks are the candidates of each query so far, so that a corpus never has
    to be in memory. How it is cut changes no result.

    Scores are sums in float64, rounded: equal vectors then score equally wherever they lie (BLAS
    orders a float32 sum by position), which keeps ties in order. Only what may be among the best is
    summed so. A float32 product in any order is within gamma_D |x| |y| of the dot product x y,
    gamma_n = n u / (1 - n u), u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms,
    2nd ed., section 3.1, and Cauchy-Schwarz), so whatever lies below the n-th best so far by more
    than that is not among the n best. 200,000 vectors of 1024 dimensions so take 200 queries 2.1 s
    on one core of an AMD EPYC with AVX-512, 3.2 s with all of them summed in float64 (k = 11);
    50,000 of 3584 dimensions 1.7 s for 2.7 s.
    """

    def __init__(
        self,
        transform: VectorTransform,
        queries: npt.ArrayLike,
        k: int,
        products: Products = on_cpu,
    ) -> None:
        """Search for the k best of each query [Q, D], projected.

        `products` decide who is looked at, and change no result.

        Raises:
            InputError: wrong shape, or k below 1.
            NumericsError: NaN or infinity.
        """
        self._queries = _rows(queries, transform.dims, "queries")
        if k < 1:
            raise InputError(f"k is {k}; a search returns at least 1 neighbour")
        self._transform = transform
        self._products = products
        self._k, self._n = k, transform.n_candidates(k)
        self._n_seen = 0
        # [Q, <= n], best first by codes, ties in order of their index.
        self._indices = np.empty((len(self._queries), 0), np.intp)
        self._scores: Floats = np.empty((len(self._queries), 0), np.float32)
        # What they are ordered by in the end.
        self._rescored: Floats = self._scores.copy()

    def add(self, codes: Codes) -> None:
        """The next stored vectors, [N, D] or packed.

        Raises:
            InputError: codes of another shape or dtype than `quantize` makes.
            NumericsError: NaN or infinity in float32 codes.
        """
        self._transform._check_codes(codes)
        for start in range(0, len(codes), _BLOCK_VECTORS):
            self._add_block(codes[start : start + _BLOCK_VECTORS])

    def found(self) -> tuple[npt.NDArray[np.intp], Floats]:
        """Indices and scores, both [Q, min(k, N)], as `VectorTransform.search` returns them."""
        indices, scores = self._indices, self._scores
        if self._transform._rescores:
            order = np.argsort(indices, axis=1)
            indices = np.take_along_axis(indices, order, axis=1)
            scores = np.take_along_axis(self._rescored, order, axis=1)
            best, scores = _top(scores, min(self._k, scores.shape[1]))
            indices = np.take_along_axis(indices, best, axis=1)
        return indices, scores

    def _add_block(self, codes: Codes) -> None:
        transform = self._transform
        more = min(self._n, self._n_seen + len(codes)) - self._scores.shape[1]
        self._indices = np.pad(self._indices, ((0, 0), (0, more)))
        self._scores = np.pad(self._scores, ((0, 0), (0, more)), constant_values=-np.inf)
        self._rescored = np.pad(self._rescored, ((0, 0), (0, more)))
        block = max(1, _BLOCK_SCORES // len(codes))
        # Once for all queries: it takes as long as a few hundred of them.
        stored = None if transform.code == "binary" else transform.dequantize(codes)
        # In a small corpus, and early in a large one, too many are among the best so far.
        product = None
        if stored is not None and 2 * _PAIR_COST * self._n < self._n_seen + len(codes):
            product, longest = self._products(stored), _norms(stored).max()
        for start in range(0, len(self._queries), block):
            coded = transform.quantize(self._queries[start : start + block])
            least = self._scores[start : start + block, -1]
            if stored is None:
                distances, found = _nearest_by_hamming(coded, codes, min(self._n, len(codes)))
                values = transform._of_hamming(distances)
            else:
                queries = transform.dequantize(coded)
                if product is None:
                    found, values = _all_scores(queries, stored)
                else:
                    error = _product_error(_norms(queries) * longest, transform.dims)
                    in_play = _in_play(product(queries), error, least, self._n)
                    found, values = _scores_of(in_play, queries, stored)
            better = np.flatnonzero(values.max(axis=1, initial=-np.inf) > least)
            found, best = found[better], values[better]
            if stored is not None:
                top, best = _top(best, min(self._n, best.shape[1]))
                found = np.take_along_axis(found, top, axis=1)
            self._merge(start + better, found, best, codes)
        self._n_seen += len(codes)

    def _merge(
        self,
        queries: npt.NDArray[np.intp],
        found: npt.NDArray[np.intp],
        values: Floats,
        codes: Codes,
    ) -> None:
        """Put the best of a block of codes, `found` in it by each of these queries, in place."""
        n_kept = self._scores.shape[1]
        # Earlier blocks come first, so a stable order keeps ties in order of their index.
        both = np.concatenate([self._scores[queries], values], axis=1)
        best, self._scores[queries] = _top(both, n_kept)
        indices = np.concatenate([self._indices[queries], found + self._n_seen], axis=1)
        self._indices[queries] = np.take_along_axis(indices, best, axis=1)
        if self._transform._rescores:
            rescored = np.concatenate([self._rescored[queries], np.zeros_like(values)], axis=1)
            rows, columns = np.nonzero(best >= n_kept)
            places = best[rows, columns]
            of = found[rows, places - n_kept]
            rescored[rows, places] = self._rescore(queries[rows], codes, of)
            self._rescored[queries] = np.take_along_axis(rescored, best, axis=1)

    def _rescore(
        self, queries: npt.NDArray[np.intp], codes: Codes, of: npt.NDArray[np.intp]
    ) -> Floats:
        """Scores [P] of float queries with what codes stand for, of corresponding indices."""
        return _dots_of_pairs(
            lambda part: self._queries[queries[part]],
            lambda part: self._transform.dequantize(codes[of[part]]),
            len(queries),
        )


def identity(full_dims: int) -> VectorTransform:
    """The transform that keeps every dimension in float32."""
    return VectorTransform(full_dims=full_dims, dims=full_dims)


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
    found, _ = transform.search(z, transform.quantize(z), k + 1)
    return [each[each != i][:k] for i, each in enumerate(found)]


def _rows(x: npt.ArrayLike, width: int | None, what: str) -> Floats:
    """`x` as float32 [N, width], checked."""
    rows = np.asarray(x, dtype=np.float32)
    if rows.ndim != 2 or (width is not None and rows.shape[1] != width):
        raise InputError(
            f"{what} have shape {list(rows.shape)}, must be [N, {'F' if width is None else width}]"
        )
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise NumericsError(f"{bad} of {len(rows)} {what} hold NaN or infinity")
    return rows


def _norms(rows: Floats) -> npt.NDArray[np.float64]:
    """Lengths [N] of rows [N, D]."""
    squares: npt.NDArray[np.float64] = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    return np.sqrt(squares)


def _product_error(norms: npt.NDArray[np.float64], dims: int) -> npt.NDArray[np.float64]:
    """How far float32 products may lie from scores, where |x| |y| is at most `norms`; infinite
    where a sum might overflow. See `Search`.

    gamma of two more than `dims`: a score is rounded to float32 as well, and norms are. Besides
    what is relative, each term may underflow.
    """
    limits = np.finfo(np.float32)
    n_u = (dims + 2) * float(limits.eps) / 2
    error = n_u / (1 - n_u) * norms + dims * float(limits.tiny)
    return np.where(norms < float(limits.max) / 2, error, np.inf)


def _in_play(
    products: Floats, error: npt.NDArray[np.float64], least: Floats, n: int
) -> npt.NDArray[np.bool_]:
    """Of products [Q, N], each within `error` [Q] of its score, those whose score may be above
    `least` [Q] and among the n largest of its row.
    """
    # A product that is NaN, of an overflow, is in play.
    bar = least.astype(np.float64) - error
    in_play = ~(products < _below(bar)[:, None])
    crowded = np.flatnonzero(np.count_nonzero(in_play, axis=1) > n)
    if len(crowded) and n < products.shape[1]:
        # The n-th largest product's score, and that of all n - 1 before, is above it less `error`.
        rows = products[crowded]
        nth = np.partition(rows, rows.shape[1] - n, axis=1)[:, rows.shape[1] - n]
        bar[crowded] = np.fmax(bar[crowded], nth - 2 * error[crowded])
        in_play[crowded] = ~(rows < _below(bar[crowded])[:, None])
    return in_play


def _below(values: npt.NDArray[np.float64]) -> Floats:
    """float32 not above `values`."""
    return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _scores_of(
    in_play: npt.NDArray[np.bool_], queries: Floats, stored: Floats
) -> tuple[npt.NDArray[np.intp], Floats]:
    """Indices and scores [Q, <= N] of pairs of `queries` [Q, D] and `stored` [N, D], in each row in
    order of their index; the rest of a row scores -inf.
    """
    rows, columns = np.nonzero(in_play)
    if len(rows) * _PAIR_COST > in_play.size:
        return _all_scores(queries, stored)
    counts = np.count_nonzero(in_play, axis=1)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.zeros((len(queries), counts.max(initial=0)), np.intp)
    scores = np.full(found.shape, -np.inf, np.float32)
    found[rows, places] = columns
    scores[rows, places] = _dots_of_pairs(
        lambda part: queries[rows[part]], lambda part: stored[columns[part]], len(rows)
    )
    return found, scores


def _all_scores(queries: Floats, stored: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """Indices and scores [Q, N] of every pair of `queries` [Q, D] and `stored` [N, D]."""
    exact = (queries.astype(np.float64) @ stored.astype(np.float64).T).astype(np.float32)
    return np.broadcast_to(np.arange(len(stored)), exact.shape), exact


def _dots_of_pairs(
    left: Callable[[slice], Floats], right: Callable[[slice], Floats], n: int
) -> Floats:
    """`_paired_dot` of n pairs, of which not all are in memory at once."""
    scores = np.empty(n, np.float32)
    for start in range(0, n, _BLOCK_PAIRS):
        part = slice(start, min(start + _BLOCK_PAIRS, n))
        scores[part] = _paired_dot(left(part), right(part))
    return scores


def _paired_dot(a: Floats, b: Floats) -> Floats:
    """Dot products [P] of corresponding rows of a and b [P, D], summed in float64 and rounded."""
    dots: Floats = np.vecdot(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)
    return dots


def _nearest_by_hamming(
    queries: npt.NDArray[np.uint8], codes: npt.NDArray[np.uint8], n: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """Distances and indices [Q, n] of the codes [N, B] with the fewest bits other than a query's
    [Q, B], nearest first, ties in order of their index.

    By faiss, whose distances are whole numbers, so that the ranking is ours to the last tie, in a
    twentieth of numpy's time (100 queries, 20,000 vectors of 256 bits: 0.005 s for 0.105 s on one
    core). Float and int8 codes stay with numpy: faiss sums in float32, by position in a block, so
    that equal vectors may rank apart (in int8 one or two queries in a hundred had another order)
    and at 256 dimensions it was no faster (float32 0.188 s for 0.063 s, int8 0.104 s for 0.093 s).
    """
    if n == 0:  # nothing is stored, which faiss refuses to search
        return np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.intp)
    import faiss  # a tenth of a second, and its own threads; only where bits are searched

    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(np.ascontiguousarray(codes))
    distances, indices = index.search(np.ascontiguousarray(queries), n)
    return distances, indices.astype(np.intp)


def _top(scores: Floats, n: int) -> tuple[npt.NDArray[np.intp], Floats]:
    """The n largest of each row of scores [Q, N], largest first, ties in order of their index."""
    if n == 0:
        return np.empty((len(scores), 0), dtype=np.intp), scores[:, :0]
    best = np.empty((len(scores), n), dtype=np.intp)
    nth = np.partition(scores, scores.shape[1] - n, axis=1)[:, scores.shape[1] - n]
    for i, row in enumerate(scores):
        in_play = np.flatnonzero(row >= nth[i])
        best[i] = in_play[np.argsort(-row[in_play], kind="stable")[:n]]
    return best, np.take_along_axis(scores, best, axis=1)
