"""Sensitivity: how far the vectors move when one layer alone is quantized.

Hides: two ways to find out. `measure` runs every trial to the end, from the cached input of its own
layer's block. All trials cost half as many forward passes as there are trials, which grows with the
square of the number of blocks. `estimate` follows gradients of the vectors back to every block
once; a trial is then a run of its own block. Both have one block's weights in memory at a time.
Refuses to know: what is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from gteopt.build.replay import (
    Block,
    BlockInput,
    StateSpill,
    advance_,
    behind_blocks,
    learnable,
    open_blocks,
    replay_dtype,
)
from gteopt.config.recipe import LayerScheme
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import empty_, fill_
from gteopt.errors import NumericsError
from gteopt.machine import give_back
from gteopt.progress import Progress, quiet
from gteopt.quant.affine import quantize_rtn
from gteopt.quant.gptq import is_finite

DEEP_BLOCKS = 12
"""Blocks beyond which sensitivities are estimated."""
N_PROBES = 16
"""Directions that `estimate` follows back for each text: a loss on 64 texts that matter alike has a
standard error of sqrt(2 / (64 * 16)), 4 %."""
_SEED = 0
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

    Blocks run in float32 if the processor emulates bfloat16. Of a model whose weights are in files,
    one block is in memory at a time; a model in memory is left as it was. Trials whose hidden
    states exceed `state_bytes` wait for another walk through the blocks, which changes no result.

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
    block_inputs = [batch.hidden for batch in inputs]
    n_at_once = state_bytes // sum(
        states.numel() * states.element_size() for states in block_inputs
    )
    where = {layer: at for at, block in enumerate(blocks) for layer in block.linears()}
    layers = [layer for layer in where if layer in choices]
    what = f"measuring the sensitivity of {encoder.checkpoint.id}"
    n_runs = sum(len(choices[layer]) * (len(blocks) - where[layer]) for layer in layers)
    n_run = start = 0
    while layers:
        walk = _first_that_fit(layers, choices, n_at_once)
        layers = layers[len(walk) :]
        follows = where[layers[0]] if layers else len(blocks)
        base, states = block_inputs, dict[_Trial, list[Tensor]]()
        for at in range(start, len(blocks)):
            block = blocks[at]
            fill_(encoder, block.name, dtype)
            if at == follows:
                block_inputs, start = base, at
            for trial in states:
                states[trial] = _run(block, states[trial])
                progress(what, n_run := n_run + 1, n_runs)
            linears = block.linears()
            for layer in walk:
                if where[layer] != at:
                    continue
                for _, i in _each_rounded(layer, linears[layer], choices[layer]):
                    states[layer, i] = _run(block, base)
                    progress(what, n_run := n_run + 1, n_runs)
            base = _run(block, base)
            _leave(encoder, block)

        def vectors(hidden: Sequence[Tensor]) -> Tensor:
            return behind_blocks(encoder, blocks, [h.to(encoder.dtype) for h in hidden], inputs)

        wanted = vectors(base)
        losses_by_layer: dict[str, list[float]] = {layer: [] for layer in walk}
        for layer, i in list(states):
            moved = nn.functional.cosine_similarity(vectors(states.pop((layer, i))), wanted)
            distance = 1 - moved.mean().item()
            if not math.isfinite(distance):  # max would turn NaN into 0
                raise NumericsError(_not_finite(layer, choices[layer][i]))
            losses_by_layer[layer].append(max(0.0, distance))
        yield {layer: tuple(losses) for layer, losses in losses_by_layer.items()}


def estimate(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[LayerScheme]],
    *,
    spill: StateSpill,
    progress: Progress = quiet,
) -> Iterator[dict[str, tuple[float, ...]]]:
    """The losses of `measure`, to first order in a block's output, at a cost linear in blocks.

    A small error d of a block's output moves the unit vector v by J d, orthogonally to v, and

        1 - cos(v, v + J d) = |J d|^2 / 2 = E_r (r . J d)^2 / 2,  r normal

    (the expectation is Hutchinson's, 1989). For `N_PROBES` directions r a text, one walk back
    through the blocks has r . J of every block's output; d is found by running the block with one
    layer rounded. Padding does not count: the gradient there is zero.

    Args:
        encoder: see `measure`, as for the others.
        tokens: token ids of the texts.
        choices: the schemes to try, by layer.
        spill: for what the base feeds each block; gradients take `N_PROBES` times what one is fed.
        progress: told how many passes through a block have been made.

    Yields:
        A loss for each of a layer's choices, not negative; a block's together, the last block's
        first.

    Raises:
        NumericsError: weights, vectors or gradients hold NaN or infinity.
    """
    dtype = replay_dtype(encoder)
    blocks, inputs = open_blocks(encoder, tokens, dtype=dtype)
    if encoder.streams:
        empty_(encoder, blocks[0].name)  # read in inference mode, which has no gradients
    what = f"estimating the sensitivity of {encoder.checkpoint.id}"
    layers = {name for block in blocks for name in block.linears()} & choices.keys()
    n_passes = (2 + N_PROBES) * len(blocks) + sum(len(choices[name]) for name in layers)
    n_passed = 0

    def passed(n: int) -> None:
        nonlocal n_passed
        n_passed += n
        progress(what, n_passed, n_passes)

    fed: list[list[BlockInput]] = []
    n_bytes = 0
    for at, block in enumerate(blocks):
        fed.append([])
        for i, batch in enumerate(inputs):
            n_bytes += batch.hidden.numel() * batch.hidden.element_size()
            file = None
            if n_bytes > spill.n_bytes:
                file = spill.file(f"input-{at:03}-{i:05}")
            fed[-1].append(BlockInput(batch.hidden, batch.real, batch.pooled, file))
        with _filled(encoder, block, dtype):
            advance_(block, inputs)
        if not all(is_finite(batch.hidden) for batch in inputs):
            raise NumericsError(
                f"{block.name} gives out NaN or infinity; load the model with dtype float32 to "
                f"find out whether its weights are sound"
            )
        passed(1)
    slopes = _slopes(encoder, blocks, inputs)
    for block in reversed(blocks):
        block_inputs = fed.pop()
        with _filled(encoder, block, dtype):
            losses = _trials(block, block_inputs, slopes, choices, passed)
            for i, batch in enumerate(block_inputs):
                slopes[i] = _before(block, i, batch.hidden, slopes[i])
            passed(1 + N_PROBES)
        if losses:
            yield losses


def _slopes(
    encoder: Encoder, blocks: Sequence[Block], inputs: Sequence[BlockInput]
) -> list[list[Tensor]]:
    """By batch and probe, the gradient [N, T, D] of r . v with respect to the last block's output.

    Raises:
        NumericsError: the vectors hold NaN or infinity.
    """
    generator = torch.Generator().manual_seed(_SEED)
    slopes_by_batch = []
    for batch in inputs:
        hidden, real, pooled = (
            learnable(tensor, encoder.dtype) for tensor in (batch.hidden, batch.real, batch.pooled)
        )
        with torch.enable_grad():
            hidden.requires_grad_(True)
            own = BlockInput(hidden, real, pooled)
            vectors = nn.functional.normalize(behind_blocks(encoder, blocks, [hidden], [own]))
            if not bool(torch.isfinite(vectors).all()):
                raise NumericsError(
                    f"the vectors of {encoder.checkpoint.id} hold NaN or infinity; load it with "
                    f"dtype float32 to find out whether its weights are sound"
                )
            probes = torch.randn(N_PROBES, *vectors.shape, generator=generator).to(vectors)
            ends = [(vectors * probe).sum() for probe in probes]
        slopes = [torch.autograd.grad(end, hidden, retain_graph=True)[0] for end in ends]
        slopes_by_batch.append([slope.to(batch.hidden.dtype) for slope in slopes])
    return slopes_by_batch


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
        block: its weights are there.
        block_inputs: what the base feeds it.
        slopes: by batch and probe, of what it gives out.
        choices: of all layers.
        passed: told of each pass through the block.
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


def _before(block: Block, i: int, hidden: Tensor, slopes: Sequence[Tensor]) -> list[Tensor]:
    """Slopes with respect to a block's input from those of its output, for one batch."""
    args, kwargs = block.calls[i]
    kind = hidden.dtype
    alone = replace(block, calls=((learnable(args, kind), learnable(kwargs, kind)),))
    with torch.enable_grad():
        leaf = learnable(hidden, kind).requires_grad_(True)
        out = alone.run(0, leaf)
    return [torch.autograd.grad(out, leaf, slope, retain_graph=True)[0] for slope in slopes]


def _each_rounded(
    name: str, linear: nn.Linear, schemes: Sequence[LayerScheme]
) -> Iterator[tuple[LayerScheme, int]]:
    """Each scheme and its place while the layer's weight is rounded to it."""
    whole = linear.weight.data
    try:
        for i, scheme in enumerate(schemes):
            try:
                rounded = quantize_rtn(whole, scheme, clip_search=scheme.bits < 8)
            except NumericsError as error:
                raise NumericsError(f"{name}: {error}") from error
            linear.weight.data = rounded.dequantize().to(whole.dtype)
            yield scheme, i
    finally:
        linear.weight.data = whole


def _not_finite(layer: str, scheme: LayerScheme) -> str:
    return (
        f"the model's vectors hold NaN or infinity with {layer} rounded to {scheme.bits} bits, or "
        f"without; load it with dtype float32 to find out whether its weights are sound"
    )


@contextmanager
def _filled(encoder: Encoder, block: Block, dtype: torch.dtype) -> Iterator[None]:
    """Have the block's weights in memory and in `dtype` for a while."""
    fill_(encoder, block.name, dtype)
    yield
    _leave(encoder, block)


def _leave(encoder: Encoder, block: Block) -> None:
    """Put a block's weights back to what they were before `fill_`.

    Hidden states that stay lie among freed weights, so the allocator would keep more memory with
    each block: 27 to 55 MB for gte-Qwen2-1.5B.
    """
    if encoder.streams:
        empty_(encoder, block.name)
        give_back()
    else:
        block.module.to(encoder.dtype)  # exactly what it was: float32 holds every bfloat16


def _first_that_fit(
    layers: Sequence[str], choices: Mapping[str, Sequence[LayerScheme]], n_trials: int
) -> list[str]:
    """The first layers that have at most so many trials together; at least one layer."""
    fit = [layers[0]]
    left = n_trials - len(choices[layers[0]])
    for layer in layers[1:]:
        left -= len(choices[layer])
        if left < 0:
            break
        fit.append(layer)
    return fit


def _run(block: Block, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [block.run(i, states) for i, states in enumerate(hidden)]
