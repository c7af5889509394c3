"""Measure a whole build at the size of a published model: killed once, resumed, and loaded.

The base is a checkpoint of `scale.py` with the layout of the published model. Its weights are
random, so no quality is reported. Each step runs in a separate process. Figures are written after
each block. A run that was ended continues when it is started again with the same folder.

    nice -n 19 python benchmarks/whole.py --work /a/disk/with/50/GB --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from results_files import conditions, read_results, write_results
from scale import SHAPES, make_checkpoint, write_texts

from gteopt.config.recipe import Calibration, Recipe, load_recipe
from gteopt.model.artifact import stage_folder
from gteopt.speed.clock import Stopwatch

RESULTS = Path(__file__).parent / "results" / "whole.json"

_HEAD = """
import json, os, sys, time
from pathlib import Path
import torch
import gteopt

def field(file, name):
    line = next(line for line in open(f"/proc/self/{file}") if line.startswith(name))
    return int(line.split()[1])

def figures():
    return {
        "at": round(time.time(), 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time(), 1),
        "peak_bytes": 1024 * field("status", "VmHWM"),
        "read_bytes": field("io", "rchar"),
    }

def say(**event):
    print(json.dumps({**event, **figures()}), flush=True)

started = time.perf_counter()
"""

_INSPECT = """
from gteopt.commands.inspect import inspect
from gteopt.config.recipe import Recipe

base, recipe = sys.argv[1:]
wanted = Recipe.model_validate_json(recipe)
inspect("nano", recipe=wanted)  # the imports
before = figures()
report = inspect(base, recipe=wanted)
(estimate,) = report.estimates
after = figures()
say(n_parameters=report.n_parameters, estimate=json.loads(estimate.model_dump_json()),
    own_cpu_s=round(after["cpu_s"] - before["cpu_s"], 2),
    own_read_bytes=after["read_bytes"] - before["read_bytes"])
"""

_BUILD = """
from gteopt.config.recipe import Recipe
from gteopt.model.checkpoint import open_checkpoint

base, out, recipe = sys.argv[1:]
wanted = Recipe.model_validate_json(recipe)
say(what="imports")
open_checkpoint(base).sha256
say(what="hashing")
def progress(what, done, total):
    say(what=what, done=done, total=total)
manifest = gteopt.quantize(base, wanted, out, device="cpu", progress=progress)
say(what="sealed", weight_bytes=manifest.weight_bytes, n_tokens=manifest.calibration.n_tokens)
"""

_LOAD = """
folder, file = sys.argv[1:]
text = " ".join(Path(file).read_text().splitlines())
say(what="imports")
encoder = gteopt.load(folder, backend="torch")
say(what="loaded")
tokens = encoder.tokenization.tokenize([text], role="document", max_tokens=512)
(vector,) = encoder.embed_tokens(tokens)
say(what="encoded", n_tokens=len(tokens[0]), n_dims=len(vector),
    is_finite=bool(torch.as_tensor(vector).isfinite().all()),
    norm=round(float(torch.as_tensor(vector).float().norm()), 4))
"""


def main() -> None:
    """Run the steps whose results the folder lacks, and write the figures of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gte-Qwen2-7B")
    parser.add_argument("--layers", type=int, help="fewer blocks than published, for a trial")
    parser.add_argument("--texts", type=int, default=127)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--recipe", default="gptq-int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--kill-at", type=int, default=6, help="block in which the build is killed, counted from 0"
    )
    parser.add_argument("--kill-after", type=float, default=60, help="seconds into that block")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the base and the artifact"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    arguments.work.mkdir(parents=True, exist_ok=True)
    base, texts, out = (
        arguments.work / "base",
        arguments.work / "texts.txt",
        arguments.work / "artifact",
    )
    results: dict[str, Any] = {
        "shape": asdict(shape),
        "n_threads": arguments.threads,
        "niceness": os.nice(0),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "kill": {"block": arguments.kill_at, "after_s": arguments.kill_after},
        **conditions(),
        "lives": [],
    }
    results |= read_results(arguments.out)
    if not (base / "config.json").is_file():
        shutil.rmtree(base, ignore_errors=True)
        watch = Stopwatch()
        make_checkpoint(base, shape)
        results["checkpoint_s"] = round(watch.wall_s, 1)
    files = sorted(base.glob("*.safetensors"))
    results["base_bytes"] = sum(path.stat().st_size for path in files)
    results["n_shards"] = len(files)
    write_texts(texts, arguments.texts, arguments.tokens)
    spec = Calibration(texts=str(texts), n_texts=arguments.texts, max_tokens=arguments.tokens)
    recipe = load_recipe(arguments.recipe).model_copy(update={"calibration": spec})
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if "inspected" not in results:
        (results["inspected"],) = _lines(_INSPECT, str(base), recipe.model_dump_json(by_alias=True))
        _keep(results, arguments.out)
    kill = (arguments.kill_at, arguments.kill_after)
    while not (out / "gteopt.json").is_file():
        was_killed = any("killed" in life for life in results["lives"])
        _build(results, arguments.out, (base, out, recipe), None if was_killed else kill)
    results["loaded"] = _lines(_LOAD, str(out), str(texts))
    _compare(results, out)
    _keep(results, arguments.out)


def _child(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _HEAD + code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _lines(code: str, *arguments: str) -> list[dict[str, Any]]:
    """Run a child to its end; returns the events that it printed."""
    child = _child(code, *arguments)
    printed, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"a step ended with {child.returncode}")
    return [json.loads(line) for line in printed.splitlines()]


def _build(
    results: dict[str, Any],
    kept: Path,
    job: tuple[Path, Path, Recipe],
    kill: tuple[int, float] | None,
) -> None:
    """One life of the build; `kill` is the block, and the seconds in it, at which it is killed."""
    base, out, recipe = job
    finished = _finished(out)
    life: dict[str, Any] = {"events": [], "blocks_found": len(finished)}
    results["lives"].append(life)
    child = _child(_BUILD, str(base), str(out), recipe.model_dump_json(by_alias=True))
    assert child.stdout is not None
    for line in child.stdout:
        event = json.loads(line)
        life["events"].append(event)
        print(line, end="", flush=True)
        # A block of an earlier life is read and not made again; a sealed artifact has no such files
        if files := _finished(out):
            life["blocks_kept"] = sum(files.get(name) == at for name, at in finished.items())
        _keep(results, kept)
        if kill and event["what"].startswith("quantizing") and event["done"] == kill[0]:
            time.sleep(kill[1])
            child.send_signal(signal.SIGKILL)
            life["killed"] = True
            break
    life["returncode"] = child.wait()
    _keep(results, kept)
    if life["returncode"] and "killed" not in life:
        raise SystemExit(f"the build ended with {life['returncode']}")


def _finished(out: Path) -> dict[str, int]:
    """Times at which the files of finished blocks were written, by file name."""
    notes = stage_folder(out).rglob("block-*.json")
    return {path.name: path.stat().st_mtime_ns for path in notes}


def _compare(results: dict[str, Any], out: Path) -> None:
    """Add the sizes of the artifact's files and the predictions of `inspect` to the results."""
    weights = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    estimate = results["inspected"]["estimate"]
    results["sizes"] = {
        "weight_files_bytes": weights,
        "predicted_weight_bytes": estimate["weight_bytes"],
        "folder_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def _keep(results: dict[str, Any], out: Path) -> None:
    write_results(out, results)


if __name__ == "__main__":
    main()
