"""Returns the free memory of a long-running process to the system.

Hides: the call of the C library. Refuses to know: models and requests.
"""

from __future__ import annotations

import ctypes
import sys


def return_free_memory() -> None:
    """Return free memory to the system; the C library keeps it where used memory lies behind it.

    A call takes some milliseconds. It does nothing where the C library is not glibc.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
