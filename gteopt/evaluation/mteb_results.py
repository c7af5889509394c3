"""Scores in mteb's own result layout, so that its tools and leaderboard read them.

Hides: mteb's result classes, and which metrics of a search are right. Refuses to know: encoders,
intervals.

    STORE/results/<model>/<revision>/<task>.json, model_meta.json, run_settings.jsonl

`mteb.ResultCache(STORE)` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.abstasks import AbsTaskRetrieval
from mteb.cache import ResultCache
from mteb.results import TaskResult

from gteopt.evaluation.mteb_model import search_depth

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

    from gteopt.evaluation.tasks import ResolvedTask


_DEPTH = re.compile(r"_at_(\d+)$")


def write_results(
    store: Path,
    model: ModelMeta,
    resolved: ResolvedTask,
    scores: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> None:
    """Write the metrics of one task; splits and subsets that lie there already are kept.

    A search is as deep as the task's main score (see `TaskModel.search`). Metrics of greater depth,
    which mteb computes as if nothing were found below, are left out, and so are areas under
    abstention curves ("nauc"), which look at the scores of everything that was found.

    Args:
        store: mteb's cache folder.
        model: names the folder, with the encoder's hash and dtype as its revision.
        resolved: the task, and the revision of the data that was read.
        scores: by split and subset, as the task returned them.
        seconds: what scoring took.
    """
    cache = ResultCache(store)
    task = copy(resolved.task)
    # Local data have no commit; what was read is named by its hash.
    dataset = {**task.metadata.dataset, "revision": resolved.revision}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    depth = search_depth(task.metadata) if isinstance(task, AbsTaskRetrieval) else None
    right = {
        split: {subset: _as_deep_as(depth, metrics) for subset, metrics in by_subset.items()}
        for split, by_subset in scores.items()
    }
    fresh = TaskResult.from_task_results(task, right, seconds)
    try:
        old = cache.load_task_result(resolved.name, model)
    except ValueError:  # cut short when an earlier run was killed; mteb writes it in place
        old = None
    if old is not None and fresh.is_mergeable(old):
        fresh = old.merge(fresh)
    cache.save_to_cache(fresh, model)


def _as_deep_as(depth: int | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    if depth is None:
        return dict(metrics)
    at = {name: _DEPTH.search(name) for name in metrics if not name.startswith("nauc_")}
    return {
        name: metrics[name]
        for name, depth_of in at.items()
        if not depth_of or int(depth_of[1]) <= depth
    }
