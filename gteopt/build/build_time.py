"""How long a build will take, from shapes alone: within a factor of two or so.

Hides: the rates, which were measured on one core of an AMD EPYC with AVX-512 and scale with the
cores. Refuses to know: weights, texts.
"""

from __future__ import annotations

from collections.abc import Mapping

from gteopt.config.recipe import GptqWeights, LayerScheme, NoWeights, Recipe
from gteopt.machine import n_cores

# Rates of one core, fitted to builds of all-MiniLM-L6-v2 (README.md says how long they took).
_GFLOPS = 30e9
_ROUNDED_PER_S = 1.0e7  # weights rounded to nearest
_TRIED_PER_S = 3.2e5  # weights rounded to one of a budget's choices, its loss measured
_TUNED_PER_S = 6.4e6  # weights in one step of tuning
_STEPS = {"fast": 0, "standard": 400, "best": 1600}
_GPU_CORES = 400  # an H100's products beside one core's; not measured
_START_S = 3.0
UNCERTAINTY = 2.0
"""The time may be this many times shorter or longer."""

Shape = tuple[int, int]


def build_seconds(
    recipe: Recipe,
    schemes: Mapping[str, LayerScheme],
    shapes: Mapping[str, Shape],
    n_tokens: int,
    *,
    n_choices: int = 1,
    device: str = "cpu",
) -> float:
    """Seconds that a build of one variant takes, imports left out.

    Args:
        recipe: what is built.
        schemes: the layers that are quantized.
        shapes: output and input features [O, I] of each layer.
        n_tokens: of the calibration texts, padding included.
        n_choices: schemes among which a budget chooses for a layer.
        device: "cpu" or "cuda".
    """
    n_weights = sum(shapes[name][0] * shapes[name][1] for name in schemes)
    cores = _GPU_CORES if device == "cuda" else n_cores()
    weights = recipe.weights
    if isinstance(weights, NoWeights):
        return _START_S
    if not isinstance(weights, GptqWeights):
        return _START_S + n_weights / (_ROUNDED_PER_S * cores)
    n_passes = 3 if weights.gptaq_strength or weights.smooth else 2
    work = n_passes * 2 * n_weights * n_tokens
    for name in schemes:
        rows, columns = shapes[name]
        work += n_tokens * columns**2 + columns**3 + 2 * rows * columns**2
    seconds = work / (_GFLOPS * cores)
    if weights.budget is not None:
        seconds += n_choices * n_weights / (_TRIED_PER_S * cores)
    seconds += _STEPS[weights.effort] * n_weights / (_TUNED_PER_S * cores)
    return _START_S + seconds
