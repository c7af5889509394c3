"""Cache vectors of texts that were computed before.

Hides: which vector is removed first. Refuses to know: models and texts.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ENTRY_BYTES = 300
"""Overhead of a vector in bytes: the dictionary's entry, the key and the array's header."""


class RequestCache:
    """A cache of limited size, which removes the least recently used vectors first.

    Only one thread may use it: the event loop's.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    @property
    def n_bytes(self) -> int:
        """Memory in use, approximately."""
        return self._n_bytes

    @staticmethod
    def key(model_sha256: str, tokens: Sequence[int], n_prompt: int = 0) -> bytes:
        """Hash of the model's hash, a text's token ids and the number of its prompt tokens."""
        prefix = f"{model_sha256}:{n_prompt}:".encode()
        return hashlib.sha256(prefix + array("q", tokens).tobytes()).digest()

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The vector of a key, or None."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: NDArray[np.float32]) -> None:
        """Store a copy of a vector [D]. A view would keep the other rows in memory."""
        if (old := self._vectors.pop(key, None)) is not None:
            self._n_bytes -= old.nbytes + _ENTRY_BYTES
        self._vectors[key] = vector.copy()
        self._n_bytes += vector.nbytes + _ENTRY_BYTES
        while self._n_bytes > self._max_bytes:
            _, old = self._vectors.popitem(last=False)
            self._n_bytes -= old.nbytes + _ENTRY_BYTES
