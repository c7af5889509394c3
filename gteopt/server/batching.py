"""Decide which texts run together, and in which order.

Hides: the cost model, the two levels of fairness, the token budget. Refuses to know: threads,
clocks, torch, HTTP. Time is virtual here: it advances by the work that was handed out.

Between keys, the queue is start-time fair (SFQ, Goyal et al. 1996, section 2). Between the requests
of a key, it shares equally by packet-by-packet generalised processor sharing (PGPS, Parekh and
Gallager 1993, section III). A request of cost c among n others is finished before (n + 1) c of its
key's work is done. The bound is exact up to the cost of one text. Start-time fairness would not do
between requests: short new requests could overtake a waiting one for ever.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

_LEAST_SECONDS = 1e-9
_SMALL = 0.25
"""A request with at most this share of a pass's budget is small, and may run before the others."""


@dataclass(frozen=True)
class CostModel:
    """Predicts the seconds of one pass from the lengths of its texts.

    Seconds are those of the wall clock where no other process uses the device.

    t = overhead + sum over texts of l tokens of (per_text + per_token l + per_square l^2)

    Attributes:
        overhead_s: constant seconds of a pass.
        per_text_s: seconds per text.
        per_token_s: seconds per token.
        per_square_s: seconds per pair of tokens of a text, for attention.
    """

    overhead_s: float
    per_text_s: float
    per_token_s: float
    per_square_s: float

    def text_s(self, n_tokens: int) -> float:
        """Seconds that one text adds to a pass."""
        added = self.per_text_s + n_tokens * (self.per_token_s + n_tokens * self.per_square_s)
        return max(added, _LEAST_SECONDS)

    def pass_s(self, lengths: Sequence[int]) -> float:
        """Seconds of a pass over texts of these lengths."""
        return self.overhead_s + sum(map(self.text_s, lengths))

    def budget_s(self, share: float = 0.95) -> float:
        """The least work of a pass, in seconds, that reaches this share of the best throughput.

        Work w takes overhead + w seconds, so the share is w / (overhead + w).
        """
        return self.overhead_s * share / (1 - share)

    @staticmethod
    def fit(passes: Sequence[tuple[Sequence[int], float]]) -> CostModel:
        """Fit the model to measured passes: least relative squared error, no negative term.

        Args:
            passes: for each pass, the lengths of its texts and its measured seconds.
        """
        from scipy.optimize import nnls

        terms = [
            (1, len(lengths), sum(lengths), sum(length * length for length in lengths))
            for lengths, _ in passes
        ]
        seconds = np.array([took for _, took in passes])
        # Scale the columns to similar size, or the solver's tolerance would hide the small terms.
        rows = np.array(terms, dtype=np.float64) / seconds[:, None]
        scale = rows.max(axis=0)
        scaled, _ = nnls(rows / scale, np.ones(len(rows)))
        return CostModel(*(float(coefficient) for coefficient in scaled / scale))


@dataclass(frozen=True, eq=False)
class PassBudget:
    """The limits of one pass. The first text is taken even if it alone exceeds them.

    Attributes:
        seconds: most seconds of predicted work.
        tokens: most tokens, over all texts.
    """

    seconds: float
    tokens: int


@dataclass(eq=False)
class QueuedJob:
    """One request in the queue.

    Attributes:
        lane: only jobs of the same lane may run in one pass.
        budget: limits of a pass in that lane.
        key: name of the caller's key.
        costs: seconds of work of each text.
        lengths: tokens of each text.
        is_long: the job may not use the part of the queue that is kept for short requests.
        is_dropped: the caller no longer waits for it.
        is_small: the job needs at most a quarter of a pass's budget.
    """

    lane: object
    budget: PassBudget
    key: str
    costs: Sequence[float]
    lengths: Sequence[int]
    is_long: bool = False
    is_dropped: bool = False
    n_left: int = field(default=0, init=False)
    left_s: float = field(default=0.0, init=False)
    finish: float = field(default=0.0, init=False)
    is_small: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Decide whether the job is small."""
        self.is_small = (
            sum(self.costs) <= _SMALL * self.budget.seconds
            and sum(self.lengths) <= _SMALL * self.budget.tokens
        )


@dataclass(eq=False, slots=True)
class QueuedText:
    """One text of a job; `tag` is the virtual time at which processor sharing would finish it."""

    job: QueuedJob
    position: int
    tag: float

    @property
    def cost_s(self) -> float:
        """Seconds of work."""
        return self.job.costs[self.position]

    @property
    def n_tokens(self) -> int:
        """Tokens of the text."""
        return self.job.lengths[self.position]


class _Shares:
    """The virtual time of jobs that share one device equally.

    It advances by work / n while n jobs are active. A job stays active until the time reaches its
    finish, even if its texts were served earlier than its share allows.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._finishes: list[float] = []

    def enter(self, work: float) -> float:
        """Add a job with this much work, and return its start."""
        heapq.heappush(self._finishes, self.now + work)
        return self.now

    def leave(self, finish: float) -> None:
        """Remove a dropped job, given its finish."""
        if finish in self._finishes:
            self._finishes.remove(finish)
            heapq.heapify(self._finishes)

    def advance(self, work: float) -> None:
        """Advance the time by work that was handed out."""
        while self._finishes:
            n = len(self._finishes)
            until_next = (self._finishes[0] - self.now) * n
            if work < until_next:
                self.now += work / n
                return
            work -= max(0.0, until_next)
            self.now = heapq.heappop(self._finishes)


