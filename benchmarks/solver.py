"""Measure the GPTQ solver's CPU time on the matrices of one block, before and after a change.

Each solver runs in a separate process with one thread, so that its CPU time is its cost. "Before"
is the package at another revision, unpacked from git into a temporary folder. Solvers take turns,
and the least CPU time of each counts, because other work can only lengthen a run. All solvers get
the same random inputs, with a decaying spectrum and a few large features, as in transformers.
A GPU solves each matrix twice, and the second time counts, because the first compiles kernels.

    python benchmarks/solver.py --against eda514f        # both matrices, int4 and NF4
    python benchmarks/solver.py --against eda514f --shapes 3584x3584 --profile
    python benchmarks/solver.py --block                  # all layers of a 7B block
    python benchmarks/solver.py --block --device cuda    # on a GPU: time by the clock

Peers run in another environment, whose Python --peer-python names. If GPTQModel's package refuses
this torch, --peer-path names a folder with its source. All libraries then solve the same problem:
GPTQ with 4 bits in groups of 128 with zero points, activation order and static groups. gteopt
solves it without GPTAQ's correction, beside the recipe as it ships. A peer that cannot be imported
has its error in the results.

    python benchmarks/solver.py --peer-python /tmp/peers/bin/python --recipes gptq-int4
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

from results_files import conditions, write_part

RESULTS = Path(__file__).parent / "results" / "solver.json"
ROOT = Path(__file__).parent.parent
SHAPES = ("3584x3584", "18944x3584")
BLOCK = {"3584x3584": 2, "512x3584": 2, "18944x3584": 2, "3584x18944": 1}
"""Number of layers of a gte-Qwen2-7B block, by output x input features."""
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

def output_snr_db(rounded):
    # Signal to rounding noise in the layer's output on these inputs.
    signal = (x @ weight.T).double().square().sum()
    noise = (x @ (rounded.float() - weight).T).double().square().sum()
    return round(10 * torch.log10(signal / noise).item(), 3)

def peak_bytes():
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if "VmHWM" in l)
"""

_OURS = (
    _INPUTS
    + """
from gteopt.config.recipe import load_recipe
from gteopt.quant import gptq

recipe = load_recipe(sys.argv[4]).weights
profile = sys.argv[5] == "profile"
device = sys.argv[6]
x, x0, weight = x.to(device), x0.to(device), weight.to(device)
if sys.argv[5] == "same problem":
    recipe = recipe.model_copy(update={"gptaq_strength": 0.0})
is_new = hasattr(gptq, "GptqOptions")
if is_new:
    from gteopt.quant.hessian import HessianAccumulator
else:
    HessianAccumulator = gptq.HessianAccumulator

def clock():
    # CPU time of this process, or the time when the GPU has done its work.
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()

def statistics_of_inputs():
    through = weight if out_features < in_features else None
    statistics = HessianAccumulator(in_features, through=through, device=device)
    statistics.add(x, x0 if recipe.gptaq_strength else None)
    statistics.hessian
    return statistics

def solved(statistics):
    if is_new:
        options = gptq.GptqOptions(gptaq_strength=recipe.gptaq_strength)
        return gptq.solve(weight, statistics.hessian, recipe.scheme, options,
            cross_term=statistics.cross_term(weight))
    return gptq.solve(weight, statistics.hessian, recipe.scheme, act_order=recipe.act_order,
        damping=recipe.damping, clip_search=recipe.clip_search, lack=statistics.lack(weight),
        share=recipe.gptaq_strength)

with torch.inference_mode():
    if device != "cpu":
        solved(statistics_of_inputs())
        torch.cuda.reset_peak_memory_stats()
    started = clock()
    statistics = statistics_of_inputs()
    statistics_s = clock() - started
    if profile:
        import cProfile, pstats
        watch = cProfile.Profile(clock)
        watch.enable()
    started = clock()
    result = solved(statistics)
    solved_s = clock() - started
    if profile:
        watch.disable()
        pstats.Stats(watch, stream=sys.stderr).sort_stats("tottime").print_stats(16)
peak = peak_bytes() if device == "cpu" else torch.cuda.max_memory_allocated()
unit = "cpu_s" if device == "cpu" else "gpu_s"
# Error to the output of the original layer for the original inputs, which GPTAQ minimises.
exact = x0 @ weight.T
error = x @ result.weight.dequantize().T - exact
print(json.dumps({
    f"statistics_{unit}": round(statistics_s, 3),
    f"solve_{unit}": round(solved_s, 3),
    "output_snr_db": output_snr_db(result.weight.dequantize()),
    "snr_to_original_db": round(
        10 * torch.log10(exact.double().square().sum() / error.double().square().sum()).item(), 3),
    "peak_bytes": peak,
}))
"""
)

