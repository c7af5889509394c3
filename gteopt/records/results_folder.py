"""Read a results folder: all its records at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from gteopt.errors import InputError, IntegrityError
from gteopt.frozen import Frozen
from gteopt.records.bench import BenchReport, VariantBench
from gteopt.records.choice import Choice
from gteopt.records.evaluation import EvalReport, FidelityReport
from gteopt.records.examples import Examples
from gteopt.records.files import read_record


class RunRecord(Frozen):
    """What `run` last wrote to a results folder; other files in it are not its own.

    Attributes:
        variants: names of the variants that it wrote, the baseline included.
    """

    schema_: Literal["gteopt.run/1"] = Field(default="gteopt.run/1", alias="schema")
    plan: str
    base: str
    variants: tuple[str, ...]


class Results(Frozen):
    """All records of a results folder; any part may be missing.

    Attributes:
        bench: speed and memory; None before `gteopt bench --out`.
        evals: scores and fidelity on a suite, by variant.
        fidelity: closeness to the baseline on a user's own texts, by variant.
        choice: None before `gteopt choose`.
        examples: a user's own texts whose neighbours changed most, by variant. They are stored only
            on request, because they are plain text.
    """

    bench: BenchReport | None
    evals: dict[str, EvalReport]
    fidelity: dict[str, FidelityReport] = Field(default_factory=dict)
    choice: Choice | None
    examples: dict[str, Examples] = Field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """Name of the variant that the others are compared with."""
        if self.bench is not None:
            return self.bench.baseline
        reports: list[EvalReport | FidelityReport] = [
            *self.evals.values(),
            *self.fidelity.values(),
        ]
        names = (
            report.variant for report in reports if report.artifact_sha256 == report.baseline_sha256
        )
        return next(names, reports[0].baseline if reports else "")

    @property
    def benched(self) -> dict[str, VariantBench]:
        """Speed and memory by variant; empty where `bench` did not run."""
        return {} if self.bench is None else self.bench.variants


def read_results(folder: Path) -> Results:
    """Read a results folder.

    Raises:
        InputError: it holds no records of `run`, `bench` or `evaluate`.
        IntegrityError: one of its files is damaged.
    """
    paths = sorted((folder / "fidelity").glob("*.json"))
    fidelity = {path.stem: read_record(path, FidelityReport) for path in paths}
    bench, evals = (None, {}) if fidelity and _only_texts(folder) else read_measurements(folder)
    choice_path = folder / "choice.json"
    return Results(
        bench=bench,
        evals=evals,
        fidelity=fidelity,
        choice=read_record(choice_path, Choice) if choice_path.is_file() else None,
        examples=_read_examples(folder, {**fidelity, **evals}),
    )


def _read_examples(
    folder: Path, judged: Mapping[str, FidelityReport | EvalReport]
) -> dict[str, Examples]:
    """Examples of the current variants; those of a variant that was built again are left out."""
    paths = sorted((folder / "examples").glob("*.json"))
    by_variant = {path.stem: read_record(path, Examples) for path in paths}
    return {
        name: examples
        for name, examples in by_variant.items()
        if name in judged and judged[name].artifact_sha256 == examples.artifact_sha256
    }


def _only_texts(folder: Path) -> bool:
    return not (folder / "bench.json").is_file() and not any((folder / "eval").glob("*.json"))


def read_measurements(folder: Path) -> tuple[BenchReport | None, dict[str, EvalReport]]:
    """Speed, and quality by variant, from a results folder; either may be missing.

    Raises:
        InputError: both are missing.
        IntegrityError: one of its files is damaged.
    """
    evals: dict[str, EvalReport] = {}
    for path in sorted((folder / "eval").glob("*.json")):
        report = read_record(path, EvalReport)
        if report.variant in evals:
            raise IntegrityError(
                f"{path}: is a second evaluation of '{report.variant}'; delete one of the two"
            )
        evals[report.variant] = report
    path = folder / "bench.json"
    bench = read_record(path, BenchReport) if path.is_file() else None
    if bench is None and not evals:
        raise InputError(
            f"{folder} is not a results folder; it has neither bench.json (made by `gteopt bench "
            f"--out`) nor eval/<variant>.json (made by `gteopt evaluate --out`)"
        )
    return bench, evals
