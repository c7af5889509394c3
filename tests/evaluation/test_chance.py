"""Chance is what random answers get, and a suite's mean leaves out what is not above it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gteopt.evaluation.chance import chance_notes, chance_of, counted, random_ndcg
from gteopt.evaluation.per_item_scores import Samples
from gteopt.records.evaluation import TaskScore

N = 120


def clusters(seed: int, *, knows: float) -> Samples:
    """One clustering of 120 documents in 6 topics; `knows` is the share put where it belongs."""
    rng = np.random.default_rng(seed)
    gold = np.arange(N) % 6
    found = np.where(rng.random(N) < knows, gold, rng.integers(6, size=N))
    arrays = {
        "document": np.arange(N, dtype=np.int32),
        "experiment": np.zeros(N, np.int32),
        "gold": gold.astype(np.int32),
        "cluster": found.astype(np.int32),
        "level": np.zeros(1, np.int32),
    }
    return Samples("v_measure", "document", arrays)


def similarities(seed: int, *, knows: float) -> Samples:
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=N)
    found = knows * gold + rng.normal(size=N)
    return Samples("spearman", "pair", {"similarities": found, "gold": gold})


def pairs(seed: int, *, knows: float) -> Samples:
    rng = np.random.default_rng(seed)
    gold = (np.arange(N) % 4 == 0).astype(np.int8)
    found = 2 * knows * gold + rng.normal(size=N)
    return Samples("max_ap", "pair", {"similarities": found[None], "gold": gold})


def answers(seed: int, *, knows: float) -> Samples:
    """Texts of two classes of which one has 70 %; what is not known is always the larger one."""
    rng = np.random.default_rng(seed)
    is_small = np.arange(N) % 10 < 3
    right = ~is_small | (rng.random(N) < knows)
    arrays = {"values": right[None].astype(np.uint8), "chance": np.full(N, 0.7)}
    return Samples("mean", "document", arrays)


@pytest.mark.parametrize("make", [clusters, similarities, pairs, answers])
def test_what_knows_nothing_is_rarely_above_chance_and_what_knows_something_is(make: Any) -> None:
    nothing = [chance_of(make(seed, knows=0)) for seed in range(40)]
    assert all(each is not None for each in nothing)
    assert sum(each.is_beaten for each in nothing if each is not None) <= 5  # 2.5 % of 40 is 1
    knows = [chance_of(make(seed, knows=0.8)) for seed in range(10)]
    assert all(each is not None and each.is_beaten for each in knows)


def test_v_measure_of_random_clusters_is_above_zero_and_chance_says_how_far() -> None:
    found = chance_of(clusters(0, knows=0))
    assert found is not None
    scores = [clusters(seed, knows=0).score() for seed in range(30)]
    assert found.expected == pytest.approx(np.mean(scores), abs=0.02)
    assert found.expected > 0.03


@pytest.mark.parametrize(("relevant", "documents"), [(1, 40), (3, 12), (15, 20), (2, 5)])
def test_the_ndcg_of_a_random_ranking_is_that_of_many_shuffles(
    relevant: int, documents: int
) -> None:
    rng = np.random.default_rng(0)
    discounts = 1 / np.log2(np.arange(10) + 2)
    ideal = discounts[:relevant].sum()
    drawn = []
    for _ in range(4000):
        gains = (rng.permutation(documents) < relevant)[:10]
        drawn.append((gains * discounts[: len(gains)]).sum() / ideal)
    error = 4 * np.std(drawn) / np.sqrt(len(drawn))
    found = random_ndcg(np.array([relevant]), np.array([documents]), 10)
    assert found[0] == pytest.approx(np.mean(drawn), abs=error)


def test_entries_that_do_not_tell_chance_are_not_judged() -> None:
    assert chance_of(Samples("mean", "query", {"values": np.ones((1, 20))})) is None


def task(name: str, *, above: bool | None) -> TaskScore:
    return TaskScore(
        task=name,
        task_type="STS",
        split="test",
        subset="default",
        metric="cosine_spearman",
        score=0.1,
        baseline_score=0.012,
        instruction=None,
        dataset_revision="0",
        n_samples=9,
        chance=0.0,
        above_chance=above,
    )


def test_the_mean_is_over_what_is_above_chance_and_the_rest_is_named() -> None:
    tasks = [task("A", above=True), task("B", above=False), task("C", above=None)]
    assert [each.task for each in counted(tasks)] == ["A", "C"]
    (note,) = chance_notes(tasks)
    assert "B (1.2, chance 0.0)" in note
    assert "A" not in note.replace("--languages", "")
    # With nothing above chance there is no better mean; the note says what it is worth.
    assert counted([task("B", above=False)]) == [task("B", above=False)]
    assert "say nothing" in chance_notes([task("B", above=False)])[0]
    assert chance_notes([task("A", above=True)]) == ()
