"""Make the benchmark suites and their lite versions.

    python eval/suites/make.py ../shared/reference

Writes the YAML files beside it and the tables of README.md between their markers. What is in a
benchmark comes from the installed mteb; what predicts its mean comes from published scores.

A lite suite is the best of all subsets of a fixed size: it covers every task type, keeps a budget
of minutes, and its plain mean has the highest correlation with the mean of the whole benchmark over
the models of the training half. The search is exhaustive. The figures in README.md are of the other
half of the models, which share no organisation with the first.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

FOLDER = Path(__file__).parent
TOKENS_PER_S = 36_000  # assumed: a 7B encoder in bf16 on one H200, short and long texts mixed
# Assumed for a Qwen2 vocabulary.
CHARACTERS_PER_TOKEN = {"mteb-en": 4.5, "c-mteb": 1.5, "mteb-fr": 3.6, "mteb-pl": 2.7}
INSTRUCTION_TOKENS = 25  # on each text but the documents of a search
N_EXTRA = 2  # tasks of a lite suite beyond one of each type
MAX_TASK_MINUTES = 5.0
LITE_MINUTES = {"mteb-en": 10.0, "c-mteb": 10.0, "mteb-fr": 10.0, "mteb-pl": 5.0}
MIN_MODELS = 40  # a task with fewer scores is left out of the mean that is predicted
_TEXT_FIELDS = ("text_statistics", "text1_statistics", "text2_statistics", "summaries_statistics")

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Benchmark:
    """One of mteb's benchmarks, and the average of 2024 that it descends from.

    Attributes:
        n_published: tasks in the averages published in 2024.
        missing: tasks (with subset) of those averages that mteb's definition no longer has.
        added: tasks of mteb's definition that those averages did not have.
    """

    suite: str
    name: str
    title: str
    n_published: int
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark("mteb-en", "MTEB(eng, v1)", "English", 56),
    Benchmark(
        "c-mteb",
        "MTEB(cmn, v1)",
        "Chinese",
        35,
        missing=(
            "AmazonReviewsClassification (zh)",
            "MassiveIntentClassification (zh-CN)",
            "MassiveScenarioClassification (zh-CN)",
            "STS22 (zh)",
        ),
    ),
    Benchmark("mteb-fr", "MTEB(fra, v1)", "French", 26, missing=("OpusparcusPC (fr)",)),
    Benchmark(
        "mteb-pl",
        "MTEB(pol, v1)",
        "Polish",
        26,
        missing=tuple(
            f"{name}-PL"
            for name in (
                "ArguAna",
                "DBPedia",
                "FiQA",
                "HotpotQA",
                "MSMARCO",
                "NFCorpus",
                "NQ",
                "Quora",
                "SCIDOCS",
                "SciFact",
                "TRECCOVID",
            )
        ),
        added=("PlscClusteringS2S", "PlscClusteringP2P"),
    ),
)


@dataclass(frozen=True)
class Scores:
    """Published scores of the models that have every task.

    Attributes:
        tasks: those of the benchmark that enough models have.
        values: [models, tasks], 0 to 1.
        in_training: [models] bool.
    """

    models: list[str]
    tasks: list[str]
    values: Matrix
    in_training: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Lite:
    """A chosen subset; the figures are of models that did not take part in the choice.

    Attributes:
        spread: standard deviation of the held-out models' full means; what `rmse` is to be seen by.
        upper_spearman, upper_rmse: among the better half of the held-out models.
    """

    tasks: list[str]
    minutes: float
    n_subsets: int
    n_training: int
    n_held_out: int
    training_pearson: float
    pearson: float
    spearman: float
    rmse: float
    spread: float
    upper_spearman: float
    upper_rmse: float


def main(reference: Path) -> None:
    """Write every suite and the README's tables."""
    published = _published(reference / "mteb_scores.csv.gz")
    suites, lites = [], []
    for each in BENCHMARKS:
        tasks = {task.metadata.name: task for task in mteb.get_benchmark(each.name).tasks}
        rate = CHARACTERS_PER_TOKEN[each.suite]
        minutes = {name: _tokens(task, rate) / TOKENS_PER_S / 60 for name, task in tasks.items()}
        scores = _scores(published, tasks)
        lite = _choose(scores, tasks, minutes, LITE_MINUTES[each.suite])
        _write(each, list(tasks.values()), sum(minutes.values()))
        _write_lite(each, [tasks[name] for name in lite.tasks], lite)
        types = len({task.metadata.type for task in tasks.values()})
        suites.append(
            f"| `{each.suite}` | {each.name} | {len(tasks)} | {types} | {each.n_published} | "
            f"{_minutes(sum(minutes.values()))} |"
        )
        lites.append(
            f"| `{each.suite}-lite` | {len(lite.tasks)} | {_minutes(lite.minutes)} | "
            f"{lite.n_training} | {lite.n_held_out} | {lite.training_pearson:.3f} | "
            f"{lite.pearson:.3f} | {lite.spearman:.3f} | {100 * lite.rmse:.2f} | "
            f"{100 * lite.spread:.2f} | {lite.upper_spearman:.3f} | {100 * lite.upper_rmse:.2f} |"
        )
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    for marker, rows in (("suites", suites), ("lite", lites)):
        filled = "".join(f"{row}\n" for row in rows)
        text = re.sub(rf"(<!-- {marker} -->\n\|.*\n\|.*\n)(?:\|.*\n)*", rf"\g<1>{filled}", text)
    readme.write_text(text, encoding="utf-8")


