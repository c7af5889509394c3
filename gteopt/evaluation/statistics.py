"""How sure a difference is: paired bootstrap intervals, verdicts, and many claims at once.

Hides: resampling, and how the parts of a suite are put together. Refuses to know: models, tasks,
mteb, files.

Both models are scored on the same resample, so that what they share (hard queries, noisy labels)
cancels. Tasks are independent of each other and are taken as given: an interval of a suite says how
the mean over *these* tasks would vary with other texts, not with other tasks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from gteopt.evaluation.samples import CLUSTERINGS, Array, Floats, Samples
from gteopt.records import Difference, EvalReport, TaskScore, Verdict

N_RESAMPLES = 1000
LEVEL = 0.95
_SEED = 0
_BLOCKS = 5000  # units are drawn in blocks beyond this many; blocks this many lose no precision
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Draws:
    """Scores of the variant and of its baseline, [R] each, as other texts would give them.

    Quantiles of whatever is computed from them are ends of its interval.
    """

    variant: Floats
    baseline: Floats

    @property
    def difference(self) -> Floats:
        """Of the scores, [R]."""
        return self.variant - self.baseline

    @property
    def retention(self) -> Floats:
        """Ratio of the scores, [R]."""
        return self.variant / self.baseline


def paired_draws(
    variant: Samples,
    baseline: Samples,
    *,
    task: str,
    n_resamples: int = N_RESAMPLES,
    seed: int = _SEED,
) -> Draws | None:
    """Resample the units that both models were scored on.

    Units of a mean are drawn with replacement (Efron 1979); those of ranks, classes and clusterings
    by halves without, which has the same variance (McCarthy 1969) and makes no copies: a copy ties
    with itself in a ranking and shares its own cluster, whatever the model.

    The draws of the difference lie symmetrically around what was found, as far as the bootstrap
    standard error and Student's t say, with as many degrees of freedom as there are units that
    matter (see `_freedom`). Of the intervals that were tried on synthetic scores of known
    difference (percentile, BCa, studentised, Hall's and this one) only this one covers at its rate
    when few units differ between the models, which is how variants of one model differ.

    A clustering's score varies with the documents and with the runs of k-means. Both variances are
    added and what is in both is taken off (Cameron, Gelbach & Miller 2011, equation 2.9).

    Args:
        variant: its entries.
        baseline: entries of the same units.
        task: units of one number within one task are drawn alike, so that subsets that are
            translations of each other are not taken for independent.
        n_resamples: R.
        seed: of the draws.

    Returns:
        None when there are fewer than two units.
    """
    assert variant.pairs_with(baseline)
    return _draws(variant, baseline, task, n_resamples, seed)


def own_draws(
    samples: Samples, *, task: str, n_resamples: int = N_RESAMPLES, seed: int = _SEED
) -> Floats | None:
    """Draws [R] of one model's own score, made as `paired_draws` makes those of a difference.

    None when there are fewer than two units.
    """
    found = _draws(samples, None, task, n_resamples, seed)
    return None if found is None else found.variant


def _draws(
    variant: Samples, baseline: Samples | None, task: str, n_resamples: int, seed: int
) -> Draws | None:
    """Draws of both models; without a baseline, as if it scored 0 whatever the texts."""
    if variant.n_units < 2:
        return None
    variant = _in_blocks(variant)
    baseline = None if baseline is None else _in_blocks(baseline)
    n_units = variant.n_units
    digest = hashlib.sha256(f"{seed}\0{task}\0{n_units}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    draw, wider = (
        (_resamples, n_units / (n_units - 1))
        if variant.statistic == "mean"
        else (_half_samples, (n_units // 2) / (n_units - n_units // 2))
    )
    ours, theirs = [], []
    for size in _chunk_sizes(n_resamples, n_units):
        weights = draw(rng, size, n_units)
        ours.append(variant.by_experiment(weights))
        theirs.append(_by_experiment(baseline, weights, ours[-1]))
    by_experiment = np.concatenate(ours) - np.concatenate(theirs)  # [R, E]
    drawn, baseline_drawn = by_experiment.mean(axis=1), np.concatenate(theirs).mean(axis=1)

    all_units = np.ones((1, n_units))
    of_variant = variant.by_experiment(all_units)
    of_baseline = _by_experiment(baseline, all_units, of_variant)
    found = (of_variant - of_baseline)[0]  # [E]
    if variant.statistic in CLUSTERINGS:
        deviation, freedom = _crossed(
            math.sqrt(wider) * by_experiment, found, variant.arrays["level"], n_units - 1
        )
    else:
        deviation = math.sqrt(wider) * float(drawn.std(ddof=1))
        freedom = _freedom(variant, baseline)
    normal = _normal_scores(len(drawn))
    if np.ptp(drawn) == 0:  # only the runs of k-means differ; these go with nothing else
        normal = rng.permutation(normal)
    half_width = deviation * _t_quantile(freedom) / _NORMAL.inv_cdf((1 + LEVEL) / 2)
    difference = np.empty_like(drawn)
    difference[np.argsort(drawn, kind="stable")] = found.mean() + half_width * normal
    spread = math.sqrt(wider) * (baseline_drawn - baseline_drawn.mean())
    centred = float(of_baseline.mean()) + spread
    return Draws(centred + difference, centred)


def _by_experiment(baseline: Samples | None, weights: Floats, like: Floats) -> Floats:
    return np.zeros_like(like) if baseline is None else baseline.by_experiment(weights)


def mean_of(draws: Sequence[Draws]) -> Draws:
    """Draws of the mean over subsets of a task, or over tasks."""
    return Draws(
        np.mean([each.variant for each in draws], axis=0),
        np.mean([each.baseline for each in draws], axis=0),
    )


def interval(values: Floats) -> tuple[float, float]:
    """Ends of the 95 % interval of draws [R]."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def p_value(difference: float, draws: Floats) -> float:
    """Two-sided, of a difference of zero, from the spread of the draws [R].

    The normal tail goes on where counting draws cannot: correcting for many claims needs values
    that are smaller than one draw in R.
    """
    spread = float(draws.std(ddof=1))
    if spread <= 1e-12:
        return 1.0 if abs(difference) <= 1e-12 else 0.0
    return math.erfc(abs(difference) / spread / math.sqrt(2))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm 1979): at most one false claim in twenty families at 0.05."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[str, float] = {}
    greatest = 0.0
    for rank, name in enumerate(ordered):
        greatest = max(greatest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = greatest
    return adjusted


def difference_of(draws: Draws, value: float) -> Difference:
    """The record of one difference, found to be `value`; its verdict is `settle`'s to give."""
    low, high = interval(draws.difference)
    p = p_value(value, draws.difference)
    return Difference(value=value, low=low, high=high, verdict="undecided", p=p)


def settle(reports: Mapping[str, EvalReport]) -> dict[str, EvalReport]:
    """The same reports with the verdicts that hold when all of them are read together.

    Two families are corrected each for itself: every task of every variant, and every variant's
    mean. The baseline beside itself makes no claim. "equivalent" needs no correction: its test is
    passed on both sides or not at all, and what multiplies with many tasks is false alarms, which
    it is not.
    """
    others = {
        name: report
        for name, report in reports.items()
        if report.artifact_sha256 != report.baseline_sha256
    }
    by_task = {
        f"{name}\0{task.task}\0{task.split}\0{task.subset}": task.difference.p
        for name, report in others.items()
        for task in report.tasks
        if task.difference is not None
    }
    by_suite = {
        name: report.difference.p
        for name, report in others.items()
        if report.difference is not None
    }
    tasks_adjusted, suites_adjusted = holm(by_task), holm(by_suite)

    def decided(found: Difference | None, margin: float, p: float) -> Difference | None:
        if found is None:
            return None
        return found.model_copy(update={"verdict": verdict(found.low, found.high, margin, p)})

    def settled(name: str, report: EvalReport) -> EvalReport:
        def with_verdict(task: TaskScore) -> TaskScore:
            p = tasks_adjusted.get(f"{name}\0{task.task}\0{task.split}\0{task.subset}", 1.0)
            return task.model_copy(
                update={"difference": decided(task.difference, report.margin, p)}
            )

        return report.model_copy(
            update={
                "tasks": tuple(with_verdict(task) for task in report.tasks),
                "difference": decided(
                    report.difference, report.margin, suites_adjusted.get(name, 1.0)
                ),
                "n_claims": len(by_task),
            }
        )

    return {name: settled(name, report) for name, report in reports.items()}


def verdict(low: float, high: float, margin: float, p: float) -> Verdict:
    """What may be said of a difference with interval `low` to `high`.

    "equivalent" where the interval lies within the margin on both sides (two one-sided tests,
    Schuirmann 1987, each at 2.5 %); else "worse" or "better" where `p`, corrected for the other
    claims, is below 5 % and the interval leaves out zero; else "undecided".
    """
    if -margin <= low and high <= margin:
        return "equivalent"
    if p < 1 - LEVEL and (high < 0 or low > 0):
        return "worse" if high < 0 else "better"
    return "undecided"


def _crossed(
    differences: Floats, observed: Floats, level: Array, freedom: float
) -> tuple[float, float]:
    """Standard error of a mean over experiments that share documents, and its degrees of freedom.

    Args:
        differences: [R, E] of resampled documents, variance scaled to that of all of them.
        observed: [E] on all documents.
        level: [E]; experiments of different levels have different means.
        freedom: degrees of freedom of the documents.
    """
    n = len(observed)
    by_documents = float(differences.mean(axis=1).var(ddof=1))
    by_both = float(differences.var(axis=0, ddof=1).sum()) / n**2
    by_experiments, of_experiments = 0.0, 0
    for each in np.unique(level):
        own = observed[level == each]
        if len(own) > 1:
            by_experiments += len(own) * float(own.var(ddof=1)) / n**2
            of_experiments += len(own) - 1
    # The difference of variances can fall below either on a few experiments.
    total = max(by_documents + by_experiments - by_both, by_documents, by_experiments)
    if total == 0 or of_experiments == 0:
        return math.sqrt(total), freedom
    # Welch (1947) and Satterthwaite (1946).
    parts = by_documents**2 / freedom + by_experiments**2 / of_experiments
    return math.sqrt(total), (by_documents + by_experiments) ** 2 / parts


def _freedom(variant: Samples, baseline: Samples | None) -> float:
    """Degrees of freedom of the difference's standard error: 2n / (kurtosis - 1) for n units.

    A variance is known as well as the units that make it are many (Satterthwaite 1946): n - 1 of
    them for a normal influence, twice the number of changed answers where most stay as they were.
    The influence of a unit is what the difference loses without it (the jackknife), of at most 200
    groups of units.
    """
    n_units = variant.n_units
    n_groups = min(n_units, 200)
    group = np.random.default_rng(_SEED).permutation(n_units) % n_groups
    without = (group != np.arange(n_groups)[:, None]).astype(np.float64)  # [groups, U]
    left = variant.scores(without) - (0.0 if baseline is None else baseline.scores(without))
    squares = (left - left.mean()) ** 2
    if squares.sum() <= 1e-24:
        return n_groups - 1
    kurtosis = n_groups * float((squares**2).sum()) / float(squares.sum()) ** 2
    return max(1.0, min(n_groups - 1, 2 * n_groups / max(kurtosis - 1, 1e-9)))


def _normal_scores(n: int) -> Floats:
    """Quantiles [n] of the standard normal distribution, ascending."""
    return np.array([_NORMAL.inv_cdf((rank + 0.5) / n) for rank in range(n)])


def _in_blocks(samples: Samples) -> Samples:
    """The same mean over fewer, nearly equal blocks of units, where there are very many."""
    if samples.statistic != "mean" or samples.n_units <= _BLOCKS:
        return samples
    values: npt.NDArray[np.float64] = samples.arrays["values"]
    starts = np.linspace(0, len(values), _BLOCKS, endpoint=False).astype(np.int64)
    # Scaled so that the plain mean over blocks is the mean over units, whose number may differ.
    sums = np.add.reduceat(values, starts) * (len(starts) / len(values))
    return Samples("mean", samples.unit, {"values": sums})


def _chunk_sizes(n_resamples: int, n_units: int) -> list[int]:
    step = max(1, min(n_resamples, 4_000_000 // n_units))  # 32 MB of weights
    return [min(step, n_resamples - start) for start in range(0, n_resamples, step)]


def _resamples(rng: np.random.Generator, n: int, n_units: int) -> npt.NDArray[np.float64]:
    """How often each unit is drawn, [n, n_units], drawing n_units with replacement."""
    drawn = rng.integers(0, n_units, (n, n_units)) + n_units * np.arange(n)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n * n_units)
    return counts.reshape(n, n_units).astype(np.float64)


def _half_samples(rng: np.random.Generator, n: int, n_units: int) -> npt.NDArray[np.float64]:
    """One for each unit of a random half, [n, n_units]."""
    half = np.arange(n_units) < n_units // 2
    return rng.permuted(np.tile(half, (n, 1)), axis=1).astype(np.float64)


def _t_quantile(freedom: float) -> float:
    """Student's t at the upper end of the interval (Abramowitz & Stegun 26.7.5)."""
    z = _NORMAL.inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
