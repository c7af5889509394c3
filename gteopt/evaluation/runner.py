"""Score an encoder on a suite, and a variant against its baseline.

Hides: what is already scored and stored, and how a failing task is told apart from a failing run.
Refuses to know: how tasks find their data, how vectors become scores.

    STORE/vectors/<weights>/...          encoded texts (`cache`)
    STORE/tasks/<task>-<key>/<view>.*    scores of one task, and the entries that they are made of
    STORE/tasks/<task>-<key>/texts.*     its sample of vectors, for fidelity
    STORE/results/<model>/...            scores in mteb's layout (`results`)

`<key>` stands for everything that the task's scores depend on but the view: the weights, the
instruction, the data, mteb. What a suite holds besides the task is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
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
from gteopt.evaluation.cache import (
    DEFAULT_BYTES,
    CacheDtype,
    EncodeAhead,
    EncodeShards,
    Encodings,
    LocalEncoding,
    Shard,
    VectorCache,
    vector_identity,
)
from gteopt.evaluation.fidelity import (
    Sample,
    Sampler,
    fidelity,
    read_sample,
    sample_of,
    write_sample,
)
from gteopt.evaluation.instructions import on_documents
from gteopt.evaluation.reference import beside_published
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
from gteopt.evaluation.views import View, own_view
from gteopt.machine import machine, versions
from gteopt.quant.vectors import VectorTransform
from gteopt.recipe import DEFAULT_MARGIN, Frozen, Progress, quiet
from gteopt.records import (
    Conditions,
    EvalReport,
    FailedTask,
    Machine,
    TaskScore,
    find_reference,
    read_record,
    write_record,
)

if TYPE_CHECKING:
    from gteopt.encoder import Encoder
    from gteopt.evaluation.tasks import ResolvedTask

_SAMPLE_FILE = "texts.safetensors"
_LIBRARIES = ("mteb", "datasets", "scikit-learn", "scipy")


@dataclass(frozen=True)
class EncodeOptions:
    """How texts are encoded, and how their vectors are kept.

    Attributes:
        batch_size: texts computed together; halved where they do not fit the memory.
        cache_bytes: most that the cache of vectors takes.
        dtype: of the cached vectors.
        encode: encodes shards of texts; None does it here, one after the other.
        encoded_on: what reports call the place where that happens.
    """

    batch_size: int = 32
    cache_bytes: int = DEFAULT_BYTES
    dtype: CacheDtype = "float16"
    encode: EncodeShards | None = None
    encoded_on: str = "this process"


ENCODE_OPTIONS = EncodeOptions()


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

    What the scores are made of lies beside it, in a safetensors file of the same name.
    """

    schema_: Literal["gteopt.task/4"] = Field(alias="schema")
    key: dict[str, str | None]
    scores: tuple[SubsetScore, ...]
    encodings: Encodings


SampleKey = tuple[str, str, str]
"""Task, split, subset."""


@dataclass(frozen=True)
class FinishedTask:
    """One task's scores, what they are made of by (split, subset), and what they took."""

    scores: tuple[SubsetScore, ...]
    samples: Mapping[tuple[str, str], Samples]
    encodings: Encodings


@dataclass(frozen=True)
class SuiteRun:
    """What one encoder did on a suite.

    Attributes:
        samples: what each score is made of: one entry a query, pair or document.
        failed: tasks that have no score, and why.
        sample: full-dimension vectors of the suite's texts, for fidelity.
        vectors: turns those into what the encoder stores.
        encodings: that its tasks took, each in the run that scored it: a run that finds everything
            finished says the same as the one that did it.
        encodings_now: of these, in this very run.
        notes: anything out of the ordinary that happened to the encodings.
        hub_id: of a base that may be a published model; see `Checkpoint`.
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
    encodings: Encodings
    encodings_now: Encodings
    notes: tuple[str, ...] = ()
    hub_id: str | None = None

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
    options: EncodeOptions = ENCODE_OPTIONS,
    progress: Progress = quiet,
) -> SuiteRun:
    """Score an encoder's own vectors on every task of a suite; see `run_views`."""
    return run_views(
        encoder,
        suite,
        [own_view(encoder)],
        hub_dir=hub_dir,
        store=store,
        options=options,
        progress=progress,
    )[0]


