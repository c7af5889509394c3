"""Measure sensitivity: how far the vectors move when only one layer is quantized.

Hides: two methods. `measure_sensitivity` runs the model from the layer's block to the end for each
trial. So its cost grows with the square of the number of blocks. `estimate_sensitivity` computes
gradients of the vectors at every block once; a trial then runs only its own block. Both have one
block's weights in memory at a time. Refuses to know: what is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gteopt.build.gradients import leave_block_, walk_back
from gteopt.build.replay import (
    Block,
    BlockInput,
    StateSpill,
    find_blocks,
    open_blocks,
    replay_behind_blocks,
    replay_dtype,
)
from gteopt.config.recipe import LayerScheme
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load_weights_
from gteopt.errors import NumericsError
from gteopt.progress import Progress, ignore_progress
from gteopt.quant.affine import quantize_rtn

DEEP_BLOCKS = 12
"""If a model has more blocks, sensitivities are estimated instead of measured."""
N_PROBES = 16
"""Random directions for each text in `estimate_sensitivity`. A loss on n equally important texts
then has a relative standard error of sqrt(2 / (16 n)), about 4 % for 64 texts."""
_Trial = tuple[str, int]
"""A layer, and the index of one of its choices."""


@torch.inference_mode()
def measure_sensitivity(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[LayerScheme]],
    *,
    state_bytes: int,
    progress: Progress = ignore_progress,
) -> Iterator[dict[str, tuple[float, ...]]]:
    """Mean cosine distance to the model's own vectors with one layer rounded to nearest.

    Blocks run in float32 if the processor emulates bfloat16. If weights are in files, one block is
    in memory at a time; a model in memory is not changed. If the hidden states of all trials exceed
    `state_bytes`, there are several walks through the blocks, with the same result.

    Args:
        encoder: the base; its weights may still be in their files.
        tokens: token ids of the texts.
        choices: the schemes to try, by layer.
        state_bytes: the most memory for hidden states of trials; the trials of one layer always
            run together.
        progress: called with the blocks that were run, of all blocks of all trials.

    Yields:
        After each walk, the losses of its layers: one for each choice, not negative.

    Raises:
        NumericsError: weights or vectors hold NaN or infinity.
    """
    dtype = replay_dtype(encoder)
    blocks, inputs = open_blocks(encoder, tokens, dtype=dtype)
    block_inputs = [batch.hidden for batch in inputs]
    n_at_once = state_bytes // sum(
        states.numel() * states.element_size() for states in block_inputs
    )
    where = {layer: at for at, block in enumerate(blocks) for layer in block.linears()}
    layers = [layer for layer in where if layer in choices]
    activity = f"measuring the sensitivity of {encoder.checkpoint.id}"
    n_runs = sum(len(choices[layer]) * (len(blocks) - where[layer]) for layer in layers)
    n_run = start = 0
    while layers:
        walk = _first_that_fit(layers, choices, n_at_once)
        layers = layers[len(walk) :]
        next_start = where[layers[0]] if layers else len(blocks)
        base, states = block_inputs, dict[_Trial, list[Tensor]]()
        for at in range(start, len(blocks)):
            block = blocks[at]
            load_weights_(encoder, block.name, dtype)
            if at == next_start:
                block_inputs, start = base, at
            for trial in states:
                states[trial] = _run(block, states[trial])
                progress(activity, n_run := n_run + 1, n_runs)
            linears = block.linears()
            for layer in walk:
                if where[layer] != at:
                    continue
                for _, i in _each_rounded(layer, linears[layer], choices[layer]):
                    states[layer, i] = _run(block, base)
                    progress(activity, n_run := n_run + 1, n_runs)
            base = _run(block, base)
            leave_block_(encoder, block)

        def vectors(hidden: Sequence[Tensor]) -> Tensor:
            return replay_behind_blocks(
                encoder, blocks, [h.to(encoder.dtype) for h in hidden], inputs
            )

        wanted = vectors(base)
        losses_by_layer: dict[str, list[float]] = {layer: [] for layer in walk}
        for layer, i in list(states):
            moved = nn.functional.cosine_similarity(vectors(states.pop((layer, i))), wanted)
            distance = 1 - moved.mean().item()
            if not math.isfinite(distance):  # `max` below would turn NaN into 0
                raise NumericsError(_not_finite(layer, choices[layer][i]))
            losses_by_layer[layer].append(max(0.0, distance))
        yield {layer: tuple(losses) for layer, losses in losses_by_layer.items()}


def estimate_sensitivity(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[LayerScheme]],
    *,
    spill: StateSpill,
    progress: Progress = ignore_progress,
) -> Iterator[dict[str, tuple[float, ...]]]:
    """The losses of `measure_sensitivity` to first order; the cost is linear in blocks.

    A small error d of a block's output moves the unit vector v by J d, orthogonally to v, and

        1 - cos(v, v + J d) = |J d|^2 / 2 = E_r (r . J d)^2 / 2,  r normal

    (the expectation is Hutchinson's, 1989). For `N_PROBES` directions r of each text, one backward
    pass gives r . J at every block's output. Running the block with one layer rounded gives d.
    Padding does not count, because its gradient is zero.

    Args:
        encoder: see `measure_sensitivity`.
        tokens: token ids of the texts.
        choices: the schemes to try, by layer.
        spill: where the inputs of all blocks are stored. Gradients need `N_PROBES` times the memory
            of one block's inputs, beside that.
        progress: called with the passes through a block.

    Yields:
        For each block, the last block first, the losses of its layers: one for each choice, not
        negative.

    Raises:
        NumericsError: weights, vectors or gradients hold NaN or infinity.
    """
    activity = f"estimating the sensitivity of {encoder.checkpoint.id}"
    _, blocks = find_blocks(encoder.module, encoder.checkpoint.config.get("num_hidden_layers"))
    n_passes = (2 + N_PROBES) * len(blocks) + sum(map(len, choices.values()))
    n_passed = 0

    def passed(n: int) -> None:
        nonlocal n_passed
        n_passed += n
        progress(activity, n_passed, n_passes)

    for at in walk_back(encoder, tokens, n_probes=N_PROBES, spill=spill, passed=passed):
        if losses := _trials(at.block, at.inputs, at.slopes, choices, passed):
            yield losses


@torch.inference_mode()
def _trials(
    block: Block,
    block_inputs: Sequence[BlockInput],
    slopes: Sequence[Sequence[Tensor]],
    choices: Mapping[str, Sequence[LayerScheme]],
    passed: Callable[[int], None],
) -> dict[str, tuple[float, ...]]:
    """Losses of the choices of one block's layers.

    Args:
        block: the block, with its weights in memory.
        block_inputs: the block's inputs in the base.
        slopes: gradients by the block's output, for each batch and direction.
        choices: the schemes to try, of all layers.
        passed: called after each pass through the block.
    """
    linears = {name: linear for name, linear in block.linears().items() if name in choices}
    n_texts = sum(len(batch.real) for batch in block_inputs)
    base = [block.run(i, batch.hidden) for i, batch in enumerate(block_inputs)] if linears else []
    losses_by_layer = {}
    for name, linear in linears.items():
        losses = []
        for scheme, _ in _each_rounded(name, linear, choices[name]):
            total = 0.0
            for i, batch in enumerate(block_inputs):
                moved = (block.run(i, batch.hidden) - base[i]).flatten(1)  # [N, T * D]
                for slope in slopes[i]:
                    along = torch.linalg.vecdot(slope.flatten(1).float(), moved.float())
                    total += along.double().square().sum().item() / (2 * N_PROBES)
            if not math.isfinite(total):
                raise NumericsError(_not_finite(name, scheme))
            losses.append(total / n_texts)
            passed(1)
        losses_by_layer[name] = tuple(losses)
    return losses_by_layer


def _each_rounded(
    name: str, linear: nn.Linear, schemes: Sequence[LayerScheme]
) -> Iterator[tuple[LayerScheme, int]]:
    """Round the layer's weight to each scheme in turn; gives the scheme and its index."""
    original = linear.weight.data
    try:
        for i, scheme in enumerate(schemes):
            try:
                rounded = quantize_rtn(original, scheme, clip_search=scheme.bits < 8)
            except NumericsError as error:
                raise NumericsError(f"{name}: {error}") from error
            linear.weight.data = rounded.dequantize().to(original.dtype)
            yield scheme, i
    finally:
        linear.weight.data = original


def _not_finite(layer: str, scheme: LayerScheme) -> str:
    return (
        f"the model's vectors hold NaN or infinity when {layer} is rounded to {scheme.bits} bits, "
        f"or even without; load the model with dtype float32 to see whether its weights are sound"
    )


def _first_that_fit(
    layers: Sequence[str], choices: Mapping[str, Sequence[LayerScheme]], n_trials: int
) -> list[str]:
    """The first layers that have at most `n_trials` trials together; at least one layer."""
    fitting = [layers[0]]
    n_left = n_trials - len(choices[layers[0]])
    for layer in layers[1:]:
        n_left -= len(choices[layer])
        if n_left < 0:
            break
        fitting.append(layer)
    return fitting


def _run(block: Block, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [block.run(i, states) for i, states in enumerate(hidden)]
