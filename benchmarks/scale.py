"""Measure builds at the size of published models, from checkpoints with random weights.

The checkpoint has the shapes, tensor names and shards of the published checkpoint. Its shards are
float32 and have 5 GB each. It also has the head, which no encoder reads, and the tokenizer of the
embedded model. Calibration texts are joined from the built-in texts. Time and memory of a build do
not depend on the values of the weights. Quality does, so no quality is reported.

    python benchmarks/scale.py build --shape gte-Qwen2-1.5B                      # on the CPU
    python benchmarks/scale.py build --shape gte-Qwen2-7B --device cuda --texts 128 --tokens 512
    python benchmarks/scale.py build --shape gte-Qwen2-7B --device cuda --layers 4   # in a minute
    python benchmarks/scale.py sweep    # cost over layers, hidden size and calibration tokens
    python benchmarks/scale.py plot     # the sweep as benchmarks/results/scale.svg
    python benchmarks/scale.py long     # memory of one text of up to 32,000 tokens
    python benchmarks/scale.py load --layers 8    # time and memory of loading artifacts
    python benchmarks/scale.py load --layers 8 --disk 0.25 0.5 1    # slower disks too; as root

Each build runs in a separate process, whose peak resident set is read from the operating system.
Results go to benchmarks/results/scale.json (or --out), with the prediction of `inspect`.
`--minutes` ends a build early; its row has the time at which each block was finished.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results_files import conditions, read_results, write_part, write_results
from safetensors.torch import save_file

import gteopt
from gteopt.build.estimate import estimate_builds
from gteopt.config.recipe import Calibration, Recipe, load_recipe
from gteopt.errors import InputError
from gteopt.model.checkpoint import open_checkpoint
from gteopt.speed.clock import Stopwatch

RESULTS = Path(__file__).parent / "results" / "scale.json"
ASSETS = Path(gteopt.__file__).parent / "assets"
SHARD_BYTES = 5 * 10**9
_ITEM_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """Sizes in the config.json of a Qwen2 checkpoint."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


SHAPES = {
    "gte-Qwen2-1.5B": Shape(1536, 28, 12, 2, 8960, 151_646),
    "gte-Qwen2-7B": Shape(3584, 28, 28, 4, 18_944, 151_646),
}
SMALL = Shape(512, 4, 8, 2, 2048, 20_480)


