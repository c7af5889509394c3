"""Compare a variant's run with its baseline's: differences with intervals, verdicts, fidelity.

Refuses to know: how runs are made, mteb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gteopt.config.policy import DEFAULT_MARGIN
from gteopt.errors import InputError, NumericsError, join_problems
from gteopt.evaluation.chance import Chance, chance_notes, scores_above_chance
from gteopt.evaluation.fidelity import score_fidelity
from gteopt.evaluation.item_scores_file import read_item_scores
from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.reference import add_published_scores, find_reference
from gteopt.evaluation.runner import SampleKey, SuiteRun, differing_conditions
from gteopt.evaluation.statistics import (
    MIN_UNITS,
    Draws,
    ResampledScores,
    correct_verdicts,
    difference_of,
    interval_of_draws,
    judge_claims,
    mean_draws,
    paired_draws,
    resample_scores,
)
from gteopt.evaluation.stopping import first_scored_part, widen_for_looks
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.task_choice import forecast_suite_mean
from gteopt.evaluation.task_store import SubsetScore, mean_over_tasks
from gteopt.records.evaluation import (
    Correction,
    EvalReport,
    FailedTask,
    ItemComparison,
    ScoreDifference,
    TaskScore,
    Verdict,
)

BaselineDraws = dict[SampleKey, ResampledScores]
"""The resampled scores of a baseline, which every comparison with the baseline needs."""


def compare_with_baseline(
    baseline: SuiteRun,
    variant: SuiteRun,
    *,
    variant_name: str,
    margin: float = DEFAULT_MARGIN,
    drawn: BaselineDraws | None = None,
) -> EvalReport:
    """Compare a variant's scores with its baseline's: intervals, verdicts and fidelity.

    Scores and retention are over the tasks that both models finished. Verdicts are corrected for
    the claims of this report alone; `correct_verdicts` corrects them for several reports together.

    Args:
        baseline: the baseline's run of the same suite.
        variant: the run that is judged.
        variant_name: name of the variant in the report.
        margin: a difference of scores (0 to 1) that does not matter.
        drawn: resampled scores from earlier comparisons with this baseline; new ones are added.

    Raises:
        InputError: the runs are of different suites, or have too few texts in common.
        NumericsError: the models finished no task in common.
    """
    if baseline.suite_sha256 != variant.suite_sha256:
        raise InputError(
            f"{variant_name} was scored on suite {variant.suite.name}, but its baseline on "
            f"{baseline.suite.name} with other tasks or data; score both on the same suite"
        )
    tasks, draws = compare_scores(baseline, variant, {} if drawn is None else drawn)
    failed = _failed(baseline, variant)
    if not tasks:
        reasons = [f"{task.task}: {task.reason}" for task in failed]
        raise NumericsError(join_problems(f"{variant_name} has no score", reasons))
    in_mean = scores_above_chance(_whole(tasks))
    score = mean_over_tasks((task.task, task.score) for task in in_mean)
    baseline_score = mean_over_tasks((task.task, task.baseline_score) for task in in_mean)
    has_retention = baseline_score > 0
    stopped = _stopped_names(tasks)
    sure = SuiteInterval() if stopped else suite_interval(in_mean, draws)
    report = EvalReport(
        schema="gteopt.eval/1",
        variant=variant_name,
        artifact_sha256=variant.encoder_sha256,
        baseline=baseline.encoder,
        baseline_sha256=baseline.encoder_sha256,
        suite=variant.suite.name,
        suite_sha256=variant.suite_sha256,
        tasks=tuple(tasks),
        failed=failed,
        partial=bool(failed or stopped),
        score=score,
        baseline_score=baseline_score,
        retention=score / baseline_score if has_retention else None,
        no_retention=None if has_retention else _no_retention(baseline.encoder, baseline_score),
        difference=sure.difference,
        retention_low=sure.retention_low if has_retention else None,
        retention_high=sure.retention_high if has_retention else None,
        n_interval_tasks=sure.n_tasks,
        margin=margin,
        protocol=variant.suite.protocol or "gteopt",
        dims=variant.vectors.dims,
        code=variant.vectors.code,
        bytes_per_vector=variant.vectors.bytes_per_vector,
        n_asked_texts=variant.encodings.n_asked,
        n_encoded_texts=variant.encodings.n_encoded,
        n_cut_texts=variant.encodings.n_cut,
        notes=_notes(baseline, variant, tasks, sure),
        fidelity=score_fidelity(baseline.fidelity_sample, variant.fidelity_sample, variant.vectors),
        machine=variant.machine,
        versions=variant.versions,
    )
    report = _with_forecast(report, variant.suite)
    if variant.encoder_sha256 == baseline.encoder_sha256:
        report = _with_reference(report, variant)
    return correct_verdicts({variant_name: report})[variant_name]


def _with_forecast(report: EvalReport, suite: Suite) -> EvalReport:
    """The report with a forecast of the whole suite's mean, if a part of a suite was scored."""
    stands = suite.stands_for
    if stands is None:
        return report
    by_task: dict[str, list[float]] = {}
    stopped = _stopped_names(report.tasks)
    for task in report.tasks:
        if task.task not in stopped:
            by_task.setdefault(task.task, []).append(task.score)
    whole = forecast_suite_mean(
        stands, {name: float(np.mean(scores)) for name, scores in by_task.items()}
    )
    if whole is None:
        missing = ", ".join(name for name in stands.weights if name not in by_task)
        note = f"there is no forecast for {stands.suite}, because {missing} has no whole score"
    else:
        note = (
            f"{whole.suite}: the mean over {whole.n_tasks} tasks is forecast as "
            f"{100 * whole.score:.1f} from {len(stands.weights)} of them; the forecast was at most "
            f"{100 * whole.error:.1f} points off for {whole.rate:.0%} of {whole.n_models} models "
            f"that were not used to choose the tasks"
        )
    return report.model_copy(update={"whole_suite": whole, "notes": (*report.notes, note)})