_Entry = tuple[float, int, QueuedText]


class _Key:
    """The waiting texts of one key: a heap per lane, ordered by tag."""

    def __init__(self, start: float, weight: float) -> None:
        self.start = start
        self.weight = weight
        self.shares = _Shares()
        self.queued_s = 0.0
        self.queued_long_s = 0.0
        self.jobs: set[QueuedJob] = set()
        self.lanes: dict[object, list[_Entry]] = {}

    def add(self, work_s: float, *, is_long: bool) -> None:
        """Add to the seconds of waiting work; a negative number removes from them."""
        self.queued_s = max(0.0, self.queued_s + work_s)
        if is_long:
            self.queued_long_s = max(0.0, self.queued_long_s + work_s)

    def head(self, lane: object | None) -> list[_Entry] | None:
        """The heap that has the next text, in one lane or (None) in all lanes.

        It removes texts of dropped requests from the front of the heaps.
        """
        best: list[_Entry] | None = None
        for candidate in list(self.lanes) if lane is None else [lane]:
            heap = self.lanes.get(candidate, [])
            while heap and heap[0][2].job.is_dropped:
                heapq.heappop(heap)
            if not heap:
                self.lanes.pop(candidate, None)
            elif best is None or heap[0][:2] < best[0][:2]:
                best = heap
        return best


