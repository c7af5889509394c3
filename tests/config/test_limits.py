"""Limits in a user's words become a policy, or a message with an example."""

from __future__ import annotations

import pytest

from gteopt.config.limits import Limits
from gteopt.errors import InputError


def test_limits_become_bounds_on_what_is_measured() -> None:
    limits = Limits(
        max_weights="40MB",
        max_memory="2GiB",
        max_query_ms="20ms",
        min_speedup="1.5x",
        max_index="10GB",
        n_vectors="50M",
        max_cost=0.02,
        price_per_hour=2.5,
        min_quality="99%",
        optimize="speed",
    )
    bounds = limits.policy(labelled=True).limits
    assert {metric: limit.max for metric, limit in bounds.items() if limit.max is not None} == {
        "weight_bytes": 40e6,
        "peak_memory_bytes": 2 * 2**30,
        "p95_ms": 20,
        "index_bytes": 200e6,
        "cost_per_million_tokens": 0.02,
    }
    assert {metric: limit.min for metric, limit in bounds.items() if limit.min is not None} == {
        "speed_ratio": 1.5,
        "retention_low": 0.99,
    }


def test_without_labels_quality_is_the_share_of_neighbours_that_stay() -> None:
    policy = Limits(min_quality="80%", optimize="quality").policy(labelled=False)
    assert {metric: limit.min for metric, limit in policy.limits.items()} == {
        "neighbour_overlap": 0.8
    }
    assert policy.objective.maximise == "neighbour_overlap"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"max_weights": "40"}, "--max-weights '40' has no unit: write 40MB"),
        ({"max_memory": "2gb?"}, "--max-memory '2gb.' is not an amount"),
        ({"min_quality": "99"}, "did you mean 99%"),
        ({"max_index": "10GB"}, "--max-index 10GB --for 50M"),
        ({"max_index": "10GB", "n_vectors": "5", "max_vector_bytes": "8B"}, "both limit a"),
        ({"max_cost": 0.1}, "--price-per-hour"),
        ({"optimize": "cost"}, "--price-per-hour"),
    ],
)
def test_limits_without_a_meaning_are_refused(words: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Limits(**words).policy(labelled=True)  # type: ignore[arg-type]
