"""Speed of gteopt beside what users can have today: one run, the same texts, turn by turn.

Every engine maps texts to unit vectors, tokenization included. In each round every engine takes one
turn per workload; what is reported is the median over rounds of the ratio to the reference
(sentence-transformers, fp32 on a CPU, bf16 on a GPU) in the same round, so that a machine that
slows down hits all alike.

    python benchmarks/peers_speed.py --models minilm --out peers_speed_cpu_minilm.json
    python benchmarks/peers_speed.py --device cuda --minutes 6 --out peers_speed_cuda.json

The second takes a gte-Qwen2-7B of random weights, texts of 512 tokens, 32 at a time, and single
queries of 16; it has not been run yet, as no GPU was at hand. The weights are drawn on the GPU and
every engine is made of them there, the reference of themselves and the others, one after the other,
of copies of what they change: 40 GB suffice and no disk is needed. Rows come in the order of their
importance, and each is in the JSON once it is measured; what fails has its error there, and what
the minutes left no time for says so. A later run puts its rows into the same JSON: `--missing`
those without figures, `--only` those that are named. `--layers 8` measures a model of fewer blocks,
which the JSON says. At the end it says which bars are met. `--where cpu` with a small shape
(`--models FOLDER`, whose config.json says it) tries everything but the device.

There, torchao's layers are compiled block by block, as its authors and torch's advise where
compilation takes long: all blocks share what is compiled once for each of the two sizes.

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
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from device_models import Source
from model_folders import model_folder
from numpy.typing import NDArray
from peers_quality import bitsandbytes_linear, block_linears, peer_versions
from torch import Tensor, nn

import gteopt
from gteopt.config.recipe import Recipe, load_recipe
from gteopt.encoder.description import Backend, Description, describe
from gteopt.encoder.forward import operations
from gteopt.encoder.skeleton import build_skeleton
from gteopt.machine import machine, versions
from gteopt.model.checkpoint import open_checkpoint
from gteopt.speed.energy import Meter, meter
from gteopt.speed.peaks import peak_gflops
from gteopt.speed.texts import exact_texts

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
        gflops: operations over `seconds`, as `gteopt.runtime.operations` counts them: those that
            gteopt's engines do, which leave most of a last block out where one token is pooled;
            all of them of others.
        n_rounds: turns taken.
        median_s: median over the rounds; None in older files.
        peak_ratio: on a GPU, `gflops` of the median / the measured peak of the number type.
        joules_per_million_tokens: of the device, where it counts them; in bulk.
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
            memory lost when they were made, and the weights that they left as they were.
        made_s: from the model's folder, or on a GPU from its weights in memory, to the first
            vector, quantization included.
        graph_bytes: device memory of recorded forward passes (CUDA graphs).
        note: why there are none, or why there are no figures of a workload.
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
    parser.add_argument("--minutes", type=float, help="on a GPU: begin no row after so many")
    parser.add_argument(
        "--missing", action="store_true", help="on a GPU: only rows that --out has no figures of"
    )
    parser.add_argument("--where", help="device that --device's engines run on: cpu, cuda:1")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line a layer
    setting = SETTINGS[options.device]
    layers = options.layers or setting.layers
    where = torch.device(options.where or setting.device)
    if where.type == "cpu":
        torch.set_num_threads(1)
    on_gpu = setting.device == "cuda"
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    peaks = peak_gflops(where) if on_gpu else arithmetic_peaks()
    print("peaks, GFLOP/s:", ", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))
    run = Run(setting, where, options.rounds, peaks, meter(where), layers, options.out, deadline)
    for model in options.models or setting.models:
        if on_gpu:
            source = Source.draw(model, layers, where)
            run.n_layers = source.n_layers
            base: Description = source.encoder()
            table = gpu_engines(source)
        else:
            real = model == "minilm" and not options.rounded
            folder = folder_of(model, layers)
            base = describe(folder, device="cpu", dtype="bfloat16")  # no weights
            own = engines(model, learn=real)
            table = {name: partial(make, folder) for name, make in own.items()}
        wanted = [*options.only, setting.reference] if options.only else list(table)
        if options.missing:
            wanted = [*run.missing(model, wanted), setting.reference]
        table = {name: table[name] for name in sorted(table, key=_place(wanted)) if name in wanted}
        run.measure(model, base, table)
    if on_gpu:
        run.show_bars()


def _place(names: Sequence[str]) -> Callable[[str], int]:
    """Sorts by where a name stands among others."""
    return lambda name: names.index(name) if name in names else len(names)


def folder_of(model: str, n_layers: int | None) -> Path:
    """The folder of a model for a CPU, made where its weights are random."""
    if model == "minilm":
        return model_folder("all-MiniLM-L6-v2")
    return random_qwen2(n_layers or 24)


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
        deadline: float | None = None,
    ) -> None:
        self.setting, self.where, self.n_rounds = setting, where, n_rounds
        self.peaks, self.counter, self.n_layers, self.out = peaks, counter, n_layers, out
        self.deadline = deadline
        self.rows: list[Row] = self._earlier_rows()

    def _earlier_rows(self) -> list[Row]:
        """Rows of an earlier run on the same GPU, which this one adds to."""
        if self.setting.together or self.out is None or not self.out.is_file():
            return []
        record = json.loads(self.out.read_text())
        same = record["machine"]["gpu"] == machine().gpu
        return [_row_from(each) for each in record["rows"]] if same else []

    def missing(self, model: str, names: Sequence[str]) -> list[str]:
        """Those of the names that have no figures yet, what has failed before behind the others."""
        rows = {row.engine: row for row in self.rows if row.model == model}
        without = [name for name in names if name not in rows or not rows[name].timings]
        return sorted(without, key=lambda name: name in rows and rows[name].made_s is not None)

    def measure(
        self, model: str, base: Description, table: Mapping[str, Callable[[], Engine]]
    ) -> None:
        """Make every engine, check it, let all take turns, print the table.

        Args:
            model: its name.
            base: tokenizes like all engines, and has the shapes of their layers.
            table: name -> what makes an engine.
        """
        texts = {
            name: exact_texts(base, n_texts, n_tokens, seed=0)
            for name, (n_texts, n_tokens) in self.setting.workloads.items()
        }
        made: dict[str, Engine] = {}
        expected: Vectors | None = None
        columns = ("cosine", "bulk x", "GFLOP/s", "query x", "query ms", "weights GB")
        print(f"\n{model:38}" + "".join(f"{each:>11}" for each in columns))
        broken: str | None = None
        for group in self._groups(table):
            late = self.deadline is not None and time.monotonic() > self.deadline
            if reference_is_there := self.setting.reference in made:
                if broken is not None:
                    self._keep([Row(model, name, error=broken) for name in group[1:]])
                    continue
                if late:
                    why = "not run: the minutes that were given are over"
                    self._keep([Row(model, name, error=why) for name in group[1:]])
                    continue
            for name in [each for each in made if each not in group]:
                del made[name]
            try:
                rows, expected = self._measured(model, group, table, texts, base, made, expected)
            except Exception as error:
                if self.setting.together or not reference_is_there:
                    raise
                rows = [Row(model, group[1], error=_first_line(error), made_s=0.0)]
            self._keep(rows)
            broken = self._broken(group[-1])

    def _broken(self, last: str) -> str | None:
        """Why nothing more can run in this process; None where all is well."""
        try:
            release(self.where)
            if self.where.type == "cuda":
                torch.cuda.synchronize(self.where)
        except RuntimeError as error:
            return f"not run: the GPU does not answer since {last} ran ({_first_line(error)})"[:160]
        return None

    def _keep(self, rows: Sequence[Row]) -> None:
        """Show rows, and put them in the place of those of the same names: never an error in that
        of figures.
        """
        show(rows)
        before = {(each.model, each.engine): each for each in self.rows}
        for row in rows:
            if row.timings or not getattr(before.get((row.model, row.engine)), "timings", None):
                before[row.model, row.engine] = row
        self.rows = list(before.values())
        self._write()

    def _measured(
        self,
        model: str,
        group: Sequence[str],
        table: Mapping[str, Callable[[], Engine]],
        texts: Mapping[str, list[str]],
        base: Description,
        made: dict[str, Engine],
        expected: Vectors | None,
    ) -> tuple[list[Row], Vectors]:
        """Rows of those of a group that are not in `made` yet, where they are put, and the vectors
        of the reference.
        """
        reference = self.setting.reference
        rows: dict[str, Row] = {}
        for name in [each for each in group if each not in made]:
            release(self.where)
            rows[name] = self._make(model, name, table[name], made, texts)
        if reference not in made:
            raise SystemExit(f"the reference does not run: {rows[reference].error}")
        if expected is None:
            expected = made[reference](texts["bulk"])
        unable: set[tuple[str, str]] = set()
        new = [name for name in group if name in rows and name in made]
        for name in list(new):
            try:
                vectors = made[name](texts["bulk"])
            except Exception as error:  # too much memory, say
                rows[name] = replace(rows[name], error=_first_line(error))
                made.pop(name)
                new.remove(name)
                continue
            cosine = float((unit(vectors) * unit(expected)).sum(axis=1).mean())
            rows[name] = replace(rows[name], cosine=cosine)
            try:
                for _ in range(2):  # as many as a compiler wants to see of a length
                    made[name](texts["query"])
            except Exception as error:  # a product that wants more tokens, say
                unable.add((name, "query"))
                rows[name] = replace(rows[name], note=f"query: {_first_line(error)}")
        if new:
            seconds = take_turns(self.setting, made, texts, self.n_rounds, unable)
            for name in new:
                rows[name] = self._timed(rows[name], made[name], seconds, texts, base)
        return list(rows.values()), expected

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
        make: Callable[[], Engine],
        made: dict[str, Engine],
        texts: Mapping[str, list[str]],
    ) -> Row:
        before, begin = allocated(self.where), time.perf_counter()
        # Where compilers take long they see no sizes but those that are measured.
        alone = not self.setting.together
        try:
            engine = make()
            engine(texts["bulk"] if alone else ["one text before the clock starts"])
        except Exception as error:  # a peer may refuse in any way; that it does is the result
            return Row(model, name, error=_first_line(error), made_s=time.perf_counter() - begin)
        made[name] = engine
        took, grown = time.perf_counter() - begin, allocated(self.where) - before
        if isinstance(engine, Ours):
            own: int | None = engine.encoder.weight_bytes
        else:
            shared = engine.shared_bytes if isinstance(engine, Theirs) else 0
            own = grown + shared or None
        return Row(model, name, weight_bytes=own, made_s=took)

    def _timed(
        self,
        row: Row,
        engine: Engine,
        seconds: Mapping[str, Mapping[str, list[float]]],
        texts: Mapping[str, list[str]],
        base: Description,
    ) -> Row:
        timings = {}
        peak = self.peaks.get(number_type(row.engine))
        for workload, (n_texts, n_tokens) in self.setting.workloads.items():
            mine = seconds[row.engine][workload]
            if not mine:
                continue
            theirs = seconds[self.setting.reference][workload]
            best, typical, n = min(mine), median(mine), n_texts * n_tokens
            done = operations_of(engine, base, [n_tokens] * n_texts)
            joules = None
            if workload == "bulk":  # seconds a row, and few of them are to be had on a GPU
                joules = self.counter.per_call(partial(engine, texts[workload]), typical)
            timings[workload] = Timing(
                seconds=best,
                ratio=median(a / b for a, b in zip(theirs, mine, strict=False)),
                tokens_per_s=n / best,
                gflops=done / best / 1e9,
                n_rounds=len(mine),
                median_s=typical,
                peak_ratio=None if peak is None else done / typical / 1e9 / peak,
                joules_per_million_tokens=None if joules is None else joules / n * 1e6,
            )
        graphs = engine.encoder.cuda_graphs if isinstance(engine, Ours) else None
        return replace(
            row,
            timings=timings,
            kernels=engine.encoder.kernels if isinstance(engine, Ours) else {},
            graph_bytes=None if graphs is None else graphs.n_bytes,
            note=row.note or (None if graphs is None else graphs.refused),
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
        return by_name[name].timings.get(workload) if name in by_name else None

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
    fast = "gteopt fp8, fast accumulation"
    bulk = of(bf16, "bulk")
    share = bulk.peak_ratio if bulk else None
    small = by_name[table].weight_bytes if table in by_name else None
    found = [
        Bar("bf16, bulk: share of the measured peak", ">=", 0.6, share),
        Bar("fp8, bulk: times bf16", ">=", 1.6, faster("gteopt fp8", bf16, "bulk")),
        Bar("fp8, bulk: tokens/s", ">=", 55_000, tokens_per_s("gteopt fp8")),
        Bar("fp8, fast accumulation, bulk: times bf16", ">=", 1.6, faster(fast, bf16, "bulk")),
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
    setting: Setting,
    made: Mapping[str, Engine],
    texts: Mapping[str, list[str]],
    n_rounds: int,
    unable: Set[tuple[str, str]] = frozenset(),
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every engine, workload and round: the process's own on a CPU, the wall's else."""
    clock = time.process_time if setting.device == "cpu" else time.perf_counter
    seconds: dict[str, dict[str, list[float]]] = {n: {w: [] for w in texts} for n in made}
    for workload, batch in texts.items():
        repeats = 1 if workload == "bulk" else 5
        for turn in range(n_rounds * repeats):
            order = list(made) if turn % 2 == 0 else list(reversed(list(made)))
            for name in order:
                if (name, workload) in unable:
                    continue
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


