"""Write and read an embedding folder: each shard's Parquet file, footer and dead letters.

Hides: Parquet's types and settings, how a footer is read without the whole file. Refuses to know:
models, how a corpus is cut. docs/embedding.md specifies the format.

The bytes of a file depend on the rows, the model and the settings alone. They hold no time, no
machine and no order of work, so a job that was killed and continued ends with the same folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from gteopt.config.recipe import VectorCode
from gteopt.corpus.options import VectorType
from gteopt.corpus.rows import Reason, RowRange
from gteopt.corpus.storage import StorageFolder
from gteopt.errors import IntegrityError
from gteopt.frozen import Frozen
from gteopt.records.manifest import Similarity
from gteopt.vectors.transform import VectorTransform

DATA, DEAD = "data", "dead"
Stored = VectorCode | Literal["float16"]
_SHARD_KEY, _DECODE_KEY = b"gteopt.shard", b"gteopt.decode"
_SCHEMA = "gteopt.shard/1"
_MARK = b'{"schema":"' + _SCHEMA.encode() + b'"'
_TAIL_BYTES = 4096
"""Bytes read from the end of a file; they hold gteopt's entries of the footer."""
_REMOTE_READS = 32
_LARGE = ("codebook", "places")
"""Tensors that may be larger than a shard; only embedding.json holds them."""


class TensorRecord(Frozen):
    """An array as text."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "int32"]
    base64: str

    @staticmethod
    def of(array: npt.NDArray[Any]) -> TensorRecord:
        """The record of an array."""
        kind: Literal["float32", "int32"] = "int32" if array.dtype.kind == "i" else "float32"
        content = array.astype("<i4" if kind == "int32" else "<f4").tobytes()
        return TensorRecord(
            shape=array.shape, dtype=kind, base64=base64.b64encode(content).decode()
        )

    def array(self) -> npt.NDArray[Any]:
        """The array of a record."""
        kind = "<i4" if self.dtype == "int32" else "<f4"
        return np.frombuffer(base64.b64decode(self.base64), kind).reshape(self.shape).copy()


class DecodeRecord(Frozen):
    """Everything needed to decode stored vectors; `gteopt.vectors.codes` has the formulas.

    Attributes:
        code: how a vector is stored; float32 and float16 are the vectors themselves.
        dims: dimensions of a vector.
        similarity: "cosine" if vectors have length 1, "dot" if they keep their length.
        bits: bits for each dimension; only for the code rabitq.
        tensors: fitted values of the code: `low` and `high`, `centre`, `codebook`, `places`.
    """

    code: Stored
    dims: int
    similarity: Similarity = "cosine"
    bits: int | None = None
    tensors: dict[str, TensorRecord] = Field(default_factory=dict)

    @staticmethod
    def of(transform: VectorTransform, code: Stored) -> DecodeRecord:
        """Everything needed to decode the vectors of a transform."""
        fitted = transform.to_tensors()
        return DecodeRecord(
            code=code,
            dims=transform.dims,
            similarity=transform.similarity,
            bits=transform.bits,
            tensors={k: TensorRecord.of(v) for k, v in fitted.items() if k != "projection"},
        )

    def transform(self, rescore: int = 1) -> VectorTransform:
        """A transform that decodes, codes and searches such vectors without a model."""
        fitted: dict[str, Any] = {name: record.array() for name, record in self.tensors.items()}
        return VectorTransform(
            full_dims=self.dims,
            dims=self.dims,
            code="float32" if self.code == "float16" else self.code,
            rescore=rescore,
            similarity=self.similarity,
            bits=self.bits,
            **fitted,
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the numbers of a stored vector."""
        if self.code == "float16":
            return np.dtype(np.float16)
        return np.dtype(self.transform().coding.dtype)

    @property
    def width(self) -> int:
        """How many numbers a stored vector has."""
        return self.dims if self.code == "float16" else self.transform().coding.width

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of a stored vector."""
        return self.width * self.dtype.itemsize


class ShardRecord(Frozen):
    """What the footer of a shard says.

    Attributes:
        fingerprint: hash of the job's settings.
        file: identity of the input file.
        first: number of the first row.
        n_rows: rows of the input; `n_embedded` of them have vectors, the others are dead letters.
        n_vectors: more than `n_embedded` if texts are cut into chunks.
        bad: number of dead letters by reason.
        n_cut: texts that were truncated.
        n_tokens: tokens that the model read.
        sha256: SHA-256 of the vectors, ids and row numbers.
    """

    schema_: Literal["gteopt.shard/1"] = Field(default="gteopt.shard/1", alias="schema")
    fingerprint: str
    file: str
    first: int
    n_rows: int
    n_embedded: int
    n_vectors: int
    bad: dict[Reason, int]
    n_cut: int
    n_tokens: int
    sha256: str

    @property
    def n_bad(self) -> int:
        """Dead letters."""
        return sum(self.bad.values())


@dataclass(frozen=True)
class DeadLetter:
    """A row that has no vector."""

    row: int
    id: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class ShardContent:
    """The content of a shard with N vectors.

    Attributes:
        file: name of the input file.
        rows: int64 [N]; number of the row in the file.
        ids: [N].
        chunks: int32 [N, 3]; number, first character and last character + 1 of each chunk; None if
            texts are not cut into chunks.
        vectors: [N, width], in the code that `DecodeRecord` names.
        kept: copied columns, N rows.
    """

    file: str
    rows: npt.NDArray[np.int64]
    ids: Sequence[str]
    chunks: npt.NDArray[np.int32] | None
    vectors: npt.NDArray[Any]
    kept: pa.Table

    def sha256(self) -> str:
        """SHA-256 of the vectors, ids and row numbers."""
        digest = hashlib.sha256(np.ascontiguousarray(self.vectors).tobytes())
        digest.update(self.rows.astype("<i8").tobytes())
        digest.update("\0".join(self.ids).encode())
        return digest.hexdigest()


def shard_name(fingerprint: str, identity: str, shard: RowRange) -> str:
    """Name of a shard's file; sorted names are in the order of the input."""
    facts = f"{fingerprint}\0{identity}\0{shard.first}\0{shard.n_rows}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return f"{shard.file:05d}-{shard.first:012d}-{digest}.parquet"


