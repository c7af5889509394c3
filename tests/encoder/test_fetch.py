"""The order in which batches are started, copied and waited for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gteopt
from gteopt.encoder import encoder as encoder_module
from gteopt.encoder.fetch import HostFetch


def test_a_batchs_copy_is_under_way_before_the_next_batch_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the copy came behind the next batch, the host would wait for both."""
    encoder = gteopt.load("nano")
    texts = ["a", "two words", "and three words", "here are four words", "which makes five words"]
    expected = encoder.encode(texts, batch_size=2)
    order: list[str] = []
    numbers: dict[int, int] = {}
    forward = encoder.forward

    def started(*arguments: Any, **options: Any) -> torch.Tensor:
        vectors = forward(*arguments, **options)
        numbers[vectors.data_ptr()] = len(numbers)
        order.append(f"start {numbers[vectors.data_ptr()]}")
        return vectors

    class Recorded(HostFetch):
        def __init__(self, vectors: torch.Tensor) -> None:
            self.number = numbers[vectors.data_ptr()]
            order.append(f"copy {self.number}")
            super().__init__(vectors)

        def wait(self) -> torch.Tensor:
            order.append(f"wait {self.number}")
            return super().wait()

    monkeypatch.setattr(encoder, "forward", started)
    monkeypatch.setattr(encoder_module, "HostFetch", Recorded)
    np.testing.assert_array_equal(encoder.encode(texts, batch_size=2), expected)
    assert order == [
        *("start 0", "copy 0", "start 1", "copy 1", "wait 0"),
        *("start 2", "copy 2", "wait 1", "wait 2"),
    ]


def test_on_the_host_nothing_is_copied() -> None:
    vectors = torch.randn(2, 3)
    assert HostFetch(vectors).wait() is vectors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_vectors_are_those_of_the_batch_whatever_is_started_behind() -> None:
    first = torch.randn(64, 3584, device="cuda")
    fetch = HostFetch(first * 2)
    for _ in range(20):
        torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
    fetched = fetch.wait()
    assert fetched.is_pinned()
    torch.testing.assert_close(fetched, first.cpu() * 2, rtol=0, atol=0)
