"""How long steps report their progress.

A step calls `progress(what, done, total)`; `ignore_progress` drops the call. Bars are in
`cli.progress_bars`.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives how far a long step is; the command line draws a bar from it."""

    def __call__(self, what: str, done: int, total: int, /) -> None:
        """`done` of `total` units of the step `what` are finished."""


def ignore_progress(what: str, done: int, total: int) -> None:
    """The progress receiver that shows nothing (the default from Python)."""