def _notes(
    baseline: SuiteRun, variant: SuiteRun, tasks: Sequence[TaskScore], sure: SuiteInterval
) -> tuple[str, ...]:
    """Everything unusual about the scores, as notes of the report."""
    of_tasks = (*chance_notes(tasks), *_stop_notes(tasks))
    return (*of_tasks, *variant.notes, *sure.notes, *_condition_notes(baseline, variant))


def _failed(baseline: SuiteRun, variant: SuiteRun) -> tuple[FailedTask, ...]:
    """Tasks that the variant or the baseline could not finish."""
    failed_names = {task.task for task in variant.failed}
    return variant.failed + tuple(
        FailedTask(task=task.task, reason=f"the baseline failed: {task.reason}")
        for task in baseline.failed
        if task.task not in failed_names
    )


def _no_retention(baseline: str, score: float) -> str:
    return (
        f"the baseline {baseline} scores {score:.4f}, so retention is undefined; check that the "
        f"model loaded correctly and that the suite fits it"
    )


def _with_reference(report: EvalReport, run: SuiteRun) -> EvalReport:
    """The report of a baseline with its published scores, if there are any."""
    reference = None if run.hub_id is None else find_reference(run.hub_id)
    if reference is None:
        return report
    report = add_published_scores(report, reference)
    notes = (*report.notes, *_average_notes(report, run.suite))
    return report.model_copy(update={"notes": notes})


class ScoredModel(Protocol):
    """The scores of one model that a comparison needs: a run, or a file of item scores."""

    @property
    def encoder(self) -> str:
        """Name of the model."""

    @property
    def encoder_sha256(self) -> str:
        """Identifies the model."""

    @property
    def suite_sha256(self) -> str:
        """Identifies tasks, data and protocol."""

    @property
    def scores(self) -> tuple[SubsetScore, ...]:
        """Main scores."""

    @property
    def item_scores(self) -> Mapping[SampleKey, Samples]:
        """The entries that each score is computed from."""


