"""The server's memory does not grow with the number of different passes that it has computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from gteopt.encoder.forward import pass_padding
from gteopt.machine import release_freed_memory
from gteopt.server import engine as engine_module
from gteopt.server.batching import CostModel, PassBudget
from gteopt.server.engine import Engine, EngineWork
from gteopt.server.metrics import Metrics
from tests.server.running_server import Running, running


@pytest.fixture(scope="module")
def nano() -> Iterator[Running]:
    with running({"nano": "nano"}) as found:
        yield found


def test_vectors_are_those_of_encode_and_the_metrics_count_the_padding(nano: Running) -> None:
    served = nano.service.models["nano"]
    for n_words in ((1,), (3, 40), (100, 5, 5, 77), tuple(range(1, 20))):
        texts = ["river " * n for n in n_words]
        tokens = served.tokenization.tokenize(texts)
        vectors = served.compute(tokens)
        assert len(vectors) == len(texts)
        np.testing.assert_allclose(vectors, served.encoder.encode(texts), atol=1e-5)
        lengths = [len(ids) for ids in tokens]
        assert served.padding(lengths) == sum(pass_padding(lengths))
    assert served.padding([64]) == 0
    assert served.padding([65]) == 1


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
        release_freed_memory()
        trimmed.set()

    monkeypatch.setattr(engine_module, "_TRIM_S", 0.2)
    monkeypatch.setattr(engine_module, "release_freed_memory", trim)
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
