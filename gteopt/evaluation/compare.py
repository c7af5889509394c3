"""A variant's run beside its baseline's: differences with intervals, verdicts, fidelity.

Refuses to know: how runs come about, mteb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gteopt.config.policy import DEFAULT_MARGIN
from gteopt.errors import InputError, NumericsError, join_problems
from gteopt.evaluation.chance import Chance, chance_notes, counted
from gteopt.evaluation.fidelity import fidelity
from gteopt.evaluation.item_scores_file import read_item_scores
from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.reference import beside_published, find_reference
from gteopt.evaluation.runner import SampleKey, SuiteRun, differing_conditions
from gteopt.evaluation.statistics import (
    MIN_UNITS,
    Draws,
    Resampled,
    difference_of,
    interval,
    judge,
    mean_of,
    paired_draws,
    resample,
    settle,
)
from gteopt.evaluation.stopping import part_of, widened
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.task_choice import foretold
from gteopt.evaluation.task_store import SubsetScore, mean_over_tasks
from gteopt.records.evaluation import (
    Correction,
    Difference,
    EvalReport,
    FailedTask,
    ItemComparison,
    TaskScore,
    Verdict,
)

BaselineDraws = dict[SampleKey, Resampled]
"""What was drawn of a baseline, which every comparison with it needs."""


def compare(
    baseline: SuiteRun,
    variant: SuiteRun,
    *,
    variant_name: str,
    margin: float = DEFAULT_MARGIN,
    drawn: BaselineDraws | None = None,
) -> EvalReport:
    """A variant's scores beside its baseline's, with intervals, verdicts and fidelity.

    Scores and retention are over the tasks that both finished. Verdicts are corrected for the
    claims of this report alone; `settle` does it for those of several.

    Args:
        baseline: its run of the same suite.
        variant: the run that is judged.
        variant_name: what the report calls it.
        margin: a difference of scores (0 to 1) that does not matter.
        drawn: what earlier comparisons with the same run drew of it; more is put in.

    Raises:
        InputError: runs of different suites, or too few texts in common.
        NumericsError: no task that both finished.
    """
    if baseline.suite_sha256 != variant.suite_sha256:
        raise InputError(
            f"{variant_name} was scored on suite {variant.suite.name}, its baseline on "
            f"{baseline.suite.name} with other tasks or data; score both on the same suite"
        )
    tasks, draws = compare_scores(baseline, variant, {} if drawn is None else drawn)
    failed = _failed(baseline, variant)
    if not tasks:
        reasons = [f"{task.task}: {task.reason}" for task in failed]
        raise NumericsError(join_problems(f"{variant_name} has no score", reasons))
    in_mean = counted(_whole(tasks))
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
        fidelity=fidelity(baseline.fidelity_sample, variant.fidelity_sample, variant.vectors),
        machine=variant.machine,
        versions=variant.versions,
    )
    report = _with_forecast(report, variant.suite)
    if variant.encoder_sha256 == baseline.encoder_sha256:
        report = _with_reference(report, variant)
    return settle({variant_name: report})[variant_name]


def _with_forecast(report: EvalReport, suite: Suite) -> EvalReport:
    """The report of a part of a suite with what it says of the whole."""
    stands = suite.stands_for
    if stands is None:
        return report
    by_task: dict[str, list[float]] = {}
    stopped = _stopped_names(report.tasks)
    for task in report.tasks:
        if task.task not in stopped:
            by_task.setdefault(task.task, []).append(task.score)
    whole = foretold(stands, {name: float(np.mean(own)) for name, own in by_task.items()})
    if whole is None:
        missing = ", ".join(name for name in stands.weights if name not in by_task)
        note = f"nothing is said of the whole {stands.suite}, as {missing} has no whole score"
    else:
        note = (
            f"{whole.suite}: mean over {whole.n_tasks} tasks foretold as {100 * whole.score:.1f} "
            f"from {len(stands.weights)} of them, at most {100 * whole.error:.1f} points off for "
            f"{whole.rate:.0%} of {whole.n_models} models that had no say in the choice"
        )
    return report.model_copy(update={"whole_suite": whole, "notes": (*report.notes, note)})


def _notes(
    baseline: SuiteRun, variant: SuiteRun, tasks: Sequence[TaskScore], sure: SuiteInterval
) -> tuple[str, ...]:
    """What of the scores is out of the ordinary."""
    of_tasks = (*chance_notes(tasks), *_about_stops(tasks))
    return (*of_tasks, *variant.notes, *sure.notes, *_elsewhere(baseline, variant))


def _failed(baseline: SuiteRun, variant: SuiteRun) -> tuple[FailedTask, ...]:
    """Tasks that either of the two could not finish."""
    own = {task.task for task in variant.failed}
    return variant.failed + tuple(
        FailedTask(task=task.task, reason=f"the baseline failed: {task.reason}")
        for task in baseline.failed
        if task.task not in own
    )


def _no_retention(baseline: str, score: float) -> str:
    return (
        f"the baseline {baseline} scores {score:.4f}, so retention is undefined; check that the "
        f"model loaded correctly and that the suite fits it"
    )


def _with_reference(report: EvalReport, run: SuiteRun) -> EvalReport:
    """The report of a baseline with what was published for it, where something was."""
    reference = None if run.hub_id is None else find_reference(run.hub_id)
    if reference is None:
        return report
    report = beside_published(report, reference)
    notes = (*report.notes, *_about_average(report, run.suite))
    return report.model_copy(update={"notes": notes})


class Scored(Protocol):
    """What a comparison needs of one model: a run, or a file of item scores."""

    @property
    def encoder(self) -> str:
        """Its name."""

    @property
    def encoder_sha256(self) -> str:
        """Identifies it."""

    @property
    def suite_sha256(self) -> str:
        """Identifies tasks, data and protocol."""

    @property
    def scores(self) -> tuple[SubsetScore, ...]:
        """Main scores."""

    @property
    def item_scores(self) -> Mapping[SampleKey, Samples]:
        """What each score is made of."""


def compare_scores(
    baseline: Scored, variant: Scored, drawn: BaselineDraws
) -> tuple[list[TaskScore], dict[SampleKey, Draws]]:
    """Every task, split and subset that both finished, and the draws of those with an interval."""
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
        own = drawn[key].chance if key in drawn else None
        samples = variant.item_scores.get(key)
        tasks.append(
            _task_score(score, _of_items(baseline, theirs[key], score), paired, samples, own)
        )
    return tasks, draws


def compare_item_scores(
    baseline: Path,
    variant: Path,
    *,
    margin: float = DEFAULT_MARGIN,
    correction: Correction = "family",
) -> ItemComparison:
    """Differences, intervals and verdicts from two files of item scores, without a model.

    Example: `compare_item_scores(Path("base/items/nano.parquet"), Path("mine/items/int8.parquet"))`

    Args:
        baseline: file of the baseline, from `evaluate --out`.
        variant: file of the variant, which may come from another machine.
        margin: a difference of scores (0 to 1) that does not matter.
        correction: what the error rate of verdicts holds for; see `settle`.

    Raises:
        IntegrityError: a file that holds no item scores.
        InputError: files of different suites, data or protocols, or no task in common.
    """
    theirs, ours = read_item_scores(baseline), read_item_scores(variant)
    if theirs.suite_sha256 != ours.suite_sha256:
        raise InputError(
            f"{variant} was scored on suite {ours.header.suite} ({ours.suite_sha256[:12]}), "
            f"{baseline} on {theirs.header.suite} ({theirs.suite_sha256[:12]}): other tasks, data "
            f"or protocol; score both on the same suite"
        )
    tasks, draws = compare_scores(theirs, ours, {})
    if not tasks:
        raise InputError(f"{variant} and {baseline} have no task in common; score both again")
    in_mean = counted(_whole(tasks))
    sure = SuiteInterval() if _stopped_names(tasks) else suite_interval(in_mean, draws)
    same = ours.encoder_sha256 == theirs.encoder_sha256
    difference = sure.difference
    if difference is not None:
        of_suite: Verdict = "equivalent"  # as a model is to itself
        if not same:
            of_suite = judge({"suite": (difference, margin)}, correction)["suite"]
        difference = difference.model_copy(update={"verdict": of_suite})
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
        notes=(*chance_notes(tasks), *_about_stops(tasks), *sure.notes, *notes),
    )


def _judged(
    tasks: Sequence[TaskScore], margin: float, correction: Correction, *, same_model: bool
) -> list[TaskScore]:
    """The tasks with their verdicts; a model beside itself is equivalent."""
    claims = {
        (task.task, task.split, task.subset): (task.difference, margin)
        for task in tasks
        if task.difference is not None
    }
    verdicts = {} if same_model else judge(claims, correction)
    judged = []
    for task in tasks:
        difference = task.difference
        if difference is not None:
            of_task = verdicts.get((task.task, task.split, task.subset), "equivalent")
            difference = difference.model_copy(update={"verdict": of_task})
        judged.append(task.model_copy(update={"difference": difference}))
    return judged


@dataclass(frozen=True)
class SuiteInterval:
    """How sure the difference of a suite's means is; fields as in `EvalReport`.

    Attributes:
        notes: which tasks are left out, where some are.
    """

    difference: Difference | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    n_tasks: int = 0
    notes: tuple[str, ...] = ()


def suite_interval(tasks: Sequence[TaskScore], draws: Mapping[SampleKey, Draws]) -> SuiteInterval:
    """The interval of a suite's mean, over the tasks whose every split and subset has draws.

    Args:
        tasks: that both models finished.
        draws: by task, split and subset; tasks without stay out, and a note says so.
    """
    names = list(dict.fromkeys(task.task for task in tasks))
    without = {task.task for task in tasks if (task.task, task.split, task.subset) not in draws}
    known = [task for task in tasks if task.task not in without]
    if not known:
        return SuiteInterval()
    by_task: dict[str, list[Draws]] = {}
    for task in known:
        by_task.setdefault(task.task, []).append(draws[task.task, task.split, task.subset])
    overall = mean_of([mean_of(own) for own in by_task.values()])
    value = mean_over_tasks((task.task, task.score - task.baseline_score) for task in known)
    has_retention = mean_over_tasks((task.task, task.baseline_score) for task in known) > 0
    low, high = interval(overall.retention) if has_retention else (None, None)
    notes: tuple[str, ...] = ()
    if without:
        left_out = ", ".join(name for name in names if name in without)
        notes = (
            f"the suite's interval and verdict are over {len(by_task)} of {len(names)} tasks; "
            f"{left_out} has no interval",
        )
    return SuiteInterval(difference_of(overall, value), low, high, len(by_task), notes)


def _stopped_names(tasks: Sequence[TaskScore]) -> list[str]:
    return list(dict.fromkeys(task.task for task in tasks if task.is_stopped))


def _whole(tasks: Sequence[TaskScore]) -> list[TaskScore]:
    """The tasks that a mean may be over: none of which any part was stopped, or all if none is."""
    stopped = _stopped_names(tasks)
    return [task for task in tasks if task.task not in stopped] or list(tasks)


def _about_stops(tasks: Sequence[TaskScore]) -> list[str]:
    """What of the tasks was scored, where some were stopped once decided."""
    stopped = _stopped_names(tasks)
    if not stopped:
        return []
    notes = []
    for task in tasks:
        if task.sequential is not None and task.is_stopped:
            subset = "" if task.subset == "default" else f" {task.subset}"
            notes.append(
                f"{task.task}{subset}: decided and stopped after {task.sequential.n_scored:,} of "
                f"{task.sequential.n_all:,}; both scores are over these"
            )
    n_tasks = len({task.task for task in tasks})
    if len(stopped) < n_tasks:
        rest = f"the mean is over the {n_tasks - len(stopped)} of {n_tasks} tasks scored whole"
    else:
        rest = "every task was stopped, so the mean is over parts of tasks"
    return [*notes, f"{rest}; the suite has no interval and no verdict, as tasks were stopped"]


def _about_average(report: EvalReport, suite: Suite) -> list[str]:
    """Why the average on a model's card cannot be compared, where the suite has other tasks."""
    average, changes = report.published_average, suite.published
    if average is None or changes is None or not (changes.missing or changes.added):
        return []
    more = f", and has {', '.join(changes.added)} in addition" if changes.added else ""
    return [
        f"the card's average for {average.benchmark} cannot be compared: it is over "
        f"{average.n_tasks} tasks, of which the suite lacks {', '.join(changes.missing)}{more}"
    ]