def compare_scores(
    baseline: ScoredModel, variant: ScoredModel, drawn: BaselineDraws
) -> tuple[list[TaskScore], dict[SampleKey, Draws]]:
    """Compare every task, split and subset that both models finished.

    Returns:
        The compared scores, and the draws of those that have an interval.
    """
    theirs = {(score.task, score.split, score.subset): score for score in baseline.scores}
    draws: dict[SampleKey, Draws] = {}
    tasks = []
    for score in variant.scores:
        key = score.task, score.split, score.subset
        if key not in theirs:
            continue
        paired = _paired(baseline, variant, theirs[key], score, drawn)
        if isinstance(paired, Draws):
            draws[key] = paired
        chance = drawn[key].chance if key in drawn else None
        samples = variant.item_scores.get(key)
        baseline_score = _baseline_score(baseline, theirs[key], score)
        tasks.append(_task_score(score, baseline_score, paired, samples, chance))
    return tasks, draws


def compare_item_scores(
    baseline: Path,
    variant: Path,
    *,
    margin: float = DEFAULT_MARGIN,
    correction: Correction = "family",
) -> ItemComparison:
    """Differences, intervals and verdicts from two files of item scores, without a model.

    Args:
        baseline: file of the baseline, from `evaluate --out`.
        variant: file of the variant, which may come from another machine.
        margin: a difference of scores (0 to 1) that does not matter.
        correction: the set of claims that the error rate holds for; see `correct_verdicts`.

    Raises:
        IntegrityError: a file that holds no item scores.
        InputError: files of different suites, data or protocols, or no task in common.

    Example:
        >>> compare_item_scores(Path("base/items/nano.parquet"), Path("mine/items/int8.parquet"))
    """
    theirs, ours = read_item_scores(baseline), read_item_scores(variant)
    if theirs.suite_sha256 != ours.suite_sha256:
        raise InputError(
            f"{variant} was scored on suite {ours.header.suite} ({ours.suite_sha256[:12]}), but "
            f"{baseline} on {theirs.header.suite} ({theirs.suite_sha256[:12]}): tasks, data or "
            f"protocol differ; score both on the same suite"
        )
    tasks, draws = compare_scores(theirs, ours, {})
    if not tasks:
        raise InputError(f"{variant} and {baseline} have no task in common; score both again")
    in_mean = scores_above_chance(_whole(tasks))
    sure = SuiteInterval() if _stopped_names(tasks) else suite_interval(in_mean, draws)
    same = ours.encoder_sha256 == theirs.encoder_sha256
    difference = sure.difference
    if difference is not None:
        suite_verdict: Verdict = "equivalent"  # a model is equivalent to itself
        if not same:
            suite_verdict = judge_claims({"suite": (difference, margin)}, correction)["suite"]
        difference = difference.model_copy(update={"verdict": suite_verdict})
    places = [(scored.header.machine, scored.header.versions) for scored in (theirs, ours)]
    differing = differing_conditions(places[0], places[1])
    notes = [f"the baseline was scored with {differing}"] if differing else []
    return ItemComparison(
        variant=ours.encoder,
        artifact_sha256=ours.encoder_sha256,
        baseline=theirs.encoder,
        baseline_sha256=theirs.encoder_sha256,
        suite=ours.header.suite,
        suite_sha256=ours.suite_sha256,
        protocol=ours.header.protocol,
        tasks=tuple(_judged(tasks, margin, correction, same_model=same)),
        score=mean_over_tasks((task.task, task.score) for task in in_mean),
        baseline_score=mean_over_tasks((task.task, task.baseline_score) for task in in_mean),
        difference=difference,
        retention_low=sure.retention_low,
        retention_high=sure.retention_high,
        n_interval_tasks=sure.n_tasks,
        margin=margin,
        correction=correction,
        notes=(*chance_notes(tasks), *_stop_notes(tasks), *sure.notes, *notes),
    )


