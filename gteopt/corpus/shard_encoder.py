"""Embed shards of a corpus into files: one thread each reads, computes and writes.

Hides: the three threads, the batches, what happens to a text that gives no vector. Refuses to know:
who hands out shards, other workers.

The bits of a shard depend on its own rows alone: no batch holds texts of two shards. The longest
texts come first.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from gteopt.corpus.chunks import Span, chunk_tokens, find_chunk_spans
from gteopt.corpus.inputs import InputFile
from gteopt.corpus.options import EmbedOptions
from gteopt.corpus.rows import Reason, RowColumns, RowRange, RowReader, Rows
from gteopt.corpus.shard_files import (
    DATA,
    DEAD,
    DeadLetter,
    DecodeRecord,
    ShardContent,
    ShardRecord,
    Stored,
    dead_letters_to_parquet,
    read_done_footer,
    shard_name,
    shard_to_parquet,
)
from gteopt.corpus.storage import StorageFolder
from gteopt.errors import IntegrityError, UnsupportedError, is_out_of_memory
from gteopt.vectors.transform import VectorTransform

if TYPE_CHECKING:
    from gteopt.encoder.encoder import Encoder
    from gteopt.encoder.fetch import HostFetch

Floats = npt.NDArray[np.float32]
AHEAD = 3
"""Shards that a worker has at once: one is read, one is computed, one is written."""


@dataclass(frozen=True)
class EmbedTask:
    """What a worker needs to embed any shard of a job.

    Attributes:
        source: the model, as `gteopt.load` takes it; every worker must be able to read it.
        sha256: SHA-256 that the model's files must have.
        n_threads: threads of torch on a CPU.
        stored: the code of stored vectors.
        files: each input file and its path or URL, by its number in the job.
        out: folder of the job.
        fingerprint: hash of the job's settings.
        again: whether shards that are done are embedded again.
        arithmetic: how products are rounded; None if that does not differ between machines.
    """

    source: str
    sha256: str
    hub_dir: str | None
    n_threads: int
    options: EmbedOptions
    stored: Stored
    columns: RowColumns
    files: Mapping[int, tuple[InputFile, str]]
    out: str
    fingerprint: str
    again: bool = False
    arithmetic: str | None = None

    def load(self, device: str) -> Encoder:
        """Load the model on a device.

        Raises:
            IntegrityError: the model's files are not those of the job.
            UnsupportedError: this machine rounds products in another way than the job says.
        """
        import torch

        from gteopt.encoder.loading import load

        # No warning, because the record counts the texts that are cut.
        warnings.filterwarnings("ignore", message=".* and were cut there")
        torch.set_num_threads(self.n_threads)
        encoder = load(
            self.source,
            device=device,
            dtype=self.options.dtype,
            backend=self.options.backend,
            kernels=self.options.kernels,
            hub_dir=None if self.hub_dir is None else Path(self.hub_dir),
        )
        if encoder.sha256 != self.sha256:
            raise IntegrityError(
                f"{self.source} holds other files on this machine (SHA-256 {encoder.sha256[:16]} "
                f"instead of {self.sha256[:16]}); copy the same files to every machine, or share "
                f"the folder"
            )
        if self.arithmetic not in (None, encoder.arithmetic):
            raise UnsupportedError(
                f"{device} of this machine rounds products in another way ({encoder.arithmetic}) "
                f"than the job ({self.arithmetic}), so its vectors would differ; use machines of "
                f"one kind, or --dtype float32 with a model that is not quantized"
            )
        return encoder


@dataclass(frozen=True)
class ShardDone:
    """A shard that is on disk.

    Attributes:
        name: name of the shard's Parquet file.
        record: the footer of the file.
        operations: floating-point operations that the shard took.
        worker: name of the worker that wrote it.
    """

    name: str
    record: ShardRecord
    operations: float
    worker: str = "this process"


class EncoderStopped(Exception):
    """Raised in the threads when the job ends early: unfinished shards are given up."""


@dataclass
class _Tokenized:
    """A shard that was read and tokenized: M texts for the model (chunks, or documents)."""

    shard: RowRange
    rows: Rows
    positions: list[int]
    spans: list[list[Span]]
    texts: list[str]
    tokens: list[Any]
    faults: dict[int, tuple[Reason, str]]
    n_cut: int


def stored_transform(transform: VectorTransform, code: Stored) -> VectorTransform:
    """The transform with the code `code`, if that is not the artifact's own code."""
    if code == transform.code:
        return transform
    unfitted: dict[str, Any] = dict.fromkeys(
        ("low", "high", "bits", "centre", "codebook", "places")
    )
    return replace(transform, code="float32", **unfitted)


