"""Give each task its cache of vectors: one cache for each token limit and normalization.

Hides: how an encoder is changed to cut texts earlier, or to keep the lengths of its vectors.
Refuses to know: tasks' data, scores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gteopt.corpus.shards import LocalEncoding
from gteopt.corpus.vector_cache import VectorCache
from gteopt.encoder.changed_encoder import change_encoder

if TYPE_CHECKING:
    from gteopt.encoder.description import EncoderDescription
    from gteopt.evaluation.runner import SuiteEncodeOptions
    from gteopt.evaluation.tasks import ResolvedTask


class TaskVectors:
    """Caches of one encoder's vectors, opened when a task needs them."""

    def __init__(
        self,
        encoder: EncoderDescription,
        store: Path,
        options: SuiteEncodeOptions,
        say: Callable[[str], None],
    ) -> None:
        """Prepare for caches in folders of `store`; no cache is opened yet."""
        self._encoder = encoder
        self._store = store
        self._options = options
        self._say = say
        self._open: dict[tuple[int, bool], VectorCache] = {}

    def of(self, task: ResolvedTask) -> VectorCache:
        """The cache with the token limit and the normalization of a task."""
        longest = self._encoder.tokenization.max_tokens
        return self._cache(min(task.max_tokens or longest, longest), normalize=task.normalize)

    def usual(self) -> VectorCache:
        """The cache for tasks with the encoder's token limit and unit vectors."""
        return self._cache(self._encoder.tokenization.max_tokens, normalize=True)

    def _cache(self, max_tokens: int, *, normalize: bool) -> VectorCache:
        key = max_tokens, normalize
        if key not in self._open:
            self._open[key] = self._opened(max_tokens, normalize=normalize)
        return self._open[key]

    def _opened(self, max_tokens: int, *, normalize: bool) -> VectorCache:
        options, encoder, folder = self._options, self._encoder, "vectors"
        encode = options.encode
        if max_tokens < encoder.tokenization.max_tokens or not normalize:
            if encode is not None:
                encode = encode.changed(max_tokens, normalize=normalize)
            encoder = change_encoder(encoder, max_tokens, normalize=normalize)
            folder = f"vectors-{max_tokens}{'' if normalize else '-any-length'}"
        cache = VectorCache(
            encoder,
            self._store / folder,
            encode=encode or LocalEncoding(encoder, options.batch_size, self._say),
            limit_bytes=options.cache_bytes,
            dtype=options.dtype,
            say=self._say,
        )
        cache.keeps_lengths = not normalize
        return cache
