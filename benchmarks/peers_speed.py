"""Speed of gteopt beside what users can have today: one run, the same texts, turn by turn.

Every engine maps texts to unit vectors, tokenization included. In each round every engine takes one
turn per workload; what is reported is the median over rounds of the ratio to the reference
(sentence-transformers, fp32 on a CPU, bf16 on a GPU) in the same round, so that a machine that
slows down hits all alike.

    python benchmarks/peers_speed.py --models minilm --out peers_speed_cpu_minilm.json
    python benchmarks/peers_speed.py --device cuda --scratch DIR --out peers_speed_cuda.json

The second takes a gte-Qwen2-7B of random weights, texts of 512 tokens, 32 at a time, and single
queries of 16; it has not been run yet, as no GPU was at hand. The reference stays in memory, the
others join it one after the other, so that 78 GB suffice. DIR (45 GB) keeps the model and what is
made of it; each row is in the JSON once it is measured, and a later run (`--only`) puts its rows
into the same JSON. At the end it says which bars are met. `--where cpu` with a small shape
(`--models FOLDER`, whose config.json says it) tries everything but the device.

Peers whose libraries are missing, or that refuse a model, get their error in the table; an
environment with them is made by `make speed-peers`. Models: all-MiniLM-L6-v2, and a bidirectional
Qwen2 of the shape of a 0.5B one (hidden 896, 14/2 heads, MLP 4864) with random weights and
`--layers` blocks; its cosines say only whether an engine computes the same thing, since random
weights are harder to quantize than trained ones. Outputs are compared by cosine to
`sentence-transformers fp32`.

On a CPU there is one thread, and the clock is the CPU time of the process, which other work on the
machine does not lengthen. An engine more than 8 times slower than the reference takes one turn.
Arithmetic peaks are measured in the same run, as the best product of 1024 x 1024 by 1024 x 4096
matrices that torch offers in each number type.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peers_quality import bitsandbytes_linear, block_linears, model_folder, peer_versions
from torch import Tensor, nn

import gteopt
from gteopt.bench import exact_texts, peak_gflops
from gteopt.checkpoint import open_checkpoint
from gteopt.dummy import write_dummy
from gteopt.encoder import Backend
from gteopt.energy import Meter, meter
from gteopt.loading import describe
from gteopt.machine import machine, versions
from gteopt.recipe import Recipe, load_recipe

PEERS = (
    "sentence-transformers",
    "torchao",
    "bitsandbytes",
    "onnxruntime",
    "openvino",
    "nncf",
)
TOO_SLOW = 8.0
Vectors = NDArray[np.float32]
Engine = Callable[[Sequence[str]], Vectors]


@dataclass(frozen=True)
class Setting:
    """What a device is measured with.

    Attributes:
        reference: the engine that ratios and cosines refer to.
        workloads: name -> texts, tokens in each.
        models: measured when none is named.
        layers: blocks of random models when not said; None is all of them.
        together: whether all engines are in memory at once, or the reference and one other.
    """

    device: str
    reference: str
    workloads: dict[str, tuple[int, int]]
    models: tuple[str, ...]
    layers: int | None
    together: bool


SETTINGS = {
    "cpu": Setting(
        "cpu",
        "sentence-transformers fp32",
        {"bulk": (8, 128), "query": (1, 16)},
        ("minilm", "qwen2"),
        12,
        together=True,
    ),
    "cuda": Setting(
        "cuda",
        "sentence-transformers bf16",
        {"bulk": (32, 512), "query": (1, 16)},
        ("gte-Qwen2-7B-instruct",),
        None,
        together=False,
    ),
}


@dataclass(frozen=True)
class Timing:
    """One workload of one engine.

    Attributes:
        seconds: least over the rounds, for the whole workload.
        ratio: median over rounds of reference seconds / these.
        tokens_per_s: real tokens.
        gflops: operations of the linear layers alone over `seconds`.
        n_rounds: turns taken.
        median_s: median over the rounds; None in older files.
        peak_ratio: on a GPU, `gflops` of the median / the measured peak of the number type.
        joules_per_million_tokens: of the device, where it counts them.
    """

    seconds: float
    ratio: float
    tokens_per_s: float
    gflops: float
    n_rounds: int
    median_s: float | None = None
    peak_ratio: float | None = None
    joules_per_million_tokens: float | None = None


@dataclass(frozen=True)
class Row:
    """One engine on one model; `error` in place of figures where it could not run.

    Attributes:
        weight_bytes: of gteopt's engines as they lie in memory; of others, on a GPU, what its
            memory lost when they were made.
        made_s: from the model's folder to the first vector, quantization included.
        graph_bytes: device memory of recorded forward passes (CUDA graphs).
        note: why there are none.
    """

    model: str
    engine: str
    cosine: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    weight_bytes: int | None = None
    made_s: float | None = None
    graph_bytes: int | None = None
    note: str | None = None


def main() -> None:
    """Measure every engine on every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu")
    parser.add_argument("--models", nargs="+", help="minilm, qwen2, or a name of a shipped shape")
    parser.add_argument("--layers", type=int, help="blocks of models with random weights")
    parser.add_argument("--only", nargs="+", help="engines to run beside the reference")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--rounded", action="store_true", help="MiniLM by rtn recipes too: same kernels, no GPTQ"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scratch", type=Path, help="keeps random models and what is made of them")
    parser.add_argument("--where", help="device that --device's engines run on: cpu, cuda:1")
    options = parser.parse_args()
    setting = SETTINGS[options.device]
    layers = options.layers or setting.layers
    where = torch.device(options.where or setting.device)
    if where.type == "cpu":
        torch.set_num_threads(1)
    on_gpu = setting.device == "cuda"
    peaks = peak_gflops(where) if on_gpu else arithmetic_peaks()
    print("peaks, GFLOP/s:", ", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))
    with tempfile.TemporaryDirectory() as passing:
        scratch = options.scratch or Path(passing)
        run = Run(setting, where, options.rounds, peaks, meter(where), layers, options.out)
        for model in options.models or setting.models:
            real = model == "minilm" and not options.rounded
            table = gpu_engines(where, scratch) if on_gpu else engines(model, learn=real)
            table = {
                name: make
                for name, make in table.items()
                if not options.only or name in [*options.only, setting.reference]
            }
            run.measure(model, folder_of(model, layers, scratch), table)
        if on_gpu:
            run.show_bars()


def folder_of(model: str, n_layers: int | None, scratch: Path) -> Path:
    """The folder of a model, made where its weights are random."""
    if model == "minilm":
        return model_folder("all-MiniLM-L6-v2")
    if model == "qwen2":
        return random_qwen2(n_layers or 24)
    folder = scratch / f"{Path(model).name}-{n_layers or 'all'}"
    if not (folder / "model.safetensors.index.json").is_file():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        scratch.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        write_dummy(model, folder, n_layers=n_layers)
        print(f"wrote {folder} in {time.perf_counter() - begin:.0f} s", flush=True)
    return folder


class Run:
    """What is measured how, and the rows so far."""

    def __init__(
        self,
        setting: Setting,
        where: torch.device,
        n_rounds: int,
        peaks: dict[str, float],
        counter: Meter,
        n_layers: int | None,
        out: Path | None,
    ) -> None:
        self.setting, self.where, self.n_rounds = setting, where, n_rounds
        self.peaks, self.counter, self.n_layers, self.out = peaks, counter, n_layers, out
        self.rows: list[Row] = self._earlier_rows()

    def _earlier_rows(self) -> list[Row]:
        """Rows of an earlier run on the same GPU, which this one adds to."""
        if self.setting.together or self.out is None or not self.out.is_file():
            return []
        record = json.loads(self.out.read_text())
        same = record["machine"]["gpu"] == machine().gpu
        return [_row_from(each) for each in record["rows"]] if same else []

    def measure(
        self, model: str, folder: Path, table: Mapping[str, Callable[[Path], Engine]]
    ) -> None:
        """Make every engine, check it, let all take turns, print the table."""
        base = describe(folder, device="cpu", dtype="bfloat16")  # no weights
        texts = {
            name: exact_texts(base, n_texts, n_tokens, seed=0)
            for name, (n_texts, n_tokens) in self.setting.workloads.items()
        }
        operations = linear_operations(base.module)
        reference = self.setting.reference
        made: dict[str, Engine] = {}
        expected: Vectors | None = None
        columns = ("cosine", "bulk x", "GFLOP/s", "query x", "query ms", "weights GB")
        print(f"\n{model:38}" + "".join(f"{each:>11}" for each in columns))
        for group in self._groups(table):
            rows: dict[str, Row] = {}
            for name in [each for each in made if each not in group]:
                del made[name]
            for name in [each for each in group if each not in made]:
                release(self.where)
                rows[name] = self._make(model, name, table[name], folder, made)
            if reference not in made:
                raise SystemExit(f"the reference does not run: {rows[reference].error}")
            if expected is None:
                expected = made[reference](texts["bulk"])
            new = [name for name in group if name in rows and name in made]
            for name in list(new):
                try:
                    vectors = made[name](texts["bulk"])
                    for _ in range(2):  # as many as a compiler wants to see of a length
                        made[name](texts["query"])
                except Exception as error:  # too much memory, say
                    rows[name] = replace(rows[name], error=_first_line(error))
                    made.pop(name)
                    new.remove(name)
                    continue
                cosine = float((unit(vectors) * unit(expected)).sum(axis=1).mean())
                rows[name] = replace(rows[name], cosine=cosine)
            if new:
                seconds = take_turns(self.setting, made, texts, self.n_rounds)
                for name in new:
                    rows[name] = self._timed(rows[name], made[name], seconds, texts, operations)
            names = {(model, name) for name in rows}
            kept = [each for each in self.rows if (each.model, each.engine) not in names]
            self.rows = [*kept, *rows.values()]
            show(list(rows.values()))
            self._write()

    def _groups(self, table: Mapping[str, object]) -> Iterator[list[str]]:
        """Engines that are in memory at the same time."""
        reference = self.setting.reference
        if self.setting.together:
            yield list(table)
            return
        yield [reference]
        yield from ([reference, name] for name in table if name != reference)

    def _make(
        self,
        model: str,
        name: str,
        make: Callable[[Path], Engine],
        folder: Path,
        made: dict[str, Engine],
    ) -> Row:
        before, begin = allocated(self.where), time.perf_counter()
        try:
            engine = make(folder)
            engine(["one text before the clock starts"])
        except Exception as error:  # a peer may refuse in any way; that it does is the result
            return Row(model, name, error=_first_line(error))
        made[name] = engine
        took, grown = time.perf_counter() - begin, allocated(self.where) - before
        own = engine.encoder.weight_bytes if isinstance(engine, Ours) else grown or None
        return Row(model, name, weight_bytes=own, made_s=took)

    def _timed(
        self,
        row: Row,
        engine: Engine,
        seconds: Mapping[str, Mapping[str, list[float]]],
        texts: Mapping[str, list[str]],
        operations: int,
    ) -> Row:
        timings = {}
        peak = self.peaks.get(number_type(row.engine))
        for workload, (n_texts, n_tokens) in self.setting.workloads.items():
            mine = seconds[row.engine][workload]
            theirs = seconds[self.setting.reference][workload]
            best, typical, n = min(mine), median(mine), n_texts * n_tokens
            joules = self.counter.per_call(partial(engine, texts[workload]), typical)
            timings[workload] = Timing(
                seconds=best,
                ratio=median(a / b for a, b in zip(theirs, mine, strict=False)),
                tokens_per_s=n / best,
                gflops=operations * n / best / 1e9,
                n_rounds=len(mine),
                median_s=typical,
                peak_ratio=None if peak is None else operations * n / typical / 1e9 / peak,
                joules_per_million_tokens=None if joules is None else joules / n * 1e6,
            )
        graphs = engine.encoder.graphs if isinstance(engine, Ours) else None
        return replace(
            row,
            timings=timings,
            kernels=engine.encoder.kernels if isinstance(engine, Ours) else {},
            graph_bytes=None if graphs is None else graphs.n_bytes,
            note=None if graphs is None else graphs.refused,
        )

    def show_bars(self) -> None:
        """Print which bars are met, and by how much."""
        print(
            f"\nBars are for one H200 and all of gte-Qwen2-7B; this is {machine().gpu or 'a CPU'}."
        )
        print(f"{'bar':62}{'wanted':>10}{'found':>14}")
        for bar in bars(self.rows, self.peaks):
            found = "not measured" if bar.found is None else f"{bar.found:.4g}"
            said = "" if bar.met is None else "met" if bar.met else f"MISSED by {bar.off_by:.1%}"
            print(f"{bar.what:62}{bar.sign + f' {bar.wanted:g}':>10}{found:>14}  {said}")

    def _write(self) -> None:
        """Everything measured so far, and where."""
        if self.out is None:
            return
        record = {
            "schema": "gteopt.peers-speed/1",
            "device": self.setting.device,
            "ran_on": str(self.where),
            "command": shlex.join(sys.argv[1:]),
            "reference": self.setting.reference,
            "workloads": self.setting.workloads,
            "layers_of_random_models": self.n_layers,
            "peaks_gflops": self.peaks,
            "rows": [asdict(row) for row in self.rows],
            "machine": machine().model_dump(),
            "versions": {**versions(), **peer_versions(PEERS)},
            "n_threads": torch.get_num_threads(),
            "clock": "CPU time of the process" if self.setting.device == "cpu" else "wall",
            "energy": self.counter.source,
        }
        if self.setting.device == "cuda":
            record["bars"] = [
                {**asdict(bar), "met": bar.met} for bar in bars(self.rows, self.peaks)
            ]
        self.out.write_text(json.dumps(record, indent=2) + "\n")


def _row_from(fields: dict[str, Any]) -> Row:
    timings = {name: Timing(**each) for name, each in fields.pop("timings").items()}
    return Row(**fields, timings=timings)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def allocated(device: torch.device) -> int:
    """Bytes of a GPU's memory that tensors hold; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    """Let go of engines that are no longer wanted."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()  # compiled engines stay in its caches
        torch.cuda.empty_cache()


def number_type(engine: str) -> str:
    """What an engine's products are of, by its name: of weights of 4 bits, what they become."""
    if "4-bit" in engine or "nf4" in engine:
        return "bfloat16"
    return next((kind for kind in ("int8", "fp8") if kind in engine), "bfloat16")


@dataclass(frozen=True)
class Bar:
    """Something to reach on an H200 with the shape of gte-Qwen2-7B.

    Attributes:
        found: None where a row that it needs was not measured.
    """

    what: str
    sign: str
    wanted: float
    found: float | None

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None where that was not measured."""
        if self.found is None:
            return None
        return self.found >= self.wanted if self.sign == ">=" else self.found < self.wanted

    @property
    def off_by(self) -> float:
        """How far what was found is from what was wanted, as a share of the latter."""
        return abs((self.found or 0) / self.wanted - 1)


def bars(rows: Sequence[Row], peaks: Mapping[str, float]) -> list[Bar]:
    """The bars of the GPU, whatever of them was measured; speeds are medians.

    Ratios are those of the ratios to the reference, which each engine took turns with.
    """
    by_name = {row.engine: row for row in rows if row.timings}

    def of(name: str, workload: str) -> Timing | None:
        return by_name[name].timings[workload] if name in by_name else None

    def faster(name: str, than: str, workload: str) -> float | None:
        mine, theirs = of(name, workload), of(than, workload)
        return mine.ratio / theirs.ratio if mine and theirs else None

    def tokens_per_s(name: str) -> float | None:
        mine = of(name, "bulk")
        return mine.tokens_per_s * mine.seconds / mine.median_s if mine and mine.median_s else None

    def query_ms(name: str) -> float | None:
        mine = of(name, "query")
        return mine.median_s * 1e3 if mine and mine.median_s else None

    bf16, four, table = "gteopt bf16", "gteopt 4-bit", "gteopt 4-bit, table in int8"
    bulk = of(bf16, "bulk")
    share = bulk.peak_ratio if bulk else None
    small = by_name[table].weight_bytes if table in by_name else None
    found = [
        Bar("bf16, bulk: share of the measured peak", ">=", 0.6, share),
        Bar("fp8, bulk: times bf16", ">=", 1.6, faster("gteopt fp8", bf16, "bulk")),
        Bar("fp8, bulk: tokens/s", ">=", 55_000, tokens_per_s("gteopt fp8")),
        Bar("int8, bulk: times bf16", ">=", 1.4, faster("gteopt int8", bf16, "bulk")),
        Bar("4-bit, bulk: times bf16", ">=", 0.95, faster(four, bf16, "bulk")),
        Bar("4-bit, table in int8: GB of weights", "<", 4.2, small and small / 1e9),
        Bar("bf16, query: ms, median", "<", 6, query_ms(bf16)),
        Bar("4-bit, query: ms, median", "<", 3, query_ms(four)),
        Bar("4-bit, query: times bf16", ">=", 1.8, faster(four, bf16, "query")),
    ]
    for mine, peer in (
        ("gteopt int8", "torchao int8 dynamic, compiled"),
        ("gteopt int8", "bitsandbytes int8"),
        ("gteopt fp8", "torchao fp8 dynamic, compiled"),
        (four, "bitsandbytes nf4"),
    ):
        for workload in ("bulk", "query"):
            ahead = faster(mine, peer, workload)
            found.append(Bar(f"{mine}, {workload}: times {peer}", ">=", 1, ahead))
    return found


def take_turns(
    setting: Setting, made: dict[str, Engine], texts: dict[str, list[str]], n_rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every engine, workload and round: the process's own on a CPU, the wall's else."""
    clock = time.process_time if setting.device == "cpu" else time.perf_counter
    seconds: dict[str, dict[str, list[float]]] = {n: {w: [] for w in texts} for n in made}
    for workload, batch in texts.items():
        repeats = 1 if workload == "bulk" else 5
        for turn in range(n_rounds * repeats):
            order = list(made) if turn % 2 == 0 else list(reversed(made))
            for name in order:
                mine, theirs = seconds[name][workload], seconds[setting.reference][workload]
                if mine and theirs and min(mine) > TOO_SLOW * min(theirs):
                    continue
                begin = clock()
                made[name](batch)  # vectors come back to the host, which waits for the device
                mine.append(clock() - begin)
    return seconds


def engines(model: str, *, learn: bool) -> dict[str, Callable[[Path], Engine]]:
    """Name -> what makes an engine of the model in a folder; ours by GPTQ where there is something
    to learn.
    """
    table: dict[str, Callable[[Path], Engine]] = {
        "sentence-transformers fp32": partial(sentence_transformer, dtype=torch.float32),
        "sentence-transformers bf16": partial(sentence_transformer, dtype=torch.bfloat16),
        "torchao int8 dynamic, compiled": torchao_compiled,
        "torch dynamic int8": torch_dynamic,
        "bitsandbytes int8": partial(bitsandbytes, kind="int8"),
        "bitsandbytes nf4": partial(bitsandbytes, kind="nf4"),
    }
    if model == "minilm":  # the exports of a bidirectional Qwen2 come out causal or NaN
        table["onnxruntime int8"] = onnx_int8
        table["OpenVINO fp32"] = partial(openvino, int8=False)
        table["OpenVINO int8"] = partial(openvino, int8=True)
    table["gteopt fp32"] = partial(ours, dtype="float32")
    table["gteopt bf16"] = partial(ours, dtype="bfloat16")
    int8, int4 = ("int8", "gptq-int4") if learn else ("rtn-int8", "rtn-int4")
    table["gteopt int8"] = partial(ours_quantized, recipe=int8, dtype="float32")
    table["gteopt 4-bit"] = partial(ours_quantized, recipe=int4, dtype="bfloat16")
    fast = partial(ours_quantized, dtype="bfloat16", backend="openvino")
    table["gteopt fp32, OpenVINO"] = partial(ours, dtype="float32", backend="openvino")
    table["gteopt bf16, OpenVINO"] = partial(ours, dtype="bfloat16", backend="openvino")
    table["gteopt int8, OpenVINO"] = partial(fast, recipe=int8)
    table["gteopt int8-static, OpenVINO"] = partial(fast, recipe="int8-static")
    table["gteopt 4-bit, OpenVINO"] = partial(fast, recipe=int4)
    return table


def gpu_engines(where: torch.device, scratch: Path) -> dict[str, Callable[[Path], Engine]]:
    """The same for one GPU and a model of billions of weights. Not run yet: no GPU was at hand."""
    bf16, device = torch.bfloat16, str(where)
    variant = partial(ours_quantized, dtype="bfloat16", device=device, scratch=scratch)
    peer = partial(bitsandbytes, dtype=bf16, device=device)
    compiled = partial(torchao_compiled, dtype=bf16, device=device)
    return {
        "sentence-transformers bf16": partial(sentence_transformer, dtype=bf16, device=device),
        "gteopt bf16": partial(ours, dtype="bfloat16", device=device),
        "gteopt int8": partial(variant, recipe="rtn-int8"),
        "gteopt fp8": partial(variant, recipe="rtn-fp8"),
        "gteopt 4-bit": partial(variant, recipe="rtn-int4"),
        "gteopt nf4": partial(variant, recipe="nf4"),
        "gteopt 4-bit, table in int8": partial(variant, recipe=with_short_table("rtn-int4")),
        "torchao int8 dynamic, compiled": compiled,
        "torchao fp8 dynamic, compiled": partial(compiled, fp8=True),
        "bitsandbytes int8": partial(peer, kind="int8"),
        "bitsandbytes nf4": partial(peer, kind="nf4"),
    }


def with_short_table(name: str) -> Recipe:
    """A recipe with `--embed-int8`."""
    recipe = load_recipe(name).with_int8_embedding()
    return recipe.model_copy(update={"name": f"{name}-embed-int8"})


class Ours:
    """A gteopt encoder as an engine."""

    def __init__(self, encoder: gteopt.Encoder) -> None:
        self.encoder = encoder

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of texts."""
        return self.encoder.encode(texts)


def ours(folder: Path, dtype: str, device: str = "cpu", backend: Backend = "torch") -> Engine:
    """The unquantized model in gteopt."""
    return Ours(gteopt.load(folder, dtype=dtype, device=device, backend=backend))


def ours_quantized(
    folder: Path,
    recipe: str | Recipe,
    dtype: str,
    device: str = "cpu",
    backend: Backend = "torch",
    scratch: Path | None = None,
) -> Engine:
    """One of our recipes on its own calibration texts; dtype of what stays unquantized.

    Where there is a scratch folder the artifact lies beside the model and is made there once.
    """
    if scratch is None:
        assert isinstance(recipe, str)
        out = built(folder, recipe, "float32", device)
    else:
        name = recipe if isinstance(recipe, str) else recipe.name
        out = scratch / f"{folder.name}-{name}"
        gteopt.quantize(folder, recipe, out, dtype="bfloat16", device=device)
    return Ours(gteopt.load(out, dtype=dtype, device=device, backend=backend))


@cache
def built(folder: Path, recipe: str, dtype: str, device: str) -> Path:
    """An artifact, made once for all engines that load it."""
    out = Path(tempfile.mkdtemp()) / recipe
    gteopt.quantize(folder, recipe, out, dtype=dtype, device=device)
    return out


def sentence_transformer(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Engine:
    """The library as its documentation says."""
    return encode_with(_sentence_transformer(folder, device, model_kwargs={"dtype": dtype}))


def _sentence_transformer(folder: Path, device: str = "cpu", **kwargs: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device=device, **kwargs)


def encode_with(model: Any) -> Engine:
    """An engine of a `SentenceTransformer`."""

    def encode(texts: Sequence[str]) -> Vectors:
        found = model.encode(list(texts), batch_size=32, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    return encode


def with_module(
    folder: Path,
    change: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Engine:
    """sentence-transformers with its transformer changed."""
    model = _sentence_transformer(folder, device, model_kwargs={"dtype": dtype})
    first = model[0]
    name = "auto_model" if "auto_model" in dict(first.named_children()) else "model"
    setattr(first, name, change(getattr(first, name)))
    return encode_with(model)


def torchao_compiled(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", fp8: bool = False
) -> Engine:
    """Weights and dynamic activations in int8 by torchao, under `torch.compile`."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    def change(module: nn.Module) -> nn.Module:
        row: Any = PerRow()
        quantize_(
            module,
            Float8DynamicActivationFloat8WeightConfig(granularity=row)
            if fp8
            else Int8DynamicActivationInt8WeightConfig(),
        )
        module.forward = torch.compile(module.forward)
        return module

    engine = with_module(folder, change, dtype, device)
    for n_texts, n_words in ((8, 100), (1, 12)):  # compiled before the clock starts
        for _ in range(2):
            engine(["a " * n_words] * n_texts)
    return engine


def torch_dynamic(folder: Path) -> Engine:
    """torch.ao's dynamic quantization of every linear layer."""
    convert: Any = torch.ao.quantization.quantize_dynamic
    return with_module(folder, lambda module: convert(module, {nn.Linear}))


def bitsandbytes(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Engine:
    """The linear layers of bitsandbytes in place of those inside the blocks."""

    def change(module: nn.Module) -> nn.Module:
        for name, linear in list(block_linears(module)):
            parent, _, leaf = name.rpartition(".")
            new = bitsandbytes_linear(linear, kind, dtype, device)
            setattr(module.get_submodule(parent), leaf, new)
        return module

    return with_module(folder, change, dtype, device)


def exported(folder: Path) -> Path:
    """The model's token vectors as an ONNX graph with free batch and length.

    sentence-transformers' own export needs optimum-onnx or optimum-intel, which exclude
    transformers 5.17; what they run is onnxruntime's and nncf's quantization on such a graph.
    """
    from transformers import AutoModel

    module = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    path = Path(tempfile.mkdtemp()) / "model.onnx"
    ids = torch.ones(2, 8, dtype=torch.int64)
    free = {0: "texts", 1: "tokens"}
    torch.onnx.export(
        TokenVectors(module.eval()),
        (ids, ids),
        str(path),
        dynamo=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_axes={"input_ids": free, "attention_mask": free, "hidden": free},
        opset_version=17,
    )
    return path


class TokenVectors(nn.Module):
    """(ids, mask) -> hidden, without keyword arguments; the mask is added up by hand, since
    transformers builds its own in a way that no export traces with a free length.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token vectors [N, T, D]."""
        added = (1.0 - mask[:, None, None, :].float()) * -10000.0
        found: Tensor = self.module(input_ids=ids, attention_mask=added).last_hidden_state
        return found


def with_graph(folder: Path, run: Callable[[Vectors, Vectors], Vectors]) -> Engine:
    """Tokenizer, a graph (ids, mask) -> hidden, mean pooling."""
    tokenizer = _sentence_transformer(folder).tokenizer

    def encode(texts: Sequence[str]) -> Vectors:
        rows = tokenizer(list(texts), padding=True, truncation=True, return_tensors="np")
        ids, mask = (rows[name].astype(np.int64) for name in ("input_ids", "attention_mask"))
        hidden = run(ids, mask)
        weights = mask[..., None].astype(np.float32)
        return unit((hidden * weights).sum(1) / weights.sum(1))

    return encode


def onnx_int8(folder: Path) -> Engine:
    """Dynamic int8 quantization of onnxruntime."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = exported(folder)
    path = source.with_name("int8.onnx")
    quantize_dynamic(
        source,
        path,
        per_channel=True,
        reduce_range="avx512_vnni" not in machine().cpu,
        weight_type=QuantType.QInt8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(ids: Vectors, mask: Vectors) -> Vectors:
        return np.asarray(session.run(None, {"input_ids": ids, "attention_mask": mask})[0])

    return with_graph(folder, run)


def openvino(folder: Path, int8: bool) -> Engine:
    """OpenVINO on the exported graph: as it is, or with nncf's static int8 of 64 texts."""
    import openvino as ov

    model = ov.convert_model(str(exported(folder)))
    if int8:
        import nncf

        tokenizer = _sentence_transformer(folder).tokenizer
        base = gteopt.load(folder, dtype="float32")
        rows = [
            dict(tokenizer([text], return_tensors="np"))
            for n_tokens in (16, 32, 64, 128)
            for text in exact_texts(base, 16, n_tokens, seed=7)
        ]
        inputs = [
            {k: row[k].astype(np.int64) for k in ("input_ids", "attention_mask")} for row in rows
        ]
        model = nncf.quantize(model, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER)
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.compile_model(model, "CPU", settings)

    def run(ids: Vectors, mask: Vectors) -> Vectors:
        return np.asarray(compiled({"input_ids": ids, "attention_mask": mask})[0])

    return with_graph(folder, run)


def random_qwen2(n_layers: int) -> Path:
    """A folder with a bidirectional Qwen2 of a 0.5B's shape, the nano's tokenizer around it."""
    from transformers import AutoModel, Qwen2Config

    nano = open_checkpoint("nano")
    folder = Path(tempfile.mkdtemp()) / "qwen2"
    shutil.copytree(nano.folder, folder)
    fields = {k: v for k, v in nano.config.items() if k not in ("layer_types", "model_type")}
    fields.update(
        hidden_size=896,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        num_hidden_layers=n_layers,
        max_window_layers=n_layers,
        matryoshka_dimensions=[],
    )
    torch.manual_seed(0)
    module = AutoModel.from_config(Qwen2Config(**fields), dtype=torch.float32)
    module.save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    said = json.loads(pooling.read_text())
    for key in ("word_embedding_dimension", "embedding_dimension"):
        if key in said:
            said[key] = 896
    pooling.write_text(json.dumps(said))
    return folder


def linear_operations(module: nn.Module) -> int:
    """Operations of the linear layers inside the blocks for one token: two a weight."""
    return sum(
        2 * each.in_features * each.out_features
        for name, each in module.named_modules()
        if "layer" in name and hasattr(each, "in_features") and hasattr(each, "out_features")
    )


def arithmetic_peaks() -> dict[str, float]:
    """GFLOP/s of the best product that torch offers in each number type."""
    x, w = torch.randn(1024, 1024), torch.randn(4096, 1024)
    peaks = {
        "fp32 MKL": fastest(lambda: nn.functional.linear(x, w)),
        "bf16": fastest(lambda: nn.functional.linear(x.bfloat16(), w.bfloat16())),
    }
    packed = torch.ops.mkldnn._reorder_linear_weight(w, 1024)
    call = partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")
    peaks["fp32 oneDNN"] = fastest(call)
    codes = torch.randint(-127, 128, w.shape, dtype=torch.int8)
    tokens = torch.randint(0, 128, x.shape, dtype=torch.uint8)
    ones, zeros = torch.ones(4096), torch.zeros(4096, dtype=torch.int32)
    weight = torch.ops.onednn.qlinear_prepack(codes, None)

    def int8() -> Tensor:
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            tokens, 1.0, 0, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found

    peaks["int8 oneDNN"] = fastest(int8)
    return peaks


def fastest(call: Callable[[], object]) -> float:
    """GFLOP/s of the fastest of a few calls."""
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)
    return 2 * 1024 * 1024 * 4096 / min(seconds) / 1e9


def unit(vectors: Vectors) -> Vectors:
    """Rows of length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def show(rows: list[Row]) -> None:
    """Lines of the table of one model."""
    for row in rows:
        if row.error is not None or row.cosine is None:
            print(f"{row.engine:38}   {row.error}", flush=True)
            continue
        bulk, query = row.timings["bulk"], row.timings["query"]
        weights = "" if row.weight_bytes is None else f"{row.weight_bytes / 1e9:11.2f}"
        print(
            f"{row.engine:38}{row.cosine:11.4f}{bulk.ratio:11.2f}{bulk.gflops:11.0f}"
            f"{query.ratio:11.2f}{query.seconds * 1e3:11.2f}{weights}",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
