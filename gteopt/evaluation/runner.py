"""Score an encoder on a suite, and a variant against its baseline.

Hides: what is already scored and stored, and how a failing task is told apart from a failing run.
Refuses to know: how tasks find their data, how vectors become scores.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from gteopt.errors import (
    GteoptError,
    InputError,
    IntegrityError,
    NumericsError,
    UnsupportedError,
    join_problems,
)
from gteopt.evaluation.fidelity import Sample, Sampler, fidelity, read_sample, write_sample
from gteopt.evaluation.samples import Samples, read_samples, write_samples
from gteopt.evaluation.statistics import (
    Draws,
    difference_of,
    interval,
    mean_of,
    paired_draws,
    settle,
)
from gteopt.evaluation.suites import Suite
from gteopt.machine import machine, versions
from gteopt.quant.vectors import VectorTransform
from gteopt.recipe import DEFAULT_MARGIN, Frozen, Progress, quiet
from gteopt.records import (
    Conditions,
    EvalReport,
    FailedTask,
    Machine,
    TaskScore,
    read_record,
    write_record,
)

if TYPE_CHECKING:
    from gteopt.encoder import Encoder
    from gteopt.evaluation.adapter import TextCache
    from gteopt.evaluation.tasks import ResolvedTask

_SAMPLE_FILE = "texts.safetensors"


class SubsetScore(Frozen):
    """One encoder's main score on one split and subset of one task; fields as in `TaskScore`.

    Attributes:
        no_samples: why the entries that the score is made of are not kept; None where they are.
    """

    task: str
    task_type: str
    split: str
    subset: str
    metric: str
    score: float
    instruction: str | None
    dataset_revision: str
    n_samples: int
    no_samples: str | None = None


class StoredTask(Frozen):
    """A finished task on disk; `key` is everything that its scores depend on.

    What the scores are made of lies beside it, in `<task>.safetensors`.
    """

    schema_: Literal["gteopt.task/2"] = Field(alias="schema")
    key: dict[str, str | None]
    scores: tuple[SubsetScore, ...]


SampleKey = tuple[str, str, str]
"""Task, split, subset."""


@dataclass(frozen=True)
class FinishedTask:
    """One task's scores, and what they are made of by (split, subset)."""

    scores: tuple[SubsetScore, ...]
    samples: Mapping[tuple[str, str], Samples]


@dataclass(frozen=True)
class SuiteRun:
    """What one encoder did on a suite.

    Attributes:
        samples: what each score is made of: one entry a query, pair or document.
        failed: tasks that have no score, and why.
        sample: full-dimension vectors of the suite's texts, for fidelity.
        vectors: turns those into what the encoder stores.
    """

    encoder: str
    encoder_sha256: str
    suite: Suite
    scores: tuple[SubsetScore, ...]
    samples: Mapping[SampleKey, Samples]
    failed: tuple[FailedTask, ...]
    sample: Sample
    vectors: VectorTransform
    machine: Machine
    versions: Conditions

    @property
    def score(self) -> float:
        """Mean over tasks, splits and subsets averaged within a task first; NaN without any."""
        return _mean_over_tasks((each.task, each.score) for each in self.scores)


def run_suite(
    encoder: Encoder,
    suite: Suite,
    *,
    hub_dir: Path | None = None,
    store: Path | None = None,
    batch_size: int = 32,
    progress: Progress = quiet,
) -> SuiteRun:
    """Score an encoder on every task of a suite.

    A task that fails is recorded and the run goes on.

    Args:
        encoder: a base or a variant; what is scored are its vectors as stored.
        suite: tasks, from `load_suite`.
        hub_dir: data sets are read from `hub_dir/<org>/<name>` and the network is not touched.
        store: folder where each finished task is written at once; a task found there, of the same
            encoder, suite, instruction and data, is not scored again.
        batch_size: texts encoded together.
        progress: told the task and how many of its texts are encoded.

    Raises:
        InputError: data that cannot be found or read, all of it, before anything is encoded.
    """
    from gteopt.evaluation.isolation import isolated

    with isolated(offline=hub_dir is not None):
        return _run(encoder, suite, hub_dir, store, batch_size, progress)


