"""Adapt an encoder to mteb's interfaces; the scored vectors are those that an index would store.

Hides: mteb's protocols, and which texts are queries. Refuses to know: suites, files, scores.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mteb._create_dataloaders import create_dataloader
from mteb.models.model_meta import ModelMeta
from mteb.similarity_functions import (
    cos_sim,
    dot_score,
    pairwise_cos_sim,
    pairwise_dot_score,
)
from mteb.types import PromptType

from gteopt.evaluation.corpus_search import (
    CorpusRankings,
    KeptSearches,
    Ranking,
    fastest_products,
    search_corpus,
)
from gteopt.evaluation.fidelity import FidelitySampler, Side
from gteopt.evaluation.instructions import TaskInstruction
from gteopt.evaluation.views import View
from gteopt.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from gteopt.corpus.vector_cache import VectorCache
    from gteopt.encoder.tokenization import Role


Floats = npt.NDArray[np.float32]
_CHUNK_TEXTS = 8192  # encoded together and sorted by length; 117 MB at 3584 dimensions
_SCORE_DEPTH = re.compile(r"_at_(\d+)$")  # ndcg_at_10


class TaskModel:
    """An encoder within one task; satisfies mteb's `EncoderProtocol` and `SearchProtocol`.

    Symmetric tasks (similarity, classification, clustering, bitext) pass texts without a prompt
    type. Each of these texts gets the instruction, as in the evaluation by gte-Qwen2's authors. The
    documents of a search get no instruction, unless `TaskInstruction.on_documents` is set.

    Attributes:
        instruction: the instruction that texts are prefixed with.
        sampler: gets every text with its vector; may be None.
    """

    def __init__(
        self,
        cache: VectorCache,
        view: View,
        instruction: TaskInstruction,
        sampler: FidelitySampler | None = None,
        progress: Progress = ignore_progress,
        *,
        searches: KeptSearches | None = None,
    ) -> None:
        """Make the model of one task.

        Args:
            cache: returns vectors at full dimension.
            view: the form in which an index would store the vectors.
            instruction: the instruction that texts are prefixed with.
            sampler: gets every text with its vector; None if the model of another view sampled
                the same texts already.
            progress: told how many of the requested texts are encoded; the total grows as mteb
                requests more.
            searches: shared by all views of the task; None if this view is the only one.
        """
        self.instruction = instruction
        self.sampler = sampler
        self._cache = cache
        self._view = view
        self._transform = view.vectors
        self._progress = progress
        self._n_texts = self._n_done = 0
        self._corpus: Any = ()
        self._searches = searches or KeptSearches([view])
        self._n_searches = 0
        dtype = str(cache.encoder.dtype).removeprefix("torch.")
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"gteopt/{view.name}", "revision": f"{view.sha256}-{dtype}"}
        )

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Floats:
        """Encode texts to stored codes, and return the decoded vectors [N, dims].

        If the protocol keeps lengths, each vector has the length that the model gave it.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        self._n_texts += len(texts)
        side: Side = "text" if prompt_type is None else prompt_type.value
        if self._cache.keeps_lengths:
            parts = []
            for vectors in self._encoded(texts, side):
                codes = self._transform.quantize(self._transform.project(vectors))
                parts.append(self._transform.dequantize(codes) * _lengths(vectors))
            return np.concatenate(parts)
        codes = self._transform.quantize(
            self._project(texts, side, [self._view])[self._view.sha256]
        )
        return self._transform.dequantize(codes)

    def similarity(self, a: Any, b: Any) -> Any:
        """Similarities [N, M]: cosines, or dot products if the transform's similarity is "dot"."""
        return dot_score(a, b) if self._transform.similarity == "dot" else cos_sim(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        """Similarities [N] of corresponding rows."""
        is_dot = self._transform.similarity == "dot"
        return pairwise_dot_score(a, b) if is_dot else pairwise_cos_sim(a, b)

    def index(self, corpus: Any, **_: Any) -> None:
        """Keep the documents; `search` reads them."""
        self._corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Any = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Best documents of each query by the codes, rescored as the artifact says.

        mteb asks for a thousand results, but a service that returns ten rescores only
        `rescore * 10` candidates. Rescoring a thousand would hide the loss of the codes. The search
        therefore returns as many results as the task's main score needs. With `top_ranked`
        (reranking tasks), only the given documents of each query are searched.

        The corpus is read once for all views; see `KeptSearches`.
        """
        depth = search_depth(task_metadata)
        # One more, because some tasks remove the document that has the same id as the query.
        k = top_k if depth is None else min(top_k, depth + 1)
        ids = list(queries["id"])
        texts = list(_texts(queries, task_metadata, PromptType.query))
        # All views request the same searches in the same order.
        self._n_searches += 1
        request = [str(self._n_searches), str(k), str(len(self._corpus)), *ids, *texts]
        key = hashlib.sha256("\0".join(request).encode()).digest()

        def search(views: Sequence[View]) -> CorpusRankings:
            before = self._cache.counts
            self._n_texts += len(texts) + len(self._corpus)
            projected = self._project(texts, "query", views)
            candidates = None if top_ranked is None else self._candidates(ids, top_ranked)
            documents = _texts(self._corpus, task_metadata, PromptType.document)
            blocks = self._encoded(documents, "document")
            rankings = self._search(views, projected, blocks, k, candidates)
            return CorpusRankings(rankings, self._cache.counts - before)

        rankings, cached = self._searches.answers(key, self._view, search)
        self._cache.count_cached(cached)
        return self._named(ids, rankings)

    def _search(
        self,
        views: Sequence[View],
        queries: dict[str, Floats],
        blocks: Iterable[Floats],
        k: int,
        candidates: Sequence[npt.NDArray[np.intp]] | None,
    ) -> dict[str, list[Ranking]]:
        products = fastest_products(self._cache.encoder.device)
        return search_corpus(views, queries, blocks, k, candidates, products)

    def _candidates(self, ids: Sequence[str], top_ranked: Any) -> list[npt.NDArray[np.intp]]:
        """Rows of each query's candidates, in the order of the task."""
        rows = {document: row for row, document in enumerate(self._corpus["id"])}
        return [
            np.array([rows[document] for document in top_ranked.get(query, ())], np.intp)
            for query in ids
        ]

    def _named(
        self, ids: Sequence[str], rankings: Sequence[Ranking]
    ) -> dict[str, dict[str, float]]:
        """Results by the ids of the documents; only the ids of results are read."""
        rows = np.unique(np.concatenate([np.empty(0, np.intp), *(rows for rows, _ in rankings)]))
        names = dict(zip(rows.tolist(), self._corpus.select(rows)["id"], strict=True))
        return {
            query: {
                names[row]: score
                for row, score in zip(rows_of_query.tolist(), scores.tolist(), strict=True)
            }
            for query, (rows_of_query, scores) in zip(ids, rankings, strict=True)
        }

    def _project(
        self, texts: Sequence[str], side: Side, views: Sequence[View]
    ) -> dict[str, Floats]:
        """Projected vectors [N, dims] of texts, by the view's SHA-256."""
        parts: dict[str, list[Floats]] = {view.sha256: [] for view in views}
        for vectors in self._encoded(texts, side):
            for view in views:
                parts[view.sha256].append(view.vectors.project(vectors))
        return {sha256: np.concatenate(chunks) for sha256, chunks in parts.items()}

    def _encoded(self, texts: Iterable[str], side: Side) -> Iterator[Floats]:
        """Vectors [N, full_dims] of texts, encoded and sampled in chunks; at least one chunk."""
        no_instruction = side == "document" and not (
            self.instruction.on_documents and self.instruction.text is not None
        )
        role: Role = "document" if no_instruction else "query"
        instruction = None if no_instruction else self.instruction.text

        def count(label: str, done: int, total: int) -> None:
            self._progress(label, self._n_done + done, self._n_texts)

        for chunk in _chunks(texts):
            vectors = self._cache.embed(chunk, role, instruction, count)
            self._n_done += len(chunk)
            if self.sampler is not None:
                unit: Floats = vectors
                if self._cache.keeps_lengths:
                    unit = (vectors / np.maximum(_lengths(vectors), 1e-12)).astype(np.float32)
                self.sampler.offer(side, chunk, f"{role}\0{instruction or ''}", unit)
            yield vectors


def search_depth(task_metadata: Any) -> int | None:
    """How many results of a query the task's main score uses; None if its name does not say."""
    depth = _SCORE_DEPTH.search(task_metadata.main_score)
    return None if depth is None else int(depth[1])


def _lengths(vectors: Floats) -> Floats:
    """Norms [N, 1] of rows."""
    norms: Floats = np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float32)
    return norms


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    yield list(islice(rest, _CHUNK_TEXTS))
    while chunk := list(islice(rest, _CHUNK_TEXTS)):
        yield chunk


def _texts(rows: Any, task_metadata: Any, prompt_type: Any) -> Iterator[str]:
    """The texts that every mteb model gets for a corpus or for queries, read lazily.

    mteb's own function joins the title and the text of a document, and a query and its instruction
    column. mteb does not export this function.
    """
    loader = create_dataloader(rows, task_metadata=task_metadata, prompt_type=prompt_type)
    return chain.from_iterable(batch["text"] for batch in loader)
