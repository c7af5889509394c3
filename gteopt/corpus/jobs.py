"""Run an embedding job: plan it, embed the missing shards, check that no row is lost.

Hides: how a job goes on after it was killed, what a run reports. Refuses to know: the command line,
how rows are read and shards written.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gteopt.corpus.ids import count_duplicate_ids, list_duplicate_ids
from gteopt.corpus.inputs import Corpus, check_input_unchanged, find_corpus
from gteopt.corpus.options import EmbedOptions, TextTemplate
from gteopt.corpus.plan import (
    EmbeddingRecord,
    FileCount,
    ShardPlan,
    agree_plan_files,
    fingerprint_settings,
    plan_shards,
    read_embedding_record,
    write_embedding_record,
)
from gteopt.corpus.rows import RowColumns, RowRange, RowReader, find_kept_schema
from gteopt.corpus.shard_encoder import EmbedTask, ShardDone, ShardEncoder, stored_transform
from gteopt.corpus.shard_files import (
    DecodeRecord,
    ShardRecord,
    Stored,
    read_done_footers,
    read_shard,
)
from gteopt.corpus.storage import StorageFolder
from gteopt.corpus.tally import Tally, WorkerShare
from gteopt.corpus.vector_cache import FORWARD_SCHEMA
from gteopt.errors import InputError, IntegrityError
from gteopt.frozen import Frozen
from gteopt.model.artifact import lock_stage
from gteopt.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from gteopt.encoder.description import EncoderDescription
    from gteopt.encoder.encoder import Encoder

Events = Callable[[str, Mapping[str, Any]], None]
"""Called with the name of each event and its facts, which JSON can hold."""
RunShards = Callable[[EmbedTask, Sequence[RowRange]], Iterator[ShardDone]]
"""Embeds shards, here or elsewhere, and yields each when it is on disk, in any order."""


def ignore_job_event(event: str, facts: Mapping[str, Any]) -> None:
    """Ignore an event."""


class EmbedReport(Frozen):
    """What a run of a job did, and what its folder holds now.

    Attributes:
        n_rows: rows of the whole corpus; each has a vector or is a dead letter.
        n_embedded: rows with vectors.
        n_vectors: vectors; more than `n_embedded` if texts are cut into chunks.
        bad: number of dead letters by reason.
        n_cut: texts that were truncated.
        n_duplicate_ids: rows whose id an earlier row has; None without a column of ids.
        n_bytes: bytes of the vectors.
        shards_before: shards that an earlier run had finished.
        shards_now: shards that this run embedded.
        texts_now: rows that this run embedded.
        tokens_now: tokens that the model read in this run.
        operations_now: floating-point operations of this run.
        seconds: from the first shard to the last.
        workers: what each worker did in this run, sorted by its name.
        dollars: cost of this run; None without a price.
        backend: the library that computed the vectors.
        backend_reason: why "auto" took that library in this run; None otherwise.
        peak_ratio: operations a second of this run, divided by those of the fastest large matrix
            product of any number type on the same device; None if that was not measured.
    """

    out: str
    n_rows: int
    n_embedded: int
    n_vectors: int
    bad: dict[str, int]
    n_cut: int
    n_tokens: int
    n_duplicate_ids: int | None
    n_bytes: int
    shards_before: int
    shards_now: int
    texts_now: int
    tokens_now: int
    operations_now: float
    seconds: float
    workers: tuple[WorkerShare, ...] = ()
    dollars: float | None = None
    backend: str | None = None
    backend_reason: str | None = None
    peak_ratio: float | None = None

    @property
    def n_bad(self) -> int:
        """Dead letters."""
        return sum(self.bad.values())


@dataclass(frozen=True)
class EmbedJob:
    """A planned job: a corpus, a model and a folder whose content belongs to this job.

    Attributes:
        record: embedding.json as it is before the run.
        backend_reason: see `EmbedReport`.
    """

    task: EmbedTask
    plan: ShardPlan
    corpus: Corpus
    record: EmbeddingRecord
    folder: StorageFolder
    backend_reason: str | None = None


@dataclass(frozen=True)
class JobWishes:
    """Options of a run that change no vector.

    Attributes:
        grow: whether new files may join a job.
        retry_failed: whether shards with dead letters are embedded again.
        unique_ids: whether a duplicate id is an error.
        price_per_hour: dollars for all machines together.
        hub_dir: folder in the Hub's layout to read models and data sets from.
    """

    grow: bool = False
    retry_failed: bool = False
    unique_ids: bool = False
    price_per_hour: float | None = None
    hub_dir: Path | None = None


@dataclass(frozen=True)
class JobRequest:
    """The inputs, the model and the folder of an embedding job.

    Attributes:
        inputs: files, folders, globs, URLs or data set names; see `find_corpus`.
        model: a folder or a name that `gteopt.load` takes.
        out: folder of the job.
        options: everything that decides the vectors.
    """

    inputs: tuple[str, ...]
    model: str
    out: str | Path
    options: EmbedOptions


def prepare_job(
    request: JobRequest,
    encoder: EncoderDescription,
    *,
    wishes: JobWishes = JobWishes(),
    reads_only: bool = False,
    progress: Progress = ignore_progress,
) -> EmbedJob:
    """Find the corpus, compare it with what the folder holds, and cut it into shards.

    Args:
        request: inputs, model and folder.
        encoder: the model, loaded or described.
        wishes: how the job is run.
        reads_only: whether no vector is added; then a machine with other rounding is accepted.
        progress: called with the bytes whose rows are counted.

    Raises:
        InputError: inputs cannot be read, or the folder belongs to another job.
    """
    # "auto" has been decided; every worker takes the same.
    options = request.options.model_copy(update={"backend": encoder.backend})
    folder = StorageFolder(request.out)
    corpus = find_corpus(request.inputs, role=options.role, hub_dir=wishes.hub_dir)
    stored = _stored(encoder, options)
    settings = _settings(encoder, options, corpus, stored)
    if reads_only and (earlier := read_embedding_record(folder)) is not None:
        settings["arithmetic"] = earlier.settings.get("arithmetic")
    files = agree_plan_files(folder, settings, corpus, grow=wishes.grow)
    template = TextTemplate(settings["text"] or "text")
    present = [(file, corpus.places[file.name]) for file in files if file.name in corpus.places]
    columns = RowColumns(
        template, settings["id"], options.keep, find_kept_schema(present, options.keep)
    )
    plan = plan_shards(folder, files, corpus, columns, settings=settings, progress=progress)
    task = EmbedTask(
        source=request.model,
        sha256=encoder.sha256,
        hub_dir=None if wishes.hub_dir is None else str(wishes.hub_dir.absolute()),
        n_threads=_n_threads(),
        options=options,
        stored=stored,
        columns=columns,
        files={
            number: (file, corpus.places[file.name])
            for number, file in enumerate(files)
            if file.name in corpus.places
        },
        out=str(request.out if folder.local is None else folder.local),
        fingerprint=fingerprint_settings(settings),
        again=wishes.retry_failed,
        arithmetic=settings["arithmetic"],
    )
    rows = [0] * len(files)
    for shard in plan.shards.values():
        rows[shard.file] += shard.n_rows
    if not sum(rows):
        raise InputError(f"{', '.join(request.inputs)}: {len(files)} files without any row")
    transform = stored_transform(encoder.vectors, stored)
    record = EmbeddingRecord(
        complete=False,
        fingerprint=plan.fingerprint,
        settings=settings,
        model=request.model,
        hub_dir=task.hub_dir,
        decode=DecodeRecord.of(transform, stored),
        rescore=transform.rescore if transform.rescores else 1,
        files=tuple(FileCount(file=f, n_rows=n) for f, n in zip(files, rows, strict=True)),
    )
    return EmbedJob(task, plan, corpus, record, folder, encoder.runtime.backend_reason)


def lock_job(out: str | Path) -> AbstractContextManager[None]:
    """Lock the job's folder, and remove half-written files of a killed job.

    Raises:
        InputError: another process embeds into the folder.
    """
    local = StorageFolder(out).local
    return nullcontext() if local is None else _alone(local / StorageFolder.TEMPORARY)


class _alone:
    def __init__(self, temporary: Path) -> None:
        self._temporary = temporary
        self._lock = lock_stage(temporary)

    def __enter__(self) -> None:
        try:
            self._lock.__enter__()
        except InputError as error:
            raise InputError(
                f"another process is embedding into {self._temporary.parent}; wait for it, or give "
                f"another --out"
            ) from error
        self._clear()

    def __exit__(self, *error: Any) -> None:
        self._clear()
        self._lock.__exit__(*error)
        if self._temporary.parent.is_dir() and not any(self._temporary.parent.iterdir()):
            self._temporary.parent.rmdir()  # the job wrote nothing

    def _clear(self) -> None:
        for path in self._temporary.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def run_job(
    job: EmbedJob,
    embed: RunShards,
    *,
    wishes: JobWishes = JobWishes(),
    progress: Progress = ignore_progress,
    events: Events = ignore_job_event,
) -> EmbedReport:
    """Embed the shards that are not done, and write embedding.json.

    Args:
        job: see `prepare_job`.
        embed: embeds the shards, in this process, in others or on a cluster.
        wishes: how the job is run.
        progress: called with the rows that are done.
        events: called at the start, after each shard and at the end.

    Raises:
        InputError: an input file changed, or ids repeat although `unique_ids` is set.
        IntegrityError: a row has neither a vector nor a dead letter.
        GteoptError: what a worker raised.
    """
    plan, folder = job.plan, job.folder
    if wishes.unique_ids:
        _refuse_duplicates(job)
    before = read_embedding_record(folder)
    done = read_done_footers(folder, plan.expected())
    kept = {
        name: record for name, record in done.items() if not (wishes.retry_failed and record.n_bad)
    }
    todo = [shard for name, shard in plan.shards.items() if name not in kept]
    unchanged = before is not None and before.complete and not todo
    if not unchanged:
        write_embedding_record(folder, job.record)
    _check_files(job, todo)
    facts = {"rows": plan.n_rows, "shards": len(plan.shards), "shards_done": len(kept)}
    events("start", {"out": str(folder), **facts})
    n_kept = sum(record.n_rows for record in kept.values())
    tally = Tally(plan.n_rows, n_kept, wishes.price_per_hour)
    n_before, n_todo = tally.n_done, tally.n_rows - tally.n_done
    progress("embedding rows", 0, n_todo)
    for shard in embed(job.task, todo) if todo else ():
        kept[shard.name] = shard.record
        tally.add(shard)
        progress("embedding rows", tally.n_done - n_before, n_todo)
        facts = {"rows": shard.record.n_rows, **tally.facts()}
        worker = tally.workers[shard.worker].model_dump()
        events("shard", {"name": shard.name, **facts, "worker": worker})
    # Checked again: a file that changed during the run must not end in a complete folder.
    _check_files(job, todo)
    record = _counted(job, kept)
    if unchanged and before is not None:
        record = record.model_copy(update={"n_duplicate_ids": before.n_duplicate_ids})
    elif record.settings["id"] is not None:
        n_twice = count_duplicate_ids(lambda: _stored_ids(folder, plan), plan.n_rows)
        record = record.model_copy(update={"n_duplicate_ids": n_twice})
    if not unchanged or before != record:
        write_embedding_record(folder, record)
    report = _report(job, record, tally, len(todo))
    events("end", report.model_dump())
    return report


def _report(job: EmbedJob, record: EmbeddingRecord, tally: Tally, n_todo: int) -> EmbedReport:
    return EmbedReport(
        out=str(job.folder),
        n_rows=record.n_rows,
        n_embedded=sum(file.n_embedded for file in record.files),
        n_vectors=record.n_vectors,
        bad=record.bad,
        n_cut=record.n_cut,
        n_tokens=record.n_tokens,
        n_duplicate_ids=record.n_duplicate_ids,
        n_bytes=record.n_vectors * record.decode.bytes_per_vector,
        shards_before=len(job.plan.shards) - n_todo,
        shards_now=n_todo,
        texts_now=tally.n_texts,
        tokens_now=tally.n_tokens,
        operations_now=tally.operations,
        seconds=tally.seconds,
        workers=tuple(tally.workers[name] for name in sorted(tally.workers)),
        dollars=tally.dollars,
        backend=record.settings["backend"],
        backend_reason=job.backend_reason,
    )


def embed_in_process(encoder: Encoder) -> RunShards:
    """Embed in this process, with a model that is loaded."""

    def embed(task: EmbedTask, shards: Sequence[RowRange]) -> Iterator[ShardDone]:
        with ShardEncoder(task, encoder) as worker:
            yield from worker.embed(shards)

    return embed


def _stored(encoder: EncoderDescription, options: EmbedOptions) -> Stored:
    return encoder.vectors.code if options.code == "artifact" else options.code


def _settings(
    encoder: EncoderDescription, options: EmbedOptions, corpus: Corpus, stored: Stored
) -> dict[str, str | None]:
    """Everything that decides the vectors and their files, as text, by the option's name."""
    transform = stored_transform(encoder.vectors, stored)
    return {
        "model": encoder.sha256,
        "vectors": f"{transform.sha256()[:16]} as {stored}",
        "vector_type": options.vector_type,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "backend": encoder.backend,
        "arithmetic": _arithmetic(encoder),
        **({} if options.kernels == "deterministic" else {"kernels": options.kernels}),
        "forward": FORWARD_SCHEMA,
        "role": options.role,
        "prompt": _prompt(encoder, options),
        "text": options.text or corpus.text or "text",
        "id": options.id or corpus.id,
        "keep": ",".join(options.keep) or None,
        "long": str(options.long),
        "pool": options.pool,
        "batch_size": str(options.batch_size),
        "shard_rows": str(options.shard_rows),
    }


