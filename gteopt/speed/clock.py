"""Time calls, and pairs of calls that take turns.

Hides: CUDA events, the garbage collector, whose turn is first. Refuses to know: encoders.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch


def time_in_turns(
    turns: list[tuple[Callable[[], object], Callable[[], object]]],
    warmup: int,
    device: torch.device,
    step: Callable[[], None],
) -> Iterator[tuple[float, float]]:
    """Time pairs of calls; baseline and variant alternate in being first.

    Args:
        turns: (baseline, variant) pairs of calls.
        warmup: turns at the start that are run but not counted.
        device: device that the calls compute on.
        step: called after each turn.

    Yields:
        Seconds of (baseline, variant) in each counted turn.
    """
    with _garbage_collector_off():
        for index, (baseline, variant) in enumerate(turns):
            if index % 2:
                variant_s, baseline_s = time_call(variant, device), time_call(baseline, device)
            else:
                baseline_s, variant_s = time_call(baseline, device), time_call(variant, device)
            step()
            if index >= warmup:
                yield baseline_s, variant_s


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: by the monotonic clock on a CPU, by CUDA events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3  # milliseconds


class Stopwatch:
    """Measures wall-clock time and CPU time of this process since it was created."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def wall_s(self) -> float:
        """Seconds of the wall clock so far."""
        return time.perf_counter() - self._wall

    @property
    def cpu_s(self) -> float:
        """CPU seconds of this process and its threads so far."""
        return time.process_time() - self._cpu


@contextlib.contextmanager
def _garbage_collector_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def release_model_memory() -> None:
    """Return freed memory to the system, so that the next model fits."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
