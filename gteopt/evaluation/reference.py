"""A published model's own scores beside the published ones.

Hides: which published score a task's is to be held against. Refuses to know: where references lie,
mteb, encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gteopt.evaluation.per_item_scores import Floats, Samples
from gteopt.evaluation.statistics import interval, own_draws
from gteopt.paths import shipped_dir
from gteopt.records.evaluation import BesidePublished, EvalReport, Reference, TaskScore
from gteopt.records.files import read_record


def find_reference(model: str) -> Reference | None:
    """What is published of a model on the Hub; None where nothing ships.

    Raises:
        IntegrityError: the installation is damaged.
    """
    path = shipped_dir("eval/reference") / f"{model.partition('/')[2]}.json"
    if not path.is_file():
        return None
    found = read_record(path, Reference)
    return found if found.model == model else None


Key = tuple[str, str, str]


@dataclass(frozen=True)
class _Own:
    """One task: published score, ours over the same data, and its draws where there are any."""

    published: float
    score: float
    draws: Floats | None


def beside_published(
    report: EvalReport, samples: Mapping[Key, Samples], reference: Reference
) -> EvalReport:
    """The baseline's report with what was published for the same model.

    The means are over the same splits and subsets on both sides: those that have a published score.

    Args:
        report: of the baseline, judged against itself.
        samples: what its scores are made of, by task, split and subset.
        reference: what is published of the model.
    """
    published = {(each.task, each.split, each.subset): each for each in reference.scores}
    draws = {key: own_draws(each) for key, each in samples.items()}

    def found(task: TaskScore) -> BesidePublished | None:
        # A part of an aggregate (CQADupstackAndroidRetrieval) is published as a task of its own.
        known = published.get(_key(task)) or published.get((task.subset, task.split, "default"))
        if known is None:
            return None
        drawn = draws.get(_key(task))
        return _beside(known.score, task.score, drawn, 1, known.revision)

    tasks = tuple(each.model_copy(update={"published": found(each)}) for each in report.tasks)
    wholes = []
    for name in dict.fromkeys(each.task for each in tasks):
        own = [each for each in tasks if each.task == name]
        known = [each for each in own if each.published is not None]
        aggregate = published.get((name, own[0].split, "default"))
        if aggregate is not None and len(known) < len(own):
            target = aggregate.score
        elif known:
            own = known
            target = float(np.mean([each.published.score for each in known if each.published]))
        else:
            continue
        drawn = [draws.get(_key(each)) for each in own]
        wholes.append(_Own(target, float(np.mean([each.score for each in own])), _mean(drawn)))
    of_suite = None
    if wholes:
        of_suite = _beside(
            float(np.mean([each.published for each in wholes])),
            float(np.mean([each.score for each in wholes])),
            _mean([each.draws for each in wholes]),
            len(wholes),
            reference.source,
        )
    averages = {each.suite: each for each in reference.averages}
    return report.model_copy(
        update={
            "tasks": tasks,
            "published": of_suite,
            "published_average": averages.get(report.suite),
        }
    )


def _key(task: TaskScore) -> Key:
    return task.task, task.split, task.subset


def _mean(draws: Sequence[Floats | None]) -> Floats | None:
    known = [each for each in draws if each is not None]
    return np.mean(known, axis=0) if len(known) == len(draws) else None


def _beside(
    published: float, score: float, draws: Floats | None, n_tasks: int, source: str
) -> BesidePublished:
    low, high = (None, None) if draws is None else interval(draws)
    return BesidePublished(
        score=published,
        baseline_score=score,
        low=low,
        high=high,
        differs=None if low is None or high is None else not low <= published <= high,
        n_tasks=n_tasks,
        source=source,
    )
