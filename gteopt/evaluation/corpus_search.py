"""Search a corpus for all views of a task at once, so that the corpus is read only once.

A corpus of millions of texts does not fit into memory, and often not into the cache of vectors.
Each block of vectors is therefore coded and searched for every view while it is in memory. Only the
best documents of each query are kept.

Refuses to know: mteb, texts, how they are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from gteopt.corpus.shards import ShardEncodings
from gteopt.errors import is_out_of_memory
from gteopt.evaluation.views import View
from gteopt.vectors.search import BlockwiseSearch, DotProducts, numpy_products
from gteopt.vectors.transform import VectorTransform

if TYPE_CHECKING:
    import torch


Floats = npt.NDArray[np.float32]
Ranking = tuple[npt.NDArray[np.intp], Floats]
"""Rows of the best documents of one query, best first, and their scores."""

_BLOCK_PAIRS = 1 << 10


@dataclass(frozen=True)
class CorpusRankings:
    """Results of one search for all views.

    Attributes:
        rankings: by SHA-256 of the view, one ranking a query.
        asked: texts that the search asked for. Other views that take the result encode none.
    """

    rankings: Mapping[str, Sequence[Ranking]]
    asked: ShardEncodings


class KeptSearches:
    """Keeps the results of searches for views that are scored later."""

    def __init__(self, views: Sequence[View]) -> None:
        """Search for all `views` at once; each view asks for its results once."""
        self._views = views
        self._answers: dict[bytes, CorpusRankings] = {}

    def answers(
        self, key: bytes, view: View, search: Callable[[Sequence[View]], CorpusRankings]
    ) -> tuple[Sequence[Ranking], ShardEncodings]:
        """A view's results of a search, and the texts that it took from an earlier search.

        Args:
            key: identifies queries, corpus and depth.
            view: the view whose results are returned.
            search: called with all views, unless an earlier search has the results already.
        """
        answers = self._answers.get(key)
        is_new = answers is None or view.sha256 not in answers.rankings
        if is_new:
            answers = search(self._views)
        assert answers is not None
        # A view's results are dropped once returned: for 10,000 queries they can take a gigabyte.
        rest = {sha: ranking for sha, ranking in answers.rankings.items() if sha != view.sha256}
        self._answers[key] = CorpusRankings(rest, answers.asked)
        return answers.rankings[view.sha256], ShardEncodings() if is_new else answers.asked


class _Searching(Protocol):
    """A search to which a corpus is added block by block."""

    def add(self, codes: npt.NDArray[np.generic]) -> None:
        """Search the next documents, which are coded as the view stores them."""

    def rankings(self) -> list[Ranking]:
        """The ranking of each query."""


def search_corpus(
    views: Sequence[View],
    queries: Mapping[str, Floats],
    blocks: Iterable[Floats],
    k: int,
    candidates: Sequence[npt.NDArray[np.intp]] | None = None,
    products: DotProducts = numpy_products,
) -> dict[str, list[Ranking]]:
    """The k best documents of each query under each view, by the view's SHA-256.

    Args:
        views: the forms in which an index would store the vectors.
        queries: by the view's SHA-256, [Q, D] projected.
        blocks: vectors [N, F] of the documents at full dimension, read once.
        k: how many documents to return a query.
        candidates: the documents that are searched for each query; ties keep this order. None
            searches all documents.
        products: multiplies documents with queries; results do not depend on it.
    """
    searches: dict[str, _Searching] = {}
    for view in views:
        projected = queries[view.sha256]
        searches[view.sha256] = (
            _Whole(view.vectors, projected, k, products)
            if candidates is None
            else _AmongCandidates(view.vectors, projected, candidates, k)
        )
    for vectors in blocks:
        for view in views:
            transform = view.vectors
            searches[view.sha256].add(transform.quantize(transform.project(vectors)))
    return {sha256: search.rankings() for sha256, search in searches.items()}


def fastest_products(device: torch.device) -> DotProducts:
    """The fastest `DotProducts` for a device: torch on a CUDA device, numpy on any other.

    Workers may encode on a CUDA device that this process does not have; numpy then takes over.
    """
    import torch

    has_cuda = device.type == "cuda" and torch.cuda.is_available()
    return _by_torch(device) if has_cuda else numpy_products


def _by_torch(device: torch.device) -> DotProducts:
    import torch

    # A program may allow TF32, whose error exceeds the bound for float32 sums; float64 is safe.
    exact = torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if exact else torch.float64

    def products(stored: Floats) -> Callable[[Floats], Floats]:
        columns: list[torch.Tensor] = []

        def product(queries: Floats) -> Floats:
            try:
                if not columns:
                    columns.append(torch.from_numpy(stored).to(device, dtype).T)
                on_device = torch.from_numpy(queries).to(device, dtype) @ columns[0]
                scores: Floats = on_device.to("cpu", torch.float32).numpy()
            except RuntimeError as error:
                # The model may leave no memory on the device; the CPU is slower but exact too.
                if not is_out_of_memory(error):
                    raise
                return numpy_products(stored)(queries)
            return scores

        return product

    return products


class _Whole:
    """A search among all documents."""

    def __init__(
        self, transform: VectorTransform, queries: Floats, k: int, products: DotProducts
    ) -> None:
        self._search = BlockwiseSearch(transform, queries, k, products)

    def add(self, codes: npt.NDArray[np.generic]) -> None:
        self._search.add(codes)

    def rankings(self) -> list[Ranking]:
        return list(zip(*self._search.nearest(), strict=True))


class _AmongCandidates:
    """A search among the few candidates of each query (reranking tasks)."""

    def __init__(
        self,
        transform: VectorTransform,
        queries: Floats,
        candidates: Sequence[npt.NDArray[np.intp]],
        k: int,
    ) -> None:
        self._transform = transform
        self._queries = queries
        self._candidates = candidates
        self._k = k
        # One entry for each pair of query and candidate, [P], query after query.
        rows = np.concatenate([np.empty(0, np.intp), *candidates])
        self._query = np.repeat(np.arange(len(candidates)), [len(rows) for rows in candidates])
        self._by_code = np.zeros(len(rows), np.float32)
        self._rescored = np.zeros(len(rows), np.float32)
        self._order = np.argsort(rows, kind="stable")
        self._rows = rows[self._order]
        self._n_added = 0

    def add(self, codes: npt.NDArray[np.generic]) -> None:
        first, last = np.searchsorted(self._rows, [self._n_added, self._n_added + len(codes)])
        for start in range(int(first), int(last), _BLOCK_PAIRS):
            part = slice(start, min(start + _BLOCK_PAIRS, int(last)))
            pairs = self._order[part]
            self._by_code[pairs], self._rescored[pairs] = self._transform.score_pairs(
                self._queries[self._query[pairs]], codes[self._rows[part] - self._n_added]
            )
        self._n_added += len(codes)

    def rankings(self) -> list[Ranking]:
        ends = np.cumsum([len(rows) for rows in self._candidates])
        best_of_query = []
        for rows, end in zip(self._candidates, ends, strict=True):
            part = slice(end - len(rows), end)
            best = self._transform.best_of(self._by_code[part], self._rescored[part], self._k)
            best_of_query.append((rows[best], self._rescored[part][best]))
        return best_of_query