def _elsewhere(baseline: SuiteRun, variant: SuiteRun) -> list[str]:
    """A sentence where the two were not scored in the same environment."""
    own = {"backend", "arithmetic", "dtype"}  # of a model, not of where it ran
    places = [
        (run.machine, {name: each for name, each in run.versions.items() if name not in own})
        for run in (baseline, variant)
    ]
    differing = differing_conditions(places[0], places[1])
    return [f"the baseline was scored with {differing}"] if differing else []


def _paired(
    baseline: Scored, variant: Scored, theirs: SubsetScore, ours: SubsetScore, draws_: BaselineDraws
) -> Draws | str:
    """Draws of one task's scores, or why there are none."""
    for who, score in (("the baseline", theirs), ("the variant", ours)):
        if score.no_samples is not None:
            return f"{who}: {score.no_samples}"
    key = ours.task, ours.split, ours.subset
    samples, others = variant.item_scores[key], _items(baseline, key, ours)
    if not samples.pairs_with(others):
        return f"the two models were scored on other {samples.unit} sets"
    if samples.n_units < MIN_UNITS:
        return f"{samples.n_units} of unit {samples.unit}; an interval needs {MIN_UNITS}"
    same = variant.encoder_sha256 == baseline.encoder_sha256
    if ours.is_stopped:
        draws = paired_draws(samples, others, same_model=same)
    else:
        if key not in draws_:
            draws_[key] = resample(others)
        draws = paired_draws(samples, draws_[key], same_model=same)
    assert draws is not None
    return draws if ours.sequential is None else widened(draws, ours.sequential)