def gpu_engines(source: Source) -> dict[str, Callable[[], Engine]]:
    """The same for one GPU and billions of weights, what matters most first. Not run yet: no GPU
    was at hand.
    """
    peer = partial(bitsandbytes_on, source)
    compiled = partial(torchao_on, source)
    return {
        "sentence-transformers bf16": partial(on_source, source, None),
        "gteopt bf16": partial(ours_on, source),
        "gteopt int8": partial(ours_on, source, "rtn-int8"),
        "gteopt fp8": partial(ours_on, source, "rtn-fp8"),
        "gteopt 4-bit": partial(ours_on, source, "rtn-int4"),
        "torchao int8 dynamic, compiled": compiled,
        "bitsandbytes nf4": partial(peer, kind="nf4"),
        "bitsandbytes int8": partial(peer, kind="int8"),
        "gteopt fp8, fast accumulation": partial(ours_on, source, "rtn-fp8", fast=True),
        "torchao fp8 dynamic, compiled": partial(compiled, fp8=True),
        "gteopt 4-bit, table in int8": partial(ours_on, source, with_short_table("rtn-int4")),
        "gteopt nf4": partial(ours_on, source, "nf4"),
    }


def ours_on(source: Source, recipe: str | Recipe | None = None, *, fast: bool = False) -> Engine:
    """Our encoder of weights in memory; `fast` is `Fp8LinearCuda`'s."""
    found = source.encoder(load_recipe(recipe) if isinstance(recipe, str) else recipe)
    for each in found.module.modules():
        if hasattr(each, "fast"):
            setattr(each, "fast", fast)  # noqa: B010 - modules declare no such attribute
    return Ours(found)


