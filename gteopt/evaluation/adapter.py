"""An `Encoder` as mteb sees it: what is scored are the vectors as an index would store them.

Hides: mteb's protocols, and which text is a query. Refuses to know: suites, files, scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mteb._create_dataloaders import create_dataloader
from mteb.models.model_meta import ModelMeta
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from mteb.types import PromptType

from gteopt.evaluation.fidelity import Sampler, Side
from gteopt.evaluation.views import View
from gteopt.recipe import Progress, quiet

if TYPE_CHECKING:
    from gteopt.encoder import Role
    from gteopt.evaluation.cache import VectorCache

Floats = npt.NDArray[np.float32]
_CHUNK_TEXTS = 8192  # encoded together, so that lengths sort well; 117 MB at 3584 dimensions
_SCORE_DEPTH = re.compile(r"_at_(\d+)$")  # ndcg_at_10


class TaskModel:
    """The encoder within one task; satisfies mteb's `EncoderProtocol` and `SearchProtocol`.

    Symmetric tasks (similarity, classification, clustering, bitext) hand over texts without a
    prompt type: each of them is a query, as in the evaluation of gte-Qwen2 by its authors. The
    documents of a search get no instruction, but where they are like queries (`on_documents`).

    Attributes:
        instruction: put on queries; None for a model that takes none.
        sampler: is offered every text with its vector, where there is one.
    """

    def __init__(
        self,
        cache: VectorCache,
        view: View,
        instruction: str | None,
        sampler: Sampler | None = None,
        progress: Progress = quiet,
        *,
        on_documents: bool = False,
    ) -> None:
        """A model of one task.

        Args:
            cache: gives vectors at full dimension.
            view: what an index would store of them.
            instruction: put on queries; None for a model that takes none.
            sampler: is offered every text with its vector; None where another view's model was.
            progress: told how many of the texts that the task has asked for are encoded; the
                number of all grows as mteb asks for more.
            on_documents: the documents of a search carry the instruction, too.
        """
        self.instruction = instruction
        self.sampler = sampler
        self._cache = cache
        self._transform = view.vectors
        self._progress = progress
        self._on_documents = on_documents and instruction is not None
        self._n_texts = self._n_done = 0
        self._document_ids: list[str] = []
        self._codes: npt.NDArray[Any] = np.empty((0, 0))
        dtype = str(cache.encoder.dtype).removeprefix("torch.")
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"gteopt/{view.name}", "revision": f"{view.sha256}-{dtype}"}
        )

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Floats:
        """What the stored codes of texts stand for, [N, dims]."""
        texts = [text for batch in inputs for text in batch["text"]]
        self._n_texts += len(texts)
        side: Side = "text" if prompt_type is None else prompt_type.value
        codes = self._transform.quantize(self._project(texts, side))
        return self._transform.dequantize(codes)

    def similarity(self, a: Any, b: Any) -> Any:
        """Cosines [N, M]."""
        return cos_sim(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        """Cosines [N] of corresponding rows."""
        return pairwise_cos_sim(a, b)

    def index(self, corpus: Any, *, task_metadata: Any, **_: Any) -> None:
        """Code the documents, once."""
        texts = _texts(corpus, task_metadata, PromptType.document)
        self._n_texts += len(texts)
        self._document_ids = list(corpus["id"])
        parts = [
            self._transform.quantize(self._project(chunk, "document")) for chunk in _chunks(texts)
        ]
        self._codes = np.concatenate(parts)

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
        """
        depth = search_depth(task_metadata)
        # One more, because some tasks strike out a document with the query's own id.
        k = top_k if depth is None else min(top_k, depth + 1)
        texts = _texts(queries, task_metadata, PromptType.query)
        self._n_texts += len(texts)
        projected = self._project(texts, "query")
        ids = list(queries["id"])
        if top_ranked is None:
            found, scores = self._transform.search(projected, self._codes, k)
            return {
                query: {self._document_ids[d]: float(s) for d, s in zip(row, values, strict=True)}
                for query, row, values in zip(ids, found, scores, strict=True)
            }
        rows = {document: row for row, document in enumerate(self._document_ids)}
        results: dict[str, dict[str, float]] = {}
        for query, vector in zip(ids, projected, strict=True):
            candidates = list(top_ranked.get(query, ()))
            results[query] = {}
            if candidates:
                codes = self._codes[[rows[document] for document in candidates]]
                best, values = self._transform.search(vector[None], codes, k)
                results[query] = {
                    candidates[d]: float(s) for d, s in zip(best[0], values[0], strict=True)
                }
        return results

    def _project(self, texts: Sequence[str], side: Side) -> Floats:
        """Projected vectors [N, dims] of texts, encoded and sampled in chunks."""
        bare = side == "document" and not self._on_documents
        role: Role = "document" if bare else "query"
        instruction = None if bare else self.instruction
        parts = []

        def count(what: str, done: int, total: int) -> None:
            self._progress(what, self._n_done + done, self._n_texts)

        for chunk in _chunks(texts):
            vectors = self._cache.embed(chunk, role, instruction, count)
            self._n_done += len(chunk)
            if self.sampler is not None:
                self.sampler.offer(side, chunk, f"{role}\0{instruction or ''}", vectors)
            parts.append(self._transform.project(vectors))
        return np.concatenate(parts)


def search_depth(task_metadata: Any) -> int | None:
    """How many results of a query the task's main score looks at; None where it does not say."""
    depth = _SCORE_DEPTH.search(task_metadata.main_score)
    return None if depth is None else int(depth[1])


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, max(1, len(texts)), _CHUNK_TEXTS):
        yield texts[start : start + _CHUNK_TEXTS]


def _texts(rows: Any, task_metadata: Any, prompt_type: Any) -> list[str]:
    """Texts of a corpus or of queries as every mteb model reads them (title before the text, an
    instruction column behind the query), by mteb's own function, which it does not export.
    """
    loader = create_dataloader(rows, task_metadata=task_metadata, prompt_type=prompt_type)
    return [text for batch in loader for text in batch["text"]]
