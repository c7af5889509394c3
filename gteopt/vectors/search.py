"""Search stored codes exactly for the k nearest vectors, block by block.

Hides: rounding bounds, blocks, faiss for binary codes. Refuses to know: torch, models, files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gteopt.errors import InputError
from gteopt.vectors.transform import Codes, Floats, VectorTransform, checked_rows, paired_dot

DotProducts = Callable[[Floats], Callable[[Floats], Floats]]
"""Takes stored vectors [N, D] and returns a function from queries [Q, D] to dot products [Q, N],
which are summed in float32 or better. An implementation chooses the device and the method."""

_BLOCK_SCORES = 1 << 22
_BLOCK_VECTORS = 1 << 14
_BLOCK_PAIRS = 1 << 7  # a few megabytes in float64, which fit a core's cache
# A pair that is computed alone takes as long as this many pairs of a float64 matrix product.
_PAIR_COST = 32


def numpy_products(stored: Floats) -> Callable[[Floats], Floats]:
    """`DotProducts` that numpy computes on the CPU."""
    columns = stored.T
    return lambda queries: queries @ columns


def search_vectors(
    transform: VectorTransform, queries: npt.ArrayLike, codes: Codes, k: int
) -> tuple[npt.NDArray[np.intp], Floats]:
    """The k best stored vectors of each query, best first; ties in order of their index.

    float32, int4, rabitq and pq: the score is the dot product of the float query with the decoded
    vector. int8 and binary: the query is coded too, and a first pass compares codes alone. It
    scores int8 by the dot product of decoded codes, and binary by 1 - 2 H / D, with H the Hamming
    distance. The `rescore * k` best are then ordered by the dot product of the *float* query with
    the decoded vector. This is the asymmetric rescoring of BPR (Yamada et al. 2021,
    arXiv:2106.00882). With `rescore` 1 the order of the first pass stays.

    Queries and vectors are processed in blocks, which bounds the memory.

    Args:
        transform: the transform that made the codes.
        queries: [Q, D] projected, float.
        codes: [N, D] or packed, from `quantize`.
        k: how many vectors to return a query; all N if there are fewer.

    Returns:
        Indices and scores, both [Q, min(k, N)]. Scores approximate the cosine.

    Raises:
        InputError: wrong shapes, or k below 1.
        NumericsError: NaN or infinity in `queries` or float32 codes.

    Example:
        >>> codes = transform.quantize(transform.project(document_vectors))
        >>> indices, scores = search(transform, transform.project(query_vectors), codes, k=10)
    """
    running = BlockwiseSearch(transform, queries, k)
    running.add(codes)
    return running.nearest()


class BlockwiseSearch:
    """`search_vectors` over stored vectors that are added block by block.

    Only the candidates of each query are kept between blocks, so a corpus need not fit into memory.
    The sizes of the blocks do not change the result.

    Scores are summed in float64 and rounded to float32. Equal vectors then score equally at any
    position, so ties stay in order. A float32 sum of BLAS depends on the position of the vector.

    Only pairs that may be among the best are summed in float64. A float32 product, summed in any
    order, is within gamma_D |x| |y| of the dot product x y. Here gamma_n = n u / (1 - n u) and
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1, and
    Cauchy-Schwarz). A vector is not among the n best if its product is further than this bound
    below the n-th best score so far.
    """

    def __init__(
        self,
        transform: VectorTransform,
        queries: npt.ArrayLike,
        k: int,
        products: DotProducts = numpy_products,
    ) -> None:
        """Search for the k best of each projected query [Q, D].

        Args:
            transform: the transform that made the codes.
            queries: [Q, D] projected, float.
            k: how many vectors to return a query.
            products: select the pairs to sum in float64; they do not change the result.

        Raises:
            InputError: wrong shape, or k below 1.
            NumericsError: NaN or infinity.
        """
        self._queries = checked_rows(queries, transform.dims, "queries")
        if k < 1:
            raise InputError(f"k is {k}; a search returns at least 1 neighbour")
        self._transform = transform
        self._products = products
        self._k, self._n = k, transform.n_candidates(k)
        self._n_added = 0
        # [Q, <= n], ordered by the scores of the codes; ties in order of their index.
        self._indices = np.empty((len(self._queries), 0), np.intp)
        self._scores: Floats = np.empty((len(self._queries), 0), np.float32)
        # The scores that decide the final order.
        self._rescored: Floats = self._scores.copy()

    def add(self, codes: Codes) -> None:
        """Search the next stored vectors, [N, D] or packed.

        Raises:
            InputError: codes of another shape or dtype than `quantize` makes.
            NumericsError: NaN or infinity in float32 codes.
        """
        self._transform.check_codes(codes)
        for start in range(0, len(codes), _BLOCK_VECTORS):
            self._add_block(codes[start : start + _BLOCK_VECTORS])

    def nearest(self) -> tuple[npt.NDArray[np.intp], Floats]:
        """Indices and scores, both [Q, min(k, N)], as `search_vectors` returns them."""
        indices, scores = self._indices, self._scores
        if self._transform.rescores:
            order = np.argsort(indices, axis=1)
            indices = np.take_along_axis(indices, order, axis=1)
            scores = np.take_along_axis(self._rescored, order, axis=1)
            best, scores = _top(scores, min(self._k, scores.shape[1]))
            indices = np.take_along_axis(indices, best, axis=1)
        return indices, scores

    def _add_block(self, codes: Codes) -> None:
        transform = self._transform
        more = min(self._n, self._n_added + len(codes)) - self._scores.shape[1]
        self._indices = np.pad(self._indices, ((0, 0), (0, more)))
        self._scores = np.pad(self._scores, ((0, 0), (0, more)), constant_values=-np.inf)
        self._rescored = np.pad(self._rescored, ((0, 0), (0, more)))
        block = max(1, _BLOCK_SCORES // len(codes))
        # Decoding takes as long as hundreds of queries, so it is done once for all of them.
        stored = None if transform.code == "binary" else transform.dequantize(codes)
        # In a small corpus, and at the start of a large one, the filter would drop few pairs.
        product = None
        if stored is not None and 2 * _PAIR_COST * self._n < self._n_added + len(codes):
            product, longest = self._products(stored), _norms(stored).max()
        for start in range(0, len(self._queries), block):
            queries = self._queries[start : start + block]
            least = self._scores[start : start + block, -1]
            if stored is None:
                distances, columns = _nearest_by_hamming(
                    transform.quantize(queries), codes, min(self._n, len(codes))
                )
                values = transform.of_hamming(distances)
            else:
                queries = transform.first_compared(queries)
                if product is None:
                    columns, values = _all_scores(queries, stored)
                else:
                    error = _product_error(_norms(queries) * longest, transform.dims)
                    in_play = _in_play(product(queries), error, least, self._n)
                    columns, values = _scores_of(in_play, queries, stored)
            better = np.flatnonzero(values.max(axis=1, initial=-np.inf) > least)
            columns, best = columns[better], values[better]
            if stored is not None:
                top, best = _top(best, min(self._n, best.shape[1]))
                columns = np.take_along_axis(columns, top, axis=1)
            self._merge(start + better, columns, best, codes)
        self._n_added += len(codes)

    def _merge(
        self,
        queries: npt.NDArray[np.intp],
        columns: npt.NDArray[np.intp],
        values: Floats,
        codes: Codes,
    ) -> None:
        """Merge the best vectors of a block of codes into the results of `queries`, in place.

        Args:
            queries: [R] indices of queries.
            columns: [R, B] indices into `codes`.
            values: [R, B] scores by codes.
            codes: the block.
        """
        n_kept = self._scores.shape[1]
        # Earlier blocks stand first, so a stable sort keeps ties in order of their index.
        both = np.concatenate([self._scores[queries], values], axis=1)
        best, self._scores[queries] = _top(both, n_kept)
        indices = np.concatenate([self._indices[queries], columns + self._n_added], axis=1)
        self._indices[queries] = np.take_along_axis(indices, best, axis=1)
        if self._transform.rescores:
            rescored = np.concatenate([self._rescored[queries], np.zeros_like(values)], axis=1)
            rows, slots = np.nonzero(best >= n_kept)
            places = best[rows, slots]
            new = columns[rows, places - n_kept]
            rescored[rows, places] = self._rescore(queries[rows], codes, new)
            self._rescored[queries] = np.take_along_axis(rescored, best, axis=1)

    def _rescore(
        self, queries: npt.NDArray[np.intp], codes: Codes, indices: npt.NDArray[np.intp]
    ) -> Floats:
        """Scores [P] of pairs: a float query and the decoded code at the corresponding index."""
        return _dots_of_pairs(
            lambda part: self._queries[queries[part]],
            lambda part: self._transform.dequantize(codes[indices[part]]),
            len(queries),
        )


def _norms(rows: Floats) -> npt.NDArray[np.float64]:
    """Lengths [N] of rows [N, D]."""
    squares: npt.NDArray[np.float64] = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)
    return np.sqrt(squares)


def _product_error(norms: npt.NDArray[np.float64], dims: int) -> npt.NDArray[np.float64]:
    """A bound on |float32 product - score| if |x| |y| is at most `norms`; see `BlockwiseSearch`.

    The bound uses gamma of `dims` + 2, because scores and norms are rounded to float32 too. It also
    covers terms that underflow. It is infinite where a sum might overflow.
    """
    limits = np.finfo(np.float32)
    n_u = (dims + 2) * float(limits.eps) / 2
    error = n_u / (1 - n_u) * norms + dims * float(limits.tiny)
    return np.where(norms < float(limits.max) / 2, error, np.inf)


def _in_play(
    products: Floats, error: npt.NDArray[np.float64], least: Floats, n: int
) -> npt.NDArray[np.bool_]:
    """Mask [Q, N] of pairs whose score may exceed `least` [Q] and be among the n largest of a row.

    Each of `products` [Q, N] is within `error` [Q] of its score.
    """
    # A NaN comes from an overflow, so its pair stays.
    bar = least.astype(np.float64) - error
    in_play = ~(products < _below(bar)[:, None])
    crowded = np.flatnonzero(np.count_nonzero(in_play, axis=1) > n)
    if len(crowded) and n < products.shape[1]:
        # n scores are at least the n-th largest product minus `error`.
        rows = products[crowded]
        nth = np.partition(rows, rows.shape[1] - n, axis=1)[:, rows.shape[1] - n]
        bar[crowded] = np.fmax(bar[crowded], nth - 2 * error[crowded])
        in_play[crowded] = ~(rows < _below(bar[crowded])[:, None])
    return in_play


def _below(values: npt.NDArray[np.float64]) -> Floats:
    """The next float32 below `values` after rounding, so never above `values`."""
    return np.nextafter(values.astype(np.float32), np.float32(-np.inf))


def _scores_of(
    in_play: npt.NDArray[np.bool_], queries: Floats, stored: Floats
) -> tuple[npt.NDArray[np.intp], Floats]:
    """Indices and scores [Q, <= N] of the pairs in a mask [Q, N] over queries and stored vectors.

    Each row is in order of index. Unused places at the end of a row score -inf.
    """
    rows, columns = np.nonzero(in_play)
    if len(rows) * _PAIR_COST > in_play.size:
        return _all_scores(queries, stored)
    counts = np.count_nonzero(in_play, axis=1)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    indices = np.zeros((len(queries), counts.max(initial=0)), np.intp)
    scores = np.full(indices.shape, -np.inf, np.float32)
    indices[rows, places] = columns
    scores[rows, places] = _dots_of_pairs(
        lambda part: queries[rows[part]], lambda part: stored[columns[part]], len(rows)
    )
    return indices, scores


def _all_scores(queries: Floats, stored: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """Indices and scores [Q, N] of every pair of `queries` [Q, D] and `stored` [N, D]."""
    exact = (queries.astype(np.float64) @ stored.astype(np.float64).T).astype(np.float32)
    return np.broadcast_to(np.arange(len(stored)), exact.shape), exact


def _dots_of_pairs(
    left: Callable[[slice], Floats], right: Callable[[slice], Floats], n: int
) -> Floats:
    """`paired_dot` of n pairs, in blocks that fit the cache."""
    scores = np.empty(n, np.float32)
    for start in range(0, n, _BLOCK_PAIRS):
        part = slice(start, min(start + _BLOCK_PAIRS, n))
        scores[part] = paired_dot(left(part), right(part))
    return scores


def _nearest_by_hamming(
    queries: npt.NDArray[np.uint8], codes: npt.NDArray[np.uint8], n: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """The n codes nearest to each query by Hamming distance.

    The search is done by faiss. Hamming distances are whole numbers, so the ranking is exact, ties
    included. Float and int8 codes do not use faiss: its float32 sums depend on the position in a
    block, so equal vectors can get different ranks.

    Args:
        queries: codes [Q, B].
        codes: stored codes [N, B].
        n: how many codes a query, at most N.

    Returns:
        Distances and indices, both [Q, n], nearest first, ties in order of their index.
    """
    if n == 0:  # faiss refuses to search an empty index
        return np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.intp)
    import faiss  # the import takes a tenth of a second and starts threads

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
