"""Clocks, and turns between two encoders.

Hides: CUDA events, the garbage collector, whose turn is first. Refuses to know: encoders.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

import torch


def _take_turns(
    turns: list[tuple[Callable[[], object], Callable[[], object]]],
    warmup: int,
    device: torch.device,
    step: Callable[[], None],
) -> Iterator[tuple[float, float]]:
    """Seconds of (baseline, variant) in each turn after the first `warmup`."""
    with _garbage_collector_off():
        for index, (baseline, variant) in enumerate(turns):
            if index % 2:
                variant_s, baseline_s = _seconds(variant, device), _seconds(baseline, device)
            else:
                baseline_s, variant_s = _seconds(baseline, device), _seconds(variant, device)
            step()
            if index >= warmup:
                yield baseline_s, variant_s


def _seconds(call: Callable[[], object], device: torch.device) -> float:
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


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
