"""Which engines open a variant: by its checkpoint format and its recipe.

Refuses to know: torch, files. Where each engine was tested is in docs/recipes.md.
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

vLLM's kernels for the format gptq read symmetric weights of 4 and 8 bits alone, so that format is
left out for it; the same weights in compressed-tensors are read.
"""
_ONLY_GTEOPT_CODES = ("int8", "binary")


def engines_of(
    recipe: Recipe, format: FormatName | None, *, is_table: bool = False
) -> tuple[Engine, ...]:
    """The engines that open what a recipe makes and give its vectors.

    A vector code of int8 or one bit is applied by gteopt alone; the others give the float vectors
    before it.

    Args:
        recipe: what is built.
        format: the checkpoint format that its weights take.
        is_table: the base is a table of token vectors, without a transformer.
    """
    engines = OPENS[format]
    if is_table:
        engines = tuple(each for each in engines if each in ("gteopt", "sentence-transformers"))
    if recipe.vectors.code in _ONLY_GTEOPT_CODES:
        return tuple(engine for engine in engines if engine in ("gteopt", "openvino"))
    if recipe.dims is not None and recipe.dims.method != "slice":
        return tuple(engine for engine in engines if engine != "vllm")  # it runs no projection
    return engines


def engines_in_words(engines: Sequence[Engine]) -> str:
    """Engines as short as they can be named: "all engines", "all but vllm".

    Example:
        >>> engines_in_words(("gteopt", "openvino"))
        'gteopt, openvino'
    """
    missing = [engine for engine in get_args(Engine) if engine not in engines]
    if not missing:
        return "all engines"
    return f"all but {missing[0]}" if len(missing) == 1 else ", ".join(engines)


def format_for(recipe: Recipe, engine: EngineChoice) -> Recipe | None:
    """The recipe in a format that an engine opens; None where there is none.

    `auto` writes the first standard format that holds the weights, which most engines open; for
    vLLM whole-number weights go into compressed-tensors.
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
