"""Whether a score says anything: what a model that knows nothing would get on the same data.

Hides: what chance is for each kind of score. Refuses to know: models, tasks, mteb, files.

A model that cannot read a language gets a score near chance there. Its variants keep that score
whatever they lose, so that such a score belongs in no mean of what variants keep.
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
    """What a score is held against.

    Attributes:
        expected: score of a model that knows nothing, 0 to 1.
        is_beaten: whether the score is surely above it, one-sided at 2.5 %.
    """

    expected: float
    is_beaten: bool


def chance_of(samples: Samples) -> Chance | None:
    """Chance on one task, split and subset, and whether these entries beat it.

    Where the entries hold labels, these are shuffled 40 times among the units: the score has to be
    above the mean of the shuffled scores by two of their standard deviations. Where the score is a
    mean, each unit brings its own expectation: a random ranking's nDCG of a query, the share of the
    most frequent class of a text, 0 of a correlation. The mean excess has to be above 0 by its t
    interval.

    Returns:
        None where the entries do not tell what chance is.
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
    """The same answers with the labels of other units; a clustering keeps its own labels."""
    gold = samples.arrays["gold"]
    if samples.statistic in CLUSTERINGS:
        experiment = samples.arrays["experiment"]
        order = np.lexsort((rng.random(len(gold)), experiment))
        mixed = np.empty_like(gold)
        mixed[np.argsort(experiment, kind="stable")] = gold[order]
    else:
        mixed = rng.permutation(gold)
    return replace(samples, arrays={**samples.arrays, "gold": mixed})


def random_ndcg(n_relevant: Array, n_documents: Array, depth: int) -> Floats:
    """Expected nDCG at `depth` of documents in random order, a value a query.

    Each place holds a relevant document with probability R / N, so that the gain is R / N times the
    sum of the discounts 1 / log2(i + 1). The ideal gain is the sum of the first R of these. Grades
    count as 0 or 1.

    Args:
        n_relevant: R [Q].
        n_documents: N [Q] that are ranked.
        depth: places that count.
    """
    discounts = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(depth) + 2))]
    ranked = np.maximum(n_documents, 1).astype(np.int64)
    ideal = discounts[np.minimum(n_relevant, depth)]
    gain = n_relevant / ranked * discounts[np.minimum(ranked, depth)]
    found: Floats = np.divide(gain, ideal, out=np.zeros(len(ideal)), where=ideal > 0)
    return found


def counted(tasks: Sequence[TaskScore]) -> list[TaskScore]:
    """The scores that a suite's mean is over: those above chance, or all where none is."""
    above = [task for task in tasks if task.above_chance is not False]
    return above or list(tasks)


def chance_notes(tasks: Sequence[TaskScore]) -> tuple[str, ...]:
    """Which scores the mean leaves out; empty where it leaves out none."""
    below = [task for task in tasks if task.above_chance is False]
    if not below:
        return ()
    if len(below) == len(tasks):
        return (
            "the baseline is above chance on no task, so these scores say nothing of what a "
            "variant keeps; choose another suite or other languages",
        )
    named = ", ".join(_named(task) for task in below)
    return (
        f"left out of the mean, because the baseline is not above chance there: {named}; "
        f"--languages chooses",
    )


def _named(task: TaskScore) -> str:
    subset = "" if task.subset == "default" else f" {task.subset}"
    assert task.chance is not None
    return f"{task.task}{subset} ({100 * task.baseline_score:.1f}, chance {100 * task.chance:.1f})"