def run_views(
    encoder: Encoder,
    suite: Suite,
    views: Sequence[View],
    *,
    hub_dir: Path | None = None,
    store: Path | None = None,
    options: EncodeOptions = ENCODE_OPTIONS,
    progress: Progress = quiet,
) -> list[SuiteRun]:
    """Score one encoder's texts, encoded once, on every task of a suite in several forms.

    A task that fails is recorded and the run goes on.

    Args:
        encoder: a base or a variant.
        suite: tasks, from `load_suite`.
        views: what of its vectors is scored.
        hub_dir: data sets are read from `hub_dir/<org>/<name>` and the network is not touched.
        store: folder where encoded texts are written shard by shard and finished tasks at once; a
            task found there, of the same weights, view, instruction and data, is not scored again.
            Without one, both lie in a temporary folder.
        options: how texts are encoded and kept.
        progress: told view and task, and how many of the task's texts are encoded.

    Returns:
        One run a view.

    Raises:
        InputError: data that cannot be found or read, all of it, before anything is encoded.
    """
    from gteopt.evaluation.isolation import isolated

    with ExitStack() as stack:
        stack.enter_context(isolated(offline=hub_dir is not None))
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gteopt-")))
        return _run(encoder, suite, views, hub_dir, store, options, progress)


@dataclass(frozen=True)
class TextsRun:
    """What one encoder made of a user's own texts.

    Attributes:
        sample: full-dimension vectors of all of them.
        notes: anything out of the ordinary that happened to the encodings.
    """

    sample: Sample
    encodings: Encodings
    notes: tuple[str, ...]
    machine: Machine
    versions: Conditions


