"""Score one task with mteb, and collect the entries that its scores are computed from.

Refuses to know: other tasks, how scores are stored, the baseline's scores.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from gteopt.errors import NumericsError, UnsupportedError
from gteopt.evaluation.mteb_model import TaskModel
from gteopt.evaluation.mteb_results import write_mteb_results
from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.predictions import (
    TOLERANCE,
    read_predictions,
    record_draws_,
    samples_from_predictions,
)
from gteopt.evaluation.stopping import StopRule, first_scored_rows
from gteopt.evaluation.task_parts import restrict_task
from gteopt.evaluation.task_store import SubsetScore
from gteopt.evaluation.tasks import ResolvedTask, n_samples


def score_task(
    model: TaskModel, resolved: ResolvedTask, store: Path, stop: StopRule | None = None
) -> tuple[tuple[SubsetScore, ...], Mapping[tuple[str, str], Samples]]:
    """Scores of every split and subset of one task, and the entries that they are computed from.

    Args:
        model: the encoder within this task.
        resolved: the task, with its data.
        store: folder for mteb's result files; stopped scores are not written there.
        stop: ends a split and subset as soon as its verdict is certain; None never ends one early.

    Raises:
        NumericsError: vectors or a score are NaN or infinite.
    """
    scores: list[SubsetScore] = []
    samples: dict[tuple[str, str], Samples] = {}
    everything: dict[str, dict[str, Any]] = {}
    started = monotonic()
    for split in resolved.splits:
        whole = list(resolved.subsets)
        for subset in resolved.subsets if stop is not None else ():
            part = _stopped(model, resolved, split, subset, stop)
            if part is not None:
                whole.remove(subset)
                scores.append(part[0])
                samples[split, subset] = part[1]
        if not whole:
            continue
        for subset, score, entries, metrics in _evaluated(model, resolved, split, whole):
            everything.setdefault(split, {})[subset] = metrics
            if entries is not None:
                samples[split, subset] = entries
            if stop is not None:
                at_end = stop.at_end((score.task, split, score.subset))
                score = score.model_copy(update={"sequential": at_end})
            scores.append(score)
    if everything:
        write_mteb_results(
            store, model.mteb_model_meta, resolved, everything, monotonic() - started
        )
    return tuple(scores), samples


def _stopped(
    model: TaskModel, resolved: ResolvedTask, split: str, subset: str, stop: StopRule | None
) -> tuple[SubsetScore, Samples] | None:
    """Score and entries of the first items that are enough; None if all have to be scored."""
    name, score_subset = resolved.aggregate or resolved.name, subset
    if resolved.aggregate is not None:
        score_subset = resolved.name
    key = name, split, score_subset
    for look in stop.looks(key) if stop is not None else ():
        assert stop is not None
        with restrict_task(
            resolved.task, split, subset, first_scored_rows(look.n_all, look.n_scored)
        ):
            ((_, score, entries, _),) = _evaluated(model, resolved, split, [subset])
        if entries is None or entries.n_units != look.n_scored:
            return None  # the entries are not the items, so all of the task is scored
        if stop.is_decided(key, entries, look):
            return score.model_copy(update={"sequential": look}), entries
    return None


def _evaluated(
    model: TaskModel, resolved: ResolvedTask, split: str, subsets: Sequence[str]
) -> Iterator[tuple[str, SubsetScore, Samples | None, Mapping[str, Any]]]:
    """For each subset: its score, the entries if they give the same score, and mteb's metrics."""
    metadata = resolved.task.metadata
    draws = record_draws_(resolved.task)
    with tempfile.TemporaryDirectory(prefix="gteopt-") as folder:
        by_subset = resolved.task.evaluate(
            model,
            split,
            None if len(subsets) == len(resolved.subsets) else list(subsets),
            encode_kwargs={"batch_size": 32},
            prediction_folder=Path(folder),
        )
        predictions = read_predictions(resolved.task, Path(folder))
    entries = dict(samples_from_predictions(resolved.task, split, predictions, draws))
    for subset, metrics in by_subset.items():
        score = float(metrics["main_score"])
        if not math.isfinite(score):
            raise NumericsError(
                f"{metadata.main_score} of {split}/{subset} is {score}; perhaps all texts have "
                f"the same vector"
            )
        entries_or_reason = _reproducing(entries.get(subset), score)
        record = SubsetScore(
            task=resolved.aggregate or resolved.name,
            task_type=metadata.type,
            split=split,
            subset=subset if resolved.aggregate is None else resolved.name,
            metric=metadata.main_score,
            score=score,
            instruction=model.instruction.text,
            dataset_revision=resolved.revision,
            n_samples=n_samples(resolved.task, split, subset),
            no_samples=None if isinstance(entries_or_reason, Samples) else entries_or_reason,
        )
        yield (
            subset,
            record,
            entries_or_reason if isinstance(entries_or_reason, Samples) else None,
            metrics,
        )


def _reproducing(entries: Samples | UnsupportedError | None, score: float) -> Samples | str:
    """The entries if they give mteb's score; otherwise the reason why they cannot be used.

    An interval around a number that is not the task's score would mislead.
    """
    if not isinstance(entries, Samples):
        return str(entries or "mteb's predictions have no such subset")
    recomputed = entries.score()
    if abs(recomputed - score) > TOLERANCE:
        return f"the entries give the score {recomputed:.6f}, but mteb gives {score:.6f}"
    return entries