_LLM_COMPRESSOR = (
    _INPUTS
    + """
from compressed_tensors.quantization import (
    QuantizationArgs, QuantizationScheme, initialize_module_for_quantization)
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import (
    accumulate_hessian, make_empty_hessian, prepare_batch)
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe

module = torch.nn.Linear(in_features, out_features, bias=False)
module.weight.data = weight.clone()
args = QuantizationArgs(
    num_bits=4, type="int", strategy="group", group_size=128, symmetric=False, actorder="static")
initialize_module_for_quantization(
    module, QuantizationScheme(targets=["Linear"], weights=args))
with torch.no_grad():
    started = time.process_time()
    hessian, n = accumulate_hessian(x, module, make_empty_hessian(module), torch.zeros(1))
    statistics_s = time.process_time() - started
    started = time.process_time()
    initialize_observer(module, "weight")
    observe(module, base_name="weight")
    found = module.weight_observer.get_qparams()
    batch = prepare_batch([module], [found], {module: hessian}, {module: n})
    rounded, _, plain = quantize_weight(*batch, quant_args=args, blocksize=128, percdamp=0.01)
    solved_s = time.process_time() - started
assert not plain.any(), "rounded to nearest instead"
print(json.dumps({"statistics_cpu_s": round(statistics_s, 2), "solve_cpu_s": round(solved_s, 2),
    "peak_bytes": peak_bytes(), "output_snr_db": output_snr_db(rounded[0])}))
"""
)

_GPTQMODEL = (
    _INPUTS
    + """
from gptqmodel.quantization import GPTQ, QuantizeConfig

module = torch.nn.Linear(in_features, out_features, bias=False)
module.weight.data = weight.clone()
config = QuantizeConfig(bits=4, group_size=128, sym=False, desc_act=True, static_groups=True,
    damp_percent=0.01)
with torch.no_grad():
    task = GPTQ(module, config)
    task.quantizer = task.create_quantizer("layer")
    task.quantizer.configure(perchannel=True)
    started = time.process_time()
    task.add_batch(x[None], None)
    task.finalize_hessian()
    statistics_s = time.process_time() - started
    started = time.process_time()
    rounded = task.quantize()[0]
    solved_s = time.process_time() - started
print(json.dumps({"statistics_cpu_s": round(statistics_s, 2), "solve_cpu_s": round(solved_s, 2),
    "peak_bytes": peak_bytes(), "output_snr_db": output_snr_db(rounded)}))
"""
)
_PEERS = {"llm-compressor": _LLM_COMPRESSOR, "GPTQModel": _GPTQMODEL}
_PEER_VERSIONS = """
import json
from importlib.metadata import PackageNotFoundError, version

def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "from its source"

names = ("torch", "transformers", "llmcompressor", "compressed-tensors", "gptqmodel")
print(json.dumps({name: installed(name) for name in names}))
"""


