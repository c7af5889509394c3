"""Choose the bits of each layer: the least predicted loss within a budget of bytes.

The predicted loss is the sum of the losses of each layer when it alone is quantized, as in HAWQ-V3
(Yao et al. 2021, arXiv:2011.10680). scipy solves the integer program to the optimum. Refuses to
know: what a loss is, where it was measured.
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


def allocate_bits(
    losses: Sequence[Sequence[float]], n_bytes: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """Pick one choice for each layer: the least sum of losses whose bytes fit the budget.

    Args:
        losses: loss of each choice, layer by layer.
        n_bytes: bytes of each choice, shaped like `losses`.
        budget: bytes that all layers may take together.

    Returns:
        For each layer, the index of the chosen choice.

    Raises:
        InputError: even the smallest choices exceed the budget.
        NumericsError: a loss is not finite, or the solver found no solution.
    """
    least = sum(min(sizes) for sizes in n_bytes)
    if least > budget:
        raise InputError(
            f"a budget of {budget:,} bytes is too small: the smallest choices take {least:,}"
        )
    layer = np.repeat(np.arange(len(losses)), [len(choices) for choices in losses])
    loss = np.concatenate([np.asarray(choices, dtype=np.float64) for choices in losses])
    size = np.concatenate([np.asarray(choices, dtype=np.float64) for choices in n_bytes])
    is_of_layer = (layer == np.arange(len(losses))[:, None]).astype(np.float64)
    if not np.isfinite(loss).all():
        raise NumericsError("a layer's measured loss is NaN or infinite; bits cannot be chosen")
    # Losses are scaled, because the solver's tolerances are absolute and losses can be 1e-6.
    with _prints_as_errors():
        answer = milp(
            loss / max(loss.max(), np.finfo(np.float64).tiny),
            constraints=[
                LinearConstraint(is_of_layer, 1, 1),
                LinearConstraint(size[None] / budget, -np.inf, 1),
            ],
            integrality=np.ones(len(loss)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-9},
        )
    if answer.x is None:
        raise NumericsError(f"the solver found no choice of bits: {answer.message}")
    picked = answer.x > 0.5
    starts = np.searchsorted(layer, np.arange(len(losses)))
    return [int(i) for i in np.flatnonzero(picked) - starts]


@contextmanager
def _prints_as_errors() -> Iterator[None]:
    """Send what a library prints to stderr instead of stdout.

    scipy's solver (HiGHS 1.8 and later) prints a debug line on some problems, which would spoil
    JSON on stdout.
    """
    sys.stdout.flush()
    try:
        stdout = os.dup(1)
    except OSError:  # stdout is closed, so nothing can be printed there
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).fflush(None)  # C's buffer, while file descriptor 1 is still stderr
        os.dup2(stdout, 1)
        os.close(stdout)
