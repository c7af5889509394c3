"""`gteopt evaluate --dry-run`: estimate the time and disk space of an evaluation.

It imports neither torch nor mteb, so that it answers in seconds. Hides: where the speed of this
machine comes from. Refuses to know: how anything is encoded or scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from gteopt.errors import InputError, IntegrityError
from gteopt.evaluation.data_check import missing_data
from gteopt.evaluation.suites import Suite, SuiteTask
from gteopt.evaluation.task_choice import choose_suite_part
from gteopt.evaluation.task_facts import TaskAmount, read_task_facts, task_amount
from gteopt.model.checkpoint import Checkpoint, open_checkpoint
from gteopt.records.bench import BenchReport
from gteopt.records.evaluation import EvaluationEstimate, TaskEstimate
from gteopt.records.files import read_record, write_record

PROBE_S = 0.5
_CACHED_BYTES = 2  # bytes of a float16 number in the cache
_SHARE_OF_PEAK = 0.4  # speed of a small encoder over the speed of a large float32 product


def estimate_evaluation(
    sources: Mapping[str, str],
    suite: Suite,
    folder: Path | None = None,
    *,
    hub_dir: Path | None = None,
    price_per_hour: float | None = None,
    cache_bytes: int | None = None,
) -> EvaluationEstimate:
    """Estimate the time and disk space to score models on a suite on this machine.

    The speed comes from `bench.json` in the results folder. Without it, the speed is a rough guess
    from a float32 product of half a second and the baseline's number of weights. The time of
    search, k-means and regressions is not included.

    Args:
        sources: models by name, the baseline first.
        suite: the suite; tasks without known sizes (own data) count as unknown.
        folder: results folder that may hold a bench.json.
        hub_dir: folder of data sets.
        price_per_hour: price of this machine, in dollars.
        cache_bytes: limit for cached vectors; None keeps all of them.

    Raises:
        InputError: a source cannot be opened.
    """
    names = list(sources)
    checkpoint = open_checkpoint(sources[names[0]], hub_dir=hub_dir)
    amounts = {
        task.task: task_amount(task, _longest(task, suite, checkpoint)) for task in suite.tasks
    }
    total = sum((amount for amount in amounts.values() if amount is not None), TaskAmount())
    rate, rate_source = _rate(names, checkpoint, folder)
    seconds = None if rate is None else len(names) * total.n_tokens / rate
    missing = {task: _amount_of(suite, task) for task, _, _ in missing_data(suite, hub_dir)}
    download = sum(amount.n_characters for amount in missing.values() if amount is not None)
    needed = total.n_texts * checkpoint.dims * _CACHED_BYTES
    return EvaluationEstimate(
        suite=suite.name,
        models=tuple(names),
        tasks=tuple(
            TaskEstimate(task=name)
            if amount is None
            else TaskEstimate(task=name, n_texts=amount.n_texts, n_tokens=amount.n_tokens)
            for name, amount in amounts.items()
        ),
        n_texts=total.n_texts,
        n_tokens=total.n_tokens,
        tokens_per_s=rate,
        rate_source=rate_source,
        seconds=seconds,
        vector_bytes=needed if cache_bytes is None else min(needed, cache_bytes),
        missing=tuple(missing),
        download_bytes=download,
        price_per_hour=price_per_hour,
        dollars=None
        if price_per_hour is None or seconds is None
        else price_per_hour * seconds / 3600,
    )


def limit_evaluation_time(
    sources: Mapping[str, str],
    suite: Suite,
    budget_s: float,
    folder: Path | None = None,
    *,
    hub_dir: Path | None = None,
    n_models: int | None = None,
) -> Suite:
    """The part of a suite whose texts these models can encode within a time.

    The choice is kept in `FOLDER/part.json`. The same suite and budget then get the same tasks, so
    that all scores in a folder can be compared.

    Args:
        sources: models by name, the baseline first.
        suite: a suite with published scores; see `choose_suite_part`.
        budget_s: seconds for all models together.
        folder: results folder that may hold a bench.json and an earlier choice.
        hub_dir: folder of data sets; tasks whose data is missing there are not chosen.
        n_models: number of models that encode; None is all of `sources`, plus the base if the first
            is an artifact.

    Raises:
        InputError: the speed is not known; or see `choose_suite_part`.
    """
    kept = None if folder is None else folder / "part.json"
    if kept is not None and kept.is_file():
        part = read_record(kept, Suite)
        stands_for = part.stands_for
        tasks = {task.task: task for task in suite.tasks}
        settings = "protocol", "max_tokens", "normalize"
        is_same = all(getattr(part, name) == getattr(suite, name) for name in settings)
        is_same = is_same and all(tasks.get(task.task) == task for task in part.tasks)
        wanted = suite.name, budget_s
        if is_same and stands_for and (stands_for.suite, stands_for.budget_s) == wanted:
            return part
    names = list(sources)
    checkpoint = open_checkpoint(sources[names[0]], hub_dir=hub_dir)
    rate, why = _rate(names, checkpoint, folder)
    if rate is None:
        raise InputError(f"--budget needs the speed of this machine, which is {why}")
    missing = {task for task, _, _ in missing_data(suite, hub_dir)} if hub_dir is not None else ()
    if n_models is None:
        n_models = len(names) + (checkpoint.manifest is not None)
    seconds = {}
    for task in suite.tasks:
        amount = task_amount(task, _longest(task, suite, checkpoint))
        if amount is not None and not {task.task, *_parts_of(task)} & set(missing):
            seconds[task.task] = n_models * amount.n_tokens / rate
    part = choose_suite_part(suite, seconds, budget_s)
    if kept is not None and part.stands_for is not None:
        write_record(kept, part)
    return part


def _parts_of(task: SuiteTask) -> tuple[str, ...]:
    facts = read_task_facts().get(task.task)
    return () if facts is None else facts.parts


def _longest(task: SuiteTask, suite: Suite, checkpoint: Checkpoint) -> int:
    longest = task.max_tokens or suite.max_tokens or checkpoint.max_tokens
    return min(longest, checkpoint.max_tokens)


def _amount_of(suite: Suite, name: str) -> TaskAmount | None:
    """The amount of a suite's task, or of a part of a task."""
    entries = [task for task in suite.tasks if task.task == name]
    return task_amount(entries[0] if entries else SuiteTask(task=name))


