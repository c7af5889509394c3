"""Read a user's own data: a collection in the BEIR layout, a table of pairs, or plain texts.

Hides: the file formats, and how all faults of a file are collected. Refuses to know: mteb,
encoders, scores.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gteopt.config.plan import ColumnRole
from gteopt.config.text_files import read_text_lines, read_text_rows
from gteopt.errors import InputError, join_problems
from gteopt.evaluation.own_tables import FORMS, OwnTable, read_own_table

_MAX_SHOWN = 20  # problems that a message lists; a wrong separator breaks every line
_MIN_PAIRS = 3
_MIN_DOCUMENTS = 2
_MOST_GRADE = 1000
"""The metric library keeps a counter for every grade up to the highest, and ends the process if
memory runs out."""


@dataclass(frozen=True)
class Collection:
    """Documents, queries, and the documents that are relevant for each query.

    Attributes:
        corpus: rows of id, title and text.
        queries: rows of id and text.
        qrels: the grade of each judged document, by split (a file of `qrels/`) and query.
        sha256: hash over the files.
    """

    corpus: tuple[Mapping[str, str], ...]
    queries: tuple[Mapping[str, str], ...]
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]]
    sha256: str


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with a grade of similarity; only the order of the grades counts."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]
    sha256: str


def read_own_data(
    path: Path, columns: Mapping[ColumnRole, str] | None = None
) -> Collection | Pairs:
    """Read a folder in the BEIR layout, or a table of pairs or of queries with their passages.

    Args:
        path: the folder, or a file with one of the suffixes in `own_tables.FORMS`.
        columns: the column for each role; roles that are left out are recognised by name.

    Raises:
        InputError: no such file or folder, or faulty data; lists every fault with file and line.
    """
    if path.is_dir():
        if columns:
            raise InputError(f"--columns is for a table; {path} is a folder in the BEIR layout")
        return read_collection(path)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; give a folder with corpus.jsonl, queries.jsonl and "
            f"qrels/*.tsv, or a {', '.join(FORMS[:-1])} or {FORMS[-1]} file"
        )
    problems: list[str] = []
    table = read_own_table(path, problems, columns=columns)
    if table.kind == "search":
        own: Collection | Pairs = _as_collection(path, table, problems)
    else:
        own = _as_pairs(path, table, problems)
    if problems:
        raise _faults(path, problems)
    return own


def read_collection(folder: Path) -> Collection:
    """Read `corpus.jsonl` (_id, title, text), `queries.jsonl` (_id, text) and `qrels/*.tsv`.

    A qrels file has an optional heading. Each line has a query id, a document id and a grade,
    separated by tabs. Grades above 0 are relevant. Queries without any grade are not searched.

    Raises:
        InputError: lists every missing file, broken line and unknown id.
    """
    problems: list[str] = []
    for name in ("corpus.jsonl", "queries.jsonl"):
        if not (folder / name).is_file():
            problems.append(f"no file {folder / name}")
    qrels_files = sorted((folder / "qrels").glob("*.tsv"))
    if not qrels_files:
        problems.append(f"no file {folder / 'qrels'}/*.tsv (query id, document id, grade)")
    corpus = _read_texts(folder / "corpus.jsonl", problems)
    queries = _read_texts(folder / "queries.jsonl", problems)
    qrels = {path.stem: _read_qrels(path, queries, corpus, problems) for path in qrels_files}
    if problems:
        raise _faults(folder, problems)
    judged = {query for by_query in qrels.values() for query in by_query}
    return Collection(
        corpus=tuple(corpus.values()),
        queries=tuple(row for query, row in queries.items() if query in judged),
        qrels=qrels,
        sha256=_sha256([folder / "corpus.jsonl", folder / "queries.jsonl", *qrels_files]),
    )


def _as_pairs(path: Path, table: OwnTable, problems: list[str]) -> Pairs:
    """Pairs of texts with a grade of similarity; only the order of the grades counts."""
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    for line, row in table.rows:
        if (missing := _missing(table, row, ("sentence1", "sentence2", "score"))) is not None:
            problems.append(f"{path}:{line}: {missing}")
            continue
        grade = _number(row["score"])
        if grade is None:
            problems.append(
                f"{path}:{line}: {table.columns['score']} is {row['score']!r:.80}, must be a number"
            )
        elif not (isinstance(row["sentence1"], str) and isinstance(row["sentence2"], str)):
            problems.append(f"{path}:{line}: sentence1 and sentence2 must be texts")
        else:
            first.append(row["sentence1"])
            second.append(row["sentence2"])
            scores.append(grade)
    if not problems and len(scores) < _MIN_PAIRS:
        problems.append(
            f"{path}: {len(scores)} pairs; a rank correlation needs at least {_MIN_PAIRS}"
        )
    if not problems and len(set(scores)) == 1:
        problems.append(
            f"{path}: every score is {scores[0]:g}; a rank correlation needs different scores"
        )
    return Pairs(tuple(first), tuple(second), tuple(scores), _table_sha256(path, table))


def _as_collection(path: Path, table: OwnTable, problems: list[str]) -> Collection:
    """A collection of all passages, in which each query's positive passages are relevant.

    If the table has scores, a passage with a whole score above 0 is relevant, and the score is its
    grade.
    """
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for line, row in table.rows:
        missing = _missing(table, row, ("query", "positive"))
        texts = [row[role] for role in ("query", "positive", "negative") if row.get(role)]
        grade = 1 if "score" not in table.columns else _grade(row["score"])
        if missing is not None:
            problems.append(f"{path}:{line}: {missing}")
        elif not all(isinstance(text, str) for text in texts):
            problems.append(f"{path}:{line}: queries and passages must be texts")
        elif grade is None:
            problems.append(
                f"{path}:{line}: {table.columns['score']} is {row['score']!r:.80}, must be a whole "
                f"grade up to {_MOST_GRADE:,}; for graded similarity: --columns "
                f"sentence1={table.columns['query']},sentence2={table.columns['positive']}"
            )
        else:
            query = queries.setdefault(row["query"], f"q{len(queries)}")
            document = documents.setdefault(row["positive"], f"d{len(documents)}")
            if grade > 0:
                qrels.setdefault(query, {})[document] = grade
            if row.get("negative"):
                documents.setdefault(row["negative"], f"d{len(documents)}")
    if not problems and not qrels:
        problems.append(f"{path}: marks no passage as relevant (a score above 0)")
    if not problems and len(documents) < _MIN_DOCUMENTS:
        problems.append(
            f"{path}: {len(documents)} different passages; a search needs at least {_MIN_DOCUMENTS}"
        )
    return Collection(
        corpus=tuple(
            {"id": document, "title": "", "text": text} for text, document in documents.items()
        ),
        queries=tuple({"id": q, "text": text} for text, q in queries.items() if q in qrels),
        qrels={"test": qrels},
        sha256=_table_sha256(path, table),
    )


def _missing(
    table: OwnTable, row: Mapping[ColumnRole, Any], roles: Sequence[ColumnRole]
) -> str | None:
    """A message that names the columns without a value in a row; None if all have one."""
    missing = [table.columns[role] for role in roles if row[role] is None]
    if not missing:
        return None
    present = [table.columns[role] for role, value in row.items() if value is not None]
    return f"no field {' and '.join(missing)}; found {', '.join(present) or 'nothing'}"


def read_texts(path: Path, columns: Mapping[ColumnRole, str] | None = None) -> list[str]:
    """Distinct texts: the lines of a text file, or the column `text` of a table.

    Args:
        path: a text file, or a table with one of the suffixes in `own_tables.FORMS`.
        columns: `text` names the column that holds the texts.

    Raises:
        InputError: no such file, broken lines, or fewer than two texts.
    """
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; give a file with one text a line, or a "
            f"{', '.join(FORMS[:-1])} or {FORMS[-1]} file"
        )
    problems: list[str] = []
    texts: list[str] = []
    if path.suffix in FORMS:
        table = read_own_table(path, problems, kinds=("texts",), columns=columns)
        for line, row in table.rows:
            if isinstance(row["text"], str):
                texts.append(row["text"].strip())
            else:
                problems.append(f"{path}:{line}: field {table.columns['text']} must be a text")
    elif columns:
        raise InputError(f"--columns is for a table; each line of {path} is one text")
    else:
        texts = [line.strip() for _, line in read_text_lines(path, problems)]
    distinct = list(dict.fromkeys(text for text in texts if text))
    if not problems and len(distinct) < 2:
        problems.append(f"{path}: {len(distinct)} different texts; fidelity compares at least two")
    if problems:
        raise _faults(path, problems)
    return distinct


def _read_texts(path: Path, problems: list[str]) -> dict[str, dict[str, str]]:
    """Rows of id, title and text by id; empty if the file does not exist."""
    by_id: dict[str, dict[str, str]] = {}
    if not path.is_file():
        return by_id
    for line, row in read_text_rows(path, problems):
        row_id, text, title = row.get("_id"), row.get("text"), row.get("title", "")
        if isinstance(row_id, int):
            row_id = str(row_id)
        if not isinstance(row_id, str) or not isinstance(text, str):
            problems.append(f"{path}:{line}: must have an _id and a text")
        elif not isinstance(title, str | int | float | None):
            problems.append(f"{path}:{line}: title must be a text or a number")
        elif row_id in by_id:
            problems.append(f"{path}:{line}: _id '{row_id}' occurs twice")
        else:
            by_id[row_id] = {
                "id": row_id,
                "title": "" if title is None else str(title),
                "text": text,
            }
    return by_id


def _read_qrels(
    path: Path, queries: Mapping[str, Any], corpus: Mapping[str, Any], problems: list[str]
) -> dict[str, dict[str, int]]:
    grades_by_query: dict[str, dict[str, int]] = {}
    n_before = len(problems)
    for line, content in read_text_lines(path, problems):
        cells = content.split("\t")
        grade = _grade(cells[2]) if len(cells) == 3 else None
        if line == 1 and len(cells) == 3 and grade is None and cells[0] not in queries:
            continue  # the heading
        if grade is None:
            problems.append(
                f"{path}:{line}: must be query id, document id and a whole grade up to "
                f"{_MOST_GRADE:,}, separated by tabs; found {content[:80]!r}"
            )
            continue
        query, document, _ = cells
        # A missing or broken file has no ids to compare with, and is reported already.
        if queries and query not in queries:
            problems.append(f"{path}:{line}: query '{query}' is not in queries.jsonl")
        elif corpus and document not in corpus:
            problems.append(f"{path}:{line}: document '{document}' is not in corpus.jsonl")
        elif grades_by_query.setdefault(query, {}).setdefault(document, grade) != grade:
            problems.append(
                f"{path}:{line}: document '{document}' has another grade for query '{query}' "
                f"in an earlier line"
            )
    relevant = any(grade > 0 for grades in grades_by_query.values() for grade in grades.values())
    if not relevant and len(problems) == n_before:
        problems.append(f"{path}: judges no document as relevant (a grade above 0)")
    return grades_by_query


def _grade(value: Any) -> int | None:
    """A grade of relevance, which must be a whole number; None for any other value."""
    number = _number(value)
    if number is None or number != int(number) or abs(number) > _MOST_GRADE:
        return None
    return int(number)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _faults(path: Path, problems: Sequence[str]) -> InputError:
    shown = list(problems[:_MAX_SHOWN])
    if len(problems) > _MAX_SHOWN:
        shown.append(f"and {len(problems) - _MAX_SHOWN} more")
    return InputError(join_problems(f"{path} has {len(problems)} problem(s)", shown))


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\n".encode())
    return digest.hexdigest()


def _table_sha256(path: Path, table: OwnTable) -> str:
    """Hash of the file and of the roles of its columns."""
    digest = hashlib.sha256(_sha256([path]).encode())
    digest.update(json.dumps(dict(table.columns), sort_keys=True).encode())
    return digest.hexdigest()