def run_texts(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    store: Path | None = None,
    options: EncodeOptions = ENCODE_OPTIONS,
    progress: Progress = quiet,
) -> TextsRun:
    """Encode texts as documents without an instruction; see `run_views` for the arguments.

    An interrupted run goes on at the shard, and what a suite has encoded alike is not encoded
    again.
    """
    notes: list[str] = []

    def say(note: str) -> None:
        notes.append(note)
        progress(note, 1, 1)

    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gteopt-")))
        cache = _open_cache(encoder, store, options, say)
        sample = sample_of(texts, cache.embed(texts, "document", None, progress))
    return TextsRun(sample, cache.counts, tuple(notes), machine(), _conditions(encoder, options))


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
        dims=variant.vectors.dims,
        code=variant.vectors.code,
        bytes_per_vector=variant.vectors.bytes_per_vector,
        n_asked_texts=variant.encodings.n_asked,
        n_encoded_texts=variant.encodings.n_encoded,
        notes=variant.notes,
        fidelity=fidelity(baseline.sample, variant.sample, variant.vectors),
        machine=variant.machine,
        versions=variant.versions,
    )
    is_baseline = variant.encoder_sha256 == baseline.encoder_sha256
    if is_baseline and variant.hub_id is not None:
        reference = find_reference(variant.hub_id)
        if reference is not None:
            report = beside_published(report, variant.samples, reference)
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
    views: Sequence[View],
    hub_dir: Path | None,
    store: Path,
    options: EncodeOptions,
    progress: Progress,
) -> list[SuiteRun]:
    from gteopt.evaluation.tasks import load_data, resolve

    notes: list[str] = []

    def say(note: str) -> None:
        notes.append(note)
        progress(note, 1, 1)

    tasks = resolve(suite, hub_dir)
    places = {each.name: _Place.of(encoder, each, store, options.dtype) for each in tasks}
    sampler = Sampler()
    done: dict[tuple[str, str], FinishedTask] = {}
    for name, place in places.items():
        sample = place.sample()
        if sample is not None:
            sampler.merge(sample)
            found = {view.sha256: place.finished(view) for view in views}
            done |= {(sha256, name): each for sha256, each in found.items() if each is not None}
    waiting = [
        each for each in tasks if any((view.sha256, each.name) not in done for view in views)
    ]
    load_data(waiting)

    cache = _open_cache(encoder, store, options, say)
    failed: dict[str, list[FailedTask]] = {view.sha256: [] for view in views}
    now: dict[tuple[str, str], Encodings] = {}
    ahead = _Ahead(options.encode, cache, waiting)
    for position, each in enumerate(waiting, start=len(tasks) - len(waiting) + 1):
        ahead.look(position - (len(tasks) - len(waiting) + 1))
        try:
            # A task draws from generators that it owns; every view has to see the same draws.
            generators = deepcopy((each.task.rng_state, each.task.np_rng))
            task_sampler: Sampler | None = Sampler()
            for view in views:
                key = view.sha256, each.name
                if key in done:
                    continue
                each.task.rng_state, each.task.np_rng = deepcopy(generators)
                before = cache.counts
                what = f"{view.name}: {each.name} ({position} of {len(tasks)})"
                try:
                    scores, samples = _score(
                        cache, view, each, task_sampler, store, _renamed(progress, what)
                    )
                except GteoptError as error:
                    failed[view.sha256].append(FailedTask(task=each.name, reason=str(error)))
                    continue
                except Exception as error:
                    # A task of mteb's may fail in any way, and the others are worth having.
                    reason = f"{type(error).__name__}: {error}"
                    failed[view.sha256].append(FailedTask(task=each.name, reason=reason))
                    continue
                finally:
                    now[key] = cache.counts - before
                done[key] = FinishedTask(scores, samples, now[key])
                if task_sampler is not None:
                    # Vectors first: a task whose scores are on disk has its vectors there, too.
                    places[each.name].write_sample(task_sampler.sample())
                    sampler.merge(task_sampler.sample())
                    task_sampler = None
                places[each.name].write(view, done[key])
        finally:
            each.task.unload_data()
    sample = sampler.sample()
    conditions = _conditions(encoder, options)
    runs = []
    for view in views:
        own = {name: done[view.sha256, name] for name in places if (view.sha256, name) in done}
        own_now = {name: taken for (sha256, name), taken in now.items() if sha256 == view.sha256}
        took = own_now | {name: each.encodings for name, each in own.items()}
        runs.append(
            SuiteRun(
                encoder=view.name,
                encoder_sha256=view.sha256,
                suite=suite,
                scores=tuple(score for each in own.values() for score in each.scores),
                samples={
                    (name, split, subset): samples
                    for name, each in own.items()
                    for (split, subset), samples in each.samples.items()
                },
                failed=tuple(failed[view.sha256]),
                sample=sample,
                vectors=view.vectors,
                machine=machine(),
                versions=conditions,
                encodings=sum(took.values(), Encodings()),
                encodings_now=sum(own_now.values(), Encodings()),
                notes=tuple(notes),
                hub_id=encoder.checkpoint.hub_id,
            )
        )
    return runs


def _open_cache(
    encoder: Encoder, store: Path, options: EncodeOptions, say: Callable[[str], None]
) -> VectorCache:
    return VectorCache(
        encoder,
        store / "vectors",
        encode=options.encode or LocalEncoding(encoder, options.batch_size, say),
        limit_bytes=options.cache_bytes,
        dtype=options.dtype,
        say=say,
    )


class _Ahead:
    """Lets workers begin with the next task's texts while a task is scored; see `EncodeAhead`."""

    def __init__(
        self, encode: EncodeShards | None, cache: VectorCache, tasks: Sequence[ResolvedTask]
    ) -> None:
        self._encode = encode if isinstance(encode, EncodeAhead) else None
        self._cache = cache
        self._tasks = tasks
        self._planned: set[bytes] = set()  # by the last task that was looked at
        self._shards: list[list[Shard]] = []

    def look(self, position: int) -> None:
        """The task at `position` is about to be scored, the one before it was."""
        from gteopt.evaluation.lookahead import upcoming_shards

        if self._encode is None:
            return
        if position > 0:
            self._encode.forget(self._shards[position - 1])
            self._shards[position - 1] = []
        for each in self._tasks[len(self._shards) : position + 2]:
            takes = self._cache.encoder.takes_instructions
            instruction = each.instruction if takes else None
            planned = set(self._planned)
            shards = upcoming_shards(
                each,
                self._cache,
                instruction,
                planned,
                on_documents=_on_documents(self._cache.encoder, each),
            )
            self._planned = planned - self._planned
            self._shards.append(shards)
            self._encode.expect(shards)


