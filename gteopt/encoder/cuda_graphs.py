"""Records the forward pass of short texts on a GPU, and replays it with one launch.

A GPU computes a text of 16 tokens in less time than Python needs to launch a model's hundreds of
kernels. A CUDA graph launches them all at once. Its shapes and addresses are fixed when it is
recorded, so a text is padded to the smallest of `LENGTHS` that holds it.

Hides: streams, recording, the memory that graphs share. Refuses to know: what is computed.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LENGTHS = (16, 32, 64, 128)
"""Padded lengths in tokens. Longer texts take a large model more time to compute than to launch."""
_WARMUP = 3
"""Passes before the recording. The first compiles and loads kernels and lets libraries allocate
and choose; all this is forbidden during a recording."""
Forward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Recording:
    """The graph of one length with its buffers.

    Attributes:
        host: pinned int64 [length + 1], the tokens and then their number.
        inputs: the same on the device.
        graph: reads `inputs` and writes `output`.
        output: [1, D] on the device.
        result: the same, pinned on the host.
    """

    host: Tensor
    inputs: Tensor
    graph: torch.cuda.CUDAGraph
    output: Tensor
    result: Tensor


class CudaGraphs:
    """The forward pass of one short text at a time, recorded on first use of each length.

    A recording keeps the layers and weights of its time: changed layers need new graphs. Threads
    take turns.

    Attributes:
        refused: why no more lengths are recorded; None while recording works. Earlier recordings
            are still replayed.
        n_bytes: device memory that the recordings took so far, with the driver's part. Other work
            on the device during a recording is counted too.
    """

    @property
    def lengths(self) -> tuple[int, ...]:
        """The recorded lengths in tokens."""
        return tuple(sorted(self._recordings))

    def __init__(self, forward: Forward, device: torch.device) -> None:
        """Record nothing yet.

        Args:
            forward: (int64 ids [T], int64 n [1]) on the device -> [1, D]; it must not copy a
                number to the host.
            device: a GPU.
        """
        self._forward, self._device = forward, device
        self._recordings: dict[int, _Recording] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # the allocator's handle of the memory that the graphs share
        self._lock = threading.Lock()
        self.refused: str | None = None
        self.n_bytes = 0

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int]) -> NDArray[np.float32] | None:
        """The vector [1, D] of one text; None if the text is too long or recording failed."""
        length = next((length for length in LENGTHS if len(ids) <= length), None)
        if length is None or not len(ids):
            return None
        with self._lock:
            if length not in self._recordings:
                if self.refused is not None:
                    return None
                try:
                    self._recordings[length] = self._record(length)
                except RuntimeError as error:  # from CUDA or an operator, or out of memory
                    # Closing an aborted recording fails too; the first error says more.
                    cause = error.__context__ or error
                    self.refused = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                    return None
            return self._replay(self._recordings[length], ids)

    def _replay(self, recording: _Recording, ids: Sequence[int]) -> NDArray[np.float32]:
        with torch.cuda.device(self._device):
            recording.host[: len(ids)] = torch.tensor(ids)
            recording.host[-1] = len(ids)  # tokens of an earlier, longer text are masked
            recording.inputs.copy_(recording.host, non_blocking=True)
            recording.graph.replay()
            recording.result.copy_(recording.output, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return recording.result.numpy().copy()

    def _record(self, length: int) -> _Recording:
        if self._stream is None or self._pool is None:
            # Libraries keep a workspace for each stream, so all passes share one stream.
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        host = torch.zeros(length + 1, dtype=torch.int64).pin_memory()
        host[-1] = length
        inputs = host.to(self._device)
        ids, n_tokens = inputs[:-1], inputs[-1:]
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # until weights and inputs are on the device
        # A failed recording leaves its stream current; this context restores the caller's.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(_WARMUP):
                self._forward(ids, n_tokens)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # recording does so too, which would hide the memory it takes
            free, _ = torch.cuda.mem_get_info()
            graph = torch.cuda.CUDAGraph()
            # Garbage collection of a Triton kernel unloads its code, which aborts a recording.
            # With "thread_local", other threads may allocate meanwhile.
            was_enabled = gc.isenabled()
            gc.disable()
            try:
                with torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ):
                    output = self._forward(ids, n_tokens)
            finally:
                if was_enabled:
                    gc.enable()
            self.n_bytes += max(free - torch.cuda.mem_get_info()[0], 0)
            result = torch.empty(output.shape, dtype=output.dtype).pin_memory()
        return _Recording(host, inputs, graph, output, result)
