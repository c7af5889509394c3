"""Score an encoder on a suite, or encode a user's own texts.

Hides: which tasks are finished already, and how a task can fail without ending the run. Refuses to
know: how tasks find their data, how vectors become scores, the baseline's scores.

    STORE/vectors/<weights>/...    encoded texts; see `corpus.vector_cache`
    STORE/tasks/<task>-<key>/...   scores of one task and their entries; see `task_store`
    STORE/results/<model>/...      scores in mteb's layout; see `mteb_results`
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

from gteopt.corpus.shards import EncodeAhead, EncodeShards, Shard, ShardEncodings
from gteopt.corpus.vector_cache import DEFAULT_BYTES, CacheDtype, VectorCache
from gteopt.errors import GteoptError
from gteopt.evaluation.corpus_search import KeptSearches
from gteopt.evaluation.fidelity import FidelitySample, FidelitySampler, make_fidelity_sample
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
from gteopt.machine import describe_machine, read_library_versions
from gteopt.progress import Progress, ignore_progress
from gteopt.records.environment import Conditions, MachineRecord
from gteopt.records.evaluation import FailedTask
from gteopt.vectors.transform import VectorTransform

if TYPE_CHECKING:
    from gteopt.encoder.description import EncoderDescription
    from gteopt.evaluation.stopping import StopRule
    from gteopt.evaluation.tasks import ResolvedTask


_LIBRARIES = ("mteb", "datasets", "scikit-learn", "scipy")


@dataclass(frozen=True)
class SuiteEncodeOptions:
    """How texts are encoded, and how their vectors are kept.

    Attributes:
        batch_size: texts computed together; halved if they do not fit into memory.
        cache_bytes: the largest size of the cache of vectors.
        dtype: dtype of the cached vectors.
        encode: encodes shards of texts; None encodes them in this process, one after the other.
        encoded_on: where texts are encoded, as named in reports.
        start_next: starts the next run on the same workers, so that no worker waits for the end of
            this run. It is called once, when all texts of the last task are being encoded.
    """

    batch_size: int = 32
    cache_bytes: int = DEFAULT_BYTES
    dtype: CacheDtype = "float16"
    encode: EncodeShards | None = None
    encoded_on: str = "this process"
    start_next: Callable[[], None] | None = None


ENCODE_OPTIONS = SuiteEncodeOptions()

SampleKey = tuple[str, str, str]
"""Task, split, subset."""


@dataclass(frozen=True)
class SuiteRun:
    """The results of one encoder on a suite.

    Attributes:
        suite_sha256: see `Suite.sha256`; it includes the hash of own data.
        item_scores: the entries of each score: one for each query, pair or document.
        failed: tasks that have no score, with the reasons.
        fidelity_sample: full-dimension vectors of the suite's texts.
        vectors: the transform from these vectors to the encoder's stored codes.
        encodings: text counts of all tasks, each from the run that scored it. A run that finds all
            tasks finished therefore has the same counts as the run that scored them.
        encodings_now: the part of `encodings` that belongs to this run.
        notes: anything unusual that happened to the encodings.
        hub_id: id of a base that may be a published model; see `Checkpoint`.
    """

    encoder: str
    encoder_sha256: str
    suite: Suite
    suite_sha256: str
    scores: tuple[SubsetScore, ...]
    item_scores: Mapping[SampleKey, Samples]
    failed: tuple[FailedTask, ...]
    fidelity_sample: FidelitySample
    vectors: VectorTransform
    machine: MachineRecord
    versions: Conditions
    encodings: ShardEncodings
    encodings_now: ShardEncodings
    notes: tuple[str, ...] = ()
    hub_id: str | None = None

    @property
    def score(self) -> float:
        """Mean over tasks, averaged over splits and subsets first; NaN without any score."""
        return mean_over_tasks((score.task, score.score) for score in self.scores)


class RunOptions(TypedDict, total=False):
    """Where a run reads and writes.

    Attributes:
        hub_dir: data sets are read from `hub_dir/<org>/<name>`, and the network is not used.
        store: folder for encoded texts, written shard by shard, and for finished tasks. A task in
            it with the same weights, view, instruction and data is not scored again. None uses a
            temporary folder.
        options: how texts are encoded and kept.
        progress: told the view, the task, and how many of the task's texts are encoded.
        stop: ends a task once its verdict is certain; None scores all of every task.
    """

    hub_dir: Path | None
    store: Path | None
    options: SuiteEncodeOptions
    progress: Progress
    stop: StopRule | None


def run_suite(encoder: EncoderDescription, suite: Suite, **where: Unpack[RunOptions]) -> SuiteRun:
    """Score an encoder's own view on every task of a suite; see `run_views`.

    Example:
        >>> run = run_suite(encoder, load_suite("mini"), store=Path("scores"))
        >>> run.score  # 0 to 1
    """
    return run_views(encoder, suite, [own_view(encoder)], **where)[0]


def run_views(
    encoder: EncoderDescription,
    suite: Suite,
    views: Sequence[View],
    **where: Unpack[RunOptions],
) -> list[SuiteRun]:
    """Score several views of one encoder on every task of a suite; texts are encoded once.

    A task that fails is recorded, and the run goes on.

    Args:
        encoder: a base or a variant.
        suite: tasks, from `load_suite`.
        views: the forms of the encoder's vectors that are scored.
        where: see `RunOptions`.

    Returns:
        One run for each view.

    Raises:
        InputError: lists all data that cannot be found or read, before anything is encoded.
    """
    from gteopt.evaluation.mteb_isolation import isolate_mteb
    from gteopt.evaluation.tasks import load_task_data, resolve_tasks

    hub_dir, store = where.get("hub_dir"), where.get("store")
    options, progress = where.get("options", ENCODE_OPTIONS), where.get("progress", ignore_progress)
    with ExitStack() as stack:
        stack.enter_context(isolate_mteb(offline=hub_dir is not None))
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gteopt-")))
        tasks = resolve_tasks(suite, hub_dir)
        scoring = _Scoring(encoder, suite, views, store, options, progress)
        scoring.stop = where.get("stop")
        waiting = scoring.read_finished(tasks)
        load_task_data(waiting)
        scoring.score(waiting, len(tasks))
        suite_sha256 = suite.sha256({task.name: task.revision for task in tasks})
        return [scoring.run_of(view, suite_sha256) for view in views]


def begin_views(
    encoder: EncoderDescription,
    suite: Suite,
    *,
    hub_dir: Path | None,
    store: Path | None,
    options: SuiteEncodeOptions,
) -> None:
    """Let workers start on the first unscored task, before `run_views` gets the same arguments."""
    from gteopt.evaluation.mteb_isolation import isolate_mteb
    from gteopt.evaluation.tasks import load_task_data, resolve_tasks

    with ExitStack() as stack:
        stack.enter_context(isolate_mteb(offline=hub_dir is not None))
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gteopt-")))
        for task in resolve_tasks(suite, hub_dir):
            if TaskFolder.of(encoder, task, store, options.dtype).sample() is None:
                load_task_data([task])
                vectors = TaskVectors(encoder, store, options, lambda note: None)
                _TaskLookahead(options, vectors.usual(), [task], [vectors.of(task)]).look(0)
                task.task.unload_data()
                return


@dataclass(frozen=True)
class TextsRun:
    """One encoder's vectors of a user's own texts.

    Attributes:
        fidelity_sample: full-dimension vectors of all texts.
        notes: anything unusual that happened to the encodings.
    """

    fidelity_sample: FidelitySample
    encodings: ShardEncodings
    notes: tuple[str, ...]
    machine: MachineRecord
    versions: Conditions


def run_texts(
    encoder: EncoderDescription,
    texts: Sequence[str],
    *,
    store: Path | None = None,
    options: SuiteEncodeOptions = ENCODE_OPTIONS,
    progress: Progress = ignore_progress,
) -> TextsRun:
    """Encode texts as documents without an instruction; see `run_views` for the arguments.

    An interrupted run continues at its last shard. Texts that a suite has encoded in the same way
    are not encoded again.
    """
    notes: list[str] = []

    def say(note: str) -> None:
        notes.append(note)
        progress(note, 1, 1)

    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gteopt-")))
        cache = TaskVectors(encoder, store, options, say).usual()
        sample = make_fidelity_sample(texts, cache.embed(texts, "document", None, progress))
    return TextsRun(
        sample, cache.counts, tuple(notes), describe_machine(), _conditions(encoder, options)
    )


class _Scoring:
    """The state of one run: finished and failed tasks of each view, text counts and notes."""

    def __init__(
        self,
        encoder: EncoderDescription,
        suite: Suite,
        views: Sequence[View],
        store: Path,
        options: SuiteEncodeOptions,
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
        self.sampler = FidelitySampler()
        self.folders: dict[str, TaskFolder] = {}
        self.done: dict[tuple[str, str], FinishedTask] = {}
        self.failed: dict[str, list[FailedTask]] = {view.sha256: [] for view in views}
        self.now: dict[tuple[str, str], ShardEncodings] = {}
        self.machine, self.conditions = describe_machine(), _conditions(encoder, options)

    def say(self, note: str) -> None:
        """Keep a note for the reports, and show it."""
        self.notes.append(note)
        self.progress(note, 1, 1)

    def read_finished(self, tasks: Sequence[ResolvedTask]) -> list[ResolvedTask]:
        """Read the tasks that earlier runs finished; return the tasks that are still unscored."""
        for task in tasks:
            rules = [None] if self._rule(task) is None else [None, self._rule(task)]
            for rule in rules:  # whole scores come first, because they need not be stopped
                folder = TaskFolder.of(
                    self.encoder,
                    task,
                    self.store,
                    self.options.dtype,
                    None if rule is None else rule.key(),
                )
                self.folders[task.name] = folder
                sample = folder.sample()
                if sample is None:
                    continue
                self.sampler.merge(sample)
                for view in self._waiting(task):
                    finished = folder.finished(view)
                    if finished is not None:
                        self.done[view.sha256, task.name] = finished
        return [task for task in tasks if self._waiting(task)]

    def _rule(self, task: ResolvedTask) -> StopRule | None:
        """The rule that may stop a task; None if the task cannot be stopped."""
        name = task.aggregate or task.name
        subsets = task.subsets if task.aggregate is None else (task.name,)
        keys = [(name, split, subset) for split in task.splits for subset in subsets]
        may_stop = self.stop is not None and any(self.stop.looks(key) for key in keys)
        return self.stop if may_stop else None

    def _waiting(self, task: ResolvedTask) -> list[View]:
        return [view for view in self.views if (view.sha256, task.name) not in self.done]

    def score(self, tasks: Sequence[ResolvedTask], n_all: int) -> None:
        """Score tasks one after the other; their data must be loaded."""
        from gteopt.evaluation.tasks import n_texts

        ignored = [task.task for task in self.suite.tasks if task.instruction is not None]
        if ignored and not self.encoder.takes_instructions:
            self.say(
                f"{self.encoder.name} takes no instructions; the suite's instructions for "
                f"{', '.join(ignored)} are left out"
            )
        caches = [self.vectors.of(task) for task in tasks]
        usual = self.vectors.usual()
        _say_what_does_not_fit({task.name: n_texts(task) for task in tasks}, usual, self.say)
        # The texts of a task that may stop are not known beforehand.
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
        # A task draws from its own generators, and every view needs the same draws.
        generators = deepcopy((task.task.rng_state, task.task.np_rng))
        cache.begin_task()
        waiting = self._waiting(task)
        searches = KeptSearches(waiting)
        sampler: FidelitySampler | None = FidelitySampler()
        for view in waiting:
            task.task.rng_state, task.task.np_rng = deepcopy(generators)
            progress = _renamed(self.progress, f"{view.name}: {task.name} ({number})")
            finished = self._finished(task, view, cache, searches, sampler, progress)
            if finished is None:
                continue
            self.done[view.sha256, task.name] = finished
            if sampler is not None:
                # Vectors are written first, so a task with scores on disk has its vectors too.
                self.folders[task.name].write_sample(sampler.sample())
                self.sampler.merge(sampler.sample())
                sampler = None
            self.folders[task.name].write(view, finished)

    def _finished(
        self,
        task: ResolvedTask,
        view: View,
        cache: VectorCache,
        searches: KeptSearches,
        sampler: FidelitySampler | None,
        progress: Progress,
    ) -> FinishedTask | None:
        """Scores of one task and view; None if the task fails, and the reason is recorded."""
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
            # An mteb task may raise any error; the other tasks are still scored.
            reason = f"{type(error).__name__}: {error}"
            self.failed[view.sha256].append(FailedTask(task=task.name, reason=reason))
            return None
        finally:
            self.now[view.sha256, task.name] = cache.counts - before
        took = self.now[view.sha256, task.name]
        return FinishedTask(scores, samples, took, self.machine, self.conditions)

    def run_of(self, view: View, suite_sha256: str) -> SuiteRun:
        """The run of one view."""
        finished_tasks = {
            name: self.done[view.sha256, name]
            for name in self.folders
            if (view.sha256, name) in self.done
        }
        took_now = {
            name: took for (sha256, name), took in self.now.items() if sha256 == view.sha256
        }
        machine_, versions_, earlier = _measured_on(finished_tasks, self.machine, self.conditions)
        took = took_now | {name: task.encodings for name, task in finished_tasks.items()}
        return SuiteRun(
            encoder=view.name,
            encoder_sha256=view.sha256,
            suite=self.suite,
            suite_sha256=suite_sha256,
            scores=tuple(score for task in finished_tasks.values() for score in task.scores),
            item_scores={
                key: samples
                for name, task in finished_tasks.items()
                for key, samples in _by_score(name, task)
            },
            failed=tuple(self.failed[view.sha256]),
            fidelity_sample=self.sampler.sample(),
            vectors=view.vectors,
            machine=machine_,
            versions=versions_,
            encodings=sum(took.values(), ShardEncodings()),
            encodings_now=sum(took_now.values(), ShardEncodings()),
            notes=(*self.notes, *earlier),
            hub_id=self.encoder.checkpoint.hub_id,
        )


def _by_score(name: str, finished: FinishedTask) -> Iterator[tuple[SampleKey, Samples]]:
    """Entries by the key of their score; the subset of an aggregate's part is the part's name."""
    for score in finished.scores:
        subset = score.subset if score.task == name else "default"
        if (score.split, subset) in finished.samples:
            yield (
                (score.task, score.split, score.subset),
                finished.samples[score.split, subset],
            )


def _measured_on(
    tasks: Mapping[str, FinishedTask], machine_now: MachineRecord, versions_now: Conditions
) -> tuple[MachineRecord, Conditions, list[str]]:
    """The environment of a run's scores, and a note for each other environment of some scores.

    It is the current environment if any task was scored in it, otherwise that of the first task.
    """
    environments: dict[str, tuple[MachineRecord, Conditions, list[str]]] = {}
    for name, task in tasks.items():
        key = f"{task.machine!r} {sorted(task.versions.items())}"
        environments.setdefault(key, (task.machine, task.versions, []))[2].append(name)
    chosen = machine_now, versions_now
    known = [(machine_, versions_) for machine_, versions_, _ in environments.values()]
    if known and chosen not in known:
        chosen = known[0]
    notes = []
    for machine_, versions_, names in environments.values():
        if (machine_, versions_) == chosen:
            continue
        differing = differing_conditions((machine_, versions_), chosen)
        notes.append(f"{', '.join(names)}: scored in an earlier run, with {differing}")
    return chosen[0], chosen[1], notes


def differing_conditions(
    first: tuple[MachineRecord, Conditions], second: tuple[MachineRecord, Conditions]
) -> str:
    """Names and values of the first environment that differ in the second; "" if none does."""
    facts, other_facts = ({**dict(machine), **versions} for machine, versions in (first, second))
    return ", ".join(
        f"{key} {value}" for key, value in facts.items() if other_facts.get(key) != value
    )


def _say_what_does_not_fit(
    n_texts: Mapping[str, int], cache: VectorCache, say: Callable[[str], None]
) -> None:
    """Name the tasks that are larger than the cache, before the first text is encoded.

    A search reads its corpus once for all views, so this costs nothing unless it is read again.
    """
    room = cache.room_bytes()
    too_large = {name: n for name, n in n_texts.items() if cache.n_bytes(n) > room}
    if too_large:
        tasks = ", ".join(f"{n:,} of {name}" for name, n in too_large.items())
        largest = cache.n_bytes(max(too_large.values())) / 1e9
        say(
            f"{cache.encoder.name}: the vectors of {tasks} take up to {largest:,.1f} GB, but the "
            f"cache has room for {room / 1e9:,.1f} GB (--cache-gb, or half of the free disk). "
            f"Vectors that do not fit are encoded again after an interruption, and for another "
            f"artifact of the same weights"
        )


class _TaskLookahead:
    """Lets workers encode the next task's texts while a task is scored; see `EncodeAhead`.

    Two kinds of task are encoded only when they ask for texts. Some have a separate cache, because
    they have another token limit or keep lengths. Others may stop; their cache is None here.
    """

    def __init__(
        self,
        options: SuiteEncodeOptions,
        cache: VectorCache,
        tasks: Sequence[ResolvedTask],
        caches: Sequence[VectorCache | None],
    ) -> None:
        self._encode = options.encode if isinstance(options.encode, EncodeAhead) else None
        self._start_next = options.start_next
        self._cache = cache
        self._tasks = tasks
        self._caches = caches
        self._planned: set[bytes] = set()  # keys of the texts of the last planned task
        self._shards: list[list[Shard]] = []

    def look(self, position: int) -> None:
        """Plan ahead: the task at `position` is scored next, and the task before it is scored."""
        from gteopt.evaluation.lookahead import upcoming_shards

        if self._encode is None:
            return
        if position > 0:
            self._encode.forget(self._shards[position - 1])
            self._shards[position - 1] = []
        for task in self._tasks[len(self._shards) : position + 2]:
            if self._caches[len(self._shards)] is not self._cache:
                self._shards.append([])
                continue
            planned = set(self._planned)
            shards = upcoming_shards(
                task, self._cache, instruction_of(self._cache.encoder, task), planned
            )
            self._planned = planned - self._planned
            self._shards.append(shards)
            self._encode.expect(shards)
        if position == len(self._tasks) - 1 and self._start_next is not None:
            self._encode.when_all_started(self._start_next)


def _renamed(progress: Progress, task: str) -> Progress:
    def renamed(label: str, done: int, total: int) -> None:
        progress(task, done, total)

    return renamed


def _conditions(encoder: EncoderDescription, options: SuiteEncodeOptions) -> Conditions:
    import torch

    return {
        **read_library_versions(),
        **{name: version(name) for name in _LIBRARIES},
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "device": str(encoder.device),
        "backend": encoder.backend,
        "arithmetic": encoder.arithmetic,
        "cached_vectors": options.dtype,
        "torch_threads": str(torch.get_num_threads()),
        "encoded_on": options.encoded_on,
    }
