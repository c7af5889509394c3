"""Users' text files (lines, JSON lines and CSV), read the same way in every command.

Hides: byte order marks, line ends inside values, long CSV fields. Refuses to know: what the texts
are used for.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_MOST_FIELD = 1 << 24
"""Characters of one CSV field; Python's own limit is 131,072."""


def read_text_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of every line that is not empty; only a line feed ends a line.

    Args:
        path: UTF-8, with or without a byte order mark.
        problems: problems are added to this list, with file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        problems.append(_not_utf8(path, error))


def read_text_rows(
    path: Path, problems: list[str], *, separator: str = ","
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and fields of every row of a .csv, .tsv or .jsonl file.

    Args:
        path: its suffix tells the format.
        problems: problems are added to this list, with file and line.
        separator: separator of columns in a CSV file.
    """
    rows = (
        _json_rows(path, problems) if path.suffix == ".jsonl" else _csv(path, problems, separator)
    )
    for number, row in rows:
        broken = [name for name, value in row.items() if not is_unicode(f"{name}{value}")]
        if broken:
            named = repr(broken[0].encode(errors="replace").decode()[:40])
            problems.append(
                f"{path}:{number}: {named} holds half a surrogate pair (part of an emoji, for "
                f"example); remove it"
            )
        else:
            yield number, row


def read_csv_heading(path: Path, problems: list[str], *, separator: str = ",") -> list[str]:
    """Names of the columns of a CSV file; empty for a file that cannot be read."""
    with _reading_csv(path, problems) as handle:
        return next(csv.reader(handle, delimiter=separator), [])
    return []


def is_unicode(text: str) -> bool:
    """Whether a text is free of lone surrogates, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_text_lines(path, problems):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            problems.append(f"{path}:{number}: is nested too deeply to be read; flatten it")
        except ValueError:
            problems.append(f"{path}:{number}: holds a number with too many digits to be read")
        else:
            if isinstance(row, dict):
                yield number, row
            else:
                problems.append(
                    f"{path}:{number}: must be a JSON object, found {type(row).__name__}"
                )


def _csv(path: Path, problems: list[str], separator: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with _reading_csv(path, problems) as handle:
        reader = csv.DictReader(handle, delimiter=separator)
        for fields in reader:
            yield reader.line_num, {k: v for k, v in fields.items() if k is not None}


@contextmanager
def _reading_csv(path: Path, problems: list[str]) -> Iterator[TextIO]:
    """The open file with a high limit for fields; errors while reading become problems."""
    before = csv.field_size_limit(_MOST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            yield handle
    except UnicodeDecodeError as error:
        problems.append(_not_utf8(path, error))
    except csv.Error as error:
        problems.append(f"{path}: is not a CSV file ({error})")
    finally:
        csv.field_size_limit(before)


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """A problem with its line; the error itself counts bytes from the start of a read buffer."""
    number = 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as at:
                return (
                    f"{path}:{number}: is not UTF-8 text ({at.reason} at byte {at.start + 1} of "
                    f"the line); save the file as UTF-8"
                )
    return f"{path}:{number}: is not UTF-8 text ({error.reason}); save the file as UTF-8"
