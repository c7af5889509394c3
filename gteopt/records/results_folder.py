"""A results folder: which records lie in it, and all of them read at once."""

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
    """What `run` last made of a results folder: the rest in it is someone else's.

    Attributes:
        variants: names that it wrote, the baseline's among them.
    """

    schema_: Literal["gteopt.run/1"] = Field(default="gteopt.run/1", alias="schema")
    plan: str
    base: str
    variants: tuple[str, ...]


class Results(Frozen):
    """Everything measured, as it lies in a results folder; any part may be missing.

    Attributes:
        bench: speed and memory; None before `gteopt bench --out`.
        evals: scores and fidelity on a suite, by variant.
        fidelity: closeness on a user's own texts, by variant.
        choice: None before `gteopt choose`.
        examples: own texts whose neighbours changed most, by variant; only where they were asked
            for, because they are texts in clear.
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
        own = (each.variant for each in reports if each.artifact_sha256 == each.baseline_sha256)
        return next(own, reports[0].baseline if reports else "")

    @property
    def benched(self) -> dict[str, VariantBench]:
        """What `bench` measured, by variant; empty without it."""
        return {} if self.bench is None else self.bench.variants


def read_results(folder: Path) -> Results:
    """Read a results folder.

    Raises:
        InputError: neither `run` nor `bench` nor `evaluate` has filled it.
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
    """Those of the variants as they are now: a build anew makes the former ones another's."""
    paths = sorted((folder / "examples").glob("*.json"))
    found = {path.stem: read_record(path, Examples) for path in paths}
    return {
        name: each
        for name, each in found.items()
        if name in judged and judged[name].artifact_sha256 == each.artifact_sha256
    }


def _only_texts(folder: Path) -> bool:
    return not (folder / "bench.json").is_file() and not any((folder / "eval").glob("*.json"))


def read_measurements(folder: Path) -> tuple[BenchReport | None, dict[str, EvalReport]]:
    """What a results folder says of speed and of quality, by variant; either may be missing.

    Raises:
        InputError: it says neither.
        IntegrityError: one of its files is damaged.
    """
    evals: dict[str, EvalReport] = {}
    for path in sorted((folder / "eval").glob("*.json")):
        report = read_record(path, EvalReport)
        if report.variant in evals:
            raise IntegrityError(
                f"{path}: is a second evaluation of '{report.variant}'; keep the one that counts"
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
