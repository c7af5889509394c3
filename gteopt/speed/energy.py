"""Measure the energy of a GPU by NVIDIA's management library (NVML).

Hides: NVML, and how a torch device is found in it. Refuses to know: what the energy was used for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gteopt.errors import install_command

_COUNTED_S = 2.0
"""How long calls are repeated: much longer than the time between two updates of NVML's counter."""


@dataclass(frozen=True)
class EnergyMeter:
    """A counter of the energy of one device.

    Attributes:
        joules: gives the energy that the whole device has used since its driver was loaded; None
            if there is no counter.
        source: name of the counter, or why there is none.
    """

    joules: Callable[[], float] | None
    source: str

    def per_call(self, call: Callable[[], object], seconds: float) -> float | None:
        """Joules of one call when calls follow one another; None if there is no counter.

        Args:
            call: must return after the device has finished.
            seconds: about how long a call takes.
        """
        if self.joules is None:
            return None
        n = math.ceil(_COUNTED_S / seconds)
        before = self.joules()
        for _ in range(n):
            call()
        return (self.joules() - before) / n


def open_energy_meter(device: torch.device) -> EnergyMeter:
    """The energy counter of a device.

    NVML finds the device by its UUID, because NVML numbers GPUs in another order than torch, and
    also numbers GPUs that CUDA_VISIBLE_DEVICES hides.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        kind = "a CPU" if device.type == "cpu" else f"of the type {device.type}"
        source = f"energy is counted on NVIDIA GPUs only, and this device is {kind}"
        return EnergyMeter(None, source)
    try:
        import pynvml
    except ImportError:
        return EnergyMeter(
            None, f"energy needs nvidia-ml-py, which is not installed: {install_command('energy')}"
        )
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(name.encode())

        def joules() -> float:
            millijoules: int = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            return millijoules / 1e3

        joules()  # fails on older GPUs and on slices of a GPU (MIG), which have no counter
    except pynvml.NVMLError as error:
        return EnergyMeter(None, f"NVML counts no energy of {name}: {error}")
    return EnergyMeter(joules, "NVML's total energy of the whole GPU, idle power included")