def _arithmetic(encoder: EncoderDescription) -> str | None:
    """How products are rounded, if that differs between machines; None for float32 and float64,
    where machines differ only in the order of sums.
    """
    exact = str(encoder.dtype) in ("torch.float32", "torch.float64")
    if exact and encoder.backend == "torch" and not encoder.checkpoint.is_quantized:
        return None
    return encoder.arithmetic


def _prompt(encoder: EncoderDescription, options: EmbedOptions) -> str:
    """The text that is put before each text.

    Raises:
        InputError: the model needs an instruction and none is given, or it takes none.
    """
    from gteopt.encoder.tokenization import Tokenization

    checkpoint = encoder.checkpoint
    has_template = checkpoint.query_template is not None
    if options.role == "query" and has_template and not options.instruction:
        if not checkpoint.default_instruction:
            raise InputError(
                f"{encoder.name} needs an instruction for queries and has no default; give "
                f"--instruction"
            )
        warnings.warn(
            f"queries get the default instruction of {encoder.name}, "
            f"'{checkpoint.default_instruction}'; --instruction changes it",
            stacklevel=4,
        )
    return Tokenization(checkpoint).prompt(options.role, options.instruction)


def _n_threads() -> int:
    import torch

    return torch.get_num_threads()


def _check_files(job: EmbedJob, todo: Sequence[RowRange]) -> None:
    """Check that the files to read are there and have not changed since they were planned."""
    for number in {shard.file for shard in todo}:
        if number not in job.task.files:
            name = job.plan.files[number].name
            raise InputError(
                f"{name} is only partly embedded, and is not among the inputs any more; name it too"
            )
        check_input_unchanged(*job.task.files[number])


