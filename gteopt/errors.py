"""The errors that a user may see, and helpers that word them or recognise lack of memory.

Every message names the thing, what was found, what is allowed and what to do. `gteopt.cli` prints
the message of a `GteoptError` and exits with code 1. Any other error is a bug and keeps its
traceback.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class GteoptError(Exception):
    """An error that the user can fix; its message is complete and needs no traceback.

    Example:
        >>> try:
        ...     model = gteopt.load("no-such-folder")
        ... except gteopt.GteoptError as error:
        ...     print(error)
    """


class InputError(GteoptError):
    """A file, a name or an argument that the user gave is wrong."""


class HubUnreachableError(InputError):
    """The hub cannot be reached: there is no network, or its use is forbidden."""


class UnsupportedError(GteoptError):
    """The request is well-formed, but this model, device or installation cannot do it."""


class IntegrityError(GteoptError):
    """Bytes on disk do not match their manifest or their format."""


class NumericsError(GteoptError):
    """A computation failed numerically (NaN, or a matrix that cannot be factorised)."""


RESUMES = "finished work is kept, and the same command resumes it"
"""End of a message about a command that was stopped and can be resumed."""
_UNSEEN = ("Cc", "Cf", "Cs")
"""Unicode's categories of control, format and surrogate characters."""
_SHOWN = 200
"""Most characters of a foreign value that a message quotes."""
_NO_MEMORY = ("out of memory", "allocate memory", "alloc_failed", "not enough memory")
"""Parts of such messages: from GPU drivers; torch on a CPU and mmap; CUDA libraries; Windows."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the system had no memory left.

    Most libraries have no exception type for it, so the message is searched.
    """
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(part in message for part in _NO_MEMORY)


def escape_control_characters(text: str) -> str:
    """The text with control characters as escapes; line breaks and tabs stay."""
    return "".join(
        repr(char)[1:-1] if char not in "\n\t" and unicodedata.category(char) in _UNSEEN else char
        for char in text
    )


def shorten_value(value: object) -> str:
    """A value for a message: one line, no control characters, at most 200 characters."""
    text = escape_control_characters(" ".join(str(value).split()))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def join_problems(subject: str, problems: Iterable[str]) -> str:
    """One message that lists every problem found in one subject (a file, a model)."""
    return "\n  - ".join([f"{subject}:", *problems])


def install_command(extra: str) -> str:
    """The command that installs an extra of gteopt, quoted for bash and zsh.

    Example:
        >>> install_command("serve")
        "pip install 'gteopt[serve]'"
    """
    return f"pip install 'gteopt[{extra}]'"


def suggest_names(name: str, known: Iterable[str]) -> str:
    """The end of an 'unknown name' message: the nearest known names, or all of them.

    Args:
        name: what the user wrote.
        known: the names that exist.
    """
    options = sorted(known)
    whole = [option for option in options if name.lower() in option.split("-")]
    if whole and name.lower() not in options:
        fewest_parts = min(option.count("-") for option in whole)
        near = [option for option in whole if option.count("-") == fewest_parts][:2]
        return f"did you mean {' or '.join(near)}?"
    near = difflib.get_close_matches(name.lower(), options, n=2, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(options) or 'none'}"
