"""Bits for layers: the choice with the least predicted loss that fits a byte budget.

The losses of layers that are quantized alone are added, as in HAWQ-V3 (Yao et al. 2021,
arXiv:2011.10680). scipy solves the integer program to the optimum. Refuses to know: what a loss is,
where it was measured.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from gteopt.errors import InputError, NumericsError


def allocate(
    losses: Sequence[Sequence[float]], n_bytes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """Pick one choice a layer: least sum of losses with the sum of bytes within the budget.

    Args:
        losses: of each choice of each layer.
        n_bytes: what each choice of each layer takes, shaped like `losses`.
        budget: bytes that all layers may take together.

    Returns:
        For each layer, the place of the chosen one among its choices.

    Raises:
        InputError: even the smallest choices exceed the budget.
        NumericsError: the solver found no answer.
    """
    least = sum(min(sizes) for sizes in n_bytes)
    if least > budget:
        raise InputError(
            f"a budget of {budget:,} bytes is too small: the smallest choices take {least:,}"
        )
    layer = np.repeat(np.arange(len(losses)), [len(choices) for choices in losses])
    loss = np.concatenate([np.asarray(choices, dtype=np.float64) for choices in losses])
    size = np.concatenate([np.asarray(choices, dtype=np.float64) for choices in n_bytes])
    one_each = (layer == np.arange(len(losses))[:, None]).astype(np.float64)
    if not np.isfinite(loss).all():
        raise NumericsError("a layer's measured loss is NaN or infinite; bits cannot be chosen")
    # Scaled, because the solver's tolerances are absolute, and losses can be 1e-6.
    with _prints_as_errors():
        answer = milp(
            loss / max(loss.max(), np.finfo(np.float64).tiny),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(size[None] / budget, -np.inf, 1),
            ],
            integrality=np.ones(len(loss)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-9},
        )
    if answer.x is None:
        raise NumericsError(f"no allocation of bits was found: {answer.message}")
    picked = answer.x > 0.5
    starts = np.searchsorted(layer, np.arange(len(losses)))
    return [int(i) for i in np.flatnonzero(picked) - starts]


@contextmanager
def _prints_as_errors() -> Iterator[None]:
    """Send what a library prints to the stream of errors.

    scipy's solver (HiGHS 1.8 and later) prints a name of its functions on some problems, and the
    caller's output may be JSON.
    """
    sys.stdout.flush()
    try:
        own = os.dup(1)
    except OSError:  # closed: nothing can be printed
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).fflush(None)  # while it still leads there
        os.dup2(own, 1)
        os.close(own)
