"""Energy is what a counter reports, and null without a counter."""

from __future__ import annotations

import pytest
import torch

from gteopt.speed.energy import EnergyMeter, open_energy_meter


def test_a_processor_has_no_counter_and_says_so() -> None:
    counter = open_energy_meter(torch.device("cpu"))
    assert counter.joules is None
    assert "NVIDIA" in counter.source
    assert counter.per_call(lambda: pytest.fail("called for nothing"), 1.0) is None


def test_energy_of_a_call_is_that_of_enough_calls_over_their_number() -> None:
    calls: list[int] = []
    counter = EnergyMeter(lambda: 100.0 + 3.0 * len(calls), "three joules a call")
    assert counter.per_call(lambda: calls.append(1), 0.25) == 3.0
    assert len(calls) == 8  # two seconds of calls
    assert counter.per_call(lambda: calls.append(1), 60.0) == 3.0
    assert len(calls) == 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts on an NVIDIA GPU only")
def test_work_on_a_gpu_takes_energy_or_the_reason_why_none_is_counted_is_said() -> None:
    counter = open_energy_meter(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")

    def work() -> None:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()

    joules = counter.per_call(work, 0.05)
    assert (joules is None) == (counter.joules is None)
    assert joules is None or 0.01 < joules < 1000
