"""`gteopt optimize`: plan which variants of a model to try within limits, and run the plan.

Hides: which recipes are worth trying for which limits, and the files of a plan. Refuses to know:
how anything is built or measured (`commands.run` runs the plan), printing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from gteopt.build.build_time import UNCERTAINTY
from gteopt.build.calibration_texts import draw_calibration_texts
from gteopt.commands.inspect import inspect
from gteopt.commands.judges import Judges
from gteopt.commands.run import run
from gteopt.config.engines import EngineChoice, format_for_engine
from gteopt.config.limits import Limits
from gteopt.config.plan import Plan, PlanBench, Screening
from gteopt.config.recipe import (
    Calibration,
    Dims,
    Effort,
    GptqWeights,
    Recipe,
    VectorCode,
    Vectors,
    load_recipe,
)
from gteopt.config.yaml_files import list_shipped_names
from gteopt.cores import n_cores
from gteopt.errors import InputError
from gteopt.evaluation.suites import read_suite
from gteopt.evaluation.task_facts import filter_suite
from gteopt.evaluation.user_data import read_texts
from gteopt.progress import Progress, ignore_progress
from gteopt.records.files import write_atomically
from gteopt.records.inspection import Inspection, RecipeEstimate
from gteopt.records.results_folder import Results
from gteopt.report.wording import metric_amount

_FAST = ("gptq-int4", "gptq-nf4", "int8", "int8-weight")
_THOROUGH = ("mixed-nf4", "mixed-4.25")
_SMALLER = ("mixed-3.5", "gptq-int3")
"""Recipes to try always; at efforts above fast; and where the others are too large."""
_ON_GPU = ("fp8",)
_PLAN_FILE = "plan.yaml"
_ENOUGH_TO_SPLIT = 200
"""Number of own texts from which on some calibrate; the rest is enough to tell variants apart."""
_MOST_CALIBRATED = 128
"""Most own texts in a calibration set; built-in texts keep other kinds of text close."""


@dataclass(frozen=True)
class Search:
    """How variants are searched.

    Attributes:
        engine: engine that must open the pick.
        effort: effort of builds that are measured in full; screening uses effort fast.
        hub_dir: see `open_checkpoint`.
        device: device that everything runs on.

    Example:
        >>> gteopt.Search(engine="vllm", effort="standard")
    """

    engine: EngineChoice = "any"
    effort: Effort = "fast"
    hub_dir: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class TrialRecipe:
    """A candidate recipe.

    Attributes:
        estimate: estimate of its variant.
        dropped: why it is not tried; None where it is.
    """

    recipe: Recipe
    estimate: RecipeEstimate
    dropped: str | None


@dataclass(frozen=True)
class PlanProposal:
    """A plan and the facts behind it.

    Attributes:
        seconds: least and most seconds that the job should take.
        notes: notes for the user before the job starts.
    """

    plan: Plan
    file: Path
    inspection: Inspection
    trials: tuple[TrialRecipe, ...]
    seconds: tuple[float, float]
    notes: tuple[str, ...]


def propose_plan(
    model: str,
    judges: Judges,
    limits: Limits,
    search: Search,
    *,
    out: Path,
) -> PlanProposal:
    """Plan which variants of a model to try; writes `plan.yaml` and its recipes to `out`.

    Raises:
        InputError: data or limits that cannot be read; or no recipe can meet the limits, with the
            smallest size that a recipe can reach.
    """
    judges = judges.located(search.hub_dir)
    policy = limits.policy(labelled=judges.texts is None)
    inspection = inspect(model, hub_dir=search.hub_dir, device=search.device)
    if inspection.estimated_for is None:
        raise InputError(
            f"{model} is already quantized; give the original model that it was made from"
        )
    trials = tuple(_trials(model, inspection, limits, search))
    chosen = [trial for trial in trials if trial.dropped is None]
    if not chosen:
        raise InputError(_nothing_fits(trials, limits, search))
    recipes = [trial.recipe for trial in chosen]
    held_out = None if judges.texts is None else Path(judges.texts)
    languages = _languages(judges, inspection)
    notes = list(_notes(judges, languages))
    if split := _split_texts(held_out, judges):
        calibration, held_out = _write_split(split, out, dict(judges.columns).get("text", "text"))
        recipes = [_calibrated(recipe, calibration) for recipe in recipes]
        notes.append(
            f"calibrated on {len(split[0])} of your texts and on built-in texts; judged on your "
            f"{len(split[1])} other texts"
        )
    names = tuple(_written(recipe, out) for recipe in recipes)
    plan = Plan(
        schema="gteopt.plan/1",
        name="optimize",
        summary=f"Variants of {inspection.id} within the limits of `gteopt optimize`",
        base=model,
        recipes=names,
        suite=judges.suite,
        data=None if judges.data is None else Path(judges.data),
        columns=dict(judges.columns),
        texts=held_out,
        languages=languages,
        budget=judges.budget,
        effort=search.effort,
        screening=Screening(),
        bench=PlanBench(price_per_hour=limits.price_per_hour),
        policy=policy,
        out=out,
    )
    file = _write_plan(plan)
    return PlanProposal(
        plan=plan,
        file=file,
        inspection=inspection,
        trials=trials,
        seconds=_seconds(chosen, inspection),
        notes=tuple(notes),
    )


def run_proposal(
    proposal: PlanProposal, search: Search, *, progress: Progress = ignore_progress
) -> Results:
    """Build, screen, measure and judge the variants of a proposal; see `commands.run.run`."""
    return run(
        proposal.plan,
        beside=proposal.file.parent,
        hub_dir=search.hub_dir,
        device=search.device,
        progress=progress,
    )


def optimize(
    model: str,
    judges: Judges | None = None,
    limits: Limits | None = None,
    search: Search | None = None,
    *,
    out: str | Path,
    progress: Progress = ignore_progress,
) -> Results:
    """Find the cheapest variant of a model that keeps your limits.

    Args:
        model: "nano", a folder, or `<org>/<name>`.
        judges: your own data, texts or a suite; shipped texts when left out.
        limits: what a variant may cost and must keep.
        search: engine, effort and device.
        out: results folder for the plan, the variants, the records and the page. Finished work in
            it is not repeated.
        progress: receives the progress of each step.

    Returns:
        All measurements. `choice.picked` is the variant to deploy; its folder is in
        `out/variants/`.

    Raises:
        InputError: see `propose_plan` and `run`.

    Example:
        >>> limits = gteopt.Limits(max_weights="40MB", min_quality="99%")
        >>> results = gteopt.optimize("./my-model", gteopt.Judges(data="pairs.csv"), limits,
        ...     out="out")
    """
    search = search or Search()
    proposal = propose_plan(model, judges or Judges(), limits or Limits(), search, out=Path(out))
    return run_proposal(proposal, search, progress=progress)


def _trials(
    model: str, inspection: Inspection, limits: Limits, search: Search
) -> Iterator[TrialRecipe]:
    """Candidate recipes with estimates; those that cannot meet the limits have a reason."""
    names = [*_FAST, *(_THOROUGH if search.effort != "fast" else ())]
    if inspection.estimated_for is not None and inspection.estimated_for.device == "cuda":
        names += _ON_GPU
    assert set(names) | set(_SMALLER) <= set(list_shipped_names("recipes"))
    most = limits.weight_bytes()
    recipes = [load_recipe(name) for name in names]
    tried = [_trial(model, recipe, inspection, limits, search) for recipe in recipes]
    if most is not None and all(trial.dropped for trial in tried):
        smaller = [load_recipe(name) for name in _SMALLER]
        smaller += [_with_int8_table(recipe) for recipe in (*recipes, *smaller)]
        tried += [_trial(model, recipe, inspection, limits, search) for recipe in smaller]
    for trial in tried:
        if trial.dropped is not None:
            yield trial
            continue
        for recipe in _with_vectors(trial.recipe, inspection, limits):
            yield _trial(model, recipe, inspection, limits, search)


def _with_int8_table(recipe: Recipe) -> Recipe:
    small = recipe.with_int8_embedding()
    return small.model_copy(
        update={
            "name": f"{recipe.name}-embed-int8",
            "summary": f"{recipe.summary}; token table in int8",
        }
    )


def _with_vectors(recipe: Recipe, inspection: Inspection, limits: Limits) -> list[Recipe]:
    """The recipe with the ways to store vectors within an index limit; unchanged without one."""
    most, dims = limits.vector_bytes(), inspection.dims
    if most is None and limits.optimize != "index":
        return [recipe]
    lengths = sorted({dims, *inspection.matryoshka_dims, dims // 2, dims // 4}, reverse=True)
    sizes: dict[VectorCode, float] = {"float32": 4, "int8": 1}
    recipes = []
    if most is None:
        sizes["binary"] = 1 / 8
    elif most < 4 * dims:
        recipes.append(_filling(recipe, min(int(most), dims)))
    for code, n_bytes in sizes.items():
        fitting = [n for n in lengths if n > 1 and (most is None or n * n_bytes <= most)]
        if fitting:
            recipes.append(_shortened(recipe, fitting[0], code, inspection))
    return recipes


def _filling(recipe: Recipe, n_bytes: int) -> Recipe:
    """The recipe with vectors of `n_bytes` bytes that keep the most neighbours."""
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-{n_bytes}-bytes",
            "summary": f"{recipe.summary}; vectors of {n_bytes} bytes",
            "vectors": Vectors(code="auto", bytes=n_bytes),
        }
    )


def _shortened(recipe: Recipe, n: int, code: VectorCode, inspection: Inspection) -> Recipe:
    """The recipe with vectors of `n` dimensions, stored as `code`."""
    is_trained = n in inspection.matryoshka_dims
    dims = None if n == inspection.dims else Dims(n=n, method="slice" if is_trained else "auto")
    if dims is None and code == "float32":
        return recipe
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-{n}-{code}",
            "summary": f"{recipe.summary}; {n} dimensions as {code}",
            "dims": dims,
            "vectors": Vectors(code=code),
        }
    )


def _trial(
    model: str, recipe: Recipe, inspection: Inspection, limits: Limits, search: Search
) -> TrialRecipe:
    """A recipe in a format that the engine opens, with its estimate."""
    opened = format_for_engine(recipe, search.engine)
    known = {estimate.recipe: estimate for estimate in inspection.estimates}
    if opened == find_shipped_recipe(recipe.name) and recipe.name in known:
        estimate = known[recipe.name]
    else:
        estimate = inspect(
            model, hub_dir=search.hub_dir, device=search.device, recipe=opened or recipe
        ).estimates[0]
    return TrialRecipe(opened or recipe, estimate, _why_not(opened, estimate, limits, search))


def find_shipped_recipe(name: str) -> Recipe | None:
    """The shipped recipe of this name; None where there is none."""
    return load_recipe(name) if name in list_shipped_names("recipes") else None


def _why_not(
    recipe: Recipe | None, estimate: RecipeEstimate, limits: Limits, search: Search
) -> str | None:
    most, vector = limits.weight_bytes(), limits.vector_bytes()
    if estimate.problem is not None:
        return estimate.problem
    if search.engine != "any" and (recipe is None or search.engine not in estimate.engines):
        return f"{search.engine} cannot open it"
    assert estimate.weight_bytes is not None
    assert estimate.bytes_per_vector is not None
    if most is not None and estimate.weight_bytes > most:
        return f"weights of {metric_amount('weight_bytes', estimate.weight_bytes)} are too large"
    if vector is not None and estimate.bytes_per_vector > vector and recipe is not None:
        can_be_shortened = recipe.dims is None and recipe.vectors.code == "float32"
        return None if can_be_shortened else "vectors are too long"
    return None


def _nothing_fits(trials: Sequence[TrialRecipe], limits: Limits, search: Search) -> str:
    """A message about the limit that no recipe can meet, with the nearest recipe."""
    opened = [
        trial
        for trial in trials
        if trial.estimate.weight_bytes is not None
        and (search.engine == "any" or search.engine in trial.estimate.engines)
    ]
    if not opened:
        reasons = "; ".join(f"{trial.recipe.name}: {trial.dropped}" for trial in trials)
        return f"no recipe can be built for --engine {search.engine} ({reasons})"
    least = min(opened, key=lambda trial: trial.estimate.weight_bytes or 0)
    assert least.estimate.weight_bytes is not None
    amount = metric_amount("weight_bytes", least.estimate.weight_bytes)
    hint = ""
    if least.recipe.embedding != "int8":
        hint = "; an int8 token table would make it smaller, but only gteopt opens that"
    return (
        f"no recipe meets --max-weights {limits.max_weights}: the smallest is {least.recipe.name} "
        f"with {amount}{hint}. Give --max-weights {amount.replace(' ', '')} or a smaller model"
    )


def _written(recipe: Recipe, out: Path) -> str:
    """The recipe's name in a plan; a recipe that does not ship is written to a file."""
    if find_shipped_recipe(recipe.name) == recipe:
        return recipe.name
    file = out / "recipes" / f"{recipe.name}.yaml"
    content = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    _write_yaml(file, {"schema": "gteopt.recipe/1", **content}, "Written by `gteopt optimize`.")
    return f"recipes/{recipe.name}.yaml"


