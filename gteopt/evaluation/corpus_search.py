"""The searches of one task for several views, in one reading of the corpus.

A corpus of millions of texts fits neither the memory nor, often, the cache of vectors. While a part
of it is in memory it is therefore coded and searched for every view, and nothing is left of it but
each query's best.

Refuses to know: mteb, texts, how they are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from gteopt.corpus.shards import Encodings
from gteopt.errors import is_out_of_memory
from gteopt.evaluation.views import View
from gteopt.vectors.search import Products, Search, on_cpu
from gteopt.vectors.transform import VectorTransform

if TYPE_CHECKING:
    import torch


Floats = npt.NDArray[np.float32]
Ranking = tuple[npt.NDArray[np.intp], Floats]
"""Rows of the corpus that answer one query, best first, and their scores."""

_BLOCK_PAIRS = 1 << 10


@dataclass(frozen=True)
class Answers:
    """What one search found.

    Attributes:
        rankings: by SHA-256 of the view, one a query.
        asked: texts that it took; of these, none encoded for whoever is given it afterwards.
    """

    rankings: Mapping[str, Sequence[Ranking]]
    asked: Encodings


class Searches:
    """What was found for views that are scored later, by what was asked."""

    def __init__(self, views: Sequence[View]) -> None:
        """Searches for `views`, each of which asks for its results once."""
        self._views = views
        self._found: dict[bytes, Answers] = {}

    def answers(
        self, key: bytes, view: View, search: Callable[[Sequence[View]], Answers]
    ) -> tuple[Sequence[Ranking], Encodings]:
        """Results of a search and what they took, if another view's has not taken it already.

        Args:
            key: stands for queries, corpus and depth.
            view: whose results are wanted.
            search: called with all views, unless an earlier view's search has found them.
        """
        there = self._found.get(key)
        is_new = there is None or view.sha256 not in there.rankings
        if is_new:
            there = search(self._views)
        assert there is not None
        # Not kept: a thousand results of each of ten thousand queries take a gigabyte.
        rest = {sha: each for sha, each in there.rankings.items() if sha != view.sha256}
        self._found[key] = Answers(rest, there.asked)
        return there.rankings[view.sha256], Encodings() if is_new else there.asked


class _Searching(Protocol):
    """A search that is fed a corpus block by block."""

    def add(self, codes: npt.NDArray[np.generic]) -> None:
        """The next documents, as the view stores them."""

    def rankings(self) -> list[Ranking]:
        """What each query found."""


def search_all(
    views: Sequence[View],
    queries: Mapping[str, Floats],
    blocks: Iterable[Floats],
    k: int,
    candidates: Sequence[npt.NDArray[np.intp]] | None = None,
    products: Products = on_cpu,
) -> dict[str, list[Ranking]]:
    """The k best documents of each query under each view; by the view's SHA-256.

    Args:
        views: what an index would store.
        queries: by the view's SHA-256, [Q, D] projected.
        blocks: vectors [N, F] of the documents at full dimension, read once.
        k: how many.
        candidates: of each query, the only documents that are searched; ties then keep their order.
        products: where whole corpora are multiplied with queries; results do not depend on it.
    """
    searches: dict[str, _Searching] = {}
    for view in views:
        own = queries[view.sha256]
        searches[view.sha256] = (
            _Whole(view.vectors, own, k, products)
            if candidates is None
            else _AmongCandidates(view.vectors, own, candidates, k)
        )
    for vectors in blocks:
        for view in views:
            transform = view.vectors
            searches[view.sha256].add(transform.quantize(transform.project(vectors)))
    return {sha256: search.rankings() for sha256, search in searches.items()}


def products_on(device: torch.device) -> Products:
    """The fastest products there: by torch on a CUDA device, by numpy where this process has none
    (workers elsewhere may encode on it) and on others.
    """
    import torch

    there = device.type == "cuda" and torch.cuda.is_available()
    return _by_torch(device) if there else on_cpu


def _by_torch(device: torch.device) -> Products:
    import torch

    # What counts on sums in float32 must not get them in TF32, which a program may allow.
    exact = torch.get_float32_matmul_precision() == "highest"
    dtype = torch.float32 if exact else torch.float64

    def of(stored: Floats) -> Callable[[Floats], Floats]:
        columns: list[torch.Tensor] = []

        def product(queries: Floats) -> Floats:
            try:
                if not columns:
                    columns.append(torch.from_numpy(stored).to(device, dtype).T)
                there = torch.from_numpy(queries).to(device, dtype) @ columns[0]
                found: Floats = there.to("cpu", torch.float32).numpy()
            except RuntimeError as error:
                # The model and its batches may have left no room: slower, and just as right.
                if not is_out_of_memory(error):
                    raise
                return on_cpu(stored)(queries)
            return found

        return product

    return of


class _Whole:
    """Every document is searched."""

    def __init__(
        self, transform: VectorTransform, queries: Floats, k: int, products: Products
    ) -> None:
        self._search = Search(transform, queries, k, products)

    def add(self, codes: npt.NDArray[np.generic]) -> None:
        self._search.add(codes)

    def rankings(self) -> list[Ranking]:
        return list(zip(*self._search.nearest(), strict=True))


class _AmongCandidates:
    """Each query has its own few documents (reranking tasks)."""

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
        # One entry for each query and candidate, [P], query after query.
        rows = np.concatenate([np.empty(0, np.intp), *candidates])
        self._query = np.repeat(np.arange(len(candidates)), [len(rows) for rows in candidates])
        self._by_code = np.zeros(len(rows), np.float32)
        self._rescored = np.zeros(len(rows), np.float32)
        self._order = np.argsort(rows, kind="stable")
        self._rows = rows[self._order]
        self._n_seen = 0

    def add(self, codes: npt.NDArray[np.generic]) -> None:
        first, last = np.searchsorted(self._rows, [self._n_seen, self._n_seen + len(codes)])
        for start in range(int(first), int(last), _BLOCK_PAIRS):
            part = slice(start, min(start + _BLOCK_PAIRS, int(last)))
            pairs = self._order[part]
            self._by_code[pairs], self._rescored[pairs] = self._transform.score_pairs(
                self._queries[self._query[pairs]], codes[self._rows[part] - self._n_seen]
            )
        self._n_seen += len(codes)

    def rankings(self) -> list[Ranking]:
        ends = np.cumsum([len(rows) for rows in self._candidates])
        best_of_query = []
        for rows, end in zip(self._candidates, ends, strict=True):
            part = slice(end - len(rows), end)
            best = self._transform.best_of(self._by_code[part], self._rescored[part], self._k)
            best_of_query.append((rows[best], self._rescored[part][best]))
        return best_of_query
