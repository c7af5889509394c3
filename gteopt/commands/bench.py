"""What `gteopt bench` does: open every source, measure each beside the baseline, write the record.

Hides: which variants share a process and what a run leaves out. Refuses to know: clocks, printing.
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
from gteopt.encoder.description import Backend, pick_device
from gteopt.encoder.openvino import refuse_unknown
from gteopt.errors import InputError, IntegrityError, join_problems
from gteopt.machine import machine, versions
from gteopt.progress import Progress, quiet
from gteopt.records.bench import BenchReport, DummyRecord
from gteopt.records.files import read_record, write_record
from gteopt.report.rows import machine_line
from gteopt.speed.protocol import BenchOptions, bench, open_all
from gteopt.speed.random_model import largest_depth, shape_of, write_dummy
from gteopt.speed.whole_model import extrapolate, shallow_depth

BASELINE = "bf16"


def bench_dummy(
    base: str,
    recipes: Sequence[str],
    *,
    spec: BenchSpec,
    n_layers: int | None = None,
    keep: Callable[[BenchReport], object] = lambda report: None,
    progress: Progress = quiet,
    **options: Unpack[BenchOptions],
) -> BenchReport:
    """Measure what recipes would make of a published model, on random weights of its shape.

    Nothing is downloaded; the model and its variants lie in a temporary folder while they are
    measured. Where fewer blocks are built than the model has, half of them are measured too, and
    `DummyRecord.whole` has the whole model on the line through both depths.

    Args:
        base: see `write_dummy`.
        recipes: names of recipes that need no calibration, in the order of the report.
        spec: what is measured, how often.
        n_layers: blocks to build; as many as memory and disk hold when None.
        keep: told after each variant what has been measured so far.
        progress: told about writing, building and measuring.
        options: see `BenchOptions`.

    Raises:
        InputError: see `write_dummy` and `bench`; a recipe that needs calibration.
        UnsupportedError: a backend that does not know this architecture.
    """
    pick_device(options.get("device", "auto"))
    wanted = {name: load_recipe(name) for name in recipes}
    if learned := [name for name, each in wanted.items() if each.weights.method == "gptq"]:
        raise InputError(
            f"recipes that need calibration learn nothing from random weights "
            f"({', '.join(learned)}); take their rounded relatives, which run on the same kernels "
            f"(rtn-int8, rtn-fp8, rtn-int4, nf4)"
        )
    if options.get("backend", "torch") == "openvino":
        refuse_unknown(shape_of(base, n_layers)[0])
    n = n_layers or largest_depth(base, Path(tempfile.gettempdir()))
    deep = _bench_depth(base, wanted, spec, n, keep, progress, options)
    assert deep.dummy is not None
    near = shallow_depth(n)
    if deep.is_whole or near is None:
        return deep
    shallow = _bench_depth(base, wanted, spec, near, lambda report: None, progress, options)
    try:
        whole = extrapolate(deep, shallow, (n, near), deep.dummy.of_layers)
    except InputError as noise:
        warnings.warn(f"nothing is said of the whole model: {noise}", stacklevel=2)
        return deep
    dummy = deep.dummy.model_copy(update={"shallow_layers": near, "whole": whole})
    report = deep.model_copy(update={"dummy": dummy})
    keep(report)
    return report


def _bench_depth(
    base: str,
    recipes: Mapping[str, Recipe],
    spec: BenchSpec,
    n_layers: int,
    keep: Callable[[BenchReport], object],
    progress: Progress,
    options: BenchOptions,
) -> BenchReport:
    """`bench_dummy` of one depth."""
    device = options.get("device", "auto")
    with tempfile.TemporaryDirectory(prefix="gteopt-") as scratch:
        folder = Path(scratch) / BASELINE
        on_gpu = device != "cpu" and torch.cuda.is_available()
        n, whole = write_dummy(
            base,
            folder,
            n_layers=n_layers,
            device="cuda" if on_gpu else "cpu",
            progress=progress,
        )
        dummy = DummyRecord(base=base, n_layers=n, of_layers=whole)
        sources = {BASELINE: str(folder)}
        for name, recipe in recipes.items():
            sources[name] = str(Path(scratch) / f"variant-{len(sources)}")
            quantize(folder, recipe, sources[name], device=device, progress=progress)

        def named(report: BenchReport) -> BenchReport:
            return report.model_copy(update={"dummy": dummy})

        return named(
            bench(
                sources,
                baseline=BASELINE,
                spec=spec,
                keep=lambda report: keep(named(report)),
                progress=progress,
                **options,
            )
        )


def measure(
    sources: Mapping[str, str],
    spec: BenchSpec,
    folder: Path | None,
    *,
    baseline: str,
    hub_dir: Path | None,
    device: str,
    backend: Backend = "torch",
    price_per_hour: float | None = None,
    skip_measured: bool = False,
    skip_too_long: bool = False,
    progress: Progress,
) -> BenchReport:
    """Measure variants beside the baseline and add them to what the folder's bench.json holds.

    The file is written after each variant, so that what was measured before an interruption stays.
    Variants of several calls lie in one report only where all that a speed depends on is the same:
    spec, machine, versions, device, threads, backend and the baseline's files, which keep the name
    that they have in the report.

    Args:
        sources: see `bench`.
        spec: see `bench`.
        folder: of the results; nothing is read and written where it is None.
        baseline: see `bench`.
        hub_dir: see `bench`.
        device: see `bench`.
        backend: see `bench`.
        price_per_hour: of the machine; None keeps what the report says.
        skip_measured: take variants from a report that still holds, and measure all of them where
            none does, in place of refusing.
        skip_too_long: see `bench`.
        progress: see `bench`.

    Raises:
        InputError: see `bench`; or the folder's report was measured under other conditions, and
            which; before anything is measured.
    """
    if folder is None:
        report = bench(
            sources,
            baseline=baseline,
            spec=spec,
            skip_too_long=skip_too_long,
            device=device,
            backend=backend,
            hub_dir=hub_dir,
            progress=progress,
        )
        return report.model_copy(update={"price_per_hour": price_per_hour})
    checkpoints, spec = open_all(sources, baseline, spec, hub_dir, skip_too_long)
    path = folder / "bench.json"
    old: BenchReport | None = None
    if path.is_file():
        try:
            old = read_record(path, BenchReport)
        except IntegrityError:
            if not skip_measured:
                raise
    hashes = {name: each.sha256 for name, each in checkpoints.items()}
    known = old.baseline if old is not None else baseline
    own = old.variants.get(known) if old is not None else None
    if own is not None and own.artifact_sha256 == hashes[baseline] and known not in sources:
        # A plan calls its baseline otherwise than a command does.
        sources = {known: sources[baseline], **_without(sources, baseline)}
        hashes = {known: hashes[baseline], **_without(hashes, baseline)}
        baseline = known
    now = _Conditions(spec, str(pick_device(device)), backend, baseline, hashes[baseline])
    if old is not None and (problems := now.differences(old)):
        if not skip_measured:
            raise InputError(
                join_problems(
                    f"{path} was measured under other conditions, so that variants cannot be added "
                    f"to it; give another --out, or move it away and measure all of them again",
                    problems,
                )
            )
        if others := old.variants.keys() - sources.keys():
            warnings.warn(
                f"{path} was measured under other conditions ({'; '.join(problems)}) and is "
                f"replaced, without {', '.join(sorted(others))}",
                stacklevel=2,
            )
        old = None
    wanted = dict(sources)
    if old is not None and skip_measured:
        there = {name: each.artifact_sha256 for name, each in old.variants.items()}
        wanted = {name: each for name, each in sources.items() if there.get(name) != hashes[name]}
        if wanted:
            wanted = {baseline: sources[baseline], **wanted}

    def keep(new: BenchReport) -> BenchReport:
        merged = {**(old.variants if old is not None else {}), **new.variants}
        price = price_per_hour
        if price is None and old is not None:
            price = old.price_per_hour
        # In the order of the call, then whatever else was there.
        ordered = {name: merged[name] for name in [*sources, *merged] if name in merged}
        report = new.model_copy(update={"variants": ordered, "price_per_hour": price})
        write_record(path, report)
        return report

    if not wanted:
        assert old is not None
        return keep(old)
    return keep(
        bench(
            wanted,
            baseline=baseline,
            spec=spec,
            device=device,
            backend=backend,
            hub_dir=hub_dir,
            keep=keep,
            progress=progress,
        )
    )


def _without(named: Mapping[str, str], name: str) -> dict[str, str]:
    return {each: value for each, value in named.items() if each != name}


def measure_dummy(
    base: str,
    recipes: Sequence[str],
    spec: BenchSpec,
    folder: Path | None,
    *,
    n_layers: int | None,
    price_per_hour: float | None,
    progress: Progress,
    **options: Unpack[BenchOptions],
) -> BenchReport:
    """`bench_dummy`, into a folder whose bench.json it replaces after each variant.

    Raises:
        InputError: that file holds what this call would lose.
    """
    path = folder / "bench.json" if folder is not None else None
    if path is not None and path.is_file():
        old = read_record(path, BenchReport)
        theirs = old.dummy.base if old.dummy else "real weights"
        if old.dummy is None or theirs != base or old.variants.keys() - {BASELINE, *recipes}:
            raise InputError(
                f"{path} holds {', '.join(old.variants)} of {theirs}, which this would replace; "
                f"give another --out, or move it away"
            )

    def priced(report: BenchReport) -> BenchReport:
        return report.model_copy(update={"price_per_hour": price_per_hour})

    def keep(report: BenchReport) -> None:
        if path is not None:
            write_record(path, priced(report))

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
    """What a speed depends on besides the variant."""

    spec: BenchSpec
    device: str
    backend: Backend
    baseline: str
    baseline_sha256: str

    def differences(self, old: BenchReport) -> list[str]:
        """What was otherwise when `old` was measured, one a line; empty where nothing was."""
        own = old.variants.get(old.baseline)
        then_now: dict[str, tuple[object, object]] = {
            "what is measured": (_in_short(old.spec), _in_short(self.spec)),
            "machine": (machine_line(old.machine), machine_line(machine())),
            "device": (old.device, self.device),
            "threads": (old.n_threads, torch.get_num_threads()),
            "backend": (old.versions.get("backend", "torch"), self.backend),
            "baseline": (old.baseline, self.baseline),
            "the baseline's files": (
                own.artifact_sha256[:12] if own else "none",
                self.baseline_sha256[:12],
            ),
            "weights": ("random" if old.dummy else "real", "real"),
        }
        # The report also notes the baseline's number type and the backend.
        then_now |= {
            name: (old.versions.get(name, "none"), version) for name, version in versions().items()
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
