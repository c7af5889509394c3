"""Make models of a published shape with random weights in the memory of a device.

All engines that are compared are made of the same weights, which are drawn on the device with one
seed. No weight is written to a disk, because that takes longer than all measurements.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from gteopt.build.layer_plan import plan_layers
from gteopt.config.recipe import LayerScheme, Recipe, RtnWeights
from gteopt.encoder.description import EncoderDescription, EncoderRuntime
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.packed_weights import swap_embedding_, swap_linear_
from gteopt.encoder.pooling import Normalized, PoolingHead
from gteopt.encoder.skeleton import build_skeleton
from gteopt.kernels import speed_up_linears_
from gteopt.model.checkpoint import Checkpoint, open_checkpoint
from gteopt.quant.affine import pack, quantize_rtn
from gteopt.speed.random_model import random_block, shape_at_depth, write_model_frame

_TABLE = LayerScheme(bits=8, group_size="per_channel", symmetric=True)


@dataclass(frozen=True)
class Source:
    """Weights that engines are made of.

    Attributes:
        module: bfloat16 on `device`; never changed.
        n_layers: blocks of `module`.
        of_layers: blocks of the published model.
    """

    checkpoint: Checkpoint
    module: nn.Module
    device: torch.device
    n_layers: int
    of_layers: int

    @staticmethod
    def draw(base: str, n_layers: int | None, device: torch.device) -> Source:
        """Random weights, with seed 0, of a shape that `random_model.write_random_model` knows."""
        config, whole = shape_at_depth(base, n_layers)
        n = int(config["num_hidden_layers"])
        folder = Path(tempfile.mkdtemp()) / Path(base).name
        write_model_frame(config, folder)
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
        checkpoint = open_checkpoint(folder)
        generator = torch.Generator(device).manual_seed(0)
        weights = (item for part in range(n + 1) for item in random_block(config, part, generator))
        module = _placed(checkpoint, dict(weights), device)
        return Source(checkpoint, module, device, n, whole)

    def copy(self) -> nn.Module:
        """A new module whose weights share the memory of `module`."""
        return _placed(self.checkpoint, self.module.state_dict(), self.device)

    @property
    def table_bytes(self) -> int:
        """Bytes of all weights except those of linear layers inside the blocks."""
        inside = {id(linear.weight) for _, linear in block_linears(self.module)}
        return sum(p.nbytes for p in self.module.parameters() if id(p) not in inside)

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.nbytes for p in self.module.parameters())

    def encoder(self, recipe: Recipe | None = None) -> Encoder:
        """An encoder of these weights, quantized by a recipe that needs no calibration."""
        module = self.copy()
        if recipe is not None:
            assert isinstance(recipe.weights, RtnWeights)
            for name, scheme in plan_layers(self.checkpoint, recipe, module).schemes.items():
                linear = module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                codes = quantize_rtn(linear.weight, scheme, clip_search=recipe.weights.clip_search)
                swap_linear_(module, name, pack(codes), linear.bias, self.device, torch.bfloat16)
            if recipe.embedding == "int8":
                table = module.get_submodule("embed_tokens")
                assert isinstance(table, nn.Embedding)
                rows = pack(quantize_rtn(table.weight, _TABLE))
                swap_embedding_(module, "embed_tokens", rows, self.device, torch.bfloat16)
        speed_up_linears_(module, self.device)
        return Encoder(
            EncoderDescription(self.checkpoint, EncoderRuntime(self.device, torch.bfloat16)),
            module,
            PoolingHead(self.checkpoint.pooling, [Normalized()]),
            cuda_graphs=True,
        )


def block_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers inside the blocks, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("layers."):
            yield name, layer


def _placed(
    checkpoint: Checkpoint, weights: dict[str, torch.Tensor], device: torch.device
) -> nn.Module:
    module = build_skeleton(checkpoint)
    module.load_state_dict(weights, assign=True)
    for name, buffer in list(module.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, buffer.to(device))
    return module.eval().requires_grad_(False)
