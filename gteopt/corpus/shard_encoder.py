"""Shards of a corpus to files: read and tokenized ahead, computed, written behind.

Hides: the three threads, the batches, what happens to a text that gives no vector. Refuses to know:
who hands out shards, other workers.

A shard's bits follow from its own rows: its batches are cut from them alone, longest texts first.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from gteopt.corpus.chunks import Span, chunk_tokens, spans
from gteopt.corpus.inputs import InputFile
from gteopt.corpus.options import EmbedOptions
from gteopt.corpus.rows import Columns, Reason, RowRange, RowReader, Rows
from gteopt.corpus.shard_files import (
    DATA,
    DEAD,
    DeadLetter,
    Decode,
    ShardContent,
    ShardRecord,
    Stored,
    dead_letters_to_parquet,
    done_footer,
    shard_name,
    to_parquet,
)
from gteopt.corpus.storage import Folder
from gteopt.errors import IntegrityError, UnsupportedError, is_out_of_memory
from gteopt.vectors.transform import VectorTransform

if TYPE_CHECKING:
    from gteopt.encoder.encoder import Encoder
    from gteopt.encoder.fetch import Fetch

Floats = npt.NDArray[np.float32]
AHEAD = 3
"""Shards of a worker at once: one is read, one is computed, one is written."""


@dataclass(frozen=True)
class EmbedTask:
    """What a worker needs to embed any shard of a job.

    Attributes:
        source: of the model, as `gteopt.load` takes it; readable by every worker.
        sha256: of the files that it must turn out to be.
        n_threads: of torch, on a CPU.
        files: by number, with where they lie.
        out: the folder of the job.
        again: whether shards that are done are embedded again.
        arithmetic: how products are rounded; None where machines do not differ in it.
    """

    source: str
    sha256: str
    hub_dir: str | None
    n_threads: int
    options: EmbedOptions
    stored: Stored
    columns: Columns
    files: Mapping[int, tuple[InputFile, str]]
    out: str
    fingerprint: str
    again: bool = False
    arithmetic: str | None = None

    def load(self, device: str) -> Encoder:
        """The model on a device.

        Raises:
            IntegrityError: other files than those of the job.
            UnsupportedError: this machine rounds products in another way than the job says.
        """
        import torch

        from gteopt.encoder.loading import load

        # Truncated texts are counted in the record.
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
                f"{self.source} holds other files here (SHA-256 {encoder.sha256[:16]} instead of "
                f"{self.sha256[:16]}); copy the same to every machine, or share the folder"
            )
        if self.arithmetic not in (None, encoder.arithmetic):
            raise UnsupportedError(
                f"{device} of this machine rounds products otherwise ({encoder.arithmetic}) than "
                f"the job says ({self.arithmetic}), so that its vectors would differ; use machines "
                f"of one kind, or compute in --dtype float32 what is not quantized"
            )
        return encoder


@dataclass(frozen=True)
class Done:
    """A shard that is on disk.

    Attributes:
        operations: floating-point operations that it took.
        worker: who wrote it.
    """

    name: str
    record: ShardRecord
    operations: float
    worker: str = "this process"


class Stopped(Exception):
    """The worker was told to leave its shards as they are."""


@dataclass
class _Tokenized:
    """A shard that was read: M texts of the model (chunks, or documents)."""

    shard: RowRange
    rows: Rows
    positions: list[int]
    spans: list[list[Span]]
    texts: list[str]
    tokens: list[Any]
    faults: dict[int, tuple[Reason, str]]
    n_cut: int


def stored_transform(transform: VectorTransform, code: Stored) -> VectorTransform:
    """A transform that stores vectors by another code than the artifact's."""
    if code == transform.code:
        return transform
    none: dict[str, Any] = dict.fromkeys(("low", "high", "bits", "centre", "codebook", "places"))
    return replace(transform, code="float32", **none)


