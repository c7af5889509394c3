"""What artifacts are called in results: their folders' names. Imports no large library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gteopt.errors import InputError


def named(sources: Sequence[str]) -> dict[str, str]:
    """Short names for sources: the folder's last part, where that tells them apart.

    Raises:
        InputError: two of them have the same last part.
    """
    found: dict[str, str] = {}
    for source in sources:
        name = Path(source).name or source
        if name in found and found[name] != source:
            raise InputError(
                f"two artifacts are called {name} ({found[name]}, {source}); rename one folder"
            )
        found[name] = source
    return found