def _published(path: Path) -> dict[str, dict[tuple[str, str, str], float]]:
    """Score by model, then task, split and subset; a score that was run before a claimed one."""
    found: dict[str, dict[tuple[str, str, str], float]] = defaultdict(dict)
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        rows = sorted(csv.DictReader(handle), key=lambda row: row["revision"] != "external")
    for row in rows:  # later rows win
        if row["main_score"] != "nan":
            key = (row["task"], row["split"], row["subset"])
            found[row["model"]][key] = float(row["main_score"])
    return found


def _scores(
    published: dict[str, dict[tuple[str, str, str], float]], tasks: dict[str, Any]
) -> Scores:
    table: dict[str, dict[str, float]] = {}
    for model, scores in published.items():
        of_task: dict[str, list[float]] = defaultdict(list)
        for (name, split, subset), score in scores.items():
            task = tasks.get(name)
            if task is not None and split in task.eval_splits and subset in task.hf_subsets:
                of_task[name].append(score)
        table[model] = {name: float(np.mean(each)) for name, each in of_task.items()}
    kept = [name for name in tasks if sum(name in row for row in table.values()) >= MIN_MODELS]
    models = sorted(model for model, row in table.items() if all(name in row for name in kept))
    return Scores(
        models=models,
        tasks=kept,
        values=np.array([[table[model][name] for name in kept] for model in models]),
        in_training=_in_training(models),
    )


def _in_training(models: list[str]) -> npt.NDArray[np.bool_]:
    """Half of the models, by organisation: no two sizes of one model lie on both sides."""
    organisation = [model.split("/")[0].lower() for model in models]
    n_models = Counter(organisation)
    sides: tuple[set[str], set[str]] = (set(), set())
    for each in sorted(n_models, key=lambda name: (-n_models[name], name)):
        min(sides, key=lambda side: sum(n_models[name] for name in side)).add(each)
    return np.array([name in sides[0] for name in organisation])


def _choose(
    scores: Scores, tasks: dict[str, Any], minutes: dict[str, float], budget: float
) -> Lite:
    """The subset whose mean correlates best with the mean of all, by trying every one.

    With covariances C of task scores and c = C 1 / n their covariances with the full mean, the mean
    of a subset S of k tasks correlates with it at sum(c_S) / sqrt(sum(C_SS) var(full)), so that a
    subset costs a few sums. S is one task of each type and `N_EXTRA` = 2 others.
    """
    train = scores.values[scores.in_training]
    covariance = np.cov(train, rowvar=False)
    to_full = covariance.mean(axis=1)
    cost = np.array([minutes[name] for name in scores.tasks])
    types = [tasks[name].metadata.type for name in scores.tasks]
    allowed = [i for i in range(len(types)) if cost[i] <= MAX_TASK_MINUTES]
    of_type = [
        # Where every task of a type is long, its shortest one stands for it.
        [i for i in allowed if types[i] == kind]
        or [min((i for i in range(len(types)) if types[i] == kind), key=lambda i: cost[i])]
        for kind in sorted(set(types))
    ]
    base = np.array(list(itertools.product(*of_type)))  # [B, types]
    rows = covariance[:, base].sum(axis=2)  # [tasks, B]: sum of C[a, i] over i of each base
    inner = covariance[base[:, :, None], base[:, None, :]].sum(axis=(1, 2))
    gain, spent = to_full[base].sum(axis=1), cost[base].sum(axis=1)
    best, chosen, n_subsets = -np.inf, np.empty(0, dtype=np.intp), 0
    for a, b in itertools.combinations(sorted({*allowed, *base.ravel()}), N_EXTRA):
        fits = (spent + cost[a] + cost[b] <= budget) & ~((base == a) | (base == b)).any(axis=1)
        n_subsets += int(fits.sum())
        if not fits.any():
            continue
        total = inner + 2 * (rows[a] + rows[b]) + covariance[[a, b]][:, [a, b]].sum()
        ratio = np.where(fits, (gain + to_full[a] + to_full[b]) / np.sqrt(total), -np.inf)
        if ratio.max() > best:
            best, chosen = float(ratio.max()), np.array([*base[ratio.argmax()], a, b])
    chosen = np.sort(chosen)
    lite, full = scores.values[:, chosen].mean(axis=1), scores.values.mean(axis=1)
    fit = scores.in_training
    slope, intercept = np.polyfit(lite[fit], full[fit], 1)
    held_out = ~fit
    upper = full[held_out] >= np.median(full[held_out])
    error = slope * lite[held_out] + intercept - full[held_out]
    return Lite(
        tasks=[scores.tasks[i] for i in chosen],
        minutes=float(cost[chosen].sum()),
        n_subsets=n_subsets,
        n_training=int(fit.sum()),
        n_held_out=int(held_out.sum()),
        training_pearson=float(np.corrcoef(lite[fit], full[fit])[0, 1]),
        pearson=float(np.corrcoef(lite[held_out], full[held_out])[0, 1]),
        spearman=float(spearmanr(lite[held_out], full[held_out]).statistic),
        rmse=float(np.sqrt(np.mean(error**2))),
        spread=float(full[held_out].std()),
        upper_spearman=float(spearmanr(lite[held_out][upper], full[held_out][upper]).statistic),
        upper_rmse=float(np.sqrt(np.mean(error[upper] ** 2))),
    )


