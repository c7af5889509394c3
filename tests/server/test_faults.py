"""A fault fails only the requests that it concerns, and the server goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from gteopt.server.batching import CostModel
from gteopt.server.settings import ServerSettings
from tests.server.running_server import Running, running

POISON = "poison"
Compute = Callable[[Sequence[Sequence[int]]], NDArray[np.float32]]


@pytest.fixture(scope="module")
def fragile() -> Iterator[Running]:
    """A server with room for half a second of work."""
    with running({"nano": "nano"}, ServerSettings(max_queue_s=0.5)) as server:
        yield server


@pytest.fixture
def inject(fragile: Running, monkeypatch: pytest.MonkeyPatch) -> Callable[[Compute | None], None]:
    """Make passes over the text POISON do something else; the real model computes the others."""
    served = fragile.service.models["nano"]
    real_compute = served.compute
    poison = list(served.encoder.tokenization.tokenize([POISON])[0])

    def set_fault(fault: Callable[[NDArray[np.float32], list[int]], NDArray[np.float32]]) -> None:
        def compute(
            tokens: Sequence[Sequence[int]], between_blocks: Callable[[], None] | None = None
        ) -> NDArray[np.float32]:
            bad = [i for i, ids in enumerate(tokens) if list(ids) == poison]
            rows = real_compute(tokens)
            return fault(rows, bad) if bad else rows

        monkeypatch.setattr(served, "compute", compute)

    return set_fault  # type: ignore[return-value]


def raises(rows: NDArray[np.float32], bad: list[int]) -> NDArray[np.float32]:
    raise RuntimeError("a kernel failed")


def gives_nan(rows: NDArray[np.float32], bad: list[int]) -> NDArray[np.float32]:
    rows[bad] = np.nan
    return rows


@pytest.mark.parametrize(
    ("fault", "code"), [(raises, "inference_failed"), (gives_nan, "non_finite")]
)
def test_one_bad_text_fails_alone(
    fragile: Running, inject: Callable[..., None], fault: Compute, code: str
) -> None:
    inject(fault)
    texts = [f"text {i} of {code}" for i in range(40)]
    texts[17] = POISON
    failed = fragile.embed(input=texts)
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == code
    assert failed.json()["error"]["param"] == "input[17]"
    partial = fragile.embed(input=texts, on_error="null").json()
    assert [i for i, row in enumerate(partial["data"]) if row["embedding"] is None] == [17]
    expected = fragile.service.models["nano"].encoder.encode(texts)
    vectors = np.array([row["embedding"] for i, row in enumerate(partial["data"]) if i != 17])
    np.testing.assert_allclose(vectors, np.delete(expected, 17, axis=0), atol=1e-5)
    assert fragile.embed(input="after it").status_code == 200
    assert fragile.client.get("/livez").status_code == 200


def test_a_bad_text_does_not_fail_the_requests_that_it_is_batched_with(
    fragile: Running, inject: Callable[..., None]
) -> None:
    inject(raises)
    texts = [POISON if i % 10 == 3 else f"neighbour {i}" for i in range(50)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: fragile.embed(input=text).status_code, texts))
    assert answers == [500 if text == POISON else 200 for text in texts]


def test_a_short_query_is_answered_while_a_slow_pass_is_at_work() -> None:
    with running({"nano": "nano"}) as server:
        served = server.service.models["nano"]
        real_compute, gate, calls = served.compute, threading.Event(), []

        def compute(
            tokens: Sequence[Sequence[int]], between_blocks: Callable[[], None] | None = None
        ) -> NDArray[np.float32]:
            calls.append(([len(ids) for ids in tokens], between_blocks is not None))

            def step() -> None:
                assert gate.wait(240)  # until the query waits
                assert between_blocks is not None
                between_blocks()

            return real_compute(tokens, None if between_blocks is None else step)

        served.compute = compute  # type: ignore[method-assign]
        long = "word " * 2000
        served.cost = CostModel(1e-3, 0, 1e-4, 0)  # 0.2 s for the long text
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(server.embed, input=long)
            until(lambda: len(calls) == 1)
            query = pool.submit(server.embed, input="a short query")
            until(lambda: server.service.engine.n_waiting == 1)
            gate.set()
            answers = [query.result().json(), slow.result().json()]
        vectors = [answer["data"][0]["embedding"] for answer in answers]
        expected = served.encoder.encode(["a short query", long])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert [interruptible for _, interruptible in calls] == [True, False]


class Gate:
    """A pass that waits until the test opens the gate."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, rows: NDArray[np.float32], bad: list[int]) -> NDArray[np.float32]:
        self.entered.set()
        assert self.open.wait(240)
        return rows


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the condition never holds"
        time.sleep(0.01)


def test_a_client_that_hangs_up_is_dropped_before_the_device(
    fragile: Running, inject: Callable[..., None]
) -> None:
    gate = Gate()
    inject(gate)
    computed: list[int] = []
    observe = fragile.service.metrics.batch_texts.observe
    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(fragile.embed, input=POISON)
        assert gate.entered.wait(120)
        fragile.service.metrics.batch_texts.observe = computed.append  # type: ignore[method-assign, assignment]
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{fragile.url}/v1/embeddings",
                    json={"model": "nano", "input": ["nobody waits for this"] * 7},
                    timeout=0.3,
                )
            until(lambda: fragile.service.engine.n_waiting == 0)
            gate.open.set()
            assert held.result().status_code == 200
            assert fragile.embed(input="somebody waits for this").status_code == 200
        finally:
            fragile.service.metrics.batch_texts.observe = observe  # type: ignore[method-assign]
    assert computed == [1, 1]


