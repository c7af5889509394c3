"""Measure how much of a model's score each recipe keeps, with each code of its vectors.

Builds every recipe at effort `fast`, with the texts that ship with gteopt. Scores every code from
one encoding, paired with the base model. Prints a table for each model and writes one JSON, which
keeps its rows of other models:

    .venv/bin/python benchmarks/retention.py --hub-dir ../shared/hub \
        --beir ../shared/beir/cranfield --out benchmarks/results/retention.json

Tasks are those of the suite `offline`, and a search among the first 600 documents of Cranfield.
They are in four languages. Layers that are not quantized compute in float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from model_folders import model_folder
from pydantic import Field

import gteopt
from gteopt.commands.evaluate import EvaluationSetup, VectorGrid, evaluate_suite
from gteopt.config.recipe import VectorCode
from gteopt.evaluation.suites import Suite, SuiteTask
from gteopt.evaluation.tasks import load_suite
from gteopt.frozen import Frozen
from gteopt.machine import describe_machine, read_library_versions
from gteopt.model.artifact import read_manifest
from gteopt.progress import Progress
from gteopt.records.environment import Conditions, MachineRecord
from gteopt.records.evaluation import EvalReport
from gteopt.records.files import read_record, write_record

RECIPES = ("bf16", "int8", "gptq-nf4", "gptq-int4", "gptq-int3")
CODES: tuple[VectorCode, ...] = ("float32", "int8", "int4", "binary")
N_DOCUMENTS = 600
BASE = "base"


class RetentionRow(Frozen):
    """One recipe with one code of its vectors.

    Attributes:
        weight_bytes: size of the weights; None for the base.
        retention_low, retention_high: 95 % paired interval; None for the base in float32.
        tasks: mean score over subsets, by task.
    """

    model: str
    recipe: str
    code: VectorCode
    bytes_per_vector: int
    weight_bytes: int | None
    score: float
    retention: float
    retention_low: float | None
    retention_high: float | None
    verdict: str | None
    neighbour_overlap: float
    tasks: dict[str, float]


class RetentionResult(Frozen):
    """The whole table.

    Attributes:
        baselines: score of the base in float32, by model.
        machine, versions: those of the last run.
    """

    schema_: str = Field(default="gteopt.retention/1", alias="schema")
    baselines: dict[str, float]
    rows: tuple[RetentionRow, ...]
    machine: MachineRecord
    versions: Conditions


def main() -> None:
    """Build and score model by model, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--beir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["all-MiniLM-L6-v2", "gte-nano"])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument(
        "--work", type=Path, help="folder for artifacts and scores; a later run continues there"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    baselines: dict[str, float] = {}
    rows: list[RetentionRow] = []
    if options.out and options.out.is_file():
        former = read_record(options.out, RetentionResult)
        baselines, rows = dict(former.baselines), list(former.rows)
    with tempfile.TemporaryDirectory() as scratch:
        for model in options.models:
            work = (options.work or Path(scratch)) / model
            model_rows = measured(model, options, work)
            rows = [row for row in rows if row.model != model] + model_rows
            baselines[model] = next(row.score for row in model_rows if row.recipe == BASE)
            for row in model_rows:
                print(show(row), flush=True)
            if options.out:
                result = RetentionResult(
                    baselines=baselines,
                    rows=tuple(rows),
                    machine=describe_machine(),
                    versions=read_library_versions(),
                )
                write_record(options.out, result)


def measured(model: str, options: argparse.Namespace, work: Path) -> list[RetentionRow]:
    """All rows of one model."""
    source = str(model_folder(model))
    sources = {BASE: source}
    weights: dict[str, int] = {}
    for recipe in options.recipes:
        out = work / "artifacts" / recipe
        if not (out / "gteopt.json").is_file():
            dtype = "bfloat16" if recipe == "bf16" else "float32"
            gteopt.quantize(source, recipe, out, hub_dir=options.hub_dir, dtype=dtype)
        weights[recipe] = read_manifest(out).weight_bytes
        sources[recipe] = str(out)
        print(f"{model} {recipe}: {weights[recipe] / 1e6:.1f} MB", flush=True)
    reports = evaluate_suite(
        sources,
        suite_of(options.beir, work / "cranfield"),
        work / "results",
        how=EvaluationSetup(
            hub_dir=options.hub_dir, device="cpu", dtype="float32", grid=VectorGrid(codes=CODES)
        ),
        progress=printed(),
    )
    return [row_of(model, sources, report, weights) for report in reports.values()]


def suite_of(beir: Path, folder: Path) -> Suite:
    """The tasks of `offline`, and a search among the first documents of a BEIR folder."""
    offline = load_suite("offline")
    search = SuiteTask(task="Cranfield", data=part_of(beir, folder))
    return offline.model_copy(update={"name": "retention", "tasks": (*offline.tasks, search)})


def part_of(beir: Path, folder: Path) -> Path:
    """Write the first documents of a BEIR folder, and the queries that they answer."""
    corpus = (beir / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:N_DOCUMENTS]
    kept = {json.loads(line)["_id"] for line in corpus}
    heading, *judged = (beir / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    judged = [line for line in judged if line.split("\t")[1] in kept]
    answered = {line.split("\t")[0] for line in judged if int(line.split("\t")[2]) > 0}
    queries = (beir / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    queries = [line for line in queries if json.loads(line)["_id"] in answered]
    judged = [line for line in judged if line.split("\t")[0] in answered]
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in (
        ("corpus.jsonl", corpus),
        ("queries.jsonl", queries),
        ("qrels/test.tsv", [heading, *judged]),
    ):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def row_of(
    model: str, sources: dict[str, str], report: EvalReport, weights: dict[str, int]
) -> RetentionRow:
    """The row of a report."""
    recipe = max((name for name in sources if report.variant.startswith(name)), key=len)
    assert report.retention is not None
    by_task: dict[str, list[float]] = {}
    for task in report.tasks:
        by_task.setdefault(task.task, []).append(task.score)
    return RetentionRow(
        model=model,
        recipe=recipe,
        code=report.code,
        bytes_per_vector=report.bytes_per_vector,
        weight_bytes=weights.get(recipe),
        score=report.score,
        retention=report.retention,
        retention_low=report.retention_low,
        retention_high=report.retention_high,
        verdict=None if report.difference is None else report.difference.verdict,
        neighbour_overlap=report.fidelity.neighbour_overlap,
        tasks={task: sum(scores) / len(scores) for task, scores in by_task.items()},
    )


def printed() -> Progress:
    """Progress that prints each step once."""
    printed_steps: set[str] = set()

    def say(what: str, done: int, total: int) -> None:
        if what not in printed_steps:
            printed_steps.add(what)
            print(f"  {what} (of {total})", flush=True)

    return say


def show(row: RetentionRow) -> str:
    """One line of the table."""
    sure = ""
    if row.retention_low is not None and row.retention_high is not None:
        sure = f" [{100 * row.retention_low:.2f}, {100 * row.retention_high:.2f}]"
    return (
        f"{row.model:18} {row.recipe:12} {row.code:8} {row.bytes_per_vector:5,} bytes"
        f"  {100 * row.retention:6.2f} %{sure}  nearest {100 * row.neighbour_overlap:.1f} %"
    )


if __name__ == "__main__":
    main()