def _languages(judges: Judges, inspection: Inspection) -> tuple[str, ...]:
    """Languages to score the suite in: the requested ones, else those of the model's card.

    Empty stands for all languages of the suite. It is returned for own data or texts, and where the
    card states no language or none of the suite.
    """
    if judges.languages or judges.data is not None or judges.texts is not None:
        return judges.languages
    suite = read_suite(judges.suite or "mini")
    try:
        part = filter_suite(suite, languages=inspection.languages)
    except InputError:
        return ()
    return () if part == suite else inspection.languages


def _split_texts(file: Path | None, judges: Judges) -> tuple[list[str], list[str]] | None:
    """The user's texts to calibrate on and to judge on; None where there are too few.

    A variant is closest on the texts that it was calibrated on, so no text is in both.
    """
    if file is None:
        return None
    texts = read_texts(file, dict(judges.columns))
    if len(texts) < _ENOUGH_TO_SPLIT:
        return None
    n_calibrated = min(_MOST_CALIBRATED, len(texts) // 4)
    chosen = set(random.Random(0).sample(range(len(texts)), n_calibrated))
    calibrated = [text for i, text in enumerate(texts) if i in chosen]
    return calibrated, [text for i, text in enumerate(texts) if i not in chosen]


def _write_split(
    split: tuple[list[str], list[str]], out: Path, column: str
) -> tuple[Calibration, Path]:
    """Write both parts to files in `out`, the first part together with built-in texts."""
    calibrated, held_out = split
    n_builtin = Calibration().n_texts - len(calibrated)
    builtin = draw_calibration_texts(Calibration(n_texts=n_builtin))
    rows = [{"text": text} for text in calibrated]
    rows += [
        {
            "text": text.text,
            "role": text.role,
            "instruction": text.instruction or "",
            "kind": text.kind,
        }
        for text in builtin
    ]
    calibration, judged = out / "calibration.jsonl", out / "held-out.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    for file, content in (
        (calibration, rows),
        (judged, [{column: text} for text in held_out]),
    ):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        write_atomically(file, lines.encode())
    return Calibration(texts=str(calibration.resolve()), n_texts=len(rows)), judged.resolve()


