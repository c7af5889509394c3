"""Ctrl-C before a command begins: the process ends at once and silently.

At that time there is nothing to stop or to save. The module imports nothing that takes time.
Refuses to know: what commands do with an interruption.
"""

from __future__ import annotations

import os
import signal

_EXIT_CODE = 130
"""The exit code that shells report for a process that Ctrl-C ended."""
_asked_to_stop = False


def _leave(*_: object) -> None:
    os._exit(_EXIT_CODE)  # an exception would appear as a traceback of the import in progress


def _raise(*_: object) -> None:
    global _asked_to_stop
    _asked_to_stop = True
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed; an import that it interrupted may fail later in another way."""
    return _asked_to_stop


def leave_on_interrupt() -> None:
    """Let Ctrl-C end the process silently, unless the parent process had Ctrl-C ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, so that a command that has begun can clean up."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _raise)
