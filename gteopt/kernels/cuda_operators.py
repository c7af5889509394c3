"""What all GPU kernels share: how an operator of torch's is defined, and the size of a tile.

Every launch is an operator (`torch.ops.gteopt`) that says what it returns. So torch.compile takes
the layers whole, and a forward pass can be traced without data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """What one program computes at once: tokens x outputs, with `inputs` inputs a step.

    Attributes:
        n_stages: steps of inputs that are loaded at once.
        copies: 1 where Hopper's copy engine fetches the inputs, else 0. It can where the int8
            product's number of inputs is a multiple of 16.
    """

    tokens: int
    outputs: int
    inputs: int
    n_warps: int
    n_stages: int
    copies: int = 0


_LIBRARY = torch.library.Library("gteopt", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define `torch.ops.gteopt.NAME`: `run` launches it, `fake` gives tensors without data."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for device in ("CUDA", "CPU"):  # on CPU in Triton's interpreter
        _LIBRARY.impl(name, run, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"gteopt::{name}", fake, lib=_LIBRARY)