def run(code: str, arguments: list[str], path: Path, python: str = sys.executable) -> Any:
    """The JSON that a child process prints, or its last error line as `problem`."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", code, *arguments],
        cwd=path if path.is_dir() else None,  # Python imports from here first
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"problem": done.stderr.strip().splitlines()[-1]}
    sys.stderr.write(done.stderr if "profile" in arguments else "")
    return json.loads(done.stdout.splitlines()[-1])


def unpack(revision: str, folder: Path) -> Path:
    """Unpack the package of a git revision into a folder; returns the folder."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "gteopt", "recipes"],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive, check=True)
    return folder


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the least time."""
    return min(rows, key=lambda row: seconds(row) or float("inf"))


def seconds(row: dict[str, Any]) -> float | None:
    """The solver's CPU seconds, or its seconds on a GPU; None if it failed."""
    return row.get("solve_cpu_s", row.get("solve_gpu_s"))


def beside_peers(sizes: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Best round of gteopt and of each peer on one matrix and the same problem, in turns."""
    peer_path = options.peer_path or ROOT / "benchmarks"
    solvers = {
        "gteopt, the same problem": (
            _OURS,
            [*sizes, "gptq-int4", "same problem", "cpu"],
            ROOT,
            None,
        ),
        **{name: (code, sizes, peer_path, options.peer_python) for name, code in _PEERS.items()},
    }
    tries: dict[str, list[dict[str, Any]]] = {name: [] for name in solvers}
    for _ in range(options.rounds):
        for name, (code, arguments, path, python) in solvers.items():
            tries[name].append(run(code, arguments, path, python or sys.executable))
            print(name, json.dumps(tries[name][-1]), file=sys.stderr, flush=True)
    shape = "x".join(sizes[:2])
    rows = [
        {"solver": name, "shape": shape, "recipe": "int4"} | best(measured)
        for name, measured in tries.items()
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure the solvers and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", help="revision to compare with")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--rows", type=int, default=N_ROWS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--block", action="store_true", help="all matrices of a 7B block")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda without peers")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peer-python", help="Python of an environment with the peers")
    parser.add_argument(
        "--peer-path", type=Path, help="folders of the peers' source, separated by :"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    if on_gpu and options.peer_python:
        parser.error("peers are measured on a CPU; leave out --device or --peer-python")
    shapes = list(BLOCK) if options.block else options.shapes
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        paths = {"now": ROOT}
        if options.against:
            paths = {options.against: unpack(options.against, Path(temporary)), **paths}
        for shape in shapes:
            sizes = [*shape.split("x"), str(options.rows)]
            for recipe in options.recipes:
                mode = "profile" if options.profile else "plain"
                solver_arguments = [*sizes, recipe, mode, options.device]
                tries: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
                for _ in range(options.rounds):
                    for name, path in paths.items():
                        tries[name].append(run(_OURS, solver_arguments, path))
                for name, measured in tries.items():
                    rows.append({"solver": name, "shape": shape, "recipe": recipe} | best(measured))
                    print(json.dumps(rows[-1]), flush=True)
            if options.peer_python:
                rows += beside_peers(sizes, options)
    totals = {}
    if options.block:
        for name, recipe in {(row["solver"], row["recipe"]) for row in rows}:
            parts = [r for r in rows if (r["solver"], r["recipe"]) == (name, recipe)]
            times = [(BLOCK[r["shape"]], seconds(r)) for r in parts]
            if all(time for _, time in times):
                total = sum(count * (time or 0) for count, time in times)
                totals[f"{name} {recipe}"] = round(total, 2)
        print(f"seconds a block on {options.device}:", totals)
    arguments = " ".join(["python", "benchmarks/solver.py", *sys.argv[1:]])
    key = "block" if options.block else "peers" if options.peer_python else "matrices"
    unit, note = "cpu_s", "two shared cores, busy with other work; CPU time, one thread"
    if on_gpu:
        key, unit, note = f"gpu-{key}", "gpu_s", "time by the clock, second run of each matrix"
    content = {
        "command": arguments.replace(str(options.out), options.out.name),
        "note": note,
        "rows": rows,
        f"block_{unit}": totals,
        **conditions(),
    }
    if options.peer_python:
        where = options.peer_path or ROOT / "benchmarks"
        content["peer_versions"] = run(_PEER_VERSIONS, [], where, options.peer_python)
    write_part(options.out, key, content)


if __name__ == "__main__":
    main()
