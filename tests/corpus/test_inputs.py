"""Every input format gives the same rows. Errors for other inputs say what can be read."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gteopt.corpus.inputs import find_corpus
from gteopt.corpus.options import TextTemplate
from gteopt.corpus.rows import RowColumns, RowReader, cut_rows
from gteopt.errors import InputError

ROWS = [{"id": f"d{i}", "text": f"row {i}, żółw\n“two lines”" + "x" * i} for i in range(50)]
ONE_LINE = [{"id": f"d{i}", "text": f"row {i}, żółw " + "x" * i} for i in range(50)]


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(path: Path, separator: str) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, ["id", "text"], delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path, row_group_size: int) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=row_group_size)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda p: p.write_bytes(jsonl(ROWS)),
    "a.jsonl.gz": lambda p: p.write_bytes(
        gzip.compress(jsonl(ROWS[:20])) + gzip.compress(jsonl(ROWS[20:]))
    ),
    "a.jsonl.zst": lambda p: p.write_bytes(pa.compress(jsonl(ROWS), "zstd", asbytes=True)),
    "a.ndjson.bz2": lambda p: p.write_bytes(bz2.compress(jsonl(ROWS))),
    "a.csv": lambda p: write_csv(p, ","),
    "semicolons.csv": lambda p: write_csv(p, ";"),
    "a.tsv": lambda p: write_csv(p, "\t"),
    "groups.parquet": lambda p: write_parquet(p, 7),
    "one_group.parquet": lambda p: write_parquet(p, 1000),
}


def read_in_shards(
    path: Path, role: str = "document", own_id: str | None = "id"
) -> list[tuple[str, str | None]]:
    """Ids and texts by shard. Reading from the last shard to the first must give the same."""
    corpus = find_corpus([str(path)], role=role)
    files = {n: (file, corpus.places[file.name]) for n, file in enumerate(corpus.files)}
    columns = RowColumns(TextTemplate(corpus.text or "text"), corpus.id or own_id)
    shards = [
        shard
        for n, (file, place) in files.items()
        for shard in cut_rows(file, place, n, columns, 8)
    ]
    forward = RowReader(files, columns)
    contents = {shard: forward.read(shard) for shard in shards}
    backward = RowReader(files, columns)
    for shard in reversed(shards):
        assert backward.read(shard) == contents[shard]
    forward.close()
    backward.close()
    return [
        pair
        for shard in shards
        for pair in zip(contents[shard].ids, contents[shard].texts, strict=True)
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_in_any_order_of_shards(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read_in_shards(tmp_path / name) == [(row["id"], row["text"]) for row in ROWS]


def test_a_saved_data_set_is_a_corpus(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=3)
    assert read_in_shards(tmp_path / "saved") == [(row["id"], row["text"]) for row in ROWS]


def test_a_beir_folder_gives_documents_or_queries_by_role(tmp_path: Path) -> None:
    rows = [{"_id": "7", "title": "Wings", "text": "of birds"}, {"_id": "8", "text": "no title"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "what flies"}) + "\n")
    assert read_in_shards(tmp_path) == [("7", "Wings of birds"), ("8", "no title")]
    assert read_in_shards(tmp_path, "query") == [("q", "what flies")]


def test_a_glob_and_a_folder_take_their_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.md"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert [f.name for f in find_corpus([f"{tmp_path}/*.jsonl"]).files] == ["a.jsonl", "b.jsonl"]
    assert [f.name for f in find_corpus([str(tmp_path)]).files] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("name", ["org/name", "hf://datasets/org/name", "hf://datasets/org/name/*"])
def test_the_hub_is_a_folder_in_its_layout(name: str, tmp_path: Path) -> None:
    data = tmp_path / "org" / "name" / "data"
    data.mkdir(parents=True)
    (tmp_path / "org" / "name" / "README.md").write_text("a card")
    write_parquet(data / "train-00000.parquet", 10)
    corpus = find_corpus([name], hub_dir=tmp_path)
    assert [file.name for file in corpus.files] == ["data/train-00000.parquet"]


def test_lines_of_text_are_documents_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n \nthird")
    assert read_in_shards(tmp_path / "a.txt", own_id=None) == [
        ("a.txt:0", "first"),
        ("a.txt:1", None),
        ("a.txt:2", "third"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "no column text; it has body, id"),
        ("a.csv", b"id,body\n1,x\n", "no column text; it has id, body"),
        ("a.json", b'[{"text": "x"}]', "one JSON array"),
        ("a.jsonl", "{}\n".encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-9], "damaged or cut short"),
        ("a.parquet", b"PAR1 and no more", "not a complete parquet file"),
        ("a.parquet", b"", "is empty"),
        ("a.csv", b"text,text\n1,x\n", "heading has text more than once"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_why(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_in_shards(tmp_path / name)


def test_all_inputs_that_are_not_there_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        find_corpus([f"{tmp_path}/a.jsonl", f"{tmp_path}/*.csv", f"{tmp_path}/image.png"])
    assert "a.jsonl is not there" in str(caught.value)
    assert "no file matches" in str(caught.value)
    assert "image.png" in str(caught.value)
