"""Walk back through the blocks with the gradients of the vectors.

Hides: forward and backward passes with one block's weights in memory at a time. Refuses to know:
what gradients are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gteopt.build.replay import (
    Block,
    BlockInput,
    StateSpill,
    copy_block_arguments,
    open_blocks,
    replay_behind_blocks,
    replay_block_,
    replay_dtype,
)
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load_weights_, unload_weights_
from gteopt.errors import NumericsError
from gteopt.machine import release_freed_memory
from gteopt.quant.gptq import is_finite

_SEED = 0


@dataclass(frozen=True)
class Watch:
    """Linear layers whose gradients are wanted.

    Attributes:
        layers: their names in the whole model.
        see: takes a layer's name and the gradients by its output, [n, O].
    """

    layers: Collection[str]
    see: Callable[[str, Tensor], None]


@dataclass(frozen=True)
class BlockGradients:
    """A block on the way back, with its weights in memory.

    Attributes:
        inputs: the block's inputs.
        slopes: gradients [N, T, D] of r . v by the block's output, for each batch and each random
            direction r of a text's unit vector v. Padding has gradient zero.
    """

    block: Block
    inputs: Sequence[BlockInput]
    slopes: Sequence[Sequence[Tensor]]


def walk_back(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    *,
    n_probes: int,
    spill: StateSpill,
    passed: Callable[[int], None],
    watch: Watch | None = None,
) -> Iterator[BlockGradients]:
    """Run the model on texts, then yield its blocks from the last to the first with gradients.

    Blocks run in float32 if the processor emulates bfloat16. There are 2 + `n_probes` passes
    through each block.

    Args:
        encoder: the model; its weights may still be in their files.
        tokens: token ids of the texts.
        n_probes: random directions for each text.
        spill: where the inputs of all blocks are stored. Gradients need `n_probes` times the memory
            of one block's inputs, beside that.
        passed: called with the number of passes through a block.
        watch: sees the gradients batch by batch, after a block was yielded.

    Raises:
        NumericsError: hidden states or vectors hold NaN or infinity.
    """
    dtype = replay_dtype(encoder)
    blocks, inputs = open_blocks(encoder, tokens, dtype=dtype)
    if encoder.streams:
        unload_weights_(
            encoder, blocks[0].name
        )  # it was read in inference mode, which allows no gradients
    inputs_by_block: list[list[BlockInput]] = []
    n_bytes = 0
    for at, block in enumerate(blocks):
        inputs_by_block.append([])
        for i, batch in enumerate(inputs):
            n_bytes += batch.hidden.numel() * batch.hidden.element_size()
            file = None
            if n_bytes > spill.n_bytes:
                file = spill.file(f"input-{at:03}-{i:05}")
            inputs_by_block[-1].append(BlockInput(batch.hidden, batch.real, batch.pooled, file))
        with filled(encoder, block, dtype):
            replay_block_(block, inputs)
        if not all(is_finite(batch.hidden) for batch in inputs):
            raise NumericsError(
                f"the output of {block.name} holds NaN or infinity; load the model with dtype "
                f"float32 to see whether its weights are sound"
            )
        passed(1)
    slopes = _slopes(encoder, blocks, inputs, n_probes)
    for block in reversed(blocks):
        block_inputs = inputs_by_block.pop()
        with filled(encoder, block, dtype):
            yield BlockGradients(block, block_inputs, slopes)
            for i, batch in enumerate(block_inputs):
                slopes[i] = _before(block, i, batch.hidden, slopes[i], watch)
            passed(1 + n_probes)


@contextmanager
def filled(encoder: Encoder, block: Block, dtype: torch.dtype) -> Iterator[None]:
    """Have the block's weights in memory and in `dtype` during a `with` block."""
    load_weights_(encoder, block.name, dtype)
    yield
    leave_block_(encoder, block)


def leave_block_(encoder: Encoder, block: Block) -> None:
    """Undo `load_weights_` for a block, and give freed memory back.

    Hidden states lie between the freed weights, so without this the allocator would keep more
    memory with each block.
    """
    if encoder.streams:
        unload_weights_(encoder, block.name)
        release_freed_memory()
    else:
        block.module.to(encoder.dtype)  # exact, because float32 holds every bfloat16


def _slopes(
    encoder: Encoder, blocks: Sequence[Block], inputs: Sequence[BlockInput], n_probes: int
) -> list[list[Tensor]]:
    """The gradients [N, T, D] of r . v by the last block's output, for each batch and direction r.

    Raises:
        NumericsError: the vectors hold NaN or infinity.
    """
    generator = torch.Generator().manual_seed(_SEED)
    slopes_by_batch = []
    for batch in inputs:
        hidden, real, pooled = (
            copy_block_arguments(tensor, encoder.dtype)
            for tensor in (batch.hidden, batch.real, batch.pooled)
        )
        with torch.enable_grad():
            hidden.requires_grad_(True)
            leaf = BlockInput(hidden, real, pooled)
            vectors = nn.functional.normalize(
                replay_behind_blocks(encoder, blocks, [hidden], [leaf])
            )
            if not bool(torch.isfinite(vectors).all()):
                raise NumericsError(
                    f"the vectors of {encoder.checkpoint.id} hold NaN or infinity; load it with "
                    f"dtype float32 to see whether its weights are sound"
                )
            probes = torch.randn(n_probes, *vectors.shape, generator=generator).to(vectors)
            products = [(vectors * probe).sum() for probe in probes]
        slopes = [torch.autograd.grad(r_v, hidden, retain_graph=True)[0] for r_v in products]
        slopes_by_batch.append([slope.to(batch.hidden.dtype) for slope in slopes])
    return slopes_by_batch


def _before(
    block: Block,
    i: int,
    hidden: Tensor,
    slopes: Sequence[Tensor],
    watch: Watch | None,
) -> list[Tensor]:
    """Gradients by a block's input, from the gradients by its output, for one batch."""
    args, kwargs = block.calls[i]
    kind = hidden.dtype
    alone = replace(
        block, calls=((copy_block_arguments(args, kind), copy_block_arguments(kwargs, kind)),)
    )
    outputs: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            outputs.append((name, out))

        return hook

    handles = [
        linear.register_forward_hook(note(name))
        for name, linear in block.linears().items()
        if watch is not None and name in watch.layers
    ]
    try:
        with torch.enable_grad():
            leaf = copy_block_arguments(hidden, kind).requires_grad_(True)
            out = alone.run(0, leaf)
    finally:
        for handle in handles:
            handle.remove()
    before = []
    for slope in slopes:
        first, *others = torch.autograd.grad(
            out,
            [leaf, *(tensor for _, tensor in outputs)],
            slope,
            retain_graph=True,
            allow_unused=True,
        )
        before.append(first)
        for (name, _), gradient in zip(outputs, others, strict=True):
            if watch is not None and gradient is not None:
                watch.see(name, gradient.flatten(0, -2))
    return before
