"""`gteopt search`: find the nearest rows of an embedding folder, to test that it works.

Codes are searched as stored, and rescored by the float query where the artifact rescores. It is a
test of the folder, not a database.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gteopt.corpus.exports import INDEX, list_exported_shards
from gteopt.corpus.plan import EmbeddingRecord, read_embedding_record
from gteopt.corpus.shard_files import read_footer, read_shard, read_shard_vectors
from gteopt.corpus.storage import StorageFolder
from gteopt.encoder.description import pick_device
from gteopt.encoder.loading import load
from gteopt.errors import InputError, UnsupportedError
from gteopt.frozen import Frozen
from gteopt.progress import Progress, ignore_progress
from gteopt.vectors.search import BlockwiseSearch

Floats = npt.NDArray[np.float32]


class SearchHit(Frozen):
    """A row near a query.

    Attributes:
        columns: columns that were kept beside the vector, and the position of a chunk.
    """

    score: float
    id: str
    file: str
    row: int
    columns: dict[str, Any]


class SearchResult(Frozen):
    """The nearest rows of a query, nearest first."""

    query: str
    hits: tuple[SearchHit, ...]


class SearchComparison(Frozen):
    """How many rows another variant's vectors find too, in the same searches.

    Attributes:
        kept: share of the rows that the other variant finds too.
        by_query: this share for each query, lowest first.
    """

    kept: float
    by_query: tuple[tuple[str, float], ...]


def search(
    folder: str | Path,
    queries: str | Sequence[str],
    *,
    top: int = 10,
    instruction: str | None = None,
    progress: Progress = ignore_progress,
    **model: Any,
) -> list[SearchResult]:
    """The nearest rows of an embedding folder to each query.

    Example: `gteopt.search("vectors", "how do plants make energy", top=10)`

    Args:
        folder: folder that `gteopt embed` made.
        queries: one or more texts.
        top: number of rows per query.
        instruction: instruction to put before queries; None is the model's default.
        progress: receives the number of searched shards.
        model: `model`, the query encoder's new location if it moved; `device`; `hub_dir`; `index`
            to search index.faiss instead of every vector.

    Raises:
        InputError: not an embedding folder, or another model.
    """
    texts = [queries] if isinstance(queries, str) else list(queries)
    opened = StorageFolder(folder)
    record = _record(opened)
    by_index = bool(model.pop("index", False))
    vectors = _encoded(record, texts, instruction, **model)
    if by_index:
        scores, numbers = _by_index(opened, record, vectors, top)
    else:
        scores, numbers = _by_all(opened, record, vectors, top, progress)
    rows = _rows(opened, np.unique(numbers[numbers >= 0]))
    return [
        SearchResult(
            query=query,
            hits=tuple(
                SearchHit(score=round(float(score), 6), **rows[int(number)])
                for score, number in zip(scores[n], numbers[n], strict=True)
                if number >= 0
            ),
        )
        for n, query in enumerate(texts)
    ]


def compare_search_results(
    ours: Sequence[SearchResult], theirs: Sequence[SearchResult]
) -> SearchComparison:
    """The share of one variant's rows that another variant finds too, matched by id."""
    shares: list[tuple[str, float]] = []
    for our_result, their_result in zip(ours, theirs, strict=True):
        their_rows = {(hit.id, hit.row) for hit in their_result.hits}
        n_kept = sum((hit.id, hit.row) in their_rows for hit in our_result.hits)
        shares.append((our_result.query, n_kept / max(1, len(our_result.hits))))
    mean = sum(share for _, share in shares) / max(1, len(shares))
    by_query = sorted(shares, key=lambda query_and_share: query_and_share[1])
    return SearchComparison(kept=mean, by_query=tuple(by_query))


def _record(folder: StorageFolder) -> EmbeddingRecord:
    record = read_embedding_record(folder)
    if record is None:
        raise InputError(f"{folder} is not an embedding folder; it has no embedding.json")
    if record.n_vectors == 0:
        raise InputError(
            f"{folder} holds an unfinished job; run its `gteopt embed` command to the end"
        )
    return record


