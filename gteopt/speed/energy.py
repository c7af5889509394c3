"""What a GPU has consumed, where NVIDIA's management library counts it.

Hides: NVML and how a device of torch's is found in it. Refuses to know: what the energy was for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COUNTED_S = 2.0
"""How long calls are repeated: NVML's counter moves every 20 to 100 ms, a twentieth of this."""


@dataclass(frozen=True)
class Meter:
    """A counter of the energy of one device.

    Attributes:
        joules: consumed since the driver was loaded, by everything on the device; None where
            nothing counts.
        source: what counts, or why nothing does.
    """

    joules: Callable[[], float] | None
    source: str

    def per_call(self, call: Callable[[], object], seconds: float) -> float | None:
        """Joules of one call when calls follow one another; None where nothing counts.

        Args:
            call: waits for the device.
            seconds: about how long a call takes.
        """
        if self.joules is None:
            return None
        n = math.ceil(_COUNTED_S / seconds)
        before = self.joules()
        for _ in range(n):
            call()
        return (self.joules() - before) / n


def meter(device: torch.device) -> Meter:
    """The energy counter of a device.

    It is found by the device's UUID, because NVML numbers GPUs in its own order and counts those
    that CUDA_VISIBLE_DEVICES hides.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return Meter(None, f"energy is counted on NVIDIA GPUs only, this is a {device.type}")
    try:
        import pynvml
    except ImportError:
        return Meter(
            None, 'energy needs nvidia-ml-py, which is not installed: pip install "gteopt[energy]"'
        )
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(name.encode())

        def joules() -> float:
            millijoules: int = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            return millijoules / 1e3

        joules()  # fails on older GPUs and on slices of one, which have no counter
    except pynvml.NVMLError as error:
        return Meter(None, f"NVML counts no energy of {name}: {error}")
    return Meter(joules, "NVML's total energy of the whole GPU, idle power included")
