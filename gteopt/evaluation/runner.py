"""Score an encoder on a suite, or encode a user's own texts.

Hides: what is done already, and how a failing task is told apart from a failing run. Refuses to
know: how tasks find their data, how vectors become scores, what a score is compared with.

    STORE/vectors/<weights>/...    encoded texts (`cache`)
    STORE/tasks/<task>-<key>/...   scores of one task and what they are made of (`finished`)
    STORE/results/<model>/...      scores in mteb's layout (`results`)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from gteopt.corpus.shards import EncodeAhead, EncodeShards, Encodings, Shard
from gteopt.corpus.vector_cache import DEFAULT_BYTES, CacheDtype, VectorCache
from gteopt.errors import GteoptError
from gteopt.evaluation.corpus_search import Searches
from gteopt.evaluation.fidelity import Sample, Sampler, sample_of
from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.task_store import (
    FinishedTask,
    SubsetScore,
    TaskFolder,
    instruction_of,
    mean_over_tasks,
)
from gteopt.evaluation.task_vectors import TaskVectors
from gteopt.evaluation.views import View, own_view
from gteopt.machine import machine, versions
from gteopt.progress import Progress, quiet
from gteopt.records.environment import Conditions, Machine
from gteopt.records.evaluation import FailedTask
from gteopt.vectors.transform import VectorTransform

if TYPE_CHECKING:
    from gteopt.encoder.description import Description
    from gteopt.evaluation.stopping import StopRule
    from gteopt.evaluation.tasks import ResolvedTask


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
        start_next: starts the next run on the same workers, so that none waits for the end of this
            one; called once, when all texts of the last task are being encoded.
    """

    batch_size: int = 32
    cache_bytes: int = DEFAULT_BYTES
    dtype: CacheDtype = "float16"
    encode: EncodeShards | None = None
    encoded_on: str = "this process"
    start_next: Callable[[], None] | None = None


ENCODE_OPTIONS = EncodeOptions()

SampleKey = tuple[str, str, str]
"""Task, split, subset."""


@dataclass(frozen=True)
class SuiteRun:
    """What one encoder did on a suite.

    Attributes:
        suite_sha256: see `Suite.sha256`, of the own data that were read.
        item_scores: what each score is made of: one entry a query, pair or document.
        failed: tasks that have no score, and why.
        fidelity_sample: full-dimension vectors of the suite's texts.
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
    suite_sha256: str
    scores: tuple[SubsetScore, ...]
    item_scores: Mapping[SampleKey, Samples]
    failed: tuple[FailedTask, ...]
    fidelity_sample: Sample
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
        return mean_over_tasks((each.task, each.score) for each in self.scores)


class RunOptions(TypedDict, total=False):
    """Where a run reads and writes.

    Attributes:
        hub_dir: data sets are read from `hub_dir/<org>/<name>` and the network is not touched.
        store: folder where encoded texts are written shard by shard and finished tasks at once; a
            task found there, of the same weights, view, instruction and data, is not scored again.
            Without one, both lie in a temporary folder.
        options: how texts are encoded and kept.
        progress: told view and task, and how many of the task's texts are encoded.
        stop: ends a task once its verdict is certain; None scores all of every task.
    """

    hub_dir: Path | None
    store: Path | None
    options: EncodeOptions
    progress: Progress
    stop: StopRule | None


def run_suite(encoder: Description, suite: Suite, **where: Unpack[RunOptions]) -> SuiteRun:
    """Score an encoder's own vectors on every task of a suite; see `run_views`."""
    return run_views(encoder, suite, [own_view(encoder)], **where)[0]


def run_views(
    encoder: Description,
    suite: Suite,
    views: Sequence[View],
    **where: Unpack[RunOptions],
) -> list[SuiteRun]:
    """Score one encoder's texts, encoded once, on every task of a suite in several forms.

    A task that fails is recorded and the run goes on.

    Args:
        encoder: a base or a variant.
        suite: tasks, from `load_suite`.
        views: what of its vectors is scored.
        where: see `RunOptions`.

    Returns:
        One run a view.

    Raises:
        InputError: data that cannot be found or read, all of it, before anything is encoded.
    """
    from gteopt.evaluation.mteb_isolation import isolated
    from gteopt.evaluation.tasks import load_data, resolve

    hub_dir, store = where.get("hub_dir"), where.get("store")
    options, progress = where.get("options", ENCODE_OPTIONS), where.get("progress", quiet)
    with ExitStack() as stack:
        stack.enter_context(isolated(offline=hub_dir is not None))
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gteopt-")))
        tasks = resolve(suite, hub_dir)
        scoring = _Scoring(encoder, suite, views, store, options, progress)
        scoring.stop = where.get("stop")
        waiting = scoring.read_finished(tasks)
        load_data(waiting)
        scoring.score(waiting, len(tasks))
        suite_sha256 = suite.sha256({task.name: task.revision for task in tasks})
        return [scoring.run_of(view, suite_sha256) for view in views]