def _counted(job: EmbedJob, done: Mapping[str, ShardRecord]) -> EmbeddingRecord:
    """embedding.json of the finished job.

    Raises:
        IntegrityError: a row has neither a vector nor a dead letter.
    """
    counts = [[0, 0, 0] for _ in job.plan.files]
    bad: dict[str, int] = {}
    n_cut = n_tokens = 0
    for name, shard in job.plan.shards.items():
        record = done[name]
        for column, n in enumerate((record.n_embedded, record.n_vectors, record.n_bad)):
            counts[shard.file][column] += n
        for reason, n in record.bad.items():
            bad[reason] = bad.get(reason, 0) + n
        n_cut += record.n_cut
        n_tokens += record.n_tokens
    files = tuple(
        file.model_copy(update={"n_embedded": n_embedded, "n_vectors": n_vectors, "n_bad": n_bad})
        for file, (n_embedded, n_vectors, n_bad) in zip(job.record.files, counts, strict=True)
    )
    wrong = [count.file.name for count in files if count.n_rows != count.n_embedded + count.n_bad]
    if wrong:
        raise IntegrityError(
            f"{job.folder}: some rows of {', '.join(wrong)} have neither a vector nor a dead "
            f"letter; run --verify, remove the shards that it names, and run the job again"
        )
    return job.record.model_copy(
        update={
            "complete": True,
            "files": files,
            "bad": dict(sorted(bad.items())),
            "n_cut": n_cut,
            "n_tokens": n_tokens,
        }
    )


