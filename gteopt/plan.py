"""A whole plan: build, bench, evaluate, choose, report; what is already done is not done twice.

Hides: the layout of a plan's folder and when a finished step is still valid. Refuses to know: how
any step works.

    OUT/variants/<recipe>/       artifacts
    OUT/bench.json               speed and memory
    OUT/eval/<variant>.json      scores and fidelity
    OUT/fidelity/<variant>.json  fidelity alone, on a user's own texts
    OUT/scores/                  encoded texts and finished tasks: an evaluation goes on from there
    OUT/choice.json              the answer to the policy
    OUT/run.json                 what of this the plan wrote
    OUT/report.html
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from gteopt.artifact import discard, is_artifact, read_manifest
from gteopt.bench import bench, bench_dummy, default_workloads, open_all
from gteopt.build import fit_transforms, quantize, restyle
from gteopt.checkpoint import NANO, open_checkpoint
from gteopt.choose import choose
from gteopt.encoder import Backend, Encoder
from gteopt.errors import GteoptError, InputError, IntegrityError, join_problems, suggest
from gteopt.evaluation import (
    ENCODE_OPTIONS,
    Drawn,
    EncodeOptions,
    Suite,
    View,
    begin_views,
    compare,
    fidelity,
    load_suite,
    own_view,
    read_texts,
    run_texts,
    run_views,
    settle,
    view_of,
)
from gteopt.evaluation.workers import Workers
from gteopt.loading import describe, load, pick_device
from gteopt.machine import machine, versions
from gteopt.recipe import (
    DEFAULT_MARGIN,
    WORKLOADS,
    BenchSpec,
    Plan,
    Policy,
    Progress,
    Recipe,
    VectorCode,
    load_policy,
    load_recipe,
    quiet,
)
from gteopt.records import (
    BenchReport,
    EvalReport,
    FidelityReport,
    Results,
    RunRecord,
    read_record,
    read_results,
    write_record,
)
from gteopt.report import write_report
from gteopt.tables import machine_line

BASELINE = "bf16"


def run(
    plan: Plan,
    *,
    beside: Path | None = None,
    hub_dir: Path | None = None,
    device: str = "auto",
    workers: Workers | None = None,
    progress: Progress = quiet,
) -> Results:
    """Carry out a plan, or what is left of it, and return everything measured.

    Args:
        plan: what to do.
        beside: folder that the plan's relative file names are tried against.
        hub_dir: models and data sets are read from here and the network is never touched.
        device: where everything runs.
        workers: who encodes the suite's texts instead.
        progress: told how far each step is.

    Raises:
        InputError: lists every problem of the plan before anything slow starts; an unknown device.
    """
    recipes, suite, policy = _resolve(plan, beside)
    pick_device(device)
    folder = plan.out
    artifacts = build_variants(
        plan.base, recipes, folder / "variants", hub_dir=hub_dir, device=device, progress=progress
    )
    sources = {BASELINE: plan.base, **{name: str(path) for name, path in artifacts.items()}}
    spec = plan.bench.spec
    says_nothing = "workloads" not in plan.bench.model_fields_set
    if says_nothing:
        spec = spec.model_copy(update={"workloads": WORKLOADS[default_workloads(device)]})
    _forget_former(folder, sources)
    ran = RunRecord(plan=plan.name, base=plan.base, variants=tuple(sources))
    write_record(folder / "run.json", ran)
    report = measure(
        sources,
        spec,
        folder,
        baseline=BASELINE,
        hub_dir=hub_dir,
        device=device,
        price_per_hour=plan.bench.price_per_hour,
        skip_measured=True,
        skip_too_long=says_nothing,
        progress=progress,
    )
    asked = ("--suite", Path(plan.suite).name)
    how = Setup(hub_dir=hub_dir, device=device, workers=workers, asked=asked)
    evals = score(sources, suite, folder, how=how, margin=policy.margin, progress=progress)
    own = {name: each for name, each in report.variants.items() if name in sources}
    results = Results(bench=report.model_copy(update={"variants": own}), evals=evals, choice=None)
    choice = choose(policy, results)
    write_record(folder / "choice.json", choice)
    results = results.model_copy(update={"choice": choice})
    write_report(folder, results, title=title_of(folder))
    return results


def judge(folder: Path, policy: Policy) -> Results:
    """Judge what a results folder holds by a policy; nothing is measured anew.

    Verdicts are settled again, against the policy's margin and over all that the folder holds. The
    evaluations are written with them, then the choice, and the page where there is one.

    Raises:
        InputError, IntegrityError: see `read_results` and `choose`.
    """
    found = read_results(folder)
    evals = settle(
        {
            name: report.model_copy(update={"margin": policy.margin})
            for name, report in found.evals.items()
        }
    )
    results = found.model_copy(update={"evals": evals, "choice": None})
    results = results.model_copy(update={"choice": choose(policy, results)})
    for path in (folder / "eval").glob("*.json"):
        report = evals[read_record(path, EvalReport).variant]
        if report.variant in found.evals and report != found.evals[report.variant]:
            write_record(path, report)
    assert results.choice is not None
    write_record(folder / "choice.json", results.choice)
    if (folder / "report.html").is_file():
        write_report(folder, results, title=title_of(folder))
    return results


def title_of(folder: Path) -> str:
    """What the page of a results folder is called: after the plan that filled it."""
    if (folder / "run.json").is_file():
        ran = read_record(folder / "run.json", RunRecord)
        return f"gteopt: {ran.plan} ({ran.base})"
    return f"gteopt: {folder.resolve().name}"


def _forget_former(folder: Path, sources: Iterable[str]) -> None:
    """Remove what an earlier run of the plan wrote of variants that it no longer names.

    Everything else in the folder is the user's, and is said to be left.
    """
    path, written = folder / "run.json", set[str]()
    with suppress(IntegrityError):  # missing, or of another version: nothing is known to be ours
        written = set(read_record(path, RunRecord).variants)
    former = written - set(sources)
    for name in former:
        (folder / "eval" / f"{name}.json").unlink(missing_ok=True)
    bench_path = folder / "bench.json"
    if former and bench_path.is_file():
        with suppress(IntegrityError):
            old = read_record(bench_path, BenchReport)
            kept = {name: each for name, each in old.variants.items() if name not in former}
            write_record(bench_path, old.model_copy(update={"variants": kept}))
    left = {each.stem for each in (folder / "eval").glob("*.json")} - set(sources)
    if left:
        warnings.warn(
            f"{folder / 'eval'} also holds {', '.join(sorted(left))}, which no run of this plan "
            f"wrote: left there and out of this plan's choice",
            stacklevel=2,
        )


def build_variants(
    base: str,
    recipes: Sequence[Recipe],
    folder: Path,
    *,
    hub_dir: Path | None,
    device: str,
    progress: Progress,
) -> dict[str, Path]:
    """One artifact a recipe; recipes that differ only in their vectors share one build."""
    built: dict[str, Path] = {}
    by_weights: dict[str, Path] = {}
    base_sha256 = open_checkpoint(base, hub_dir=hub_dir).sha256
    for recipe in recipes:
        out = folder / recipe.name
        if is_artifact(out) and not _is_current(out, recipe, base_sha256):
            discard(out)  # the plan owns this folder; its recipe or base has changed
        twin = by_weights.get(recipe.weights_sha256())
        if twin is not None:
            restyle(twin, recipe, out, hub_dir=hub_dir, device=device, progress=progress)
        else:
            quantize(base, recipe, out, hub_dir=hub_dir, device=device, progress=progress)
            by_weights[recipe.weights_sha256()] = out
        built[recipe.name] = out
    return built


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
    skip_too_long: bool = False,
    n_layers: int | None,
    device: str,
    backend: Backend,
    price_per_hour: float | None,
    progress: Progress,
) -> BenchReport:
    """`bench_dummy`, into a folder whose bench.json it replaces.

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
    report = bench_dummy(
        base,
        recipes,
        spec=spec,
        skip_too_long=skip_too_long,
        n_layers=n_layers,
        device=device,
        backend=backend,
        progress=progress,
    ).model_copy(update={"price_per_hour": price_per_hour})
    if path is not None:
        write_record(path, report)
    return report


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


