"""What a task will ask to be encoded, found by running it on vectors that stand for nothing.

mteb's tasks decide as they go which texts they need (ten training sets, the documents of a
clustering), but by their own generators, never by the vectors. On a few random dimensions a task
takes little time and asks for the very texts, in the very order, that it will ask for again.

Refuses to know: who encodes, scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gteopt.corpus.shards import Encodings, Floats, Shard, cut
from gteopt.corpus.vector_cache import VectorCache
from gteopt.evaluation.corpus_search import Ranking
from gteopt.evaluation.instructions import TaskInstruction
from gteopt.evaluation.mteb_isolation import isolated
from gteopt.evaluation.mteb_model import TaskModel
from gteopt.evaluation.views import View
from gteopt.progress import Progress
from gteopt.vectors.transform import identity

if TYPE_CHECKING:
    from gteopt.encoder.tokenization import Role
    from gteopt.evaluation.tasks import ResolvedTask


_DIMS = 8


class _Recorder:
    """Stands for a cache: notes the shards that it would have encoded."""

    def __init__(self, cache: VectorCache, planned: set[bytes]) -> None:
        self.encoder = cache.encoder
        self.keeps_lengths = cache.keeps_lengths
        self.shards: list[Shard] = []
        self.counts = Encodings()
        self._cache = cache
        self._planned = planned
        self._rng = np.random.default_rng(0)

    def count_cached(self, asked: Encodings) -> None:
        """Nothing is counted."""

    def embed(
        self, texts: Sequence[str], role: Role, instruction: str | None, progress: Progress
    ) -> npt.NDArray[np.float32]:
        """Random unit vectors."""
        missing = {
            digest: text
            for digest, text in self._cache.missing(texts, role, instruction).items()
            if digest not in self._planned
        }
        self._planned |= missing.keys()
        self.shards += cut(missing.values(), role, instruction)
        vectors = self._rng.standard_normal((len(texts), _DIMS)).astype(np.float32)
        unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


class _NoSearch(TaskModel):
    """Encodes what a search needs, and finds the first document for every query."""

    def _search(
        self,
        views: Sequence[View],
        queries: dict[str, Floats],
        blocks: Iterable[Floats],
        k: int,
        candidates: Sequence[npt.NDArray[np.intp]] | None,
    ) -> dict[str, list[Ranking]]:
        for _ in blocks:
            pass
        first = np.zeros(1, np.intp), np.zeros(1, np.float32)
        return {sha256: [first] * len(each) for sha256, each in queries.items()}


def upcoming_shards(
    resolved: ResolvedTask,
    cache: VectorCache,
    instruction: TaskInstruction,
    planned: set[bytes],
) -> list[Shard]:
    """Shards that scoring a task on this cache will encode, in order.

    Args:
        resolved: a task with its data; its generators are left as they were.
        cache: what it holds is not encoded again.
        instruction: as the task will be scored with.
        planned: keys of texts that earlier tasks will have encoded by then; those of this one are
            added.
    """
    recorder: Any = _Recorder(cache, planned)
    view = View("look-ahead", "", identity(_DIMS))
    task = resolved.task
    generators = deepcopy((task.rng_state, task.np_rng))
    with isolated(offline=True):
        for split in resolved.splits:
            model = _NoSearch(recorder, view, instruction)
            # A metric may fail on random vectors. What is then missing here is encoded when it is
            # asked for, one request at a time.
            with suppress(Exception):
                task.evaluate(model, split, encode_kwargs={"batch_size": 32})
    task.rng_state, task.np_rng = generators
    shards: list[Shard] = recorder.shards
    return shards
