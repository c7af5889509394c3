"""A whole plan: build, bench, evaluate, choose, report; what is already done is not done twice.

Hides: the layout of a plan's folder and when a finished step is still valid. Refuses to know: how
any step works.

    OUT/variants/<recipe>/       artifacts
    OUT/bench.json               speed and memory
    OUT/eval/<variant>.json      scores and fidelity
    OUT/fidelity/<variant>.json  fidelity alone, on a user's own texts
    OUT/scores/                  encoded texts and finished tasks: an evaluation goes on from there
    OUT/choice.json              the answer to the policy
    OUT/report.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from gteopt.artifact import artifact_sha256, discard, is_artifact, read_manifest
from gteopt.bench import bench, default_workloads, fitting
from gteopt.build import fit_transforms, quantize, restyle
from gteopt.checkpoint import NANO, open_checkpoint
from gteopt.choose import choose
from gteopt.encoder import Backend, Encoder, describe, load
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
    read_record,
    write_record,
)
from gteopt.report import write_report

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
        InputError: lists every problem of the plan before anything slow starts.
    """
    recipes, suite, policy = _resolve(plan, beside)
    folder = plan.out
    artifacts = build_variants(
        plan.base, recipes, folder / "variants", hub_dir=hub_dir, device=device, progress=progress
    )
    sources = {BASELINE: plan.base, **{name: str(path) for name, path in artifacts.items()}}
    spec = plan.bench
    if "workloads" not in spec.model_fields_set:
        usual = spec.model_copy(update={"workloads": WORKLOADS[default_workloads(device)]})
        spec = fitting(usual, open_checkpoint(plan.base, hub_dir=hub_dir).max_tokens)
    report = measure(sources, spec, folder, hub_dir=hub_dir, device=device, progress=progress)
    asked = ("--suite", Path(plan.suite).name)
    how = Setup(hub_dir=hub_dir, device=device, workers=workers, asked=asked)
    evals = score(sources, suite, folder, how=how, margin=policy.margin, progress=progress)
    for path in (folder / "eval").glob("*.json"):
        if path.stem not in evals:
            path.unlink()  # of a recipe that the plan no longer names
    choice = choose(policy, Results(bench=report, evals=evals, choice=None))
    write_record(folder / "choice.json", choice)
    results = Results(bench=report, evals=evals, choice=choice)
    write_report(folder, results, title=f"gteopt: {plan.name} ({plan.base})")
    return results


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
    folder: Path,
    *,
    hub_dir: Path | None,
    device: str,
    progress: Progress,
) -> BenchReport:
    """The bench report of these variants, measured unless the folder already holds it."""
    path = folder / "bench.json"
    if path.is_file():
        try:
            old = read_record(path, BenchReport)
        except IntegrityError:
            old = None  # of another version, or damaged: measured again
        if old is not None and _still_holds(old, sources, spec, hub_dir):
            return old
    report = bench(
        sources, baseline=BASELINE, spec=spec, device=device, hub_dir=hub_dir, progress=progress
    )
    write_record(path, report)
    return report


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
    """
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
    """
    texts = read_texts(file)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    reports: dict[str, FidelityReport] = {}
    baseline = None
    for name, source in sources.items():
        opened = _open(name, source, how, progress, is_baseline=baseline is None)
        views, own, notes = opened.views, own_view(opened.encoder), opened.notes
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
    views = {name: own_view(encoder)}
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


def _still_holds(
    old: BenchReport, sources: Mapping[str, str], spec: BenchSpec, hub_dir: Path | None
) -> bool:
    """Whether an earlier report speaks of these artifacts, on this machine, with these versions."""
    same_versions = versions().items() <= old.versions.items()  # the report also notes the dtype
    if not same_versions or (old.spec, old.machine) != (spec, machine()):
        return False
    hashes = {
        name: artifact_sha256(Path(source))
        if is_artifact(Path(source))
        else open_checkpoint(source, hub_dir=hub_dir).sha256
        for name, source in sources.items()
    }
    return hashes == {name: each.artifact_sha256 for name, each in old.variants.items()}
