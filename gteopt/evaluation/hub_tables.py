"""Find the file of a user's table: a path, or a data set on the Hub or in the Hub's layout.

Hides: where the file of a split lies. Refuses to know: what the table holds; see `user_data`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from gteopt.errors import InputError
from gteopt.evaluation.own_tables import FORMS

_NAME = re.compile(r"(?P<set>[\w.-]+/[\w.-]+?)(?::(?P<part>[\w./-]+))?", re.ASCII)
_SPLITS = ("test", "validation", "dev", "train")
"""Splits to look for, in this order, if none is named."""
_MOST_SHOWN = 8  # files that a message lists


def local_table(path: Path, *, hub_dir: Path | None = None) -> Path:
    """The file or folder that `--data` means.

    Args:
        path: a file, a folder, or the name of a data set: ORG/NAME, ORG/NAME:SPLIT, or
            ORG/NAME:FILE.
        hub_dir: folder in the Hub's layout. If it is given, the network is not used.

    Returns:
        `path` if it exists, or the file of the data set. Any other path is returned unchanged.

    Raises:
        InputError: no such data set or split, several files of the split, or no network.
    """
    named = _NAME.fullmatch(path.as_posix())
    if path.exists() or named is None or (path.suffix in FORMS and named["part"] is None):
        return path
    name, part = named["set"], named["part"]
    if hub_dir is None:
        return _downloaded(name, part)
    folder = hub_dir / name
    if not folder.is_dir():
        raise InputError(
            f"--data {path}: there is no such file, and no data set {folder}; to add it: hf "
            f"download --repo-type dataset {name} --local-dir {folder}"
        )
    files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*"))]
    return folder / _file_of_split(files, name, part)


def _downloaded(name: str, part: str | None) -> Path:
    """The file of a split from the Hub; no other file is downloaded."""
    from gteopt.model import hub

    try:
        repository = hub.find_repository(name, kind="dataset")
    except InputError as error:
        raise type(error)(f"--data {name}: there is no such file; on the Hub: {error}") from None
    if repository is None:
        raise InputError(
            f"--data {name}: there is no such file; on the Hub: {hub.missing_repository(name)}"
        )
    return hub.cached_hub_file(
        repository, _file_of_split(repository.content, name, part), kind="dataset"
    )


def _file_of_split(files: Sequence[str], name: str, part: str | None) -> str:
    tables = [file for file in files if PurePosixPath(file).suffix in FORMS]
    if part in tables:
        return part
    wanted = _SPLITS if part is None else (part,)
    for split in wanted:
        of_split = [file for file in tables if _is_of(file, split)]
        if len(of_split) == 1:
            return of_split[0]
        if of_split:
            raise InputError(
                f"data set {name} has several files of {split} ({_shown(of_split)}); name one: "
                f"--data {name}:{of_split[0]}"
            )
    if part is None and len(tables) == 1:
        return tables[0]
    raise InputError(
        f"data set {name} has no file of {' or '.join(wanted)} that ends in "
        f"{', '.join(FORMS[:-1])} or {FORMS[-1]}; found {_shown(tables) or 'no such file'}"
    )


def _is_of(file: str, split: str) -> bool:
    """Whether a file belongs to a split, by its name or its folders."""
    path = PurePosixPath(file)
    return split in (*path.parent.parts, *re.split(r"[-_.]", path.name))


def _shown(files: Sequence[str]) -> str:
    more = f" and {len(files) - _MOST_SHOWN} more" if len(files) > _MOST_SHOWN else ""
    return ", ".join(files[:_MOST_SHOWN]) + more
