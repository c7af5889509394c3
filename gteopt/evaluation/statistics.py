"""Compute paired bootstrap intervals of score differences, and verdicts on many claims at once.

Hides: resampling, and how the parts of a suite are combined. Refuses to know: models, tasks, mteb,
files.

Both models are scored on the same resample, so effects that they share (hard queries, noisy labels)
cancel. Tasks are fixed: a suite's interval shows how the mean over *these* tasks would vary with
other texts, not with other tasks. Searched documents are fixed too: the interval shows how a score
would vary with other queries.
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
from gteopt.records.evaluation import Correction, EvalReport, ScoreDifference, Verdict

N_RESAMPLES = 1000
LEVEL = 0.95
_SEED = 0
MIN_UNITS = 10  # with fewer units, half-samples are too small to rank
_RULE_OF_THREE = -math.log((1 - LEVEL) / 2)
_BLOCKS = 5000  # more units than this are grouped into this many blocks, without loss of precision
_NORMAL = NormalDist()
_NORMAL_FROM = 1e6  # degrees of freedom from which Student's t counts as normal
_Z = _NORMAL.inv_cdf((1 + LEVEL) / 2)

Key = TypeVar("Key")
Claims = dict[tuple[str, ...], tuple[ScoreDifference, float]]
"""The differences of one family of claims, with their margins."""


@dataclass(frozen=True)
class Draws:
    """Simulated scores [R] of a variant and of its baseline on other texts.

    The interval of any quantity that is computed from them is given by its quantiles.

    Attributes:
        freedom: degrees of freedom of the difference's standard error.
        is_unchanged: no unit differs, so the spread comes from the rule of three.
    """

    variant: Floats
    baseline: Floats
    freedom: float = math.inf
    is_unchanged: bool = False

    @property
    def difference(self) -> Floats:
        """Difference of the scores, [R]."""
        return self.variant - self.baseline

    @property
    def retention(self) -> Floats:
        """Ratio of the scores, [R]."""
        return self.variant / self.baseline


@dataclass(frozen=True)
class ResampledScores:
    """One model's scores on resamples of its units; a baseline's are reused in every comparison.

    Attributes:
        samples: entries of the model.
        drawn: scores [R, E] of the resamples.
        whole: scores [E] of all units.
        without: scores [groups] without each group of units; see `_freedom`.
        influences: [U], if pairs share texts (see `Samples.influences`); otherwise None.
        rng: the generator in its state after drawing.
    """

    samples: Samples
    drawn: Floats
    whole: Floats
    without: Floats
    influences: Floats | None
    rng: np.random.Generator

    @cached_property
    def chance(self) -> Chance | None:
        """The chance level of the score, and whether this model is above it."""
        return chance_of(self.samples)


def resample_scores(
    samples: Samples, *, n_resamples: int = N_RESAMPLES, seed: int = _SEED
) -> ResampledScores:
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
    return ResampledScores(
        samples,
        np.concatenate(drawn),
        whole,
        blocks.scores(_without(n_units)),
        samples.influences() if "texts" in samples.arrays else None,
        rng,
    )


def paired_draws(
    variant: Samples,
    baseline: Samples | ResampledScores,
    *,
    same_model: bool = False,
    n_resamples: int = N_RESAMPLES,
    seed: int = _SEED,
) -> Draws | None:
    """Resample the units that both models were scored on.

    Units of a mean are drawn with replacement (Efron 1979). For ranks, classes and clusterings,
    random halves are drawn without replacement, which has the same variance (McCarthy 1969). A draw
    with replacement would make copies. A copy ties with its original in a ranking, and shares its
    cluster, whatever the model.

    The draws of the difference are symmetric around the observed difference. Their width is the
    bootstrap standard error times Student's t, with the degrees of freedom of `_freedom`. Variants
    of one model differ in few units. On such data, only this interval has its nominal coverage;
    percentile, BCa, studentised and Hall's intervals do not.

    If no unit differs, resampling cannot estimate a spread. The rule of three is used instead
    (Hanley & Lippman-Hand 1983, at 2.5 % on each side). It says that up to 3.7 of n units may
    change. Each of them is assumed to change to the score of another unit.

    Two data sets with the same number of units get the same draws in all tasks. Translations of a
    text, and tasks with the same texts (MassiveIntent and MassiveScenario), are therefore not
    treated as independent. Unrelated data sets of the same size n get chance correlations around 0,
    of the order of 1 / sqrt(n).

    A clustering's score varies with the documents and with the runs of k-means. A classification's
    score varies with the test documents and with the drawn training sets. The two variances are
    added, and their common part is subtracted (Cameron, Gelbach & Miller 2011, equation 2.9).

    Pairs that share a text are not independent, which `_dyadic` accounts for. A query or document
    that is listed twice still counts as two.

    Args:
        variant: entries of the variant.
        baseline: entries of the same units, or their resampled scores with the same arguments.
        same_model: both sides are the same model, which cannot differ on other texts either.
        n_resamples: R.
        seed: seed of the draws.

    Returns:
        None if there are fewer than ten units.
    """
    if variant.n_units < MIN_UNITS:
        return None
    if isinstance(baseline, Samples):
        baseline = resample_scores(baseline, n_resamples=n_resamples, seed=seed)
    assert variant.pairs_with(baseline.samples)
    ours = resample_scores(variant, n_resamples=n_resamples, seed=seed)
    return _draws(ours, baseline, same_model=same_model)


def own_draws(
    samples: Samples, *, n_resamples: int = N_RESAMPLES, seed: int = _SEED
) -> Floats | None:
    """Draws [R] of one model's score, made as `paired_draws` makes the draws of a difference.

    None if there are fewer than ten units.
    """
    if samples.n_units < MIN_UNITS:
        return None
    ours = resample_scores(samples, n_resamples=n_resamples, seed=seed)
    zero = ResampledScores(  # a baseline that scores 0 on all texts
        samples,
        np.zeros_like(ours.drawn),
        np.zeros_like(ours.whole),
        np.zeros_like(ours.without),
        None if ours.influences is None else np.zeros_like(ours.influences),
        ours.rng,
    )
    return _draws(ours, zero, same_model=False).variant


def _draws(variant: ResampledScores, baseline: ResampledScores, *, same_model: bool) -> Draws:
    by_experiment = variant.drawn - baseline.drawn  # [R, E]
    drawn, baseline_drawn = by_experiment.mean(axis=1), baseline.drawn.mean(axis=1)
    whole = variant.whole - baseline.whole  # [E]
    samples = _in_blocks(variant.samples)
    n_units = samples.n_units
    is_mean = samples.statistic == "mean"
    wider = n_units / (n_units - 1) if is_mean else (n_units // 2) / (n_units - n_units // 2)
    unit_freedom = _freedom(variant.without - baseline.without)
    if samples.statistic in CLUSTERINGS:
        unit_freedom = n_units - 1
    level = samples.arrays.get("level", np.zeros(len(whole)))
    deviation, freedom = _crossed(math.sqrt(wider) * by_experiment, whole, level, unit_freedom)
    spread = math.sqrt(wider) * (baseline_drawn - baseline_drawn.mean())
    n_independent: float = variant.samples.n_units  # of units, not of blocks
    if variant.influences is not None and baseline.influences is not None:
        texts = variant.samples.arrays["texts"]
        inflation, text_freedom = _dyadic(variant.influences - baseline.influences, texts)
        deviation *= inflation
        freedom = min(freedom, text_freedom)
        spread *= _dyadic(baseline.influences, texts)[0]
        n_independent = min(n_independent, len(np.unique(texts)) / 2)
    half_width = deviation * _t_quantile(freedom)
    if deviation == 0 and not same_model:
        # The difference of two units has twice the variance of one. Even if all units have the
        # same score, another unit may score differently, so the variance has a lower bound.
        unit_variance = max(n_independent * float(spread.var()), 1 / (2 * n_independent))
        half_width = _RULE_OF_THREE / n_independent * math.sqrt(2 * unit_variance)
    normal = _normal_scores(len(drawn))
    if np.ptp(drawn) == 0:  # the units do not differ, so the draws correlate with no other task
        normal = variant.rng.permutation(normal)
    difference = np.empty_like(drawn)
    difference[np.argsort(drawn, kind="stable")] = whole.mean() + half_width / _Z * normal
    centred = float(baseline.whole.mean()) + spread
    return Draws(centred + difference, centred, freedom, deviation == 0)


def mean_draws(draws: Sequence[Draws]) -> Draws:
    """Draws of the mean over subsets of a task, or over tasks.

    Degrees of freedom follow Welch (1947) and Satterthwaite (1946), which hold for independent
    parts. They are reduced in proportion to the correlation of the parts.
    """
    inflated = np.array([part.difference.std(ddof=1) for part in draws])
    freedoms = np.array([part.freedom for part in draws])
    squares = (inflated / _t_quantile(freedoms)) ** 2
    quartic = float((squares**2 / freedoms).sum())
    freedom = math.inf
    if quartic > 0:
        total = float(np.sum([part.difference for part in draws], axis=0).var(ddof=1))
        independence = min(1.0, float((inflated**2).sum()) / total) if total > 0 else 1.0
        freedom = max(float(freedoms.min()), independence * float(squares.sum()) ** 2 / quartic)
    return Draws(
        np.mean([part.variant for part in draws], axis=0),
        np.mean([part.baseline for part in draws], axis=0),
        freedom,
    )


def interval_of_draws(values: Floats) -> tuple[float, float]:
    """Ends of the 95 % interval of draws [R]."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def p_value(difference: float, draws: Draws) -> float:
    """The two-sided p-value of a true difference of zero, from the spread of the draws.

    The correction for many claims needs p-values below 1 / R, so draws are not counted. The value
    is read from the tail of Student's t instead. Draws are normal with the width of the t interval.
    The number of standard errors is therefore converted from the normal scale to the t scale.
    """
    spread = float(draws.difference.std(ddof=1))
    if spread <= 1e-12:
        return 1.0 if abs(difference) <= 1e-12 else 0.0
    standard_errors = abs(difference) / spread * _t_quantile(draws.freedom) / _Z
    return 2 * float(stdtr(min(draws.freedom, _NORMAL_FROM), -standard_errors))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p-values (Holm 1979): at 0.05, at most one family in twenty has a false claim."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[Key, float] = {}
    greatest = 0.0
    for rank, name in enumerate(ordered):
        greatest = max(greatest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = greatest
    return adjusted


def p_equivalent(difference: ScoreDifference, margin: float) -> float:
    """One-sided p-value of a true difference at or beyond the margin.

    It is the larger p-value of two one-sided tests (Schuirmann 1987). The standard error is
    computed from the interval, so a record is enough to get the p-value for any margin.
    """
    room = margin - abs(difference.value)
    half_width = (difference.high - difference.low) / 2
    if half_width <= 1e-12:
        return 0.0 if room >= 0 else 1.0
    freedom = _NORMAL_FROM if difference.freedom is None else difference.freedom
    return float(stdtr(freedom, -room / half_width * _t_quantile(freedom)))


def difference_of(draws: Draws, value: float) -> ScoreDifference:
    """One difference with the observed `value`; `correct_verdicts` gives its verdict."""
    low, high = interval_of_draws(draws.difference)
    p = p_value(value, draws)
    freedom = None if draws.freedom >= _NORMAL_FROM else draws.freedom
    return ScoreDifference(
        value=value, low=low, high=high, verdict="undecided", p=p, freedom=freedom
    )


def correct_verdicts(
    reports: Mapping[str, EvalReport], correction: Correction = "family"
) -> dict[str, EvalReport]:
    """The same reports with verdicts that are corrected for all claims of the reports together.

    There are two kinds of claim: that a difference exists ("better", "worse"), and that it lies
    within the margin ("equivalent"). Each kind is corrected separately. The tasks of all variants
    form one family, and the means of all variants another. In each family, the probability of any
    false difference is at most 5 %, and of any false equivalence at most 2.5 %. A baseline that is
    compared with itself makes no claim.

    Args:
        reports: the reports of one table.
        correction: "family" as above (Holm 1979); "row" corrects no claim for the others.
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
    verdicts = judge_claims(by_task, correction) | judge_claims(by_suite, correction)

    def decided(difference: ScoreDifference | None, *key: str) -> ScoreDifference | None:
        if difference is None:
            return None
        # A baseline that is compared with itself is in no family; it is equivalent.
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


def judge_claims(
    claims: Mapping[Key, tuple[ScoreDifference, float]], correction: Correction = "family"
) -> dict[Key, Verdict]:
    """The verdict on each difference of one family; each has a margin. See `correct_verdicts`."""
    correct: Any = holm if correction == "family" else dict
    p_different = correct({key: difference.p for key, (difference, _) in claims.items()})
    p_same = correct(
        {key: p_equivalent(difference, margin) for key, (difference, margin) in claims.items()}
    )
    return {
        key: statistical_verdict(difference, p_different=p_different[key], p_same=p_same[key])
        for key, (difference, _) in claims.items()
    }


def statistical_verdict(
    difference: ScoreDifference, *, p_different: float, p_same: float
) -> Verdict:
    """The verdict on a difference.

    Args:
        difference: has the 95 % interval.
        p_different: two-sided p-value of no difference, corrected for the other claims.
        p_same: one-sided p-value of a difference at or beyond the margin, corrected likewise.

    Returns:
        "equivalent" if `p_same` is at most 2.5 %. Otherwise "worse" or "better" if `p_different` is
        below 5 % and the interval excludes zero. Otherwise "undecided".
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
        differences: [R, E] on resampled documents, with the variance of the full sample.
        observed: [E], differences on all documents.
        level: [E]; experiments of different levels have different means.
        freedom: degrees of freedom of the documents.
    """
    n = len(observed)
    by_documents = float(differences.mean(axis=1).var(ddof=1))
    by_both = float(differences.var(axis=0, ddof=1).sum()) / n**2
    by_experiments, experiment_freedom = 0.0, 0
    for level_id in np.unique(level):
        at_level = observed[level == level_id]
        if len(at_level) > 1:
            by_experiments += len(at_level) * float(at_level.var(ddof=1)) / n**2
            experiment_freedom += len(at_level) - 1
    # With few experiments, the estimated sum can fall below one of its terms.
    total = max(by_documents + by_experiments - by_both, by_documents, by_experiments)
    if total == 0 or experiment_freedom == 0:
        return math.sqrt(total), freedom
    # Welch (1947) and Satterthwaite (1946).
    parts = by_documents**2 / freedom + by_experiments**2 / experiment_freedom
    return math.sqrt(total), (by_documents + by_experiments) ** 2 / parts


def _dyadic(influences: Floats, texts: Array) -> tuple[float, float]:
    """By what factor shared texts increase a standard error of pairs, and its degrees of freedom.

    The variance adds the products of influences of every two pairs that share a text (Aronow, Samii
    & Assenova 2015). Sums by text count twice each product of two pairs with the same two texts,
    and each product of a pair with itself. The excess is subtracted. A pair of one text with itself
    is counted once. With fewer than some hundred texts, coverage falls below 95 %, but stays far
    above that of a method that ignores shared texts.

    The factor is at least 1, because negative correlations are not known well enough to shorten an
    interval. Degrees of freedom come from the sums by text; see `_freedom`. They are halved,
    because every pair is in two sums.

    Args:
        influences: [U], influence of each pair.
        texts: [2, U], numbers of the texts of each pair.
    """
    n_texts = int(texts.max()) + 1
    first, second = np.sort(texts, axis=0).astype(np.int64)
    differ = first != second
    by_text: Floats = np.bincount(first, influences, n_texts).astype(np.float64)
    by_text += np.bincount(second[differ], influences[differ], n_texts)
    _, pair = np.unique((first * n_texts + second)[differ], return_inverse=True)
    by_pair = np.bincount(pair, influences[differ])
    independent = float((influences**2).sum())
    together = float((by_text**2).sum() - (by_pair**2).sum())
    if together <= independent:
        return 1.0, math.inf
    return math.sqrt(together / independent), max(1.0, _freedom(by_text) / 2)


def _without(n_units: int) -> Floats:
    """Weights [groups, U] that leave out one group of units each; there are at most 200 groups."""
    n_groups = min(n_units, 200)
    group = np.random.default_rng(_SEED).permutation(n_units) % n_groups
    weights: Floats = (group != np.arange(n_groups)[:, None]).astype(np.float64)
    return weights


def _freedom(left: Floats) -> float:
    """Degrees of freedom of the difference's standard error: 2n / (kurtosis - 1) for n units.

    The precision of a variance depends on the number of units that contribute (Satterthwaite 1946).
    It is n - 1 for normal influences, and twice the number of changed answers if most answers are
    unchanged. The influence of a unit is estimated by leaving it out (the jackknife).

    Args:
        left: differences [groups] without each group of units, or the contribution of each group.
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
    """Entries with the same mean over nearly equal blocks of units, if there are many units."""
    if samples.statistic != "mean" or samples.n_units <= _BLOCKS:
        return samples
    values = samples.arrays["values"].astype(np.float64)  # [E, U]
    starts = np.linspace(0, samples.n_units, _BLOCKS, endpoint=False).astype(np.int64)
    # Blocks differ in size, so sums are scaled; the mean over blocks is then that over units.
    sums = np.add.reduceat(values, starts, axis=1) * (len(starts) / samples.n_units)
    return Samples("mean", samples.unit, {"values": sums})


def _chunk_sizes(n_resamples: int, n_units: int) -> list[int]:
    step = max(1, min(n_resamples, 4_000_000 // n_units))  # 32 MB of weights
    return [min(step, n_resamples - start) for start in range(0, n_resamples, step)]


def _resamples(rng: np.random.Generator, n: int, n_units: int) -> npt.NDArray[np.float64]:
    """How often each unit is drawn, [n, n_units], if n_units are drawn with replacement."""
    drawn = rng.integers(0, n_units, (n, n_units)) + n_units * np.arange(n)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n * n_units)
    return counts.reshape(n, n_units).astype(np.float64)


def _half_samples(rng: np.random.Generator, n: int, n_units: int) -> npt.NDArray[np.float64]:
    """Weights [n, n_units]: 1 for the units of a random half, otherwise 0."""
    half = np.arange(n_units) < n_units // 2
    return rng.permuted(np.tile(half, (n, 1)), axis=1).astype(np.float64)


def _t_quantile(freedom: npt.ArrayLike) -> Any:
    """The quantile of Student's t at the upper end of the interval, by degrees of freedom."""
    return stdtrit(np.minimum(freedom, _NORMAL_FROM), (1 + LEVEL) / 2)