def _calibrated(recipe: Recipe, calibration: Calibration) -> Recipe:
    """The recipe with other calibration texts, if it uses calibration texts."""
    if not isinstance(recipe.weights, GptqWeights):
        return recipe
    return recipe.model_copy(update={"calibration": calibration})


def _write_plan(plan: Plan) -> Path:
    file = plan.out / _PLAN_FILE
    content = plan.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    note = f"Written by `gteopt optimize`; edit it and run it with `gteopt run {file}`."
    _write_yaml(file, {"schema": "gteopt.plan/1", **content}, note)
    return file


def _write_yaml(file: Path, content: dict[str, object], note: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    write_atomically(file, f"# {note}\n{text}".encode())


_BENCH_S, _TOKENS_PER_BENCH, _FLOPS = 15.0, 170_000, 50e9


def _seconds(trials: Sequence[TrialRecipe], inspection: Inspection) -> tuple[float, float]:
    """Least and most seconds of the whole job, without the evaluation on large data."""
    builds = sum(trial.estimate.build_s or 0 for trial in trials)
    n_measured = min(len(trials), Screening().keep) + 1
    per_bench = _TOKENS_PER_BENCH * 2 * inspection.n_parameters / (_FLOPS * n_cores())
    total = builds + n_measured * (_BENCH_S + per_bench)
    return total / UNCERTAINTY, total * UNCERTAINTY


def _notes(judges: Judges, languages: Sequence[str]) -> Iterator[str]:
    """Notes on what judges the variants."""
    if judges.data is None and judges.texts is None:
        suite = judges.suite or "mini, the small suite that ships with gteopt"
        yield (
            f"judged on {suite}; your own data is a better judge (--data pairs.csv, --texts "
            f"texts.txt)"
        )
    if languages != judges.languages:
        yield (
            f"scored in {', '.join(languages)}, the languages of the model's card; --languages "
            f"chooses others"
        )
    if judges.texts is not None:
        yield "no labels: closeness to the baseline on your texts decides"
