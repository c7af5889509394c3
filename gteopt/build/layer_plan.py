"""What a recipe does to each linear layer of a base, decided before any work starts.

Hides: which layers a recipe takes and which scheme each gets, why others stay as they are, which
format can hold them, and how bits are chosen under a budget. Refuses to know: codes, shards.
"""

from __future__ import annotations

import fnmatch
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter
from safetensors import safe_open
from torch import nn

from gteopt.build.replay import StateSpill, find_blocks
from gteopt.build.sensitivity import DEEP_BLOCKS, estimate, measure
from gteopt.build.tuning import MOST_WEIGHTS
from gteopt.config.recipe import Effort, FormatName, GptqWeights, LayerScheme, NoWeights, Recipe
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.skeleton import build_skeleton
from gteopt.errors import InputError, UnsupportedError, join_problems
from gteopt.formats import choose_format
from gteopt.formats.packed import Shape
from gteopt.model.checkpoint import LATENT_FILE, LATENT_PREFIX, Checkpoint
from gteopt.progress import Progress
from gteopt.quant.affine import packed_bytes
from gteopt.quant.bit_allocation import allocate
from gteopt.quant.grid import group_size_problems
from gteopt.records.files import write_atomically
from gteopt.records.manifest import EXPERTS, AllocationRecord, UnquantizedRecord

ACTIVATIONS = "activations"
"""Where hidden states lie in a stage folder."""
ALLOCATION = "allocation.json"
"""And what was measured for the choice of bits."""
SENSITIVITY_TEXTS = 64
"""Texts of the calibration set that sensitivities are measured on."""
_LOSSES = TypeAdapter(dict[str, tuple[float, ...]])


@dataclass(frozen=True)
class LayerPlan:
    """What a recipe does to each linear layer, decided before any work starts.

    Attributes:
        schemes: layer name -> scheme, in the model's order.
        notes: layer name -> what is out of the ordinary.
        unquantized: everything that stays as it is, with the reason.
        format: how the packed weights will lie on disk; None without any.
        blocks: name of the model's list of transformer blocks; None where none is quantized.
        choices: layer name -> what its scheme is chosen from, where the recipe has a budget.
        tune_by: what is tuned at once behind the solver; None where nothing is.
    """

    schemes: Mapping[str, LayerScheme]
    notes: Mapping[str, str]
    unquantized: tuple[UnquantizedRecord, ...]
    format: FormatName | None
    blocks: str | None
    choices: Mapping[str, tuple[LayerScheme, ...]]
    tune_by: Literal["model", "block"] | None


def plan_layers(
    checkpoint: Checkpoint, recipe: Recipe, skeleton: nn.Module | None = None
) -> LayerPlan:
    """Decide each layer's scheme from the architecture alone; no weights are read.

    Args:
        checkpoint: a base.
        recipe: what to make of it.
        skeleton: of the checkpoint, where it was built already (which takes half a second of 7B).

    Raises:
        InputError: lists every layer whose input features the group size does not divide, unless
            the recipe names a fallback; or the recipe's format cannot hold these layers.
        UnsupportedError: the architecture has no transformer blocks.
    """
    skeleton = build_skeleton(checkpoint) if skeleton is None else skeleton
    weights = recipe.weights
    schemes: dict[str, LayerScheme] = {}
    notes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    choices: dict[str, tuple[LayerScheme, ...]] = {}
    format: FormatName | None = None
    prefix: str | None = None
    tune_by: Literal["model", "block"] | None = None
    if not isinstance(weights, NoWeights):
        if checkpoint.is_table:
            raise UnsupportedError(
                f"{checkpoint.id} is a table of token vectors without a transformer: there is "
                f"nothing to quantize but its table. Recipe bf16 with dims or vectors: int8 makes "
                f"its vectors smaller"
            )
        prefix, _ = find_blocks(skeleton, checkpoint.config.get("num_hidden_layers"))
        linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
        sizes: dict[str, int] = {}
        for name, linear in linears.items():
            if not name.startswith(f"{prefix}."):
                reasons[name] = "outside the transformer blocks"
            elif any(fnmatch.fnmatchcase(name, pattern) for pattern in weights.skip):
                reasons[name] = "the recipe skips it"
            else:
                sizes[name] = linear.in_features
        misfits = group_size_problems(sizes, weights.scheme.group_size)
        if misfits and weights.fallback == "error":
            subject = (
                f"recipe {recipe.name}: group size {weights.scheme.group_size} does not divide the "
                f"input features of {len(misfits)} layer(s); choose another group size, or set "
                f"weights.fallback to per_channel or skip"
            )
            raise InputError(join_problems(subject, misfits))
        for name, in_features in sizes.items():
            scheme = weights.scheme
            if group_size_problems({name: in_features}, scheme.group_size):
                reason = f"group size {scheme.group_size} does not divide {in_features} features"
                if weights.fallback == "skip":
                    reasons[name] = reason
                    continue
                scheme = scheme.model_copy(update={"group_size": "per_channel"})
                notes[name] = f"{reason}: one group a row"
            schemes[name] = scheme
        shapes = {n: Shape(linears[n].out_features, linears[n].in_features) for n in schemes}
        n_weights = sum(linears[n].weight.numel() for n in schemes)
        tune_by = _tune_by(recipe, n_weights)
        if isinstance(weights, GptqWeights) and weights.budget is not None:
            choices = {
                name: _fitting(sizes[name], scheme, weights) for name, scheme in schemes.items()
            }
        if recipe.embedding == "int8" and not schemes:
            raise InputError(
                f"recipe {recipe.name} skips every layer; embedding: int8 goes with quantized ones"
            )
        if checkpoint.latent is not None and recipe.format not in ("auto", "gteopt"):
            raise InputError(
                f"recipe {recipe.name}: format {recipe.format} is for folders that other libraries "
                f"open; none has the latent-attention pooling of {checkpoint.id}. Leave format out"
            )
        if schemes:
            nested = checkpoint.latent is not None
            format = "gteopt" if nested else _plan_format(recipe, schemes, choices, shapes)
    return LayerPlan(
        schemes=schemes,
        notes=notes,
        unquantized=tuple(
            each
            for each in _unquantized(skeleton, schemes, reasons)
            if recipe.embedding == "full" or each.name != embedding_name(skeleton)
        )
        + _latent_record(checkpoint),
        format=format,
        blocks=prefix if schemes else None,
        choices=choices,
        tune_by=tune_by,
    )


