"""Which engines open a variant, given its checkpoint format and its recipe.

Refuses to know: torch, files. docs/recipes.md says where each engine was tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from gteopt.config.recipe import FormatName, NoWeights, Recipe

Engine = Literal["sentence-transformers", "transformers", "vllm", "gteopt", "openvino"]
EngineChoice = Literal["any", "sentence-transformers", "transformers", "vllm", "gteopt", "openvino"]
OPENS: dict[FormatName | None, tuple[Engine, ...]] = {
    None: ("sentence-transformers", "transformers", "vllm", "gteopt", "openvino"),
    "gptq": ("sentence-transformers", "transformers", "gteopt", "openvino"),
    "compressed-tensors": (
        *("sentence-transformers", "transformers", "vllm", "gteopt", "openvino"),
    ),
    "bitsandbytes": ("sentence-transformers", "transformers", "vllm", "gteopt", "openvino"),
    "gteopt": ("gteopt", "openvino"),
}
"""Engines by checkpoint format; None is a folder without quantized weights.

vLLM is not listed for gptq: its kernels for that format read only symmetric weights of 4 and 8
bits. It does read the same weights as compressed-tensors.
"""
_OF_ARCHITECTURE: dict[str, tuple[Engine, ...]] = {
    "static_embedding": ("sentence-transformers", "gteopt"),
    "nvembed": ("gteopt", "openvino"),
}
"""Engines by `model_type`, for architectures that few engines open.

A table of token vectors has no transformer. Other engines lack NV-Embed's latent-attention pooling.
"""
_ONLY_GTEOPT_CODES = ("int8", "binary")


def engines_of(
    recipe: Recipe,
    format: FormatName | None,
    *,
    architecture: str = "",
    openvino: bool = True,
) -> tuple[Engine, ...]:
    """The engines that open a recipe's variant and return its vectors.

    Only gteopt applies the vector codes int8 and binary; other engines return float vectors.

    Args:
        recipe: the recipe of the variant.
        format: checkpoint format of its weights.
        architecture: `model_type` of its config.json.
        openvino: whether the OpenVINO backend supports its architecture and its layers;
            `encoder.engines` knows.
    """
    readers = _OF_ARCHITECTURE.get(architecture, get_args(Engine))
    engines = tuple(
        engine
        for engine in OPENS[format]
        if engine in readers and (openvino or engine != "openvino")
    )
    if recipe.vectors.code in _ONLY_GTEOPT_CODES:
        return tuple(engine for engine in engines if engine in ("gteopt", "openvino"))
    if recipe.dims is not None and recipe.dims.method != "slice":
        return tuple(engine for engine in engines if engine != "vllm")  # vLLM runs no projection
    return engines


def engines_in_words(engines: Sequence[Engine]) -> str:
    """A short list of engines, such as "all engines" or "all but vllm".

    Example:
        >>> engines_in_words(("gteopt", "openvino"))
        'gteopt, openvino'
    """
    missing = [engine for engine in get_args(Engine) if engine not in engines]
    if not missing:
        return "all engines"
    return f"all but {missing[0]}" if len(missing) == 1 else ", ".join(engines)


def format_for_engine(recipe: Recipe, engine: EngineChoice) -> Recipe | None:
    """The recipe in a format that an engine opens; None where no format fits.

    The format `auto` is the first standard format that holds the weights; most engines open it. For
    vLLM, integer weights are written as compressed-tensors.
    """
    if engine in ("any", "gteopt", "openvino"):
        return recipe
    weights = recipe.weights
    if isinstance(weights, NoWeights) or recipe.format != "auto":
        return recipe
    if recipe.embedding == "int8" or recipe.vectors.code in _ONLY_GTEOPT_CODES:
        return None
    if engine == "vllm" and weights.scheme.number_format == "int":
        return recipe.with_format("compressed-tensors")
    return recipe