@dataclass(frozen=True)
class Grid:
    """Lengths and codes that every variant is scored in, each from the same encodings.

    Attributes:
        dims: none is the model's full length alone.
        codes: how a vector is stored.
    """

    dims: tuple[int, ...] = ()
    codes: tuple[VectorCode, ...] = ("float32",)


def parse_grid(dims: str | None, codes: str | None) -> Grid:
    """A grid from lists separated by commas; what is left out stays full, or float32.

    Raises:
        InputError: a length that is no positive whole number, or an unknown code.
    """
    problems = []
    lengths = _listed(dims)
    problems += [
        f"--dims: '{each}' is no number of dimensions; write 256,128,64"
        for each in lengths
        if not each.isdecimal() or int(each) == 0
    ]
    known = get_args(VectorCode)
    wanted = _listed(codes) or ["float32"]
    problems += [
        f"--vectors: unknown code '{each}': {suggest(each, known)}"
        for each in wanted
        if each not in known
    ]
    if problems:
        raise InputError(join_problems("the grid cannot be scored", problems))
    return Grid(
        dims=tuple(int(each) for each in lengths),
        codes=tuple(code for code in known if code in wanted),
    )


def _listed(names: str | None) -> list[str]:
    parts = [each.strip() for each in (names or "").split(",")]
    return list(dict.fromkeys(each for each in parts if each))


