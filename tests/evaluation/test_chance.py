"""Chance is the score of random answers. A suite's mean leaves out tasks at or below it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gteopt.evaluation.chance import chance_notes, chance_of, random_ranking, scores_above_chance
from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.predictions import TREC
from gteopt.records.evaluation import TaskScore

N = 120


def clusters(seed: int, *, knows: float) -> Samples:
    """One clustering of 120 documents in 6 topics. The share `knows` is in its own topic."""
    rng = np.random.default_rng(seed)
    gold = np.arange(N) % 6
    cluster = np.where(rng.random(N) < knows, gold, rng.integers(6, size=N))
    arrays = {
        "document": np.arange(N, dtype=np.int32),
        "experiment": np.zeros(N, np.int32),
        "gold": gold.astype(np.int32),
        "cluster": cluster.astype(np.int32),
        "level": np.zeros(1, np.int32),
    }
    return Samples("v_measure", "document", arrays)


def similarities(seed: int, *, knows: float) -> Samples:
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=N)
    similarity = knows * gold + rng.normal(size=N)
    return Samples("spearman", "pair", {"similarities": similarity, "gold": gold})


def pairs(seed: int, *, knows: float) -> Samples:
    rng = np.random.default_rng(seed)
    gold = (np.arange(N) % 4 == 0).astype(np.int8)
    similarity = 2 * knows * gold + rng.normal(size=N)
    return Samples("max_ap", "pair", {"similarities": similarity[None], "gold": gold})


def answers(seed: int, *, knows: float) -> Samples:
    """Texts of two classes, one with 70 %. An unknown text gets the larger class."""
    rng = np.random.default_rng(seed)
    is_small = np.arange(N) % 10 < 3
    right = ~is_small | (rng.random(N) < knows)
    arrays = {"values": right[None].astype(np.uint8), "chance": np.full(N, 0.7)}
    return Samples("mean", "document", arrays)


@pytest.mark.parametrize("make", [clusters, similarities, pairs, answers])
def test_random_answers_are_rarely_above_chance_and_informed_answers_always_are(make: Any) -> None:
    uninformed = [chance_of(make(seed, knows=0)) for seed in range(40)]
    assert all(chance is not None for chance in uninformed)
    # One of 40 is expected, as the rate is 2.5 %.
    assert sum(chance.is_beaten for chance in uninformed if chance is not None) <= 5
    informed = [chance_of(make(seed, knows=0.8)) for seed in range(10)]
    assert all(chance is not None and chance.is_beaten for chance in informed)


def test_v_measure_of_random_clusters_is_above_zero_and_chance_says_how_far() -> None:
    chance = chance_of(clusters(0, knows=0))
    assert chance is not None
    scores = [clusters(seed, knows=0).score() for seed in range(30)]
    assert chance.expected == pytest.approx(np.mean(scores), abs=0.02)
    assert chance.expected > 0.03


@pytest.mark.parametrize("metric", ["ndcg", "recall", "precision", "map", "mrr", "hit_rate"])
@pytest.mark.parametrize(("relevant", "documents"), [(1, 40), (3, 12), (15, 20), (2, 5), (4, 4)])
def test_chance_of_a_ranking_is_the_mean_of_what_mteb_gives_many_shuffles(
    metric: str, relevant: int, documents: int
) -> None:
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores, mrr

    rng = np.random.default_rng(0)
    n_shuffles = 1500
    judged = {str(document): 1 for document in range(relevant)}
    qrels = {str(shuffle): judged for shuffle in range(n_shuffles)}
    results = {
        query: dict(zip(map(str, range(documents)), rng.random(documents).tolist(), strict=True))
        for query in qrels
    }
    if metric == "mrr":
        drawn = np.array(mrr(qrels, results, [10])["MRR@10"])
    else:
        name = TREC[metric]
        scored = calculate_retrieval_scores(results, qrels, [1, 10], False).all_scores
        drawn = np.array([metrics[f"{name}_10"] for metrics in scored.values()])
    error = 4 * np.std(drawn) / np.sqrt(n_shuffles) + 1e-5  # mteb rounds
    expected = random_ranking(metric, np.array([relevant]), np.array([documents]), 10)
    assert expected[0] == pytest.approx(drawn.mean(), abs=error)


@pytest.mark.parametrize("metric", ["ndcg", "recall", "precision", "map", "mrr", "hit_rate"])
def test_a_query_without_a_relevant_document_scores_nothing_by_chance(metric: str) -> None:
    assert random_ranking(metric, np.array([0, 1]), np.array([9, 9]), 3)[0] == 0


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
    assert [score.task for score in scores_above_chance(tasks)] == ["A", "C"]
    (note,) = chance_notes(tasks)
    assert "B (1.2, chance 0.0)" in note
    assert "A" not in note.replace("--languages", "")
    # If no task is above chance, the mean is over all. The note says that it means nothing.
    assert scores_above_chance([task("B", above=False)]) == [task("B", above=False)]
    assert "say nothing" in chance_notes([task("B", above=False)])[0]
    assert chance_notes([task("A", above=True)]) == ()
