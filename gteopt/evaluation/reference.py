"""Compare the scores of a published model with its published scores.

Hides: which published score belongs to a task, and which conditions differ. Refuses to know: mteb,
encoders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gteopt.paths import shipped_dir
from gteopt.records.evaluation import (
    EvalReport,
    PublishedComparison,
    Reference,
    ReferenceScore,
    TaskScore,
)
from gteopt.records.files import read_record

_COMMIT = re.compile(r"[0-9a-f]{40}")


def find_reference(model: str) -> Reference | None:
    """The published scores of a model on the Hub; None if gteopt ships none for it.

    Raises:
        IntegrityError: the installation is damaged.
    """
    path = shipped_dir("eval/reference") / f"{model.partition('/')[2]}.json"
    if not path.is_file():
        return None
    reference = read_record(path, Reference)
    return reference if reference.model == model else None


@dataclass(frozen=True)
class _Whole:
    """A task's published score, and the score here over the same data."""

    published: float
    score: float
    parts: tuple[PublishedComparison, ...]


def add_published_scores(report: EvalReport, reference: Reference) -> EvalReport:
    """The baseline's report with the published scores of the same model.

    Both means are over the same splits and subsets: those with a published score of the same data.
    A published score of another data revision is shown and marked, but left out of the means.

    Args:
        report: report of the baseline, judged against itself.
        reference: published scores of the model.
    """
    published = {(score.task, score.split, score.subset): score for score in reference.scores}

    def beside(task: TaskScore) -> PublishedComparison | None:
        # A part of an aggregate (CQADupstackAndroidRetrieval) is published as a separate task.
        known = published.get((task.task, task.split, task.subset)) or published.get(
            (task.subset, task.split, "default")
        )
        return None if known is None else _beside(known, task, report, reference)

    tasks = tuple(task.model_copy(update={"published": beside(task)}) for task in report.tasks)
    wholes = []
    for name in dict.fromkeys(task.task for task in tasks):
        scores = [task for task in tasks if task.task == name]
        aggregate = published.get((name, scores[0].split, "default"))
        whole = _whole(scores, aggregate, report, reference)
        wholes += [] if whole is None else [whole]
    of_suite = None
    if wholes:
        conditions = [
            condition
            for whole in wholes
            for part in whole.parts
            for condition in part.other_conditions
        ]
        of_suite = PublishedComparison(
            score=float(np.mean([whole.published for whole in wholes])),
            baseline_score=float(np.mean([whole.score for whole in wholes])),
            other_conditions=tuple(dict.fromkeys(conditions)),
            n_tasks=len(wholes),
            source=reference.source,
        )
    averages = {average.suite: average for average in reference.averages}
    return report.model_copy(
        update={
            "tasks": tasks,
            "published": of_suite,
            "published_average": averages.get(report.suite.removesuffix("-2024")),
        }
    )


def _whole(
    scores: Sequence[TaskScore],
    aggregate: ReferenceScore | None,
    report: EvalReport,
    reference: Reference,
) -> _Whole | None:
    """A task's mean over the comparable splits and subsets; None if none is comparable."""
    parts = [(task, task.published) for task in scores if task.published is not None]
    if aggregate is not None and len(parts) < len(scores):
        beside = _beside(aggregate, scores[0], report, reference, of_parts=True)
        return _Whole(aggregate.score, float(np.mean([task.score for task in scores])), (beside,))
    comparable = [(task, beside) for task, beside in parts if beside.same_data is not False]
    if not comparable:
        return None
    return _Whole(
        float(np.mean([beside.score for _, beside in comparable])),
        float(np.mean([task.score for task, _ in comparable])),
        tuple(beside for _, beside in comparable),
    )


def _beside(
    known: ReferenceScore,
    task: TaskScore,
    report: EvalReport,
    reference: Reference,
    *,
    of_parts: bool = False,
) -> PublishedComparison:
    """A published score with the score measured here and the conditions that differ.

    Args:
        known: the published score.
        task: the score measured here.
        report: has the protocol and the precision of the score measured here.
        reference: has the protocol and the precision of the model's authors.
        of_parts: the published score is of an aggregate, which has no data revision.
    """
    theirs = known.protocol
    conditions = []
    if theirs != report.protocol:
        conditions.append(f"protocol {theirs}, here {report.protocol}")
    precision = reference.authors_precision if theirs == reference.authors_protocol else None
    ours = report.versions.get("dtype")
    if precision is None:
        conditions.append("precision not published")
    elif ours is not None and precision != ours:
        conditions.append(f"precision {precision}, here {ours}")
    same_data: bool | None = None
    if not of_parts and known.dataset_revision is not None:
        is_known = _COMMIT.fullmatch(task.dataset_revision) is not None
        same_data = known.dataset_revision == task.dataset_revision if is_known else None
    if same_data is False:
        conditions.append("other data")
    elif same_data is None:
        conditions.append("data revision not known")
    return PublishedComparison(
        score=known.score,
        baseline_score=task.score,
        other_conditions=tuple(conditions),
        same_data=same_data,
        source=known.revision,
    )
