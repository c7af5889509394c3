"""Sensitivity: how far the vectors move when one layer alone is quantized.

Hides: that each trial starts from the cached input of the layer's own block, so that all of them
together cost half as many forward passes as there are trials; and that one block's weights are in
memory at a time, through which every trial that has begun moves on. Refuses to know: what is
chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from gteopt.calibration import Block, behind_blocks, open_blocks, replay_dtype
from gteopt.encoder import Encoder, empty_, fill_
from gteopt.errors import NumericsError
from gteopt.quant.affine import quantize_rtn
from gteopt.recipe import LayerScheme, Progress, quiet

_Trial = tuple[str, int]
"""A layer, and which of its choices."""


@torch.inference_mode()
def measure(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[LayerScheme]],
    *,
    state_bytes: int,
    progress: Progress = quiet,
) -> Iterator[dict[str, tuple[float, ...]]]:
    """Mean cosine distance to the model's own vectors with one layer rounded to nearest.

    Blocks run in float32 where the processor emulates bfloat16. A model whose weights are in files
    has one block of them in memory at a time and none afterwards; one that is in memory is as it
    was. Hidden states of trials that `state_bytes` has no room for wait for another walk through
    the blocks, which changes no result.

    Args:
        encoder: the base; its weights may still be in their files.
        tokens: token ids of the texts that are measured on.
        choices: the schemes to try, by layer.
        state_bytes: most memory for the hidden states of trials; those of one layer's are the
            least.
        progress: told how many of all trials' blocks have been run.

    Yields:
        A loss for each of a layer's choices, not negative; those of a walk together.

    Raises:
        NumericsError: weights or vectors hold NaN or infinity.
    """
    dtype = replay_dtype(encoder)
    blocks, inputs = open_blocks(encoder, tokens, dtype=dtype)
    door = [batch.hidden for batch in inputs]
    n_at_once = state_bytes // sum(each.numel() * each.element_size() for each in door)
    where = {layer: at for at, block in enumerate(blocks) for layer in block.linears()}
    layers = [layer for layer in where if layer in choices]
    what = f"measuring the sensitivity of {encoder.checkpoint.id}"
    n_runs = sum(len(choices[layer]) * (len(blocks) - where[layer]) for layer in layers)
    n_run = start = 0
    while layers:
        walk = _first_that_fit(layers, choices, n_at_once)
        layers = layers[len(walk) :]
        follows = where[layers[0]] if layers else len(blocks)
        base, states = door, dict[_Trial, list[Tensor]]()
        for at in range(start, len(blocks)):
            block = blocks[at]
            fill_(encoder, block.name, dtype)
            if at == follows:
                door, start = base, at
            for trial in states:
                states[trial] = _run(block, states[trial])
                progress(what, n_run := n_run + 1, n_runs)
            linears = block.linears()
            for layer in walk:
                if where[layer] != at:
                    continue
                whole = linears[layer].weight.data
                for i, scheme in enumerate(choices[layer]):
                    try:
                        rounded = quantize_rtn(whole, scheme, clip_search=scheme.bits < 8)
                    except NumericsError as error:
                        raise NumericsError(f"{layer}: {error}") from error
                    linears[layer].weight.data = rounded.dequantize().to(whole.dtype)
                    states[layer, i] = _run(block, base)
                    progress(what, n_run := n_run + 1, n_runs)
                linears[layer].weight.data = whole
            base = _run(block, base)
            if encoder.streams:
                empty_(encoder, block.name)
            else:
                block.module.to(encoder.dtype)  # exactly what it was: float32 holds every bfloat16

        def vectors(hidden: Sequence[Tensor]) -> Tensor:
            return behind_blocks(encoder, blocks, [h.to(encoder.dtype) for h in hidden], inputs)

        wanted = vectors(base)
        found: dict[str, list[float]] = {layer: [] for layer in walk}
        for layer, i in list(states):
            moved = nn.functional.cosine_similarity(vectors(states.pop((layer, i))), wanted)
            distance = 1 - moved.mean().item()
            if not math.isfinite(distance):  # which would pass for none at all below
                raise NumericsError(
                    f"the model's vectors hold NaN or infinity with {layer} rounded to "
                    f"{choices[layer][i].bits} bits, or without; load it with dtype float32 to "
                    f"find out whether its weights are sound"
                )
            found[layer].append(max(0.0, distance))
        yield {layer: tuple(losses) for layer, losses in found.items()}


def _first_that_fit(
    layers: Sequence[str], choices: Mapping[str, Sequence[LayerScheme]], n_trials: int
) -> list[str]:
    """The first of the layers, as many as have so many trials together; one at least."""
    fit = [layers[0]]
    left = n_trials - len(choices[layers[0]])
    for layer in layers[1:]:
        left -= len(choices[layer])
        if left < 0:
            break
        fit.append(layer)
    return fit


def _run(block: Block, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [block.run(i, each) for i, each in enumerate(hidden)]
