"""Other libraries read an embedding folder: each line of the table in docs/embedding.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import duckdb
import faiss
import numpy as np
import numpy.typing as npt
import pandas
import polars
import pyarrow.parquet as pq
import pytest

import gteopt
from gteopt.corpus.exports import Export, export_embedding
from gteopt.corpus.options import Code, VectorType
from gteopt.corpus.plan import read_embedding_record
from gteopt.corpus.storage import StorageFolder
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError
from tests.support.embedding import TEXTS, embed_with, stored, vectors, write_jsonl

KINDS: list[tuple[Code, VectorType]] = [
    ("float32", "list"),
    ("float32", "fixed_size_list"),
    ("float16", "list"),
    ("float16", "fixed_size_list"),
]


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


@pytest.fixture(scope="module")
def folders(nano: Encoder, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    root = tmp_path_factory.mktemp("readers")
    corpus = write_jsonl(root / "c.jsonl", [*TEXTS[:20], ""])
    paths = {}
    for code, vector_type in KINDS:
        paths[code, vector_type] = root / f"{code}-{vector_type}"
        embed_with(
            nano, corpus, paths[code, vector_type], code=code, vector_type=vector_type, id="id"
        )
    return paths


def by_pandas(data: str) -> npt.NDArray[Any]:
    return np.stack(list(pandas.read_parquet(data)["vector"]))


def by_polars(data: str) -> npt.NDArray[Any]:
    return np.array(polars.read_parquet(f"{data}/*.parquet")["vector"].to_list())


def by_duckdb(data: str) -> npt.NDArray[Any]:
    rows = duckdb.sql(f"select vector from '{data}/*.parquet' order by file, row").fetchall()
    return np.array([row[0] for row in rows])


def by_datasets(data: str) -> npt.NDArray[Any]:
    cache = f"{data}/../../cache"
    dataset = datasets.load_dataset("parquet", data_dir=data, split="train", cache_dir=cache)
    return np.array(dataset["vector"][:])


@pytest.mark.parametrize("read", [by_pandas, by_polars, by_duckdb, by_datasets])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_gives_the_stored_vectors_in_order(
    read: Any, kind: tuple[Code, VectorType], folders: dict[Any, Path]
) -> None:
    out = folders[kind]
    expected = vectors(stored(out)).astype(np.float32)
    np.testing.assert_array_equal(read(str(out / "data")).astype(np.float32), expected)


NEEDS = "run by hand: pip install lancedb qdrant-client pgserver 'psycopg[binary]' pgvector"
"""Databases that are too large for the test extra."""


@pytest.mark.parametrize("kind", KINDS)
def test_lancedb_takes_the_rows_and_finds_a_vector_by_itself(
    kind: tuple[Code, VectorType], folders: dict[Any, Path], tmp_path: Path
) -> None:
    lancedb = pytest.importorskip("lancedb", reason=NEEDS)
    out = folders[kind]
    rows = pq.read_table(out / "data")
    table = lancedb.connect(tmp_path).create_table("rows", rows)
    query = vectors(stored(out))[7].astype(np.float32)
    (nearest,) = table.search(query, vector_column_name="vector").limit(1).to_list()
    assert nearest["id"] == rows["id"][7].as_py()


@pytest.mark.parametrize("kind", KINDS)
def test_qdrant_takes_the_rows_and_finds_a_vector_by_itself(
    kind: tuple[Code, VectorType], folders: dict[Any, Path]
) -> None:
    qdrant = pytest.importorskip("qdrant_client", reason=NEEDS)
    out = folders[kind]
    rows = pq.read_table(out / "data").to_pylist()
    client = qdrant.QdrantClient(":memory:")
    size = qdrant.models.VectorParams(size=256, distance=qdrant.models.Distance.COSINE)
    client.create_collection("rows", vectors_config=size)
    points = [
        qdrant.models.PointStruct(id=i, vector=row["vector"], payload={"id": row["id"]})
        for i, row in enumerate(rows)
    ]
    client.upsert("rows", points=points)
    (nearest,) = client.query_points("rows", query=rows[7]["vector"], limit=1).points
    assert nearest.payload == {"id": rows[7]["id"]}


@pytest.mark.parametrize("kind", KINDS)
def test_pgvector_takes_the_rows_and_finds_a_vector_by_itself(
    kind: tuple[Code, VectorType], folders: dict[Any, Path], tmp_path: Path
) -> None:
    pgserver = pytest.importorskip("pgserver", reason=NEEDS)
    psycopg = pytest.importorskip("psycopg", reason=NEEDS)
    pgvector = pytest.importorskip("pgvector", reason=NEEDS)
    adapter = pytest.importorskip("pgvector.psycopg", reason=NEEDS)
    rows = pq.read_table(folders[kind] / "data").to_pylist()
    server = pgserver.get_server(tmp_path / "pg", cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute("create extension vector")
        adapter.register_vector(connection)
        connection.execute("create table rows (id text, vector vector(256))")
        for row in rows:
            values = (row["id"], pgvector.Vector(row["vector"]))
            connection.execute("insert into rows values (%s, %s)", values)
        select_nearest = "select id from rows order by vector <=> %s limit 1"
        query = pgvector.Vector(rows[7]["vector"])
        nearest_row = connection.execute(select_nearest, (query,)).fetchone()
    server.cleanup()
    assert nearest_row == (rows[7]["id"],)


@pytest.mark.parametrize("form", ["faiss-flat", "faiss-hnsw", "faiss-ivf"])
def test_a_faiss_index_finds_each_vector_by_itself(form: Export, folders: dict[Any, Path]) -> None:
    out = folders["float32", "list"]
    record = read_embedding_record(StorageFolder(out))
    assert record is not None
    index_path, ids_path = export_embedding(StorageFolder(out), record, [form])
    index = faiss.read_index(str(index_path), faiss.IO_FLAG_MMAP_IFC)
    rows = vectors(stored(out)).astype(np.float32)
    _, positions = index.search(rows, 1)
    ids = pq.read_table(ids_path)["id"].to_pylist()
    assert [ids[i] for i in positions[:, 0]] == [f"d{i}" for i in range(20)]


def test_npy_and_lance_hold_the_same_rows(folders: dict[Any, Path]) -> None:
    import lance

    out = folders["float16", "list"]
    record = read_embedding_record(StorageFolder(out))
    assert record is not None
    array, table, ids = export_embedding(StorageFolder(out), record, ["npy", "lance"])
    expected = vectors(stored(out))
    assert np.load(array, mmap_mode="r").dtype == np.float16
    np.testing.assert_array_equal(np.load(array), expected)
    lance_table = lance.dataset(str(table)).to_table()
    assert lance_table["id"].to_pylist() == pq.read_table(ids)["id"].to_pylist()
    np.testing.assert_array_equal(np.array(lance_table["vector"].to_pylist()), expected)


def test_search_finds_a_document_by_its_text_with_and_without_an_index(
    folders: dict[Any, Path],
) -> None:
    out = folders["float32", "list"]
    record = read_embedding_record(StorageFolder(out))
    assert record is not None
    export_embedding(StorageFolder(out), record, ["faiss-flat"])
    (by_scan,) = gteopt.search(out, TEXTS[13], top=3, device="cpu")
    assert by_scan.hits[0].id == "d13"
    assert len(by_scan.hits) == 3
    (by_index,) = gteopt.search(out, TEXTS[13], top=3, device="cpu", index=True)
    assert [hit.id for hit in by_index.hits] == [hit.id for hit in by_scan.hits]
    np.testing.assert_allclose(
        [hit.score for hit in by_index.hits], [hit.score for hit in by_scan.hits], atol=1e-5
    )


def test_search_refuses_a_folder_without_vectors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an embedding folder"):
        gteopt.search(tmp_path, "anything")
