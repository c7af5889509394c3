"""A published model's own scores beside the published ones.

Hides: which published score a task's is to be held against, and which conditions differ. Refuses to
know: where references lie, mteb, encoders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gteopt.paths import shipped_dir
from gteopt.records.evaluation import (
    BesidePublished,
    EvalReport,
    Reference,
    ReferenceScore,
    TaskScore,
)
from gteopt.records.files import read_record

_COMMIT = re.compile(r"[0-9a-f]{40}")


def find_reference(model: str) -> Reference | None:
    """What is published of a model on the Hub; None where nothing ships.

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
    """One task: the published score, and ours over the same data."""

    published: float
    score: float
    parts: tuple[BesidePublished, ...]


def beside_published(report: EvalReport, reference: Reference) -> EvalReport:
    """The baseline's report with what was published for the same model.

    The means are over the same splits and subsets on both sides: those that have a published score
    of the same data. A score of another data revision is shown, marked, and left out of the means.

    Args:
        report: of the baseline, judged against itself.
        reference: what is published of the model.
    """
    published = {(each.task, each.split, each.subset): each for each in reference.scores}

    def beside(task: TaskScore) -> BesidePublished | None:
        # A part of an aggregate (CQADupstackAndroidRetrieval) is published as a task of its own.
        known = published.get((task.task, task.split, task.subset)) or published.get(
            (task.subset, task.split, "default")
        )
        return None if known is None else _beside(known, task, report, reference)

    tasks = tuple(task.model_copy(update={"published": beside(task)}) for task in report.tasks)
    wholes = []
    for name in dict.fromkeys(task.task for task in tasks):
        own = [task for task in tasks if task.task == name]
        aggregate = published.get((name, own[0].split, "default"))
        whole = _whole(own, aggregate, report, reference)
        wholes += [] if whole is None else [whole]
    of_suite = None
    if wholes:
        conditions = [
            each for whole in wholes for part in whole.parts for each in part.other_conditions
        ]
        of_suite = BesidePublished(
            score=float(np.mean([whole.published for whole in wholes])),
            baseline_score=float(np.mean([whole.score for whole in wholes])),
            other_conditions=tuple(dict.fromkeys(conditions)),
            n_tasks=len(wholes),
            source=reference.source,
        )
    averages = {each.suite: each for each in reference.averages}
    return report.model_copy(
        update={
            "tasks": tasks,
            "published": of_suite,
            "published_average": averages.get(report.suite.removesuffix("-2024")),
        }
    )


def _whole(
    own: Sequence[TaskScore],
    aggregate: ReferenceScore | None,
    report: EvalReport,
    reference: Reference,
) -> _Whole | None:
    """A task's mean over the splits and subsets that are comparable; None where none is."""
    parts = [(task, task.published) for task in own if task.published is not None]
    if aggregate is not None and len(parts) < len(own):
        beside = _beside(aggregate, own[0], report, reference, of_parts=True)
        return _Whole(aggregate.score, float(np.mean([task.score for task in own])), (beside,))
    alike = [(task, each) for task, each in parts if each.same_data is not False]
    if not alike:
        return None
    return _Whole(
        float(np.mean([each.score for _, each in alike])),
        float(np.mean([task.score for task, _ in alike])),
        tuple(each for _, each in alike),
    )


def _beside(
    known: ReferenceScore,
    task: TaskScore,
    report: EvalReport,
    reference: Reference,
    *,
    of_parts: bool = False,
) -> BesidePublished:
    """A published score beside ours, with the conditions that are not the same.

    Args:
        known: what is published.
        task: ours.
        report: with the protocol and the precision of ours.
        reference: with those of the model's authors.
        of_parts: the published score is an aggregate's, whose own revision means nothing.
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
    return BesidePublished(
        score=known.score,
        baseline_score=task.score,
        other_conditions=tuple(conditions),
        same_data=same_data,
        source=known.revision,
    )
