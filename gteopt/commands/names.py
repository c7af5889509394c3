"""Names of artifacts in results: their folders' names. Imports no large library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gteopt.errors import InputError


def name_sources(sources: Sequence[str]) -> dict[str, str]:
    """Sources by short name, the last part of their path.

    Raises:
        InputError: two sources have the same last part.
    """
    by_name: dict[str, str] = {}
    for source in sources:
        name = Path(source).name or source
        if name in by_name and by_name[name] != source:
            raise InputError(
                f"two artifacts are named {name} ({by_name[name]}, {source}); rename one folder"
            )
        by_name[name] = source
    return by_name


def name_pair(first: Path, second: Path) -> tuple[str, str]:
    """Different names for two sources: their folders' names, or else the paths as they were given.

    A source that is given twice gets a number behind its name.
    """
    names = first.resolve().name, second.resolve().name
    if names[0] == names[1]:
        names = str(first), str(second)
    return names if names[0] != names[1] else (f"{names[0]} (1)", f"{names[1]} (2)")
