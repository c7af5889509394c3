"""An `Encoder` as mteb sees it: what is scored are the vectors as an index would store them.

Hides: mteb's protocols, and which text is a query. Refuses to know: suites, files, scores.
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

from gteopt.evaluation.corpus_search import Answers, Ranking, Searches, products_on, search_all
from gteopt.evaluation.fidelity import Sampler, Side
from gteopt.evaluation.instructions import TaskInstruction
from gteopt.evaluation.views import View
from gteopt.progress import Progress, quiet

if TYPE_CHECKING:
    from gteopt.corpus.vector_cache import VectorCache
    from gteopt.encoder.tokenization import Role


Floats = npt.NDArray[np.float32]
_CHUNK_TEXTS = 8192  # encoded together, so that lengths sort well; 117 MB at 3584 dimensions
_SCORE_DEPTH = re.compile(r"_at_(\d+)$")  # ndcg_at_10


class TaskModel:
    """The encoder within one task; satisfies mteb's `EncoderProtocol` and `SearchProtocol`.

    Symmetric tasks (similarity, classification, clustering, bitext) hand over texts without a
    prompt type: each of them is a query, as in the evaluation of gte-Qwen2 by its authors. The
    documents of a search get none, unless they are like queries (`TaskInstruction.on_documents`).

    Attributes:
        instruction: what texts are prefixed with.
        sampler: is offered every text with its vector, where there is one.
    """

    def __init__(
        self,
        cache: VectorCache,
        view: View,
        instruction: TaskInstruction,
        sampler: Sampler | None = None,
        progress: Progress = quiet,
        *,
        searches: Searches | None = None,
    ) -> None:
        """A model of one task.

        Args:
            cache: gives vectors at full dimension.
            view: what an index would store of them.
            instruction: what texts are prefixed with.
            sampler: is offered every text with its vector; None where another view's model was.
            progress: told how many of the texts that the task has asked for are encoded; the
                number of all grows as mteb asks for more.
            searches: of all views that the task is scored with; None is this one alone.
        """
        self.instruction = instruction
        self.sampler = sampler
        self._cache = cache
        self._view = view
        self._transform = view.vectors
        self._progress = progress
        self._n_texts = self._n_done = 0
        self._corpus: Any = ()
        self._searches = searches or Searches([view])
        self._n_searches = 0
        dtype = str(cache.encoder.dtype).removeprefix("torch.")
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"gteopt/{view.name}", "revision": f"{view.sha256}-{dtype}"}
        )

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Floats:
        """What the stored codes of texts stand for, [N, dims].

        Where the protocol keeps lengths, each is as long as the model made it.
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
        """Similarities [N, M]: cosines, or dot products where the vectors are made for these."""
        return dot_score(a, b) if self._transform.similarity == "dot" else cos_sim(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        """Similarities [N] of corresponding rows."""
        is_dot = self._transform.similarity == "dot"
        return pairwise_dot_score(a, b) if is_dot else pairwise_cos_sim(a, b)

    def index(self, corpus: Any, **_: Any) -> None:
        """Note the documents, which are read while queries are searched."""
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
        """Best documents of each query on the codes, rescored as the artifact says.

        mteb asks for a thousand results. A service that returns ten rescores `rescore * 10`
        candidates, not `rescore * 1000`, and what the codes alone lose must show: the search is as
        deep as the task's main score looks. With `top_ranked` (reranking tasks), only those
        documents of each query are searched.

        The corpus is read once for all views: see `searches`.
        """
        depth = search_depth(task_metadata)
        # One more, because some tasks strike out a document with the query's own id.
        k = top_k if depth is None else min(top_k, depth + 1)
        ids = list(queries["id"])
        texts = list(_texts(queries, task_metadata, PromptType.query))
        # Every view's run asks for the same searches in the same order.
        self._n_searches += 1
        about = [str(self._n_searches), str(k), str(len(self._corpus)), *ids, *texts]
        key = hashlib.sha256("\0".join(about).encode()).digest()

        def search(views: Sequence[View]) -> Answers:
            before = self._cache.counts
            self._n_texts += len(texts) + len(self._corpus)
            projected = self._project(texts, "query", views)
            candidates = None if top_ranked is None else self._candidates(ids, top_ranked)
            documents = _texts(self._corpus, task_metadata, PromptType.document)
            blocks = self._encoded(documents, "document")
            rankings = self._search(views, projected, blocks, k, candidates)
            return Answers(rankings, self._cache.counts - before)

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
        products = products_on(self._cache.encoder.device)
        return search_all(views, queries, blocks, k, candidates, products)

    def _candidates(self, ids: Sequence[str], top_ranked: Any) -> list[npt.NDArray[np.intp]]:
        """Rows of each query's candidates, in the order in which the task names them."""
        rows = {document: row for row, document in enumerate(self._corpus["id"])}
        return [
            np.array([rows[document] for document in top_ranked.get(query, ())], np.intp)
            for query in ids
        ]

    def _named(
        self, ids: Sequence[str], rankings: Sequence[Ranking]
    ) -> dict[str, dict[str, float]]:
        """Results by the documents' names, of which only those that were found are read."""
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
        return {sha256: np.concatenate(each) for sha256, each in parts.items()}

    def _encoded(self, texts: Iterable[str], side: Side) -> Iterator[Floats]:
        """Vectors [N, full_dims] of texts, encoded and sampled in chunks; at least one chunk."""
        bare = side == "document" and not (
            self.instruction.on_documents and self.instruction.text is not None
        )
        role: Role = "document" if bare else "query"
        instruction = None if bare else self.instruction.text

        def count(what: str, done: int, total: int) -> None:
            self._progress(what, self._n_done + done, self._n_texts)

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
    """How many results of a query the task's main score looks at; None where it does not say."""
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
    """Texts of a corpus or of queries as every mteb model reads them (title before the text, an
    instruction column behind the query), by mteb's own function, which it does not export. They are
    read as they are needed.
    """
    loader = create_dataloader(rows, task_metadata=task_metadata, prompt_type=prompt_type)
    return chain.from_iterable(batch["text"] for batch in loader)
