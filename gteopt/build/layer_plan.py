"""Plan what a recipe does to each linear layer of a base, before any work starts.

Hides: which layers are quantized and by which scheme, why other layers are not, and which format
can hold them. Refuses to know: weights, codes, shards.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from safetensors import safe_open
from torch import nn

from gteopt.build.replay import find_blocks
from gteopt.build.tuning import MOST_WEIGHTS
from gteopt.config.recipe import (
    Effort,
    FormatName,
    GptqWeights,
    LayerScheme,
    NoWeights,
    Recipe,
    RtnWeights,
)
from gteopt.encoder.skeleton import build_skeleton
from gteopt.errors import InputError, UnsupportedError, join_problems
from gteopt.formats import choose_format
from gteopt.formats.packed import LinearShape
from gteopt.model.checkpoint import LATENT_FILE, LATENT_PREFIX, Checkpoint
from gteopt.quant.grid import group_size_problems
from gteopt.records.manifest import EXPERTS, UnquantizedRecord

_READS_WEIGHTS = ("t5", "mt5", "umt5", "longt5", "modernbert")
"""Architectures whose code in transformers reads `weight` of layers when it loads or runs."""


@dataclass(frozen=True)
class LayerPlan:
    """What a recipe does to each linear layer.

    Attributes:
        schemes: scheme of each layer by its name, in the model's order.
        notes: notes on unusual layers, by name.
        unquantized: everything that is not quantized, with the reason.
        format: format of the packed weights on disk; None without packed weights.
        blocks: name of the model's list of transformer blocks; None if no block is quantized.
        choices: schemes to choose from, by layer name; empty unless the recipe has a budget.
        tune_by: whether tuning after the solver takes the whole model or one block at a time; None
            means no tuning.
        corrects_rows: whether rows correct each other by gradients of the whole model.
    """

    schemes: Mapping[str, LayerScheme]
    notes: Mapping[str, str]
    unquantized: tuple[UnquantizedRecord, ...]
    format: FormatName | None
    blocks: str | None
    choices: Mapping[str, tuple[LayerScheme, ...]]
    tune_by: Literal["model", "block"] | None
    corrects_rows: bool


def plan_layers(
    checkpoint: Checkpoint, recipe: Recipe, skeleton: nn.Module | None = None
) -> LayerPlan:
    """Decide each layer's scheme from the architecture alone; no weights are read.

    Args:
        checkpoint: a base.
        recipe: the recipe.
        skeleton: the checkpoint's modules without weights, if the caller has them. Building them
            takes half a second for a 7B model.

    Raises:
        InputError: the group size does not divide the input features of some layers (lists them)
            and the recipe has no fallback; or the recipe's format cannot hold these layers.
        UnsupportedError: the architecture has no transformer blocks.
    """
    skeleton = build_skeleton(checkpoint) if skeleton is None else skeleton
    weights = recipe.weights
    if isinstance(weights, NoWeights):
        return LayerPlan(
            schemes={},
            notes={},
            unquantized=_unquantized(checkpoint, recipe, skeleton, {}, {}),
            format=None,
            blocks=None,
            choices={},
            tune_by=None,
            corrects_rows=False,
        )
    if checkpoint.is_table:
        raise UnsupportedError(
            f"{checkpoint.id} is a table of token vectors without a transformer, so it has no "
            f"layers to quantize. To make its vectors smaller, use recipe bf16 with dims or "
            f"vectors: int8"
        )
    blocks, _ = find_blocks(skeleton, checkpoint.config.get("num_hidden_layers"))
    linears, reasons = _layers_to_quantize(skeleton, blocks, weights.skip)
    schemes, notes, misfits = _assign_schemes(recipe.name, weights, linears)
    n_weights = sum(linears[name].weight.numel() for name in schemes)
    tune_by = _tune_by(recipe, n_weights)
    corrects_rows = (
        isinstance(weights, GptqWeights)
        and weights.row_feedback > 0
        and tune_by is None
        and n_weights <= MOST_WEIGHTS
    )
    choices: dict[str, tuple[LayerScheme, ...]] = {}
    if isinstance(weights, GptqWeights) and weights.budget is not None:
        choices = {
            name: _fitting(linears[name].in_features, scheme, weights)
            for name, scheme in schemes.items()
        }
    _check_embedding_and_format(checkpoint, recipe, n_layers=len(schemes))
    format: FormatName | None = None
    if schemes:
        shapes = {n: LinearShape(linears[n].out_features, linears[n].in_features) for n in schemes}
        format = _plan_format(checkpoint, recipe, schemes, choices, shapes)
    return LayerPlan(
        schemes=schemes,
        notes=notes,
        unquantized=_unquantized(checkpoint, recipe, skeleton, schemes, reasons | misfits),
        format=format,
        blocks=blocks if schemes else None,
        choices=choices,
        tune_by=tune_by,
        corrects_rows=corrects_rows,
    )


def _layers_to_quantize(
    skeleton: nn.Module, blocks: str, skip: Sequence[str]
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers that a recipe quantizes, and the reasons why it does not take others."""
    linears: dict[str, nn.Linear] = {}
    reasons: dict[str, str] = {}
    for name, module in skeleton.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if not name.startswith(f"{blocks}."):
            reasons[name] = "outside the transformer blocks"
        elif any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            reasons[name] = "the recipe skips it"
        else:
            linears[name] = module
    return linears, reasons


