"""The machine and the library versions of a measurement or a build.

Hides: where an operating system keeps these facts. Refuses to know: what was measured.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from gteopt.cores import cgroup_limits, n_cores
from gteopt.errors import InputError, UnsupportedError
from gteopt.records.environment import Conditions, MachineRecord

_LIBRARIES = (
    "gteopt",
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)
_ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h
_KEPT_BYTES = 256 << 20
_MAPPED_BYTES = 32 << 20  # the most that glibc itself raises this threshold to
# A processor with these flags is several times faster at int8 and bf16. A virtual machine may hide
# them under the same model name.
_LOW_PRECISION_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "i8mm")


def parse_devices(names: str) -> list[str]:
    """Devices of this machine from a comma-separated list: "cuda:0,cuda:1" or "cpu,cpu".

    Raises:
        InputError: no device, an unknown device, several kinds, or a GPU named twice.
        UnsupportedError: more GPUs than torch sees.
    """
    import torch

    devices = [name.strip() for name in names.split(",") if name.strip()]
    kinds = set()
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError:
            kinds.add("")
            break
        kinds.add(device.type)
        if device.type == "cuda" and (device.index is None or devices.count(name) > 1):
            kinds.add("")
    if kinds not in ({"cpu"}, {"cuda"}):
        raise InputError(
            f"--devices {names}: name each GPU once (cuda:0,cuda:1), or name the processor once "
            f"for each process that should run on it (cpu,cpu)"
        )
    highest_index = max(torch.device(name).index or 0 for name in devices)
    if kinds == {"cuda"} and (n := torch.cuda.device_count()) <= highest_index:
        raise UnsupportedError(f"--devices {names}: torch sees {n} GPU(s)")
    return devices


def describe_machine() -> MachineRecord:
    """The machine within the limits of the container and the process's affinity.

    Imports torch for the name of the GPU.
    """
    return MachineRecord(
        cpu=_cpu(),
        n_cores=n_cores(),
        memory_bytes=_memory_bytes(),
        gpu=_gpu(),
        os=platform.platform(),
        python=platform.python_version(),
    )


def read_library_versions() -> Conditions:
    """Installed versions of the libraries that results depend on, without importing them."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"  # such as gteopt itself when it runs from a source folder


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    flags_here = set(flags[1].split()).intersection(_LOW_PRECISION_FLAGS) if flags else set()
    model = name[1].strip() if name else platform.machine()
    return f"{model} ({', '.join(sorted(flags_here))})" if flags_here else model


def _memory_bytes() -> int:
    total: int = psutil.virtual_memory().total
    limits = [*cgroup_limits("memory.max"), *cgroup_limits("memory/memory.limit_in_bytes")]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def _gpu() -> str | None:
    import torch  # takes seconds, and `read_library_versions` and the report do not need it

    if not torch.cuda.is_available():
        return None
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return names[0] if len(names) == 1 else f"{len(names)} x {names[0]}"


def gpu_name(device: str) -> str | None:
    """Name of the GPU behind a torch device ("cuda", "cuda:1"); None where there is none."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device)


def release_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed memory that lies between blocks in use. Without this call, a build's process
    would grow with every layer.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Let glibc keep `_KEPT_BYTES` of freed memory for the next allocations; whether it does.

    By default glibc returns a layer's activations to the system when they are freed. The system
    then clears the same pages for the next layer. Settings of the user's in glibc's variables
    (`_ALLOCATOR_VARIABLES`) stay as they are.
    """
    if any(map(os.environ.get, _ALLOCATOR_VARIABLES)) or not sys.platform.startswith("linux"):
        return False
    with suppress(AttributeError, OSError):  # musl has no such function
        mallopt = ctypes.CDLL(None).mallopt
        return bool(
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        )
    return False