def _stored_ids(folder: StorageFolder, plan: ShardPlan) -> Iterator[list[str]]:
    """Ids of the documents of each shard; a document with several chunks counts once."""
    for name in plan.shards:
        table = read_shard(folder, name, ["id", "row"])
        rows = table["row"].to_pylist()
        ids = table["id"].to_pylist()
        yield [id_ for n, id_ in enumerate(ids) if n == 0 or rows[n] != rows[n - 1]]


def _refuse_duplicates(job: EmbedJob) -> None:
    """Check the ids of the whole corpus before anything is embedded.

    Raises:
        InputError: there is no column of ids, or an id repeats.
    """
    column = job.record.settings["id"]
    if column is None:
        raise InputError("--unique-ids needs --id: without it, each row gets a unique id")
    columns = RowColumns(TextTemplate(column), column)

    def ids() -> Iterator[list[str]]:
        reader = RowReader(job.task.files, columns)
        try:
            for shard in job.plan.shards.values():
                if shard.file in job.task.files:
                    yield reader.read(shard).ids
        finally:
            reader.close()

    n_twice = count_duplicate_ids(ids, job.plan.n_rows)
    if n_twice:
        shown = ", ".join(repr(id_) for id_ in list_duplicate_ids(ids()))
        raise InputError(
            f"column {column} repeats {n_twice:,} ids of earlier rows ({shown}); make them "
            f"unique, or leave out --unique-ids"
        )
