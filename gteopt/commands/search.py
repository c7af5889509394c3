"""What `gteopt search` does: nearest rows of an embedding folder, to see whether it worked.

Codes are searched as they are stored, and rescored by the float query as the artifact says. It is
the smoke test of everything before it, not a database.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gteopt.corpus.exports import INDEX, shards_of
from gteopt.corpus.plan import EmbeddingRecord, read_record
from gteopt.corpus.shard_files import read_footer, read_shard, vectors_of
from gteopt.corpus.storage import Folder
from gteopt.encoder.loading import load
from gteopt.errors import InputError, UnsupportedError
from gteopt.frozen import Frozen
from gteopt.progress import Progress, quiet
from gteopt.vectors.search import Search

Floats = npt.NDArray[np.float32]


class Hit(Frozen):
    """A row that was found.

    Attributes:
        columns: that were kept beside the vector, and of a chunk where it stands.
    """

    score: float
    id: str
    file: str
    row: int
    columns: dict[str, Any]


class SearchResult(Frozen):
    """The best rows of a query, best first."""

    query: str
    hits: tuple[Hit, ...]


class Comparison(Frozen):
    """What another variant's vectors change in the same searches.

    Attributes:
        kept: share of the rows found that the other finds, too.
        by_query: the same for each query, those that lose most first.
    """

    kept: float
    by_query: tuple[tuple[str, float], ...]


def search(
    folder: str | Path,
    queries: str | Sequence[str],
    *,
    top: int = 10,
    instruction: str | None = None,
    progress: Progress = quiet,
    **model: Any,
) -> list[SearchResult]:
    """The nearest rows of an embedding folder to each query.

    Example: `gteopt.search("vectors", "how do plants make energy", top=10)`

    Args:
        folder: made by `gteopt embed`.
        queries: one or more texts.
        top: rows a query.
        instruction: of the queries; None is the model's default.
        progress: told of shards.
        model: `model` for the query encoder, where it lies elsewhere by now; `device`, `hub_dir`;
            `index` to search index.faiss instead of every vector.

    Raises:
        InputError: no embedding folder, or another model.
    """
    asked = [queries] if isinstance(queries, str) else list(queries)
    place = Folder(folder)
    record = _record(place)
    by_index = bool(model.pop("index", False))
    vectors = _encoded(record, asked, instruction, **model)
    if by_index:
        scores, where = _by_index(place, record, vectors, top)
    else:
        scores, where = _by_all(place, record, vectors, top, progress)
    rows = _rows(place, np.unique(where[where >= 0]))
    return [
        SearchResult(
            query=query,
            hits=tuple(
                Hit(score=round(float(score), 6), **rows[int(index)])
                for score, index in zip(scores[n], where[n], strict=True)
                if index >= 0
            ),
        )
        for n, query in enumerate(asked)
    ]


def compare(ours: Sequence[SearchResult], theirs: Sequence[SearchResult]) -> Comparison:
    """Which of the rows found by one variant another one finds, too, by their ids."""
    shares: list[tuple[str, float]] = []
    for a, b in zip(ours, theirs, strict=True):
        there = {(hit.id, hit.row) for hit in b.hits}
        kept = sum((hit.id, hit.row) in there for hit in a.hits)
        shares.append((a.query, kept / max(1, len(a.hits))))
    mean = sum(share for _, share in shares) / max(1, len(shares))
    return Comparison(kept=mean, by_query=tuple(sorted(shares, key=lambda each: each[1])))


def _record(folder: Folder) -> EmbeddingRecord:
    record = read_record(folder)
    if record is None:
        raise InputError(f"{folder} is no embedding folder; it has no embedding.json")
    if record.n_vectors == 0:
        raise InputError(
            f"{folder} holds no finished job; run its `gteopt embed` command to its end"
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
    """Vectors [Q, D] of the queries, by the model that made the folder's."""
    if not all(query.strip() for query in queries):
        raise InputError("a query is empty; write what is looked for")
    own_dir = None if record.hub_dir is None else Path(record.hub_dir)
    dtype = record.settings["dtype"] or "auto"
    source = str(model or record.model)
    encoder = load(source, device=device, dtype=dtype, hub_dir=hub_dir or own_dir)
    if encoder.sha256 != record.settings["model"]:
        raise InputError(
            f"{source} is another model than the one that made these vectors (SHA-256 "
            f"{encoder.sha256[:16]} instead of {str(record.settings['model'])[:16]}); name that "
            f"one with --model"
        )
    return encoder.encode(queries, role="query", instruction=instruction)


def _by_all(
    folder: Folder, record: EmbeddingRecord, queries: Floats, top: int, progress: Progress
) -> tuple[Floats, npt.NDArray[np.intp]]:
    found = Search(record.decode.transform(record.rescore), queries, top)
    names = shards_of(folder)
    for number, name in enumerate(names):
        stored = vectors_of(read_shard(folder, name, ["vector"]), record.decode)
        if len(stored):
            wide = stored.astype(np.float32) if record.decode.code == "float16" else stored
            found.add(np.ascontiguousarray(wide))
        progress("searching shards", number + 1, len(names))
    where, scores = found.nearest()
    return scores, where


def _by_index(
    folder: Folder, record: EmbeddingRecord, queries: Floats, top: int
) -> tuple[Floats, npt.NDArray[np.intp]]:
    """By index.faiss, mapped into memory where its kind allows."""
    import faiss

    index: Any
    if folder.local is None or not (folder.local / INDEX).is_file():
        raise InputError(f"{folder} has no {INDEX} here; `gteopt embed ... --export faiss-flat`")
    path = str(folder.local / INDEX)
    if record.decode.code == "binary":
        index = faiss.read_index_binary(path)
        codes = record.decode.transform().quantize(queries)
        distances, where = index.search(np.ascontiguousarray(codes), top)
        return record.decode.transform().of_hamming(distances), where
    try:
        index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, AttributeError):
        index = faiss.read_index(path)
    if index.d != queries.shape[1]:
        raise UnsupportedError(f"{path} has {index.d} dimensions, the queries {queries.shape[1]}")
    scores, where = index.search(queries, top)
    return scores, where


def _rows(folder: Folder, wanted: npt.NDArray[np.intp]) -> dict[int, dict[str, Any]]:
    """What stands beside the vectors of these numbers, counted over all shards."""
    found: dict[int, dict[str, Any]] = {}
    before = 0
    for name in shards_of(folder):
        footer = read_footer(folder, name)
        n_vectors = 0 if footer is None else footer.n_vectors
        here = wanted[(wanted >= before) & (wanted < before + n_vectors)]
        if len(here):
            table = read_shard(folder, name).drop_columns(["vector"])
            for number in here.tolist():
                row = table.slice(number - before, 1).to_pylist()[0]
                own = {key: row.pop(key) for key in ("id", "file", "row")}
                found[number] = {**own, "columns": row}
        before += n_vectors
    return found