def shard_to_parquet(
    content: ShardContent, record: ShardRecord, decode: DecodeRecord, vector_type: VectorType
) -> pa.Buffer:
    """The bytes of a shard's file.

    Vectors are not compressed, because compression does not shrink them. Codes of one byte use
    Parquet's dictionary, because Parquet has no number type of one byte.
    """
    columns: dict[str, Any] = {
        "id": pa.array(content.ids, pa.string()),
        "file": pa.array([content.file] * len(content.ids), pa.string()),
        "row": pa.array(content.rows),
    }
    if content.chunks is not None:
        for number, name in enumerate(("chunk", "start", "end")):
            columns[name] = pa.array(np.ascontiguousarray(content.chunks[:, number]))
    columns |= {name: content.kept[name] for name in content.kept.column_names}
    columns["vector"] = _vector_array(content.vectors, vector_type)
    table = pa.table(columns)
    element = "vector.list.element"
    others = [name for name in columns if name != "vector"]
    is_byte = content.vectors.dtype.itemsize == 1
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression={element: "NONE", **dict.fromkeys(_leaves(table, others), "ZSTD")},
        use_dictionary=[*_leaves(table, others), *([element] if is_byte else [])],
        write_statistics=["row"],
        write_page_checksum=True,
        version="2.6",
    ) as writer:
        writer.write_table(table, row_group_size=max(1, table.num_rows))
        shard_entry = json.loads(record.model_dump_json(by_alias=True))
        large = {"tensors": dict.fromkeys(_LARGE, True)}
        decode_entry = json.loads(decode.model_dump_json(exclude_none=True, exclude=large))
        writer.add_key_value_metadata({_DECODE_KEY.decode(): _compact(decode_entry)})
        writer.add_key_value_metadata({_SHARD_KEY.decode(): _compact(shard_entry)})
    return sink.getvalue()


def _compact(content: object) -> str:
    return json.dumps(content, separators=(",", ":"))


