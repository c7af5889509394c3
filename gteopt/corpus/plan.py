"""Plan a job's settings, files and shards, and compare later runs with that plan.

Hides: embedding.json and the plan of each file. Refuses to know: how rows are read, models, who
does the work. A shard is done when its own footer says so; no list of finished shards is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, ValidationError

from gteopt.corpus.inputs import Corpus, InputFile
from gteopt.corpus.rows import RowColumns, RowRange, cut_rows
from gteopt.corpus.shard_files import DecodeRecord, shard_name
from gteopt.corpus.storage import StorageFolder
from gteopt.errors import InputError, IntegrityError, join_problems
from gteopt.frozen import Frozen
from gteopt.progress import Progress
from gteopt.records.files import record_to_json

RECORD = "embedding.json"
PLAN = "_plan"


class FileCount(Frozen):
    """A file of the corpus and the counts of its rows: n_rows = n_embedded + n_bad.

    Attributes:
        file: the file as it was when the job was planned.
        n_vectors: more than `n_embedded` if texts are cut into chunks.
    """

    file: InputFile
    n_rows: int
    n_embedded: int = 0
    n_vectors: int = 0
    n_bad: int = 0


class EmbeddingRecord(Frozen):
    """embedding.json: what an embedding folder holds.

    Attributes:
        complete: whether every row has its vector or its dead letter.
        fingerprint: hash of `settings`.
        settings: everything that decides the vectors and how they are stored, by the option's name.
        model: the model that `gteopt search` loads for queries.
        decode: how to decode stored vectors.
        rescore: candidates for each result that a search by codes scores again.
        files: every file of the corpus, in order.
        bad: number of dead letters by reason.
        n_duplicate_ids: rows whose id an earlier row has; None without a column of ids.
    """

    schema_: Literal["gteopt.embedding/1"] = Field(default="gteopt.embedding/1", alias="schema")
    complete: bool
    fingerprint: str
    settings: dict[str, str | None]
    model: str
    hub_dir: str | None = None
    decode: DecodeRecord
    rescore: int = 1
    files: tuple[FileCount, ...]
    bad: dict[str, int] = Field(default_factory=dict)
    n_cut: int = 0
    n_tokens: int = 0
    n_duplicate_ids: int | None = None

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(file.n_rows for file in self.files)

    @property
    def n_vectors(self) -> int:
        """Vectors of all files."""
        return sum(file.n_vectors for file in self.files)

    @property
    def n_bad(self) -> int:
        """Dead letters of all files."""
        return sum(file.n_bad for file in self.files)


class _FilePlan(Frozen):
    """The shards of one file."""

    schema_: Literal["gteopt.plan/1"] = Field(default="gteopt.plan/1", alias="schema")
    file: InputFile
    shard_rows: int
    shards: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ShardPlan:
    """Every shard of a job.

    Attributes:
        files: input files; a shard names its file by the position in this tuple.
        shards: rows of each shard by the name of its Parquet file, in the order of the input.
    """

    fingerprint: str
    files: tuple[InputFile, ...]
    shards: dict[str, RowRange]

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(shard.n_rows for shard in self.shards.values())

    def expected(self) -> dict[str, tuple[str, str, RowRange]]:
        """What the footer of each shard must say, by the name of its Parquet file."""
        identities = [file.identity for file in self.files]
        return {
            name: (self.fingerprint, identities[shard.file], shard)
            for name, shard in self.shards.items()
        }


def fingerprint_settings(settings: dict[str, str | None]) -> str:
    """The hash that footers carry."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def read_embedding_record(folder: StorageFolder) -> EmbeddingRecord | None:
    """Read the embedding.json of a folder; None if there is no such file.

    Raises:
        IntegrityError: the file is not valid.
    """
    content = folder.read(RECORD)
    if content is None:
        return None
    try:
        return EmbeddingRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(
            f"{folder}/{RECORD} is not valid ({'.'.join(map(str, first['loc']))}: {first['msg']}); "
            f"it was edited, or written by another version of gteopt"
        ) from error


def write_embedding_record(folder: StorageFolder, record: EmbeddingRecord) -> None:
    """Write embedding.json."""
    folder.write(RECORD, record_to_json(record).encode())


