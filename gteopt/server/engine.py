"""Run the one thread that uses the device.

Hides: threads, locks, how a failed pass is retried, how a hang is noticed. Refuses to know: HTTP,
what texts are, how vectors are sent.

A caller submits `EngineWork` and waits for its future. The thread composes a pass, computes it,
and hands out the rows. An exception fails only the text that caused it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gteopt.errors import NumericsError, is_out_of_memory
from gteopt.machine import release_freed_memory
from gteopt.server.batching import (
    CostModel,
    FairQueue,
    PassBudget,
    QueuedJob,
    QueuedText,
    bisect_failures,
    is_long_request,
    seconds_to_wait,
)

_IDLE_WAIT_S = 1.0
_HANG_S = 120.0
_HANG_RATIO = 50.0
"""A pass hangs when it takes this many times the predicted time, and at least `_HANG_S`."""
_FATAL = ("cuda error", "device-side assert", "illegal memory access", "unspecified launch failure")
_PACE_MEMORY = 0.9
"""Weight of the past in the running mean of measured over predicted time."""
_TRIM_S = 60.0
"""Least seconds between two calls that return free memory to the system; a call takes some ms."""
_SLOW_S = 0.1
"""Predicted seconds above which a pass lets small requests run between the model's blocks."""
Floats = NDArray[np.float32]


class Lane(Protocol):
    """A model on the device.

    Attributes:
        name: label in the metrics.
        cost: predicts the seconds of a pass.
        budget: limits of a pass.
    """

    name: str
    cost: CostModel
    budget: PassBudget

    def compute(
        self,
        tokens: Sequence[Sequence[int]],
        between_blocks: Callable[[], None] | None = None,
    ) -> Floats:
        """Unit vectors [N, D] of token lists, in their order; called by the engine's thread.

        It may call `between_blocks` between two blocks of the model, which computes other texts.
        """
        ...

    def padding(self, lengths: Sequence[int]) -> int:
        """Number of padding tokens that `compute` adds to texts of these lengths."""
        ...


class EngineObserver(Protocol):
    """Counts the engine's events; `dropped` is called by any thread, the others by the engine's."""

    def passed(self, lane: str, lengths: Sequence[int], padding: int, seconds: float) -> None:
        """Count a computed pass."""
        ...

    def waited(self, seconds: float) -> None:
        """Count how long a request waited for its first pass."""
        ...

    def failed(self, kind: str) -> None:
        """Count a text on which the model failed; `kind` is "non_finite" or "exception"."""
        ...

    def dropped(self) -> None:
        """Count a request that was dropped before it was computed."""
        ...


