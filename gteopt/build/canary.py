"""Compute the vector of one fixed text (the canary) with the weights of an artifact.

Loading the artifact compares its own vector of this text with the recorded one. Hides: how a model
runs after the build has freed its blocks. Refuses to know: who compares the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gteopt.build.blocks import block_shard_path, reload_block_
from gteopt.build.layers import layer_memory_errors
from gteopt.build.replay import Block
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import unload_weights_
from gteopt.machine import release_freed_memory
from gteopt.records.canary import CANARY, CanaryRecord
from gteopt.records.manifest import LayerRecord
from gteopt.vectors.transform import VectorTransform


def encode_canary(
    encoder: Encoder,
    transform: VectorTransform,
    *,
    blocks: str | None,
    layers: Sequence[LayerRecord],
    shards: Path,
) -> CanaryRecord:
    """The record of the canary text and its vector.

    If the build has freed its blocks, the forward pass reads each finished block and frees it
    again. So one block is in memory at a time.

    Args:
        encoder: the model of the build; its blocks may be freed.
        transform: the artifact's transform of vectors.
        blocks: name of the model's list of blocks; None if none was quantized.
        layers: the manifest's records of the quantized layers.
        shards: folder of the finished blocks.

    Raises:
        GteoptError: memory ran out.
    """
    if blocks is None or not any(parameter.is_meta for parameter in encoder.module.parameters()):
        return CanaryRecord.of(CANARY, transform.project(encoder.embed([CANARY]))[0])
    with layer_memory_errors("the text that is checked after loading"):
        vector = _by_block(encoder, blocks, layers, shards)
    return CanaryRecord.of(CANARY, transform.project(vector.cpu().numpy())[0])


@torch.inference_mode()
def _by_block(encoder: Encoder, blocks: str, layers: Sequence[LayerRecord], shards: Path) -> Tensor:
    """The vector [1, D] of the text, by the model's own forward pass, one block at a time."""
    with ExitStack() as stack:
        for i, module in enumerate(encoder.module.get_submodule(blocks).children()):
            block = Block(f"{blocks}.{i}", module, ())
            records = [layer for layer in layers if layer.name.startswith(f"{block.name}.")]

            def read(
                *_: Any, block: Block = block, records: Sequence[LayerRecord] = records, i: int = i
            ) -> None:
                tensors = load_file(block_shard_path(shards, i))
                reload_block_(encoder, block, tensors, records, encoder.dtype)

            def free(*_: Any, block: Block = block) -> None:
                unload_weights_(encoder, block.name)
                release_freed_memory()

            stack.callback(module.register_forward_pre_hook(read).remove)
            stack.callback(module.register_forward_hook(free).remove)
        tokens = encoder.tokenization.tokenize([CANARY])
        ids, mask = encoder.pad(tokens)
        hidden = encoder.module(input_ids=ids, attention_mask=mask).last_hidden_state
        return encoder.pooled(hidden, encoder.pool_mask(tokens, mask))
