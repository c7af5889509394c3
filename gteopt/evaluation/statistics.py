"""How sure a difference is: paired bootstrap intervals, verdicts, and many claims at once.

Hides: resampling, and how the parts of a suite are put together. Refuses to know: models, tasks,
mteb, files.

Both models are scored on the same resample, so that what they share (hard queries, noisy labels)
cancels. Tasks are taken as given: an interval of a suite says how the mean over *these* tasks would
vary with other texts, not with other tasks. So is what is searched: with other queries, not with
other documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from gteopt.evaluation.chance import Chance, chance_of
from gteopt.evaluation.per_item_scores import CLUSTERINGS, Array, Floats, Samples
from gteopt.records.evaluation import Correction, Difference, EvalReport, Verdict

N_RESAMPLES = 1000
LEVEL = 0.95
_SEED = 0
MIN_UNITS = 10  # halves of fewer rank next to nothing, and no t makes up for it
_RULE_OF_THREE = -math.log((1 - LEVEL) / 2)
_BLOCKS = 5000  # units are drawn in blocks beyond this many; blocks this many lose no precision
_NORMAL = NormalDist()
_NORMAL_FROM = 1e6  # degrees of freedom beyond which t is normal
_Z = _NORMAL.inv_cdf((1 + LEVEL) / 2)

Key = TypeVar("Key")
Claims = dict[tuple[str, ...], tuple[Difference, float]]
"""Differences of one family, each with its margin."""


@dataclass(frozen=True)
class Draws:
    """Scores of the variant and of its baseline, [R] each, as other texts would give them.

    Quantiles of whatever is computed from them are ends of its interval.

    Attributes:
        freedom: degrees of freedom of the difference's standard error.
        is_unchanged: no unit differs, so that the spread is the rule of three's.
    """

    variant: Floats
    baseline: Floats
    freedom: float = math.inf
    is_unchanged: bool = False

    @property
    def difference(self) -> Floats:
        """Of the scores, [R]."""
        return self.variant - self.baseline

    @property
    def retention(self) -> Floats:
        """Ratio of the scores, [R]."""
        return self.variant / self.baseline


@dataclass(frozen=True)
class Resampled:
    """One model's scores on resamples of its units: what a baseline brings to every comparison.

    Attributes:
        samples: its entries.
        drawn: scores [R, E] of the resamples.
        whole: scores [E] of all units.
        without: scores [groups] of all units but one group's (see `_freedom`).
        influences: [U] of pairs that share texts (see `Samples.influences`); else None.
        rng: as the drawing left it.
    """

    samples: Samples
    drawn: Floats
    whole: Floats
    without: Floats
    influences: Floats | None
    rng: np.random.Generator

    @cached_property
    def chance(self) -> Chance | None:
        """What a model that knows nothing gets, and whether this one is above it."""
        return chance_of(self.samples)


def resample(samples: Samples, *, n_resamples: int = N_RESAMPLES, seed: int = _SEED) -> Resampled:
    """Score resamples of one model's units; see `paired_draws`."""
    blocks = _in_blocks(samples)
    n_units = blocks.n_units
    rng = np.random.default_rng((seed, n_units))
    draw = _resamples if blocks.statistic == "mean" else _half_samples
    drawn = [
        blocks.by_experiment(draw(rng, size, n_units))
        for size in _chunk_sizes(n_resamples, n_units)
    ]
    whole = blocks.by_experiment(np.ones((1, n_units)))[0]
    return Resampled(
        samples,
        np.concatenate(drawn),
        whole,
        blocks.scores(_without(n_units)),
        samples.influences() if "texts" in samples.arrays else None,
        rng,
    )


