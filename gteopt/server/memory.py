"""Keeps the memory of a long-running process flat.

Hides: the call of the C library. Refuses to know: models and requests.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

_LEAST_STEP = 16


def pass_padding(lengths: Sequence[int]) -> list[int]:
    """Lengths of texts to add to a pass, so that passes have few different totals of tokens.

    oneDNN compiles kernels for each number of rows, and never frees some of them. Totals are
    multiples of 16. From 1,024 on, the step is a 32nd of the power of two below the total.

    Args:
        lengths: tokens of each text of the pass; no added text is longer than the longest.
    """
    longest, total = max(lengths, default=0), sum(lengths)
    if not longest:
        return []
    step = max(_LEAST_STEP, 1 << (total.bit_length() - 1) >> 5)
    n_whole, rest = divmod(-total % step, longest)
    return [longest] * n_whole + ([rest] if rest else [])


def return_free_memory() -> None:
    """Return free memory to the system; the C library keeps it where used memory lies behind it.

    A call takes some milliseconds. It does nothing where the C library is not glibc.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
