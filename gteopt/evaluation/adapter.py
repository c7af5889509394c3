"""An `Encoder` as mteb sees it: what is scored are the vectors as an index would store them.

Hides: mteb's protocols, which text is a query, and that no text is encoded twice in a run. Refuses
to know: suites, files, scores.
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
from gteopt.recipe import Progress

if TYPE_CHECKING:
    from gteopt.encoder import Encoder, Role

Floats = npt.NDArray[np.float32]
Key = tuple[str, str | None, str]

_CHUNK_TEXTS = 8192  # encoded together, so that lengths sort well; 117 MB at 3584 dimensions
_CACHE_BYTES = 1 << 30
_SCORE_DEPTH = re.compile(r"_at_(\d+)$")  # ndcg_at_10


class TextCache:
    """Full-dimension vectors by (role, instruction, text), kept until a gigabyte is full."""

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self.encoder = encoder
        self._batch_size = batch_size
        self._rows: dict[Key, Floats] = {}
        self._n_bytes = 0

    def embed(
        self, texts: Sequence[str], role: Role, instruction: str | None, progress: Progress
    ) -> Floats:
        """Vectors [N, full_dims]; only texts that were not seen before are encoded."""
        keys = [(role, instruction, text) for text in texts]
        unseen = list(dict.fromkeys(key for key in keys if key not in self._rows))
        fresh: dict[Key, Floats] = {}
        if unseen:
            vectors = self.encoder.embed(
                [text for _, _, text in unseen],
                role=role,
                instruction=instruction,
                batch_size=self._batch_size,
                progress=progress,
            )
            fresh = dict(zip(unseen, vectors, strict=True))
            if self._n_bytes + vectors.nbytes <= _CACHE_BYTES:
                self._rows |= fresh
                self._n_bytes += vectors.nbytes
        rows = [fresh[key] if key in fresh else self._rows[key] for key in keys]
        return np.stack(rows) if rows else np.empty((0, self.encoder.full_dims), np.float32)


class TaskModel:
    """The encoder within one task; satisfies mteb's `EncoderProtocol` and `SearchProtocol`.

    Symmetric tasks (similarity, classification, clustering, bitext) hand over texts without a
    prompt type: each of them is a query, as in the evaluation of gte-Qwen2 by its authors. The
    documents of a search never get an instruction.

    Attributes:
        instruction: put on queries; None for a model that takes none.
        sampler: is offered every text with its vector.
    """

    def __init__(
        self, cache: TextCache, instruction: str | None, sampler: Sampler, progress: Progress
    ) -> None:
        self.instruction = instruction
        self.sampler = sampler
        self._cache = cache
        self._transform = cache.encoder.vectors
        self._progress = progress
        self._document_ids: list[str] = []
        self._codes: npt.NDArray[Any] = np.empty((0, 0))
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"gteopt/{cache.encoder.name}", "revision": cache.encoder.sha256}
        )

    def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Floats:
        """What the stored codes of texts stand for, [N, dims]."""
        texts = [text for batch in inputs for text in batch["text"]]
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
        depth = _SCORE_DEPTH.search(task_metadata.main_score)
        # One more, because some tasks strike out a document with the query's own id.
        k = top_k if depth is None else min(top_k, int(depth[1]) + 1)
        projected = self._project(_texts(queries, task_metadata, PromptType.query), "query")
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
        role: Role = "document" if side == "document" else "query"
        instruction = None if side == "document" else self.instruction
        parts = []
        for chunk in _chunks(texts):
            vectors = self._cache.embed(chunk, role, instruction, self._progress)
            self.sampler.offer(side, chunk, f"{role}\0{instruction or ''}", vectors)
            parts.append(self._transform.project(vectors))
        return np.concatenate(parts)


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, max(1, len(texts)), _CHUNK_TEXTS):
        yield texts[start : start + _CHUNK_TEXTS]


def _texts(rows: Any, task_metadata: Any, prompt_type: Any) -> list[str]:
    """Texts of a corpus or of queries as every mteb model reads them (title before the text, an
    instruction column behind the query), by mteb's own function, which it does not export.
    """
    loader = create_dataloader(rows, task_metadata=task_metadata, prompt_type=prompt_type)
    return [text for batch in loader for text in batch["text"]]
