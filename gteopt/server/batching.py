"""Which texts run together, and who goes first.

Hides: the cost model, the two levels of fairness, the token budget. Refuses to know: threads,
clocks, torch, HTTP. Time here is virtual: it moves by the work that was handed out.

Between keys the queue is start-time fair (SFQ, Goyal et al. 1996, section 2). Between the requests
of one key it shares equally: packet-by-packet generalised processor sharing (PGPS, Parekh and
Gallager 1993, section III). A request of cost c among n others is served before (n + 1) c of its
key's work is done, give or take one text. Start-time tags alone do not suffice between requests:
new short ones could overtake a waiting one for ever.
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
"""Of a pass: a request of less work may be computed before the rest of it."""


@dataclass(frozen=True)
class CostModel:
    """Seconds of one pass over N texts of l tokens each.

    t = overhead + sum over texts of (per_text + per_token l + per_square l^2)

    Attributes:
        overhead_s: of a pass, whatever is in it.
        per_text_s: of each text.
        per_token_s: of each token.
        per_square_s: of each pair of tokens of one text, which attention compares.
    """

    overhead_s: float
    per_text_s: float
    per_token_s: float
    per_square_s: float

    def text_s(self, n_tokens: int) -> float:
        """What one text adds to a pass, in seconds."""
        added = self.per_text_s + n_tokens * (self.per_token_s + n_tokens * self.per_square_s)
        return max(added, _LEAST_SECONDS)

    def pass_s(self, lengths: Sequence[int]) -> float:
        """What a pass over texts of these lengths takes, in seconds."""
        return self.overhead_s + sum(map(self.text_s, lengths))

    def budget_s(self, share: float = 0.95) -> float:
        """The smallest work of a pass, in seconds, that reaches this share of the best throughput.

        Work w takes overhead + w seconds, so the share is w / (overhead + w).
        """
        return self.overhead_s * share / (1 - share)

    @staticmethod
    def fit(passes: Sequence[tuple[Sequence[int], float]]) -> CostModel:
        """The model of least relative squared error with no negative term.

        Args:
            passes: lengths of the texts of each, and the seconds that it took.
        """
        from scipy.optimize import nnls

        terms = [(1, len(n), sum(n), sum(each * each for each in n)) for n, _ in passes]
        seconds = np.array([took for _, took in passes])
        # Columns of like size, or the solver's tolerance would hide the small terms.
        rows = np.array(terms, dtype=np.float64) / seconds[:, None]
        scale = rows.max(axis=0)
        found, _ = nnls(rows / scale, np.ones(len(rows)))
        return CostModel(*(float(each) for each in found / scale))


@dataclass(frozen=True, eq=False)
class Budget:
    """What one pass may hold; the first text is taken even where it is more.

    Attributes:
        seconds: of predicted work.
        tokens: of all texts together.
    """

    seconds: float
    tokens: int


@dataclass(eq=False)
class Job:
    """One request in the queue.

    Attributes:
        lane: what may run together: jobs of the same lane.
        budget: of a pass in that lane.
        key: whose request it is.
        costs: seconds of work of each text.
        lengths: tokens of each text.
        is_long: it has so much work that it may not use the room of short requests.
        is_dropped: nobody waits for it any more.
        is_small: it needs a quarter of a pass at most.
    """

    lane: object
    budget: Budget
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
        """Find out whether its work is a small part of a pass."""
        self.is_small = (
            sum(self.costs) <= _SMALL * self.budget.seconds
            and sum(self.lengths) <= _SMALL * self.budget.tokens
        )


@dataclass(eq=False, slots=True)
class Item:
    """One text of a job; `tag` is when processor sharing would have finished it."""

    job: Job
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
    """Virtual time of jobs that share one server equally.

    It advances by work / n while n jobs are served. A job leaves when the time reaches its last
    text's finish, so that a job that was served ahead of its share counts until it is used up.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._finishes: list[float] = []

    def enter(self, work: float) -> float:
        """The start of a job with this much work."""
        heapq.heappush(self._finishes, self.now + work)
        return self.now

    def leave(self, finish: float) -> None:
        """A job that was dropped uses no share any more."""
        if finish in self._finishes:
            self._finishes.remove(finish)
            heapq.heapify(self._finishes)

    def advance(self, work: float) -> None:
        """Work was handed out, so much of it."""
        while self._finishes:
            n = len(self._finishes)
            until_next = (self._finishes[0] - self.now) * n
            if work < until_next:
                self.now += work / n
                return
            work -= max(0.0, until_next)
            self.now = heapq.heappop(self._finishes)


