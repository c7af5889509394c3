"""Short texts on a GPU: the forward pass recorded once a length, then replayed with one launch.

A text of 16 tokens keeps a GPU busy for less time than Python needs to launch the hundreds of
kernels of a model. A CUDA graph launches them all at once, for shapes and addresses that are fixed
when it is recorded: a text is put in the least of `LENGTHS` that holds it, with padding behind.

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
"""Beyond these a large model computes for longer than it takes to launch."""
_WARMUP = 3
"""Passes before one is recorded: the first compiles and loads kernels and lets libraries allocate
and choose, none of which may happen while recording."""
Forward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Recording:
    """One length: what is sent in, what runs, where the result lies.

    Attributes:
        host: pinned int64 [length + 1], tokens and then their number.
        inputs: the same on the device.
        graph: reads `inputs`, writes `output`.
        output: [1, D] on the device.
        result: the same, pinned on the host.
    """

    host: Tensor
    inputs: Tensor
    graph: torch.cuda.CUDAGraph
    output: Tensor
    result: Tensor


class CudaGraphs:
    """A forward pass for one short text at a time, recorded on first use of each length.

    What is recorded are the layers and weights of that moment: whoever changes them needs new
    graphs. Threads take turns.

    Attributes:
        refused: why nothing is recorded any more; None while all goes well. What was recorded
            before is still replayed.
        n_bytes: device memory that the recordings took so far, the driver's part included; other
            work on the device at the time is in it.
    """

    @property
    def lengths(self) -> tuple[int, ...]:
        """Those that are recorded."""
        return tuple(sorted(self._recordings))

    def __init__(self, forward: Forward, device: torch.device) -> None:
        """Record nothing yet.

        Args:
            forward: (int64 ids [T], int64 n [1]) on the device -> [1, D]; reads no number back.
            device: a GPU.
        """
        self._forward, self._device = forward, device
        self._recordings: dict[int, _Recording] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None  # a token of the allocator
        self._lock = threading.Lock()
        self.refused: str | None = None
        self.n_bytes = 0

    @torch.inference_mode()
    def __call__(self, ids: Sequence[int]) -> NDArray[np.float32] | None:
        """The vector [1, D] of one text; None where it is too long, or where recording failed."""
        length = next((each for each in LENGTHS if len(ids) <= each), None)
        if length is None or not len(ids):
            return None
        with self._lock:
            if length not in self._recordings:
                if self.refused is not None:
                    return None
                try:
                    self._recordings[length] = self._record(length)
                except RuntimeError as error:  # of CUDA, of an operator, or for want of memory
                    # The end of a recording that was broken off fails too, and says less.
                    cause = error.__context__ or error
                    self.refused = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                    return None
            return self._replay(self._recordings[length], ids)

    def _replay(self, recording: _Recording, ids: Sequence[int]) -> NDArray[np.float32]:
        with torch.cuda.device(self._device):
            recording.host[: len(ids)] = torch.tensor(ids)
            recording.host[-1] = len(ids)  # what a longer text left in between is never seen
            recording.inputs.copy_(recording.host, non_blocking=True)
            recording.graph.replay()
            recording.result.copy_(recording.output, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return recording.result.numpy().copy()

    def _record(self, length: int) -> _Recording:
        if self._stream is None or self._pool is None:
            # Libraries keep workspaces by stream: all passes, warm-up included, share one.
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        host = torch.zeros(length + 1, dtype=torch.int64).pin_memory()
        host[-1] = length
        inputs = host.to(self._device)
        ids, n_tokens = inputs[:-1], inputs[-1:]
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # weights and inputs are there
        # A recording that fails leaves its stream current: this context puts the caller's back.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(_WARMUP):
                self._forward(ids, n_tokens)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # recording does, so that what it takes can be seen
            free, _ = torch.cuda.mem_get_info()
            graph = torch.cuda.CUDAGraph()
            # A kernel of Triton's that is collected unloads its code, which ends a recording.
            # Other threads may allocate meanwhile ("thread_local").
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
