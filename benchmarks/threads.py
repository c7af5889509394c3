"""Measure how much faster a second thread makes a batch, and what the machine itself allows.

Each engine encodes the same batch with one thread, with two threads, and in two processes of one
thread at the same time. The processes share nothing but the machine. So the second gain is what
its cores, caches and memory allow, and the first one is what the engine makes of it.

    python benchmarks/threads.py --out benchmarks/results/threads.json

The three cases take turns, each in new processes, and the least time over the rounds counts. Run it
on a machine without other work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from model_folders import NAMES, Name, folder_of
from results_files import conditions, write_results

import gteopt
from gteopt.encoder.description import describe_encoder
from gteopt.machine import describe_machine
from gteopt.speed.texts import exact_texts

MODELS: tuple[Name, ...] = ("minilm", "qwen2")
ENGINES = {
    "fp32": ("", {"dtype": "float32"}),
    "bf16": ("", {"dtype": "bfloat16"}),
    "int8": ("rtn-int8", {"dtype": "bfloat16"}),
    "4-bit": ("rtn-int4", {"dtype": "bfloat16"}),
    "bf16, OpenVINO": ("", {"dtype": "bfloat16", "backend": "openvino"}),
    "int8, OpenVINO": ("rtn-int8", {"dtype": "bfloat16", "backend": "openvino"}),
}
"""By name, the recipe (none is the unquantized model) and the options of `gteopt.load`."""
N_TEXTS, N_TOKENS, N_PASSES = 16, 128, 5
"""A process gives the median of its passes."""


@dataclass(frozen=True)
class Row:
    """One engine on one model; times are wall seconds of one batch.

    Attributes:
        one_s: with one thread.
        two_s: with two threads.
        pair_s: with one thread, while another process does the same.
        thread_gain: one_s / two_s.
        machine_gain: 2 * one_s / pair_s.
    """

    model: str
    engine: str
    one_s: float
    two_s: float
    pair_s: float
    thread_gain: float
    machine_gain: float


def main() -> None:
    """Measure every engine on every model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        encode_in_child(*options.child)
        return
    if describe_machine().n_cores < 2:
        raise SystemExit("this machine has one core")
    rows: list[Row] = []
    for model in options.models:
        base = folder_of(cast("Name", model))
        folders = {"": base}
        for recipe in {recipe for recipe, _ in ENGINES.values() if recipe}:
            folders[recipe] = str(Path(tempfile.mkdtemp()) / recipe)
            gteopt.quantize(base, recipe, folders[recipe], dtype="bfloat16", device="cpu")
        for engine, (recipe, _) in ENGINES.items():
            rows.append(measured(model, engine, folders[recipe], options.rounds))
            show(rows[-1])
            if options.out:
                write(options.out, rows)


def measured(model: str, engine: str, folder: str, n_rounds: int) -> Row:
    """Run the three cases in turns."""
    ones: list[float] = []
    twos: list[float] = []
    pairs: list[float] = []
    for _ in range(n_rounds):
        ones += run(folder, engine, n_threads=1)
        twos += run(folder, engine, n_threads=2)
        pairs.append(max(run(folder, engine, n_threads=1, n_processes=2)))
    one, two, pair = min(ones), min(twos), min(pairs)
    return Row(NAMES[cast("Name", model)], engine, one, two, pair, one / two, 2 * one / pair)


def run(folder: str, engine: str, *, n_threads: int, n_processes: int = 1) -> list[float]:
    """Seconds of a batch in each of some processes, which begin to measure together."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(n_threads)}
    environment["RAYON_NUM_THREADS"] = str(n_threads)  # of the tokenizer
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", folder, engine],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(n_processes)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()  # it is ready
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    answers = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{engine}: a process ended with an error")
    return [float(answer.split()[-1]) for answer in answers]


def encode_in_child(folder: str, engine: str) -> None:
    """Load, wait for a line, and print the median time of a batch."""
    _, how = ENGINES[engine]
    encoder = gteopt.load(folder, device="cpu", **cast("dict[str, Any]", how))
    base = describe_encoder(folder, device="cpu")
    texts = exact_texts(base, N_TEXTS, N_TOKENS, seed=0)
    for _ in range(2):
        encoder.encode(texts)
    print("ready", flush=True)
    sys.stdin.readline()
    times = []
    for _ in range(N_PASSES):
        started = time.perf_counter()
        encoder.encode(texts)
        times.append(time.perf_counter() - started)
    print(median(times), flush=True)


def show(row: Row) -> None:
    """Print a row."""
    print(
        f"{row.model[:30]:30} {row.engine:16} {row.one_s:7.3f} s {row.two_s:7.3f} s "
        f"two threads {row.thread_gain:.2f}  two processes {row.machine_gain:.2f}",
        flush=True,
    )


def write(path: Path, rows: list[Row]) -> None:
    """Everything measured so far, and where."""
    content = {
        "schema": "gteopt.threads/1",
        "batch": {"n_texts": N_TEXTS, "n_tokens": N_TOKENS},
        "rows": [asdict(row) for row in rows],
        **conditions(),
    }
    write_results(path, content)


if __name__ == "__main__":
    main()
