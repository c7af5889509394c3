"""Every length and code of three weight variants from three encodings, against plain mteb.

    python benchmarks/grid.py --hub-dir ../shared/hub --suite offline

Scores gte-nano (baseline, int8, gptq-int4) at 256, 128, 64 and 32 dimensions in float32, int8 and
binary with `gteopt evaluate --dims --vectors` in one cold run, and times it. Against it stand as
many separate runs of plain mteb, each of which encodes everything again: one is measured for each
weight variant on the same suite (mteb.evaluate, no cache, the same encoder and instructions), and
the time of all rows is that times the rows of a variant, named as such.

Writes benchmarks/results/grid.json: rows, times and conditions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import numpy as np
import numpy.typing as npt
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType

import gteopt
from gteopt.encoder import Encoder
from gteopt.evaluation import load_suite
from gteopt.evaluation.isolation import isolated
from gteopt.evaluation.tasks import resolve
from gteopt.machine import machine, versions
from gteopt.plan import Grid, score
from gteopt.recipe import Frozen, VectorCode
from gteopt.records import Conditions, EvalReport, Machine, write_record

RESULTS = Path(__file__).parent / "results" / "grid.json"
RECIPES = ("int8", "gptq-int4")
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


class GridResult(Frozen):
    """The whole comparison; `plain` is one run of mteb for each weight variant."""

    suite: str
    rows: tuple[GridRow, ...]
    n_encoded: int
    n_saved: int
    grid: Timing
    plain: dict[str, Timing]
    plain_runs_stood_for: int
    speedup_cpu: float
    machine: Machine
    versions: Conditions


class Plain(AbsEncoder):  # type: ignore[misc]
    """What a user of mteb writes: encodes whatever it is handed, keeps nothing."""

    mteb_model_meta = ModelMeta.create_empty({"name": "plain/nano", "revision": "1"})

    def __init__(self, encoder: Encoder, instructions: dict[str, str]) -> None:
        self._encoder = encoder
        self._instructions = instructions

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> npt.NDArray[np.float32]:
        """Vectors of a batch."""
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type == PromptType.document:
            return self._encoder.embed(texts)
        instruction = self._instructions[task_metadata.name]
        return self._encoder.embed(texts, role="query", instruction=instruction)


def main() -> None:
    """Build, score, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--suite", default="offline")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    suite = load_suite(arguments.suite)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"nano": "nano"}
        for recipe in RECIPES:
            gteopt.quantize("nano", recipe, Path(folder) / recipe)
            sources[recipe] = str(Path(folder) / recipe)
        wall, cpu = monotonic(), process_time()
        reports = score(
            sources,
            suite,
            Path(folder) / "results",
            hub_dir=arguments.hub_dir,
            device="cpu",
            grid=Grid(DIMS, CODES),
            progress=lambda what, done, total: None,
        )
        grid = Timing(wall_s=monotonic() - wall, cpu_s=process_time() - cpu)
        plain = {n: plain_run(s, suite, arguments.hub_dir) for n, s in sources.items()}
    runs = len(DIMS) * len(CODES)
    asked = sum(report.n_asked_texts for report in reports.values())
    encoded = sum(report.n_encoded_texts for report in reports.values())
    result = GridResult(
        suite=suite.name,
        rows=tuple(row_of(name, report) for name, report in reports.items()),
        n_encoded=encoded,
        n_saved=asked - encoded,
        grid=grid,
        plain=plain,
        plain_runs_stood_for=len(sources) * runs,
        speedup_cpu=runs * sum(each.cpu_s for each in plain.values()) / grid.cpu_s,
        machine=machine(),
        versions=versions(),
    )
    write_record(arguments.out, result)
    for row in result.rows:
        print(f"{row.name:32} {row.bytes_per_vector:5} bytes  {100 * row.score:.2f}  {row.verdict}")
    print(
        f"{len(result.rows)} rows, {encoded:,} texts encoded, {asked - encoded:,} encodings saved: "
        f"{grid.wall_s:.0f} s ({grid.cpu_s:.0f} s CPU); {runs} plain runs of each variant would "
        f"take {result.speedup_cpu:.1f} times the CPU"
    )


def plain_run(source: str, suite: Any, hub_dir: Path) -> Timing:
    """Time of one run of plain mteb on the suite, loading of the model left out."""
    import mteb

    encoder = gteopt.load(source, device="cpu")
    with isolated(offline=True):
        tasks = resolve(suite, hub_dir)
        model = Plain(encoder, {each.name: each.instruction for each in tasks})
        wall, cpu = monotonic(), process_time()
        for each in tasks:
            mteb.evaluate(model, each.task, cache=None, show_progress_bar=False)
        return Timing(wall_s=monotonic() - wall, cpu_s=process_time() - cpu)


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
