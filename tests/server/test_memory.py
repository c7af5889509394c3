"""The server's memory does not grow with the number of different passes that it has computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gteopt.server import engine as engine_module
from gteopt.server.batching import CostModel, PassBudget
from gteopt.server.engine import Engine, EngineWork
from gteopt.server.memory import pass_padding, return_free_memory
from gteopt.server.metrics import Metrics
from tests.server.running_server import Running, running


@pytest.fixture(scope="module")
def nano() -> Iterator[Running]:
    with running({"nano": "nano"}) as found:
        yield found


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=200))
def test_a_pass_is_padded_with_texts_that_are_no_longer_than_its_own(lengths: list[int]) -> None:
    added = pass_padding(lengths)
    total = sum(lengths)
    assert all(0 < n <= max(lengths) for n in added)
    assert (total + sum(added)) % 16 == 0
    assert sum(added) < max(16, total / 32)


def test_passes_of_up_to_8192_tokens_have_under_200_totals() -> None:
    totals = {n + sum(pass_padding([n])) for n in range(1, 8193)}
    assert len(totals) < 200
    assert pass_padding([]) == pass_padding([0, 0]) == []


def test_vectors_are_those_without_padding_and_the_metrics_count_it(
    nano: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = nano.service.models["nano"]
    own = served.encoder.embed_tokens
    totals: list[int] = []

    def seen(tokens: Sequence[Sequence[int]], **how: Any) -> Any:
        totals.append(sum(map(len, tokens)))
        return own(tokens, **how)

    monkeypatch.setattr(served.encoder, "embed_tokens", seen)
    for n_words in ((1,), (3, 40), (100, 5, 5, 77), tuple(range(1, 20))):
        texts = ["river " * n for n in n_words]
        tokens = served.tokenization.tokenize(texts)
        found = served.compute(tokens)
        assert len(found) == len(texts)
        np.testing.assert_allclose(found, served.encoder.encode(texts), atol=1e-5)
        lengths = [len(each) for each in tokens]
        assert totals[0] == sum(lengths) + served.padding(lengths)
        totals.clear()
    assert served.padding([16]) == 0
    assert served.padding([17]) == 15


class Quick:
    """A lane whose vectors are zeros."""

    name = "quick"
    cost = CostModel(1e-4, 0.0, 1e-6, 0.0)
    budget = PassBudget(0.1, 64)

    def compute(self, tokens: Sequence[Sequence[int]], between_blocks: Any = None) -> Any:
        return np.zeros((len(tokens), 4), np.float32)

    def padding(self, lengths: Sequence[int]) -> int:
        return 0


def test_free_memory_is_returned_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = threading.Event()

    def trim() -> None:
        assert threading.current_thread().name == "device"
        return_free_memory()
        trimmed.set()

    monkeypatch.setattr(engine_module, "_TRIM_S", 0.2)
    monkeypatch.setattr(engine_module, "return_free_memory", trim)
    engine = Engine(Metrics())
    engine.start()
    try:
        done: list[Future[EngineWork]] = [
            engine.submit(EngineWork.of(Quick(), [[1, 2, 3]], key="a", dims=4)) for _ in range(5)
        ]
        assert all(not each.result(timeout=30).errors for each in done)
        assert trimmed.wait(30)
        assert engine.is_alive
    finally:
        engine.stop()