def test_a_full_queue_refuses_whole_requests_with_the_time_to_come_back(
    fragile: Running, inject: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    inject(gate)
    monkeypatch.setattr(fragile.service.models["nano"], "cost", CostModel(1e-3, 0, 1e-5, 0))
    monkeypatch.setattr(fragile.service.engine, "_pace", 1.0)
    bulk = [f"{'word ' * 120} {i}" for i in range(150)]
    with ThreadPoolExecutor(10) as pool:
        held = pool.submit(fragile.embed, input=POISON)
        assert gate.entered.wait(120)
        requests = [pool.submit(fragile.embed, input=bulk) for _ in range(9)]
        until(lambda: any(request.done() for request in requests))
        # A request without room is refused at once. A short query still has room.
        refused = next(request.result() for request in requests if request.done())
        query = pool.submit(fragile.embed, input="a short query")
        until(lambda: query.running() or query.done())
        gate.open.set()
        answers = [request.result() for request in requests]
        assert held.result().status_code == query.result().status_code == 200
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in (response for response in answers if response.status_code == 200):
        assert len(answer.json()["data"]) == len(bulk)


def test_a_text_that_was_asked_for_before_does_not_reach_the_device() -> None:
    def texts_computed(server: Running) -> str:
        lines = server.client.get("/metrics").text.splitlines()
        return next(line for line in lines if line.startswith("gteopt_batch_texts_sum"))

    with running({"nano": "nano"}, ServerSettings(cache_bytes=1 << 20)) as caching:
        first = caching.embed(input=["cached text", "another"]).json()
        before = texts_computed(caching)
        again = caching.embed(input=["another", "cached text"], dimensions=256).json()
        assert texts_computed(caching) == before
        caching.embed(input="cached text", input_type="query")
        assert texts_computed(caching) != before
    vectors = [row["embedding"] for row in first["data"]]
    assert [row["embedding"] for row in again["data"]] == vectors[::-1]
    assert again["usage"] == first["usage"]


def test_a_reload_loses_no_request(fragile: Running) -> None:
    stop = threading.Event()

    def ask() -> set[int]:
        statuses, i = set(), 0
        while not stop.is_set():
            i += 1
            statuses.add(
                fragile.embed(input=f"during a reload {threading.get_ident()} {i}").status_code
            )
        return statuses

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        old = fragile.service.models["nano"]
        answer = fragile.client.post("/admin/reload", json={"model": "nano"})
        stop.set()
    assert answer.status_code == 200, answer.text
    assert fragile.service.models["nano"] is not old
    assert set().union(*(future.result() for future in asking)) == {200}


def test_a_reload_that_fails_leaves_what_served(fragile: Running) -> None:
    service = fragile.service
    source = service.sources["nano"]
    service.sources["nano"] = "no/such/folder"
    try:
        answer = fragile.client.post("/admin/reload", json={})
    finally:
        service.sources["nano"] = source
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "reload_failed"
    assert fragile.embed(input="goes on").status_code == 200
    web = fragile.client.post("/admin/reload", json={}, headers={"origin": "http://evil"})
    assert web.status_code == 403


def test_another_vector_than_at_load_makes_it_not_ready(
    fragile: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = fragile.service.models["nano"]
    real_compute = served.compute
    fragile.service._ready_at = float("-inf")
    monkeypatch.setattr(
        served, "compute", lambda tokens, *_: np.roll(real_compute(tokens), 1, axis=1)
    )
    answer = fragile.client.get("/readyz")
    assert answer.status_code == 503
    assert "another vector" in answer.json()["reason"]
    monkeypatch.undo()
    assert fragile.client.get("/readyz").status_code == 200


def test_a_device_that_hangs_or_dies_is_not_alive() -> None:
    with running({"nano": "nano"}) as server:
        gate, engine = Gate(), server.service.engine
        engine._hang_s = 0.2
        engine.call(lambda: None).result()
        served = server.service.models["nano"]
        real_compute = served.compute

        def hangs(
            tokens: Sequence[Sequence[int]], between_blocks: Callable[[], None] | None = None
        ) -> NDArray[np.float32]:
            return gate(real_compute(tokens), [])

        served.compute = hangs  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(server.embed, input="hangs")
            assert gate.entered.wait(120)
            served.cost = type(served.cost)(0, 0, 1e-9, 0)
            engine._pass = engine._pass and (engine._pass[0], 1e-6)
            until(lambda: server.client.get("/livez").status_code == 503)
            assert server.client.get("/readyz").status_code == 503
            assert server.embed(input="nobody computes it").status_code == 503
            gate.open.set()
            assert held.result().status_code == 200
        assert server.client.get("/livez").status_code == 200

        def dies(
            tokens: Sequence[Sequence[int]], between_blocks: Callable[[], None] | None = None
        ) -> NDArray[np.float32]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        served.compute = dies  # type: ignore[method-assign]
        answer = server.embed(input="the last one")
        assert answer.status_code == 503
        assert "illegal memory access" in answer.json()["error"]["message"]
        assert server.client.get("/livez").status_code == 503
