"""The one thread that owns the device.

Hides: threads, locks, how a failed pass is retried, how a hang is noticed. Refuses to know: HTTP,
what texts are, how vectors are sent.

Whoever wants vectors submits `Work` and waits for its future. The thread composes a pass, computes
it, hands out the rows, and beats. An exception fails the text that caused it, nothing else.
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
from gteopt.server.batching import (
    Budget,
    CostModel,
    FairQueue,
    Item,
    Job,
    bisect_failures,
    is_long,
    seconds_to_wait,
)

_IDLE_BEAT_S = 1.0
_HANG_S = 120.0
_HANG_RATIO = 50.0
"""A pass hangs when it takes this many times what was predicted, and at least `_HANG_S`."""
_FATAL = ("cuda error", "device-side assert", "illegal memory access", "unspecified launch failure")
_PACE_MEMORY = 0.9
_SLOW_S = 0.1
"""Passes that take longer let small requests in between the model's blocks."""
Floats = NDArray[np.float32]


class Lane(Protocol):
    """A model on the device.

    Attributes:
        name: for metrics.
        cost: what passes take.
        budget: what one may hold.
    """

    name: str
    cost: CostModel
    budget: Budget

    def compute(
        self,
        tokens: Sequence[Sequence[int]],
        between_blocks: Callable[[], None] | None = None,
    ) -> Floats:
        """Unit vectors [N, D] of token lists, in their order; called by the engine's thread.

        `between_blocks` may be called meanwhile, and computes other texts.
        """
        ...

    def padding(self, lengths: Sequence[int]) -> int:
        """Tokens of padding that `compute` adds to texts of these lengths."""
        ...


class Observer(Protocol):
    """Who counts what the engine does; called by its thread."""

    def passed(self, lane: str, lengths: Sequence[int], padding: int, seconds: float) -> None:
        """A pass was computed."""
        ...

    def waited(self, seconds: float) -> None:
        """A request waited so long for its first pass."""
        ...

    def failed(self, kind: str) -> None:
        """A text failed by itself: "non_finite" or "exception"."""
        ...

    def dropped(self) -> None:
        """A request was dropped before it was computed."""
        ...