def _encoded(
    record: EmbeddingRecord,
    queries: Sequence[str],
    instruction: str | None,
    *,
    model: str | Path | None = None,
    device: str = "auto",
    hub_dir: Path | None = None,
) -> Floats:
    """Vectors [Q, D] of the queries, by the model that made the folder's vectors."""
    if not all(query.strip() for query in queries):
        raise InputError("a query is empty; write a text to search for")
    recorded_dir = None if record.hub_dir is None else Path(record.hub_dir)
    dtype = record.settings["dtype"] or "auto"
    source = str(model or record.model)
    openvino = record.settings["backend"] == "openvino" and pick_device(device).type == "cpu"
    encoder = load(
        source,
        device=device,
        dtype=dtype,
        backend="openvino" if openvino and find_spec("openvino") is not None else "torch",
        hub_dir=hub_dir or recorded_dir,
    )
    if encoder.sha256 != record.settings["model"]:
        raise InputError(
            f"{source} did not make these vectors (its SHA-256 is {encoder.sha256[:16]}, not "
            f"{str(record.settings['model'])[:16]}); name the right model with --model"
        )
    return encoder.encode(queries, role="query", instruction=instruction)


def _by_all(
    folder: StorageFolder, record: EmbeddingRecord, queries: Floats, top: int, progress: Progress
) -> tuple[Floats, npt.NDArray[np.intp]]:
    """Scores and numbers [Q, top] of the nearest vectors, by a search of every shard."""
    searched = BlockwiseSearch(record.decode.transform(record.rescore), queries, top)
    names = list_exported_shards(folder)
    for number, name in enumerate(names):
        stored = read_shard_vectors(read_shard(folder, name, ["vector"]), record.decode)
        if len(stored):
            codes = stored.astype(np.float32) if record.decode.code == "float16" else stored
            searched.add(np.ascontiguousarray(codes))
        progress("searching shards", number + 1, len(names))
    numbers, scores = searched.nearest()
    return scores, numbers


def _by_index(
    folder: StorageFolder, record: EmbeddingRecord, queries: Floats, top: int
) -> tuple[Floats, npt.NDArray[np.intp]]:
    """The same by index.faiss, memory-mapped where its kind allows it."""
    import faiss

    index: Any
    if folder.local is None or not (folder.local / INDEX).is_file():
        raise InputError(
            f"{folder} has no local {INDEX}; write it with `gteopt embed ... --export faiss-flat`"
        )
    path = str(folder.local / INDEX)
    if record.decode.code == "binary":
        index = faiss.read_index_binary(path)
        codes = record.decode.transform().quantize(queries)
        distances, numbers = index.search(np.ascontiguousarray(codes), top)
        return record.decode.transform().of_hamming(distances), numbers
    try:
        index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, AttributeError):
        index = faiss.read_index(path)
    if index.d != queries.shape[1]:
        raise UnsupportedError(
            f"{path} has {index.d} dimensions, but queries have {queries.shape[1]}"
        )
    scores, numbers = index.search(queries, top)
    return scores, numbers


def _rows(folder: StorageFolder, wanted: npt.NDArray[np.intp]) -> dict[int, dict[str, Any]]:
    """The other columns of the vectors with these numbers, which count over all shards."""
    rows: dict[int, dict[str, Any]] = {}
    before = 0
    for name in list_exported_shards(folder):
        footer = read_footer(folder, name)
        n_vectors = 0 if footer is None else footer.n_vectors
        here = wanted[(wanted >= before) & (wanted < before + n_vectors)]
        if len(here):
            table = read_shard(folder, name).drop_columns(["vector"])
            for number in here.tolist():
                row = table.slice(number - before, 1).to_pylist()[0]
                place = {key: row.pop(key) for key in ("id", "file", "row")}
                rows[number] = {**place, "columns": row}
        before += n_vectors
    return rows
