"""Vectors on their way from a device to the host.

Hides: pinned memory and events. Refuses to know: what computed them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Fetch:
    """A copy of a device's tensor that is under way behind what computes it.

    A plain copy would begin when it is asked for, behind all that was started in the meantime, so
    that the host would wait for the next batch too.

    Args:
        vectors: of any shape; a GPU may still be computing them. On the host there is no copy.
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors
        self._done: torch.cuda.Event | None = None
        if vectors.is_cuda:
            with torch.cuda.device(vectors.device):
                self._vectors = torch.empty(
                    vectors.shape, dtype=vectors.dtype, device="cpu", pin_memory=True
                ).copy_(vectors, non_blocking=True)
                self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._done.record()

    def wait(self) -> Tensor:
        """The tensor on the host, once it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._vectors
