"""Encode shards of texts in other processes: one process a device, or actors of a Ray cluster.

Hides: processes, Ray, which worker is free, and what is repeated when a worker is lost. Refuses to
know: tasks, caches, scores.

A shard's vectors have the same bits on every worker. Batches hold texts of one shard only. Every
worker computes with as many threads as this process, has the same versions of the libraries, and
has loaded files with the same SHA-256. A worker with another processor is reported.
"""

from __future__ import annotations

import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from gteopt.corpus.shards import LocalEncoding, Shard
from gteopt.errors import RESUMES, GteoptError, IntegrityError, UnsupportedError
from gteopt.machine import describe_machine, gpu_name, read_library_versions
from gteopt.progress import Progress

if TYPE_CHECKING:
    from gteopt.encoder.description import Backend, EncoderDescription

Floats = npt.NDArray[np.float32]

_AHEAD_PER_WORKER = 4  # shards encoded before they are asked for; each takes a few MB
_TRIES = 3  # workers on which a shard is tried, before it is given up
_LOSSES_PER_WORKER = 3
_PATIENCE_S = 600.0  # how long a shard waits for a worker when none is left


@dataclass(frozen=True)
class WorkerJob:
    """What a worker has to load, and the conditions for vectors with the same bits.

    Attributes:
        source: a base or an artifact, as `gteopt.load` takes it; on a cluster, every node must be
            able to read it under this name.
        sha256: SHA-256 that the files must have.
        n_threads: threads of torch on a CPU.
        versions: versions of the libraries that decide results.
        cpu: this machine's processor.
        gpu: the GPU under whose name vectors are stored; None if this machine has none.
        max_tokens: longer texts are cut to this length; None means the model's limit.
        normalize: whether vectors get unit length, if the model normalizes.
    """

    source: str
    hub_dir: str | None
    device: str
    dtype: str
    backend: Backend
    batch_size: int
    sha256: str
    n_threads: int
    versions: tuple[tuple[str, str], ...]
    cpu: str
    gpu: str | None
    max_tokens: int | None = None
    normalize: bool = True


@dataclass(frozen=True)
class WorkerAnswer:
    """The part of an answer besides the result: notes, and an error in place of the result."""

    error: GteoptError | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedShard(WorkerAnswer):
    """The answer for a shard; exactly one of `vectors` and `error` is not None."""

    vectors: Floats | None = None


class WorkerLost(Exception):
    """A worker died or cannot be reached; its item must be repeated."""


_Job = TypeVar("_Job")
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer", bound=WorkerAnswer)
_JobIn = TypeVar("_JobIn", contravariant=True)
_ItemIn = TypeVar("_ItemIn", contravariant=True)
_AnswerOut = TypeVar("_AnswerOut", bound=WorkerAnswer, covariant=True)


class Worker(Protocol[_JobIn, _ItemIn, _AnswerOut]):
    """A process with a device that works on one item of a job at a time.

    An item is a `Shard` of texts for scores, or a `RowRange` of a corpus that is embedded.
    """

    name: str

    def encode(self, job: _JobIn, shard: _ItemIn) -> _AnswerOut:
        """Encode an item, or raise `WorkerLost`."""

    def close(self) -> None:
        """Kill the worker, even in the middle of an item."""


