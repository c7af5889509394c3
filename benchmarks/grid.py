"""Every length and code of three weight variants from three encodings, against plain mteb.

    python benchmarks/grid.py --hub-dir ../shared/hub --suite offline

Scores gte-nano (baseline, int8, gptq-int4) at 256, 128, 64 and 32 dimensions in float32, int8 and
binary with `gteopt evaluate --dims --vectors` in one cold run, and times it: loading, encoding,
scores, intervals and fidelity. Against it stand as many separate runs of plain mteb (scores alone,
no cache; the same encoder, forward pass, instructions and stored vectors), each of which encodes
everything again. Two of them are measured for each variant, the longest and the shortest vectors;
the others are taken to need the mean of the two.

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
from gteopt.commands.evaluate import Grid, Setup, score
from gteopt.config.recipe import VectorCode
from gteopt.corpus.shards import LocalEncoding, Shard
from gteopt.encoder.encoder import Encoder
from gteopt.evaluation.mteb_isolation import isolated
from gteopt.evaluation.runner import EncodeOptions
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_suite, resolve
from gteopt.frozen import Frozen
from gteopt.machine import machine, versions
from gteopt.progress import quiet
from gteopt.records.environment import Conditions, Machine
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
    """Seconds of the clock, and of this process's CPU alone."""

    wall_s: float
    cpu_s: float


class PlainRun(Frozen):
    """One run of plain mteb, measured; `score` is of the same vectors as a row's."""

    name: str
    dims: int
    code: str
    score: float
    timing: Timing


class GridResult(Frozen):
    """The whole comparison.

    Attributes:
        grid: our one run, loading of the models included.
        plain: runs of plain mteb that were measured, loading left out.
        plain_rows: as many runs they stand for, one a row.
        plain_cpu_s: that those would take: a variant's rows times the mean of its measured runs.
        n_texts: encoded by us in all.
        n_saved: encodings that the cache saved.
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
    machine: Machine
    versions: Conditions


class Plain(AbsEncoder):  # type: ignore[misc]
    """What a user of mteb writes: encodes whatever it is handed, keeps nothing."""

    mteb_model_meta = ModelMeta.create_empty({"name": "plain/nano", "revision": "1"})

    def __init__(
        self, encoder: Encoder, vectors: VectorTransform, instructions: dict[str, str]
    ) -> None:
        # Our runner's forward pass, padded or packed as it decides for this model.
        self._encoding = LocalEncoding(encoder, BATCH_SIZE)
        self._vectors = vectors
        self._instructions = instructions

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> npt.NDArray[np.float32]:
        """What the stored vectors of a batch stand for."""
        texts = tuple(text for batch in inputs for text in batch["text"])
        is_document = prompt_type == PromptType.document
        shard = Shard(
            "document" if is_document else "query",
            None if is_document else self._instructions[task_metadata.name],
            texts,
        )
        ((_shard, full),) = self._encoding((shard,), quiet)
        return self._vectors.dequantize(self._vectors.quantize(self._vectors.project(full)))


def main() -> None:
    """Build, score, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--suite", default="offline")
    parser.add_argument(
        "--dtype",
        default="float32" if emulates_bfloat16("cpu") else "bfloat16",
        help="of both arms; bfloat16 where this processor multiplies it",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    suite = load_suite(arguments.suite)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"nano": "nano"}
        for recipe in RECIPES:
            gteopt.quantize("nano", recipe, Path(folder) / recipe, device="cpu")
            sources[recipe] = str(Path(folder) / recipe)
        started = Stopwatch()
        reports = score(
            sources,
            suite,
            Path(folder) / "results",
            how=Setup(
                hub_dir=arguments.hub_dir,
                device="cpu",
                dtype=arguments.dtype,
                grid=Grid(DIMS, CODES),
                options=EncodeOptions(batch_size=BATCH_SIZE),
            ),
            progress=quiet,
        )
        grid = timing_of(started)
        print(f"grid: {grid.wall_s:.0f} s, {grid.cpu_s:.0f} s of CPU", flush=True)
        plain = []
        for name, source in sources.items():
            encoder = gteopt.load(source, device="cpu", dtype=arguments.dtype)
            for dims, code in ((max(DIMS), CODES[0]), (min(DIMS), CODES[-1])):
                (vectors,) = fit_transforms(encoder, (dims,), (code,))
                plain.append(plain_run(name, encoder, vectors, suite, arguments.hub_dir))
                print(plain[-1], flush=True)
    asked = sum(report.n_asked_texts for report in reports.values())
    encoded = sum(report.n_encoded_texts for report in reports.values())
    plain_cpu_s = len(reports) * sum(each.timing.cpu_s for each in plain) / len(plain)
    result = GridResult(
        suite=suite.name,
        rows=tuple(row_of(name, report) for name, report in reports.items()),
        n_texts=encoded,
        n_saved=asked - encoded,
        grid=grid,
        plain=tuple(plain),
        plain_rows=len(reports),
        plain_cpu_s=plain_cpu_s,
        speedup_cpu=plain_cpu_s / grid.cpu_s,
        machine=machine(),
        versions={
            **versions(),
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
        f"{len(result.rows)} rows, {encoded:,} texts encoded, {asked - encoded:,} encodings saved: "
        f"{grid.cpu_s:.0f} s of CPU; as many plain runs would take {plain_cpu_s:.0f} s, "
        f"{result.speedup_cpu:.1f} times as much"
    )


def timing_of(watch: Stopwatch) -> Timing:
    """What a watch shows."""
    return Timing(wall_s=watch.wall_s, cpu_s=watch.cpu_s)


def plain_run(
    name: str, encoder: Encoder, vectors: VectorTransform, suite: Suite, hub_dir: Path
) -> PlainRun:
    """One run of plain mteb on the suite, loading of the model left out."""
    with isolated(offline=True):
        tasks = resolve(suite, hub_dir)
        model = Plain(encoder, vectors, {each.name: each.instruction for each in tasks})
        started = Stopwatch()
        scores = [list(plain_scores(model, each).values()) for each in tasks]
        timing = timing_of(started)
    mean = fmean(fmean(each) for each in scores)
    return PlainRun(name=name, dims=vectors.dims, code=vectors.code, score=mean, timing=timing)


def row_of(name: str, report: EvalReport) -> GridRow:
    """What is kept of a report."""
    found = report.difference
    assert report.dims is not None
    assert report.code is not None
    assert report.bytes_per_vector is not None
    return GridRow(
        name=name,
        dims=report.dims,
        code=report.code,
        bytes_per_vector=report.bytes_per_vector,
        score=report.score,
        difference=None if found is None else (found.value, found.low, found.high),
        verdict=None if found is None else found.verdict,
        neighbour_overlap=report.fidelity.neighbour_overlap,
    )


if __name__ == "__main__":
    main()
