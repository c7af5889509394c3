"""Read the rows of a corpus file: count and cut them once, then read one shard at a time.

Hides: lines, CSV, JSON, Parquet, Arrow, and where in a file a shard begins. Refuses to know:
models, outputs.

A row that cannot be used becomes a fault with a reason; it never ends the job. A row is a line of
a text file, a record of a CSV file below its heading, or a row of a table. In a .jsonl file a row
is a JSON value, and blank lines are skipped.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from gteopt.corpus.inputs import (
    InputFile,
    check_input_unchanged,
    open_input_arrow,
    open_input_bytes,
)
from gteopt.corpus.options import TextTemplate, check_wanted_columns, value_as_text
from gteopt.errors import InputError
from gteopt.frozen import Frozen

Reason = Literal["empty", "not_text", "too_long", "not_finite", "unreadable"]
SHARD_BYTES = 64 << 20
"""The most bytes of input in a shard: a shard of very long texts has fewer rows than usual."""
_MAX_LINE_BYTES = 64 << 20
_FIRST_ROWS = 100
"""Rows of JSON that are searched for a column's name, because any single row may lack it."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class RowRange(Frozen):
    """Rows of a file that are embedded, stored and lost together: a shard of the corpus.

    Attributes:
        file: number of the file in the job.
        first: number of the first row in the file, from 0.
        n_rows: number of rows.
        offset: byte at which the shard begins in an uncompressed file of lines; else 0.
    """

    file: int
    first: int
    n_rows: int
    offset: int = 0


@dataclass(frozen=True)
class RowColumns:
    """Which columns of a row are read.

    Attributes:
        text: template that makes the text.
        id: column of ids; None means ids of the form FILE:ROW.
        keep: columns that are copied beside the vector.
        kept: types of these columns; strings in formats without types.
    """

    text: TextTemplate
    id: str | None
    keep: tuple[str, ...] = ()
    kept: pa.Schema = field(default_factory=lambda: pa.schema([]))

    @property
    def all(self) -> list[str]:
        """Every column that is read, without repetition."""
        ids = [] if self.id is None else [self.id]
        return list(dict.fromkeys([*self.text.columns, *ids, *self.keep]))


@dataclass
class Rows:
    """Rows that were read.

    Attributes:
        texts: text of each row; may be None for a row with a fault.
        faults: reason and detail for each row that cannot be embedded, by its position.
        kept: the copied columns of all rows.
    """

    first: int
    texts: list[str | None]
    ids: list[str]
    faults: dict[int, tuple[Reason, str]]
    kept: pa.Table


class RowCursor(Protocol):
    """An open file and the row at which it is read next.

    Attributes:
        at: number of the next row.
    """

    at: int

    def read(self, n_rows: int) -> Iterator[tuple[Mapping[str, Any] | None, str]]:
        """The next rows; None and the reason for a row that cannot be read."""


# ---------------------------------------------------------------------------------------- planning


def cut_rows(
    file: InputFile, place: str, number: int, columns: RowColumns, shard_rows: int
) -> list[RowRange]:
    """Cut a file into shards; a format that does not store its number of rows is read once.

    Raises:
        InputError: the file lacks a column, is damaged or cut short, or is UTF-16.
    """
    if file.format in ("parquet", "arrow"):
        return _cut_table(file, place, number, columns, shard_rows)
    try:
        return _cut_lines(file, place, number, columns, shard_rows)
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        if file.compression is None:
            raise
        raise InputError(
            f"{place} is damaged or cut short ({str(error).splitlines()[0]}); download or copy it "
            f"again"
        ) from error


def _cut_lines(
    file: InputFile, place: str, number: int, columns: RowColumns, shard_rows: int
) -> list[RowRange]:
    shards: list[RowRange] = []
    names: dict[str, None] = {}
    with open_input_bytes(place, file.compression) as stream:
        if file.format == "jsonl" and stream.peek(1)[:1] == b"[":
            raise InputError(
                f"{place} is one JSON array; convert it to one value a line: jq -c '.[]' FILE"
            )
        source = _records(file, place, stream)
        first, offset, row = 0, source.consumed, 0
        for record, _ in source:
            if row < _FIRST_ROWS and isinstance(record, Mapping):
                names |= dict.fromkeys(record)
            row += 1
            if row - first >= shard_rows or source.consumed - offset >= SHARD_BYTES:
                shards.append(RowRange(file=number, first=first, n_rows=row - first, offset=offset))
                first, offset = row, source.consumed
        if row > first:
            shards.append(RowRange(file=number, first=first, n_rows=row - first, offset=offset))
        if isinstance(source, _CsvRecords):
            names = dict.fromkeys(source.heading)
    if names and (error := check_wanted_columns(columns.all, list(names), place)) is not None:
        raise error
    if file.compression is not None:
        shards = [shard.model_copy(update={"offset": 0}) for shard in shards]
    return shards