class FairQueue:
    """Texts that wait for the device; fair between keys by weight, and between a key's requests.

    The queue is not thread-safe; its owner must hold a lock.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, *, look_past: int = 64) -> None:
        """Create an empty queue.

        Args:
            weights: weight of each key; 1 for a key that is not listed.
            look_past: most texts to pass over, because they do not fit, while a batch is filled.
        """
        self._weights = dict(weights or {})
        self._look_past = look_past
        self._order = itertools.count()
        self._now = 0.0
        self._last_was_small = False
        self._keys: dict[str, _Key] = {}
        self._finished: dict[str, float] = {}

    def __len__(self) -> int:
        """Number of requests that have at least one waiting text."""
        return sum(len(key.jobs) for key in self._keys.values())

    @property
    def queued_s(self) -> float:
        """Seconds of waiting work."""
        return sum(key.queued_s for key in self._keys.values())

    def queued_long_s(self, key: str | None = None) -> float:
        """Seconds of waiting work of long requests, for one key or (None) for all keys."""
        names = self._keys if key is None else self._keys.keys() & {key}
        return sum(self._keys[name].queued_long_s for name in names)

    @property
    def n_keys(self) -> int:
        """Number of keys that have waiting requests."""
        return len(self._keys)

    def push(self, job: QueuedJob) -> None:
        """Add a request with at least one text."""
        key = self._keys.get(job.key)
        if key is None:
            start = max(self._now, self._finished.pop(job.key, 0.0))
            key = self._keys[job.key] = _Key(start, self._weights.get(job.key, 1.0))
        job.left_s = sum(job.costs)
        tag = key.shares.enter(job.left_s)
        job.finish = tag + job.left_s
        job.n_left = len(job.costs)
        heap = key.lanes.setdefault(job.lane, [])
        for position, cost in enumerate(job.costs):
            tag += cost
            heapq.heappush(heap, (tag, next(self._order), QueuedText(job, position, tag)))
        key.jobs.add(job)
        key.add(job.left_s, is_long=job.is_long)

    def drop(self, job: QueuedJob) -> None:
        """Remove a request from the queue; its texts that already run are not stopped."""
        job.is_dropped = True
        key = self._keys.get(job.key)
        if key is not None and job in key.jobs:
            key.jobs.discard(job)
            key.add(-job.left_s, is_long=job.is_long)
            key.shares.leave(job.finish)
            self._forget_if_idle(job.key, key)

    def compose(self, *, small: bool = False) -> list[QueuedText]:
        """Take the texts of the next pass out of the queue; empty only if nothing waits.

        The first text in order is always taken. Further texts of its lane follow in order while
        they fit the budget. At most `look_past` texts that do not fit are passed over. These keep
        their place in the order.

        If the first text is of a small request, the pass holds only small requests. They are
        then answered before the long requests are computed. This costs the overhead of one pass,
        so that it is done for at most every second pass.

        Args:
            small: take only texts of small requests, even if a long request is first. The result
                may then be empty although texts wait.
        """
        batch: list[QueuedText] = []
        passed_over: list[tuple[_Key, _Entry]] = []
        lane: object | None = None
        seconds, tokens = 0.0, 0
        small_only = False
        while len(passed_over) < self._look_past and (head := self._first(lane)) is not None:
            key, heap = head
            entry = heapq.heappop(heap)
            item = entry[2]
            job = item.job
            is_excluded = (small or small_only) and not job.is_small
            if is_excluded or (
                batch
                and (
                    seconds + item.cost_s > job.budget.seconds
                    or tokens + item.n_tokens > job.budget.tokens
                )
            ):
                passed_over.append((key, entry))
                continue
            if not batch:
                lane = job.lane
                small_only = job.is_small and not self._last_was_small
            batch.append(item)
            seconds, tokens = seconds + item.cost_s, tokens + item.n_tokens
            self._charge(key, item)
            if seconds >= job.budget.seconds or tokens >= job.budget.tokens:
                break
        if not small:
            self._last_was_small = small_only
        for key, entry in passed_over:
            heapq.heappush(key.lanes.setdefault(entry[2].job.lane, []), entry)
        return batch

    def _first(self, lane: object | None) -> tuple[_Key, list[_Entry]] | None:
        """The key that is next, and the heap that has its next text."""
        best: tuple[_Key, list[_Entry]] | None = None
        for key in self._keys.values():
            heap = key.head(lane)
            if heap is not None and (
                best is None or (key.start, heap[0][:2]) < (best[0].start, best[1][0][:2])
            ):
                best = key, heap
        return best

    def _charge(self, key: _Key, item: QueuedText) -> None:
        job, cost = item.job, item.cost_s
        self._now = max(self._now, key.start)
        key.start += cost / key.weight
        key.shares.advance(cost)
        key.add(-cost, is_long=job.is_long)
        job.left_s -= cost
        job.n_left -= 1
        if job.n_left == 0:
            key.jobs.discard(job)
            self._forget_if_idle(job.key, key)

    def _forget_if_idle(self, name: str, key: _Key) -> None:
        if key.jobs:
            return
        del self._keys[name]
        self._finished[name] = key.start
        if not self._keys:  # nothing waits, so that past service need not be remembered
            self._finished.clear()
            self._now = 0.0


Row = TypeVar("Row")
Text = TypeVar("Text")


@dataclass(frozen=True)
class PassOutcome(Generic[Row]):
    """The result of a pass for one text: a row, or the error that this text causes alone."""

    row: Row | None = None
    error: Exception | None = None


def bisect_failures(
    run: Callable[[Sequence[Text]], Sequence[Row]],
    texts: Sequence[Text],
    is_fatal: Callable[[Exception], bool] = lambda error: False,
) -> list[PassOutcome[Row]]:
    """Run texts together; if that fails, halve them until the texts that fail alone are found.

    One bad text among n costs about 2 log2(n) further passes.

    Args:
        run: computes a pass; returns one row per text, or raises.
        texts: at least one text.
        is_fatal: whether no later pass can succeed after an error; such an error is raised.
    """
    try:
        return [PassOutcome(row=row) for row in run(texts)]
    except Exception as error:
        if is_fatal(error):
            raise
        if len(texts) == 1:
            return [PassOutcome(error=error)]
    half = len(texts) // 2
    return [
        *bisect_failures(run, texts[:half], is_fatal),
        *bisect_failures(run, texts[half:], is_fatal),
    ]


_FOR_SHORT = 0.2
"""Share of the queue that is kept for short requests."""
_SHORT = 0.01
"""A request with at most this share of the queue's limit is short."""


def is_long_request(work_s: float, limit_s: float) -> bool:
    """Whether a request's work is more than a hundredth of the queue's limit."""
    return work_s > _SHORT * limit_s


def seconds_to_wait(queue: FairQueue, job: QueuedJob, limit_s: float) -> float | None:
    """Seconds until the queue has room for a request; None if it has room now.

    A request is admitted or refused as a whole. Long requests may use four fifths of the queue; one
    is admitted while these are not full. The rest is kept for short requests, so that no corpus
    locks queries out. While several keys have long requests, each may use half of the queue.

    Args:
        queue: the waiting requests.
        job: the new request, which is not in the queue yet.
        limit_s: `--max-queue-seconds`.
    """
    long_s = queue.queued_long_s()
    if not job.is_long:
        excess = queue.queued_s - long_s - _FOR_SHORT * limit_s
        return excess if excess > 0 else None
    excess = long_s - (1 - _FOR_SHORT) * limit_s
    key_long_s = queue.queued_long_s(job.key)
    if key_long_s > 0 and long_s > key_long_s:
        excess = max(excess, key_long_s + sum(job.costs) - limit_s / 2)
    return excess if excess > 0 else None
