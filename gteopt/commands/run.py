"""`gteopt run`: carry out a plan, and skip the steps that are already done.

Hides: the files of a plan's folder, and when a finished step is still valid. Refuses to know: how
any step works.

    OUT/variants/<recipe>/       artifacts
    OUT/screening/, .json        variants of the screening, and its result
    OUT/bench.json               speed and memory
    OUT/eval/<variant>.json      scores and fidelity
    OUT/fidelity/<variant>.json  fidelity alone, on a user's own texts
    OUT/scores/                  encoded texts and finished tasks, to resume an evaluation
    OUT/choice.json              the policy's choice
    OUT/run.json                 the variants that the plan wrote
    OUT/report.html
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gteopt.build.quantize import quantize
from gteopt.build.truncate import truncate_to_recipe
from gteopt.commands.bench import BASELINE, BenchReportFile, bench_to_file
from gteopt.commands.choose import write_choice_page
from gteopt.commands.evaluate import EvaluationSetup, evaluate_suite, evaluate_texts
from gteopt.commands.judges import Judges
from gteopt.commands.screening import screen_variants
from gteopt.config.plan import WORKLOADS, Plan
from gteopt.config.policy import Policy, load_policy
from gteopt.config.recipe import Effort, GptqWeights, Recipe, load_recipe
from gteopt.corpus.workers import ScoreWorkers
from gteopt.encoder.description import pick_device
from gteopt.errors import GteoptError, InputError, IntegrityError, join_problems
from gteopt.evaluation.data_check import check_data
from gteopt.evaluation.suites import Suite
from gteopt.model.artifact import is_artifact, read_manifest, remove_artifact
from gteopt.model.checkpoint import open_checkpoint
from gteopt.progress import Progress, ignore_progress
from gteopt.records.bench import BenchReport
from gteopt.records.evaluation import EvalReport, FidelityReport
from gteopt.records.files import read_record, write_record
from gteopt.records.results_folder import Results, RunRecord
from gteopt.records.screening import ScreeningRecord
from gteopt.report.choose import choose_variant
from gteopt.speed.protocol import default_workloads


def run(
    plan: Plan,
    *,
    beside: Path | None = None,
    hub_dir: Path | None = None,
    device: str = "auto",
    workers: ScoreWorkers | None = None,
    progress: Progress = ignore_progress,
) -> Results:
    """Carry out the steps of a plan that are not done yet, and return all measurements.

    Args:
        plan: the plan.
        beside: folder that relative file names in the plan refer to.
        hub_dir: folder of models and data sets; with it, the network is never used.
        device: device that everything runs on.
        workers: processes that encode the suite's texts instead of `device`.
        progress: receives the progress of each step.

    Raises:
        InputError: an unknown device, or problems of the plan; all are listed before the first slow
            step.
    """
    resolved = _resolve(plan, beside, hub_dir)
    if resolved.suite is not None:
        check_data(resolved.suite, hub_dir)
    pick_device(device)
    folder, policy = plan.out, resolved.policy
    where = _Where(hub_dir, device, progress)
    recipes = resolved.recipes
    if plan.screening is not None:
        screening = _screened(resolved, where, workers)
        recipes = [recipe for recipe in recipes if recipe.name in screening.kept]
    artifacts = build_variants(
        plan.base, recipes, folder / "variants", hub_dir=hub_dir, device=device, progress=progress
    )
    sources = {BASELINE: plan.base, **{name: str(path) for name, path in artifacts.items()}}
    _forget_former(folder, sources)
    ran = RunRecord(plan=plan.name, base=plan.base, variants=tuple(sources))
    write_record(folder / "run.json", ran)
    report = _benched(plan, sources, where)
    evals, fidelity = _judged(plan, resolved, sources, where, workers)
    variants = {name: variant for name, variant in report.variants.items() if name in sources}
    results = Results(
        bench=report.model_copy(update={"variants": variants}),
        evals=evals,
        fidelity=fidelity,
        choice=None,
    )
    choice = choose_variant(policy, results)
    write_record(folder / "choice.json", choice)
    results = results.model_copy(update={"choice": choice})
    write_choice_page(folder, results)
    return results


@dataclass(frozen=True)
class _Where:
    """Where a plan runs, and what receives its progress."""

    hub_dir: Path | None
    device: str
    progress: Progress


@dataclass(frozen=True)
class _Resolved:
    """The objects that a plan names; the suite is None where own texts without labels decide.

    Attributes:
        plan: the plan, with the file of its data set where it has the name.
    """

    plan: Plan
    recipes: list[Recipe]
    suite: Suite | None
    policy: Policy


def _screened(resolved: _Resolved, where: _Where, workers: ScoreWorkers | None) -> ScreeningRecord:
    """Screen the variants at effort fast.

    A variant whose recipe has effort fast is built in its final folder, so it is built only once.
    """
    plan = resolved.plan
    artifacts: dict[str, Path] = {}
    for parent, is_final in ((plan.out / "variants", True), (plan.out / "screening", False)):
        recipes = [
            fast
            for recipe in resolved.recipes
            if ((fast := _at_effort(recipe, "fast")) == recipe) == is_final
        ]
        artifacts |= build_variants(
            plan.base,
            recipes,
            parent,
            hub_dir=where.hub_dir,
            device=where.device,
            progress=where.progress,
        )
    how = EvaluationSetup(hub_dir=where.hub_dir, device=where.device, workers=workers)
    return screen_variants(
        plan, resolved.policy, resolved.recipes, artifacts, how=how, progress=where.progress
    )


def _benched(plan: Plan, sources: dict[str, str], where: _Where) -> BenchReport:
    """The speed and memory of every variant."""
    spec = plan.bench.spec
    names_no_workload = "workloads" not in plan.bench.model_fields_set
    if names_no_workload:
        spec = spec.model_copy(update={"workloads": WORKLOADS[default_workloads(where.device)]})
    return bench_to_file(
        sources,
        spec,
        BenchReportFile(plan.out, plan.bench.price_per_hour, skip_measured=True),
        baseline=BASELINE,
        progress=where.progress,
        hub_dir=where.hub_dir,
        device=where.device,
        skip_too_long=names_no_workload,
    )


def _judged(
    plan: Plan,
    resolved: _Resolved,
    sources: dict[str, str],
    where: _Where,
    workers: ScoreWorkers | None,
) -> tuple[dict[str, EvalReport], dict[str, FidelityReport]]:
    """Scores on the plan's suite and data, or fidelity on its texts."""
    options = [("--suite", plan.suite_name), ("--data", plan.data)]
    words = tuple(word for option, name in options if name for word in (option, Path(name).name))
    how = EvaluationSetup(hub_dir=where.hub_dir, device=where.device, workers=workers, asked=words)
    if resolved.suite is None:
        assert plan.texts is not None
        return {}, evaluate_texts(
            sources, plan.texts, plan.out, how=how, columns=plan.columns, progress=where.progress
        )
    evals = evaluate_suite(
        sources,
        resolved.suite,
        plan.out,
        how=how,
        margin=resolved.policy.margin,
        progress=where.progress,
    )
    return evals, {}


