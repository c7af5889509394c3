"""The embedded model, deeper copies of it, and the peak memory of a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import gteopt

NANO = Path(gteopt.__file__).parent / "assets" / "nano"


def deeper_nano(target: Path, n_blocks: int) -> Path:
    """The nano with wide, random blocks, one file each, as large checkpoints have them."""
    shutil.copytree(NANO, target)
    whole = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    shapes = {n.removeprefix("layers.0."): t for n, t in whole.items() if n.startswith("layers.0.")}
    frame = {n: t for n, t in whole.items() if not n.startswith("layers.")}
    files = {"frame.safetensors": frame}
    for i in range(n_blocks):
        block = {f"layers.{i}.{name}": t.clone() for name, t in shapes.items()}
        for name in ("gate_proj", "up_proj"):
            block[f"layers.{i}.mlp.{name}.weight"] = torch.randn(8192, 256).bfloat16() / 16
        block[f"layers.{i}.mlp.down_proj.weight"] = torch.randn(256, 8192).bfloat16() / 90
        files[f"block-{i}.safetensors"] = block
    for name, tensors in files.items():
        save_file(tensors, target / name, metadata={"format": "pt"})
    weight_map = {tensor: file for file, tensors in files.items() for tensor in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((target / "config.json").read_text())
    config |= {"num_hidden_layers": n_blocks, "intermediate_size": 8192}
    config["max_window_layers"] = n_blocks
    config["layer_types"] = ["full_attention"] * n_blocks
    (target / "config.json").write_text(json.dumps(config))
    return target


def peak_bytes(script: str, *arguments: object) -> int:
    """Peak resident set of a process that runs `script`, beyond what it had before."""
    code = (
        "import sys, gteopt\n"
        "def resident(field):\n"
        "    line = next(line for line in open('/proc/self/status') if field in line)\n"
        "    return 1024 * int(line.split()[1])\n"
        "gteopt.load('nano').encode(['a text'])  # imports, and what libraries take at first use\n"
        "open('/proc/self/clear_refs', 'w').write('5')  # the peak starts here\n"
        f"before = resident('VmRSS')\n{script}\nprint(resident('VmHWM') - before)"
    )
    # By default glibc keeps freed memory, which would raise the peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.splitlines()[-1])
