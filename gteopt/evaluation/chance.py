"""Estimate the chance level of a score: the score of a model that knows nothing of the texts.

Hides: how chance is computed for each kind of score. Refuses to know: models, tasks, mteb, files.

A model that cannot read a language scores near chance on it. Its variants score near chance too,
whatever quality they lose. Such scores are therefore left out of a suite's mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from gteopt.evaluation.per_item_scores import CLUSTERINGS, Array, Floats, Samples
from gteopt.records.evaluation import TaskScore

_N_SHUFFLES = 40
_DEVIATIONS = 2.0
_LEVEL = 0.975
_SEED = 0


@dataclass(frozen=True)
class Chance:
    """The chance level of one score.

    Attributes:
        expected: score of a model that knows nothing, 0 to 1.
        is_beaten: whether the score is significantly above `expected`, one-sided at 2.5 %.
    """

    expected: float
    is_beaten: bool


def chance_of(samples: Samples) -> Chance | None:
    """The chance level of one task, split and subset, and whether these entries beat it.

    If the entries hold labels, the labels are shuffled 40 times among the units. The score must
    then exceed the mean of the shuffled scores by two of their standard deviations.

    If the score is a mean, each unit has an expected value by chance. For a query this is the score
    of a random ranking, for a text the share of the most frequent class, for a correlation 0. The
    t interval of the mean excess over these values must then lie above 0.

    Returns:
        None if chance cannot be computed from the entries.
    """
    if samples.statistic == "mean":
        return _of_mean(samples)
    rng = np.random.default_rng(_SEED)
    ones = np.ones((1, samples.n_units))
    shuffled = [float(_shuffled(samples, rng).scores(ones)[0]) for _ in range(_N_SHUFFLES)]
    expected = float(np.mean(shuffled))
    limit = expected + _DEVIATIONS * float(np.std(shuffled, ddof=1))
    return Chance(expected, samples.score() > limit)


def _of_mean(samples: Samples) -> Chance | None:
    expected = samples.arrays.get("chance")
    if expected is None or samples.n_units < 2:
        return None
    excess = samples.arrays["values"].astype(np.float64).mean(axis=0) - expected  # [U]
    half_width = stdtrit(len(excess) - 1, _LEVEL) * excess.std(ddof=1) / math.sqrt(len(excess))
    return Chance(float(expected.mean()), bool(excess.mean() > half_width))


def _shuffled(samples: Samples, rng: np.random.Generator) -> Samples:
    """The same answers with shuffled labels; a clustering shuffles within each experiment."""
    gold = samples.arrays["gold"]
    if samples.statistic in CLUSTERINGS:
        experiment = samples.arrays["experiment"]
        order = np.lexsort((rng.random(len(gold)), experiment))
        mixed = np.empty_like(gold)
        mixed[np.argsort(experiment, kind="stable")] = gold[order]
    else:
        mixed = rng.permutation(gold)
    return replace(samples, arrays={**samples.arrays, "gold": mixed})


def random_ranking(name: str, n_relevant: Array, n_documents: Array, depth: int) -> Floats:
    """Expected score [Q] of each query at `depth`, if its documents are in random order.

    Each rank i holds a relevant document with probability R / N:

        recall      min(k, N) / N
        precision   R / N times min(k, N) / k
        hit_rate    1 - P(none among the first k)
        mrr         the sum over i of P(the first relevant one is at i) / i
        map         the sum over i of (R / N + (i - 1) R (R - 1) / (N (N - 1))) / (i R)
        ndcg        R / N times the sum of 1 / log2(i + 1), over the ideal gain

    The ideal gain is the sum of the first R discounts. Grades count as 0 or 1. A query without a
    relevant document scores 0.

    Args:
        name: the metric, as above.
        n_relevant: R [Q], relevant documents.
        n_documents: N [Q], ranked documents.
        depth: k, how many ranks count.
    """
    relevant = np.asarray(n_relevant, np.float64)
    documents = np.maximum(np.asarray(n_documents, np.float64), 1)
    n_ranks = np.minimum(documents, depth)
    if name == "recall":
        expected = np.where(relevant > 0, n_ranks / documents, 0.0)
    elif name == "precision":
        expected = relevant / documents * n_ranks / depth
    elif name == "ndcg":
        discounts = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(depth) + 2))]
        ideal = discounts[np.minimum(relevant, depth).astype(np.int64)]
        gain = relevant / documents * discounts[n_ranks.astype(np.int64)]
        expected = np.divide(gain, ideal, out=np.zeros(len(ideal)), where=ideal > 0)
    else:
        expected = _by_rank(name, relevant, documents, depth)
    return expected


def _by_rank(name: str, relevant: Floats, documents: Floats, depth: int) -> Floats:
    """The metrics that are sums over the ranks; see `random_ranking`."""
    expected = np.zeros(len(relevant))
    none_yet = np.ones(len(relevant))  # P(no relevant document before this rank)
    others = np.maximum(documents - 1, 1)
    for rank in range(1, int(min(depth, documents.max(initial=0))) + 1):
        left = np.maximum(documents - rank + 1, 1)
        is_ranked = rank <= documents
        first = none_yet * np.clip(relevant / left, 0, 1) * is_ranked
        none_yet = none_yet - first
        if name == "hit_rate":
            expected += first
        elif name == "mrr":
            expected += first / rank
        elif name == "map":
            both = (rank - 1) * (relevant - 1) / others
            expected += is_ranked * (1 + both) / (documents * rank)
        else:
            raise ValueError(name)
    return np.where(relevant > 0, expected, 0.0)


def scores_above_chance(tasks: Sequence[TaskScore]) -> list[TaskScore]:
    """The scores that a suite's mean includes: those above chance, or all if none is."""
    above = [task for task in tasks if task.above_chance is not False]
    return above or list(tasks)


def chance_notes(tasks: Sequence[TaskScore]) -> tuple[str, ...]:
    """Notes that name the scores that the mean leaves out; empty if it leaves out none."""
    below = [task for task in tasks if task.above_chance is False]
    if not below:
        return ()
    if len(below) == len(tasks):
        return (
            "the baseline is above chance on no task, so these scores say nothing about the "
            "variants; choose another suite or other languages",
        )
    named = ", ".join(_named(task) for task in below)
    return (
        f"left out of the mean, because the baseline is not above chance on it: {named}; "
        f"--languages selects languages",
    )


def _named(task: TaskScore) -> str:
    subset = "" if task.subset == "default" else f" {task.subset}"
    assert task.chance is not None
    return f"{task.task}{subset} ({100 * task.baseline_score:.1f}, chance {100 * task.chance:.1f})"
