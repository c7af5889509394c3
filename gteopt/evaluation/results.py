"""Scores in mteb's own result layout, so that its tools and leaderboard read them.

Hides: mteb's result classes. Refuses to know: encoders, intervals.

    STORE/results/<model>/<revision>/<task>.json, model_meta.json, run_settings.jsonl

`mteb.ResultCache(STORE)` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.cache import ResultCache
from mteb.results import TaskResult

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

    from gteopt.evaluation.tasks import ResolvedTask


def write_results(
    store: Path,
    model: ModelMeta,
    resolved: ResolvedTask,
    scores: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> None:
    """Write every metric of one task; splits and subsets that lie there already are kept.

    Args:
        store: mteb's cache folder.
        model: names the folder, with the encoder's hash as its revision.
        resolved: the task, and the revision of the data that was read.
        scores: by split and subset, as the task returned them.
        seconds: what scoring took.
    """
    cache = ResultCache(store)
    task = copy(resolved.task)
    # Local data have no commit; what was read is named by its hash.
    dataset = {**task.metadata.dataset, "revision": resolved.revision}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    fresh = TaskResult.from_task_results(task, scores, seconds)
    try:
        old = cache.load_task_result(resolved.name, model)
    except ValueError:  # cut short when an earlier run was killed; mteb writes it in place
        old = None
    if old is not None and fresh.is_mergeable(old):
        fresh = old.merge(fresh)
    cache.save_to_cache(fresh, model)