def compare(
    baseline: SuiteRun,
    variant: SuiteRun,
    *,
    variant_name: str,
    margin: float = DEFAULT_MARGIN,
) -> EvalReport:
    """A variant's scores beside its baseline's, with intervals, verdicts and fidelity.

    Scores and retention are over the tasks that both finished. Verdicts are corrected for the
    claims of this report alone; `settle` does it for those of several.

    Args:
        baseline: its run of the same suite.
        variant: the run that is judged.
        variant_name: what the report calls it.
        margin: a difference of scores (0 to 1) that does not matter.

    Raises:
        InputError: runs of different suites, or too few texts in common.
        NumericsError: no task that both finished, or a baseline score that nothing can be a share
            of.
    """
    if baseline.suite.sha256() != variant.suite.sha256():
        raise InputError(
            f"{variant_name} was scored on suite {variant.suite.name}, its baseline on "
            f"{baseline.suite.name} with other tasks; score both on the same suite"
        )
    theirs = {(each.task, each.split, each.subset): each for each in baseline.scores}
    draws: dict[SampleKey, Draws] = {}
    tasks = []
    for each in variant.scores:
        key = each.task, each.split, each.subset
        if key not in theirs:
            continue
        drawn = _paired(baseline, variant, theirs[key], each)
        if isinstance(drawn, Draws):
            draws[key] = drawn
        tasks.append(_task_score(each, theirs[key], drawn, variant.samples.get(key)))
    failed = variant.failed + tuple(
        FailedTask(task=each.task, reason=f"the baseline failed: {each.reason}")
        for each in baseline.failed
        if each.task not in {mine.task for mine in variant.failed}
    )
    if not tasks:
        reasons = [f"{each.task}: {each.reason}" for each in failed]
        raise NumericsError(join_problems(f"{variant_name} has no score", reasons))
    score = _mean_over_tasks((each.task, each.score) for each in tasks)
    baseline_score = _mean_over_tasks((each.task, each.baseline_score) for each in tasks)
    if baseline_score <= 0:
        raise NumericsError(
            f"the baseline {baseline.encoder} scores {baseline_score:.4f} on suite "
            f"{baseline.suite.name}, so that no retention can be given; is it loaded rightly?"
        )
    difference, retention_low, retention_high = None, None, None
    if len(draws) == len(tasks):
        overall = mean_of([mean_of(own) for own in _by_task(draws.items()).values()])
        difference = difference_of(overall, score - baseline_score)
        retention_low, retention_high = interval(overall.retention)
    report = EvalReport(
        schema="gteopt.eval/1",
        variant=variant_name,
        artifact_sha256=variant.encoder_sha256,
        baseline=baseline.encoder,
        baseline_sha256=baseline.encoder_sha256,
        suite=variant.suite.name,
        suite_sha256=variant.suite.sha256(),
        tasks=tuple(tasks),
        failed=failed,
        partial=bool(failed),
        score=score,
        baseline_score=baseline_score,
        retention=score / baseline_score,
        difference=difference,
        retention_low=retention_low,
        retention_high=retention_high,
        margin=margin,
        fidelity=fidelity(baseline.sample, variant.sample, variant.vectors),
        machine=variant.machine,
        versions=variant.versions,
    )
    return settle({variant_name: report})[variant_name]


def _paired(
    baseline: SuiteRun, variant: SuiteRun, theirs: SubsetScore, ours: SubsetScore
) -> Draws | str:
    """Draws of one task's scores, or why there are none."""
    for who, score in (("the baseline", theirs), ("the variant", ours)):
        if score.no_samples is not None:
            return f"{who}: {score.no_samples}"
    key = ours.task, ours.split, ours.subset
    samples, others = variant.samples[key], baseline.samples[key]
    if not samples.pairs_with(others):
        return f"the two models were scored on other {samples.unit} sets"
    return paired_draws(samples, others, task=ours.task) or f"there is only one {samples.unit}"


def _task_score(
    ours: SubsetScore, theirs: SubsetScore, drawn: Draws | str, samples: Samples | None
) -> TaskScore:
    has_interval = isinstance(drawn, Draws) and samples is not None
    return TaskScore(
        **ours.model_dump(exclude={"no_samples"}),
        baseline_score=theirs.score,
        difference=difference_of(drawn, ours.score - theirs.score)
        if isinstance(drawn, Draws)
        else None,
        unit=samples.unit if samples and has_interval else None,
        n_units=samples.n_units if samples and has_interval else None,
        no_interval=drawn if isinstance(drawn, str) else None,
    )