def _judged(
    tasks: Sequence[TaskScore], margin: float, correction: Correction, *, same_model: bool
) -> list[TaskScore]:
    """The tasks with their verdicts; a model is equivalent to itself."""
    claims = {
        (task.task, task.split, task.subset): (task.difference, margin)
        for task in tasks
        if task.difference is not None
    }
    verdicts = {} if same_model else judge_claims(claims, correction)
    judged = []
    for task in tasks:
        difference = task.difference
        if difference is not None:
            task_verdict = verdicts.get((task.task, task.split, task.subset), "equivalent")
            difference = difference.model_copy(update={"verdict": task_verdict})
        judged.append(task.model_copy(update={"difference": difference}))
    return judged


@dataclass(frozen=True)
class SuiteInterval:
    """The interval of a suite's mean difference; fields as in `EvalReport`.

    Attributes:
        notes: name the tasks that are left out; empty if none is.
    """

    difference: ScoreDifference | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    n_tasks: int = 0
    notes: tuple[str, ...] = ()


def suite_interval(tasks: Sequence[TaskScore], draws: Mapping[SampleKey, Draws]) -> SuiteInterval:
    """The interval of a suite's mean, over the tasks that have draws for every split and subset.

    Args:
        tasks: scores that both models finished.
        draws: by task, split and subset. Tasks without draws are left out, and a note names them.
    """
    names = list(dict.fromkeys(task.task for task in tasks))
    without = {task.task for task in tasks if (task.task, task.split, task.subset) not in draws}
    known = [task for task in tasks if task.task not in without]
    if not known:
        return SuiteInterval()
    by_task: dict[str, list[Draws]] = {}
    for task in known:
        by_task.setdefault(task.task, []).append(draws[task.task, task.split, task.subset])
    overall = mean_draws([mean_draws(task_draws) for task_draws in by_task.values()])
    value = mean_over_tasks((task.task, task.score - task.baseline_score) for task in known)
    has_retention = mean_over_tasks((task.task, task.baseline_score) for task in known) > 0
    low, high = interval_of_draws(overall.retention) if has_retention else (None, None)
    notes: tuple[str, ...] = ()
    if without:
        left_out = ", ".join(name for name in names if name in without)
        notes = (
            f"the suite's interval and verdict are over {len(by_task)} of {len(names)} tasks; "
            f"tasks without an interval: {left_out}",
        )
    return SuiteInterval(difference_of(overall, value), low, high, len(by_task), notes)


def _stopped_names(tasks: Sequence[TaskScore]) -> list[str]:
    return list(dict.fromkeys(task.task for task in tasks if task.is_stopped))


def _whole(tasks: Sequence[TaskScore]) -> list[TaskScore]:
    """The tasks without a stopped part; all tasks if every task has one."""
    stopped = _stopped_names(tasks)
    return [task for task in tasks if task.task not in stopped] or list(tasks)


def _stop_notes(tasks: Sequence[TaskScore]) -> list[str]:
    """Notes on tasks that were stopped once their verdict was decided."""
    stopped = _stopped_names(tasks)
    if not stopped:
        return []
    notes = []
    for task in tasks:
        if task.sequential is not None and task.is_stopped:
            subset = "" if task.subset == "default" else f" {task.subset}"
            notes.append(
                f"{task.task}{subset}: decided and stopped after {task.sequential.n_scored:,} of "
                f"{task.sequential.n_all:,} items; both models' scores are over these items"
            )
    n_tasks = len({task.task for task in tasks})
    if len(stopped) < n_tasks:
        rest = f"the mean is over the {n_tasks - len(stopped)} of {n_tasks} tasks scored whole"
    else:
        rest = "every task was stopped, so the mean is over parts of tasks"
    return [
        *notes,
        f"{rest}; the suite has no interval and no verdict, because tasks were stopped",
    ]