@dataclass(frozen=True)
class _Place:
    """Where one task's results under one weight variant lie."""

    folder: Path
    name: str
    key: dict[str, str | None]

    @staticmethod
    def of(encoder: Encoder, task: ResolvedTask, store: Path, dtype: CacheDtype) -> _Place:
        """The folder is named by everything that scores depend on but the view, so none mix."""
        key = {
            **vector_identity(encoder, dtype),
            "task": task.name,
            "splits": " ".join(task.splits),
            "subsets": " ".join(task.subsets),
            "instruction": task.instruction if encoder.takes_instructions else None,
            "symmetric": str(_on_documents(encoder, task)),
            "revision": task.revision,
            "mteb": version("mteb"),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return _Place(store / "tasks" / f"{task.name}-{digest[:16]}", task.name, key)

    def sample(self) -> Sample | None:
        """The sample of vectors; None where there is none, or it is damaged."""
        path = self.folder / _SAMPLE_FILE
        try:
            return read_sample(path) if path.is_file() else None
        except IntegrityError:
            return None

    def finished(self, view: View) -> FinishedTask | None:
        """The task's scores; None where there are none, or of something else, or damaged."""
        path = self._file(view, "json")
        if not path.is_file():
            return None
        try:
            record = read_record(path, StoredTask)
            samples = read_samples(self._file(view, "safetensors"))
        except IntegrityError:
            return None  # of an older gteopt, or damaged: scored again
        if record.key != self._key(view):
            return None
        return FinishedTask(record.scores, samples, record.encodings)

    def write_sample(self, sample: Sample) -> None:
        """Keep the sample of vectors."""
        write_sample(self.folder / _SAMPLE_FILE, sample)

    def write(self, view: View, finished: FinishedTask) -> None:
        """Keep scores; the record comes last, so that what it stands for is there."""
        write_samples(self._file(view, "safetensors"), finished.samples)
        record = StoredTask(
            schema="gteopt.task/4",
            key=self._key(view),
            scores=finished.scores,
            encodings=finished.encodings,
        )
        write_record(self._file(view, "json"), record)

    def _key(self, view: View) -> dict[str, str | None]:
        return {**self.key, "view": view.vectors.sha256()}

    def _file(self, view: View, kind: str) -> Path:
        return self.folder / f"{view.vectors.sha256()[:16]}.{kind}"


def _score(
    cache: VectorCache,
    view: View,
    resolved: ResolvedTask,
    sampler: Sampler | None,
    store: Path,
    progress: Progress,
) -> tuple[tuple[SubsetScore, ...], Mapping[tuple[str, str], Samples]]:
    """Scores of every split and subset of one task, and what they are made of.

    Raises:
        NumericsError: vectors or a score that is not a number.
    """
    from gteopt.evaluation.adapter import TaskModel
    from gteopt.evaluation.predictions import collect, read_predictions, record_draws_
    from gteopt.evaluation.results import write_results
    from gteopt.evaluation.tasks import n_samples

    instruction = resolved.instruction if cache.encoder.takes_instructions else None
    model = TaskModel(
        cache,
        view,
        instruction,
        sampler,
        progress,
        on_documents=_on_documents(cache.encoder, resolved),
    )
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
    write_results(store, model.mteb_model_meta, resolved, everything, monotonic() - started)
    return tuple(scores), samples


def _on_documents(encoder: Encoder, task: ResolvedTask) -> bool:
    """Whether the documents of a search carry the instruction, too."""
    family = encoder.checkpoint.family
    known = on_documents(family.name if family else None, task.name)
    return encoder.takes_instructions and (known if task.symmetric is None else task.symmetric)


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


def _conditions(encoder: Encoder, options: EncodeOptions) -> Conditions:
    import torch

    return {
        **versions(),
        **{name: version(name) for name in _LIBRARIES},
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "device": str(encoder.device),
        "cached_vectors": options.dtype,
        "torch_threads": str(torch.get_num_threads()),
        "encoded_on": options.encoded_on,
    }
