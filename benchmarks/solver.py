"""The GPTQ solver's CPU time on the matrices of one block, before and after a change.

Each solver is a process of its own with one thread, so that CPU time is what it costs. "Before" is
the package at another revision, unpacked from git into a temporary folder. Rounds alternate, and
the least CPU time of each counts: a busy machine makes a run longer, never shorter. Inputs are
random with a decaying spectrum and a few large features, as transformers have them; the same for
all.

    python benchmarks/solver.py --against eda514f        # both matrices, int4 and NF4
    python benchmarks/solver.py --against eda514f --shapes 3584x3584 --profile
    python benchmarks/solver.py --block                  # all layers of a 7B block, down_proj too

Peers run in an environment of their own: give its Python with --peer-python. What cannot be
imported there is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "solver.json"
ROOT = Path(__file__).parent.parent
SHAPES = ("3584x3584", "18944x3584")
BLOCK = {"3584x3584": 2, "512x3584": 2, "18944x3584": 2, "3584x18944": 1}
"""Output x input features of a block of gte-Qwen2-7B, and how many layers have them."""
RECIPES = ("gptq-int4", "gptq-nf4")
N_ROWS = 1024

_INPUTS = """
import json, sys, time
import torch

torch.set_num_threads(1)
out_features, in_features, n_rows = map(int, sys.argv[1:4])
generator = torch.Generator().manual_seed(0)
spectrum = torch.arange(1, in_features + 1) ** -0.5
basis = torch.randn(256, in_features, generator=generator)
x = torch.randn(n_rows, 256, generator=generator) * spectrum[:256] @ basis
x += 0.3 * torch.randn(n_rows, in_features, generator=generator)
x[:, :: in_features // 4] *= 8
x0 = x + 0.05 * torch.randn(n_rows, in_features, generator=generator)
weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
"""

_OURS = (
    _INPUTS
    + """
from gteopt.config.recipe import load_recipe
from gteopt.quant import gptq

recipe = load_recipe(sys.argv[4]).weights
profile = sys.argv[5] == "profile"
is_new = hasattr(gptq, "GptqOptions")
if is_new:
    from gteopt.quant.hessian import HessianAccumulator
else:
    HessianAccumulator = gptq.HessianAccumulator
with torch.inference_mode():
    started = time.process_time()
    through = weight if out_features < in_features else None
    statistics = HessianAccumulator(in_features, through=through)
    statistics.add(x, x0)
    hessian = statistics.hessian
    seen_s = time.process_time() - started
    if profile:
        import cProfile, pstats
        watch = cProfile.Profile(time.process_time)
        watch.enable()
    started = time.process_time()
    if is_new:
        options = gptq.GptqOptions(gptaq_strength=recipe.gptaq_strength)
        result = gptq.solve(weight, hessian, recipe.scheme, options,
            cross_term=statistics.cross_term(weight))
    else:
        result = gptq.solve(weight, hessian, recipe.scheme, act_order=recipe.act_order,
            damping=recipe.damping, clip_search=recipe.clip_search, lack=statistics.lack(weight),
            share=recipe.gptaq_strength)
    solved_s = time.process_time() - started
    if profile:
        watch.disable()
        pstats.Stats(watch, stream=sys.stderr).sort_stats("tottime").print_stats(16)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
# Against what the original layer gives for the original inputs: what GPTAQ minimises.
wanted = x0 @ weight.T
error = x @ result.weight.dequantize().T - wanted
print(json.dumps({
    "statistics_cpu_s": round(seen_s, 2),
    "solve_cpu_s": round(solved_s, 2),
    "output_snr_db": round(result.output_snr_db, 3),
    "snr_to_original_db": round(
        10 * torch.log10(wanted.double().square().sum() / error.double().square().sum()).item(), 3),
    "peak_bytes": 1024 * peak,
}))
"""
)

_LLM_COMPRESSOR = (
    _INPUTS
    + """
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import (
    accumulate_hessian, make_empty_hessian, quantize_weight)

module = torch.nn.Linear(in_features, out_features, bias=False)
module.weight.data = weight
args = QuantizationArgs(
    num_bits=4, type="int", strategy="group", group_size=128, symmetric=False, actorder="static")
started = time.process_time()
hessian = make_empty_hessian(module)
hessian, n = accumulate_hessian(x, module, hessian, 0)
seen_s = time.process_time() - started
from compressed_tensors.quantization import QuantizationScheme, initialize_module_for_quantization
initialize_module_for_quantization(
    module, QuantizationScheme(targets=["Linear"], weights=args))
started = time.process_time()
with torch.no_grad():
    quantize_weight(module=module, quant_args=args, hessian=hessian, blocksize=128, percdamp=0.01)
print(json.dumps({"statistics_cpu_s": round(seen_s, 2),
    "solve_cpu_s": round(time.process_time() - started, 2)}))
"""
)


def run(code: str, arguments: list[str], path: Path, python: str = sys.executable) -> Any:
    """What a child prints, or why there is nothing."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", code, *arguments],
        cwd=path,  # which Python looks in first
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"problem": done.stderr.strip().splitlines()[-1]}
    sys.stderr.write(done.stderr if "profile" in arguments else "")
    return json.loads(done.stdout.splitlines()[-1])


def unpack(revision: str, folder: Path) -> Path:
    """The package as it was at a revision."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "gteopt", "recipes"],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
    return folder


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the least CPU time."""
    return min(rows, key=lambda row: row.get("solve_cpu_s", float("inf")))


def main() -> None:
    """Read the command line, measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", help="revision to compare with")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--rows", type=int, default=N_ROWS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--block", action="store_true", help="all shapes of a 7B block")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peer-python", help="Python of an environment with llm-compressor")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from gteopt.machine import machine, versions

    shapes = list(BLOCK) if options.block else options.shapes
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        paths = {"now": ROOT}
        if options.against:
            paths = {options.against: unpack(options.against, Path(temporary)), **paths}
        for shape in shapes:
            sizes = [*shape.split("x"), str(options.rows)]
            for recipe in options.recipes:
                own = [*sizes, recipe, "profile" if options.profile else "plain"]
                tries: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
                for _ in range(options.rounds):
                    for name, path in paths.items():
                        tries[name].append(run(_OURS, own, path))
                for name, measured in tries.items():
                    rows.append({"solver": name, "shape": shape, "recipe": recipe} | best(measured))
                    print(json.dumps(rows[-1]), flush=True)
            if options.peer_python:
                peer = run(_LLM_COMPRESSOR, sizes, Path(temporary), options.peer_python)
                rows.append({"solver": "llm-compressor", "shape": shape, "recipe": "int4"} | peer)
                print(json.dumps(rows[-1]), flush=True)
    totals = {}
    if options.block:
        for name, recipe in {(row["solver"], row["recipe"]) for row in rows}:
            parts = [r for r in rows if (r["solver"], r["recipe"]) == (name, recipe)]
            if all("solve_cpu_s" in r for r in parts):
                seconds = sum(BLOCK[r["shape"]] * r["solve_cpu_s"] for r in parts)
                totals[f"{name} {recipe}"] = round(seconds, 1)
        print("CPU seconds a block:", totals)
    arguments = " ".join(["python", "benchmarks/solver.py", *sys.argv[1:]])
    key = "block" if options.block else "matrices"
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    results[key] = {
        "command": arguments.replace(str(options.out), options.out.name),
        "note": "two shared cores, busy with other work; CPU time, one thread",
        "rows": rows,
        "block_cpu_s": totals,
        "machine": machine().model_dump(),
        "versions": versions(),
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