_Entry = tuple[float, int, Item]


class _Key:
    """The waiting texts of one key, by lane, in the order of their tags."""

    def __init__(self, start: float, weight: float) -> None:
        self.start = start
        self.weight = weight
        self.shares = _Shares()
        self.queued_s = 0.0
        self.queued_long_s = 0.0
        self.jobs: set[Job] = set()
        self.lanes: dict[object, list[_Entry]] = {}

    def add(self, work_s: float, *, is_long: bool) -> None:
        """Count work that waits, or with a negative number does no longer."""
        self.queued_s = max(0.0, self.queued_s + work_s)
        if is_long:
            self.queued_long_s = max(0.0, self.queued_long_s + work_s)

    def head(self, lane: object | None) -> list[_Entry] | None:
        """The heap whose first text is next, in one lane or in all of them.

        Texts of dropped requests at a head are thrown away.
        """
        best: list[_Entry] | None = None
        for name in list(self.lanes) if lane is None else [lane]:
            heap = self.lanes.get(name, [])
            while heap and heap[0][2].job.is_dropped:
                heapq.heappop(heap)
            if not heap:
                self.lanes.pop(name, None)
            elif best is None or heap[0][:2] < best[0][:2]:
                best = heap
        return best


class FairQueue:
    """Texts that wait for the device, fair over keys by weight, and over the requests of a key.

    Not safe for threads; whoever owns it holds a lock.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, *, look_past: int = 64) -> None:
        """An empty queue.

        Args:
            weights: of keys; 1 for those left out.
            look_past: how many texts that do not fit a batch are passed over to fill it.
        """
        self._weights = dict(weights or {})
        self._look_past = look_past
        self._order = itertools.count()
        self._now = 0.0
        self._small_before = False
        self._keys: dict[str, _Key] = {}
        self._finished: dict[str, float] = {}

    def __len__(self) -> int:
        """Requests that wait, in whole or in part."""
        return sum(len(each.jobs) for each in self._keys.values())

    @property
    def queued_s(self) -> float:
        """Seconds of work that wait."""
        return sum(each.queued_s for each in self._keys.values())

    def queued_long_s(self, key: str | None = None) -> float:
        """Seconds of work of long requests that wait, for one key or for all of them."""
        names = self._keys if key is None else self._keys.keys() & {key}
        return sum(self._keys[name].queued_long_s for name in names)

    @property
    def n_keys(self) -> int:
        """Keys that have requests waiting."""
        return len(self._keys)

    def push(self, job: Job) -> None:
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
            heapq.heappush(heap, (tag, next(self._order), Item(job, position, tag)))
        key.jobs.add(job)
        key.add(job.left_s, is_long=job.is_long)

    def drop(self, job: Job) -> None:
        """Forget a request; its texts that run already are not stopped."""
        job.is_dropped = True
        key = self._keys.get(job.key)
        if key is not None and job in key.jobs:
            key.jobs.discard(job)
            key.add(-job.left_s, is_long=job.is_long)
            key.shares.leave(job.finish)
            self._forget_if_idle(job.key, key)

    def compose(self, *, small: bool = False) -> list[Item]:
        """Take the texts of the next pass out of the queue; empty only where nothing waits.

        The first in order is always taken. Others follow in order while they are of its lane and
        fit its budget; at most `look_past` that do not are passed over, and keep their turn.

        Where the first is of a small request, the pass holds small requests alone. They are then
        answered before the long ones are computed. This costs one pass's overhead, and is done for
        every other pass at most.

        Args:
            small: take texts of small requests alone, of whatever stands first.
        """
        batch: list[Item] = []
        aside: list[tuple[_Key, _Entry]] = []
        lane: object | None = None
        seconds, tokens = 0.0, 0
        small_only = False
        while len(aside) < self._look_past and (first := self._first(lane)) is not None:
            key, heap = first
            entry = heapq.heappop(heap)
            item = entry[2]
            job = item.job
            unfit = (small or small_only) and not job.is_small
            if unfit or (
                batch
                and (
                    seconds + item.cost_s > job.budget.seconds
                    or tokens + item.n_tokens > job.budget.tokens
                )
            ):
                aside.append((key, entry))
                continue
            if not batch:
                lane = job.lane
                small_only = job.is_small and not self._small_before
            batch.append(item)
            seconds, tokens = seconds + item.cost_s, tokens + item.n_tokens
            self._charge(key, item)
            if seconds >= job.budget.seconds or tokens >= job.budget.tokens:
                break
        if not small:
            self._small_before = small_only
        for key, entry in aside:
            heapq.heappush(key.lanes.setdefault(entry[2].job.lane, []), entry)
        return batch

    def _first(self, lane: object | None) -> tuple[_Key, list[_Entry]] | None:
        """The key whose turn it is, and the heap of its next text."""
        best: tuple[_Key, list[_Entry]] | None = None
        for key in self._keys.values():
            heap = key.head(lane)
            if heap is not None and (
                best is None or (key.start, heap[0][:2]) < (best[0].start, best[1][0][:2])
            ):
                best = key, heap
        return best

    def _charge(self, key: _Key, item: Item) -> None:
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
        if not self._keys:  # nobody is owed service from before
            self._finished.clear()
            self._now = 0.0


Row = TypeVar("Row")
Text = TypeVar("Text")


@dataclass(frozen=True)
class Outcome(Generic[Row]):
    """What a pass gave for one text: a row, or the error that this text causes by itself."""

    row: Row | None = None
    error: Exception | None = None


def bisect_failures(
    run: Callable[[Sequence[Text]], Sequence[Row]],
    texts: Sequence[Text],
    is_fatal: Callable[[Exception], bool] = lambda error: False,
) -> list[Outcome[Row]]:
    """Run texts together; where that fails, find the ones that fail by themselves.

    One bad text among n costs about 2 log2(n) further passes.

    Args:
        run: a pass; it returns a row a text or raises.
        texts: at least one.
        is_fatal: errors after which no pass can succeed; they are raised.
    """
    try:
        return [Outcome(row=row) for row in run(texts)]
    except Exception as error:
        if is_fatal(error):
            raise
        if len(texts) == 1:
            return [Outcome(error=error)]
    half = len(texts) // 2
    return [
        *bisect_failures(run, texts[:half], is_fatal),
        *bisect_failures(run, texts[half:], is_fatal),
    ]


_FOR_SHORT = 0.2
_SHORT = 0.01


def is_long(work_s: float, limit_s: float) -> bool:
    """Whether a request's work is more than a hundredth of what the queue holds."""
    return work_s > _SHORT * limit_s


def seconds_to_wait(queue: FairQueue, job: Job, limit_s: float) -> float | None:
    """How long a request must stay away before the queue has room for it; None: it may come in.

    A whole request is admitted or refused. Four fifths of the queue are for long requests, and one
    more may come in as long as they are not full. The rest is for short ones alone, so that no
    corpus locks queries out. No key's long requests take more than half while another key has some.

    Args:
        queue: what waits already.
        job: the request; not in the queue yet.
        limit_s: `--max-queue-seconds`.
    """
    long_s = queue.queued_long_s()
    if not job.is_long:
        excess = queue.queued_s - long_s - _FOR_SHORT * limit_s
        return excess if excess > 0 else None
    excess = long_s - (1 - _FOR_SHORT) * limit_s
    own = queue.queued_long_s(job.key)
    if own > 0 and long_s > own:
        excess = max(excess, own + sum(job.costs) - limit_s / 2)
    return excess if excess > 0 else None
