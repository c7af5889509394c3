"""Users' files of texts: lines, JSON lines and CSV, read alike wherever they are given.

Hides: byte order marks, line ends inside values, long CSV fields. Refuses to know: what the texts
are for.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_FIELD = 1 << 24
"""Characters of one CSV field; Python's own limit is 131,072."""


def read_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of every line that is not empty; only a line feed ends one.

    Args:
        path: UTF-8, with or without a byte order mark.
        problems: what is wrong is added here, with the file and the byte.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        problems.append(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        )


def read_rows(
    path: Path, problems: list[str], *, separator: str = ","
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line and fields of every row of a .csv or .jsonl file.

    Args:
        path: its suffix says which it is.
        problems: what is wrong is added here, with file and line.
        separator: of the columns of a CSV file.
    """
    if path.suffix == ".csv":
        yield from _csv_rows(path, problems, separator)
        return
    for number, line in read_lines(path, problems):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})")
            continue
        except (RecursionError, ValueError) as error:
            problems.append(f"{path}:{number}: not read ({type(error).__name__})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(f"{path}:{number}: must be a JSON object, found {type(row).__name__}")


def _csv_rows(
    path: Path, problems: list[str], separator: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    before = csv.field_size_limit(_MOST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, delimiter=separator)
            for fields in reader:
                yield reader.line_num, {k: v for k, v in fields.items() if k is not None}
    except (UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{path}: is not a CSV file in UTF-8 ({error})")
    finally:
        csv.field_size_limit(before)


def is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair stands alone in a text; tokenizers take no other."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
