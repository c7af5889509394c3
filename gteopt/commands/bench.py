"""`gteopt bench`: measure every source beside the baseline, and keep the report in a file.

Hides: what a report keeps of an earlier run, and models with random weights. Refuses to know:
clocks, printing.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch

from gteopt.build.quantize import quantize
from gteopt.config.plan import BenchSpec
from gteopt.config.recipe import Recipe, load_recipe
from gteopt.encoder.description import AskedBackend, pick_device
from gteopt.encoder.openvino import refuse_unknown_openvino
from gteopt.errors import InputError, IntegrityError, join_problems
from gteopt.machine import describe_machine, read_library_versions
from gteopt.progress import Progress, ignore_progress
from gteopt.records.bench import BenchReport, DummyRecord
from gteopt.records.files import read_record, write_record
from gteopt.report.rows import machine_line
from gteopt.speed.protocol import BenchOptions, open_bench_models, run_bench_protocol
from gteopt.speed.random_model import largest_depth, shape_at_depth, write_random_model
from gteopt.speed.whole_model import extrapolate_whole_model, shallow_depth

BASELINE = "bf16"


@dataclass(frozen=True)
class BenchReportFile:
    """Where a report is kept, and how an earlier report in that file is treated.

    Attributes:
        folder: results folder, whose bench.json is read and written; None keeps nothing.
        price_per_hour: price of the machine in dollars; None keeps the price in the file.
        skip_measured: keep measured variants of an earlier report instead of measuring again, and
            replace a report of other conditions. If false, such a report is an error.
    """

    folder: Path | None = None
    price_per_hour: float | None = None
    skip_measured: bool = False

    @property
    def path(self) -> Path | None:
        """The file; None where nothing is kept."""
        return None if self.folder is None else self.folder / "bench.json"

    def read(self) -> BenchReport | None:
        """The report in the file, if any.

        Raises:
            IntegrityError: the file is damaged, and `skip_measured` does not replace it.
        """
        if self.path is None or not self.path.is_file():
            return None
        try:
            return read_record(self.path, BenchReport)
        except IntegrityError:
            if self.skip_measured:
                return None
            raise


def bench_dummy(
    base: str,
    recipes: Sequence[str],
    *,
    spec: BenchSpec,
    n_layers: int | None = None,
    keep: Callable[[BenchReport], object] = lambda report: None,
    progress: Progress = ignore_progress,
    **options: Unpack[BenchOptions],
) -> BenchReport:
    """Measure recipes on random weights with the shape of a published model.

    Nothing is downloaded; the model and its variants are built in a temporary folder. If fewer
    blocks are built than the model has, half as many are measured too. `DummyRecord.whole` then
    extrapolates linearly to the whole model.

    Args:
        base: see `write_random_model`.
        recipes: names of recipes that need no calibration, in the order of the report.
        spec: what to measure.
        n_layers: blocks to build; as many as memory and disk hold when None.
        keep: called after each variant with the report so far.
        progress: receives the progress of writing, building and measuring.
        options: see `BenchOptions`.

    Raises:
        InputError: a recipe needs calibration; see also `write_random_model` and
            `run_bench_protocol`.
        UnsupportedError: the backend does not support this architecture.
    """
    pick_device(options.get("device", "auto"))
    wanted = {name: load_recipe(name) for name in recipes}
    if solved := [name for name, recipe in wanted.items() if recipe.weights.method == "gptq"]:
        raise InputError(
            f"random weights cannot be calibrated, as {', '.join(solved)} would need; use recipes "
            f"with rounding, which run on the same kernels: rtn-int8, rtn-fp8, rtn-int4 or nf4"
        )
    if options.get("backend", "torch") == "openvino":
        refuse_unknown_openvino(shape_at_depth(base, n_layers)[0])
    n = n_layers or largest_depth(base, Path(tempfile.gettempdir()))
    dummy_bench = _DummyBench(base, wanted, spec, progress, options)
    deep = dummy_bench.measure(n, keep)
    assert deep.dummy is not None
    n_shallow = shallow_depth(n)
    if deep.is_whole or n_shallow is None:
        return deep
    shallow = dummy_bench.measure(n_shallow, lambda report: None)
    try:
        whole = extrapolate_whole_model(deep, shallow, (n, n_shallow), deep.dummy.of_layers)
    except InputError as noise:
        warnings.warn(f"no estimate for the whole model: {noise}", stacklevel=2)
        return deep
    dummy = deep.dummy.model_copy(update={"shallow_layers": n_shallow, "whole": whole})
    report = deep.model_copy(update={"dummy": dummy})
    keep(report)
    return report


@dataclass(frozen=True)
class _DummyBench:
    """The measurement of `bench_dummy` at one depth or another."""

    base: str
    recipes: Mapping[str, Recipe]
    spec: BenchSpec
    progress: Progress
    options: BenchOptions

    def measure(self, n_layers: int, keep: Callable[[BenchReport], object]) -> BenchReport:
        """Build and measure a model with `n_layers` blocks."""
        device = self.options.get("device", "auto")
        with tempfile.TemporaryDirectory(prefix="gteopt-") as scratch:
            folder = Path(scratch) / BASELINE
            on_gpu = device != "cpu" and torch.cuda.is_available()
            n, of_layers = write_random_model(
                self.base,
                folder,
                n_layers=n_layers,
                device="cuda" if on_gpu else "cpu",
                progress=self.progress,
            )
            dummy = DummyRecord(base=self.base, n_layers=n, of_layers=of_layers)
            sources = {BASELINE: str(folder)}
            for name, recipe in self.recipes.items():
                sources[name] = str(Path(scratch) / f"variant-{len(sources)}")
                quantize(folder, recipe, sources[name], device=device, progress=self.progress)

            def with_dummy(report: BenchReport) -> BenchReport:
                return report.model_copy(update={"dummy": dummy})

            return with_dummy(
                run_bench_protocol(
                    sources,
                    baseline=BASELINE,
                    spec=self.spec,
                    keep=lambda report: keep(with_dummy(report)),
                    progress=self.progress,
                    **self.options,
                )
            )


def bench_to_file(
    sources: Mapping[str, str],
    spec: BenchSpec,
    file: BenchReportFile,
    *,
    baseline: str,
    progress: Progress,
    **options: Unpack[BenchOptions],
) -> BenchReport:
    """Measure variants beside the baseline and add them to the report in a file.

    The file is written after each variant, so that an interruption loses only one. Variants of
    several calls share a report only if everything that speed depends on is the same: spec,
    machine, versions, device, threads, backend and the baseline's files. The baseline keeps the
    name that it has in the report.

    Args:
        sources: see `run_bench_protocol`.
        spec: see `run_bench_protocol`.
        file: where the report is kept.
        baseline: see `run_bench_protocol`.
        progress: see `run_bench_protocol`.
        options: see `run_bench_protocol`.

    Raises:
        InputError: the file's report was measured under other conditions, which are listed before
            anything is measured; or see `run_bench_protocol`.
    """
    path = file.path
    if path is None:
        report = run_bench_protocol(
            sources, baseline=baseline, spec=spec, progress=progress, **options
        )
        return report.model_copy(update={"price_per_hour": file.price_per_hour})
    skip_too_long = options.pop("skip_too_long", False)
    checkpoints, spec = open_bench_models(
        sources, baseline, spec, options.get("hub_dir"), skip_too_long
    )
    hashes = {name: checkpoint.sha256 for name, checkpoint in checkpoints.items()}
    old = file.read()
    if old is not None:
        # A plan names its baseline differently than a command does.
        old_baseline = old.variants.get(old.baseline)
        is_same = old_baseline is not None and old_baseline.artifact_sha256 == hashes[baseline]
        if is_same and old.baseline not in sources:
            sources = {old.baseline: sources[baseline], **_without(sources, baseline)}
            hashes = {old.baseline: hashes[baseline], **_without(hashes, baseline)}
            baseline = old.baseline
        device, backend = options.get("device", "auto"), options.get("backend", "torch")
        kernels = options.get("kernels", "deterministic")
        now = _Conditions(
            spec, str(pick_device(device)), backend, kernels, baseline, hashes[baseline]
        )
        if problems := now.differences(old):
            _replace_or_refuse(old, file, sources, problems)
            old = None
    wanted = dict(sources)
    if old is not None and file.skip_measured:
        measured = {name: variant.artifact_sha256 for name, variant in old.variants.items()}
        wanted = {n: source for n, source in sources.items() if measured.get(n) != hashes[n]}
        if wanted:
            wanted = {baseline: sources[baseline], **wanted}

    def keep(new: BenchReport) -> BenchReport:
        report = _merged(old, new, order=sources, price_per_hour=file.price_per_hour)
        write_record(path, report)
        return report

    if not wanted:
        assert old is not None
        return keep(old)
    return keep(
        run_bench_protocol(
            wanted, baseline=baseline, spec=spec, keep=keep, progress=progress, **options
        )
    )


def _replace_or_refuse(
    old: BenchReport, file: BenchReportFile, sources: Mapping[str, str], problems: list[str]
) -> None:
    """Warn of lost variants if a report of other conditions is replaced; otherwise raise."""
    if not file.skip_measured:
        raise InputError(
            join_problems(
                f"{file.path} was measured under other conditions, so variants cannot be added "
                f"to it; give another --out, or move the file away and measure all variants again",
                problems,
            )
        )
    if others := old.variants.keys() - sources.keys():
        warnings.warn(
            f"{file.path} was measured under other conditions ({'; '.join(problems)}); it is "
            f"replaced, without {', '.join(sorted(others))}",
            stacklevel=3,
        )


def _merged(
    old: BenchReport | None,
    new: BenchReport,
    *,
    order: Mapping[str, str],
    price_per_hour: float | None,
) -> BenchReport:
    """The new report with the variants of an old report added; names in `order` come first."""
    merged = {**(old.variants if old is not None else {}), **new.variants}
    if price_per_hour is None and old is not None:
        price_per_hour = old.price_per_hour
    ordered = {name: merged[name] for name in [*order, *merged] if name in merged}
    return new.model_copy(update={"variants": ordered, "price_per_hour": price_per_hour})


def _without(by_name: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in by_name.items() if key != name}


def bench_dummy_to_file(
    base: str,
    recipes: Sequence[str],
    spec: BenchSpec,
    file: BenchReportFile,
    *,
    n_layers: int | None,
    progress: Progress,
    **options: Unpack[BenchOptions],
) -> BenchReport:
    """Call `bench_dummy` and write the report to a folder's bench.json after each variant.

    Raises:
        InputError: the file holds variants that would be lost.
    """
    old = file.read()
    if old is not None:
        old_base = old.dummy.base if old.dummy else "real weights"
        if old.dummy is None or old_base != base or old.variants.keys() - {BASELINE, *recipes}:
            raise InputError(
                f"{file.path} holds {', '.join(old.variants)} of {old_base}, which would be lost; "
                f"give another --out, or move the file away"
            )

    def priced(report: BenchReport) -> BenchReport:
        return report.model_copy(update={"price_per_hour": file.price_per_hour})

    def keep(report: BenchReport) -> None:
        if file.path is not None:
            write_record(file.path, priced(report))

    return priced(
        bench_dummy(
            base,
            recipes,
            spec=spec,
            n_layers=n_layers,
            keep=keep,
            progress=progress,
            **options,
        )
    )


@dataclass(frozen=True)
class _Conditions:
    """Conditions that speed depends on, besides the variant."""

    spec: BenchSpec
    device: str
    backend: AskedBackend
    kernels: str
    baseline: str
    baseline_sha256: str

    def differences(self, old: BenchReport) -> list[str]:
        """A line for each condition that differs from those of `old`."""
        baseline = old.variants.get(old.baseline)
        then_now: dict[str, tuple[object, object]] = {
            "spec": (_in_short(old.spec), _in_short(self.spec)),
            "machine": (machine_line(old.machine), machine_line(describe_machine())),
            "device": (old.device, self.device),
            "threads": (old.n_threads, torch.get_num_threads()),
            "backend": (old.versions.get("backend", "torch"), self.backend),
            "kernels": (old.versions.get("kernels", "deterministic"), self.kernels),
            "baseline": (old.baseline, self.baseline),
            "the baseline's files": (
                baseline.artifact_sha256[:12] if baseline else "none",
                self.baseline_sha256[:12],
            ),
            "weights": ("random" if old.dummy else "real", "real"),
        }
        # The report's versions also hold the baseline's dtype and the backend.
        then_now |= {
            name: (old.versions.get(name, "none"), version)
            for name, version in read_library_versions().items()
        }
        return [
            f"{name}: {then} there, {now} now"
            for name, (then, now) in then_now.items()
            if then != now
        ]


def _in_short(spec: BenchSpec) -> str:
    workloads = ", ".join(workload.name for workload in spec.workloads)
    return (
        f"{workloads}; {spec.n_queries} queries of {spec.query_tokens} tokens; {spec.repeats} "
        f"repeats after {spec.warmup}"
    )
