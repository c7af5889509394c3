"""Ctrl-C while the program starts, and what it may have broken afterwards.

Before a command begins there is nothing to stop or to keep, and so nothing to say. Imports nothing
that takes time. Refuses to know: what commands do with an interruption.
"""

from __future__ import annotations

import os
import signal

_EXIT_CODE = 130
"""What shells report for a process that Ctrl-C ended."""


_asked_to_stop = False


def _leave(*_: object) -> None:
    os._exit(_EXIT_CODE)  # an exception would be printed by whatever import it comes up in


def _raise(*_: object) -> None:
    global _asked_to_stop
    _asked_to_stop = True
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether Ctrl-C came: an import that it cut in two fails later, with an error of its own."""
    return _asked_to_stop


def leave_on_interrupt() -> None:
    """Let Ctrl-C end the process without a word, unless a parent asked for it to be ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: a command has begun, which has to clean up."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _raise)