def on_source(source: Source, module: nn.Module | None) -> Theirs:
    """sentence-transformers around a module made of weights in memory, or around themselves."""
    # The embedded model has the tokenizer and the pooling of random ones.
    model = _sentence_transformer(open_checkpoint("nano").folder, str(source.device))
    _set_transformer(model, source.module if module is None else module)
    # `encode` moves it to where it is, which torchao's tensors refuse under inference_mode.
    model.to = lambda *_: model
    return Theirs(model, source.n_bytes if module is None else source.table_bytes)


def torchao_on(source: Source, *, fp8: bool = False) -> Engine:
    """Weights and dynamic activations in 8 bits by torchao, each block under `torch.compile`."""
    module: Any = torchao_(source.copy(), fp8=fp8)
    torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)
    for block in module.layers:
        block.forward = torch.compile(block.forward, dynamic=False)
    return on_source(source, module)


def bitsandbytes_on(source: Source, kind: str) -> Engine:
    """The linear layers of bitsandbytes in place of those inside the blocks."""
    module = bitsandbytes_(source.copy(), kind, torch.bfloat16, str(source.device))
    return on_source(source, module)


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


def ours(folder: Path, dtype: str, backend: Backend = "torch") -> Engine:
    """The unquantized model in gteopt."""
    return Ours(gteopt.load(folder, dtype=dtype, device="cpu", backend=backend))