def _items(baseline: Scored, key: SampleKey, ours: SubsetScore) -> Samples:
    """Entries of the baseline: of the same items as the variant's, where these were stopped."""
    samples = baseline.item_scores[key]
    if ours.sequential is None or ours.sequential.n_all != samples.n_units:
        return samples
    return part_of(samples, ours.sequential.n_scored)


def _of_items(baseline: Scored, theirs: SubsetScore, ours: SubsetScore) -> SubsetScore:
    """The baseline's score over the items that the variant was scored on."""
    key = ours.task, ours.split, ours.subset
    if not ours.is_stopped or key not in baseline.item_scores:
        return theirs
    return theirs.model_copy(update={"score": _items(baseline, key, ours).score()})


def _task_score(
    ours: SubsetScore,
    theirs: SubsetScore,
    drawn: Draws | str,
    samples: Samples | None,
    chance: Chance | None,
) -> TaskScore:
    has_interval = isinstance(drawn, Draws) and samples is not None
    # Where either is of some of the items alone, the score of the two is no whole one.
    stopped = theirs if theirs.is_stopped and not ours.is_stopped else ours
    return TaskScore(
        **ours.model_dump(exclude={"no_samples", "sequential"}),
        sequential=stopped.sequential,
        baseline_score=theirs.score,
        difference=difference_of(drawn, ours.score - theirs.score)
        if isinstance(drawn, Draws)
        else None,
        unit=samples.unit if samples and has_interval else None,
        n_units=samples.n_units if samples and has_interval else None,
        chance=None if chance is None else chance.expected,
        above_chance=None if chance is None else chance.is_beaten,
        no_interval=drawn if isinstance(drawn, str) else None,
    )