def _rate(
    names: list[str], checkpoint: Checkpoint, folder: Path | None
) -> tuple[float | None, str]:
    """Tokens per second of one model on this machine, and the source of this figure."""
    path = None if folder is None else folder / "bench.json"
    if path is not None and path.is_file():
        with suppress(IntegrityError):
            bench = read_record(path, BenchReport)
            rates = [bench.variants[name].tokens_per_s for name in names if name in bench.variants]
            if rates:  # models encode one after the other, so their times add up
                return len(rates) / sum(1 / rate for rate in rates), f"{path}"
    if Path("/dev/nvidia0").exists():
        return None, "unknown; first run gteopt bench on this GPU with the same --out"
    operations = 2 * _n_weights(checkpoint)
    rate = _SHARE_OF_PEAK * probe_operations_per_s() / operations
    return (
        rate,
        f"a float32 product of {PROBE_S:g} s on this processor; gteopt bench is more accurate",
    )


def _n_weights(checkpoint: Checkpoint) -> int:
    """Weights that each token is multiplied with: all matrices except the token embeddings."""
    shapes = checkpoint.tensors
    if checkpoint.manifest is not None:
        # Packed weights have other shapes, so the products follow from the config.
        config = checkpoint.config
        hidden = int(config["hidden_size"])
        wide = int(config.get("intermediate_size", 4 * hidden))
        return int(config["num_hidden_layers"]) * (4 * hidden**2 + 3 * hidden * wide)
    return max(
        1,
        sum(
            math.prod(shape)
            for name, shape in shapes.items()
            if len(shape) == 2 and "embed" not in name
        ),
    )


def probe_operations_per_s() -> float:
    """Operations per second of the fastest float32 product within half a second."""
    x, w = np.ones((256, 1024), np.float32), np.ones((1024, 1024), np.float32)
    operations = 2 * x.shape[0] * w.size
    best, deadline = math.inf, time.perf_counter() + PROBE_S
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        x @ w
        best = min(best, time.perf_counter() - started)
    return operations / best