def _average_notes(report: EvalReport, suite: Suite) -> list[str]:
    """Why the average on a model's card cannot be compared, if the suite has other tasks."""
    average, changes = report.published_average, suite.published
    if average is None or changes is None or not (changes.missing or changes.added):
        return []
    more = f", and it has {', '.join(changes.added)} in addition" if changes.added else ""
    return [
        f"the card's average for {average.benchmark} cannot be compared: it is over "
        f"{average.n_tasks} tasks, and the suite lacks {', '.join(changes.missing)}{more}"
    ]


def _condition_notes(baseline: SuiteRun, variant: SuiteRun) -> list[str]:
    """A note if the two models were scored in different environments."""
    of_model = {"backend", "arithmetic", "dtype"}  # these describe the model, not the environment
    places = [
        (run.machine, {name: v for name, v in run.versions.items() if name not in of_model})
        for run in (baseline, variant)
    ]
    differing = differing_conditions(places[0], places[1])
    return [f"the baseline was scored with {differing}"] if differing else []


def _paired(
    baseline: ScoredModel,
    variant: ScoredModel,
    theirs: SubsetScore,
    ours: SubsetScore,
    drawn: BaselineDraws,
) -> Draws | str:
    """Draws of one task's scores, or the reason why there are none."""
    for model, score in (("the baseline", theirs), ("the variant", ours)):
        if score.no_samples is not None:
            return f"{model}: {score.no_samples}"
    key = ours.task, ours.split, ours.subset
    samples, baseline_samples = variant.item_scores[key], _items(baseline, key, ours)
    if not samples.pairs_with(baseline_samples):
        return f"the two models were scored on different {samples.unit} sets"
    if samples.n_units < MIN_UNITS:
        return f"{samples.n_units} units ({samples.unit}); an interval needs at least {MIN_UNITS}"
    same = variant.encoder_sha256 == baseline.encoder_sha256
    if ours.is_stopped:
        draws = paired_draws(samples, baseline_samples, same_model=same)
    else:
        if key not in drawn:
            drawn[key] = resample_scores(baseline_samples)
        draws = paired_draws(samples, drawn[key], same_model=same)
    assert draws is not None
    return draws if ours.sequential is None else widen_for_looks(draws, ours.sequential)


def _items(baseline: ScoredModel, key: SampleKey, ours: SubsetScore) -> Samples:
    """The baseline's entries; if the variant was stopped, only the entries of its scored items."""
    samples = baseline.item_scores[key]
    if ours.sequential is None or ours.sequential.n_all != samples.n_units:
        return samples
    return first_scored_part(samples, ours.sequential.n_scored)


def _baseline_score(baseline: ScoredModel, theirs: SubsetScore, ours: SubsetScore) -> SubsetScore:
    """The baseline's score over the items that the variant was scored on."""
    key = ours.task, ours.split, ours.subset
    if not ours.is_stopped or key not in baseline.item_scores:
        return theirs
    return theirs.model_copy(update={"score": _items(baseline, key, ours).score()})


def _task_score(
    ours: SubsetScore,
    theirs: SubsetScore,
    draws: Draws | str,
    samples: Samples | None,
    chance: Chance | None,
) -> TaskScore:
    has_interval = isinstance(draws, Draws) and samples is not None
    # If either model was stopped, the comparison is over a part of the items.
    stopped = theirs if theirs.is_stopped and not ours.is_stopped else ours
    return TaskScore(
        **ours.model_dump(exclude={"no_samples", "sequential"}),
        sequential=stopped.sequential,
        baseline_score=theirs.score,
        difference=difference_of(draws, ours.score - theirs.score)
        if isinstance(draws, Draws)
        else None,
        unit=samples.unit if samples and has_interval else None,
        n_units=samples.n_units if samples and has_interval else None,
        chance=None if chance is None else chance.expected,
        above_chance=None if chance is None else chance.is_beaten,
        no_interval=draws if isinstance(draws, str) else None,
    )