def ours_quantized(folder: Path, recipe: str, dtype: str, backend: Backend = "torch") -> Engine:
    """One of our recipes on its own calibration texts; dtype of what stays unquantized."""
    out = built(folder, recipe)
    return Ours(gteopt.load(out, dtype=dtype, device="cpu", backend=backend))


@cache
def built(folder: Path, recipe: str) -> Path:
    """An artifact, made once for all engines that load it."""
    out = Path(tempfile.mkdtemp()) / recipe
    gteopt.quantize(folder, recipe, out, dtype="float32", device="cpu")
    return out


class Theirs:
    """A `SentenceTransformer` as an engine.

    Attributes:
        shared_bytes: of its weights that others have too.
    """

    def __init__(self, model: Any, shared_bytes: int = 0) -> None:
        self.model, self.shared_bytes = model, shared_bytes

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts."""
        found = self.model.encode(list(texts), batch_size=32, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)


def sentence_transformer(folder: Path, dtype: torch.dtype) -> Engine:
    """The library as its documentation says."""
    return Theirs(_sentence_transformer(folder, model_kwargs={"dtype": dtype}))


def _sentence_transformer(folder: Path, device: str = "cpu", **kwargs: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device=device, **kwargs)


def with_module(folder: Path, change: Callable[[nn.Module], nn.Module]) -> Engine:
    """sentence-transformers with its transformer changed."""
    model = _sentence_transformer(folder, model_kwargs={"dtype": torch.float32})
    _set_transformer(model, change(_transformer(model)))
    return Theirs(model)


def _transformer(model: Any) -> Any:
    return getattr(model[0], _place_of_transformer(model))


def _set_transformer(model: Any, module: nn.Module) -> None:
    setattr(model[0], _place_of_transformer(model), module)


def _place_of_transformer(model: Any) -> str:
    return "auto_model" if "auto_model" in dict(model[0].named_children()) else "model"


def torchao_compiled(folder: Path) -> Engine:
    """Weights and dynamic activations in int8 by torchao, under `torch.compile`."""

    def change(module: nn.Module) -> nn.Module:
        torchao_(module)
        module.forward = torch.compile(module.forward)
        return module

    engine = with_module(folder, change)
    for n_texts, n_words in ((8, 100), (1, 12)):  # compiled before the clock starts
        for _ in range(2):
            engine(["a " * n_words] * n_texts)
    return engine


def torchao_(module: nn.Module, *, fp8: bool = False) -> nn.Module:
    """The module with the linear layers of torchao."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    row: Any = PerRow()
    quantize_(
        module,
        Float8DynamicActivationFloat8WeightConfig(granularity=row)
        if fp8
        else Int8DynamicActivationInt8WeightConfig(),
    )
    return module