def _tune_by(recipe: Recipe, n_weights: int) -> Literal["model", "block"] | None:
    """What a recipe tunes at once in a model of so many quantized weights.

    Raises:
        InputError: the whole model, which is too large for it.
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
            f"quantized weights, found {n_weights / 1e9:.2g} billion; say auto or block"
        )
    return weights.tune_by


def needs_original(recipe: Recipe, plan: LayerPlan) -> bool:
    """Whether each block's original runs beside the quantized one."""
    uses_gptaq = isinstance(recipe.weights, GptqWeights) and recipe.weights.gptaq_strength > 0
    return uses_gptaq or plan.tune_by == "block"


def _latent_record(checkpoint: Checkpoint) -> tuple[UnquantizedRecord, ...]:
    n_parameters = n_latent_parameters(checkpoint)
    if not n_parameters:
        return ()
    name = LATENT_PREFIX.removesuffix(".")
    reason = "the pooling, through which every vector goes"
    return (UnquantizedRecord(name=name, n_parameters=n_parameters, reason=reason),)


def n_latent_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of a latent-attention pooling; 0 without one."""
    shapes = dict(checkpoint.tensors)
    own = checkpoint.folder / LATENT_FILE
    if own.is_file():
        with safe_open(own, framework="numpy") as handle:
            shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    return sum(math.prod(s) for name, s in shapes.items() if name.startswith(LATENT_PREFIX))


def embedding_name(module: nn.Module) -> str:
    table = module.get_input_embeddings()  # type: ignore[operator]
    return next(str(name) for name, each in module.named_modules() if each is table)


def _fitting(
    in_features: int, scheme: LayerScheme, weights: GptqWeights
) -> tuple[LayerScheme, ...]:
    """A layer's own scheme and those of the recipe's choices whose groups divide its features."""
    offered = [
        each
        for each in weights.choices
        if not group_size_problems({"": in_features}, each.group_size)
    ]
    return tuple(dict.fromkeys([scheme, *offered]))


def _plan_format(
    recipe: Recipe,
    schemes: Mapping[str, LayerScheme],
    choices: Mapping[str, tuple[LayerScheme, ...]],
    shapes: Mapping[str, Shape],
) -> FormatName:
    """The format for these layers; under a budget one that holds whatever will be chosen."""
    if recipe.embedding == "int8":
        return "gteopt"
    if not choices:
        return choose_format(recipe.format, schemes, shapes)
    any_scheme = {f"{name} ({i})": each for name, c in choices.items() for i, each in enumerate(c)}
    any_shape = {
        f"{name} ({i})": shapes[name] for name, c in choices.items() for i in range(len(c))
    }
    return choose_format(recipe.format, any_scheme, any_shape)


def _unquantized(
    skeleton: nn.Module, schemes: Mapping[str, LayerScheme], reasons: Mapping[str, str]
) -> Iterable[UnquantizedRecord]:
    """Every module with parameters of its own that no scheme covers, with the reason."""
    total = sum(each.numel() for each in skeleton.parameters())
    experts = sum(each.numel() for each in skeleton.parameters() if each.dim() > 2)
    for name, each in skeleton.named_modules():
        n = sum(p.numel() for p in each.parameters(recurse=False))
        if n == 0 or name in schemes:
            continue
        if name in reasons:
            reason = reasons[name]
        elif isinstance(each, nn.Linear):
            reason = "the recipe leaves weights as they are"
        elif isinstance(each, nn.Embedding):
            reason = "a lookup table: no product to speed up"
        elif any(p.dim() > 2 for p in each.parameters(recurse=False)):
            reason = (
                f"{EXPERTS}, which no format of gteopt holds: {experts / total:.0%} of "
                f"all weights stay as they are for that"
            )
        else:
            reason = "a normalisation: too few weights to matter"
        yield UnquantizedRecord(name=name, n_parameters=n, reason=reason)


def shortens(recipe: Recipe) -> bool:
    """Whether the variant's vectors are other than the model's own."""
    return recipe.dims is not None or recipe.vectors.code != "float32"


def effort(recipe: Recipe) -> Effort:
    return recipe.weights.effort if isinstance(recipe.weights, GptqWeights) else "fast"


def allocate_schemes(
    encoder: Encoder,
    recipe: Recipe,
    plan: LayerPlan,
    tokens: Sequence[Sequence[int]],
    stage: Path,
    state_bytes: int,
    progress: Progress,
) -> tuple[LayerPlan, AllocationRecord]:
    """The plan with each layer's scheme chosen under the recipe's budget.

    What was measured is on disk walk by walk; see `measure`.
    """
    assert isinstance(recipe.weights, GptqWeights)
    assert recipe.weights.budget is not None
    n_weights: dict[str, int] = {}
    n_bytes: dict[str, list[int]] = {}
    for name, offered in plan.choices.items():
        linear = encoder.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape = linear.out_features, linear.in_features
        n_weights[name] = linear.weight.numel()
        n_bytes[name] = [packed_bytes(*shape, scheme) for scheme in offered]
        n_bytes[name].append(2 * n_weights[name])
    budget = int(sum(n_weights.values()) * recipe.weights.budget / 8)
    least = sum(map(min, n_bytes.values()))
    if least > budget:
        raise InputError(
            f"recipe {recipe.name}: a budget of {recipe.weights.budget:g} bits a weight cannot be "
            f"kept: the smallest choices take {8 * least / sum(n_weights.values()):.3f}"
        )
    assert plan.blocks is not None
    is_deep = len(list(encoder.module.get_submodule(plan.blocks).children())) > DEEP_BLOCKS
    stored = stage / ALLOCATION
    losses: dict[str, tuple[float, ...]] = {}
    if stored.is_file():
        losses = _LOSSES.validate_json(stored.read_bytes())
    if left := {name: each for name, each in plan.choices.items() if name not in losses}:
        few = tokens[:SENSITIVITY_TEXTS]
        if is_deep:
            spill = StateSpill(state_bytes, stage / ACTIVATIONS)
            walks = estimate(encoder, few, left, spill=spill, progress=progress)
        else:
            walks = measure(encoder, few, left, state_bytes=state_bytes, progress=progress)
        for found in walks:
            losses |= found
            write_atomically(stored, _LOSSES.dump_json(losses))
        shutil.rmtree(stage / ACTIVATIONS, ignore_errors=True)
    losses = {name: losses[name] for name in plan.choices}
    picked = allocate([(*losses[n], 0.0) for n in losses], [n_bytes[n] for n in losses], budget)
    chosen = dict(zip(losses, picked, strict=True))
    schemes = {n: plan.choices[n][i] for n, i in chosen.items() if i < len(plan.choices[n])}
    whole = tuple(
        UnquantizedRecord(
            name=n,
            n_parameters=sum(p.numel() for p in encoder.module.get_submodule(n).parameters()),
            reason="the budget allows 16 bits",
        )
        for n in chosen
        if n not in schemes
    )
    tried = tuple(dict.fromkeys(scheme for each in plan.choices.values() for scheme in each))
    record = AllocationRecord(
        budget=recipe.weights.budget,
        bits_per_weight=8 * sum(n_bytes[n][i] for n, i in chosen.items()) / sum(n_weights.values()),
        predicted_loss=sum((*losses[n], 0.0)[i] for n, i in chosen.items()),
        schemes=tried,
        losses={
            n: tuple(dict(zip(plan.choices[n], losses[n], strict=True)).get(s) for s in tried)
            for n in losses
        },
        found_by="gradients" if is_deep else "runs",
    )
    schemes = {name: schemes[name] for name in plan.schemes if name in schemes}
    return replace(plan, schemes=schemes, unquantized=(*plan.unquantized, *whole)), record