def sizes_of(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and size of every tensor in the files of a gte-Qwen2 of this shape."""
    d, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    parts = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (d, d),
        "self_attn.q_proj.bias": (d,),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (d, d),
        "mlp.gate_proj.weight": (shape.intermediate, d),
        "mlp.up_proj.weight": (shape.intermediate, d),
        "mlp.down_proj.weight": (d, shape.intermediate),
    }
    sizes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (shape.vocabulary, d)}
    for i in range(shape.layers):
        sizes |= {f"layers.{i}.{name}": size for name, size in parts.items()}
    sizes["norm.weight"] = (d,)
    sizes["lm_head.weight"] = (shape.vocabulary, d)
    return sizes


def write_configs(folder: Path, shape: Shape) -> None:
    """Write config.json of this shape, and the embedded model's tokenizer."""
    nano = ASSETS / "nano"
    config = json.loads((nano / "config.json").read_text())
    config |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "layer_types": ["full_attention"] * shape.layers,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(nano / name, folder / name)


def make_checkpoint(folder: Path, shape: Shape, device: str = "cpu") -> Path:
    """Write a random checkpoint of this shape; one shard is in memory at a time.

    Weights are drawn on the device, because a GPU draws them much faster than a processor.
    """
    folder.mkdir(parents=True)
    sizes = sizes_of(shape)
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        n_bytes = _ITEM_BYTES * torch.Size(size).numel()
        if n_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= n_bytes
    generator = torch.Generator(device).manual_seed(0)
    where: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(name, sizes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    total = sum(_ITEM_BYTES * torch.Size(size).numel() for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_configs(folder, shape)
    return folder


def _random(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "layernorm" in name or name == "norm.weight":
        return torch.ones(size)
    tensor = torch.empty(size, device=generator.device)
    return tensor.normal_(0, size[-1] ** -0.5, generator=generator).cpu()


def write_texts(path: Path, n_texts: int, n_tokens: int) -> None:
    """Write texts of more than `n_tokens` tokens, joined from the built-in calibration texts."""
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    source = [json.loads(line)["text"].replace("\n", " ") for line in lines]
    texts: list[str] = []
    at = 0
    while len(texts) < n_texts:
        text = ""
        while len(text.split()) < n_tokens:  # a word has at least one token
            text += f" {source[at % len(source)]}"
            at += 1
        texts.append(f"{len(texts)}{text}")
    path.write_text("\n".join(texts), encoding="utf-8")


_CHILD = """
import json, sys, time
import torch
import gteopt
from gteopt.config.recipe import Recipe

base, out, recipe, device = sys.argv[1:]
wanted = Recipe.model_validate_json(recipe)
from gteopt.build.layer_plan import plan_layers
from gteopt.model.checkpoint import open_checkpoint
from gteopt.encoder.skeleton import build_skeleton
build_skeleton(open_checkpoint("nano"))  # the imports

def resident(field):
    line = next(line for line in open("/proc/self/status") if field in line)
    return 1024 * int(line.split()[1])

open_checkpoint(base).sha256  # hashed once per process; this time is not part of the build
before = resident("VmRSS")
blocks, blocks_cpu = [], []
measured_bytes = None
started, started_cpu = time.perf_counter(), time.process_time()
def progress(what, done, total):
    global measured_bytes
    if what.startswith(("measuring", "estimating")):
        measured_bytes = resident("VmHWM")
    if what.startswith("quantizing"):
        blocks.append(round(time.perf_counter() - started, 2))
        blocks_cpu.append(round(time.process_time() - started_cpu, 2))
        print(what, done, total, blocks[-1], file=sys.stderr, flush=True)
        print(json.dumps(figures()), flush=True)  # the last line counts if the build ends early
def figures():
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "seconds_at_block": blocks,
        "cpu_seconds_at_block": blocks_cpu,
        "imports_bytes": before,
        "peak_bytes": resident("VmHWM"),
        "measuring_peak_bytes": measured_bytes,  # of sensitivities; None if the recipe needs none
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        "weight_bytes": None,
        "n_tokens": 0,
        "n_threads": torch.get_num_threads(),
    }

manifest = gteopt.quantize(base, wanted, out, device=device, progress=progress)
print(json.dumps({
    **figures(),
    "weight_bytes": manifest.weight_bytes,
    "n_tokens": manifest.calibration.n_tokens if manifest.calibration else 0,
}))
"""


def measure(
    shape: Shape,
    n_texts: int,
    n_tokens: int,
    recipe: Recipe,
    device: str,
    work: Path,
    minutes: float | None = None,
) -> dict[str, object]:
    """Build once in a separate process; returns what was measured and what `inspect` predicts."""
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        watch = Stopwatch()
        base = make_checkpoint(Path(temporary) / "base", shape, device)
        made_s = watch.wall_s
        texts = Path(temporary) / "texts.txt"
        write_texts(texts, n_texts, n_tokens)
        spec = Calibration(texts=str(texts), n_texts=n_texts, max_tokens=n_tokens, random_texts=0)
        calibrated = recipe.model_copy(update={"calibration": spec})
        (predicted,) = estimate_builds(open_checkpoint(base), [calibrated], device=device)
        out = Path(temporary) / "out"
        command = [sys.executable, "-c", _CHILD, str(base), str(out)]
        command += [calibrated.model_dump_json(by_alias=True), device]
        ended_early = False
        try:
            limit = None if minutes is None else 60 * minutes
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=limit)
            printed = done.stdout
        except subprocess.TimeoutExpired as late:
            ended_early, printed = True, late.stdout or b""
        lines = printed.decode().splitlines()
        if not lines:
            raise SystemExit("no block was finished within --minutes")
        measured = json.loads(lines[-1])
    return {
        "shape": asdict(shape),
        "n_texts": n_texts,
        "max_tokens": n_tokens,
        "recipe": recipe.name,
        **{name: getattr(recipe.weights, name, 0.0) for name in ("gptaq_strength", "row_feedback")},
        "device": device,
        "predicted_bytes": predicted.build_bytes,
        "predicted_s": round(predicted.build_s or 0.0, 1),
        "checkpoint_s": round(made_s, 1),
        **measured,
        **({"ended_early": True} if ended_early else {}),
        **conditions(),
    }


def keep(kind: str, row: dict[str, object], out: Path = RESULTS) -> None:
    """Put one row into the file, in place of an earlier row of the same workload."""
    results = read_results(out)
    workload = ["shape", "n_texts", "max_tokens", "recipe", "device"]
    workload += ["gptaq_strength", "row_feedback"]
    rows = [r for r in results.get(kind, []) if any(r.get(key, 0) != row[key] for key in workload)]
    write_results(out, {**results, kind: [*rows, row]})
    beyond = int(str(row["peak_bytes"])) - int(str(row["imports_bytes"]))
    print(
        f"{kind} {row['shape']} {row['n_tokens']} tokens: {row['seconds']} s "
        f"({row['cpu_seconds']} s of CPU, predicted {row['predicted_s']} s), "
        f"{beyond / 1e9:.2f} GB beyond the imports, "
        f"predicted {int(str(row['predicted_bytes'])) / 1e9:.2f} GB"
        + (f"; blocks at {row['seconds_at_block']} s" if row["device"] != "cpu" else "")
        + (
            f"; {int(str(peak)) / 1e9:.2f} GB of the GPU"
            if (peak := row["peak_device_bytes"])
            else ""
        ),
        flush=True,
    )


def sweep(device: str, work: Path) -> None:
    """Measure builds in which layers, hidden size or calibration tokens change, one at a time."""
    recipe = load_recipe("gptq-int4")
    for layers in (2, 4, 8):
        keep("sweep", measure(replace(SMALL, layers=layers), 32, 128, recipe, device, work))
    for hidden in (256, 1024):
        shape = replace(SMALL, hidden=hidden, intermediate=4 * hidden)
        keep("sweep", measure(shape, 32, 128, recipe, device, work))
    for n_texts in (8, 128):
        keep("sweep", measure(SMALL, n_texts, 128, recipe, device, work))


_LONG_CHILD = """
import json, sys, time
import gteopt

encoder = gteopt.load(sys.argv[1], dtype="float32")
encoder.encode(["a text"])

def resident(field):
    line = next(line for line in open("/proc/self/status") if field in line)
    return 1024 * int(line.split()[1])

for n_tokens in map(int, sys.argv[2:]):
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before = resident("VmRSS")
    started = time.process_time()
    encoder.embed_tokens([[*(7 + i % 9000 for i in range(n_tokens - 1)), 20477]])
    seconds = time.process_time() - started
    print(json.dumps([n_tokens, resident("VmHWM") - before, round(seconds, 1)]), flush=True)
"""


def long_text(work: Path) -> None:
    """Measure the peak memory beyond the loaded model for one text of each length."""
    shape = Shape(256, 2, 4, 2, 1024, 20_480)
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        base = make_checkpoint(Path(temporary) / "base", shape)
        command = [sys.executable, "-c", _LONG_CHILD, str(base), "8000", "16000", "32000"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    names = ("n_tokens", "peak_bytes", "cpu_seconds")
    rows = [dict(zip(names, json.loads(line), strict=True)) for line in done.stdout.splitlines()]
    content = {
        "shape": asdict(shape),
        "dtype": "float32",
        "texts": rows,
        **conditions(),
    }
    write_part(RESULTS, "long", content)
    print(rows)


_LOAD_HEAD = """
import json, os, sys, time
from pathlib import Path

folder, backend, state = Path(sys.argv[1]), *sys.argv[2:]
files = [path for path in folder.rglob("*") if path.is_file()]

def prepare():
    if state == "cold":  # not in the page cache
        for path in files:
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
"""
_READ_CHILD = """
prepare()
started = time.perf_counter()
buffer = bytearray(8 << 20)
for path in files:
    with open(path, "rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass
read_s = time.perf_counter() - started
print(json.dumps({
    "read_s": read_s,
    "file_bytes": sum(path.stat().st_size for path in files),
}))
"""
_LOAD_CHILD = """
import gteopt

def resident(field):
    line = next(line for line in open("/proc/self/status") if field in line)
    return 1024 * int(line.split()[1])

gteopt.load("nano", backend=backend).encode(["a text"])  # imports, and first use of libraries
prepare()
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = resident("VmRSS")
started, cpu = time.perf_counter(), time.process_time()
encoder = gteopt.load(folder, backend=backend)
load_s = time.perf_counter() - started
encoder.encode(["a text"])  # OpenVINO reorders weights at their first use
print(json.dumps({
    "load_s": load_s,
    "first_vector_s": time.perf_counter() - started,
    "cpu_s": time.process_time() - cpu,
    "peak_bytes": resident("VmHWM") - before,
    "held_bytes": resident("VmRSS") - before,
}))
"""
_LOAD_RUNS = 5
_State = tuple[str, float | None]
"""Cold or warm cache, and the limit of the disk's speed in GB/s, or None."""
_BLKIO = Path("/sys/fs/cgroup/blkio")
"""Where Linux limits the speed of a disk (version 1 of control groups)."""


@contextmanager
def _disk(folder: Path, gb_s: float | None) -> Iterator[list[str]]:
    """Words before a command that limit its reads from the disk of `folder`; None is no limit.

    Raises:
        InputError: this system cannot limit a disk, or this user may not.
    """
    if gb_s is None:
        yield []
        return
    group = _BLKIO / f"scale-{os.getpid()}"
    device = os.stat(folder).st_dev
    try:
        group.mkdir()
        limit = f"{os.major(device)}:{os.minor(device)} {gb_s * 1e9:.0f}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise InputError(
            f"--disk needs root, {_BLKIO} (control groups, version 1) and a disk of its own under "
            f"{folder}: {error}"
        ) from error
    try:
        yield ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    finally:
        group.rmdir()


def _load(folder: Path, backend: str, states: Sequence[_State]) -> dict[_State, dict[str, float]]:
    """Medians of `_LOAD_RUNS` loads and plain reads, each in a separate process.

    All states take turns, because a disk is slower for a minute after large writes.
    """
    runs_of: dict[_State, list[dict[str, float]]] = {state: [] for state in states}
    for (cache, limit_gb_s), runs in _LOAD_RUNS * list(runs_of.items()):
        run: dict[str, float] = {}
        for child in (_READ_CHILD, _LOAD_CHILD):
            command = [sys.executable, "-c", _LOAD_HEAD + child, str(folder), backend, cache]
            with _disk(folder, limit_gb_s) as slowly:
                run |= json.loads(subprocess.check_output([*slowly, *command]))
        runs.append(run)
    return {
        state: {key: median(run[key] for run in runs) for key in runs[0]}
        for state, runs in runs_of.items()
    }


def loads(shape: Shape, work: Path, out: Path, disks: Sequence[float]) -> None:
    """Measure time and memory of loading artifacts, beside a plain read of the same files.

    Args:
        shape: shape of the base model.
        work: folder for the artifacts, on the disk that is measured.
        out: the results file.
        disks: limits in GB/s; the disk without a limit and the page cache are measured too.
    """
    rows: list[dict[str, Any]] = []
    states: list[_State] = [*(("cold", gb_s) for gb_s in (*disks, None)), ("warm", None)]
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        base = make_checkpoint(Path(temporary) / "base", shape)
        for recipe, backend in product(("rtn-int8", "rtn-int4", "nf4"), ("torch", "openvino")):
            folder = Path(temporary) / recipe
            manifest = gteopt.quantize(base, recipe, folder)
            os.sync()  # so that no writes slow the reads down
            for (cache, gb_s), medians in _load(folder, backend, states).items():
                row = {"recipe": recipe, "format": manifest.format, "backend": backend}
                rows.append({**row, "cache": cache, "disk_gb_s": gb_s, **medians})
                n_bytes = medians["file_bytes"]
                where = cache if gb_s is None else f"{gb_s:g} GB/s"
                print(
                    f"{recipe} ({manifest.format}) {backend} {where}: {n_bytes / 1e9:.2f} GB, "
                    f"read in {medians['read_s']:.2f} s, loaded in {medians['load_s']:.2f}, "
                    f"a vector in {medians['first_vector_s']:.2f} ({medians['cpu_s']:.2f} of CPU); "
                    f"peak {medians['peak_bytes'] / n_bytes:.2f}, "
                    f"held {medians['held_bytes'] / n_bytes:.2f} times the files",
                    flush=True,
                )
    content = {
        "shape": asdict(shape),
        "n_runs": _LOAD_RUNS,
        "n_threads": torch.get_num_threads(),
        "rows": rows,
        **conditions(),
    }
    write_part(out, "load", content)


_PANEL = (230, 130)
"""Width and height of a panel's axes, in pixels."""


def plot(results: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """Draw CPU time and memory over layers, hidden size and calibration tokens as one SVG.

    A dashed line is the memory that `inspect` predicts.
    """
    rows, middle = results["sweep"], asdict(SMALL)
    n_usual = next(r["n_tokens"] for r in rows if r["n_texts"] == 32)
    parts = []
    for column, key in enumerate(("layers", "hidden", "n_tokens")):
        fixed = [k for k in ("layers", "hidden") if k != key]
        varied = [r for r in rows if all(r["shape"][k] == middle[k] for k in fixed)]
        varied = [r for r in varied if key == "n_tokens" or r["n_tokens"] == n_usual]
        varied.sort(key=lambda r: float(r["shape"].get(key, r["n_tokens"])))
        xs = [float(r["shape"].get(key, r["n_tokens"])) for r in varied]
        seconds = [float(r["cpu_seconds"]) for r in varied]
        measured = [(r["peak_bytes"] - r["imports_bytes"]) / 1e6 for r in varied]
        predicted = [r["predicted_bytes"] / 1e6 for r in varied]
        name = {"layers": "layers", "hidden": "hidden size", "n_tokens": "calibration tokens"}[key]
        parts.append(_panel(column, 0, "CPU seconds", name, xs, [seconds]))
        parts.append(_panel(column, 1, "MB beyond the imports", name, xs, [measured, predicted]))
    n_threads = rows[0]["n_threads"]
    conditions = f"{rows[0]['machine']['cpu']}, {n_threads} thread{'s' if n_threads > 1 else ''}"
    width, height = 3 * (_PANEL[0] + 80), 2 * (_PANEL[1] + 70) + 40
    target.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11" fill="#333">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f'<text x="20" y="20" font-size="13">A {rows[0]["recipe"]} build of {middle["layers"]} '
        f"layers, hidden size {middle['hidden']}, {n_usual:,} tokens, one of them varied at a time "
        f"({conditions}); dashed: predicted</text>\n" + "\n".join(parts) + "\n</svg>\n",
        encoding="utf-8",
    )


def _panel(
    column: int, row: int, title: str, x_title: str, xs: list[float], lines: list[list[float]]
) -> str:
    """One panel: axes from zero, a label at each point; the second line is dashed."""
    width, height = _PANEL
    left, top = 50 + column * (width + 80), 55 + row * (height + 70)
    x_most, y_most = max(xs) * 1.05, max(max(line) for line in lines) * 1.1

    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + width * x / x_most, 1), round(top + height * (1 - y / y_most), 1)

    out = [
        f'<text x="{left}" y="{top - 8}" font-weight="bold">{title}</text>',
        f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#999"/>',
        f'<text x="{left + width}" y="{top + height + 32}" text-anchor="end">{x_title}</text>',
    ]
    for i, line in enumerate(lines):
        points = [at(x, y) for x, y in zip(xs, line, strict=True)]
        dash = "" if i == 0 else ' stroke-dasharray="4 3" opacity="0.6"'
        path = " ".join(f"{x},{y}" for x, y in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="#1f6fb4"{dash}/>')
        if i == 0:
            out += [f'<circle cx="{x}" cy="{y}" r="3" fill="#1f6fb4"/>' for x, y in points]
            for value, (x, y) in zip(line, points, strict=True):
                out.append(f'<text x="{x}" y="{y - 7}" text-anchor="middle">{value:.0f}</text>')
    for x in xs:
        px, py = at(x, 0)
        out.append(f'<text x="{px}" y="{py + 15}" text-anchor="middle">{x:,.0f}</text>')
    return "\n".join(out)


def main() -> None:
    """Run one measurement and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("measurement", choices=["build", "sweep", "long", "load", "plot"])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gte-Qwen2-1.5B")
    parser.add_argument("--layers", type=int, help="fewer blocks than published, for a trial")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--recipe", default="gptq-int4")
    parser.add_argument("--gptaq-strength", type=float, help="instead of the recipe's value")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="end the build after this time")
    parser.add_argument(
        "--disk", type=float, nargs="*", default=[], help="limits of the disk in GB/s"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.measurement == "sweep":
        sweep(arguments.device, arguments.work)
        return
    if arguments.measurement == "long":
        long_text(arguments.work)
        return
    if arguments.measurement == "plot":
        plot(json.loads(RESULTS.read_text()), RESULTS.with_suffix(".svg"))
        return
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    if arguments.measurement == "load":
        loads(shape, arguments.work, arguments.out, arguments.disk)
        return
    recipe = load_recipe(arguments.recipe)
    if arguments.gptaq_strength is not None:
        weights = recipe.weights.model_copy(update={"gptaq_strength": arguments.gptaq_strength})
        recipe = recipe.model_copy(update={"weights": weights})
    row = measure(
        shape,
        arguments.texts,
        arguments.tokens,
        recipe,
        arguments.device,
        arguments.work,
        arguments.minutes,
    )
    keep("builds", row, arguments.out)


if __name__ == "__main__":
    main()
