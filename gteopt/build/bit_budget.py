"""Choose the scheme of each layer for a recipe with a bit budget.

Hides: what is measured for the choice, and how an interrupted measurement resumes. Refuses to know:
how a choice is optimized (quant/), how layers are quantized.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import TypeAdapter
from torch import nn

from gteopt.build.layer_plan import LayerPlan
from gteopt.build.replay import StateSpill
from gteopt.build.sensitivity import DEEP_BLOCKS, estimate_sensitivity, measure_sensitivity
from gteopt.build.stage import ALLOCATION, BuildRun
from gteopt.config.recipe import GptqWeights, LayerScheme
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError
from gteopt.quant.affine import packed_bytes
from gteopt.quant.bit_allocation import allocate_bits
from gteopt.records.files import write_atomically
from gteopt.records.manifest import AllocationRecord, UnquantizedRecord

SENSITIVITY_TEXTS = 64
"""How many calibration texts sensitivities are measured on."""
_LOSSES = TypeAdapter(dict[str, tuple[float, ...]])


def allocate_schemes(
    run: BuildRun, encoder: Encoder, plan: LayerPlan, tokens: Sequence[Sequence[int]]
) -> tuple[LayerPlan, AllocationRecord]:
    """Choose each layer's scheme under the recipe's budget; returns the changed plan.

    Args:
        run: the build; its stage folder stores measured losses, so that the build can resume.
        encoder: the base.
        plan: its `choices` are the schemes to choose from.
        tokens: token ids of the calibration texts.

    Raises:
        InputError: even the smallest choices take more than the budget.
    """
    weights = run.recipe.weights
    assert isinstance(weights, GptqWeights)
    assert weights.budget is not None
    assert plan.blocks is not None
    sizes = _choice_sizes(encoder, plan.choices)
    n_bytes = int(sizes.total_weights * weights.budget / 8)
    least = sum(map(min, sizes.n_bytes.values()))
    if least > n_bytes:
        raise InputError(
            f"recipe {run.recipe.name}: a budget of {weights.budget:g} bits a weight is too small: "
            f"the smallest choices take {8 * least / sizes.total_weights:.3f}"
        )
    is_deep = len(list(encoder.module.get_submodule(plan.blocks).children())) > DEEP_BLOCKS
    losses = _sensitivities(run, encoder, plan.choices, tokens, is_deep)
    picked = allocate_bits(
        [(*losses[name], 0.0) for name in losses], [sizes.n_bytes[name] for name in losses], n_bytes
    )
    chosen = dict(zip(losses, picked, strict=True))
    tried = tuple(dict.fromkeys(s for offered in plan.choices.values() for s in offered))
    record = AllocationRecord(
        budget=weights.budget,
        bits_per_weight=8
        * sum(sizes.n_bytes[name][i] for name, i in chosen.items())
        / sizes.total_weights,
        predicted_loss=sum((*losses[name], 0.0)[i] for name, i in chosen.items()),
        schemes=tried,
        losses={
            name: tuple(
                dict(zip(plan.choices[name], losses[name], strict=True)).get(s) for s in tried
            )
            for name in losses
        },
        found_by="gradients" if is_deep else "runs",
    )
    return _with_choices(encoder, plan, chosen), record


@dataclass(frozen=True)
class _ChoiceSizes:
    """The size of each layer by its choice.

    Attributes:
        n_weights: weights of each layer, by its name.
        n_bytes: bytes of each choice of a layer; the last choice is to leave it at 16 bits.
    """

    n_weights: Mapping[str, int]
    n_bytes: Mapping[str, Sequence[int]]

    @property
    def total_weights(self) -> int:
        """Weights of all layers that have a choice."""
        return sum(self.n_weights.values())


def _choice_sizes(encoder: Encoder, choices: Mapping[str, tuple[LayerScheme, ...]]) -> _ChoiceSizes:
    n_weights: dict[str, int] = {}
    n_bytes: dict[str, list[int]] = {}
    for name, offered in choices.items():
        linear = encoder.module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shape = linear.out_features, linear.in_features
        n_weights[name] = linear.weight.numel()
        n_bytes[name] = [packed_bytes(*shape, scheme) for scheme in offered]
        n_bytes[name].append(2 * n_weights[name])
    return _ChoiceSizes(n_weights, n_bytes)


def _sensitivities(
    run: BuildRun,
    encoder: Encoder,
    choices: Mapping[str, tuple[LayerScheme, ...]],
    tokens: Sequence[Sequence[int]],
    is_deep: bool,
) -> dict[str, tuple[float, ...]]:
    """Losses of each layer's choices; they are stored after each walk through the blocks."""
    stored = run.stage / ALLOCATION
    losses: dict[str, tuple[float, ...]] = {}
    if stored.is_file():
        losses = _LOSSES.validate_json(stored.read_bytes())
    if missing := {name: offered for name, offered in choices.items() if name not in losses}:
        few = tokens[:SENSITIVITY_TEXTS]
        if is_deep:
            spill = StateSpill(run.activation_bytes, run.activations)
            walks = estimate_sensitivity(encoder, few, missing, spill=spill, progress=run.progress)
        else:
            n_bytes = run.activation_bytes
            walks = measure_sensitivity(
                encoder, few, missing, state_bytes=n_bytes, progress=run.progress
            )
        for measured in walks:
            losses |= measured
            write_atomically(stored, _LOSSES.dump_json(losses))
        shutil.rmtree(run.activations, ignore_errors=True)
    return {name: losses[name] for name in choices}


def _with_choices(encoder: Encoder, plan: LayerPlan, chosen: Mapping[str, int]) -> LayerPlan:
    """The plan with the chosen schemes; a layer with the last choice is not quantized."""
    picked = {n: plan.choices[n][i] for n, i in chosen.items() if i < len(plan.choices[n])}
    unquantized = tuple(
        UnquantizedRecord(
            name=name,
            n_parameters=sum(p.numel() for p in encoder.module.get_submodule(name).parameters()),
            reason="the budget allows 16 bits",
        )
        for name in chosen
        if name not in picked
    )
    schemes = {name: picked[name] for name in plan.schemes if name in picked}
    return replace(plan, schemes=schemes, unquantized=(*plan.unquantized, *unquantized))
