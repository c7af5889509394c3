"""One task scored by mteb, with the entries that its scores are made of.

Refuses to know: which tasks wait, stores, what a score is compared with.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from gteopt.errors import NumericsError, UnsupportedError
from gteopt.evaluation.mteb_model import TaskModel
from gteopt.evaluation.mteb_results import write_results
from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.predictions import TOLERANCE, collect, read_predictions, record_draws_
from gteopt.evaluation.task_store import SubsetScore
from gteopt.evaluation.tasks import ResolvedTask, n_samples


def score_task(
    model: TaskModel, resolved: ResolvedTask, store: Path
) -> tuple[tuple[SubsetScore, ...], Mapping[tuple[str, str], Samples]]:
    """Scores of every split and subset of one task, and what they are made of.

    Raises:
        NumericsError: vectors or a score that is not a number.
    """
    metadata = resolved.task.metadata
    scores = []
    samples: dict[tuple[str, str], Samples] = {}
    everything: dict[str, Mapping[str, Any]] = {}
    started = monotonic()
    for split in resolved.splits:
        draws = record_draws_(resolved.task)
        with tempfile.TemporaryDirectory(prefix="gteopt-") as folder:
            by_subset = resolved.task.evaluate(
                model, split, encode_kwargs={"batch_size": 32}, prediction_folder=Path(folder)
            )
            predictions = read_predictions(resolved.task, Path(folder))
        everything[split] = by_subset
        entries = dict(collect(resolved.task, split, predictions, draws))
        for subset, metrics in by_subset.items():
            score = float(metrics["main_score"])
            if not math.isfinite(score):
                raise NumericsError(
                    f"{metadata.main_score} of {split}/{subset} is {score}; the vectors of all its "
                    f"texts may be the same"
                )
            found = _reproducing(entries.get(subset), score)
            if isinstance(found, Samples):
                samples[split, subset] = found
            scores.append(
                SubsetScore(
                    task=resolved.aggregate or resolved.name,
                    task_type=metadata.type,
                    split=split,
                    subset=subset if resolved.aggregate is None else resolved.name,
                    metric=metadata.main_score,
                    score=score,
                    instruction=model.instruction.text,
                    dataset_revision=resolved.revision,
                    n_samples=n_samples(resolved.task, split, subset),
                    no_samples=None if isinstance(found, Samples) else found,
                )
            )
    write_results(store, model.mteb_model_meta, resolved, everything, monotonic() - started)
    return tuple(scores), samples


def _reproducing(found: Samples | UnsupportedError | None, score: float) -> Samples | str:
    """The entries if they make mteb's own score; else why they cannot be used.

    An interval around a number that is not the task's score would be worse than none.
    """
    if not isinstance(found, Samples):
        return str(found or "mteb names another subset")
    again = found.score()
    if abs(again - score) > TOLERANCE:
        return f"the entries give {again:.6f} where mteb gives {score:.6f}"
    return found
