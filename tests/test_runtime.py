"""The forward pass without padding computes what the module's own forward pass does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import random_module
from torch import Tensor, nn

from gteopt.families import Pooling
from gteopt.kernels import make_linear, speed_up_linears_
from gteopt.pooling import pool
from gteopt.quant.affine import pack, quantize_rtn
from gteopt.recipe import LayerScheme
from gteopt.runtime import packed_forward

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "hidden_act": "silu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**DECODER, "model_type": "qwen2", "is_causal": False},
    "qwen2 causal": {**DECODER, "model_type": "qwen2"},
    "mistral": {**DECODER, "model_type": "mistral", "sliding_window": None, "head_dim": 24},
    "bert": {**SIZES, "model_type": "bert", "hidden_act": "gelu"},
}
POOLINGS: tuple[Pooling, ...] = ("lasttoken", "mean", "cls")
TOKENS = [[7, 3, 9, 1, 4], [5], [8, 8, 2, 6, 1], [11, 12], [1, 2, 3], [13, 14], [40] * 9]


def own_forward(module: nn.Module, pooling: Pooling) -> Tensor:
    """One text at a time through the module itself."""
    vectors = []
    for ids in TOKENS:
        row, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)
        hidden = module(input_ids=row, attention_mask=mask).last_hidden_state
        vectors.append(pool(hidden, mask, pooling))
    return torch.cat(vectors)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_packed_texts_have_the_vectors_of_the_module_alone(name: str, pooling: Pooling) -> None:
    module = random_module(CONFIGS[name])
    forward = packed_forward(CONFIGS[name], pooling, CPU)
    assert forward is not None
    exact = own_forward(module.double(), pooling)
    found = forward(module, TOKENS)
    assert float((found - exact).norm() / exact.norm()) <= 1e-6  # angles stay float32
    assert (exact[0] - exact[2]).abs().max() > 1e-2  # texts differ at all
    found = forward(module.float(), TOKENS).double()
    assert float((found - exact).norm() / exact.norm()) <= 2e-6


@torch.inference_mode()
def test_what_replaces_or_hooks_a_layer_takes_part() -> None:
    config = CONFIGS["qwen2"]
    module = random_module(config)
    forward = packed_forward(config, "lasttoken", CPU)
    assert forward is not None
    scheme = LayerScheme(bits=8, group_size="row", symmetric=True, activation_bits=8)
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            weight = pack(quantize_rtn(linear.weight, scheme))
            layer = make_linear(weight, linear.bias, device=CPU, dtype=torch.float32)
            setattr(module.get_submodule(parent), leaf, layer)
    seen: list[tuple[int, ...]] = []
    last = module.get_submodule("layers.2.mlp.gate_proj")
    last.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    found, exact = forward(module, TOKENS), None
    exact = own_forward(module, "lasttoken")
    assert float((found - exact).norm() / exact.norm()) <= 1e-5
    assert seen[0] == (len(TOKENS), 64)  # the last block's MLP: one token a text


@torch.inference_mode()
def test_16_bit_modules_stay_within_their_rounding() -> None:
    for name in ("qwen2", "bert"):
        module = random_module(CONFIGS[name])
        exact = own_forward(module, "mean").double()
        forward = packed_forward(CONFIGS[name], "mean", CPU)
        assert forward is not None
        half = module.bfloat16()
        speed_up_linears_(half, CPU)
        found = forward(half, TOKENS).double()
        assert float((found - exact).norm() / exact.norm()) <= 3e-2


def test_settings_that_are_not_known_leave_the_module_its_own_forward_pass() -> None:
    for change in (
        {"model_type": "roberta"},
        {"layer_types": ["sliding_attention"]},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"use_sliding_window": True},
        {"hidden_act": "gelu_new"},
        {"sliding_window": 512, "model_type": "mistral"},
    ):
        assert packed_forward({**CONFIGS["qwen2"], **change}, "mean", CPU) is None