def begin_views(
    encoder: Description,
    suite: Suite,
    *,
    hub_dir: Path | None,
    store: Path | None,
    options: EncodeOptions,
) -> None:
    """Let workers start on the first task that has no scores yet, before `run_views` is called with
    the same arguments.
    """
    from gteopt.evaluation.mteb_isolation import isolated
    from gteopt.evaluation.tasks import load_data, resolve

    with ExitStack() as stack:
        stack.enter_context(isolated(offline=hub_dir is not None))
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gteopt-")))
        for task in resolve(suite, hub_dir):
            if TaskFolder.of(encoder, task, store, options.dtype).sample() is None:
                load_data([task])
                vectors = TaskVectors(encoder, store, options, lambda note: None)
                _TaskLookahead(options, vectors.usual(), [task], [vectors.of(task)]).look(0)
                task.task.unload_data()
                return


@dataclass(frozen=True)
class TextsRun:
    """What one encoder made of a user's own texts.

    Attributes:
        fidelity_sample: full-dimension vectors of all of them.
        notes: anything out of the ordinary that happened to the encodings.
    """

    fidelity_sample: Sample
    encodings: Encodings
    notes: tuple[str, ...]
    machine: Machine
    versions: Conditions


def run_texts(
    encoder: Description,
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
        cache = TaskVectors(encoder, store, options, say).usual()
        sample = sample_of(texts, cache.embed(texts, "document", None, progress))
    return TextsRun(sample, cache.counts, tuple(notes), machine(), _conditions(encoder, options))


class _Scoring:
    """One run: the tasks that wait, what is done, and what it took."""

    def __init__(
        self,
        encoder: Description,
        suite: Suite,
        views: Sequence[View],
        store: Path,
        options: EncodeOptions,
        progress: Progress,
    ) -> None:
        self.stop: StopRule | None = None
        self.encoder = encoder
        self.suite = suite
        self.views = views
        self.store = store
        self.options = options
        self.progress = progress
        self.notes: list[str] = []
        self.vectors = TaskVectors(encoder, store, options, self.say)
        self.sampler = Sampler()
        self.places: dict[str, TaskFolder] = {}
        self.done: dict[tuple[str, str], FinishedTask] = {}
        self.failed: dict[str, list[FailedTask]] = {view.sha256: [] for view in views}
        self.now: dict[tuple[str, str], Encodings] = {}
        self.here, self.conditions = machine(), _conditions(encoder, options)

    def say(self, note: str) -> None:
        """Keep a note for the reports and show it."""
        self.notes.append(note)
        self.progress(note, 1, 1)

    def read_finished(self, tasks: Sequence[ResolvedTask]) -> list[ResolvedTask]:
        """Read what earlier runs have finished; the tasks that some view still waits for."""
        for task in tasks:
            rules = [None] if self._rule(task) is None else [None, self._rule(task)]
            for rule in rules:  # what is scored whole has no need to be stopped
                place = TaskFolder.of(
                    self.encoder,
                    task,
                    self.store,
                    self.options.dtype,
                    None if rule is None else rule.key(),
                )
                self.places[task.name] = place
                sample = place.sample()
                if sample is None:
                    continue
                self.sampler.merge(sample)
                for view in self._waiting(task):
                    finished = place.finished(view)
                    if finished is not None:
                        self.done[view.sha256, task.name] = finished
        return [task for task in tasks if self._waiting(task)]

    def _rule(self, task: ResolvedTask) -> StopRule | None:
        """What may stop a task; None where nothing can."""
        name = task.aggregate or task.name
        subsets = task.subsets if task.aggregate is None else (task.name,)
        keys = [(name, split, subset) for split in task.splits for subset in subsets]
        may_stop = self.stop is not None and any(self.stop.looks(key) for key in keys)
        return self.stop if may_stop else None

    def _waiting(self, task: ResolvedTask) -> list[View]:
        return [view for view in self.views if (view.sha256, task.name) not in self.done]

    def score(self, tasks: Sequence[ResolvedTask], n_all: int) -> None:
        """Score tasks, with their data loaded, one after the other."""
        from gteopt.evaluation.tasks import n_texts

        ignored = [task.task for task in self.suite.tasks if task.instruction is not None]
        if ignored and not self.encoder.takes_instructions:
            self.say(
                f"{self.encoder.name} takes no instructions; that of {', '.join(ignored)} is left "
                f"out"
            )
        caches = [self.vectors.of(task) for task in tasks]
        usual = self.vectors.usual()
        _say_what_does_not_fit({task.name: n_texts(task) for task in tasks}, usual, self.say)
        # What a task that may stop will encode is not known beforehand.
        known = [
            cache if self._rule(task) is None else None
            for task, cache in zip(tasks, caches, strict=True)
        ]
        ahead = _TaskLookahead(self.options, usual, tasks, known)
        for position, (task, cache) in enumerate(zip(tasks, caches, strict=True)):
            ahead.look(position)
            number = f"{n_all - len(tasks) + position + 1} of {n_all}"
            try:
                self._score_task(task, cache, number)
            finally:
                task.task.unload_data()

    def _score_task(self, task: ResolvedTask, cache: VectorCache, number: str) -> None:
        # A task draws from generators that it owns; every view has to see the same draws.
        generators = deepcopy((task.task.rng_state, task.task.np_rng))
        cache.begin_task()
        waiting = self._waiting(task)
        searches = Searches(waiting)
        sampler: Sampler | None = Sampler()
        for view in waiting:
            task.task.rng_state, task.task.np_rng = deepcopy(generators)
            progress = _renamed(self.progress, f"{view.name}: {task.name} ({number})")
            finished = self._finished(task, view, cache, searches, sampler, progress)
            if finished is None:
                continue
            self.done[view.sha256, task.name] = finished
            if sampler is not None:
                # Vectors first: a task whose scores are on disk has its vectors there, too.
                self.places[task.name].write_sample(sampler.sample())
                self.sampler.merge(sampler.sample())
                sampler = None
            self.places[task.name].write(view, finished)

    def _finished(
        self,
        task: ResolvedTask,
        view: View,
        cache: VectorCache,
        searches: Searches,
        sampler: Sampler | None,
        progress: Progress,
    ) -> FinishedTask | None:
        """Scores of one task and view; None, and a record of why, where it fails."""
        from gteopt.evaluation.mteb_model import TaskModel
        from gteopt.evaluation.scoring import score_task
        from gteopt.evaluation.tasks import n_texts

        # Each look reads the documents again, which a full cache would encode again.
        is_kept = cache.n_bytes(n_texts(task)) <= cache.room_bytes()
        before = cache.counts
        model = TaskModel(
            cache,
            view,
            instruction_of(self.encoder, task),
            sampler,
            progress,
            searches=searches,
        )
        try:
            scores, samples = score_task(
                model, task, self.store, self._rule(task) if is_kept else None
            )
        except GteoptError as error:
            self.failed[view.sha256].append(FailedTask(task=task.name, reason=str(error)))
            return None
        except Exception as error:
            # A task of mteb's may fail in any way, and the others are worth having.
            reason = f"{type(error).__name__}: {error}"
            self.failed[view.sha256].append(FailedTask(task=task.name, reason=reason))
            return None
        finally:
            self.now[view.sha256, task.name] = cache.counts - before
        took = self.now[view.sha256, task.name]
        return FinishedTask(scores, samples, took, self.here, self.conditions)

    def run_of(self, view: View, suite_sha256: str) -> SuiteRun:
        """What came of one view."""
        own = {
            name: self.done[view.sha256, name]
            for name in self.places
            if (view.sha256, name) in self.done
        }
        own_now = {name: took for (sha256, name), took in self.now.items() if sha256 == view.sha256}
        where, when, earlier = _measured_on(own, self.here, self.conditions)
        took = own_now | {name: finished.encodings for name, finished in own.items()}
        return SuiteRun(
            encoder=view.name,
            encoder_sha256=view.sha256,
            suite=self.suite,
            suite_sha256=suite_sha256,
            scores=tuple(score for finished in own.values() for score in finished.scores),
            item_scores={
                key: samples
                for name, finished in own.items()
                for key, samples in _by_score(name, finished)
            },
            failed=tuple(self.failed[view.sha256]),
            fidelity_sample=self.sampler.sample(),
            vectors=view.vectors,
            machine=where,
            versions=when,
            encodings=sum(took.values(), Encodings()),
            encodings_now=sum(own_now.values(), Encodings()),
            notes=(*self.notes, *earlier),
            hub_id=self.encoder.checkpoint.hub_id,
        )


def _by_score(name: str, finished: FinishedTask) -> Iterator[tuple[SampleKey, Samples]]:
    """Entries by the names of their scores; a part of an aggregate has its own name as subset."""
    for score in finished.scores:
        subset = score.subset if score.task == name else "default"
        if (score.split, subset) in finished.samples:
            yield (
                (score.task, score.split, score.subset),
                finished.samples[score.split, subset],
            )


def _measured_on(
    tasks: Mapping[str, FinishedTask], here: Machine, conditions: Conditions
) -> tuple[Machine, Conditions, list[str]]:
    """Where a run's scores are from, and a sentence for each other place that some are from.

    It is here where any task was scored like that, else where the first one was.
    """
    by_place: dict[str, tuple[Machine, Conditions, list[str]]] = {}
    for name, each in tasks.items():
        place = f"{each.machine!r} {sorted(each.versions.items())}"
        by_place.setdefault(place, (each.machine, each.versions, []))[2].append(name)
    found = list(by_place.values())
    where, when = here, conditions
    if found and (here, conditions) not in [(m, v) for m, v, _ in found]:
        where, when, _ = found[0]
    notes = []
    for other, versions_, names in found:
        if (other, versions_) == (where, when):
            continue
        differing = differing_conditions((other, versions_), (where, when))
        notes.append(f"{', '.join(names)}: scored in an earlier run, with {differing}")
    return where, when, notes


def differing_conditions(one: tuple[Machine, Conditions], other: tuple[Machine, Conditions]) -> str:
    """What of one place is otherwise at the other, in words; "" where nothing is."""
    facts, others = ({**dict(machine), **versions} for machine, versions in (one, other))
    return ", ".join(f"{key} {value}" for key, value in facts.items() if others.get(key) != value)


def _say_what_does_not_fit(
    n_texts: Mapping[str, int], cache: VectorCache, say: Callable[[str], None]
) -> None:
    """Before the first text: which tasks are larger than the cache, and what it would have to be.

    A search is read once for all views, so that this costs nothing until it is read again.
    """
    room = cache.room_bytes()
    tight = {name: n for name, n in n_texts.items() if cache.n_bytes(n) > room}
    if tight:
        tasks = ", ".join(f"{n:,} of {name}" for name, n in tight.items())
        largest = cache.n_bytes(max(tight.values())) / 1e9
        say(
            f"{cache.encoder.name}: the vectors of {tasks} take up to {largest:,.1f} GB, the cache "
            f"has room for {room / 1e9:,.1f} GB (--cache-gb, or half of the free disk): a stop, or "
            f"another artifact of the same weights, encodes again what does not fit"
        )


class _TaskLookahead:
    """Lets workers begin with the next task's texts while a task is scored; see `EncodeAhead`.

    Tasks with a cache of their own (another limit of tokens, lengths kept) are encoded once asked,
    and so are tasks that may stop, whose cache is None here.
    """

    def __init__(
        self,
        options: EncodeOptions,
        cache: VectorCache,
        tasks: Sequence[ResolvedTask],
        caches: Sequence[VectorCache | None],
    ) -> None:
        self._encode = options.encode if isinstance(options.encode, EncodeAhead) else None
        self._start_next = options.start_next
        self._cache = cache
        self._tasks = tasks
        self._caches = caches
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
            if self._caches[len(self._shards)] is not self._cache:
                self._shards.append([])
                continue
            planned = set(self._planned)
            shards = upcoming_shards(
                each, self._cache, instruction_of(self._cache.encoder, each), planned
            )
            self._planned = planned - self._planned
            self._shards.append(shards)
            self._encode.expect(shards)
        if position == len(self._tasks) - 1 and self._start_next is not None:
            self._encode.when_all_started(self._start_next)


def _renamed(progress: Progress, task: str) -> Progress:
    def renamed(what: str, done: int, total: int) -> None:
        progress(task, done, total)

    return renamed


def _conditions(encoder: Description, options: EncodeOptions) -> Conditions:
    import torch

    return {
        **versions(),
        **{name: version(name) for name in _LIBRARIES},
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "device": str(encoder.device),
        "backend": encoder.backend,
        "arithmetic": encoder.arithmetic,
        "cached_vectors": options.dtype,
        "torch_threads": str(torch.get_num_threads()),
        "encoded_on": options.encoded_on,
    }