def _assign_schemes(
    recipe_name: str, weights: RtnWeights | GptqWeights, linears: Mapping[str, nn.Linear]
) -> tuple[dict[str, LayerScheme], dict[str, str], dict[str, str]]:
    """Each layer's scheme, notes on layers with the fallback, and reasons for skipped layers.

    Raises:
        InputError: the group size does not divide some layers, and the recipe has no fallback.
    """
    group_size = weights.scheme.group_size
    sizes = {name: linear.in_features for name, linear in linears.items()}
    misfits = group_size_problems(sizes, group_size)
    if misfits and weights.fallback == "error":
        subject = (
            f"recipe {recipe_name}: group size {group_size} does not divide the input features of "
            f"{len(misfits)} layer(s); choose another group size, or set weights.fallback to "
            f"per_channel or skip"
        )
        raise InputError(join_problems(subject, misfits))
    schemes: dict[str, LayerScheme] = {}
    notes: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, in_features in sizes.items():
        if not group_size_problems({name: in_features}, group_size):
            schemes[name] = weights.scheme
            continue
        reason = f"group size {group_size} does not divide {in_features} features"
        if weights.fallback == "skip":
            skipped[name] = reason
        else:
            schemes[name] = weights.scheme.model_copy(update={"group_size": "per_channel"})
            notes[name] = f"{reason}: one group a row"
    return schemes, notes, skipped


def _check_embedding_and_format(checkpoint: Checkpoint, recipe: Recipe, n_layers: int) -> None:
    """Check that the artifact's format can hold the model.

    Raises:
        InputError: only the embedding is int8, or a nested model has another library's format.
    """
    if recipe.embedding == "int8" and not n_layers:
        raise InputError(
            f"recipe {recipe.name} skips every layer; embedding: int8 needs quantized layers"
        )
    if checkpoint.latent is not None and recipe.format not in ("auto", "gteopt"):
        raise InputError(
            f"recipe {recipe.name}: no library that reads format {recipe.format} has the "
            f"latent-attention pooling of {checkpoint.id}; leave format out"
        )


def _tune_by(recipe: Recipe, n_weights: int) -> Literal["model", "block"] | None:
    """Whether a model with `n_weights` quantized weights is tuned as a whole or by block.

    Raises:
        InputError: the recipe asks to tune the whole model, but it is too large.
    """
    weights = recipe.weights
    if not isinstance(weights, GptqWeights) or weights.effort == "fast":
        return None
    is_large = n_weights > MOST_WEIGHTS
    if weights.tune_by == "auto":
        return "block" if is_large else "model"
    if weights.tune_by == "model" and is_large:
        raise InputError(
            f"recipe {recipe.name}: tune_by: model takes up to {MOST_WEIGHTS / 1e9:g} billion "
            f"quantized weights, found {n_weights / 1e9:.2g} billion; use auto or block"
        )
    return weights.tune_by


def needs_original_blocks(recipe: Recipe, plan: LayerPlan) -> bool:
    """Whether the original of each block runs beside the quantized block."""
    uses_gptaq = isinstance(recipe.weights, GptqWeights) and recipe.weights.gptaq_strength > 0
    return uses_gptaq or plan.tune_by == "block"


