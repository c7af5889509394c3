"""Score an encoder on a suite, or encode a user's own texts.

Hides: what is done already, and how a failing task is told apart from a failing run. Refuses to
know: how tasks find their data, how vectors become scores, what a score is compared with.

    STORE/vectors/<weights>/...    encoded texts (`cache`)
    STORE/tasks/<task>-<key>/...   scores of one task and what they are made of (`finished`)
    STORE/results/<model>/...      scores in mteb's layout (`results`)
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from gteopt.corpus.shards import EncodeAhead, EncodeShards, Encodings, LocalEncoding, Shard
from gteopt.corpus.vector_cache import DEFAULT_BYTES, CacheDtype, VectorCache
from gteopt.errors import GteoptError, NumericsError, UnsupportedError
from gteopt.evaluation.corpus_search import Searches
from gteopt.evaluation.fidelity import Sample, Sampler, sample_of
from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.task_store import (
    FinishedTask,
    Place,
    SubsetScore,
    carries_on_documents,
    mean_over_tasks,
)
from gteopt.evaluation.views import View, own_view
from gteopt.machine import machine, versions
from gteopt.progress import Progress, quiet
from gteopt.records.environment import Conditions, Machine
from gteopt.records.evaluation import FailedTask
from gteopt.vectors.transform import VectorTransform

if TYPE_CHECKING:
    from gteopt.encoder.description import Description
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
        afterwards: begins what comes next on the same workers, so that none waits for the end of a
            run; called once, when all that the last task asks for is being encoded.
    """

    batch_size: int = 32
    cache_bytes: int = DEFAULT_BYTES
    dtype: CacheDtype = "float16"
    encode: EncodeShards | None = None
    encoded_on: str = "this process"
    afterwards: Callable[[], None] | None = None


ENCODE_OPTIONS = EncodeOptions()

SampleKey = tuple[str, str, str]
"""Task, split, subset."""