class Refused(Exception):
    """The queue is full.

    Attributes:
        retry_after_s: when there will be room.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full for {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class DeviceDied(Exception):
    """The device thread has ended or hangs; the process has to be started anew."""


@dataclass(eq=False)
class Work(Job):
    """A request whose texts are tokenized.

    Attributes:
        model: what computes it; its lane.
        tokens: of each text.
        vectors: [N, D] float32; rows of texts that failed stay NaN.
        errors: by position, of texts that failed.
        future: done when every text is, or the request was dropped.
        submitted_at: when it entered the queue, by the monotonic clock.
        queue_s: how long it waited for its first pass.
    """

    model: Lane = field(kw_only=True)
    tokens: Sequence[Sequence[int]] = field(kw_only=True)
    vectors: Floats = field(init=False)
    errors: dict[int, Exception] = field(default_factory=dict, init=False)
    future: Future[Work] = field(default_factory=Future, init=False)
    submitted_at: float = field(default=0.0, init=False)
    queue_s: float | None = field(default=None, init=False)
    n_open: int = field(default=0, init=False)

    @staticmethod
    def of(model: Lane, tokens: Sequence[Sequence[int]], *, key: str, dims: int) -> Work:
        """Work for token lists whose vectors have `dims` dimensions."""
        lengths = [len(each) for each in tokens]
        costs = [model.cost.text_s(n) for n in lengths]
        work = Work(model, model.budget, key, costs, lengths, model=model, tokens=tokens)
        work.vectors = np.full((len(tokens), dims), np.nan, dtype=np.float32)
        work.n_open = len(tokens)
        return work


Result = TypeVar("Result")


class Engine:
    """Computes what is submitted, fairly, until it is stopped."""

    def __init__(
        self,
        observer: Observer,
        *,
        max_queue_s: float = 30.0,
        weights: Mapping[str, float] | None = None,
        hang_s: float = _HANG_S,
    ) -> None:
        """An engine that `start` sets going.

        Args:
            observer: is told of every pass.
            max_queue_s: seconds of work that may wait.
            weights: of keys.
            hang_s: a pass that takes longer is a hang, unless longer was predicted.
        """
        self._observer = observer
        self._max_queue_s = max_queue_s
        self._hang_s = hang_s
        self._queue = FairQueue(weights)
        self._tasks: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._running: set[Work] = set()
        self._pass: tuple[float, float] | None = None
        self._pace = 1.0
        self._inside_s = 0.0
        self._device = threading.Thread(target=self._run, name="device", daemon=True)
        self.death: BaseException | None = None
        self.beat = time.monotonic()

    def start(self) -> None:
        """Start the thread."""
        self._device.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread lives and its pass takes no longer than it may."""
        if self.death is not None or not self._device.is_alive():
            return False
        current = self._pass
        if current is None:
            return True
        began, expected = current
        return time.monotonic() - began < max(self._hang_s, _HANG_RATIO * expected)

    @property
    def queued_s(self) -> float:
        """Seconds until everything that waits is computed, at the measured pace."""
        with self._changed:
            return self._queue.queued_s * self._pace

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        with self._changed:
            return len(self._queue)

    def submit(self, work: Work) -> Future[Work]:
        """Put a whole request into the queue.

        Raises:
            Refused: there is no room.
            DeviceDied: nothing computes it any more.
        """
        with self._changed:
            if not self.is_alive or self._stopping:
                raise DeviceDied
            limit = self._max_queue_s / self._pace
            work.is_long = is_long(sum(work.costs), limit)
            wait = seconds_to_wait(self._queue, work, limit)
            if wait is not None:
                raise Refused(wait * self._pace)
            work.submitted_at = time.monotonic()
            self._queue.push(work)
            self._changed.notify()
        return work.future

    def drop(self, work: Work) -> None:
        """Nobody waits for a request any more."""
        with self._changed:
            if not work.future.done():
                self._queue.drop(work)
                self._observer.dropped()
                work.future.cancel()

    def call(self, task: Callable[[], Result]) -> Future[Result]:
        """Run a function on the device thread between two passes."""
        future: Future[Result] = Future()
        with self._changed:
            if not self.is_alive or self._stopping:
                raise DeviceDied
            self._tasks.append((task, future))
            self._changed.notify()
        return future

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after its pass; what still waits fails."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._device.join(timeout_s)
        self.fail_all(DeviceDied("the server stops"))

    def fail_all(self, error: Exception) -> None:
        """Answer everybody who waits with an error."""
        with self._changed:
            waiting = [*self._running]
            while batch := self._queue.compose():
                waiting += [item.job for item in batch if isinstance(item.job, Work)]
            tasks, self._tasks = self._tasks, []
        for future in {each.future for each in waiting} | {each for _, each in tasks}:
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
        """What the thread does next; None to end."""
        with self._changed:
            while True:
                self.beat = time.monotonic()
                if self._stopping:
                    return None
                if self._tasks:
                    task, future = self._tasks.pop(0)
                    return lambda: self._perform(task, future)
                if batch := self._queue.compose():
                    self._running = {i.job for i in batch if isinstance(i.job, Work)}
                    return lambda: self._compute(batch)
                self._changed.wait(_IDLE_BEAT_S)

    def _perform(self, task: Callable[[], Any], future: Future[Any]) -> None:
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)
            if _is_fatal(error):
                raise

    def _compute(self, batch: Sequence[Item], *, inside: bool = False) -> None:
        """One pass; `inside` another one, between two of its blocks."""
        began = time.monotonic()
        works = [item.job for item in batch if isinstance(item.job, Work)]
        for work in set(works):
            if work.queue_s is None:
                work.queue_s = began - work.submitted_at
                self._observer.waited(work.queue_s)
        model = works[0].model
        texts = [work.tokens[item.position] for work, item in zip(works, batch, strict=True)]
        lengths = [len(each) for each in texts]
        expected = model.cost.pass_s(lengths)
        is_slow = expected * self._pace > _SLOW_S and not inside
        outer, self._pass = self._pass, self._pass or (began, expected * self._pace)
        inside_before = self._inside_s

        def run(some: Sequence[Sequence[int]]) -> list[Floats]:
            rows = model.compute(some, self._interlude) if is_slow else model.compute(some)
            return list(_finite(rows))

        try:
            outcomes = bisect_failures(run, texts, _is_fatal)
        finally:
            self._pass = outer
        took = time.monotonic() - began
        if inside:
            self._inside_s += took
        else:
            took -= self._inside_s - inside_before
        self._observer.passed(model.name, lengths, model.padding(lengths), took)
        if all(each.error is None for each in outcomes):
            ratio = min(10.0, max(0.1, took / expected))
            self._pace = _PACE_MEMORY * self._pace + (1 - _PACE_MEMORY) * ratio
        elif any(each.error is not None and is_out_of_memory(each.error) for each in outcomes):
            half = max(1, model.budget.tokens // 2)
            model.budget = Budget(model.budget.seconds / 2, half)
        for item, outcome in zip(batch, outcomes, strict=True):
            self._hand_out(item, outcome.row, outcome.error)
        self._running -= set(works)

    def _interlude(self) -> None:
        """Between two blocks of a slow pass: small requests that wait are computed."""
        self.beat = time.monotonic()
        with self._changed:
            batch = self._queue.compose(small=True)
            self._running |= {item.job for item in batch if isinstance(item.job, Work)}
        if batch:
            self._compute(batch, inside=True)

    def _hand_out(self, item: Item, row: Floats | None, error: Exception | None) -> None:
        work = item.job
        assert isinstance(work, Work)
        if error is not None:
            work.errors[item.position] = error
            self._observer.failed("non_finite" if _is_numerics(error) else "exception")
        else:
            assert row is not None
            work.vectors[item.position] = row
        work.n_open -= 1
        if work.n_open == 0:
            with suppress(InvalidStateError):  # dropped meanwhile
                work.future.set_result(work)


def _finite(rows: Floats) -> Floats:
    """The rows of a pass.

    Raises:
        NumericsError: some number in them is none.
    """
    if not np.isfinite(rows).all():
        raise NumericsError("the model produced NaN or infinity")
    return rows


def _is_numerics(error: Exception) -> bool:
    return isinstance(error, NumericsError)


def _is_fatal(error: Exception) -> bool:
    """Whether no later pass can succeed."""
    said = str(error).lower()
    return not is_out_of_memory(error) and any(word in said for word in _FATAL)
