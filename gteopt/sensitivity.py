"""Sensitivity: how far the vectors move when one layer alone is quantized.

Hides: that each trial starts from the cached input of the layer's own block, so that all of them
together cost half as many forward passes as there are trials. Refuses to know: what is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gteopt.calibration import Block, behind_blocks, open_blocks, replay_dtype
from gteopt.encoder import Encoder, fill_
from gteopt.quant.affine import quantize_rtn
from gteopt.recipe import LayerScheme, Progress, quiet


@torch.inference_mode()
def measure(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[LayerScheme]],
    *,
    progress: Progress = quiet,
) -> dict[str, tuple[float, ...]]:
    """Mean cosine distance to the model's own vectors with one layer rounded to nearest.

    The whole model is in memory while this runs, in float32 where the processor emulates bfloat16,
    and as it was afterwards.

    Args:
        encoder: the base; its weights may still be in their files.
        tokens: token ids of the texts that are measured on.
        choices: the schemes to try, by layer.
        progress: told after each layer.

    Returns:
        A loss for each of a layer's choices, not negative.
    """
    dtype = replay_dtype(encoder)
    blocks, inputs = open_blocks(encoder, tokens, dtype=dtype)
    for block in blocks:
        fill_(encoder, block.name)
        block.module.to(dtype)
    doors = [[batch.hidden for batch in inputs]]
    for block in blocks:
        doors.append(_run([block], doors[-1]))
    wanted = behind_blocks(encoder, blocks, _in(encoder.dtype, doors[-1]), inputs)
    losses: dict[str, tuple[float, ...]] = {}
    what = f"measuring the sensitivity of {encoder.checkpoint.id}"
    for at, block in enumerate(blocks):
        for layer, linear in block.linears().items():
            if layer not in choices:
                continue
            progress(what, len(losses), len(choices))
            whole = linear.weight.data
            found = []
            for scheme in choices[layer]:
                rounded = quantize_rtn(whole, scheme, clip_search=scheme.bits < 8)
                linear.weight.data = rounded.dequantize().to(whole.dtype)
                hidden = _run(blocks[at:], doors[at])
                vectors = behind_blocks(encoder, blocks, _in(encoder.dtype, hidden), inputs)
                distance = 1 - nn.functional.cosine_similarity(vectors, wanted).mean().item()
                found.append(max(0.0, distance))
            linear.weight.data = whole
            losses[layer] = tuple(found)
    progress(what, len(losses), len(choices))
    for block in blocks:
        block.module.to(encoder.dtype)  # exactly what it was: float32 holds every bfloat16
    return losses


def _in(dtype: torch.dtype, hidden: Sequence[Tensor]) -> list[Tensor]:
    return [each.to(dtype) for each in hidden]


def _run(blocks: Sequence[Block], hidden: Sequence[Tensor]) -> list[Tensor]:
    for block in blocks:
        hidden = [block.run(i, each) for i, each in enumerate(hidden)]
    return list(hidden)
