"""Ids that are there twice, counted without holding them in memory.

Hides: hashes of 8 bytes, and the passes over a corpus of which not even those fit. Refuses to know:
where ids come from. Two ids of a billion share a hash with a probability of 3 in 100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

HASHES_AT_ONCE = 1 << 26
"""512 MiB of hashes."""


def count_duplicates(batches: Callable[[], Iterator[Sequence[str]]], n_ids: int) -> int:
    """How many ids were there before.

    Args:
        batches: gives all ids, each time that it is called.
        n_ids: about how many there are.
    """
    n_passes = -(-n_ids // HASHES_AT_ONCE) or 1
    found = 0
    for number in range(n_passes):
        parts = [each[each % n_passes == number] for each in map(_hashes, batches())]
        hashes = np.concatenate(parts) if parts else np.empty(0, np.uint64)
        found += len(hashes) - len(np.unique(hashes))
    return found


def examples(batches: Iterable[Sequence[str]], n: int = 5) -> list[str]:
    """The first few ids that are there twice."""
    seen: set[bytes] = set()
    found: dict[str, None] = {}
    for batch in batches:
        for each in batch:
            digest = _digest(each)
            if digest in seen:
                found[each] = None
                if len(found) == n:
                    return list(found)
            seen.add(digest)
    return list(found)


def _digest(said: str) -> bytes:
    return blake2b(said.encode(), digest_size=8).digest()


def _hashes(ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(map(_digest, ids)), np.uint64)