class ShardEncoder:
    """Embeds shards in the order in which they are submitted; a context manager.

    At most `AHEAD` shards are in memory, if no more are submitted before one is done.
    """

    def __init__(self, task: EmbedTask, encoder: Encoder, name: str = "this process") -> None:
        """Three threads wait for shards; `name` tells workers of a job apart."""
        self._task = task
        self._name = name
        self._encoder = encoder
        self._tokenization = encoder.tokenization
        self._transform = stored_transform(encoder.vectors, task.stored)
        self._decode = Decode.of(self._transform, task.stored)
        self._reader = RowReader(task.files, task.columns)
        self._out = Folder(task.out)
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

    def submit(self, shard: RowRange) -> Future[Done]:
        """Read, compute and write a shard.

        The future raises what `gteopt.load`, a file or the model raises; a row alone never does.
        """
        read, compute, write = self._stages
        tokenized = read.submit(self._tokenize, shard)
        # A stage has one thread and takes shards in order: what it waits for was begun before.
        computed = compute.submit(lambda: self._compute(tokenized.result()))
        return write.submit(lambda: self._write(*computed.result()))

    # ---------------------------------------------------------------------------- read

    def _tokenize(self, shard: RowRange) -> _Tokenized:
        self._check_stop()
        options, tokenization = self._task.options, self._tokenization
        rows = self._reader.read(shard)
        positions = [i for i, text in enumerate(rows.texts) if text is not None]
        positions = [i for i in positions if i not in rows.faults]
        texts = [rows.texts[i] or "" for i in positions]
        whole = [[(0, len(text))] for text in texts]
        if options.long.mode == "chunk":
            whole = spans(tokenization, texts, *self._chunk)
            texts = [text[a:b] for text, parts in zip(texts, whole, strict=True) for a, b in parts]
        tokens = tokenization.tokenize(texts, role=options.role, instruction=options.instruction)
        faults = dict(rows.faults)
        n_cut = sum(each.is_cut for each in tokens)
        if options.long.mode == "error" and n_cut:
            most = f"more than {tokenization.max_tokens:,} tokens"
            faults |= {
                i: ("too_long", most)
                for i, each in zip(positions, tokens, strict=True)
                if each.is_cut
            }
            keep = [n for n, i in enumerate(positions) if i not in faults]
            positions, whole = [positions[n] for n in keep], [whole[n] for n in keep]
            texts, tokens, n_cut = [texts[n] for n in keep], [tokens[n] for n in keep], 0
        return _Tokenized(shard, rows, positions, whole, texts, tokens, faults, n_cut)

    # ------------------------------------------------------------------------- compute

    def _compute(self, read: _Tokenized) -> tuple[_Tokenized, Floats, float]:
        """Vectors [M, full_dims] and the operations that they took; NaN where there is none."""
        lengths = [len(each) for each in read.tokens]
        out = np.empty((len(lengths), self._encoder.full_dims), np.float32)
        waiting: tuple[list[int], Sequence[Sequence[int]], Fetch | None] | None = None
        # One batch is waited for after the next one is started, so that a GPU never waits.
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

    def _started(self, batch: Sequence[Sequence[int]]) -> Fetch | None:
        """Vectors that are being computed; None where the batch is too large for the memory."""
        if len(batch) > self._batch_size:
            return None
        try:
            return self._encoder.start(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _fetched(self, batch: Sequence[Sequence[int]], started: Fetch | None) -> Floats:
        """Vectors of a batch, in halves where its memory is short; NaN for a text without one."""
        try:
            found: Floats = (started or self._encoder.start(batch)).wait().numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).splitlines()[0]
        else:
            if len(batch) == 1 or np.isfinite(found).all():
                return found
            # Which text it was shows when each is computed alone.
            return np.concatenate([self._fetched([each], None) for each in batch])
        if len(batch) == 1:
            raise UnsupportedError(
                f"{self._encoder.name}: a single text does not fit the memory of "
                f"{self._encoder.device} ({said}); use a device with more"
            )
        self._batch_size = max(1, len(batch) // 2)
        halves = (batch[: self._batch_size], batch[self._batch_size :])
        return np.concatenate([self._fetched(half, None) for half in halves])

    # --------------------------------------------------------------------------- write

    def _write(self, read: _Tokenized, vectors: Floats, operations: float) -> Done:
        self._check_stop()
        shard, task = read.shard, self._task
        faults = dict(read.faults)
        counts = [len(parts) for parts in read.spans]
        ends = np.cumsum(counts, dtype=np.int64)
        fine = np.isfinite(vectors).all(axis=1)
        documents = np.repeat(np.arange(len(counts)), counts)
        for number in np.unique(documents[~fine]).tolist():
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
            n_tokens=sum(len(each) for each in read.tokens),
            sha256=content.sha256(),
        )
        name = shard_name(task.fingerprint, record.file, shard)
        # The dead letters first: the shard is done once its own file is there.
        if faults:
            letters = [
                DeadLetter(shard.first + i, read.rows.ids[i], reason, detail)
                for i, (reason, detail) in sorted(faults.items())
            ]
            content_of = dead_letters_to_parquet(content.file, letters)
            self._out.write(f"{DEAD}/{name}", content_of)
        elif task.again:
            self._out.remove(f"{DEAD}/{name}")
        stored = to_parquet(content, record, self._decode, task.options.vector_type)
        if task.again:
            self._out.write(f"{DATA}/{name}", stored)
        elif not self._out.create(f"{DATA}/{name}", stored):
            there = done_footer(self._out, name, (task.fingerprint, record.file, shard))
            if there is None:  # a file that was cut off is no shard
                self._out.write(f"{DATA}/{name}", stored)
            else:
                record = there  # another worker's, which was faster
        return Done(name, record, operations, self._name)

    def _content(
        self, read: _Tokenized, vectors: Floats, documents: npt.NDArray[np.int64]
    ) -> ShardContent:
        """What is stored of vectors [N, full_dims] of these documents [N]."""
        task = self._task
        places = np.array(read.positions, np.int64)[documents]
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
            rows=read.shard.first + places,
            ids=[read.rows.ids[i] for i in places.tolist()],
            chunks=chunks,
            vectors=stored,
            kept=read.rows.kept.take(places) if read.rows.kept.num_columns else read.rows.kept,
        )

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _counted(faults: Mapping[int, tuple[Reason, str]]) -> dict[Reason, int]:
    found: dict[Reason, int] = {}
    for reason, _ in faults.values():
        found[reason] = found.get(reason, 0) + 1
    return dict(sorted(found.items()))
