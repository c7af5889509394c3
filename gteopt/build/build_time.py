"""Estimate how long a build takes from its operations and this machine's speed.

Shapes give the number of operations. A probe of a second or two measures the speed of the solver's
two kinds of work: products of float32 matrices, and the search of grids. Hides: the counts and the
rates. Refuses to know: weights, texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from gteopt.build.output_hessians import MOST_OUTPUTS, N_PROBES
from gteopt.config.recipe import GptqWeights, LayerScheme, NoWeights, Recipe
from gteopt.cores import n_cores
from gteopt.quant.grid_search import fit_grids
from gteopt.quant.products import matrix_product

# Rates of one core, fitted to builds of all-MiniLM-L6-v2.
_ROUNDED_PER_S = 1.0e7  # weights rounded to nearest
_TRIED_PER_S = 3.2e5  # weights whose loss is measured for one of a budget's choices
_TUNED_PER_S = 6.4e6  # weights in one step of tuning
_STEPS = {"fast": 0, "standard": 400, "best": 1600}
_GPU_CORES = 400  # CPU cores that multiply as fast as an H100; not measured
_TRIES = 5
_SUSTAINED = 0.5
"""Share of the probe's rate that a whole build reaches: its matrices do not fit the cache, and
results are copied."""
_START_S = 3.0
UNCERTAINTY = 2.0
"""The real time may be this many times shorter or longer than the estimate."""

Shape = tuple[int, int]


@dataclass(frozen=True)
class BuildRates:
    """What one core of this machine does in a second of CPU time.

    Attributes:
        flops: floating-point operations of the solver's float32 products.
        searched: weights whose grid is searched.
    """

    flops: float
    searched: float


@lru_cache
def measure_build_rates() -> BuildRates:
    """Measure the speed of the solver's work on one thread; the result is cached."""
    n_threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    scheme = LayerScheme(bits=4, group_size=128, symmetric=False)
    try:
        torch.set_num_threads(1)
        multiplied = min(_cpu_seconds(lambda: matrix_product(a, b)) for _ in range(_TRIES))
        rows = a[:256]
        searched = min(
            _cpu_seconds(lambda: fit_grids(rows, scheme, [b[0].square(), None], clip_search=True))
            for _ in range(_TRIES)
        )
    finally:
        torch.set_num_threads(n_threads)
    return BuildRates(2 * 1024**3 * _SUSTAINED / multiplied, rows.numel() * _SUSTAINED / searched)


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return max(time.process_time() - started, 1e-6)


def estimate_build_seconds(
    recipe: Recipe,
    shapes: Sequence[Shape],
    n_tokens: int,
    *,
    n_choices: int = 1,
    gradient_tokens: int = 0,
    device: str = "cpu",
) -> float:
    """Seconds that a build of one variant takes, without imports.

    Args:
        recipe: the recipe of the build.
        shapes: output and input features [O, I] of each layer that is quantized.
        n_tokens: tokens of the calibration texts, including padding.
        n_choices: schemes from which a budget chooses for each layer.
        gradient_tokens: tokens of the texts that gradients are measured on.
        device: "cpu" or "cuda".
    """
    n_weights = sum(rows * columns for rows, columns in shapes)
    cores = _GPU_CORES if device == "cuda" else n_cores()
    weights = recipe.weights
    if isinstance(weights, NoWeights):
        return _START_S
    if not isinstance(weights, GptqWeights):
        return _START_S + n_weights / (_ROUNDED_PER_S * cores)
    n_passes = 3 if weights.gptaq_strength or weights.smooth else 2
    work = n_passes * 2 * n_weights * n_tokens
    work += (2 + N_PROBES) * 2 * n_weights * gradient_tokens
    for rows, columns in shapes:
        work += N_PROBES * gradient_tokens * rows * min(rows, MOST_OUTPUTS)
        # The Hessian; its factor and the factor's inverse; rounding, two errors and the signal.
        work += n_tokens * columns**2 + 2 * columns**3 // 3 + 4 * rows * columns**2
        if weights.gptaq_strength:  # the correction, by two triangular products
            work += 2 * rows * columns**2
    rates = measure_build_rates()
    seconds = work / (rates.flops * cores) + n_weights / (rates.searched * cores)
    if weights.budget is not None:
        seconds += n_choices * n_weights / (_TRIED_PER_S * cores)
    seconds += _STEPS[weights.effort] * n_weights / (_TUNED_PER_S * cores)
    return _START_S + seconds
