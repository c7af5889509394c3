"""Small transformers with random weights, for tests that need an architecture and no files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel


def random_module(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    module: nn.Module = AutoModel.from_config(
        AutoConfig.for_model(config["model_type"], **fields), attn_implementation="sdpa"
    )
    for name, parameter in module.named_parameters():  # norms and biases are 1 and 0 when new
        scale = 0.5 if "norm" in name.lower() or parameter.dim() == 1 else 3.0
        parameter.data.add_(torch.randn_like(parameter), alpha=scale * 0.05)
    return module.eval().requires_grad_(False)
