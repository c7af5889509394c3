"""Compare one run over all lengths and codes of three variants with runs of plain mteb.

    python benchmarks/grid.py --hub-dir ../shared/hub --suite offline

The one run scores gte-nano (baseline, int8, gptq-int4) at four lengths in float32, int8 and binary,
like `gteopt evaluate --dims --vectors` without a cache. Its time includes loading, encoding,
scores, intervals and fidelity.

Plain mteb needs a run for each row, which encodes all texts again and computes only scores.
Encoder, forward pass, instructions and stored vectors are the same. Two runs of each variant are
measured, with the longest and the shortest vectors. The others are assumed to take their mean.

Writes benchmarks/results/grid.json: rows, times and conditions.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType
from pydantic import Field
from reproduce import plain_scores

import gteopt
from gteopt.build.fit_vectors import fit_transforms
from gteopt.build.replay import emulates_bfloat16
from gteopt.commands.evaluate import EvaluationSetup, VectorGrid, evaluate_suite
from gteopt.config.recipe import VectorCode
from gteopt.corpus.shards import LocalEncoding, Shard
from gteopt.encoder.encoder import Encoder
from gteopt.evaluation.mteb_isolation import isolate_mteb
from gteopt.evaluation.runner import SuiteEncodeOptions
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_suite, resolve_tasks
from gteopt.frozen import Frozen
from gteopt.machine import describe_machine, read_library_versions
from gteopt.progress import ignore_progress
from gteopt.records.environment import Conditions, MachineRecord
from gteopt.records.evaluation import EvalReport
from gteopt.records.files import write_record
from gteopt.speed.clock import Stopwatch
from gteopt.vectors.transform import VectorTransform

RESULTS = Path(__file__).parent / "results" / "grid.json"
RECIPES = ("int8", "gptq-int4")
BATCH_SIZE = 32
DIMS = (256, 128, 64, 32)
CODES: tuple[VectorCode, ...] = ("float32", "int8", "binary")


class GridRow(Frozen):
    """One variant, length and code."""

    name: str
    dims: int
    code: str
    bytes_per_vector: int
    score: float
    difference: tuple[float, float, float] | None
    verdict: str | None
    neighbour_overlap: float


class Timing(Frozen):
    """Wall-clock seconds, and CPU seconds of this process."""

    wall_s: float
    cpu_s: float


class PlainRun(Frozen):
    """One measured run of plain mteb, on the vectors of the `GridRow` with the same names."""

    name: str
    dims: int
    code: str
    score: float
    timing: Timing


class GridResult(Frozen):
    """The whole comparison.

    Attributes:
        grid: our one run, with the loading of models.
        plain: the measured runs of plain mteb, without the loading of models.
        plain_rows: number of plain runs that all rows would need.
        plain_cpu_s: predicted CPU seconds of those runs: `plain_rows` times the mean of `plain`.
        n_texts: texts that our run encoded.
        n_saved: encodings that our cache saved.
    """

    schema_: Literal["gteopt.grid/1"] = Field(default="gteopt.grid/1", alias="schema")
    suite: str
    rows: tuple[GridRow, ...]
    n_texts: int
    n_saved: int
    grid: Timing
    plain: tuple[PlainRun, ...]
    plain_rows: int
    plain_cpu_s: float
    speedup_cpu: float
    machine: MachineRecord
    versions: Conditions


class Plain(AbsEncoder):  # type: ignore[misc]
    """A model as users of mteb write it: encodes all texts that it gets, without a cache."""

    mteb_model_meta = ModelMeta.create_empty({"name": "plain/nano", "revision": "1"})

    def __init__(
        self, encoder: Encoder, vectors: VectorTransform, instructions: dict[str, str]
    ) -> None:
        # Our runner's forward pass, which is padded or packed as this model needs.
        self._encoding = LocalEncoding(encoder, BATCH_SIZE)
        self._vectors = vectors
        self._instructions = instructions

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> npt.NDArray[np.float32]:
        """Vectors of a batch, quantized and dequantized."""
        texts = tuple(text for batch in inputs for text in batch["text"])
        is_document = prompt_type == PromptType.document
        shard = Shard(
            "document" if is_document else "query",
            None if is_document else self._instructions[task_metadata.name],
            texts,
        )
        ((_shard, full),) = self._encoding((shard,), ignore_progress)
        return self._vectors.dequantize(self._vectors.quantize(self._vectors.project(full)))


def main() -> None:
    """Build, score, time, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--suite", default="offline")
    parser.add_argument(
        "--dtype",
        default="float32" if emulates_bfloat16("cpu") else "bfloat16",
        help="dtype of both sides; the default is bfloat16 if this processor multiplies it",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    suite = load_suite(arguments.suite)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"nano": "nano"}
        for recipe in RECIPES:
            gteopt.quantize("nano", recipe, Path(folder) / recipe, device="cpu")
            sources[recipe] = str(Path(folder) / recipe)
        watch = Stopwatch()
        reports = evaluate_suite(
            sources,
            suite,
            Path(folder) / "results",
            how=EvaluationSetup(
                hub_dir=arguments.hub_dir,
                device="cpu",
                dtype=arguments.dtype,
                grid=VectorGrid(DIMS, CODES),
                options=SuiteEncodeOptions(batch_size=BATCH_SIZE),
            ),
            progress=ignore_progress,
        )
        grid = timing_of(watch)
        print(f"grid: {grid.wall_s:.0f} s, {grid.cpu_s:.0f} s of CPU", flush=True)
        plain = []
        for name, source in sources.items():
            encoder = gteopt.load(source, device="cpu", dtype=arguments.dtype)
            for dims, code in ((max(DIMS), CODES[0]), (min(DIMS), CODES[-1])):
                (vectors,) = fit_transforms(encoder, (dims,), (code,))
                plain.append(plain_run(name, encoder, vectors, suite, arguments.hub_dir))
                print(plain[-1], flush=True)
    n_asked = sum(report.n_asked_texts for report in reports.values())
    n_encoded = sum(report.n_encoded_texts for report in reports.values())
    plain_cpu_s = len(reports) * sum(run.timing.cpu_s for run in plain) / len(plain)
    result = GridResult(
        suite=suite.name,
        rows=tuple(row_of(name, report) for name, report in reports.items()),
        n_texts=n_encoded,
        n_saved=n_asked - n_encoded,
        grid=grid,
        plain=tuple(plain),
        plain_rows=len(reports),
        plain_cpu_s=plain_cpu_s,
        speedup_cpu=plain_cpu_s / grid.cpu_s,
        machine=describe_machine(),
        versions={
            **read_library_versions(),
            "mteb": version("mteb"),
            "dtype": arguments.dtype,
            "torch_threads": str(torch.get_num_threads()),
            "batch_size": str(BATCH_SIZE),
        },
    )
    write_record(arguments.out, result)
    for row in result.rows:
        print(f"{row.name:32} {row.bytes_per_vector:5} bytes  {100 * row.score:.2f}  {row.verdict}")
    print(
        f"{len(result.rows)} rows, {n_encoded:,} texts encoded, {result.n_saved:,} encodings "
        f"saved: {grid.cpu_s:.0f} s of CPU; as many plain runs would take {plain_cpu_s:.0f} s, "
        f"{result.speedup_cpu:.1f} times as much"
    )


