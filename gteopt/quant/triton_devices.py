"""Say which devices run the kernels that are written in Triton."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch


@lru_cache
def runs_triton(device: torch.device) -> bool:
    """Whether a device is a GPU that the kernels support.

    They need tensor cores for 8-bit and 16-bit types, and Triton, which torch installs on Linux
    only.
    """
    if device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