class ShardEncoder:
    """Embeds shards in the order in which they are submitted; a context manager.

    The caller keeps at most `AHEAD` submitted shards unfinished, because all of them may be in
    memory.
    """

    def __init__(self, task: EmbedTask, encoder: Encoder, name: str = "this process") -> None:
        """Start three threads that wait for shards; `name` names this worker in reports."""
        self._task = task
        self._name = name
        self._encoder = encoder
        self._tokenization = encoder.tokenization
        self._transform = stored_transform(encoder.vectors, task.stored)
        self._decode = DecodeRecord.of(self._transform, task.stored)
        self._reader = RowReader(task.files, task.columns)
        self._out = StorageFolder(task.out)
        self._batch_size = task.options.batch_size
        self._chunk = (0, 0)
        options = task.options
        if options.long.mode == "chunk":
            self._chunk = chunk_tokens(
                self._tokenization, options.role, options.instruction, options.long.tokens,
                options.long.overlap,
            )  # fmt: skip
        self._stop = threading.Event()
        self._stages = [ThreadPoolExecutor(1, f"gteopt-{n}") for n in ("read", "compute", "write")]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._stop.set()
        for stage in self._stages:
            stage.shutdown(wait=True, cancel_futures=kind is not None)
        self._reader.close()

    def submit(self, shard: RowRange) -> Future[ShardDone]:
        """Read, compute and write a shard, each in a thread of its own.

        The future raises errors of files and of the model. A bad row never raises: it becomes a
        dead letter.
        """
        read, compute, write = self._stages
        tokenized = read.submit(self._tokenize, shard)
        # No deadlock: a stage has one thread and takes shards in order, so the result that it
        # waits for was submitted earlier.
        computed = compute.submit(lambda: self._compute(tokenized.result()))
        return write.submit(lambda: self._write(*computed.result()))

    def embed(self, shards: Iterable[RowRange]) -> Iterator[ShardDone]:
        """Embed shards in their order, and compute in the calling thread.

        Another thread would be slower if this one has computed before: GNU OpenMP hardly waits for
        work while a process has more of its threads than cores.
        """
        read, _, write = self._stages
        remaining = iter(shards)
        reading: deque[Future[_Tokenized]] = deque()
        writing: deque[Future[ShardDone]] = deque()
        while True:
            while len(reading) + len(writing) < AHEAD:
                if (shard := next(remaining, None)) is None:
                    break
                reading.append(read.submit(self._tokenize, shard))
            if not reading:
                break
            computed = self._compute(reading.popleft().result())
            writing.append(write.submit(self._write, *computed))
            while writing and (writing[0].done() or len(writing) == AHEAD - 1):
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()

    # ---------------------------------------------------------------------------- read

    def _tokenize(self, shard: RowRange) -> _Tokenized:
        self._check_stop()
        options, tokenization = self._task.options, self._tokenization
        rows = self._reader.read(shard)
        positions = [i for i, text in enumerate(rows.texts) if text is not None]
        positions = [i for i in positions if i not in rows.faults]
        texts = [rows.texts[i] or "" for i in positions]
        chunks = [[(0, len(text))] for text in texts]
        if options.long.mode == "chunk":
            chunks = find_chunk_spans(tokenization, texts, *self._chunk)
            texts = [text[a:b] for text, parts in zip(texts, chunks, strict=True) for a, b in parts]
        tokens = tokenization.tokenize(texts, role=options.role, instruction=options.instruction)
        faults = dict(rows.faults)
        n_cut = sum(token_ids.is_cut for token_ids in tokens)
        if options.long.mode == "error" and n_cut:
            detail = f"more than {tokenization.max_tokens:,} tokens"
            faults |= {
                i: ("too_long", detail)
                for i, token_ids in zip(positions, tokens, strict=True)
                if token_ids.is_cut
            }
            keep = [n for n, i in enumerate(positions) if i not in faults]
            positions, chunks = [positions[n] for n in keep], [chunks[n] for n in keep]
            texts, tokens, n_cut = [texts[n] for n in keep], [tokens[n] for n in keep], 0
        return _Tokenized(shard, rows, positions, chunks, texts, tokens, faults, n_cut)

    # ------------------------------------------------------------------------- compute

    def _compute(self, read: _Tokenized) -> tuple[_Tokenized, Floats, float]:
        """Vectors [M, full_dims] and the operations that they took; NaN for a text without one."""
        lengths = [len(token_ids) for token_ids in read.tokens]
        out = np.empty((len(lengths), self._encoder.full_dims), np.float32)
        waiting: tuple[list[int], Sequence[Sequence[int]], HostFetch | None] | None = None
        # The next batch is started before the last one is fetched, so that a GPU is never idle.
        for positions, batch in self._tokenization.batches(
            read.tokens, self._task.options.batch_size
        ):
            self._check_stop()
            started = (positions, batch, self._started(batch))
            if waiting is not None:
                out[waiting[0]] = self._fetched(*waiting[1:])
            waiting = started
        if waiting is not None:
            out[waiting[0]] = self._fetched(*waiting[1:])
        return read, out, self._encoder.operations(lengths) if lengths else 0.0

    def _started(self, batch: Sequence[Sequence[int]]) -> HostFetch | None:
        """Start a batch; None if it is too large for the memory."""
        if len(batch) > self._batch_size:
            return None
        try:
            return self._encoder.start(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _fetched(self, batch: Sequence[Sequence[int]], started: HostFetch | None) -> Floats:
        """Vectors of a batch; computed in halves if memory is short; NaN for a text without one."""
        try:
            vectors: Floats = (started or self._encoder.start(batch)).wait().numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
        else:
            if len(batch) == 1 or np.isfinite(vectors).all():
                return vectors
            # One text at a time, because a bad text may spoil the vectors of its batch.
            return np.concatenate([self._fetched([token_ids], None) for token_ids in batch])
        if len(batch) == 1:
            raise UnsupportedError(
                f"{self._encoder.name}: a single text does not fit the memory of "
                f"{self._encoder.device} ({message}); use a device with more memory"
            )
        self._batch_size = max(1, len(batch) // 2)
        halves = (batch[: self._batch_size], batch[self._batch_size :])
        return np.concatenate([self._fetched(half, None) for half in halves])

    # --------------------------------------------------------------------------- write

    def _write(self, read: _Tokenized, vectors: Floats, operations: float) -> ShardDone:
        self._check_stop()
        shard, task = read.shard, self._task
        faults = dict(read.faults)
        counts = [len(parts) for parts in read.spans]
        ends = np.cumsum(counts, dtype=np.int64)
        is_finite = np.isfinite(vectors).all(axis=1)
        documents = np.repeat(np.arange(len(counts)), counts)
        for number in np.unique(documents[~is_finite]).tolist():
            faults[read.positions[number]] = ("not_finite", "the model gave NaN or infinity")
        kept = [n for n, i in enumerate(read.positions) if i not in faults]
        if task.options.pool == "mean":
            starts = ends - counts
            pooled = [vectors[starts[n] : ends[n]].mean(axis=0) for n in kept]
            vectors = np.stack(pooled) if pooled else vectors[:0]
            documents = np.array(kept, np.int64)
        else:
            chosen = np.isin(documents, kept)
            vectors, documents = vectors[chosen], documents[chosen]
        content = self._content(read, vectors, documents)
        record = ShardRecord(
            fingerprint=task.fingerprint,
            file=task.files[shard.file][0].identity,
            first=shard.first,
            n_rows=shard.n_rows,
            n_embedded=len(kept),
            n_vectors=len(content.rows),
            bad=_counted(faults),
            n_cut=read.n_cut,
            n_tokens=sum(len(token_ids) for token_ids in read.tokens),
            sha256=content.sha256(),
        )
        name = shard_name(task.fingerprint, record.file, shard)
        # Dead letters are written first, because the shard counts as done once its file exists.
        if faults:
            letters = [
                DeadLetter(shard.first + i, read.rows.ids[i], reason, detail)
                for i, (reason, detail) in sorted(faults.items())
            ]
            self._out.write(f"{DEAD}/{name}", dead_letters_to_parquet(content.file, letters))
        elif task.again:
            self._out.remove(f"{DEAD}/{name}")
        stored = shard_to_parquet(content, record, self._decode, task.options.vector_type)
        if task.again:
            self._out.write(f"{DATA}/{name}", stored)
        elif not self._out.create(f"{DATA}/{name}", stored):
            earlier = read_done_footer(self._out, name, (task.fingerprint, record.file, shard))
            if earlier is None:  # the file there is cut short
                self._out.write(f"{DATA}/{name}", stored)
            else:
                record = earlier  # another worker was faster
        return ShardDone(name, record, operations, self._name)

    def _content(
        self, read: _Tokenized, vectors: Floats, documents: npt.NDArray[np.int64]
    ) -> ShardContent:
        """The shard's content: vectors [N, full_dims] and the document of each [N]."""
        task = self._task
        positions = np.array(read.positions, np.int64)[documents]
        stored: npt.NDArray[Any] = self._transform.quantize(self._transform.project(vectors))
        if task.stored == "float16":
            stored = stored.astype(np.float16)
        chunks = None
        if task.options.long.mode == "chunk" and task.options.pool == "none":
            wanted = set(documents.tolist())
            chunks = np.array(
                [
                    (number, *span)
                    for n, parts in enumerate(read.spans)
                    if n in wanted
                    for number, span in enumerate(parts)
                ],
                np.int32,
            ).reshape(-1, 3)
        return ShardContent(
            file=task.files[read.shard.file][0].name,
            rows=read.shard.first + positions,
            ids=[read.rows.ids[i] for i in positions.tolist()],
            chunks=chunks,
            vectors=stored,
            kept=read.rows.kept.take(positions) if read.rows.kept.num_columns else read.rows.kept,
        )

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise EncoderStopped


def _counted(faults: Mapping[int, tuple[Reason, str]]) -> dict[Reason, int]:
    counts: dict[Reason, int] = {}
    for reason, _ in faults.values():
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))
