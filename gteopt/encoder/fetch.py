"""Copies vectors from a device to the host while the device computes on.

Hides: pinned memory and events. Refuses to know: what computed them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HostFetch:
    """A copy to the host, queued on the device right after the computation of a tensor.

    A plain copy is queued only when its result is needed. The next batch is queued by then, so the
    host would wait for that batch too.

    Args:
        vectors: any shape; a GPU may still be computing them. A host tensor is not copied.
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
        """Wait for the copy; return the tensor on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._vectors