class WorkerPool(Generic[_Job, _Item, _Answer]):
    """Workers that share shards; a context manager that ends them.

    A lost worker is opened again, and its shard goes to the next free worker.

    Attributes:
        device: kind of device that all workers encode on, "cpu" or "cuda".
        n_lost: how many workers died.
    """

    def __init__(
        self,
        openers: Sequence[Callable[[], Worker[_Job, _Item, _Answer]]],
        *,
        device: str,
        where: str,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        """Open every worker, all at once.

        Args:
            openers: one function for each worker, which opens it; called again when it is lost.
            device: kind of device.
            where: name of the workers in reports.
            leave: called after all workers have ended.
        """
        self._leave = leave
        self.device = device
        self.n_lost = 0
        self._where = where
        self._openers = openers
        self._idle: SimpleQueue[tuple[int, Worker[_Job, _Item, _Answer]]] = SimpleQueue()
        self._open: dict[int, Worker[_Job, _Item, _Answer]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._pool = ThreadPoolExecutor(max_workers=max(1, len(openers)))
        for number in range(len(openers)):
            self._reopen(number)

    def __len__(self) -> int:
        return len(self._openers)

    def __str__(self) -> str:
        return self._where

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._closed = True
            for worker in self._open.values():
                worker.close()
        # Without waiting, because a shard of a large model takes minutes after Ctrl-C.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._leave()

    def opened(self) -> list[Worker[_Job, _Item, _Answer]]:
        """The workers that are open now."""
        with self._lock:
            return list(self._open.values())

    def submit(self, job: _Job, shard: _Item) -> Future[_Answer]:
        """Run `encode` in the background; shards start in the order of submission."""
        return self._pool.submit(self.encode, job, shard)

    def encode(self, job: _Job, shard: _Item) -> _Answer:
        """Encode one shard on the next free worker; if the worker is lost, on another one.

        Raises:
            UnsupportedError: too many workers were lost, or none came back.
        """
        notes: list[str] = []
        for _ in range(_TRIES):
            number, worker = self._next()
            try:
                encoded = worker.encode(job, shard)
            except WorkerLost as lost:
                notes.append(
                    f"worker {worker.name} was lost ({lost}); its texts were encoded again"
                )
                self._reopen_after(lost, number)
                continue
            self._idle.put((number, worker))
            return replace(encoded, notes=(*notes, *encoded.notes))
        raise UnsupportedError(
            f"{_TRIES} workers in a row were lost over the same texts ({self._where}); these texts "
            f"may need more memory than the workers have"
        )

    def _next(self) -> tuple[int, Worker[_Job, _Item, _Answer]]:
        deadline = monotonic() + _PATIENCE_S
        while monotonic() < deadline:
            self._check_open()
            try:
                return self._idle.get(timeout=1)
            except Empty:
                continue
        raise UnsupportedError(
            f"no worker was available for {_PATIENCE_S / 60:.0f} minutes "
            f"({self._where}, {self.n_lost} lost); {RESUMES}"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerLost("the workers were ended")

    def _reopen_after(self, lost: WorkerLost, number: int) -> None:
        self._check_open()
        with self._lock:
            self.n_lost += 1
        if self.n_lost > _LOSSES_PER_WORKER * len(self._openers):
            raise UnsupportedError(
                f"{self.n_lost} workers were lost; the last reason was: {lost}; check whether the "
                f"workers have enough memory"
            )
        self._reopen(number)

    def _reopen(self, number: int) -> None:
        """Open a worker in the background; on a cluster, it may have to wait for a node."""

        def open_() -> None:
            try:
                worker = self._openers[number]()
            except WorkerLost as lost:
                # No exception in this thread: `_next` reports that no worker came.
                with suppress(UnsupportedError, WorkerLost):
                    self._reopen_after(lost, number)
                return
            with self._lock:
                if self._closed:
                    worker.close()
                    return
                self._open[number] = worker
            self._idle.put((number, worker))

        threading.Thread(target=open_, daemon=True).start()


class ScoreWorkers(WorkerPool[WorkerJob, Shard, EncodedShard]):
    """Workers that encode texts for scores; see `WorkerPool`."""

    def encoding(
        self,
        encoder: EncoderDescription,
        source: str,
        *,
        hub_dir: Path | None,
        batch_size: int = 32,
        say: Callable[[str], None] = lambda _: None,
    ) -> WorkerEncoding:
        """An `EncodeShards` on these workers, for the `encoder` that comes from `source`."""
        import torch

        job = WorkerJob(
            source=source,
            hub_dir=None if hub_dir is None else str(hub_dir.absolute()),
            device=self.device,
            dtype=str(encoder.dtype).removeprefix("torch."),
            backend=encoder.backend,
            batch_size=batch_size,
            sha256=encoder.sha256,
            n_threads=torch.get_num_threads(),
            versions=tuple(read_library_versions().items()),
            cpu=describe_machine().cpu,
            gpu=encoder.gpu,
        )
        return WorkerEncoding(self, job, say)


class WorkerEncoding:
    """Encodes shards on all workers at once; see `EncodeShards`.

    For each worker, a few expected shards are encoded before they are asked for. So no worker waits
    while a request ends or a task is scored.
    """

    def __init__(self, workers: ScoreWorkers, job: WorkerJob, say: Callable[[str], None]) -> None:
        """Nothing is encoded yet.

        Args:
            workers: the workers that encode the shards.
            job: the model that they load.
            say: called with messages about lost workers, and with the workers' notes.
        """
        self._workers = workers
        self._job = job
        self._say = say
        self._expected: dict[Shard, None] = {}
        self._started: dict[Shard, Future[EncodedShard]] = {}
        self._start_next: Callable[[], None] | None = None

    def __call__(
        self, shards: Sequence[Shard], progress: Progress
    ) -> Iterator[tuple[Shard, Floats]]:
        """Each shard with its vectors [N, full_dims], in the order in which shards get ready.

        Raises:
            GteoptError: what a worker or `ScoreWorkers.encode` raised.
        """
        n_texts, n_done = sum(len(shard.texts) for shard in shards), 0
        for shard in shards:
            self._expected.pop(shard, None)
            if shard not in self._started:
                self._start(shard)
        asked = {self._started.pop(shard): shard for shard in shards}
        self._start_expected()
        for future in as_completed(asked):
            self._start_expected()
            encoded, shard = future.result(), asked[future]
            for note in encoded.notes:
                self._say(note)
            if encoded.error is not None:
                raise encoded.error
            assert encoded.vectors is not None
            yield shard, encoded.vectors
            n_done += len(shard.texts)
            progress(f"encoding on {self._workers}", n_done, n_texts)

    def changed(self, max_tokens: int, *, normalize: bool) -> WorkerEncoding:
        """See `EncodeShards`; on the same workers, which keep their model."""
        job = replace(self._job, max_tokens=max_tokens, normalize=normalize)
        return WorkerEncoding(self._workers, job, self._say)

    def expect(self, shards: Sequence[Shard]) -> None:
        """Announce shards that will be asked for, after those that are announced already."""
        self._expected |= dict.fromkeys(shard for shard in shards if shard not in self._started)
        self._start_expected()

    def forget(self, shards: Sequence[Shard]) -> None:
        """Withdraw announced shards, and cancel those that have started but were not asked for."""
        for shard in shards:
            self._expected.pop(shard, None)
            if shard in self._started:
                self._started.pop(shard).cancel()

    def when_all_started(self, start_next: Callable[[], None]) -> None:
        """See `EncodeAhead`.

        Workers take shards in the order of their submission. So shards of the next model never come
        before those that are announced here.
        """
        self._start_next = start_next
        self._start_expected()

    def _start_expected(self) -> None:
        while self._expected and len(self._started) < _AHEAD_PER_WORKER * len(self._workers):
            shard = next(iter(self._expected))
            del self._expected[shard]
            self._start(shard)
        if not self._expected and self._start_next is not None:
            start_next, self._start_next = self._start_next, None
            start_next()

    def _start(self, shard: Shard) -> None:
        self._started[shard] = self._workers.submit(self._job, shard)


def start_local_workers(devices: Sequence[str]) -> ScoreWorkers:
    """One process for each device of this machine; `parse_devices` gives the devices."""
    openers = [
        lambda name=name, number=number: _Process(f"{number} on {name}", name)
        for number, name in enumerate(devices)
    ]
    kind = devices[0].partition(":")[0]
    return ScoreWorkers(
        openers, device=kind, where=f"{len(devices)} processes ({','.join(devices)})"
    )


class _Process:
    """A process of this machine."""

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self._device = device
        # Spawned, not forked: threads and CUDA do not survive a fork.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def encode(self, job: WorkerJob, shard: Shard) -> EncodedShard:
        try:
            self._connection.send((job, self._device, shard))
            encoded: EncodedShard = self._connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(10)
            code = self.process.exitcode
            raise WorkerLost(f"its process ended with exit code {code}") from error
        return encoded

    def close(self) -> None:
        self.process.kill()


def _serve(connection: Connection) -> None:
    """Serve a worker process until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    while True:
        try:
            job, device, shard = connection.recv()
        except (EOFError, OSError):  # OSError if the parent was killed with unread answers
            return
        connection.send(_encode(job, device, shard))


@dataclass(frozen=True)
class _LoadedModel:
    """A loaded model.

    Attributes:
        usual: encodes with the model's own token limit and normalization.
        notes: messages for the parent process.
        changed: encodes with another token limit or normalization, by the job that asks for it.
    """

    usual: LocalEncoding
    notes: list[str]
    changed: dict[WorkerJob, LocalEncoding]

    def encoding(self, job: WorkerJob) -> LocalEncoding:
        if job.max_tokens is None:
            return self.usual
        if job not in self.changed:
            self.changed[job] = self.usual.changed(job.max_tokens, normalize=job.normalize)
        return self.changed[job]


_LOADED: dict[tuple[WorkerJob, str], _LoadedModel] = {}
"""The one model that a worker process has loaded; empty in every other process."""


def _encode(job: WorkerJob, device: str, shard: Shard) -> EncodedShard:
    try:
        usual = replace(job, max_tokens=None, normalize=True)
        if (usual, device) not in _LOADED:
            _LOADED.clear()  # before loading, because two models may not fit the memory
            _LOADED[usual, device] = _load(usual, device)
        model = _LOADED[usual, device]
        encode = model.encoding(job)
        ((_, vectors),) = encode([shard], lambda stage, done, total: None)
        notes = tuple(model.notes)
        model.notes.clear()
        return EncodedShard(vectors=vectors, notes=notes)
    except GteoptError as error:
        return EncodedShard(error=error)
    except Exception as error:
        # An uncaught exception would end the process and be reported as out of memory.
        where = traceback.extract_tb(error.__traceback__)[-1]
        return EncodedShard(
            error=UnsupportedError(
                f"a worker on {device} failed with {job.source}: {type(error).__name__}: {error} "
                f"({Path(where.filename).name}:{where.lineno})"
            )
        )


def _load(job: WorkerJob, device: str) -> _LoadedModel:
    import torch

    from gteopt.encoder.loading import load

    notes: list[str] = []
    here = describe_machine()
    if tuple(read_library_versions().items()) != job.versions:
        differing = [
            f"{k} {v}" for k, v in read_library_versions().items() if (k, v) not in job.versions
        ]
        raise UnsupportedError(
            f"a worker has other versions of the libraries than this process "
            f"({', '.join(differing)}), so its vectors would differ; install the same versions on "
            f"every machine"
        )
    if device == "cpu" and here.cpu != job.cpu:
        notes.append(
            f"a worker runs on {here.cpu}, this process on {job.cpu}: vectors may differ in their "
            f"last bits"
        )
    if device != "cpu" and job.gpu is not None and (gpu := gpu_name(device)) != job.gpu:
        notes.append(
            f"a worker runs on {gpu}, this process has {job.gpu}: vectors may differ in their "
            f"last bits"
        )
    # No warning, because the parent process counts the cut texts of all workers.
    warnings.filterwarnings("ignore", message=".* and were cut there")
    torch.set_num_threads(job.n_threads)
    hub_dir = None if job.hub_dir is None else Path(job.hub_dir)
    encoder = load(
        job.source,
        device=device,
        dtype=job.dtype,
        backend=job.backend,
        kernels="deterministic",  # as in the parent process
        hub_dir=hub_dir,
    )
    if encoder.sha256 != job.sha256:
        raise IntegrityError(
            f"{job.source} holds other files on a worker's machine (SHA-256 {encoder.sha256[:16]} "
            f"instead of {job.sha256[:16]}); copy the same files there, or share the folder"
        )
    return _LoadedModel(LocalEncoding(encoder, job.batch_size, notes.append), notes, {})
