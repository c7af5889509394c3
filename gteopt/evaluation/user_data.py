"""A user's own data: a collection in the BEIR layout, a file of labelled pairs, or plain texts.

Hides: the file forms, and how their faults are found, all of them at once. Refuses to know: mteb,
encoders, scores.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gteopt.errors import InputError, join_problems

_MAX_SHOWN = 20  # problems listed of one data set; a wrong separator breaks every line
_MIN_PAIRS = 3
_FIRST = ("sentence1", "text1", "a")
_SECOND = ("sentence2", "text2", "b")
_LABEL = ("score", "label", "similarity_score")


@dataclass(frozen=True)
class Collection:
    """Documents, queries, and which documents answer which query.

    Attributes:
        corpus: rows of id, title and text.
        queries: rows of id and text.
        qrels: by split (a file of `qrels/`), then query, the grade of each judged document.
        sha256: over the files that were read.
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


def read_own(path: Path) -> Collection | Pairs:
    """Read a folder in the BEIR layout, or a .csv or .jsonl file of pairs.

    Raises:
        InputError: nothing of the kind; or lists every fault with its file and line.
    """
    if path.is_dir():
        return read_collection(path)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; give a folder with corpus.jsonl, queries.jsonl and "
            f"qrels/*.tsv, or a .csv or .jsonl file of labelled pairs"
        )
    return read_pairs(path)


def read_collection(folder: Path) -> Collection:
    """Read `corpus.jsonl` (_id, title, text), `queries.jsonl` (_id, text) and `qrels/*.tsv`.

    A line of a qrels file is query id, document id and grade, separated by tabs, below an optional
    heading. Grades above 0 are relevant. Queries that no line judges are not searched.

    Raises:
        InputError: lists every missing file, broken line and id that is nowhere.
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
        queries=tuple(row for each, row in queries.items() if each in judged),
        qrels=qrels,
        sha256=_sha256([folder / "corpus.jsonl", folder / "queries.jsonl", *qrels_files]),
    )


def read_pairs(path: Path) -> Pairs:
    """Read labelled pairs: columns (or JSON fields) sentence1, sentence2 and score.

    Columns of a .csv are separated by commas, semicolons or tabs.

    Raises:
        InputError: lists every broken line, or says why no correlation can be measured.
    """
    problems: list[str] = []
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    for line, row in _rows(path, problems):
        values = [_field(row, names) for names in (_FIRST, _SECOND, _LABEL)]
        lacking = [
            names[0]
            for names, value in zip((_FIRST, _SECOND, _LABEL), values, strict=True)
            if value is None
        ]
        if lacking:
            problems.append(
                f"{path}:{line}: no field {' and '.join(lacking)}; found "
                f"{', '.join(str(key) for key in row) or 'nothing'}"
            )
            continue
        grade = _number(values[2])
        if grade is None:
            problems.append(f"{path}:{line}: score is {values[2]!r}, must be a number")
        elif not (isinstance(values[0], str) and isinstance(values[1], str)):
            problems.append(f"{path}:{line}: sentence1 and sentence2 must be texts")
        else:
            first.append(values[0])
            second.append(values[1])
            scores.append(grade)
    if not problems and len(scores) < _MIN_PAIRS:
        problems.append(f"{path}: {len(scores)} pairs; a rank correlation needs {_MIN_PAIRS}")
    if not problems and len(set(scores)) == 1:
        problems.append(f"{path}: every score is {scores[0]:g}; there is no order to agree with")
    if problems:
        raise _faults(path, problems)
    return Pairs(tuple(first), tuple(second), tuple(scores), _sha256([path]))


def read_texts(path: Path) -> list[str]:
    """Distinct texts: a line each of a text file, or the field `text` of a .jsonl file.

    Raises:
        InputError: no such file, broken lines, or fewer than two texts.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a file with one text a line, or a .jsonl")
    problems: list[str] = []
    texts: list[str] = []
    if path.suffix == ".jsonl":
        for line, row in _rows(path, problems):
            text = row.get("text")
            if isinstance(text, str):
                texts.append(text)
            else:
                problems.append(f"{path}:{line}: no field text; found {', '.join(map(str, row))}")
    else:
        texts = [line.strip() for _, line in _lines(path, problems)]
    distinct = list(dict.fromkeys(text for text in texts if text))
    if not problems and len(distinct) < 2:
        problems.append(f"{path}: {len(distinct)} different texts; fidelity compares at least two")
    if problems:
        raise _faults(path, problems)
    return distinct


def _read_texts(path: Path, problems: list[str]) -> dict[str, dict[str, str]]:
    """Rows of id, title and text by id; none of a file that is not there."""
    found: dict[str, dict[str, str]] = {}
    if not path.is_file():
        return found
    for line, row in _rows(path, problems):
        own_id, text, title = row.get("_id"), row.get("text"), row.get("title", "")
        if isinstance(own_id, int):
            own_id = str(own_id)
        if not isinstance(own_id, str) or not isinstance(text, str):
            problems.append(f"{path}:{line}: must have an _id and a text")
        elif own_id in found:
            problems.append(f"{path}:{line}: _id '{own_id}' is there twice")
        else:
            found[own_id] = {"id": own_id, "title": title or "", "text": text}
    return found


def _read_qrels(
    path: Path, queries: Mapping[str, Any], corpus: Mapping[str, Any], problems: list[str]
) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    n_before = len(problems)
    for line, content in _lines(path, problems):
        cells = content.split("\t")
        grade = _number(cells[2]) if len(cells) == 3 else None
        if line == 1 and len(cells) == 3 and grade is None and cells[0] not in queries:
            continue  # the heading
        if grade is None or grade != int(grade):
            problems.append(
                f"{path}:{line}: must be query id, document id and a whole grade, separated by "
                f"tabs; found {content[:80]!r}"
            )
            continue
        query, document, _ = cells
        # Ids of a file that is missing or broken cannot be looked up; that is said already.
        if queries and query not in queries:
            problems.append(f"{path}:{line}: query '{query}' is not in queries.jsonl")
        elif corpus and document not in corpus:
            problems.append(f"{path}:{line}: document '{document}' is not in corpus.jsonl")
        elif found.setdefault(query, {}).setdefault(document, int(grade)) != int(grade):
            problems.append(
                f"{path}:{line}: document '{document}' has another grade for query '{query}' above"
            )
    relevant = any(grade > 0 for grades in found.values() for grade in grades.values())
    if not relevant and len(problems) == n_before:
        problems.append(f"{path}: judges no document as relevant (a grade above 0)")
    return found


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of every line that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        problems.append(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})")


def _rows(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and fields of every row of a .csv or .jsonl file."""
    if path.suffix == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as handle:
                reader = csv.DictReader(handle, delimiter=_separator(handle.readline()))
                handle.seek(0)
                for fields in reader:
                    yield reader.line_num, {k: v for k, v in fields.items() if k is not None}
        except (UnicodeDecodeError, csv.Error) as error:
            problems.append(f"{path}: is not a CSV file in UTF-8 ({error})")
        return
    if path.suffix != ".jsonl":
        problems.append(f"{path}: must end in .csv or .jsonl")
        return
    for number, line in _lines(path, problems):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"{path}:{number}: must be a JSON object, found {type(row).__name__}")


def _separator(heading: str) -> str:
    """What separates the columns of a CSV file: commas, or what makes its heading one of pairs."""
    for each in ",;\t":
        cells = next(csv.reader([heading], delimiter=each), [])
        if all(set(cells) & set(names) for names in (_FIRST, _SECOND, _LABEL)):
            return each
    return ","


def _field(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
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
