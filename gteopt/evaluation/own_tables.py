"""Read tables of a user's own texts (CSV, TSV, JSONL, Parquet) and recognise their columns.

Hides: file formats, separators, and how columns are recognised. Refuses to know: mteb, encoders,
how the texts are used.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gteopt.config.plan import ColumnRole
from gteopt.config.text_files import read_csv_heading, read_text_lines, read_text_rows
from gteopt.errors import InputError, suggest_names

TableKind = Literal["pairs", "search", "texts"]
FORMS = (".csv", ".tsv", ".jsonl", ".parquet")
"""Suffixes of the files that can be read."""
NAMES: dict[ColumnRole, tuple[str, ...]] = {
    "sentence1": ("sentence1", "text1", "a", "sent1", "text_a", "first"),
    "sentence2": ("sentence2", "text2", "b", "sent2", "text_b", "second"),
    "score": ("score", "label", "similarity_score", "similarity", "gold", "relevance", "grade"),
    "query": ("query", "question", "anchor", "search_query"),
    "positive": ("positive", "passage", "document", "answer", "context", "response"),
    "negative": ("negative", "hard_negative"),
    "text": ("text", "sentence", "content", "body"),
}
"""Column names that are recognised for each role, the likeliest first."""
_NEEDED: dict[TableKind, tuple[ColumnRole, ...]] = {
    "pairs": ("sentence1", "sentence2", "score"),
    "search": ("query", "positive"),
    "texts": ("text",),
}
_OPTIONAL: dict[TableKind, tuple[ColumnRole, ...]] = {
    "pairs": (),
    "search": ("negative", "score"),
    "texts": (),
}
_MAX_NAMES = 12  # column names that a message lists
_MAX_HEADING = 1 << 16
"""Characters of a heading in which the separator is sought; Python's csv limits a field to more."""


@dataclass(frozen=True)
class OwnTable:
    """The rows of one file with their line numbers.

    Attributes:
        kind: the kind of table that its columns make it.
        columns: name of the column for each role.
        rows: line in the file (from 1), and the value of each role.
    """

    kind: TableKind
    columns: Mapping[ColumnRole, str]
    rows: tuple[tuple[int, Mapping[ColumnRole, Any]], ...]


def read_own_table(
    path: Path,
    problems: list[str],
    *,
    kinds: Sequence[TableKind] = ("pairs", "search"),
    columns: Mapping[ColumnRole, str] | None = None,
) -> OwnTable:
    """Read a table and recognise the roles of its columns.

    Args:
        path: a file with one of the suffixes in `FORMS`.
        problems: faults of single lines are added to this list.
        kinds: the kinds of table that are accepted.
        columns: columns that the user named; other columns are recognised by their names.

    Raises:
        InputError: another suffix, or columns of no accepted kind. The message gives the columns of
            the file, the accepted columns and an example.
    """
    if path.suffix not in FORMS:
        raise InputError(f"{path}: must end in {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    n_before = len(problems)
    heading, rows = _read(path, problems)
    if not rows and len(problems) > n_before:  # the problems say why there are no rows
        return OwnTable(kinds[0], {}, ())
    kind, chosen = _recognise(path, heading, kinds, columns or {})
    role_rows = tuple(
        (line, {role: row.get(name) for role, name in chosen.items()}) for line, row in rows
    )
    return OwnTable(kind, chosen, role_rows)


def _recognise(
    path: Path,
    heading: Sequence[str],
    kinds: Sequence[TableKind],
    given: Mapping[ColumnRole, str],
) -> tuple[TableKind, dict[ColumnRole, str]]:
    for role, name in given.items():
        if role not in get_args(ColumnRole):
            raise InputError(
                f"--columns {role}={name}: {suggest_names(role, get_args(ColumnRole))}"
            )
        if name not in heading:
            raise InputError(
                f"--columns {role}={name}: {path} has no such column; "
                f"{suggest_names(name, heading)}"
            )
    lower = {name.lower(): name for name in reversed(heading)}
    guessed: dict[ColumnRole, str] = {
        role: lower[name]
        for role in NAMES
        for name in reversed(NAMES[role])
        if name in lower and lower[name] not in given.values()
    }
    roles = {**guessed, **given}
    fitting = [kind for kind in kinds if all(role in roles for role in _NEEDED[kind])]
    # Roles that the user named decide first: --columns query=... means a search.
    fitting.sort(key=lambda kind: -sum(role in given for role in _NEEDED[kind]))
    if not fitting:
        raise InputError(_unrecognised(path, heading, kinds))
    kind = fitting[0]
    wanted = (*_NEEDED[kind], *_OPTIONAL[kind])
    return kind, {role: roles[role] for role in wanted if role in roles}


def _unrecognised(path: Path, heading: Sequence[str], kinds: Sequence[TableKind]) -> str:
    """A message of three lines: the columns of the file, the accepted columns, an example."""
    names = ", ".join(heading[:_MAX_NAMES]) or "nothing"
    accepted = "; ".join(", ".join(_NEEDED[kind]) for kind in kinds)
    placeholders = list(heading) + ["COLUMN"] * 3
    example = ",".join(
        f"{role}={name}" for role, name in zip(_NEEDED[kinds[0]], placeholders, strict=False)
    )
    return (
        f"{path}: the column names are not recognised; found {names}\n"
        f"  accepted: {accepted} (first line of the file, or the fields of each JSON object)\n"
        f"  or name the columns, for example: --columns {example}"
    )


def _read(path: Path, problems: list[str]) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """Column names, and the rows with their line numbers."""
    if path.suffix == ".parquet":
        rows = list(enumerate(_read_parquet(path), start=1))
        return list(rows[0][1]) if rows else [], rows
    if path.suffix == ".jsonl":
        rows = list(read_text_rows(path, problems))
        return list(dict.fromkeys(name for _, row in rows for name in row)), rows
    return _read_csv(path, problems)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (ValueError, OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: is not a Parquet file ({error})") from error
    return rows


def _read_csv(
    path: Path, problems: list[str]
) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    heading = next((line for _, line in read_text_lines(path, [])), "")
    separator = _separator(path, heading)
    rows = list(read_text_rows(path, problems, separator=separator))
    return read_csv_heading(path, [], separator=separator), rows


def _separator(path: Path, heading: str) -> str:
    """The separator with which the most names of the heading are known."""
    known = {name for names_of_role in NAMES.values() for name in names_of_role}
    names = heading.lower().partition("\r")[0][:_MAX_HEADING]

    def n_known(separator: str) -> tuple[int, int]:
        cells = next(csv.reader([names], delimiter=separator), [])
        return len(known & {cell.strip() for cell in cells}), len(cells)

    first = "\t" if path.suffix == ".tsv" else ","
    return max([first, *(separator for separator in ",;\t" if separator != first)], key=n_known)