@dataclass(frozen=True)
class Setup:
    """Where and how variants are encoded, and what of their vectors is judged.

    Attributes:
        dtype: that models compute in, as `load` takes it.
        backend: of the variants, as `load` takes it; the baseline is torch's.
        grid: lengths and codes, each judged by itself; None is the vectors that each variant makes.
        workers: who encodes, instead of this process on `device`. A grid still needs each variant
            here, which fits its ranges.
        options: of the vectors' cache.
        asked: see `EvalReport`.
    """

    hub_dir: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: Backend = "torch"
    grid: Grid | None = None
    workers: Workers | None = None
    options: EncodeOptions = ENCODE_OPTIONS
    asked: tuple[str, ...] = ()


def score(
    sources: Mapping[str, str],
    suite: Suite,
    folder: Path | None,
    *,
    how: Setup,
    margin: float = DEFAULT_MARGIN,
    progress: Progress,
) -> dict[str, EvalReport]:
    """Scores of every variant beside the first's, which is the baseline.

    Verdicts are against `margin` and corrected for all tasks of all variants together. With a
    grid, there is a report for each variant, length and code, named by the three; the baseline is
    then the first source's own vectors.

    With a results folder, finished tasks are stored in it and not done twice.

    Raises:
        InputError: the results folder is a file; lists every source that cannot be opened, before
            anything is encoded.
    """
    _check_folder(folder)
    _check_all(sources, folder, how)
    reports: dict[str, EvalReport] = {}
    baseline = None
    drawn: Drawn = {}
    following: _Opened | None = None
    for name, next_name in zip(sources, [*list(sources)[1:], None], strict=True):
        opened = following
        if opened is None or how.grid is not None:  # which is fitted on a loaded model
            is_baseline = baseline is None
            opened = _open(
                name, sources[name], how, progress, is_baseline=is_baseline, begun=following
            )
        following = None
        options = opened.options
        if how.workers is not None and next_name is not None:
            # Only descriptions of models, which take no memory, can be opened ahead of their turn.
            alone = replace(how, grid=None)
            following = _open(next_name, sources[next_name], alone, progress, is_baseline=False)
            if not _same_vectors(opened, following):  # whose vectors will be there
                options = replace(options, afterwards=_beginning(following, suite, folder, how))
        views, own, notes = opened.views, own_view(opened.encoder, name), opened.notes
        if baseline is None and own.sha256 not in {each.sha256 for each in views.values()}:
            views = {name: own, **views}
        runs = run_views(
            opened.encoder,
            suite,
            list(views.values()),
            hub_dir=how.hub_dir,
            store=_store(folder),
            options=options,
            progress=progress,
        )
        del opened  # two models may not fit
        if baseline is None:
            baseline = next(run for run in runs if run.encoder_sha256 == own.sha256)
        for done, (row, run) in enumerate(zip(views, runs, strict=True)):
            progress(f"{name}: comparing with {baseline.encoder}", done, len(runs))
            noted = replace(run, notes=(*run.notes, *notes))
            found = compare(baseline, noted, variant_name=row, margin=margin, drawn=drawn)
            reports[row] = found.model_copy(update={"asked": how.asked})
    reports = settle(reports)
    if folder is not None:
        for name, report in reports.items():
            write_record(folder / "eval" / f"{name}.json", report)
    return reports