def paired_draws(
    variant: Samples,
    baseline: Samples | Resampled,
    *,
    same_model: bool = False,
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

    Where no unit differs, resampling finds nothing that could: the interval then says that, of n
    units, up to 3.7 may change (the rule of three, Hanley & Lippman-Hand 1983, at 2.5 % on each
    side), each to what another unit scores.

    Units of one number are drawn alike, whatever the task: translations of one text, and tasks that
    share their texts (MassiveIntent and MassiveScenario, STSBenchmark and its translations), are
    not taken for independent. Others of the same number, n, come to depend on each other by chance,
    with correlations around 0 of the order of 1 / sqrt(n).

    A clustering's score varies with the documents and with the runs of k-means, a classification's
    with the test documents and with the training sets that were drawn. Both variances are added and
    what is in both is taken off (Cameron, Gelbach & Miller 2011, equation 2.9).

    Pairs that share a text depend on each other; the deviation is as much greater than that of
    independent pairs as their influences say (see `_dyadic`). A query or document that is listed
    twice still counts as two.

    Args:
        variant: its entries.
        baseline: entries of the same units, or what was drawn of them with the same arguments.
        same_model: both are of one model, which cannot differ on other texts either.
        n_resamples: R.
        seed: of the draws.

    Returns:
        None when there are fewer than ten units.
    """
    if variant.n_units < MIN_UNITS:
        return None
    if isinstance(baseline, Samples):
        baseline = resample(baseline, n_resamples=n_resamples, seed=seed)
    assert variant.pairs_with(baseline.samples)
    ours = resample(variant, n_resamples=n_resamples, seed=seed)
    return _draws(ours, baseline, same_model=same_model)


def own_draws(
    samples: Samples, *, n_resamples: int = N_RESAMPLES, seed: int = _SEED
) -> Floats | None:
    """Draws [R] of one model's own score, made as `paired_draws` makes those of a difference.

    None when there are fewer than ten units.
    """
    if samples.n_units < MIN_UNITS:
        return None
    ours = resample(samples, n_resamples=n_resamples, seed=seed)
    nothing = Resampled(  # as if a baseline scored 0 whatever the texts
        samples,
        np.zeros_like(ours.drawn),
        np.zeros_like(ours.whole),
        np.zeros_like(ours.without),
        None if ours.influences is None else np.zeros_like(ours.influences),
        ours.rng,
    )
    return _draws(ours, nothing, same_model=False).variant


def _draws(variant: Resampled, baseline: Resampled, *, same_model: bool) -> Draws:
    by_experiment = variant.drawn - baseline.drawn  # [R, E]
    drawn, baseline_drawn = by_experiment.mean(axis=1), baseline.drawn.mean(axis=1)
    whole = variant.whole - baseline.whole  # [E]
    samples = _in_blocks(variant.samples)
    n_units = samples.n_units
    is_mean = samples.statistic == "mean"
    wider = n_units / (n_units - 1) if is_mean else (n_units // 2) / (n_units - n_units // 2)
    of_units = _freedom(variant.without - baseline.without)
    if samples.statistic in CLUSTERINGS:
        of_units = n_units - 1
    level = samples.arrays.get("level", np.zeros(len(whole)))
    deviation, freedom = _crossed(math.sqrt(wider) * by_experiment, whole, level, of_units)
    spread = math.sqrt(wider) * (baseline_drawn - baseline_drawn.mean())
    n_apart: float = variant.samples.n_units  # not of the blocks
    if variant.influences is not None and baseline.influences is not None:
        texts = variant.samples.arrays["texts"]
        inflation, of_texts = _dyadic(variant.influences - baseline.influences, texts)
        deviation *= inflation
        freedom = min(freedom, of_texts)
        spread *= _dyadic(baseline.influences, texts)[0]
        n_apart = min(n_apart, len(np.unique(texts)) / 2)
    half_width = deviation * _t_quantile(freedom)
    if deviation == 0 and not same_model:
        # Of two units the variance is twice that of one; scores of one value may yet have another.
        of_unit = max(n_apart * float(spread.var()), 1 / (2 * n_apart))
        half_width = _RULE_OF_THREE / n_apart * math.sqrt(2 * of_unit)
    normal = _normal_scores(len(drawn))
    if np.ptp(drawn) == 0:  # only the runs of k-means differ, or nothing; it goes with nothing else
        normal = variant.rng.permutation(normal)
    difference = np.empty_like(drawn)
    difference[np.argsort(drawn, kind="stable")] = whole.mean() + half_width / _Z * normal
    centred = float(baseline.whole.mean()) + spread
    return Draws(centred + difference, centred, freedom, deviation == 0)


def mean_of(draws: Sequence[Draws]) -> Draws:
    """Draws of the mean over subsets of a task, or over tasks.

    Degrees of freedom are those of independent parts (Welch 1947, Satterthwaite 1946), less in
    proportion to how far the parts go together.
    """
    inflated = np.array([part.difference.std(ddof=1) for part in draws])
    freedoms = np.array([part.freedom for part in draws])
    squares = (inflated / _t_quantile(freedoms)) ** 2
    quartic = float((squares**2 / freedoms).sum())
    freedom = math.inf
    if quartic > 0:
        total = float(np.sum([part.difference for part in draws], axis=0).var(ddof=1))
        apart = min(1.0, float((inflated**2).sum()) / total) if total > 0 else 1.0
        freedom = max(float(freedoms.min()), apart * float(squares.sum()) ** 2 / quartic)
    return Draws(
        np.mean([part.variant for part in draws], axis=0),
        np.mean([part.baseline for part in draws], axis=0),
        freedom,
    )


def interval(values: Floats) -> tuple[float, float]:
    """Ends of the 95 % interval of draws [R]."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def p_value(difference: float, draws: Draws) -> float:
    """Two-sided, of a difference of zero, from the spread of the draws.

    Student's tail goes on where counting draws cannot: correcting for many claims needs values that
    are smaller than one draw in R. Draws have the t's 95 % interval and a normal's shape; the tail
    is read at as many standard errors as the interval was made of.
    """
    spread = float(draws.difference.std(ddof=1))
    if spread <= 1e-12:
        return 1.0 if abs(difference) <= 1e-12 else 0.0
    standard_errors = abs(difference) / spread * _t_quantile(draws.freedom) / _Z
    return 2 * float(stdtr(min(draws.freedom, _NORMAL_FROM), -standard_errors))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p-values (Holm 1979): at most one false claim in twenty families at 0.05."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[Key, float] = {}
    greatest = 0.0
    for rank, name in enumerate(ordered):
        greatest = max(greatest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = greatest
    return adjusted


def p_equivalent(difference: Difference, margin: float) -> float:
    """One-sided p-value of a true difference at or beyond the margin.

    The larger of the two one-sided tests (Schuirmann 1987). The standard error is read off the
    interval, so that the value can be had from a record, for any margin.
    """
    room = margin - abs(difference.value)
    half_width = (difference.high - difference.low) / 2
    if half_width <= 1e-12:
        return 0.0 if room >= 0 else 1.0
    freedom = _NORMAL_FROM if difference.freedom is None else difference.freedom
    return float(stdtr(freedom, -room / half_width * _t_quantile(freedom)))


def difference_of(draws: Draws, value: float) -> Difference:
    """The record of one difference, found to be `value`; its verdict is `settle`'s to give."""
    low, high = interval(draws.difference)
    p = p_value(value, draws)
    freedom = None if draws.freedom >= _NORMAL_FROM else draws.freedom
    return Difference(value=value, low=low, high=high, verdict="undecided", p=p, freedom=freedom)


def settle(
    reports: Mapping[str, EvalReport], correction: Correction = "family"
) -> dict[str, EvalReport]:
    """The same reports with the verdicts that hold when all of them are read together.

    There are two kinds of claim: that a difference is there ("better", "worse"), and that it lies
    within the margin ("equivalent"). Each kind is corrected by itself, for every task of every
    variant, and apart from these for every variant's mean. A table whose claims of one kind are all
    wrong then holds a false difference in at most 5 % of cases, and a false equivalence in at most
    2.5 %. The baseline beside itself makes no claim.

    Args:
        reports: of one table.
        correction: "family" as above (Holm 1979); "row" takes each row as if it stood alone.
    """
    others = {
        name: report
        for name, report in reports.items()
        if report.artifact_sha256 != report.baseline_sha256
    }
    by_task: Claims = {
        (name, task.task, task.split, task.subset): (task.difference, report.margin)
        for name, report in others.items()
        for task in report.tasks
        if task.difference is not None
    }
    by_suite: Claims = {
        (name,): (report.difference, report.margin)
        for name, report in others.items()
        if report.difference is not None
    }
    verdicts = judge(by_task, correction) | judge(by_suite, correction)

    def decided(difference: Difference | None, *key: str) -> Difference | None:
        if difference is None:
            return None
        # The baseline beside itself is not in a family: it equals itself.
        return difference.model_copy(update={"verdict": verdicts.get(key, "equivalent")})

    def settled(name: str, report: EvalReport) -> EvalReport:
        tasks = [
            task.model_copy(
                update={
                    "difference": decided(task.difference, name, task.task, task.split, task.subset)
                }
            )
            for task in report.tasks
        ]
        return report.model_copy(
            update={
                "tasks": tuple(tasks),
                "difference": decided(report.difference, name),
                "n_claims": len(by_task),
                "correction": correction,
            }
        )

    return {name: settled(name, report) for name, report in reports.items()}


def judge(
    claims: Mapping[Key, tuple[Difference, float]], correction: Correction = "family"
) -> dict[Key, Verdict]:
    """The verdict of each difference of one family, given with its margin; see `settle`."""
    correct: Any = holm if correction == "family" else dict
    p_different = correct({key: difference.p for key, (difference, _) in claims.items()})
    p_same = correct(
        {key: p_equivalent(difference, margin) for key, (difference, margin) in claims.items()}
    )
    return {
        key: verdict(difference, p_different=p_different[key], p_same=p_same[key])
        for key, (difference, _) in claims.items()
    }


def verdict(difference: Difference, *, p_different: float, p_same: float) -> Verdict:
    """What may be said of a difference.

    Args:
        difference: with its 95 % interval.
        p_different: two-sided, that there is none, corrected for the other claims.
        p_same: one-sided, that it lies at or beyond the margin, corrected likewise.

    Returns:
        "equivalent" where `p_same` is at most 2.5 %. Else "worse" or "better" where `p_different`
        is below 5 % and the interval leaves out zero. Else "undecided".
    """
    if p_same <= (1 - LEVEL) / 2:
        return "equivalent"
    if p_different < 1 - LEVEL and (difference.high < 0 or difference.low > 0):
        return "worse" if difference.high < 0 else "better"
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
    for one_level in np.unique(level):
        own = observed[level == one_level]
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


def _dyadic(influences: Floats, texts: Array) -> tuple[float, float]:
    """How much greater a standard error is where pairs share texts, and its degrees of freedom.

    The variance adds the products of influences of every two pairs that share a text (Aronow, Samii
    & Assenova 2015). Summed by text, two pairs of the same two texts, and a pair with itself, are
    counted twice, which is taken off again; those of one text twice are not. It wants some hundred
    texts: of 60 in 600 pairs, intervals of 95 % covered 84 to 94 % (58 to 71 % as if independent).

    Never less than 1: that pairs of one text make up for each other is not known well enough to
    claim a shorter interval by it. The variance is known by the texts' sums, of which each counts
    half, because every pair is in two (see `_freedom`).

    Args:
        influences: [U] of each pair.
        texts: [2, U].
    """
    n_texts = int(texts.max()) + 1
    first, second = np.sort(texts, axis=0).astype(np.int64)
    apart = first != second
    by_text: Floats = np.bincount(first, influences, n_texts).astype(np.float64)
    by_text += np.bincount(second[apart], influences[apart], n_texts)
    _, pair = np.unique((first * n_texts + second)[apart], return_inverse=True)
    by_pair = np.bincount(pair, influences[apart])
    independent = float((influences**2).sum())
    together = float((by_text**2).sum() - (by_pair**2).sum())
    if together <= independent:
        return 1.0, math.inf
    return math.sqrt(together / independent), max(1.0, _freedom(by_text) / 2)


def _without(n_units: int) -> Floats:
    """Weights [groups, U] of all units but one group's, of at most 200 groups."""
    n_groups = min(n_units, 200)
    group = np.random.default_rng(_SEED).permutation(n_units) % n_groups
    weights: Floats = (group != np.arange(n_groups)[:, None]).astype(np.float64)
    return weights


def _freedom(left: Floats) -> float:
    """Degrees of freedom of the difference's standard error: 2n / (kurtosis - 1) for n units.

    A variance is known as well as the units that make it are many (Satterthwaite 1946): n - 1 of
    them for a normal influence, twice the number of changed answers where most stay as they were.
    The influence of a unit is what the difference loses without it (the jackknife).

    Args:
        left: differences [groups] without each group of units, or what each group adds.
    """
    n_groups = len(left)
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
    values = samples.arrays["values"].astype(np.float64)  # [E, U]
    starts = np.linspace(0, samples.n_units, _BLOCKS, endpoint=False).astype(np.int64)
    # Scaled so that the plain mean over blocks is the mean over units, whose number may differ.
    sums = np.add.reduceat(values, starts, axis=1) * (len(starts) / samples.n_units)
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


def _t_quantile(freedom: npt.ArrayLike) -> Any:
    """Student's t at the upper end of the interval, of one or several degrees of freedom."""
    return stdtrit(np.minimum(freedom, _NORMAL_FROM), (1 + LEVEL) / 2)
