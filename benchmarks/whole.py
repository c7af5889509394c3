"""A whole build at the size of a published model: killed once in the middle, resumed, loaded.

The base has the published layout (float32 shards of 5 GB with their index, and a head that no
encoder reads) and random weights, so no quality is reported. Each step is a process of its own.
The figures are written after each block, so a run that is ended keeps what it has seen; started
again with the same folder, it goes on.

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

from scale import SHAPES, make_checkpoint, write_texts

from gteopt.config.recipe import Calibration, Recipe, load_recipe
from gteopt.machine import machine, versions
from gteopt.model.artifact import stage_folder
from gteopt.records.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "whole.json"

_HEAD = """
import json, os, sys, time
from pathlib import Path
import torch
import gteopt

def field(file, name):
    line = next(line for line in open(f"/proc/self/{file}") if line.startswith(name))
    return int(line.split()[1])

def seen():
    return {
        "at": round(time.time(), 1),
        "wall_s": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time(), 1),
        "peak_bytes": 1024 * field("status", "VmHWM"),
        "read_bytes": field("io", "rchar"),
    }

def say(**what):
    print(json.dumps({**what, **seen()}), flush=True)

started = time.perf_counter()
"""

_INSPECT = """
from gteopt.commands.inspect import inspect
from gteopt.config.recipe import Recipe

base, recipe = sys.argv[1:]
wanted = Recipe.model_validate_json(recipe)
inspect("nano", recipe=wanted)  # the imports
before = seen()
found = inspect(base, recipe=wanted)
(one,) = found.estimates
after = seen()
say(n_parameters=found.n_parameters, estimate=json.loads(one.model_dump_json()),
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
folder, text = sys.argv[1:]
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
    """Parse; run the steps that the folder lacks; keep what each of them says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gte-Qwen2-7B")
    parser.add_argument("--layers", type=int, help="fewer than published, to try it out")
    parser.add_argument("--texts", type=int, default=127)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--recipe", default="gptq-int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kill-at", type=int, default=6, help="in this block, counted from 0")
    parser.add_argument("--kill-after", type=float, default=60, help="seconds into that block")
    parser.add_argument("--work", type=Path, required=True, help="keeps base and artifact")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    shape = SHAPES[asked.shape]
    if asked.layers is not None:
        shape = replace(shape, layers=asked.layers)
    asked.work.mkdir(parents=True, exist_ok=True)
    base, texts, out = asked.work / "base", asked.work / "texts.txt", asked.work / "artifact"
    results: dict[str, Any] = {
        "shape": asdict(shape),
        "n_threads": asked.threads,
        "niceness": os.nice(0),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "machine": machine().model_dump(),
        "versions": versions(),
        "lives": [],
    }
    if asked.out.is_file():
        results |= json.loads(asked.out.read_text())
    if not (base / "config.json").is_file():
        shutil.rmtree(base, ignore_errors=True)
        started = time.perf_counter()
        make_checkpoint(base, shape)
        results["checkpoint_s"] = round(time.perf_counter() - started, 1)
    files = sorted(base.glob("*.safetensors"))
    results["base_bytes"] = sum(path.stat().st_size for path in files)
    results["n_shards"] = len(files)
    write_texts(texts, asked.texts, asked.tokens)
    spec = Calibration(texts=str(texts), n_texts=asked.texts, max_tokens=asked.tokens)
    recipe = load_recipe(asked.recipe).model_copy(update={"calibration": spec})
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    if "inspected" not in results:
        (results["inspected"],) = _lines(_INSPECT, str(base), recipe.model_dump_json(by_alias=True))
        _keep(results, asked.out)
    kill = (asked.kill_at, asked.kill_after)
    while not (out / "gteopt.json").is_file():
        was_killed = any("killed" in life for life in results["lives"])
        _build(results, asked.out, (base, out, recipe), None if was_killed else kill)
    results["loaded"] = _lines(_LOAD, str(out), texts.read_text().replace("\n", " "))
    _compare(results, out)
    _keep(results, asked.out)


def _child(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _HEAD + code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _lines(code: str, *arguments: str) -> list[dict[str, Any]]:
    """What a child says, when it has ended."""
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
    """One life of the build; ended by SIGKILL where `kill` says in which block and when."""
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
        _keep(results, kept)
        if kill and event["what"].startswith("quantizing") and event["done"] == kill[0]:
            time.sleep(kill[1])
            child.send_signal(signal.SIGKILL)
            life["killed"] = True
            break
    life["returncode"] = child.wait()
    # What an earlier life finished is read and not made again.
    life["blocks_kept"] = sum(_finished(out).get(name) == at for name, at in finished.items())
    _keep(results, kept)
    if life["returncode"] and "killed" not in life:
        raise SystemExit(f"the build ended with {life['returncode']}")


def _finished(out: Path) -> dict[str, int]:
    """Finished blocks of an unfinished build, by their files and when these were written."""
    notes = stage_folder(out).rglob("block-*.json")
    return {path.name: path.stat().st_mtime_ns for path in notes}


def _compare(results: dict[str, Any], out: Path) -> None:
    """Sizes of the artifact's files beside what `inspect` had said."""
    weights = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    said = results["inspected"]["estimate"]
    results["sizes"] = {
        "weight_files_bytes": weights,
        "predicted_weight_bytes": said["weight_bytes"],
        "folder_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def _keep(results: dict[str, Any], out: Path) -> None:
    write_atomically(out, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
