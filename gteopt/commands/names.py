"""Names of artifacts in results: their folders' names. Imports no large library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gteopt.errors import InputError


def named(sources: Sequence[str]) -> dict[str, str]:
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