@dataclass(frozen=True)
class SuiteRun:
    """What one encoder did on a suite.

    Attributes:
        suite_sha256: see `Suite.sha256`, of the own data that were read.
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
    suite_sha256: str
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
        return mean_over_tasks((each.task, each.score) for each in self.scores)


def run_suite(
    encoder: Description,
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
    encoder: Description,
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
    from gteopt.evaluation.mteb_isolation import isolated

    with ExitStack() as stack:
        stack.enter_context(isolated(offline=hub_dir is not None))
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gteopt-")))
        return _run(encoder, suite, views, hub_dir, store, options, progress)


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
        for each in resolve(suite, hub_dir):
            if Place.of(encoder, each, store, options.dtype).sample() is None:
                load_data([each])
                cache = _open_cache(encoder, store, options, lambda note: None)
                _Ahead(options, cache, [each]).look(0)
                each.task.unload_data()
                return


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
        cache = _open_cache(encoder, store, options, say)
        sample = sample_of(texts, cache.embed(texts, "document", None, progress))
    return TextsRun(sample, cache.counts, tuple(notes), machine(), _conditions(encoder, options))


def _run(
    encoder: Description,
    suite: Suite,
    views: Sequence[View],
    hub_dir: Path | None,
    store: Path,
    options: EncodeOptions,
    progress: Progress,
) -> list[SuiteRun]:
    from gteopt.evaluation.tasks import load_data, n_texts, resolve

    notes: list[str] = []

    def say(note: str) -> None:
        notes.append(note)
        progress(note, 1, 1)

    tasks = resolve(suite, hub_dir)
    places = {each.name: Place.of(encoder, each, store, options.dtype) for each in tasks}
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

    ignored = [each.task for each in suite.tasks if each.instruction is not None]
    if ignored and not encoder.takes_instructions:
        say(f"{encoder.name} takes no instructions; that of {', '.join(ignored)} is left out")
    cache = _open_cache(encoder, store, options, say)
    _say_what_does_not_fit({each.name: n_texts(each) for each in waiting}, cache, say)
    failed: dict[str, list[FailedTask]] = {view.sha256: [] for view in views}
    now: dict[tuple[str, str], Encodings] = {}
    ahead = _Ahead(options, cache, waiting)
    here, conditions = machine(), _conditions(encoder, options)
    for position, each in enumerate(waiting, start=len(tasks) - len(waiting) + 1):
        ahead.look(position - (len(tasks) - len(waiting) + 1))
        try:
            # A task draws from generators that it owns; every view has to see the same draws.
            generators = deepcopy((each.task.rng_state, each.task.np_rng))
            task_sampler: Sampler | None = Sampler()
            cache.begin_task()
            searches = Searches([view for view in views if (view.sha256, each.name) not in done])
            for view in views:
                key = view.sha256, each.name
                if key in done:
                    continue
                each.task.rng_state, each.task.np_rng = deepcopy(generators)
                before = cache.counts
                what = f"{view.name}: {each.name} ({position} of {len(tasks)})"
                try:
                    scores, samples = _score(
                        cache, view, each, searches, task_sampler, store, _renamed(progress, what)
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
                done[key] = FinishedTask(scores, samples, now[key], here, conditions)
                if task_sampler is not None:
                    # Vectors first: a task whose scores are on disk has its vectors there, too.
                    places[each.name].write_sample(task_sampler.sample())
                    sampler.merge(task_sampler.sample())
                    task_sampler = None
                places[each.name].write(view, done[key])
        finally:
            each.task.unload_data()
    sample = sampler.sample()
    suite_sha256 = suite.sha256({each.name: each.revision for each in tasks})
    runs = []
    for view in views:
        own = {name: done[view.sha256, name] for name in places if (view.sha256, name) in done}
        own_now = {name: taken for (sha256, name), taken in now.items() if sha256 == view.sha256}
        where, when, earlier = _measured_on(own, here, conditions)
        took = own_now | {name: each.encodings for name, each in own.items()}
        runs.append(
            SuiteRun(
                encoder=view.name,
                encoder_sha256=view.sha256,
                suite=suite,
                suite_sha256=suite_sha256,
                scores=tuple(score for each in own.values() for score in each.scores),
                samples={
                    (name, split, subset): samples
                    for name, each in own.items()
                    for (split, subset), samples in each.samples.items()
                },
                failed=tuple(failed[view.sha256]),
                sample=sample,
                vectors=view.vectors,
                machine=where,
                versions=when,
                encodings=sum(took.values(), Encodings()),
                encodings_now=sum(own_now.values(), Encodings()),
                notes=(*notes, *earlier),
                hub_id=encoder.checkpoint.hub_id,
            )
        )
    return runs


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


def _open_cache(
    encoder: Description, store: Path, options: EncodeOptions, say: Callable[[str], None]
) -> VectorCache:
    return VectorCache(
        encoder,
        store / "vectors",
        encode=options.encode or LocalEncoding(encoder, options.batch_size, say),
        limit_bytes=options.cache_bytes,
        dtype=options.dtype,
        say=say,
    )


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


class _Ahead:
    """Lets workers begin with the next task's texts while a task is scored; see `EncodeAhead`."""

    def __init__(
        self, options: EncodeOptions, cache: VectorCache, tasks: Sequence[ResolvedTask]
    ) -> None:
        self._encode = options.encode if isinstance(options.encode, EncodeAhead) else None
        self._afterwards = options.afterwards
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
                on_documents=carries_on_documents(self._cache.encoder, each),
            )
            self._planned = planned - self._planned
            self._shards.append(shards)
            self._encode.expect(shards)
        if position == len(self._tasks) - 1 and self._afterwards is not None:
            self._encode.afterwards(self._afterwards)


def _score(
    cache: VectorCache,
    view: View,
    resolved: ResolvedTask,
    searches: Searches,
    sampler: Sampler | None,
    store: Path,
    progress: Progress,
) -> tuple[tuple[SubsetScore, ...], Mapping[tuple[str, str], Samples]]:
    """Scores of every split and subset of one task, and what they are made of.

    Raises:
        NumericsError: vectors or a score that is not a number.
    """
    from gteopt.evaluation.mteb_model import TaskModel
    from gteopt.evaluation.mteb_results import write_results
    from gteopt.evaluation.predictions import collect, read_predictions, record_draws_
    from gteopt.evaluation.tasks import n_samples

    instruction = resolved.instruction if cache.encoder.takes_instructions else None
    model = TaskModel(
        cache,
        view,
        instruction,
        sampler,
        progress,
        on_documents=carries_on_documents(cache.encoder, resolved),
        searches=searches,
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
