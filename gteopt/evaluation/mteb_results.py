"""Write scores in mteb's result layout, which mteb's tools and leaderboard read.

Hides: mteb's result classes, and which metrics of a search are valid. Refuses to know: encoders,
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


def write_mteb_results(
    store: Path,
    model: ModelMeta,
    resolved: ResolvedTask,
    scores: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> None:
    """Write the metrics of one task; other splits and subsets in the file are kept.

    A search returns only as many results as the task's main score needs; see `TaskModel.search`.
    Metrics that need more results are left out, because mteb computes them as if there were none.
    Areas under abstention curves ("nauc") are left out too, because they use all results.

    Args:
        store: mteb's cache folder.
        model: its name is the folder, and the encoder's hash and dtype are its revision.
        resolved: the task, with the revision of its data.
        scores: metrics by split and subset, as the task returned them.
        seconds: how long the scoring took.
    """
    cache = ResultCache(store)
    task = copy(resolved.task)
    # Local data have no commit, so their hash is the revision.
    dataset = {**task.metadata.dataset, "revision": resolved.revision}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    depth = search_depth(task.metadata) if isinstance(task, AbsTaskRetrieval) else None
    valid = {
        split: {subset: _as_deep_as(depth, metrics) for subset, metrics in by_subset.items()}
        for split, by_subset in scores.items()
    }
    fresh = TaskResult.from_task_results(task, valid, seconds)
    try:
        old = cache.load_task_result(resolved.name, model)
    except ValueError:  # an earlier run was killed while mteb wrote the file in place
        old = None
    if old is not None and fresh.is_mergeable(old):
        fresh = old.merge(fresh)
    cache.save_to_cache(fresh, model)


def _as_deep_as(depth: int | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    if depth is None:
        return dict(metrics)
    depths = {name: _DEPTH.search(name) for name in metrics if not name.startswith("nauc_")}
    return {
        name: metrics[name]
        for name, metric_depth in depths.items()
        if not metric_depth or int(metric_depth[1]) <= depth
    }
