"""A user's tables: the formats that are read, the columns that are known, and the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gteopt.errors import InputError
from gteopt.evaluation.user_data import Collection, Pairs, read_own_data, read_texts

PAIRS = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": float(i)} for i in range(4)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write one file in the format of its ending."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(rows[0])]
        lines += [separator.join(str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_the_same_pairs_are_read_from_every_form(tmp_path: Path, ending: str) -> None:
    pairs = read_own_data(write(tmp_path / f"pairs.{ending}", list(PAIRS)))
    assert isinstance(pairs, Pairs)
    assert pairs.first == ("a 0", "a 1", "a 2", "a 3")
    assert pairs.scores == (0, 1, 2, 3)


def test_triplets_are_a_search_among_all_their_passages(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"anchor": "q1", "positive": "p1", "negative": "n1"},
        {"anchor": "q1", "positive": "p2", "negative": "p3"},
        {"anchor": "q2", "positive": "p3", "negative": "n1"},
    ]
    collection = read_own_data(write(tmp_path / "triplets.jsonl", rows))
    assert isinstance(collection, Collection)
    texts = {row["id"]: row["text"] for row in collection.corpus}
    assert sorted(texts.values()) == ["n1", "p1", "p2", "p3"]
    queries = {row["id"]: row["text"] for row in collection.queries}
    relevant = {
        queries[query]: {texts[document] for document in grades}
        for query, grades in collection.qrels["test"].items()
    }
    assert relevant == {"q1": {"p1", "p2"}, "q2": {"p3"}}


def test_a_score_grades_the_passages_of_a_query(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": "q", "passage": "good", "label": 2},
        {"question": "q", "passage": "bad", "label": 0},
    ]
    collection = read_own_data(write(tmp_path / "graded.csv", rows))
    assert isinstance(collection, Collection)
    assert list(collection.qrels["test"].values()) == [{"d0": 2}]
    assert len(collection.corpus) == 2


def test_columns_of_any_name_can_be_said(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"left": f"a{i}", "right": f"b{i}", "gold": i} for i in range(3)
    ]
    path = write(tmp_path / "mine.csv", rows)
    pairs = read_own_data(path, {"sentence1": "left", "sentence2": "right"})
    assert isinstance(pairs, Pairs)
    assert pairs.second == ("b0", "b1", "b2")
    search = read_own_data(path, {"query": "left", "positive": "right", "score": "gold"})
    assert isinstance(search, Collection)


def test_unknown_columns_get_three_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.csv", [{"x": 1, "y": 2}])
    with pytest.raises(InputError) as caught:
        read_own_data(path)
    columns, accepted, example = str(caught.value).splitlines()
    assert "found x, y" in columns
    assert "sentence1, sentence2, score; query, positive" in accepted
    assert "--columns sentence1=x,sentence2=y" in example


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence1": "lft"}, "did you mean left"),
        ({"sentense1": "left"}, "did you mean sentence1"),
    ],
)
def test_a_wrong_column_name_gets_a_suggestion(
    tmp_path: Path, columns: dict[str, str], message: str
) -> None:
    path = write(tmp_path / "mine.csv", [{"left": "a", "right": "b", "gold": 1}])
    with pytest.raises(InputError, match=message):
        read_own_data(path, columns)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "sentence1,sentence2,score\n"])
def test_an_empty_table_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=r"found nothing|0 pairs"):
        read_own_data(path)


def test_mixed_types_in_a_score_column_are_listed_by_line(tmp_path: Path) -> None:
    path = tmp_path / "mixed.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\nc,d,high\ne,f,2\ng,h,\n")
    with pytest.raises(InputError) as caught:
        read_own_data(path)
    assert "mixed.csv:3: score is 'high'" in str(caught.value)
    assert "mixed.csv:5: score is ''" in str(caught.value)


def test_texts_come_from_a_column_too(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{"id": i, "body_text": f"text {i}"} for i in range(3)])
    assert read_texts(path, {"text": "body_text"}) == ["text 0", "text 1", "text 2"]
