"""Defines operators of torch and the size of a tile for all GPU kernels.

Every launch is an operator (`torch.ops.gteopt`) that declares what it returns. So torch.compile
accepts the layers as they are, and a forward pass can be traced without data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program computes at once: tokens x outputs, with `inputs` inputs a step.

    Attributes:
        n_stages: steps of inputs that are loaded at once.
        copies: 1 if Hopper's copy engine fetches the inputs, else 0. It needs an int8 product whose
            number of inputs is a multiple of 16.
    """

    tokens: int
    outputs: int
    inputs: int
    n_warps: int
    n_stages: int
    copies: int = 0


_LIBRARY = torch.library.Library("gteopt", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define `torch.ops.gteopt.NAME`: `run` launches it, `fake` returns tensors without data."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for device in ("CUDA", "CPU"):  # on CPU in Triton's interpreter
        _LIBRARY.impl(name, run, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"gteopt::{name}", fake, lib=_LIBRARY)