def compare_texts(
    sources: Mapping[str, str],
    file: Path,
    folder: Path | None,
    *,
    how: Setup,
    progress: Progress,
) -> dict[str, FidelityReport]:
    """Fidelity of every variant to the first, which is the baseline, on a user's own texts.

    Texts are encoded as documents, without an instruction, and into the same cache as a suite's;
    with a grid, there is a report for each variant, length and code, against the first source's
    vectors at full dimension, as always.

    Raises:
        InputError: see `score`.
    """
    _check_folder(folder)
    _check_all(sources, None, how)
    texts = read_texts(file)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    reports: dict[str, FidelityReport] = {}
    baseline = None
    for name, source in sources.items():
        opened = _open(name, source, how, progress, is_baseline=baseline is None)
        views, own, notes = opened.views, own_view(opened.encoder, name), opened.notes
        run = run_texts(
            opened.encoder, texts, store=_store(folder), options=opened.options, progress=progress
        )
        del opened  # two models may not fit
        baseline = baseline or (own, run.sample)
        for done, (row, view) in enumerate(views.items()):
            progress(f"{name}: comparing with {baseline[0].name}", done, len(views))
            reports[row] = FidelityReport(
                variant=row,
                artifact_sha256=view.sha256,
                baseline=baseline[0].name,
                baseline_sha256=baseline[0].sha256,
                texts=file.name,
                texts_sha256=digest,
                dims=view.vectors.dims,
                code=view.vectors.code,
                bytes_per_vector=view.vectors.bytes_per_vector,
                n_asked_texts=run.encodings.n_asked,
                n_encoded_texts=0 if done else run.encodings.n_encoded,
                n_cut_texts=run.encodings.n_cut,
                notes=(*run.notes, *notes),
                fidelity=fidelity(baseline[1], run.sample, view.vectors),
                machine=run.machine,
                versions=run.versions,
            )
    if folder is not None:
        for name, report in reports.items():
            write_record(folder / "fidelity" / f"{name}.json", report)
    return reports


def _check_all(sources: Mapping[str, str], folder: Path | None, how: Setup) -> None:
    """Open every source: what is damaged or misspelt must not be found after days of encoding.

    Raises:
        InputError: lists all of them; and reports of another backend that would be overwritten.
    """
    problems: list[str] = []
    dims: dict[str, int] = {}
    for name, source in sources.items():
        try:
            dims[name] = open_checkpoint(source, hub_dir=how.hub_dir).dims
        except GteoptError as error:
            problems.append(f"{name} ({source}): {error}")
    baseline = next(iter(sources))
    problems += [
        f"{name}: has {n} dimensions, the baseline {baseline} {dims[baseline]}; a variant is "
        f"judged against its own base"
        for name, n in dims.items()
        if baseline in dims and n != dims[baseline]
    ]
    for path in sorted((folder / "eval").glob("*.json")) if folder else ():
        with suppress(IntegrityError):  # of an older gteopt, or damaged: written anew
            old = read_record(path, EvalReport)
            found = old.versions.get("backend", how.backend)
            row = re.sub(r"-\d+-(float32|int8|binary)$", "", old.variant)
            if {row, old.variant} & set(list(sources)[1:]) and found != how.backend:
                problems.append(
                    f"{path} holds scores of {old.variant} with backend {found}; remove it, or "
                    f"give another --out for backend {how.backend}"
                )
    if problems:
        raise InputError(join_problems("the evaluation cannot start", problems))


@dataclass(frozen=True)
class _Opened:
    """One source, ready to be judged.

    Attributes:
        views: what of its vectors is judged, by row of the result.
        notes: what its workers have had to say so far.
    """

    encoder: Encoder
    options: EncodeOptions
    views: dict[str, View]
    notes: list[str]


