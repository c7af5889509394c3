"""The vectors of each task: one cache for each limit of tokens and treatment of lengths.

Hides: how an encoder is made to cut earlier, or to leave its vectors as long as they are. Refuses
to know: tasks' data, scores.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from gteopt.corpus.shards import LocalEncoding
from gteopt.corpus.vector_cache import VectorCache
from gteopt.errors import UnsupportedError

if TYPE_CHECKING:
    from gteopt.encoder.description import Description
    from gteopt.evaluation.runner import EncodeOptions
    from gteopt.evaluation.tasks import ResolvedTask


_NORMALIZING = frozenset({"Normalized", "Normalize"})
"""Modules that scale to unit length: gteopt's own, and that of Sentence Transformers."""


class TaskVectors:
    """Caches of one encoder's vectors, opened when a task needs them."""

    def __init__(
        self,
        encoder: Description,
        store: Path,
        options: EncodeOptions,
        say: Callable[[str], None],
    ) -> None:
        """Nothing is opened yet; the caches lie below `store`."""
        self._encoder = encoder
        self._store = store
        self._options = options
        self._say = say
        self._open: dict[tuple[int, bool], VectorCache] = {}

    def of(self, task: ResolvedTask) -> VectorCache:
        """The cache for a task.

        Raises:
            UnsupportedError: workers encode, and the task changes how.
        """
        longest = self._encoder.tokenization.max_tokens
        return self._cache(min(task.max_tokens or longest, longest), normalize=task.normalize)

    def usual(self) -> VectorCache:
        """The cache for tasks that change nothing."""
        return self._cache(self._encoder.tokenization.max_tokens, normalize=True)

    def _cache(self, max_tokens: int, *, normalize: bool) -> VectorCache:
        key = max_tokens, normalize
        if key not in self._open:
            self._open[key] = self._opened(max_tokens, normalize=normalize)
        return self._open[key]

    def _opened(self, max_tokens: int, *, normalize: bool) -> VectorCache:
        options, encoder, folder = self._options, self._encoder, "vectors"
        if max_tokens < encoder.tokenization.max_tokens or not normalize:
            if options.encode is not None:
                raise UnsupportedError(
                    "workers encode up to the model's own limit and to unit length; a suite or "
                    "protocol with max_tokens or normalize needs an evaluation without --devices "
                    "and --ray"
                )
            encoder = changed_encoder(encoder, max_tokens, normalize=normalize)
            folder = f"vectors-{max_tokens}{'' if normalize else '-any-length'}"
        cache = VectorCache(
            encoder,
            self._store / folder,
            encode=options.encode or LocalEncoding(encoder, options.batch_size, self._say),
            limit_bytes=options.cache_bytes,
            dtype=options.dtype,
            say=self._say,
        )
        cache.keeps_lengths = not normalize
        return cache


def changed_encoder(encoder: Description, max_tokens: int, *, normalize: bool) -> Description:
    """The same weights, with texts cut earlier or with vectors as long as the model makes them."""
    from gteopt.encoder.encoder import Encoder
    from gteopt.encoder.pooling import Head

    changed = copy(encoder)
    changed.tokenization = copy(encoder.tokenization)
    changed.tokenization.max_tokens = min(max_tokens, encoder.tokenization.max_tokens)
    if isinstance(changed, Encoder) and not normalize:
        head = changed.head
        behind = [each for each in head.behind if type(each).__name__ not in _NORMALIZING]
        changed.head = Head(head.pooling, behind, around=list(head.around), latent=head.latent)
        changed.cuda_graphs = None  # recordings end with the unchanged head
    return changed