def torch_dynamic(folder: Path) -> Engine:
    """torch.ao's dynamic quantization of every linear layer."""
    convert: Any = torch.ao.quantization.quantize_dynamic
    return with_module(folder, lambda module: convert(module, {nn.Linear}))


def bitsandbytes(folder: Path, kind: str) -> Engine:
    """The linear layers of bitsandbytes in place of those inside the blocks."""
    return with_module(folder, lambda module: bitsandbytes_(module, kind, torch.float32, "cpu"))


def bitsandbytes_(module: nn.Module, kind: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The module with the linear layers of bitsandbytes."""
    for name, linear in list(block_linears(module)):
        parent, _, leaf = name.rpartition(".")
        new = bitsandbytes_linear(linear, kind, dtype, device)
        setattr(module.get_submodule(parent), leaf, new)
    return module


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


def operations_of(engine: Engine, base: Description, lengths: Sequence[int]) -> float:
    """Floating-point operations that an engine does for texts of these lengths; see `Timing`."""
    if isinstance(engine, Ours):
        return engine.encoder.operations(lengths)
    return operations(
        build_skeleton(base.checkpoint), base.checkpoint.config, lengths, one_token=False
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


def show(rows: Sequence[Row]) -> None:
    """Lines of the table of one model."""
    for row in rows:
        if row.error is not None or row.cosine is None:
            print(f"{row.engine:38}   {row.error}", flush=True)
            continue
        bulk, query = row.timings["bulk"], row.timings.get("query")
        weights = "" if row.weight_bytes is None else f"{row.weight_bytes / 1e9:11.2f}"
        print(
            f"{row.engine:38}{row.cosine:11.4f}{bulk.ratio:11.2f}{bulk.gflops:11.0f}"
            + (f"{query.ratio:11.2f}{query.seconds * 1e3:11.2f}" if query else f"{'':22}")
            + weights
            + (f"  {row.note}" if row.note else ""),
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
