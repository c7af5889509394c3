"""The queue is fair, work-conserving and within its budget for any arrivals."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

LANE, OTHER = "small", "big"
UNBOUNDED = 1 << 30


def job(
    costs: Sequence[float], key: str = "", budget_s: float = 10.0, lane: object = LANE
) -> QueuedJob:
    return QueuedJob(lane, PassBudget(budget_s, UNBOUNDED), key, costs, [1] * len(costs))


@dataclass
class Server:
    """A device with a virtual clock: a pass takes as long as its work."""

    queue: FairQueue
    now: float = 0.0
    finished: dict[QueuedJob, float] = field(default_factory=dict)
    batches: list[list[QueuedText]] = field(default_factory=list)

    def run(self, arrivals: Sequence[tuple[float, QueuedJob]]) -> None:
        coming = sorted(arrivals, key=lambda arrival: arrival[0])
        left = {request: len(request.costs) for _, request in coming}
        while coming or len(self.queue):
            while coming and coming[0][0] <= self.now:
                self.queue.push(coming.pop(0)[1])
            if not len(self.queue):
                self.now = coming[0][0]
                continue
            batch = self.queue.compose()
            assert batch, "the device idles although texts wait"
            self.batches.append(batch)
            self.now += sum(item.cost_s for item in batch)
            for item in batch:
                left[item.job] -= 1
                if left[item.job] == 0:
                    self.finished[item.job] = self.now


def shared_finishes(arrivals: Sequence[tuple[float, QueuedJob]]) -> dict[QueuedJob, float]:
    """End of each request on a server that works on all at once, in equal shares."""
    coming = sorted(arrivals, key=lambda arrival: arrival[0])
    left: dict[QueuedJob, float] = {}
    now, finished = 0.0, {}
    while coming or left:
        if not left:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            arrived = coming.pop(0)[1]
            left[arrived] = sum(arrived.costs)
        until_done = min(left.values()) * len(left)
        until_next = coming[0][0] - now if coming else math.inf
        step = min(until_done, until_next)
        now += step
        for request in list(left):
            left[request] -= step / len(left) if until_next < until_done else min(left.values())
            if left[request] <= 1e-9:
                finished[request] = now
        left = {request: work for request, work in left.items() if request not in finished}
    return finished


COSTS = st.integers(1, 8).map(float)
REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 60).map(float),
        st.lists(COSTS, min_size=1, max_size=12),
        st.sampled_from("abc"),
        st.sampled_from([LANE, OTHER]),
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=40, deadline=None)
@given(REQUESTS, st.integers(1, 30))
def test_every_text_is_served_once_in_batches_of_one_lane_within_the_budget(
    requests: list[tuple[float, list[float], str, str]], budget: int
) -> None:
    server = Server(FairQueue())
    arrivals = [(at, job(costs, key, budget, lane)) for at, costs, key, lane in requests]
    server.run(arrivals)
    served = sorted((id(i.job), i.position) for batch in server.batches for i in batch)
    assert served == sorted(
        (id(request), i) for _, request in arrivals for i in range(len(request.costs))
    )
    for batch in server.batches:
        assert len({item.job.lane for item in batch}) == 1
        assert len(batch) == 1 or sum(item.cost_s for item in batch) <= budget
    assert server.queue.queued_s == 0
    assert server.queue.n_keys == 0


@settings(max_examples=40, deadline=None)
@given(REQUESTS)
def test_a_request_ends_no_later_than_under_equal_shares_and_two_texts(
    requests: list[tuple[float, list[float], str, str]],
) -> None:
    """PGPS (Parekh and Gallager 1993, theorem 1) adds one text.

    Another is added because a text is not interrupted by requests that arrive while it runs.
    """
    server = Server(FairQueue())
    arrivals = [(at, job(costs, budget_s=1.0)) for at, costs, _, _ in requests]
    server.run(arrivals)
    shared = shared_finishes(arrivals)
    largest = max(cost for _, request in arrivals for cost in request.costs)
    for _, request in arrivals:
        assert server.finished[request] <= shared[request] + 2 * largest + 1e-6


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6))
def test_an_endless_stream_of_short_requests_does_not_starve_a_long_one(
    n_texts: int, short: int
) -> None:
    long = job([5.0] * n_texts, budget_s=5.0)
    # The stream is as much work as the device can do, so some short request always waits.
    stream = [(float(at), job([float(short)], budget_s=5.0)) for at in range(0, 300, short)]
    server = Server(FairQueue())
    server.run([(0.0, long), *stream])
    # Requests that arrive while a batch runs count from the end of the batch.
    assert server.finished[long] <= shared_finishes([(0.0, long), *stream])[long] + 2 * 6 + 5


def test_a_short_query_does_not_wait_behind_a_corpus_of_the_same_key() -> None:
    bulk = [(0.0, job([4.0] * 500, budget_s=20.0)) for _ in range(3)]
    query = job([0.2], budget_s=20.0)
    server = Server(FairQueue())
    server.run([*bulk, (101.0, query)])
    # It waits for the rest of the current pass and for its own pass.
    assert server.finished[query] - 101.0 <= 20.0 + 0.2


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 2.0))
def test_nineteen_of_twenty_queries_under_bulk_load_take_two_and_a_half_passes(
    seed: int, rate: float
) -> None:
    """Queries arrive by chance, up to two in the time of a pass, while corpora fill the queue."""
    pass_s = 20.0
    generator = random.Random(seed)
    due, queries = 0.0, []
    for _ in range(200):
        due += generator.expovariate(rate / pass_s)
        queries.append((due, job([0.2], budget_s=pass_s)))
    lengths = [min(16.0, generator.lognormvariate(1.0, 0.6)) for _ in range(40)]
    bulk = [(due * i / 40, job(lengths * 4, budget_s=pass_s)) for i in range(40)]
    server = Server(FairQueue())
    server.run([*bulk, *queries])
    waits = sorted(server.finished[query] - at for at, query in queries)
    assert waits[int(0.95 * len(waits))] <= 2.5 * pass_s


@given(st.floats(0.25, 4.0))
def test_keys_share_the_device_by_their_weights(weight: float) -> None:
    queue = FairQueue({"a": weight})
    a, b = job([1.0] * 400, "a", budget_s=1.0), job([1.0] * 400, "b", budget_s=1.0)
    queue.push(a)
    queue.push(b)
    for _ in range(200):
        queue.compose()
    served_a, served_b = 400 - a.n_left, 400 - b.n_left
    assert abs(served_a - weight * served_b) <= 1 + weight


def test_a_key_that_comes_back_soon_owes_what_it_has_used() -> None:
    queue = FairQueue()
    queue.push(job([1.0] * 50, "other", budget_s=1.0))
    for _ in range(5):
        greedy = job([1.0], "greedy", budget_s=1.0)
        queue.push(greedy)
        while greedy.n_left:
            queue.compose()
    # It had as many turns as the other key, and not in a row.
    assert queue.queued_s == pytest.approx(50 - 5, abs=1)


@settings(max_examples=50)
@given(st.lists(COSTS, min_size=1, max_size=200), st.integers(1, 64))
def test_at_most_so_many_texts_are_passed_over(costs: list[float], look_past: int) -> None:
    queue = FairQueue(look_past=look_past)
    queue.push(job(costs, budget_s=12.0))
    taken: set[int] = set()
    while len(queue):
        positions = [item.position for item in queue.compose()]
        passed_over = set(range(positions[-1])) - set(positions) - taken
        assert len(passed_over) <= look_past
        taken |= set(positions)


def test_small_requests_take_every_other_pass_at_most() -> None:
    queue = FairQueue()
    queue.push(job([1.0] * 40, budget_s=10.0))
    kinds = []
    for _ in range(6):
        queue.push(job([0.5], budget_s=10.0))
        kinds.append({len(item.job.costs) for item in queue.compose()})
    assert kinds == [{1}, {1, 40}] * 3


def test_small_requests_can_be_asked_for_alone() -> None:
    queue = FairQueue()
    queue.push(job([1.0] * 40, budget_s=10.0))
    assert queue.compose(small=True) == []
    small = job([0.5], budget_s=10.0)
    queue.push(small)
    assert [item.job for item in queue.compose(small=True)] == [small]
    assert queue.queued_s == pytest.approx(40.0)


def test_a_text_beyond_the_budget_runs_alone_and_is_not_put_off() -> None:
    queue = FairQueue()
    queue.push(job([100.0], budget_s=10.0))
    queue.push(job([1.0] * 3, budget_s=10.0))
    batches = []
    while len(queue):
        batches.append([item.cost_s for item in queue.compose()])
    assert batches == [[1.0, 1.0, 1.0], [100.0]]


@settings(max_examples=40, deadline=None)
@given(REQUESTS, st.data())
def test_dropped_requests_leave_nothing_behind(
    requests: list[tuple[float, list[float], str, str]], data: st.DataObject
) -> None:
    queue = FairQueue()
    jobs = [job(costs, key, 5.0, lane) for _, costs, key, lane in requests]
    for request in jobs:
        queue.push(request)
    queue.compose()
    gone = data.draw(st.lists(st.sampled_from(jobs), unique_by=id))
    for request in gone:
        queue.drop(request)
    served: list[QueuedText] = []
    while len(queue):
        served += queue.compose()
    assert not {id(item.job) for item in served} & {id(request) for request in gone}
    assert queue.compose() == []
    assert queue.queued_s == pytest.approx(0, abs=1e-9)


def test_only_the_texts_that_fail_by_themselves_fail() -> None:
    calls = []

    def run(texts: Sequence[int]) -> list[int]:
        calls.append(len(texts))
        if bad & set(texts):
            raise ValueError(f"cannot take {bad & set(texts)}")
        return [10 * text for text in texts]

    bad = {13}
    outcomes = bisect_failures(run, range(64))
    assert [outcome.row for outcome in outcomes] == [
        10 * i if i not in bad else None for i in range(64)
    ]
    assert [i for i, outcome in enumerate(outcomes) if outcome.error is not None] == [13]
    assert len(calls) == 1 + 2 * 6


def test_a_fatal_error_is_not_bisected() -> None:
    def run(texts: Sequence[int]) -> list[int]:
        raise RuntimeError("CUDA error: device-side assert")

    with pytest.raises(RuntimeError, match="CUDA"):
        bisect_failures(run, range(64), lambda error: "CUDA error" in str(error))


def test_the_cost_model_recovers_the_curve_that_made_the_times() -> None:
    true = CostModel(8e-3, 1e-4, 35e-6, 1e-9)
    shapes = [[16], [16] * 32, [256] * 4, [512] * 8, [4096], [16, 300, 800], [2048] * 2, [64] * 64]
    fitted = CostModel.fit([(lengths, true.pass_s(lengths)) for lengths in shapes])
    for part in ("overhead_s", "per_text_s", "per_token_s", "per_square_s"):
        assert getattr(fitted, part) == pytest.approx(getattr(true, part), rel=1e-3)


@given(st.floats(1e-4, 0.1), st.sampled_from([0.5, 0.9, 0.95]))
def test_a_batch_of_the_budget_reaches_the_share_of_the_best_throughput(
    overhead: float, share: float
) -> None:
    work = CostModel(overhead, 0.0, 1e-5, 0.0).budget_s(share)
    assert work / (overhead + work) == pytest.approx(share)


def arriving(cost: float, key: str = "") -> QueuedJob:
    request = job([cost], key)
    request.is_long = is_long_request(cost, 30.0)
    return request


def test_a_queue_full_of_long_requests_still_takes_short_ones() -> None:
    queue = FairQueue()
    queue.push(arriving(25.0))
    assert seconds_to_wait(queue, arriving(5.0), 30.0) == pytest.approx(1.0)
    assert seconds_to_wait(queue, arriving(0.2), 30.0) is None
    for _ in range(31):
        queue.push(arriving(0.2))
    assert seconds_to_wait(queue, arriving(0.2), 30.0) == pytest.approx(0.2)


def test_no_key_takes_more_than_half_of_the_queue_while_another_waits() -> None:
    queue = FairQueue()
    queue.push(arriving(14.0, "bulk"))
    assert seconds_to_wait(queue, arriving(2.0, "bulk"), 30.0) is None
    queue.push(arriving(1.0, "other"))
    assert seconds_to_wait(queue, arriving(2.0, "bulk"), 30.0) == pytest.approx(1.0)
    assert seconds_to_wait(queue, arriving(2.0, "other"), 30.0) is None


def test_an_empty_queue_takes_any_request() -> None:
    assert seconds_to_wait(FairQueue(), arriving(1e6), 30.0) is None
