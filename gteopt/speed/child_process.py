"""Measure load time and peak memory of one variant in a separate process.

`python -m gteopt.speed.child_process QUESTION` prints the answer as JSON. Hides: how a process
reads its own peak memory. Refuses to know: what is compared with what.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from gteopt.config.plan import Workload
from gteopt.encoder.description import AskedBackend
from gteopt.encoder.loading import load
from gteopt.encoder.skeleton import build_skeleton
from gteopt.encoder.tokenization import load_tokenizer
from gteopt.errors import GteoptError
from gteopt.frozen import Frozen
from gteopt.model.checkpoint import open_checkpoint
from gteopt.speed.texts import workload_call


class FootprintQuestion(Frozen):
    """The model that a child process loads, and the workload that it runs."""

    source: str
    device: str
    backend: AskedBackend = "torch"
    kernels: str = "deterministic"
    hub_dir: Path | None
    workload: Workload


class Footprint(Frozen):
    """The answer of the child process; `VariantBench` describes its fields."""

    load_s: float
    imports_process_bytes: int
    peak_process_bytes: int
    peak_device_bytes: int | None


def ask_child(name: str, question: FootprintQuestion) -> Footprint:
    """Measure load time and peak memory of one variant in a fresh process.

    Raises:
        GteoptError: the process died; the message has the last line of its output.
    """
    # The child must import the parent's package, also from a source folder. -P keeps it from
    # importing modules of the user's working directory.
    package_root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-P", "-m", "gteopt.speed.child_process", question.model_dump_json()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines()
        if child.returncode < 0:
            killed_by = signal.Signals(-child.returncode).name
            why = f"it was killed by {killed_by}"
            if killed_by == "SIGKILL":
                why += ", most likely because memory ran out"
        else:
            why = lines[-1] if lines else f"it ended with status {child.returncode}"
        raise GteoptError(
            f"the memory of {name} ({question.source}) cannot be measured: the child process that "
            f"loads it and runs a batch of {question.workload.batch_size} x "
            f"{question.workload.tokens} tokens died: {why}"
        )
    return Footprint.model_validate_json(child.stdout.strip().splitlines()[-1])


def _footprint(question: FootprintQuestion) -> Footprint:
    """Load and run once in this process, which must have done nothing before."""
    checkpoint = open_checkpoint(question.source, hub_dir=question.hub_dir)
    build_skeleton(checkpoint)  # imports the model's code and allocates no weights
    load_tokenizer(checkpoint)
    gc.collect()
    imports_process_bytes = _resident_bytes("VmRSS")
    start = time.perf_counter()
    encoder = load(
        question.source,
        device=question.device,
        backend=question.backend,
        kernels=question.kernels,
        hub_dir=question.hub_dir,
    )
    encoder.vectors.quantize(encoder.encode(["the first text after the load"]))
    load_s = time.perf_counter() - start
    workload_call(encoder, question.workload)()
    on_gpu = encoder.device.type == "cuda"
    return Footprint(
        load_s=load_s,
        imports_process_bytes=imports_process_bytes,
        peak_process_bytes=_resident_bytes("VmHWM"),
        peak_device_bytes=torch.cuda.max_memory_allocated(encoder.device) if on_gpu else None,
    )


def _resident_bytes(field: str) -> int:
    """Resident set of this process in bytes: now ("VmRSS") or at its peak ("VmHWM")."""
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    # macOS counts in bytes, and has only the peak.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _main() -> None:
    try:
        answer = _footprint(FootprintQuestion.model_validate_json(sys.argv[1]))
    except GteoptError as error:
        sys.exit(" ".join(str(error).split()))
    sys.stdout.write(f"{answer.model_dump_json()}\n")


if __name__ == "__main__":
    _main()