def _open(
    name: str,
    source: str,
    how: Setup,
    progress: Progress,
    *,
    is_baseline: bool,
    begun: _Opened | None = None,
) -> _Opened:
    """Open a source; `begun` is the same one, described, on which workers have begun."""
    options, notes = how.options, list[str]()
    device = how.device if how.workers is None else how.workers.device
    here = describe if how.workers is not None and how.grid is None else load
    encoder = here(
        source,
        device=device,
        dtype=how.dtype,
        backend="torch" if is_baseline else how.backend,
        hub_dir=how.hub_dir,
    )
    if begun is not None:
        options, notes = begun.options, begun.notes
    elif how.workers is not None:
        encode = how.workers.encoding(
            encoder,
            source,
            hub_dir=how.hub_dir,
            batch_size=options.batch_size,
            say=notes.append,
        )
        options = replace(options, encode=encode, encoded_on=str(how.workers))
    encoder.name = name  # one name for one thing, in every line of progress and every note
    views = {name: own_view(encoder, name)}
    if how.grid is not None:
        views = _grid_views(encoder, name, how.grid, hub_dir=how.hub_dir, progress=progress)
    return _Opened(encoder, options, views, notes)


def _same_vectors(one: _Opened, other: _Opened) -> bool:
    mine, theirs = one.encoder, other.encoder
    same_files = mine.checkpoint.weights_sha256 == theirs.checkpoint.weights_sha256
    return same_files and mine.arithmetic == theirs.arithmetic


def _beginning(
    opened: _Opened, suite: Suite, folder: Path | None, how: Setup
) -> Callable[[], None]:
    return partial(
        begin_views,
        opened.encoder,
        suite,
        hub_dir=how.hub_dir,
        store=_store(folder),
        options=opened.options,
    )


def _check_folder(folder: Path | None) -> None:
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; results need a folder")


def _store(folder: Path | None) -> Path | None:
    return folder / "scores" if folder else None


def _grid_views(
    encoder: Encoder, name: str, grid: Grid, *, hub_dir: Path | None, progress: Progress
) -> dict[str, View]:
    transforms = fit_transforms(encoder, grid.dims, grid.codes, hub_dir=hub_dir, progress=progress)
    named = {f"{name}-{each.dims}-{each.code}": each for each in transforms}
    return {row: view_of(encoder, each, row) for row, each in named.items()}


def base_of(sources: Sequence[str]) -> str:
    """The one base that artifacts were made from, as something that `load` takes.

    Raises:
        InputError: they have several bases, or one that only its owner can name (a folder).
    """
    bases = set()
    for source in sources:
        folder = Path(source)
        bases.add(read_manifest(folder).base.id if is_artifact(folder) else source)
    if len(bases) > 1:
        raise InputError(
            f"the artifacts have different bases ({', '.join(sorted(bases))}); evaluate them "
            f"apart, or give --baseline"
        )
    base = bases.pop()
    if base != NANO and "/" not in base and not Path(base).is_dir():
        raise InputError(f"the base was a folder called {base}; say where it is with --baseline")
    return base


def _resolve(plan: Plan, beside: Path | None) -> tuple[list[Recipe], Suite, Policy]:
    """Everything that the plan names; all problems at once."""
    problems: list[str] = []
    recipes: list[Recipe] = []
    for name in plan.recipes:
        try:
            recipes.append(load_recipe(name, beside=beside))
        except GteoptError as error:
            problems.append(str(error))
    names = [recipe.name for recipe in recipes]
    problems += [
        f"recipe {n} is named twice" for n in sorted({n for n in names if names.count(n) > 1})
    ]
    if BASELINE in names:
        problems.append(f"recipe {BASELINE} is the baseline, which every plan measures anyway")
    suite: Suite | None = None
    policy: Policy | None = None
    try:
        suite = load_suite(plan.suite)
    except GteoptError as error:
        problems.append(str(error))
    try:
        policy = load_policy(plan.policy, beside=beside)
    except GteoptError as error:
        problems.append(str(error))
    if problems or suite is None or policy is None:
        raise InputError(join_problems(f"plan {plan.name} cannot run", problems))
    return recipes, suite, policy


def _is_current(out: Path, recipe: Recipe, base_sha256: str) -> bool:
    try:
        manifest = read_manifest(out)
    except IntegrityError:
        return False
    return (manifest.recipe_sha256, manifest.base.sha256) == (recipe.sha256(), base_sha256)