def agree_plan_files(
    folder: StorageFolder, settings: dict[str, str | None], corpus: Corpus, *, grow: bool
) -> tuple[InputFile, ...]:
    """The files of the job; the files of an earlier run come first.

    Raises:
        InputError: the folder belongs to another job, or holds other files. Lists every difference.
    """
    earlier = read_embedding_record(folder)
    if earlier is None:
        # A job that was killed while it counted rows leaves a plan and nothing else.
        others = {name.split("/")[0] for name in folder.names("")} - {StorageFolder.TEMPORARY, PLAN}
        if others:
            raise InputError(
                f"{folder} holds other files ({', '.join(sorted(others)[:5])}); give a new folder "
                f"as --out"
            )
        return corpus.files
    problems = [
        f"{name} is {_shown(settings.get(name))}, and was {_shown(earlier.settings.get(name))}"
        for name in sorted({*settings, *earlier.settings})
        if settings.get(name) != earlier.settings.get(name)
    ]
    now = {file.name: file for file in corpus.files}
    before = {count.file.name: count.file for count in earlier.files}
    for name, file in before.items():
        if name not in now:
            if not grow:
                problems.append(f"{name} is not among the inputs any more")
        elif now[name].identity != file.identity:
            problems.append(
                f"{name} has changed ({file.n_bytes:,} bytes then, {now[name].n_bytes:,} now)"
            )
    new = [file for name, file in now.items() if name not in before]
    if new and not grow:
        shown = ", ".join(file.name for file in new[:5]) + (" ..." if len(new) > 5 else "")
        problems.append(f"{len(new)} files are new ({shown}); --grow adds them")
    if problems:
        raise InputError(
            join_problems(f"{folder} belongs to another job", problems)
            + "\nGive another --out, or the inputs and options of that job."
        )
    return (*before.values(), *new)


def _shown(value: str | None) -> str:
    return "not given" if value is None else repr(value)


def plan_shards(
    folder: StorageFolder,
    files: Sequence[InputFile],
    corpus: Corpus,
    columns: RowColumns,
    *,
    settings: dict[str, str | None],
    progress: Progress,
) -> ShardPlan:
    """Cut every file into shards; a file that was planned before keeps its shards.

    Raises:
        InputError: a file cannot be read; lists all such files.
    """
    fingerprint = fingerprint_settings(settings)
    shards: dict[str, RowRange] = {}
    problems: list[str] = []
    n_bytes, done = sum(file.n_bytes for file in files), 0
    for number, file in enumerate(files):
        try:
            of_file = _file_shards(folder, number, file, corpus, columns, settings)
        except InputError as error:
            problems.append(str(error))
            continue
        identity = file.identity
        for shard in of_file:
            shards[shard_name(fingerprint, identity, shard)] = shard
        done += file.n_bytes
        progress("counting the rows (bytes)", done, n_bytes)
    if problems:
        raise InputError("\n".join(problems))
    return ShardPlan(fingerprint, tuple(files), shards)


def _file_shards(
    folder: StorageFolder,
    number: int,
    file: InputFile,
    corpus: Corpus,
    columns: RowColumns,
    settings: dict[str, str | None],
) -> list[RowRange]:
    name = f"{PLAN}/{number:05d}.json"
    shard_rows = int(settings["shard_rows"] or 0)
    content = folder.read(name)
    if content is not None:
        try:
            earlier = _FilePlan.model_validate_json(content)
        except ValidationError as error:
            raise IntegrityError(
                f"{folder}/{name} is damaged; remove it, and {file.name} is planned again"
            ) from error
        if (earlier.file, earlier.shard_rows) == (file, shard_rows):
            return [
                RowRange.model_construct(file=number, first=first, n_rows=n_rows, offset=offset)
                for first, n_rows, offset in earlier.shards
            ]
    if file.name not in corpus.places:
        raise InputError(
            f"the rows of {file.name} were never counted, and it is not among the inputs any more; "
            f"name it too"
        )
    shards = cut_rows(file, corpus.places[file.name], number, columns, shard_rows)
    ranges = tuple((shard.first, shard.n_rows, shard.offset) for shard in shards)
    plan = _FilePlan(file=file, shard_rows=shard_rows, shards=ranges)
    folder.write(name, plan.model_dump_json(by_alias=True).encode())
    return shards