def _at_effort(recipe: Recipe, effort: Effort | None) -> Recipe:
    """The recipe at another effort, if it has efforts."""
    is_tunable = isinstance(recipe.weights, GptqWeights) and recipe.weights.can_be_tuned
    return recipe.with_effort(effort) if effort is not None and is_tunable else recipe


def _forget_former(folder: Path, sources: Iterable[str]) -> None:
    """Remove results of an earlier run of the plan for variants that it no longer names.

    Everything else in the folder belongs to the user; a warning names results that stay.
    """
    path, written = folder / "run.json", set[str]()
    with suppress(IntegrityError):  # a missing or foreign file names no variants of this plan
        written = set(read_record(path, RunRecord).variants)
    former = written - set(sources)
    for name in former:
        (folder / "eval" / f"{name}.json").unlink(missing_ok=True)
        (folder / "fidelity" / f"{name}.json").unlink(missing_ok=True)
    bench_path = folder / "bench.json"
    if former and bench_path.is_file():
        with suppress(IntegrityError):
            old = read_record(bench_path, BenchReport)
            kept = {name: bench for name, bench in old.variants.items() if name not in former}
            write_record(bench_path, old.model_copy(update={"variants": kept}))
    others = {file.stem for file in (folder / "eval").glob("*.json")} - set(sources)
    if others:
        warnings.warn(
            f"{folder / 'eval'} also holds {', '.join(sorted(others))}, which no run of this plan "
            f"wrote; these files stay, and the plan's choice ignores them",
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
    """Build an artifact for each recipe; recipes that differ only in vectors share one build."""
    built: dict[str, Path] = {}
    by_weights: dict[str, Path] = {}
    base_sha256 = open_checkpoint(base, hub_dir=hub_dir).sha256
    for recipe in recipes:
        out = folder / recipe.name
        if is_artifact(out) and not _is_current(out, recipe, base_sha256):
            remove_artifact(out)  # the folder belongs to the plan, and its recipe or base changed
        twin = by_weights.get(recipe.weights_sha256())
        if twin is not None:
            truncate_to_recipe(twin, recipe, out, hub_dir=hub_dir, device=device, progress=progress)
        else:
            quantize(base, recipe, out, hub_dir=hub_dir, device=device, progress=progress)
            by_weights[recipe.weights_sha256()] = out
        built[recipe.name] = out
    return built


def _resolve(plan: Plan, beside: Path | None, hub_dir: Path | None) -> _Resolved:
    """Load everything that the plan names.

    Raises:
        InputError: lists all problems.
    """
    problems: list[str] = []
    recipes: list[Recipe] = []
    for name in plan.recipes:
        try:
            recipes.append(_at_effort(load_recipe(name, beside=beside), plan.effort))
        except GteoptError as error:
            problems.append(str(error))
    names = [recipe.name for recipe in recipes]
    problems += [
        f"recipe {n} is named twice" for n in sorted({n for n in names if names.count(n) > 1})
    ]
    if BASELINE in names:
        problems.append(f"recipe {BASELINE} is the baseline, which every plan measures; remove it")
    suite: Suite | None = None
    policy: Policy | None = None
    try:
        judges = _judges(plan).located(hub_dir)
        plan = plan.model_copy(update={"data": judges.data})
        suite = _load_suite(plan, judges, hub_dir)
    except GteoptError as error:
        problems.append(str(error))
    try:
        policy = (
            plan.policy
            if isinstance(plan.policy, Policy)
            else load_policy(plan.policy, beside=beside)
        )
    except GteoptError as error:
        problems.append(str(error))
    if problems or policy is None:
        raise InputError(join_problems(f"plan {plan.name} cannot run", problems))
    return _Resolved(plan, recipes, suite, policy)


def _judges(plan: Plan) -> Judges:
    return Judges(
        data=plan.data,
        texts=plan.texts,
        columns=tuple(plan.columns.items()),
        suite=plan.suite,
        languages=plan.languages,
        budget=plan.budget,
    )


def _load_suite(plan: Plan, judges: Judges, hub_dir: Path | None) -> Suite | None:
    """See `Judges.load_suite`."""
    n_variants = min(len(plan.recipes), plan.screening.keep if plan.screening else 10**6)
    return judges.load_suite(
        {BASELINE: plan.base}, plan.out, hub_dir=hub_dir, n_models=1 + n_variants
    )


def _is_current(out: Path, recipe: Recipe, base_sha256: str) -> bool:
    try:
        manifest = read_manifest(out)
    except IntegrityError:
        return False
    return (manifest.recipe_sha256, manifest.base.sha256) == (recipe.sha256(), base_sha256)