def timing_of(watch: Stopwatch) -> Timing:
    """Seconds since the stopwatch was made."""
    return Timing(wall_s=watch.wall_s, cpu_s=watch.cpu_s)


def plain_run(
    name: str, encoder: Encoder, vectors: VectorTransform, suite: Suite, hub_dir: Path
) -> PlainRun:
    """One run of plain mteb on the suite, without the loading of the model."""
    with isolate_mteb(offline=True):
        tasks = resolve_tasks(suite, hub_dir)
        model = Plain(encoder, vectors, {task.name: task.instruction for task in tasks})
        watch = Stopwatch()
        scores = [list(plain_scores(model, task).values()) for task in tasks]
        timing = timing_of(watch)
    mean = fmean(fmean(subsets) for subsets in scores)
    return PlainRun(name=name, dims=vectors.dims, code=vectors.code, score=mean, timing=timing)


def row_of(name: str, report: EvalReport) -> GridRow:
    """The row of a report."""
    difference = report.difference
    assert report.dims is not None
    assert report.code is not None
    assert report.bytes_per_vector is not None
    return GridRow(
        name=name,
        dims=report.dims,
        code=report.code,
        bytes_per_vector=report.bytes_per_vector,
        score=report.score,
        difference=None
        if difference is None
        else (difference.value, difference.low, difference.high),
        verdict=None if difference is None else difference.verdict,
        neighbour_overlap=report.fidelity.neighbour_overlap,
    )


if __name__ == "__main__":
    main()
