"""Find the texts that a task will encode, by running the task on random vectors first.

mteb's tasks choose their texts while they run: ten training sets, the documents of a clustering.
The choice depends on seeded generators, not on the vectors. With random vectors of a few dimensions
a task runs quickly. It asks for the same texts in the same order as it will with the real vectors.

Refuses to know: who encodes, scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gteopt.corpus.shards import Floats, Shard, ShardEncodings, cut_shards
from gteopt.corpus.vector_cache import VectorCache
from gteopt.evaluation.corpus_search import Ranking
from gteopt.evaluation.instructions import TaskInstruction
from gteopt.evaluation.mteb_isolation import isolate_mteb
from gteopt.evaluation.mteb_model import TaskModel
from gteopt.evaluation.views import View
from gteopt.progress import Progress
from gteopt.vectors.transform import identity_transform

if TYPE_CHECKING:
    from gteopt.encoder.tokenization import Role
    from gteopt.evaluation.tasks import ResolvedTask


_DIMS = 8


class _Recorder:
    """Takes the place of a cache and records the shards that the cache would have encoded."""

    def __init__(self, cache: VectorCache, planned: set[bytes]) -> None:
        self.encoder = cache.encoder
        self.keeps_lengths = cache.keeps_lengths
        self.shards: list[Shard] = []
        self.counts = ShardEncodings()
        self._cache = cache
        self._planned = planned
        self._rng = np.random.default_rng(0)

    def count_cached(self, asked: ShardEncodings) -> None:
        """Count nothing."""

    def embed(
        self, texts: Sequence[str], role: Role, instruction: str | None, progress: Progress
    ) -> npt.NDArray[np.float32]:
        """Record the texts that are not cached, and return random unit vectors [N, 8]."""
        missing = {
            digest: text
            for digest, text in self._cache.missing(texts, role, instruction).items()
            if digest not in self._planned
        }
        self._planned |= missing.keys()
        self.shards += cut_shards(missing.values(), role, instruction)
        vectors = self._rng.standard_normal((len(texts), _DIMS)).astype(np.float32)
        unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


class _NoSearch(TaskModel):
    """Encodes the texts of a search, and returns the first document for every query."""

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
        return {sha256: [first] * len(vectors) for sha256, vectors in queries.items()}


def upcoming_shards(
    resolved: ResolvedTask,
    cache: VectorCache,
    instruction: TaskInstruction,
    planned: set[bytes],
) -> list[Shard]:
    """The shards that scoring a task will encode, in order.

    Args:
        resolved: a task with its data; the state of its generators is restored.
        cache: texts in this cache are not encoded again.
        instruction: the instruction that the task will be scored with.
        planned: keys of texts that earlier tasks will have encoded; this task's keys are added.
    """
    recorder: Any = _Recorder(cache, planned)
    view = View("look-ahead", "", identity_transform(_DIMS))
    task = resolved.task
    generators = deepcopy((task.rng_state, task.np_rng))
    with isolate_mteb(offline=True):
        for split in resolved.splits:
            model = _NoSearch(recorder, view, instruction)
            # A metric may fail on random vectors. Texts that are then missing from the shards are
            # encoded when the task asks for them.
            with suppress(Exception):
                task.evaluate(model, split, encode_kwargs={"batch_size": 32})
    task.rng_state, task.np_rng = generators
    shards: list[Shard] = recorder.shards
    return shards