class QueueFull(Exception):
    """The queue is full.

    Attributes:
        retry_after_s: seconds until the queue has room.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full for {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class DeviceDied(Exception):
    """The device thread has ended or hangs; the process must be restarted."""


@dataclass(eq=False)
class EngineWork(QueuedJob):
    """A request with tokenized texts.

    Attributes:
        model: the model that computes it, which is also its lane.
        tokens: token ids of each text.
        vectors: [N, D] float32; rows of failed texts stay NaN.
        errors: errors of failed texts, by position.
        future: done when all texts are done, or when the request is dropped.
        submitted_at: time of submission, by the monotonic clock.
        queue_s: seconds until its first pass.
        n_open: texts that are not done yet.
    """

    model: Lane = field(kw_only=True)
    tokens: Sequence[Sequence[int]] = field(kw_only=True)
    vectors: Floats = field(init=False)
    errors: dict[int, Exception] = field(default_factory=dict, init=False)
    future: Future[EngineWork] = field(default_factory=Future, init=False)
    submitted_at: float = field(default=0.0, init=False)
    queue_s: float | None = field(default=None, init=False)
    n_open: int = field(default=0, init=False)

    @staticmethod
    def of(model: Lane, tokens: Sequence[Sequence[int]], *, key: str, dims: int) -> EngineWork:
        """Create the work for token lists whose vectors have `dims` dimensions."""
        lengths = [len(ids) for ids in tokens]
        costs = [model.cost.text_s(n) for n in lengths]
        work = EngineWork(model, model.budget, key, costs, lengths, model=model, tokens=tokens)
        work.vectors = np.full((len(tokens), dims), np.nan, dtype=np.float32)
        work.n_open = len(tokens)
        return work


Result = TypeVar("Result")


class Engine:
    """Computes submitted work in fair order, on its own thread, until it is stopped."""

    def __init__(
        self,
        observer: EngineObserver,
        *,
        max_queue_s: float = 30.0,
        weights: Mapping[str, float] | None = None,
        hang_s: float = _HANG_S,
    ) -> None:
        """Create an engine; `start` starts its thread.

        Args:
            observer: counts events.
            max_queue_s: seconds of work that may wait.
            weights: weight of each key; 1 for a key that is not listed.
            hang_s: a pass that takes longer is a hang, unless its predicted time is long too.
        """
        self._observer = observer
        self._max_queue_s = max_queue_s
        self._hang_s = hang_s
        self._queue = FairQueue(weights)
        self._tasks: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._running: set[EngineWork] = set()
        self._pass: tuple[float, float] | None = None
        self._pace = 1.0
        self._inside_s = 0.0
        self._trimmed_at = time.monotonic()
        self._device = threading.Thread(target=self._run, name="device", daemon=True)
        self.death: BaseException | None = None

    def start(self) -> None:
        """Start the device thread."""
        self._device.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and its pass does not hang."""
        if self.death is not None or not self._device.is_alive():
            return False
        current = self._pass
        if current is None:
            return True
        began, expected_s = current
        return time.monotonic() - began < max(self._hang_s, _HANG_RATIO * expected_s)

    @property
    def queued_s(self) -> float:
        """Seconds until all waiting work is computed, at the measured pace."""
        with self._changed:
            return self._queue.queued_s * self._pace

    @property
    def n_waiting(self) -> int:
        """Number of requests in the queue."""
        with self._changed:
            return len(self._queue)

    def submit(self, work: EngineWork) -> Future[EngineWork]:
        """Put a whole request into the queue.

        Raises:
            QueueFull: the queue has no room.
            DeviceDied: the device thread has ended or hangs.
        """
        with self._changed:
            if not self.is_alive or self._stopping:
                raise DeviceDied
            limit = self._max_queue_s / self._pace
            work.is_long = is_long_request(sum(work.costs), limit)
            wait = seconds_to_wait(self._queue, work, limit)
            if wait is not None:
                raise QueueFull(wait * self._pace)
            work.submitted_at = time.monotonic()
            self._queue.push(work)
            self._changed.notify()
        return work.future

    def drop(self, work: EngineWork) -> None:
        """Drop a request, because its caller no longer waits."""
        with self._changed:
            if not work.future.done():
                self._queue.drop(work)
                self._observer.dropped()
                work.future.cancel()

    def call(self, task: Callable[[], Result]) -> Future[Result]:
        """Run a function on the device thread, between two passes.

        Raises:
            DeviceDied: the device thread has ended or hangs.
        """
        future: Future[Result] = Future()
        with self._changed:
            if not self.is_alive or self._stopping:
                raise DeviceDied
            self._tasks.append((task, future))
            self._changed.notify()
        return future

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its current pass; waiting requests fail with `DeviceDied`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._device.join(timeout_s)
        self.fail_all(DeviceDied("the server stops"))

    def fail_all(self, error: Exception) -> None:
        """Fail all running and waiting requests with an error."""
        with self._changed:
            waiting = [*self._running]
            while batch := self._queue.compose():
                waiting += [item.job for item in batch if isinstance(item.job, EngineWork)]
            tasks, self._tasks = self._tasks, []
        for future in {work.future for work in waiting} | {future for _, future in tasks}:
            with suppress(InvalidStateError):
                future.set_exception(error)

    def _run(self) -> None:
        try:
            while (step := self._next()) is not None:
                step()
        except BaseException as error:
            self.death = error
        finally:
            if self.death is not None:
                self.fail_all(DeviceDied(f"the device failed: {self.death}"))

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next step of the thread; None ends the thread."""
        with self._changed:
            while True:
                if self._stopping:
                    return None
                if self._tasks:
                    task, future = self._tasks.pop(0)
                    return lambda: self._perform(task, future)
                if time.monotonic() - self._trimmed_at > _TRIM_S:
                    self._trimmed_at = time.monotonic()
                    return release_freed_memory
                if batch := self._queue.compose():
                    self._running = {item.job for item in batch if isinstance(item.job, EngineWork)}
                    return lambda: self._compute(batch)
                self._changed.wait(_IDLE_WAIT_S)

    def _perform(self, task: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)
            if _is_fatal(error):
                raise

    def _compute(self, batch: Sequence[QueuedText], *, inside: bool = False) -> None:
        """Compute one pass. `inside`: it runs between two blocks of another pass."""
        began = time.monotonic()
        works = [item.job for item in batch if isinstance(item.job, EngineWork)]
        for work in set(works):
            if work.queue_s is None:
                work.queue_s = began - work.submitted_at
                self._observer.waited(work.queue_s)
        model = works[0].model
        texts = [work.tokens[item.position] for work, item in zip(works, batch, strict=True)]
        lengths = [len(tokens) for tokens in texts]
        predicted_s = model.cost.pass_s(lengths)
        is_slow = predicted_s * self._pace > _SLOW_S and not inside
        outer, self._pass = self._pass, self._pass or (began, predicted_s * self._pace)
        inside_before = self._inside_s

        def run(part: Sequence[Sequence[int]]) -> list[Floats]:
            rows = model.compute(part, self._interlude) if is_slow else model.compute(part)
            return list(_finite(rows))

        try:
            outcomes = bisect_failures(run, texts, _is_fatal)
        finally:
            self._pass = outer
        took_s = time.monotonic() - began
        if inside:
            self._inside_s += took_s
        else:
            took_s -= self._inside_s - inside_before
        self._observer.passed(model.name, lengths, model.padding(lengths), took_s)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if not errors:
            ratio = min(10.0, max(0.1, took_s / predicted_s))
            self._pace = _PACE_MEMORY * self._pace + (1 - _PACE_MEMORY) * ratio
        elif any(map(is_out_of_memory, errors)):
            half = max(1, model.budget.tokens // 2)
            model.budget = PassBudget(model.budget.seconds / 2, half)
        for item, outcome in zip(batch, outcomes, strict=True):
            self._hand_out(item, outcome.row, outcome.error)
        self._running -= set(works)

    def _interlude(self) -> None:
        """Compute waiting small requests, between two blocks of a slow pass."""
        with self._changed:
            batch = self._queue.compose(small=True)
            self._running |= {item.job for item in batch if isinstance(item.job, EngineWork)}
        if batch:
            self._compute(batch, inside=True)

    def _hand_out(self, item: QueuedText, row: Floats | None, error: Exception | None) -> None:
        work = item.job
        assert isinstance(work, EngineWork)
        if error is not None:
            work.errors[item.position] = error
            self._observer.failed("non_finite" if _is_numerics(error) else "exception")
        else:
            assert row is not None
            work.vectors[item.position] = row
        work.n_open -= 1
        if work.n_open == 0:
            with suppress(InvalidStateError):  # the request was dropped during the pass
                work.future.set_result(work)


def _finite(rows: Floats) -> Floats:
    """The rows of a pass, unchanged.

    Raises:
        NumericsError: a row has NaN or infinity.
    """
    if not np.isfinite(rows).all():
        raise NumericsError("the model produced NaN or infinity")
    return rows


def _is_numerics(error: Exception) -> bool:
    return isinstance(error, NumericsError)


def _is_fatal(error: Exception) -> bool:
    """Whether no later pass can succeed after this error."""
    message = str(error).lower()
    return not is_out_of_memory(error) and any(word in message for word in _FATAL)