def _run(
    encoder: Encoder,
    suite: Suite,
    hub_dir: Path | None,
    store: Path | None,
    batch_size: int,
    progress: Progress,
) -> SuiteRun:
    from gteopt.evaluation.adapter import TextCache
    from gteopt.evaluation.tasks import load_data, resolve

    tasks = resolve(suite, hub_dir)
    keys = {each.name: _key(encoder, suite, each) for each in tasks}
    folder = None if store is None else store / _folder_name(suite, keys)
    sampler = Sampler()
    done: dict[str, FinishedTask] = {}
    if folder is not None and (folder / _SAMPLE_FILE).is_file():
        sampler.merge(read_sample(folder / _SAMPLE_FILE))
        done = {
            name: stored for name, key in keys.items() if (stored := _stored(folder, name, key))
        }
    waiting = [each for each in tasks if each.name not in done]
    load_data(waiting)

    cache = TextCache(encoder, batch_size)
    failed = []
    for position, each in enumerate(waiting, start=len(done) + 1):
        what = f"{encoder.name}: {each.name} ({position} of {len(tasks)})"
        task_sampler = Sampler()
        try:
            finished = _score(cache, each, task_sampler, store, _renamed(progress, what))
        except GteoptError as error:
            failed.append(FailedTask(task=each.name, reason=str(error)))
            continue
        except Exception as error:
            # A task of mteb's may fail in any way, and the others are worth having.
            failed.append(FailedTask(task=each.name, reason=f"{type(error).__name__}: {error}"))
            continue
        finally:
            each.task.unload_data()
        done[each.name] = finished
        sampler.merge(task_sampler.sample())
        if folder is not None:
            # Vectors first: a task whose scores are on disk has its vectors there, too.
            write_sample(folder / _SAMPLE_FILE, sampler.sample())
            write_samples(folder / f"{each.name}.safetensors", finished.samples)
            record = StoredTask(schema="gteopt.task/2", key=keys[each.name], scores=finished.scores)
            write_record(folder / f"{each.name}.json", record)
    in_order = [done[each.name] for each in tasks if each.name in done]
    return SuiteRun(
        encoder=encoder.name,
        encoder_sha256=encoder.sha256,
        suite=suite,
        scores=tuple(score for finished in in_order for score in finished.scores),
        samples={
            (name, split, subset): samples
            for name, finished in done.items()
            for (split, subset), samples in finished.samples.items()
        },
        failed=tuple(failed),
        sample=sampler.sample(),
        vectors=encoder.vectors,
        machine=machine(),
        versions=_conditions(encoder),
    )


def _score(
    cache: TextCache,
    resolved: ResolvedTask,
    sampler: Sampler,
    store: Path | None,
    progress: Progress,
) -> FinishedTask:
    """Every split and subset of one task.

    Raises:
        NumericsError: vectors or a score that is not a number.
    """
    from gteopt.evaluation.adapter import TaskModel
    from gteopt.evaluation.predictions import collect, read_predictions, record_draws_
    from gteopt.evaluation.results import write_results
    from gteopt.evaluation.tasks import n_samples

    instruction = resolved.instruction if cache.encoder.takes_instructions else None
    model = TaskModel(cache, instruction, sampler, progress)
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
                    instruction=instruction,
                    dataset_revision=resolved.revision,
                    n_samples=n_samples(resolved.task, split, subset),
                    no_samples=None if isinstance(found, Samples) else found,
                )
            )
    if store is not None:
        write_results(store, model.mteb_model_meta, resolved, everything, monotonic() - started)
    return FinishedTask(tuple(scores), samples)


def _reproducing(found: Samples | UnsupportedError | None, score: float) -> Samples | str:
    """The entries if they make mteb's own score; else why they cannot be used.

    An interval around a number that is not the task's score would be worse than none.
    """
    from gteopt.evaluation.predictions import TOLERANCE

    if not isinstance(found, Samples):
        return str(found or "mteb names another subset")
    again = found.score()
    if abs(again - score) > TOLERANCE:
        return f"the entries give {again:.6f} where mteb gives {score:.6f}"
    return found


Item = TypeVar("Item")


def _by_task(items: Iterable[tuple[SampleKey, Item]]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for (task, _, _), item in items:
        found.setdefault(task, []).append(item)
    return found


def _mean_over_tasks(scores: Iterable[tuple[str, float]]) -> float:
    by_task: dict[str, list[float]] = {}
    for task, score in scores:
        by_task.setdefault(task, []).append(score)
    if not by_task:
        return math.nan
    return sum(sum(each) / len(each) for each in by_task.values()) / len(by_task)


def _renamed(progress: Progress, task: str) -> Progress:
    def renamed(what: str, done: int, total: int) -> None:
        progress(task, done, total)

    return renamed


def _conditions(encoder: Encoder) -> Conditions:
    import torch

    libraries = ("mteb", "datasets", "scikit-learn", "scipy")
    return {
        **versions(),
        **{name: version(name) for name in libraries},
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "device": str(encoder.device),
        "torch_threads": str(torch.get_num_threads()),
    }


def _key(encoder: Encoder, suite: Suite, task: ResolvedTask) -> dict[str, str | None]:
    # The same weights give other vectors in another dtype or on another kind of device.
    return {
        "encoder": encoder.sha256,
        "dtype": str(encoder.dtype),
        "device": encoder.device.type,
        "suite": suite.sha256(),
        "instruction": task.instruction if encoder.takes_instructions else None,
        "revision": task.revision,
        "mteb": version("mteb"),
    }


def _folder_name(suite: Suite, keys: Mapping[str, Mapping[str, str | None]]) -> str:
    """One folder for each state of everything that scores depend on, so that none mix."""
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()
    return f"{suite.name}-{digest[:16]}"


def _stored(folder: Path, name: str, key: dict[str, str | None]) -> FinishedTask | None:
    """A finished task; None where there is none, or it is of something else or damaged."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = read_record(path, StoredTask)
        samples = read_samples(folder / f"{name}.safetensors")
    except IntegrityError:
        return None  # of an older gteopt, or damaged: scored again
    return FinishedTask(record.scores, samples) if record.key == key else None