def _tokens(task: Any, characters_per_token: float) -> float:
    """Tokens of a task's distinct texts, from mteb's descriptive statistics."""
    metadata = task.metadata
    if hasattr(metadata, "tasks"):
        return sum(_tokens(part, characters_per_token) for part in metadata.tasks)
    tokens = 0.0
    for split in task.eval_splits:
        whole = metadata.descriptive_stats[split]
        by_subset = whole.get("hf_subset_descriptive_stats", {})
        for subset in task.hf_subsets:
            stats = by_subset.get(subset, whole)
            for field, text in stats.items():
                if not text or not field.endswith(_TEXT_FIELDS):
                    continue
                average, n = text["average_text_length"], text["unique_texts"]
                has_instruction = not field.startswith("documents")
                each = average / characters_per_token + INSTRUCTION_TOKENS * has_instruction
                tokens += n * each
                if metadata.type == "Classification":
                    labels = stats["label_statistics"]["unique_labels"]
                    # Ten training sets, which repeat texts; not counted less for that.
                    tokens += task.n_experiments * task.samples_per_label * labels * each
    return tokens


def _entry(task: Any) -> str:
    metadata = task.metadata
    fields = [f"task: {metadata.name}"]
    if hasattr(metadata, "tasks"):
        fields.append(f"splits: [{', '.join(task.eval_splits)}]")
        parts = [
            f'      {part.metadata.name}: "{part.metadata.dataset["revision"]}"'
            for part in metadata.tasks
        ]
        return "\n".join([f"  - {fields[0]}", f"    {fields[1]}", "    parts:", *parts])
    if list(task.hf_subsets) != ["default"]:
        fields.append(f"subsets: [{', '.join(task.hf_subsets)}]")
    fields.append(f"splits: [{', '.join(task.eval_splits)}]")
    fields.append(f'revision: "{metadata.dataset["revision"]}"')
    return f"  - {{{', '.join(fields)}}}"


def _write(each: Benchmark, tasks: list[Any], minutes: float) -> None:
    lines = [
        f"# Made by eval/suites/make.py from mteb {mteb.__version__}'s {each.name}.",
        "schema: gteopt.suite/1",
        f"name: {each.suite}",
        f"summary: MTEB in {each.title}, {len(tasks)} tasks ({each.name}).",
        f"minutes: {minutes:.0f}",
        "# The averages published in 2024 differ from this benchmark by these tasks.",
        f"published: {{n_tasks: {each.n_published}, missing: {json.dumps(each.missing)}, "
        f"added: {json.dumps(each.added)}}}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{each.suite}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_lite(each: Benchmark, tasks: list[Any], lite: Lite) -> None:
    lines = [
        f"# Made by eval/suites/make.py: the best of {lite.n_subsets:,} subsets; see README.md.",
        "schema: gteopt.suite/1",
        f"name: {each.suite}-lite",
        f"summary: {len(tasks)} short tasks whose mean foretells that of {each.suite}.",
        f"minutes: {lite.minutes:.1f}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{each.suite}-lite.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _minutes(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes:.0f} min ({minutes / 60:.1f} h)"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
