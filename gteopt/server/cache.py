"""Vectors of texts that were asked for before.

Hides: which vector is forgotten first. Refuses to know: what a vector is of.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ENTRY_BYTES = 300
"""Of the dictionary, the key and the array's own header."""


class VectorCache:
    """The least recently used vectors are forgotten where memory is full.

    Used by one thread, the event loop's.

    Attributes:
        n_hits: texts that were found.
        n_misses: texts that were not.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self.n_hits = self.n_misses = 0

    @property
    def n_bytes(self) -> int:
        """Memory in use, about."""
        return self._n_bytes

    @staticmethod
    def key(model_sha256: str, tokens: Sequence[int], n_prompt: int = 0) -> bytes:
        """What names a text: the model's hash, its token ids, and how many of them are a prompt."""
        about = f"{model_sha256}:{n_prompt}:".encode()
        return hashlib.sha256(about + array("q", tokens).tobytes()).digest()

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The vector, or None."""
        found = self._vectors.get(key)
        if found is None:
            self.n_misses += 1
            return None
        self.n_hits += 1
        self._vectors.move_to_end(key)
        return found

    def put(self, key: bytes, vector: NDArray[np.float32]) -> None:
        """Keep a vector [D]; a copy, so that it holds no other rows in memory."""
        if (old := self._vectors.pop(key, None)) is not None:
            self._n_bytes -= old.nbytes + _ENTRY_BYTES
        self._vectors[key] = vector.copy()
        self._n_bytes += vector.nbytes + _ENTRY_BYTES
        while self._n_bytes > self._max_bytes:
            _, old = self._vectors.popitem(last=False)
            self._n_bytes -= old.nbytes + _ENTRY_BYTES