def _leaves(table: pa.Table, names: Iterable[str]) -> list[str]:
    """Names of the columns without children: Parquet's settings apply to these only."""
    return [name for name in names if not pa.types.is_nested(table.schema.field(name).type)]


def _vector_array(vectors: npt.NDArray[Any], vector_type: VectorType) -> pa.Array:
    n, width = vectors.shape
    values = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    if vector_type == "fixed_size_list":
        return pa.FixedSizeListArray.from_arrays(values, width)
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * np.int32(width))
    return pa.ListArray.from_arrays(offsets, values)


def dead_letters_to_parquet(file: str, letters: Sequence[DeadLetter]) -> pa.Buffer:
    """The bytes of a shard's dead letters."""
    table = pa.table(
        {
            "file": pa.array([file] * len(letters), pa.string()),
            "row": pa.array([letter.row for letter in letters], pa.int64()),
            "id": pa.array([letter.id for letter in letters], pa.string()),
            "reason": pa.array([letter.reason for letter in letters], pa.string()),
            "detail": pa.array([letter.detail for letter in letters], pa.string()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="ZSTD", version="2.6", write_page_checksum=True)
    return sink.getvalue()


def read_footer(folder: StorageFolder, name: str) -> ShardRecord | None:
    """Read the footer of a shard; None if the file is not a complete shard."""
    tail = folder.tail(f"{DATA}/{name}", _TAIL_BYTES)
    if not tail.endswith(b"PAR1"):
        return None
    start = tail.rfind(_MARK)
    if start < 0:
        return None
    try:
        entry, _ = json.JSONDecoder().raw_decode(tail[start:].decode("latin-1"))
        # Without validation, because a large job reads 100,000 footers when it goes on, and
        # `shard_to_parquet` wrote each of them.
        return ShardRecord.model_construct(**{k: v for k, v in entry.items() if k != "schema"})
    except ValueError:
        return None


Expected = tuple[str, str, RowRange]
"""What the footer of a shard must say: the job's fingerprint, the file's identity, the rows."""


def read_done_footer(folder: StorageFolder, name: str, expected: Expected) -> ShardRecord | None:
    """The footer of a shard; None if the shard is missing, incomplete or of another job."""
    try:
        record = read_footer(folder, name)
    except FileNotFoundError:
        return None
    return record if record is not None and _is_of(record, expected) else None


def _is_of(record: ShardRecord, expected: Expected) -> bool:
    fingerprint, identity, shard = expected
    actual = (record.fingerprint, record.file, record.first, record.n_rows)
    return actual == (fingerprint, identity, shard.first, shard.n_rows)


def read_done_footers(
    folder: StorageFolder, expected: Mapping[str, Expected]
) -> dict[str, ShardRecord]:
    """Footers of the shards that are done, by name.

    Args:
        folder: folder of the job.
        expected: what the footer of each shard must say, by the shard's name.
    """
    present = [name for name in folder.names(DATA) if name in expected]
    if folder.local is None:
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            records = list(pool.map(lambda name: read_footer(folder, name), present))
    else:
        records = [read_footer(folder, name) for name in present]
    done: dict[str, ShardRecord] = {}
    for name, record in zip(present, records, strict=True):
        if record is not None and _is_of(record, expected[name]):
            done[name] = record
    return done


def read_shard(folder: StorageFolder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the table of a shard, and verify the checksums of its pages.

    Raises:
        IntegrityError: the file is not a complete Parquet file, or a checksum differs.
    """
    try:
        with folder.open(f"{DATA}/{name}") as source:
            table: pa.Table = pq.read_table(
                source,
                columns=None if columns is None else list(columns),
                page_checksum_verification=True,
            )
            return table
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(
            f"{folder}/{DATA}/{name} is damaged ({str(error).splitlines()[0]}); remove it, and "
            f"the same command embeds its rows again"
        ) from error


def read_shard_vectors(table: pa.Table, decode: DecodeRecord) -> npt.NDArray[Any]:
    """The stored vectors [N, width] of a table."""
    dtype, width = decode.dtype, decode.width
    column = table["vector"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([])
    if not len(column):
        return np.empty((0, width), dtype)
    numbers: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(column), width)
