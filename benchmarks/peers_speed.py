"""Measure the speed of gteopt beside other engines: the same texts, in turns, in one run.

Each engine maps texts to unit vectors, with tokenization. In each round, every engine takes one
turn per workload. The result is the median over rounds of the ratio to the reference in the same
round. If the machine gets slower, it slows all engines down alike. The reference is
sentence-transformers, in fp32 on a CPU and in bf16 on a GPU.

    python benchmarks/peers_speed.py --models minilm --out peers_speed_cpu_minilm.json
    python benchmarks/peers_speed.py --device cuda --minutes 6 --out peers_speed_cuda.json

With `--kernels` a CPU compares gteopt with itself: each number type with the usual products, and
with those that were chosen by measuring (`kernels="measured"`).

The second command measures gte-Qwen2-7B with random weights, on long texts in batches and on short
queries (`SETTINGS`). It has not been run yet, because no GPU was available. The weights are drawn
on the GPU, and each engine copies only the weights that it changes. The reference and one other
engine are in memory at a time. 40 GB suffice, and no disk is needed.

On a GPU, the most important rows come first. Each row is in the JSON once it is measured. A row
that failed, or for which no time was left, says so there. A later run adds its rows to the same
JSON: `--missing` measures the rows without figures, `--only` those that it names. `--layers 8`
measures a model with fewer blocks, which the JSON says. At the end, the script prints which targets
are met. To try the GPU's engines on a CPU, use `--where cpu` with a small shape (`--models FOLDER`,
where the folder has a config.json).

On a GPU, torchao's layers are compiled block by block. The authors of torchao and torch advise this
for models that compile for long. All blocks share the code that is compiled for each of the two
sizes.

A peer whose library is missing, or that refuses a model, has its error in the table. `make
speed-peers` makes an environment with the peers. The models for a CPU are all-MiniLM-L6-v2 and a
bidirectional Qwen2 of the 0.5B shape, with random weights and `--layers` blocks. Cosines are those
to the reference. On random weights, a cosine only shows whether an engine computes the same
function, because random weights are harder to quantize than trained ones.

On a CPU, engines use one thread. Times are CPU times of the process, which do not depend on other
work on the machine. An engine more than 8 times slower than the reference takes one turn. The peaks
of arithmetic are measured in the same run (`arithmetic_peaks`).
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
from results_files import conditions, write_results
from torch import Tensor, nn

import gteopt
from gteopt.config.recipe import Recipe, load_recipe
from gteopt.encoder.description import EncoderDescription, describe_encoder
from gteopt.encoder.forward import count_forward_operations
from gteopt.encoder.skeleton import build_skeleton
from gteopt.machine import describe_machine
from gteopt.model.checkpoint import open_checkpoint
from gteopt.speed.clock import Stopwatch
from gteopt.speed.energy import EnergyMeter, open_energy_meter
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
    """How a device is measured.

    Attributes:
        reference: the engine that ratios and cosines refer to.
        workloads: number of texts and tokens per text, by name.
        models: the models that are measured by default.
        layers: default number of blocks of models with random weights; None for all blocks.
        together: True if all engines are in memory at once; else the reference and one other.
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
    """Times of one engine on one workload.

    Attributes:
        seconds: least time of the whole workload over the rounds.
        ratio: median over rounds of the reference's seconds / this engine's seconds.
        tokens_per_s: tokens without padding per second.
        gflops: 10^9 operations per second of `seconds`, counted by
            `forward.count_forward_operations`. A last block of gteopt does fewer operations if the
            model pools one token.
        n_rounds: turns taken.
        median_s: median over the rounds; None in older files.
        peak_ratio: operations per second of `median_s` / measured peak; None on a CPU.
        joules_per_million_tokens: energy of the device in bulk; None if the device has no counter.
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
    """One engine on one model; an engine that could not run has only `error`.

    Attributes:
        weight_bytes: bytes of the weights in memory. For peers on a GPU, the memory that the engine
            took plus the weights that it shares; None for peers on a CPU.
        made_s: seconds from the model's folder to the first vector, with quantization; on a GPU,
            from its weights in memory.
        graph_bytes: device memory of recorded forward passes (CUDA graphs).
        note: why there are no CUDA graphs, or no figures of a workload.
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
    parser.add_argument("--models", nargs="+", help="minilm, qwen2, or the name of a shipped shape")
    parser.add_argument("--layers", type=int, help="blocks of models with random weights")
    parser.add_argument("--only", nargs="+", help="engines to run beside the reference")
    parser.add_argument(
        "--kernels", action="store_true", help="gteopt with usual and with measured products"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--rounded",
        action="store_true",
        help="use rtn recipes for MiniLM: the same kernels without GPTQ",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, help="on a GPU: begin no row after this time")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="on a GPU: measure only rows that have no figures in --out",
    )
    parser.add_argument("--where", help="run the engines of --device here: cpu, cuda:1")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for each layer
    setting = SETTINGS[options.device]
    layers = options.layers or setting.layers
    device = torch.device(options.where or setting.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    for_gpu = setting.device == "cuda"
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    peaks = peak_gflops(device) if for_gpu else arithmetic_peaks()
    print("peaks, GFLOP/s:", ", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))
    run = Run(
        setting,
        device,
        options.rounds,
        peaks,
        open_energy_meter(device),
        layers,
        options.out,
        deadline,
    )
    for model in options.models or setting.models:
        if for_gpu:
            source = Source.draw(model, layers, device)
            run.n_layers = source.n_layers
            base: EncoderDescription = source.encoder()
            table = gpu_engines(source)
        else:
            calibrated = model == "minilm" and not options.rounded
            folder = folder_of(model, layers)
            base = describe_encoder(folder, device="cpu", dtype="bfloat16")  # no weights
            makers = kernel_engines() if options.kernels else engines(model, learn=calibrated)
            table = {name: partial(make, folder) for name, make in makers.items()}
        names = [*options.only, setting.reference] if options.only else list(table)
        if options.missing:
            names = [*run.missing(model, names), setting.reference]
        table = {name: table[name] for name in sorted(table, key=_place(names)) if name in names}
        run.measure(model, base, table)
    if for_gpu:
        run.show_bars()


def _place(names: Sequence[str]) -> Callable[[str], int]:
    """Sort key: the index of a name, or the end if it is not among the names."""
    return lambda name: names.index(name) if name in names else len(names)


def folder_of(model: str, n_layers: int | None) -> Path:
    """The folder of a model for a CPU; a model with random weights is made."""
    if model == "minilm":
        return model_folder("all-MiniLM-L6-v2")
    return random_qwen2(n_layers or 24)


class Run:
    """A run with its settings and the rows so far."""

    def __init__(
        self,
        setting: Setting,
        where: torch.device,
        n_rounds: int,
        peaks: dict[str, float],
        counter: EnergyMeter,
        n_layers: int | None,
        out: Path | None,
        deadline: float | None = None,
    ) -> None:
        self.setting, self.where, self.n_rounds = setting, where, n_rounds
        self.peaks, self.counter, self.n_layers, self.out = peaks, counter, n_layers, out
        self.deadline = deadline
        self.rows: list[Row] = self._earlier_rows()

    def _earlier_rows(self) -> list[Row]:
        """Rows of an earlier run on the same GPU; this run adds to them."""
        if self.setting.together or self.out is None or not self.out.is_file():
            return []
        record = json.loads(self.out.read_text())
        same = record["machine"]["gpu"] == describe_machine().gpu
        return [_row_from(fields) for fields in record["rows"]] if same else []

    def missing(self, model: str, names: Sequence[str]) -> list[str]:
        """The names that have no figures yet; names that failed before come last."""
        rows = {row.engine: row for row in self.rows if row.model == model}
        without = [name for name in names if name not in rows or not rows[name].timings]
        return sorted(without, key=lambda name: name in rows and rows[name].made_s is not None)

    def measure(
        self, model: str, base: EncoderDescription, table: Mapping[str, Callable[[], Engine]]
    ) -> None:
        """Make every engine, compare its vectors, measure all in turns, and print the table.

        Args:
            model: name of the model.
            base: a model with the tokenizer and the layer shapes of all engines.
            table: a function that makes the engine, by name.
        """
        texts = {
            name: exact_texts(base, n_texts, n_tokens, seed=0)
            for name, (n_texts, n_tokens) in self.setting.workloads.items()
        }
        made: dict[str, Engine] = {}
        expected: Vectors | None = None
        columns = ("cosine", "bulk x", "GFLOP/s", "query x", "query ms", "weights GB")
        print(f"\n{model:38}" + "".join(f"{column:>11}" for column in columns))
        broken: str | None = None
        for group in self._groups(table):
            late = self.deadline is not None and time.monotonic() > self.deadline
            if reference_is_there := self.setting.reference in made:
                if broken is not None:
                    self._keep([Row(model, name, error=broken) for name in group[1:]])
                    continue
                if late:
                    why = "not run: the time of --minutes is over"
                    self._keep([Row(model, name, error=why) for name in group[1:]])
                    continue
            for name in [n for n in made if n not in group]:
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
        """Why nothing more can run in this process; None if the device answers."""
        try:
            release(self.where)
            if self.where.type == "cuda":
                torch.cuda.synchronize(self.where)
        except RuntimeError as error:
            return f"not run: the GPU does not answer since {last} ran ({_first_line(error)})"[:160]
        return None

    def _keep(self, rows: Sequence[Row]) -> None:
        """Print rows and write them to the file.

        A row replaces the earlier row of its engine, but an error never replaces figures.
        """
        show(rows)
        by_engine = {(row.model, row.engine): row for row in self.rows}
        for row in rows:
            if row.timings or not getattr(by_engine.get((row.model, row.engine)), "timings", None):
                by_engine[row.model, row.engine] = row
        self.rows = list(by_engine.values())
        self._write()

    def _measured(
        self,
        model: str,
        group: Sequence[str],
        table: Mapping[str, Callable[[], Engine]],
        texts: Mapping[str, list[str]],
        base: EncoderDescription,
        made: dict[str, Engine],
        expected: Vectors | None,
    ) -> tuple[list[Row], Vectors]:
        """Make and measure the engines of a group that are not in `made` yet, and add them to it.

        Returns:
            A row for each of these engines, and the vectors of the reference.
        """
        reference = self.setting.reference
        rows: dict[str, Row] = {}
        for name in [n for n in group if n not in made]:
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
            except Exception as error:  # such as too much memory
                rows[name] = replace(rows[name], error=_first_line(error))
                made.pop(name)
                new.remove(name)
                continue
            cosine = float((unit(vectors) * unit(expected)).sum(axis=1).mean())
            rows[name] = replace(rows[name], cosine=cosine)
            try:
                for _ in range(2):  # compilers may compile a length again at its second call
                    made[name](texts["query"])
            except Exception as error:  # such as a product that needs more tokens
                unable.add((name, "query"))
                rows[name] = replace(rows[name], note=f"query: {_first_line(error)}")
        if new:
            seconds = take_turns(self.setting, made, texts, self.n_rounds, unable)
            for name in new:
                rows[name] = self._timed(rows[name], made[name], seconds, texts, base)
        return list(rows.values()), expected

    def _groups(self, table: Mapping[str, object]) -> Iterator[list[str]]:
        """Names of the engines that are in memory at the same time."""
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
        before, watch = allocated(self.where), Stopwatch()
        # Engines that compile for long see only the sizes that are measured.
        alone = not self.setting.together
        try:
            engine = make()
            engine(texts["bulk"] if alone else ["one text before the clock starts"])
        except Exception as error:  # a peer may refuse in any way; the refusal is the result
            return Row(model, name, error=_first_line(error), made_s=watch.wall_s)
        made[name] = engine
        made_s, grown = watch.wall_s, allocated(self.where) - before
        if isinstance(engine, Ours):
            weight_bytes: int | None = engine.encoder.weight_bytes
        else:
            shared_bytes = engine.shared_bytes if isinstance(engine, Theirs) else 0
            weight_bytes = grown + shared_bytes or None
        return Row(model, name, weight_bytes=weight_bytes, made_s=made_s)

    def _timed(
        self,
        row: Row,
        engine: Engine,
        seconds: Mapping[str, Mapping[str, list[float]]],
        texts: Mapping[str, list[str]],
        base: EncoderDescription,
    ) -> Row:
        timings = {}
        peak_rate = self.peaks.get(number_type(row.engine))
        for workload, (n_texts, n_tokens) in self.setting.workloads.items():
            own_s = seconds[row.engine][workload]
            if not own_s:
                continue
            reference_s = seconds[self.setting.reference][workload]
            least_s, median_s, n_all_tokens = min(own_s), median(own_s), n_texts * n_tokens
            n_operations = operations_of(engine, base, [n_tokens] * n_texts)
            joules = None
            if workload == "bulk":  # it takes seconds, and time on a GPU is short
                joules = self.counter.per_call(partial(engine, texts[workload]), median_s)
            timings[workload] = Timing(
                seconds=least_s,
                ratio=median(a / b for a, b in zip(reference_s, own_s, strict=False)),
                tokens_per_s=n_all_tokens / least_s,
                gflops=n_operations / least_s / 1e9,
                n_rounds=len(own_s),
                median_s=median_s,
                peak_ratio=None if peak_rate is None else n_operations / median_s / 1e9 / peak_rate,
                joules_per_million_tokens=None if joules is None else joules / n_all_tokens * 1e6,
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
        """Print the targets, and whether they are met."""
        print(
            f"\nTargets are for one H200 and all blocks of gte-Qwen2-7B. "
            f"This machine has {describe_machine().gpu or 'no GPU'}."
        )
        print(f"{'target':62}{'wanted':>10}{'measured':>14}")
        for bar in bars(self.rows, self.peaks):
            measured = "not measured" if bar.found is None else f"{bar.found:.4g}"
            verdict = "" if bar.met is None else "met" if bar.met else f"MISSED by {bar.off_by:.1%}"
            print(f"{bar.what:62}{bar.sign + f' {bar.wanted:g}':>10}{measured:>14}  {verdict}")

    def _write(self) -> None:
        """Write all rows so far, with the machine and versions."""
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
            **conditions(peer_versions(PEERS)),
            "n_threads": torch.get_num_threads(),
            "clock": "CPU time of the process" if self.setting.device == "cpu" else "wall",
            "energy": self.counter.source,
        }
        if self.setting.device == "cuda":
            record["bars"] = [
                {**asdict(bar), "met": bar.met} for bar in bars(self.rows, self.peaks)
            ]
        write_results(self.out, record, indent=2)


def _row_from(fields: dict[str, Any]) -> Row:
    timings = {name: Timing(**timing) for name, timing in fields.pop("timings").items()}
    return Row(**fields, timings=timings)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def allocated(device: torch.device) -> int:
    """Bytes of a GPU's memory that tensors hold; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    """Free the memory of engines that were deleted."""
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()  # its caches hold compiled engines
        torch.cuda.empty_cache()


def number_type(engine: str) -> str:
    """Number type of an engine's products, by its name; weights of 4 bits become bfloat16."""
    if "4-bit" in engine or "nf4" in engine:
        return "bfloat16"
    return next((kind for kind in ("int8", "fp8") if kind in engine), "bfloat16")


@dataclass(frozen=True)
class Bar:
    """A target on one H200 with the shape of gte-Qwen2-7B.

    Attributes:
        found: the measured value; None if a row for it is missing.
    """

    what: str
    sign: str
    wanted: float
    found: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if it was not measured."""
        if self.found is None:
            return None
        return self.found >= self.wanted if self.sign == ">=" else self.found < self.wanted

    @property
    def off_by(self) -> float:
        """Distance of the measured value from the target, as a share of the target."""
        return abs((self.found or 0) / self.wanted - 1)


def bars(rows: Sequence[Row], peaks: Mapping[str, float]) -> list[Bar]:
    """All targets of the GPU; speeds are medians.

    The ratio of two engines is the ratio of their ratios to the reference, because each engine took
    turns only with the reference.
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
    targets = [
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
            targets.append(Bar(f"{mine}, {workload}: times {peer}", ">=", 1, ahead))
    return targets


def take_turns(
    setting: Setting,
    made: Mapping[str, Engine],
    texts: Mapping[str, list[str]],
    n_rounds: int,
    unable: Set[tuple[str, str]] = frozenset(),
) -> dict[str, dict[str, list[float]]]:
    """CPU seconds (on a GPU: seconds) of every engine and workload, for each round."""
    on_cpu = setting.device == "cpu"
    seconds: dict[str, dict[str, list[float]]] = {n: {w: [] for w in texts} for n in made}
    for workload, batch in texts.items():
        repeats = 1 if workload == "bulk" else 5
        for turn in range(n_rounds * repeats):
            order = list(made) if turn % 2 == 0 else list(reversed(list(made)))
            for name in order:
                if (name, workload) in unable:
                    continue
                own_s, reference_s = seconds[name][workload], seconds[setting.reference][workload]
                if own_s and reference_s and min(own_s) > TOO_SLOW * min(reference_s):
                    continue
                watch = Stopwatch()
                made[name](batch)  # waits for the device, because vectors are copied to the host
                own_s.append(watch.cpu_s if on_cpu else watch.wall_s)
    return seconds


def engines(model: str, *, learn: bool) -> dict[str, Callable[[Path], Engine]]:
    """By name, a function that makes an engine of the model in a folder.

    Args:
        model: "minilm", or a model whose exports do not work.
        learn: quantize gteopt's engines with calibration (GPTQ), else by rounding.
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


def kernel_engines() -> dict[str, Callable[[Path], Engine]]:
    """The number types of gteopt on torch, with usual and with measured products."""
    table: dict[str, Callable[[Path], Engine]] = {
        "sentence-transformers fp32": partial(sentence_transformer, dtype=torch.float32)
    }
    for label, kernels in (("", "deterministic"), (", measured", "measured")):
        for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16")):
            table[f"gteopt {name}{label}"] = partial(ours, dtype=dtype, kernels=kernels)
        for recipe, name in (("rtn-int8", "int8"), ("rtn-int4", "4-bit"), ("nf4", "nf4")):
            table[f"gteopt {name}{label}"] = partial(
                ours_quantized, recipe=recipe, dtype="bfloat16", kernels=kernels
            )
    return table


def gpu_engines(source: Source) -> dict[str, Callable[[], Engine]]:
    """By name, a function that makes an engine for one GPU; the most important engines come first.

    These engines have not been run yet, because no GPU was available.
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
    """A gteopt encoder of weights in memory; `fast` sets fast accumulation in fp8 layers."""
    encoder = source.encoder(load_recipe(recipe) if isinstance(recipe, str) else recipe)
    for layer in encoder.module.modules():
        if hasattr(layer, "fast"):
            setattr(layer, "fast", fast)  # noqa: B010 - modules declare no such attribute
    return Ours(encoder)


def on_source(source: Source, module: nn.Module | None) -> Theirs:
    """sentence-transformers with a module of weights in memory; None is the unchanged module."""
    # Models with random weights have the tokenizer and pooling of the embedded model.
    model = _sentence_transformer(open_checkpoint("nano").folder, str(source.device))
    _set_transformer(model, source.module if module is None else module)
    # `encode` calls `to`, which torchao's tensors refuse under inference_mode.
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
    """A copy of the model with linear layers of bitsandbytes inside the blocks."""
    module = bitsandbytes_(source.copy(), kind, torch.bfloat16, str(source.device))
    return on_source(source, module)


def with_short_table(name: str) -> Recipe:
    """A shipped recipe that also stores the token embeddings in int8."""
    recipe = load_recipe(name).with_int8_embedding()
    return recipe.model_copy(update={"name": f"{name}-embed-int8"})


class Ours:
    """A gteopt encoder as an engine."""

    def __init__(self, encoder: gteopt.Encoder) -> None:
        self.encoder = encoder

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of texts."""
        return self.encoder.encode(texts)


def ours(folder: Path, **options: Any) -> Engine:
    """The unquantized model in gteopt; `options` are those of `gteopt.load`."""
    return Ours(gteopt.load(folder, device="cpu", **options))


def ours_quantized(folder: Path, recipe: str, **options: Any) -> Engine:
    """A gteopt recipe with its own calibration; `options` are those of `gteopt.load`.

    Their `dtype` is for layers that are not quantized.
    """
    return Ours(gteopt.load(built(folder, recipe), device="cpu", **options))


@cache
def built(folder: Path, recipe: str) -> Path:
    """An artifact, which is built once for all engines that load it."""
    out = Path(tempfile.mkdtemp()) / recipe
    gteopt.quantize(folder, recipe, out, dtype="float32", device="cpu")
    return out


class Theirs:
    """A `SentenceTransformer` as an engine.

    Attributes:
        shared_bytes: bytes of weights that it shares with other engines.
    """

    def __init__(self, model: Any, shared_bytes: int = 0) -> None:
        self.model, self.shared_bytes = model, shared_bytes

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts."""
        vectors = self.model.encode(list(texts), batch_size=32, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


def sentence_transformer(folder: Path, dtype: torch.dtype) -> Engine:
    """sentence-transformers, as its documentation says."""
    return Theirs(_sentence_transformer(folder, model_kwargs={"dtype": dtype}))


def _sentence_transformer(folder: Path, device: str = "cpu", **kwargs: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device=device, **kwargs)


def with_module(folder: Path, change: Callable[[nn.Module], nn.Module]) -> Engine:
    """sentence-transformers with a changed transformer."""
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
    for n_texts, n_words in ((8, 100), (1, 12)):  # compile before the clock starts
        for _ in range(2):
            engine(["a " * n_words] * n_texts)
    return engine


def torchao_(module: nn.Module, *, fp8: bool = False) -> nn.Module:
    """Quantize the linear layers of a module in place with torchao; returns the module."""
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
    """sentence-transformers with bitsandbytes' linear layers inside the blocks."""
    return with_module(folder, lambda module: bitsandbytes_(module, kind, torch.float32, "cpu"))


def bitsandbytes_(module: nn.Module, kind: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Put bitsandbytes' linear layers into the blocks of a module; returns the module."""
    for name, linear in list(block_linears(module)):
        parent, _, leaf = name.rpartition(".")
        new = bitsandbytes_linear(linear, kind, dtype, device)
        setattr(module.get_submodule(parent), leaf, new)
    return module


def exported(folder: Path) -> Path:
    """The model's token vectors as an ONNX graph with free batch and length.

    sentence-transformers' own export needs optimum-onnx or optimum-intel, which exclude
    transformers 5.17. Those libraries apply onnxruntime's and nncf's quantization to such a graph.
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
    """(ids, mask) -> hidden, without keyword arguments.

    It makes the additive mask itself, because no export traces the mask of transformers with a free
    length.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token vectors [N, T, D]."""
        additive_mask = (1.0 - mask[:, None, None, :].float()) * -10000.0
        hidden: Tensor = self.module(input_ids=ids, attention_mask=additive_mask).last_hidden_state
        return hidden


def with_graph(folder: Path, run: Callable[[Vectors, Vectors], Vectors]) -> Engine:
    """An engine of a tokenizer, a graph (ids, mask) -> hidden, and mean pooling."""
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
        reduce_range="avx512_vnni" not in describe_machine().cpu,
        weight_type=QuantType.QInt8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(ids: Vectors, mask: Vectors) -> Vectors:
        return np.asarray(session.run(None, {"input_ids": ids, "attention_mask": mask})[0])

    return with_graph(folder, run)


def openvino(folder: Path, int8: bool) -> Engine:
    """OpenVINO on the exported graph: unchanged, or in static int8 by nncf on 64 texts."""
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
    """Folder of a bidirectional Qwen2 of the 0.5B shape with the embedded tokenizer."""
    from transformers import AutoModel, Qwen2Config

    nano = open_checkpoint("nano")
    folder = Path(tempfile.mkdtemp()) / "qwen2"
    shutil.copytree(nano.folder, folder)
    config_fields = {k: v for k, v in nano.config.items() if k not in ("layer_types", "model_type")}
    config_fields.update(
        hidden_size=896,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        num_hidden_layers=n_layers,
        max_window_layers=n_layers,
        matryoshka_dimensions=[],
    )
    torch.manual_seed(0)
    module = AutoModel.from_config(Qwen2Config(**config_fields), dtype=torch.float32)
    module.save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling_config = json.loads(pooling.read_text())
    for key in ("word_embedding_dimension", "embedding_dimension"):
        if key in pooling_config:
            pooling_config[key] = 896
    pooling.write_text(json.dumps(pooling_config))
    return folder


def operations_of(engine: Engine, base: EncoderDescription, lengths: Sequence[int]) -> float:
    """Floating-point operations that an engine does for texts of these lengths; see `Timing`."""
    if isinstance(engine, Ours):
        return engine.encoder.operations(lengths)
    return count_forward_operations(
        build_skeleton(base.checkpoint), base.checkpoint.config, lengths, one_token=False
    )


def arithmetic_peaks() -> dict[str, float]:
    """GFLOP/s of a product of 1024 x 1024 by 1024 x 4096 matrices, for each number type."""
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
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            tokens, 1.0, 0, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product

    peaks["int8 oneDNN"] = fastest(int8)
    return peaks


def fastest(call: Callable[[], object]) -> float:
    """GFLOP/s of the fastest of a few calls."""
    seconds = []
    for _ in range(5):
        watch = Stopwatch()
        call()
        seconds.append(watch.cpu_s)
    return 2 * 1024 * 1024 * 4096 / min(seconds) / 1e9


def unit(vectors: Vectors) -> Vectors:
    """Rows of length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def show(rows: Sequence[Row]) -> None:
    """Print rows of the table of one model."""
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