def _cut_table(
    file: InputFile, place: str, number: int, columns: RowColumns, shard_rows: int
) -> list[RowRange]:
    schema, n_rows, n_bytes = _about_table(file, place)
    if (error := check_wanted_columns(columns.all, schema.names, place)) is not None:
        raise error
    for wanted in columns.kept:
        if schema.field(wanted.name).type != wanted.type:
            raise InputError(
                f"{place}: column {wanted.name} has type {schema.field(wanted.name).type}, but "
                f"{wanted.type} in the first file; embed such files into different folders"
            )
    if n_rows:
        shard_rows = max(1, min(shard_rows, int(SHARD_BYTES / max(1.0, n_bytes / n_rows))))
    return [
        RowRange(file=number, first=first, n_rows=min(shard_rows, n_rows - first))
        for first in range(0, n_rows, shard_rows)
    ]


def _about_table(file: InputFile, place: str) -> tuple[pa.Schema, int, int]:
    """Schema, number of rows, and bytes of the rows."""
    try:
        with open_input_arrow(place) as source:
            if file.format == "parquet":
                parquet = pq.ParquetFile(source)
                meta = parquet.metadata
                groups = (meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
                return parquet.schema_arrow, meta.num_rows, sum(groups)
            reader, n_rows = _arrow_batches(source)
            for batch in reader[1]:
                n_rows += batch.num_rows
            return reader[0], n_rows, file.n_bytes
    except (pa.ArrowInvalid, OSError) as error:
        if file.n_bytes == 0:
            raise InputError(f"{place} is empty (0 bytes): not a {file.format} file") from error
        raise InputError(
            f"{place} is not a complete {file.format} file ({str(error).splitlines()[0]})"
        ) from error


def find_kept_schema(files: Iterable[tuple[InputFile, str]], keep: tuple[str, ...]) -> pa.Schema:
    """Types of the copied columns: the types in the first file, or strings if it has no types.

    Raises:
        InputError: the first file lacks a column.
    """
    for file, place in files:
        if keep and file.format in ("parquet", "arrow"):
            schema, _, _ = _about_table(file, place)
            if (error := check_wanted_columns(keep, schema.names, place)) is not None:
                raise error
            return pa.schema([pa.field(name, schema.field(name).type) for name in keep])
        break
    return pa.schema([pa.field(name, pa.string()) for name in keep])


# ----------------------------------------------------------------------------------------- reading


class RowReader:
    """Reads the rows of shards; shards of one file are read in order without seeking back.

    A compressed file, or a Parquet file of one row group, can only be read from its beginning. So
    the last file stays open, and the next shard is read from there.
    """

    def __init__(self, files: Mapping[int, tuple[InputFile, str]], columns: RowColumns) -> None:
        """Nothing is opened yet.

        Args:
            files: each file and its path or URL, by its number in the job.
            columns: the columns to read.
        """
        self._files = files
        self._columns = columns
        self._open: tuple[int, Any] | None = None

    def read(self, shard: RowRange) -> Rows:
        """The rows of a shard, each with a text or a fault.

        Raises:
            InputError: the file has changed since the job was planned.
        """
        file, place = self._files[shard.file]
        cursor = self._cursor(file, place, shard)
        try:
            if isinstance(cursor, _TableCursor):
                rows = self._of_table(file, shard, cursor.table(shard.n_rows))
            else:
                rows = self._of_records(file, shard, cursor.read(shard.n_rows))
        except BaseException:
            self.close()
            raise
        if len(rows.texts) != shard.n_rows:
            self.close()
            check_input_unchanged(file, place)
            raise InputError(
                f"{place}: {shard.n_rows:,} rows were planned from row {shard.first:,} on, but "
                f"only {len(rows.texts):,} are there; embed into a new folder"
            )
        return rows

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _cursor(self, file: InputFile, place: str, shard: RowRange) -> Any:
        if self._open is not None:
            number, cursor = self._open
            if number == shard.file and cursor.at <= shard.first:
                cursor.skip(shard.first - cursor.at)
                return cursor
            self.close()
        check_input_unchanged(file, place)
        if file.format in ("parquet", "arrow"):
            cursor = _TableCursor(file, place, self._columns.all, shard.first)
        else:
            cursor = _LineCursor(file, place, shard)
        self._open = shard.file, cursor
        return cursor

    def _of_records(
        self, file: InputFile, shard: RowRange, records: Iterable[tuple[Any, str]]
    ) -> Rows:
        texts: list[str | None] = []
        ids: list[str] = []
        faults: dict[int, tuple[Reason, str]] = {}
        kept: list[list[str | None]] = [[] for _ in self._columns.keep]
        for position, (record, problem) in enumerate(records):
            row = record if isinstance(record, Mapping) else {}
            text, fault = self._text(record, row, problem)
            texts.append(text)
            if fault is not None:
                faults[position] = fault
            ids.append(self._id(file, shard.first + position, row))
            for column, name in zip(kept, self._columns.keep, strict=True):
                column.append(value_as_text(row.get(name)))
        arrays = [pa.array(column, pa.string()) for column in kept]
        return Rows(shard.first, texts, ids, faults, _table(arrays, self._columns, len(texts)))

    def _of_table(self, file: InputFile, shard: RowRange, table: pa.Table) -> Rows:
        names = [name for name in self._columns.all if name in {*self._columns.text.columns}]
        if self._columns.id is not None:
            names = list(dict.fromkeys([*names, self._columns.id]))
        values = {name: _as_python(table[name]) for name in names}
        texts: list[str | None] = []
        ids: list[str] = []
        faults: dict[int, tuple[Reason, str]] = {}
        for position in range(table.num_rows):
            row = {name: column[position] for name, column in values.items()}
            text, fault = self._text(row, row, "")
            texts.append(text)
            if fault is not None:
                faults[position] = fault
            ids.append(self._id(file, shard.first + position, row))
        arrays = [table[name].combine_chunks() for name in self._columns.keep]
        return Rows(shard.first, texts, ids, faults, _table(arrays, self._columns, len(texts)))

    def _text(
        self, record: Any, row: Mapping[str, Any], problem: str
    ) -> tuple[str | None, tuple[Reason, str] | None]:
        if record is None:
            return None, ("unreadable", problem)
        broken = [name for name in self._columns.text.columns if isinstance(row.get(name), bytes)]
        if broken:
            return None, ("unreadable", f"column {broken[0]} is not UTF-8 text")
        text, problem = self._columns.text.fill(row)
        if text is None:
            return None, ("not_text", problem)
        if not text.strip():
            return None, ("empty", "")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                return None, ("unreadable", "half of a UTF-16 pair, or bytes that are not UTF-8")
        return text, None

    def _id(self, file: InputFile, number: int, row: Mapping[str, Any]) -> str:
        value = None if self._columns.id is None else row.get(self._columns.id)
        id_ = value_as_text(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
        return f"{file.name}:{number}" if id_ is None else id_


def _table(arrays: list[Any], columns: RowColumns, n_rows: int) -> pa.Table:
    if not arrays:
        return pa.table({"_": pa.nulls(n_rows)}).select([])
    return pa.Table.from_arrays(arrays, schema=columns.kept)


def _as_python(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; a string that is not UTF-8 stays bytes."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        values = [_decoded(value) for value in column.cast(kind).to_pylist()]
    return values


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


class _LineCursor:
    """An open file of lines, and the row at which it is read next."""

    def __init__(self, file: InputFile, place: str, shard: RowRange) -> None:
        seeks = file.compression is None
        heading = None
        if seeks and shard.offset and file.format in ("csv", "tsv"):
            with open_input_bytes(place) as start:
                source = _records(file, place, start)
                assert isinstance(source, _CsvRecords)
                heading = source.about
        self._stream = open_input_bytes(place, file.compression, shard.offset if seeks else 0)
        self._records = _records(file, place, self._stream, heading)
        self.at = shard.first if seeks else 0
        self.skip(shard.first - self.at)

    def skip(self, n_rows: int) -> None:
        """Skip rows."""
        for _ in islice(self._records, n_rows):
            self.at += 1

    def read(self, n_rows: int) -> Iterator[tuple[Any, str]]:
        """The next rows."""
        for record in islice(self._records, n_rows):
            self.at += 1
            yield record

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class _TableCursor:
    """An open Parquet or Arrow file, and the row at which it is read next."""

    def __init__(self, file: InputFile, place: str, names: list[str], first: int) -> None:
        self._source = open_input_arrow(place)
        self._names = names
        self._left: pa.Table | None = None
        if file.format == "parquet":
            # Without pre-buffering only the current pages are in memory, not a whole row group.
            parquet = pq.ParquetFile(self._source, pre_buffer=False, buffer_size=1 << 20)
            before, group = 0, 0
            while group < parquet.num_row_groups:
                n_rows = parquet.metadata.row_group(group).num_rows
                if before + n_rows > first:
                    break
                before, group = before + n_rows, group + 1
            groups = list(range(group, parquet.num_row_groups))
            self._batches = parquet.iter_batches(1024, row_groups=groups, columns=names)
            self.at = before
        else:
            (_, batches), _ = _arrow_batches(self._source)
            self._batches = iter(batches)
            self.at = 0
        self.skip(first - self.at)

    def skip(self, n_rows: int) -> None:
        """Skip rows."""
        while n_rows > 0:
            step = min(n_rows, 1 << 16)
            if self.table(step).num_rows < step:
                return
            n_rows -= step

    def table(self, n_rows: int) -> pa.Table:
        """The next rows; fewer than `n_rows` at the end of the file."""
        parts: list[pa.Table] = []
        missing = n_rows
        while missing > 0:
            if self._left is None or self._left.num_rows == 0:
                batch = next(self._batches, None)
                if batch is None:
                    break
                self._left = pa.Table.from_batches([batch]).select(self._names)
            part = self._left.slice(0, missing)
            self._left = self._left.slice(part.num_rows)
            missing -= part.num_rows
            parts.append(part)
        self.at += n_rows - missing
        if not parts:
            return pa.table({name: pa.nulls(0) for name in self._names})
        return pa.concat_tables(parts)

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def _arrow_batches(source: Any) -> tuple[tuple[pa.Schema, Iterable[pa.RecordBatch]], int]:
    """Schema and batches of an Arrow file or stream, and 0: no row is counted yet."""
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        return (stream.schema, stream), 0
    return (reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))), 0


# ------------------------------------------------------------------------------------------- lines


class _Lines:
    """Lines of a stream, with None for a line of more than 64 MiB.

    Attributes:
        consumed: bytes of the lines that were read.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self.consumed = 0

    def __iter__(self) -> Iterator[bytes | None]:
        read = self._stream.readline
        while line := read(_MAX_LINE_BYTES):
            self.consumed += len(line)
            if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := read(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    self.consumed += len(rest)
                self.consumed += len(rest)
                yield None
            else:
                yield line


def _records(
    file: InputFile,
    place: str,
    stream: io.BufferedReader,
    about: tuple[str, list[str]] | None = None,
) -> _Records:
    head = stream.peek(4)[:4]
    if about is None and head[:2] in _UTF16:
        raise InputError(f"{place} is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    lines = _Lines(stream)
    if file.format in ("csv", "tsv"):
        return _CsvRecords(lines, place, "\t" if file.format == "tsv" else None, about)
    return _Records(lines, as_json=file.format == "jsonl")


class _Records:
    """Records of a file of lines: each a value, or None and the reason why it cannot be read."""

    def __init__(self, lines: _Lines, *, as_json: bool = True) -> None:
        self._lines = lines
        self._as_json = as_json
        self._iterator = self._all()

    @property
    def consumed(self) -> int:
        """Bytes of the records that were read."""
        return self._lines.consumed

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        return self._iterator

    def _all(self) -> Iterator[tuple[Any, str]]:
        for line in self._lines:
            if line is None:
                yield None, "a line of more than 64 MiB"
                continue
            if line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if self._as_json and line.isspace():
                continue
            try:
                text = line.decode().rstrip("\r\n")
                yield (json.loads(text) if self._as_json else {"text": text}), ""
            except UnicodeDecodeError as error:
                yield None, f"not UTF-8 text ({error.reason} at byte {error.start})"
            except (ValueError, RecursionError) as error:
                yield None, f"not JSON ({str(error)[:80]})"


class _CsvRecords(_Records):
    """Records of a CSV file below its heading.

    Attributes:
        heading: names of the columns.
        about: separator and heading, to open the file again at a later row.
    """

    def __init__(
        self, lines: _Lines, place: str, separator: str | None, about: tuple[str, list[str]] | None
    ) -> None:
        super().__init__(lines)
        self._source = iter(lines)
        if about is None:
            first = next(self._source, b"") or b""
            heading = first.decode("utf-8-sig", "replace").rstrip("\r\n")
            counts = {mark: heading.count(mark) for mark in ",;\t|"}
            separator = separator or max(counts, key=counts.__getitem__)
            about = separator, next(csv.reader([heading], delimiter=separator), [])
        self.about = about
        self.heading = about[1]
        twice = sorted({name for name in self.heading if self.heading.count(name) > 1})
        if twice:
            raise InputError(
                f"{place}: the heading has {', '.join(twice)} more than once; rename the columns"
            )

    def _all(self) -> Iterator[tuple[Any, str]]:
        csv.field_size_limit(_MAX_LINE_BYTES)
        reader = csv.reader(self._texts(), delimiter=self.about[0])
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield None, f"not CSV ({error})"
                continue
            if len(fields) > len(self.heading):
                yield None, f"{len(fields)} fields, the heading has {len(self.heading)}"
            elif fields:
                yield dict(zip(self.heading, fields, strict=False)), ""

    def _texts(self) -> Iterator[str]:
        for line in self._source:
            # Bytes that are not UTF-8 become surrogates, for which `_text` records a fault.
            yield "" if line is None else line.decode("utf-8", "surrogateescape")
