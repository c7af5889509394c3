"""Count duplicate ids without holding the ids in memory.

Hides: hashes of 8 bytes, and several passes over a corpus whose hashes do not fit the memory.
Refuses to know: where ids come from. With a billion ids, the probability that any two different ids
share a hash is 3 in 100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

HASHES_AT_ONCE = 1 << 26
"""512 MiB of hashes."""


def count_duplicate_ids(batches: Callable[[], Iterator[Sequence[str]]], n_ids: int) -> int:
    """How many ids repeat an earlier id.

    Args:
        batches: gives all ids each time that it is called.
        n_ids: about how many ids there are.
    """
    n_passes = -(-n_ids // HASHES_AT_ONCE) or 1
    n_duplicates = 0
    for number in range(n_passes):
        parts = [hashes[hashes % n_passes == number] for hashes in map(_hashes, batches())]
        of_pass = np.concatenate(parts) if parts else np.empty(0, np.uint64)
        n_duplicates += len(of_pass) - len(np.unique(of_pass))
    return n_duplicates


def list_duplicate_ids(batches: Iterable[Sequence[str]], n: int = 5) -> list[str]:
    """The first few ids that repeat an earlier id."""
    digests: set[bytes] = set()
    duplicates: dict[str, None] = {}
    for batch in batches:
        for id_ in batch:
            digest = _digest(id_)
            if digest in digests:
                duplicates[id_] = None
                if len(duplicates) == n:
                    return list(duplicates)
            digests.add(digest)
    return list(duplicates)


def _digest(id_: str) -> bytes:
    return blake2b(id_.encode(), digest_size=8).digest()


def _hashes(ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(map(_digest, ids)), np.uint64)
