"""Embed a corpus in processes of this machine, one process a device.

Hides: how a process is kept busy: it has `AHEAD` shards at a time, so that it reads and writes
while it computes. Refuses to know: jobs, what a shard holds.

`workers.WorkerPool` decides which worker gets a shard, and repeats a shard when a process is lost.
The pool sees a process as `AHEAD` workers, which are lost together.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from gteopt.corpus.jobs import RunShards
from gteopt.corpus.rows import RowRange
from gteopt.corpus.shard_encoder import AHEAD, EmbedTask, ShardDone, ShardEncoder
from gteopt.corpus.workers import WorkerAnswer, WorkerLost, WorkerPool
from gteopt.errors import RESUMES, GteoptError, UnsupportedError
from gteopt.own_thread import call_in_own_thread


@dataclass(frozen=True)
class EmbeddedShard(WorkerAnswer):
    """The answer for a shard; exactly one of `done` and `error` is not None."""

    done: ShardDone | None = None


EmbedWorkers = WorkerPool[EmbedTask, RowRange, EmbeddedShard]


def start_local_embedders(devices: Sequence[str]) -> EmbedWorkers:
    """One process for each device of this machine; `parse_devices` gives the devices."""
    processes = _Processes(devices)
    openers = [
        lambda number=number: _Slot(processes, number)
        for _ in range(AHEAD)
        for number in range(len(devices))
    ]
    kind = devices[0].partition(":")[0]
    where = f"{len(devices)} processes ({','.join(devices)})"
    return WorkerPool(openers, device=kind, where=where)


def embed_on_workers(workers: EmbedWorkers, say: Any = None) -> RunShards:
    """Embed on workers, as many shards at once as there are workers."""

    def embed(task: EmbedTask, shards: Sequence[RowRange]) -> Iterator[ShardDone]:
        waiting: set[Future[EmbeddedShard]] = set()
        remaining = iter(shards)
        while True:
            # One shard a worker: a large corpus has too many shards to submit all at once.
            while len(waiting) < len(workers) and (shard := next(remaining, None)) is not None:
                waiting.add(workers.submit(task, shard))
            if not waiting:
                return
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                embedded = future.result()
                for note in embedded.notes if say is not None else ():
                    say(note)
                if embedded.error is not None:
                    raise embedded.error
                assert embedded.done is not None
                yield embedded.done

    return embed


class _Processes:
    """The process of each device, started when a worker asks for it."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = devices
        self._running: dict[int, _Process] = {}
        self._lock = threading.Lock()

    def of(self, number: int) -> _Process:
        """The process of a device; a new process if the last one died."""
        with self._lock:
            running = self._running.get(number)
            if running is None or running.lost is not None:
                name = self._devices[number]
                running = self._running[number] = _Process(f"{number} on {name}", name)
            return running


class _Slot:
    """A worker of the pool: one of the `AHEAD` shards that a process works on."""

    def __init__(self, processes: _Processes, number: int) -> None:
        self._process = processes.of(number)
        self.name = self._process.name

    def encode(self, job: EmbedTask, shard: RowRange) -> EmbeddedShard:
        """Embed a shard, or raise `WorkerLost`."""
        return self._process.ask(job, shard).result()

    def close(self) -> None:
        """Kill the process."""
        self._process.process.kill()

    @property
    def process(self) -> Any:
        """The process."""
        return self._process.process


class _Process:
    """A process of this machine that embeds several shards at a time.

    Attributes:
        lost: how the process ended; None while it runs.
    """

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.lost: str | None = None
        # Spawned, not forked: threads and CUDA do not survive a fork.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, device, name), daemon=True)
        self.process.start()
        theirs.close()
        self._lock = threading.Lock()
        self._asked: dict[int, Future[EmbeddedShard]] = {}
        self._n_asked = 0
        self._task: EmbedTask | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, task: EmbedTask, shard: RowRange) -> Future[EmbeddedShard]:
        """Start a shard; the future raises `WorkerLost` when the process ends."""
        future: Future[EmbeddedShard] = Future()
        with self._lock:
            if self.lost is not None:
                raise WorkerLost(self.lost)
            self._n_asked += 1
            self._asked[self._n_asked] = future
            try:
                if self._task is not task:
                    self._connection.send(task)
                    self._task = task
                self._connection.send((self._n_asked, shard))
            except OSError as error:
                self._asked.pop(self._n_asked)
                raise WorkerLost("its process does not listen") from error
        return future

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, embedded = self._connection.recv()
                with self._lock:
                    future = self._asked.pop(number)
                future.set_result(embedded)
        self.process.join(10)
        with self._lock:
            self.lost = f"its process ended with exit code {self.process.exitcode}"
            asked = list(self._asked.values())
        for future in asked:
            future.set_exception(WorkerLost(self.lost))


def _serve(connection: Connection, device: str, name: str) -> None:
    """Serve a worker process until the pipe is closed, even in the middle of a shard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and SIGTERM are the parent's to handle
    lock = threading.Lock()
    answering = ThreadPoolExecutor(AHEAD)
    task: EmbedTask | None = None
    worker: ShardEncoder | None = None
    error: GteoptError | None = None

    def answer(number: int, future: Future[ShardDone] | None) -> None:
        embedded = EmbeddedShard(error=error) if future is None else _answer(future, device)
        with lock, suppress(OSError):
            connection.send((number, embedded))

    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):  # OSError if the parent was killed with unread answers
            # Without waiting for threads: the next run of the job embeds the unfinished shards.
            os._exit(0)
        if isinstance(message, EmbedTask):
            task, worker, error = message, None, None
            try:
                encoder = call_in_own_thread(partial(task.load, device))
                worker = ShardEncoder(task, encoder, name)
            except GteoptError as failure:
                error = failure
            except Exception as failure:
                error = _worded(failure, device)
            continue
        number, shard = message
        # Submitted here, so that shards are read in the order in which they were sent.
        future = None if worker is None else worker.submit(shard)
        answering.submit(answer, number, future)


def _answer(future: Future[ShardDone], device: str) -> EmbeddedShard:
    try:
        return EmbeddedShard(done=future.result())
    except GteoptError as error:
        return EmbeddedShard(error=error)
    except Exception as error:
        # An uncaught exception would end the process and be reported as out of memory.
        return EmbeddedShard(error=_worded(error, device))


def _worded(error: Exception, device: str) -> UnsupportedError:
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return UnsupportedError(f"{error.strerror}{where}; {RESUMES}")
    return UnsupportedError(f"a worker on {device} failed: {type(error).__name__}: {error}")
