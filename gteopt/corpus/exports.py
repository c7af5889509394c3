"""Export a finished embedding folder to .npy, a faiss index or Lance.

Hides: those formats. Refuses to know: models, jobs. Exported rows are in the order of the shards;
`ids.parquet` maps each of them to its row of the corpus.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gteopt.corpus.plan import EmbeddingRecord
from gteopt.corpus.shard_files import DATA, read_shard, read_shard_vectors
from gteopt.corpus.storage import StorageFolder
from gteopt.errors import InputError, UnsupportedError, install_command
from gteopt.progress import Progress, ignore_progress

Export = Literal["npy", "faiss-flat", "faiss-hnsw", "faiss-ivf", "lance"]
IDS = "ids.parquet"
INDEX = "index.faiss"
_TRAIN_PER_LIST = 39
"""The fewest training vectors for each list that faiss accepts without a warning."""
_MOST_TRAINED = 262_144


def list_exported_shards(folder: StorageFolder) -> list[str]:
    """Names of the shards of a folder, in the order of the input."""
    return [name for name in folder.names(DATA) if name.endswith(".parquet")]


def read_exported_tables(
    folder: StorageFolder,
    columns: Sequence[str] | None = None,
    progress: Progress = ignore_progress,
) -> Iterator[pa.Table]:
    """The shards' tables; one table at a time is in memory."""
    names = list_exported_shards(folder)
    for number, name in enumerate(names):
        yield read_shard(folder, name, columns)
        progress("reading shards", number + 1, len(names))


def export_embedding(
    folder: StorageFolder,
    record: EmbeddingRecord,
    wanted: Sequence[Export],
    progress: Progress = ignore_progress,
) -> list[Path]:
    """Write each format into the folder; a file appears there when it is complete.

    Args:
        folder: folder of a finished job, on this machine.
        record: its embedding.json.
        wanted: the formats to write.
        progress: called with the shards that were read.

    Raises:
        InputError: the folder is not on this machine, or holds no vector.
        UnsupportedError: a library is not installed.
    """
    if folder.local is None:
        raise InputError(
            f"--export writes on this machine; {folder} is elsewhere: copy it here first"
        )
    if record.n_vectors == 0:
        raise InputError(f"{folder} holds no vector to export")
    written: list[Path] = []
    for kind in dict.fromkeys(wanted):
        target = folder.local / {"npy": "vectors.npy", "lance": "vectors.lance"}.get(kind, INDEX)
        partial = target.with_name(f".{target.name}.partial")
        if kind == "lance":
            _write_lance(folder, partial, progress)
        elif kind == "npy":
            _write_npy(folder, record, partial, progress)
        else:
            _write_faiss(folder, record, kind, partial, progress)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(partial, target)
        written.append(target)
    if {"npy", "faiss-flat", "faiss-hnsw", "faiss-ivf"} & {*wanted}:
        written.append(_write_ids(folder, folder.local / IDS))
    return written


def _write_ids(folder: StorageFolder, target: Path) -> Path:
    partial = target.with_name(f".{target.name}.partial")
    writer = None
    for table in read_exported_tables(folder):
        about = table.drop_columns(["vector"])
        writer = writer or pq.ParquetWriter(partial, about.schema.remove_metadata())
        writer.write_table(about.replace_schema_metadata(None))
    assert writer is not None
    writer.close()
    os.replace(partial, target)
    return target


def _write_npy(
    folder: StorageFolder, record: EmbeddingRecord, target: Path, progress: Progress
) -> None:
    out: npt.NDArray[Any] | None = None
    done = 0
    for table in read_exported_tables(folder, ["vector"], progress):
        vectors = read_shard_vectors(table, record.decode)
        if out is None:
            shape = (record.n_vectors, record.decode.width)
            out = np.lib.format.open_memmap(target, "w+", vectors.dtype, shape)
        out[done : done + len(vectors)] = vectors
        done += len(vectors)
    assert out is not None
    out.flush()  # type: ignore[attr-defined]


def _write_faiss(
    folder: StorageFolder, record: EmbeddingRecord, kind: Export, target: Path, progress: Progress
) -> None:
    import faiss

    decode, n = record.decode, record.n_vectors
    index: Any
    if decode.code == "binary":
        bits = 8 * decode.width
        if kind == "faiss-flat":
            index = faiss.IndexBinaryFlat(bits)
        elif kind == "faiss-hnsw":
            index = faiss.IndexBinaryHNSW(bits, 32)
        else:
            index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(bits), bits, _n_lists(n))
    elif kind == "faiss-flat":
        index = faiss.IndexFlatIP(decode.dims)
    elif kind == "faiss-hnsw":
        index = faiss.IndexHNSWFlat(decode.dims, 32, faiss.METRIC_INNER_PRODUCT)
    else:
        quantizer = faiss.IndexFlatIP(decode.dims)
        index = faiss.IndexIVFFlat(quantizer, decode.dims, _n_lists(n), faiss.METRIC_INNER_PRODUCT)
    transform = decode.transform()

    def rows(table: pa.Table) -> npt.NDArray[Any]:
        stored = read_shard_vectors(table, decode)
        if decode.code == "binary":
            return np.ascontiguousarray(stored)
        if decode.code == "float16":
            return stored.astype(np.float32)
        return np.ascontiguousarray(transform.dequantize(stored))

    if not index.is_trained:
        index.train(_sample(folder, n, rows))
    for table in read_exported_tables(folder, ["vector"], progress):
        index.add(rows(table))
    if decode.code == "binary":
        faiss.write_index_binary(index, str(target))
    else:
        faiss.write_index(index, str(target))


def _n_lists(n: int) -> int:
    """Lists of an inverted file: 4 sqrt(N), as faiss advises, or fewer if a list would be small."""
    return max(1, min(int(4 * n**0.5), n // _TRAIN_PER_LIST))


def _sample(folder: StorageFolder, n: int, rows: Any) -> npt.NDArray[Any]:
    """Every n-th vector of the corpus, to train the lists' centres."""
    step = max(1, n // _MOST_TRAINED)
    return np.concatenate(
        [rows(table)[::step] for table in read_exported_tables(folder, ["vector"])]
    )


def _write_lance(folder: StorageFolder, target: Path, progress: Progress) -> None:
    try:
        import lance
    except ImportError as error:
        raise UnsupportedError(f"--export lance needs Lance: {install_command('lance')}") from error
    if target.is_dir():
        shutil.rmtree(target)
    source = read_exported_tables(folder, None, progress)
    first = _for_lance(next(source))
    lance.write_dataset(first, str(target))
    for table in source:
        lance.write_dataset(_for_lance(table), str(target), mode="append")


def _for_lance(table: pa.Table) -> pa.Table:
    """The table with fixed-size vectors, because Lance indexes and searches no others."""
    column = table["vector"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_fixed_size_list(column.type):
        return table.replace_schema_metadata(None)
    values = column.flatten()
    width = len(values) // max(1, len(column))
    fixed = pa.FixedSizeListArray.from_arrays(values, width)
    position = table.column_names.index("vector")
    return table.set_column(position, "vector", fixed).replace_schema_metadata(None)
