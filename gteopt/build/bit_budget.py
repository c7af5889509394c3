"""The schemes of a recipe with a budget: which bits each layer gets.

Hides: what is measured for the choice, and where an interrupted measurement goes on. Refuses to
know: how a choice is optimised (quant/), how layers are quantized.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import TypeAdapter
from torch import nn

from gteopt.build.layer_plan import LayerPlan
from gteopt.build.replay import StateSpill
from gteopt.build.sensitivity import DEEP_BLOCKS, estimate, measure
from gteopt.build.stage import ALLOCATION, BuildRun
from gteopt.config.recipe import GptqWeights, LayerScheme
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError
from gteopt.quant.affine import packed_bytes
from gteopt.quant.bit_allocation import allocate
from gteopt.records.files import write_atomically
from gteopt.records.manifest import AllocationRecord, UnquantizedRecord

SENSITIVITY_TEXTS = 64
"""Texts of the calibration set that sensitivities are measured on."""
_LOSSES = TypeAdapter(dict[str, tuple[float, ...]])


def allocate_schemes(
    run: BuildRun, encoder: Encoder, plan: LayerPlan, tokens: Sequence[Sequence[int]]
) -> tuple[LayerPlan, AllocationRecord]:
    """The plan with each layer's scheme chosen under the recipe's budget.

    Args:
        run: the build; measured losses lie in its stage folder, so that it can be resumed.
        encoder: the base.
        plan: its `choices` are what is chosen from.
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
            f"recipe {run.recipe.name}: a budget of {weights.budget:g} bits a weight cannot be "
            f"kept: the smallest choices take {8 * least / sizes.total_weights:.3f}"
        )
    is_deep = len(list(encoder.module.get_submodule(plan.blocks).children())) > DEEP_BLOCKS
    losses = _sensitivities(run, encoder, plan.choices, tokens, is_deep)
    picked = allocate(
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
    """What each layer's choices take.

    Attributes:
        n_weights: of a layer.
        n_bytes: of a layer by its choices; the last one is to leave it at 16 bits.
    """

    n_weights: Mapping[str, int]
    n_bytes: Mapping[str, Sequence[int]]

    @property
    def total_weights(self) -> int:
        """Of all layers that have a choice."""
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
    """Losses of each layer's choices; each walk through the blocks is stored as it ends."""
    stored = run.stage / ALLOCATION
    losses: dict[str, tuple[float, ...]] = {}
    if stored.is_file():
        losses = _LOSSES.validate_json(stored.read_bytes())
    if left := {name: offered for name, offered in choices.items() if name not in losses}:
        few = tokens[:SENSITIVITY_TEXTS]
        if is_deep:
            spill = StateSpill(run.activation_bytes, run.activations)
            walks = estimate(encoder, few, left, spill=spill, progress=run.progress)
        else:
            n_bytes = run.activation_bytes
            walks = measure(encoder, few, left, state_bytes=n_bytes, progress=run.progress)
        for measured in walks:
            losses |= measured
            write_atomically(stored, _LOSSES.dump_json(losses))
        shutil.rmtree(run.activations, ignore_errors=True)
    return {name: losses[name] for name in choices}


def _with_choices(encoder: Encoder, plan: LayerPlan, chosen: Mapping[str, int]) -> LayerPlan:
    """The plan with the chosen schemes; a layer whose choice is the last one stays as it is."""
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
