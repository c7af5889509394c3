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

import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from gteopt.build.quantize import quantize
from gteopt.build.truncate import restyle
from gteopt.commands.bench import BASELINE, measure
from gteopt.commands.choose import title_of
from gteopt.commands.evaluate import Setup, score
from gteopt.config.plan import WORKLOADS, Plan
from gteopt.config.policy import Policy, load_policy
from gteopt.config.recipe import Recipe, load_recipe
from gteopt.corpus.workers import Workers
from gteopt.encoder.description import pick_device
from gteopt.errors import GteoptError, InputError, IntegrityError, join_problems
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_suite
from gteopt.model.artifact import discard, is_artifact, read_manifest
from gteopt.model.checkpoint import open_checkpoint
from gteopt.progress import Progress, quiet
from gteopt.records.bench import BenchReport
from gteopt.records.files import read_record, write_record
from gteopt.records.results_folder import Results, RunRecord
from gteopt.report.choose import choose
from gteopt.report.html import write_report
from gteopt.speed.protocol import default_workloads


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