def _latent_record(checkpoint: Checkpoint) -> tuple[UnquantizedRecord, ...]:
    n_parameters = count_latent_parameters(checkpoint)
    if not n_parameters:
        return ()
    name = LATENT_PREFIX.removesuffix(".")
    reason = "the pooling, through which every vector goes"
    return (UnquantizedRecord(name=name, n_parameters=n_parameters, reason=reason),)


def count_latent_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of a latent-attention pooling; 0 if the model has none."""
    shapes = dict(checkpoint.tensors)
    file = checkpoint.folder / LATENT_FILE
    if file.is_file():
        with safe_open(file, framework="numpy") as handle:
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    return sum(math.prod(s) for name, s in shapes.items() if name.startswith(LATENT_PREFIX))


def find_embedding_layer(module: nn.Module) -> str:
    table = module.get_input_embeddings()  # type: ignore[operator]
    return next(str(name) for name, part in module.named_modules() if part is table)


def _fitting(
    in_features: int, scheme: LayerScheme, weights: GptqWeights
) -> tuple[LayerScheme, ...]:
    """A layer's own scheme, and the recipe's choices whose group size divides its features."""
    offered = [
        scheme
        for scheme in weights.choices
        if not group_size_problems({"": in_features}, scheme.group_size)
    ]
    return tuple(dict.fromkeys([scheme, *offered]))


def _plan_format(
    checkpoint: Checkpoint,
    recipe: Recipe,
    schemes: Mapping[str, LayerScheme],
    choices: Mapping[str, tuple[LayerScheme, ...]],
    shapes: Mapping[str, LinearShape],
) -> FormatName:
    """The format for these layers; with a budget, a format that can hold every choice."""
    if recipe.embedding == "int8" or checkpoint.latent is not None:
        return "gteopt"
    reads_weights = checkpoint.config.get("model_type") in _READS_WEIGHTS
    if not choices:
        return choose_format(recipe.format, schemes, shapes, reads_weights=reads_weights)
    any_scheme = {
        f"{name} ({i})": scheme for name, c in choices.items() for i, scheme in enumerate(c)
    }
    any_shape = {
        f"{name} ({i})": shapes[name] for name, c in choices.items() for i in range(len(c))
    }
    return choose_format(recipe.format, any_scheme, any_shape, reads_weights=reads_weights)


def _unquantized(
    checkpoint: Checkpoint,
    recipe: Recipe,
    skeleton: nn.Module,
    schemes: Mapping[str, LayerScheme],
    reasons: Mapping[str, str],
) -> tuple[UnquantizedRecord, ...]:
    """Every module with its own parameters that is not quantized, with the reason."""
    table = find_embedding_layer(skeleton) if recipe.embedding == "int8" else None
    modules = [
        record
        for record in _unquantized_modules(skeleton, schemes, reasons)
        if record.name != table
    ]
    return (*modules, *_latent_record(checkpoint))


def _unquantized_modules(
    skeleton: nn.Module, schemes: Mapping[str, LayerScheme], reasons: Mapping[str, str]
) -> Iterable[UnquantizedRecord]:
    """Every module with its own parameters that has no scheme, with the reason."""
    total = sum(p.numel() for p in skeleton.parameters())
    experts = sum(p.numel() for p in skeleton.parameters() if p.dim() > 2)
    for name, module in skeleton.named_modules():
        n = sum(p.numel() for p in module.parameters(recurse=False))
        if n == 0 or name in schemes:
            continue
        if name in reasons:
            reason = reasons[name]
        elif isinstance(module, nn.Linear):
            reason = "the recipe leaves weights as they are"
        elif isinstance(module, nn.Embedding):
            reason = "a lookup table: no product to speed up"
        elif any(p.dim() > 2 for p in module.parameters(recurse=False)):
            reason = (
                f"{EXPERTS}, which no format of gteopt holds: {experts / total:.0%} of "
                f"all weights stay as they are for that"
            )
        else:
            reason = "a normalisation: too few weights to matter"
        yield UnquantizedRecord(name=name, n_parameters=n, reason=reason)


def shortens_vectors(recipe: Recipe) -> bool:
    """Whether the recipe changes the vectors' dimensions or code."""
    return recipe.dims is not None or recipe.vectors.code != "float32"


def effort_of_recipe(recipe: Recipe) -> Effort:
    return recipe.weights.effort if isinstance(recipe.weights, GptqWeights) else "fast"
