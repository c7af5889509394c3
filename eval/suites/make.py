"""Make the benchmark suites and their lite versions.

    python eval/suites/make.py ../shared/reference

Writes the YAML files beside this script, and the tables of README.md between their markers. The
tasks of a benchmark come from the installed mteb. The tasks of a lite suite are chosen by published
scores.

A lite suite is the best of all subsets of a fixed size that cover every task type within a budget
of minutes. The best is the subset whose mean correlates best with the mean of the whole benchmark,
over half of the models. The search is exhaustive. The figures in README.md come from the other half
of the models, and no organisation has models in both halves.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import numpy.typing as npt
import yaml
from scipy.stats import spearmanr

from gteopt.config.yaml_files import list_shipped_names, read_yaml
from gteopt.evaluation.mini_tasks import MINI_TASKS
from gteopt.evaluation.suites import Suite, SuiteTask
from gteopt.evaluation.task_facts import read_task_facts, task_amount

FOLDER = Path(__file__).parent
TOKENS_PER_S = 36_000  # assumed for a 7B encoder in bf16 on one H200, with short and long texts
N_EXTRA = 2  # tasks of a lite suite besides one of each type
MAX_TASK_MINUTES = 5.0
MAX_SUBSETS = 200  # a task with more subsets (pairs of languages) has only their sums in tasks.json
LITE_MINUTES = {"mteb-en": 10.0, "c-mteb": 10.0, "mteb-fr": 10.0, "mteb-pl": 5.0}
MIN_MODELS = 40  # a task with scores of fewer models is left out of the predicted mean
_NOT_TEXT = {"no", "yes", "on", "off", "y", "n"}  # YAML 1.1 reads these words as true or false
_TEXT_FIELDS = (
    "text_statistics",
    "text1_statistics",
    "text2_statistics",
    "summaries_statistics",
    "sentence1_statistics",
    "sentence2_statistics",
)

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Benchmark:
    """One of mteb's benchmarks, and how its tasks differ from those of the average of 2024.

    Attributes:
        n_published: number of tasks in the average published in 2024.
        missing: tasks (with subset) of that average that mteb's definition lacks today.
        added: tasks of mteb's definition that are not in that average.
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
class Later:
    """A benchmark of mteb without an average that was published in 2024.

    Attributes:
        summary: summary of the suite; `{n}` is its number of tasks.
    """

    suite: str
    name: str
    summary: str


LATER = (
    Later("mteb-en-v2", "MTEB(eng, v2)", "MTEB in English, second version, {n} tasks"),
    Later("mteb-multi", "MTEB(Multilingual, v2)", "MTEB in over 250 languages, {n} tasks"),
    Later("rteb", "RTEB(beta)", "RTEB, retrieval in law, health, finance and code, {n} open tasks"),
)


@dataclass(frozen=True)
class Scores:
    """Published scores of the models that have every task.

    Attributes:
        tasks: tasks of the benchmark that enough models have.
        values: scores [models, tasks], 0 to 1.
        in_training: bool [models]; True for models of the training half.
    """

    models: list[str]
    tasks: list[str]
    values: Matrix
    in_training: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Lite:
    """A chosen subset; its figures are of models that were not used for the choice.

    Attributes:
        spread: standard deviation of the held-out models' full means, to compare `rmse` with.
        upper_spearman, upper_rmse: figures of the better half of the held-out models.
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
    """Write all suites, tasks.json and the tables of README.md."""
    published = published_scores(reference / "mteb_scores.csv.gz")
    suites, lites = [], []
    facts: dict[str, Any] = {}
    for benchmark in (*BENCHMARKS, *LATER):
        tasks = list(mteb.get_benchmark(benchmark.name).tasks)
        if isinstance(benchmark, Benchmark):
            tasks += tasks_of_2024(benchmark)
        for task in tasks:
            if task.metadata.is_public:
                _merge(facts, task)
    for name in list_shipped_names("eval/suites"):
        for entry in read_yaml(FOLDER / f"{name}.yaml", Suite).tasks:
            if entry.task not in facts and not entry.task.startswith("Mini"):
                _merge(facts, mteb.get_task(entry.task, eval_splits=list(entry.splits or ())))
    for task_class in MINI_TASKS.values():
        _merge_mini(facts, task_class())
    whole = {"schema": "gteopt.tasks/1", "mteb": mteb.__version__, "tasks": facts}
    lines = json.dumps(whole, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    # One line per task, so that a diff shows which task changed.
    (FOLDER / "tasks.json").write_text(lines.replace('},"', '},\n"') + "\n", encoding="utf-8")
    read_task_facts.cache_clear()
    for later in LATER:
        _write_later(later)
    for benchmark in BENCHMARKS:
        _write_2024(benchmark)
    for benchmark in BENCHMARKS:
        tasks = {task.metadata.name: task for task in mteb.get_benchmark(benchmark.name).tasks}
        minutes = {name: _task_minutes(task) for name, task in tasks.items()}
        scores = scores_of(published, tasks)
        lite = _choose(scores, tasks, minutes, LITE_MINUTES[benchmark.suite])
        _write(benchmark, list(tasks.values()), sum(minutes.values()))
        _write_lite(benchmark, [tasks[name] for name in lite.tasks], lite)
        types = len({task.metadata.type for task in tasks.values()})
        suites.append(
            f"| `{benchmark.suite}` | {benchmark.name} | {len(tasks)} | {types} | "
            f"{benchmark.n_published} | {_minutes(sum(minutes.values()))} |"
        )
        lites.append(
            f"| `{benchmark.suite}-lite` | {len(lite.tasks)} | {_minutes(lite.minutes)} | "
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


def tasks_of_2024(benchmark: Benchmark) -> list[Any]:
    """The tasks of the average of 2024, as the installed mteb defines them."""
    kept = [
        task
        for task in mteb.get_benchmark(benchmark.name).tasks
        if task.metadata.name not in benchmark.added
    ]
    for name in benchmark.missing:
        task, _, subset = name.removesuffix(")").partition(" (")
        whole = mteb.get_task(task)
        splits = [split for split in whole.eval_splits if split.startswith("test")]
        kept.append(
            mteb.get_task(task, hf_subsets=[subset] if subset else None, eval_splits=splits)
        )
    assert len(kept) == benchmark.n_published, benchmark.suite
    return kept


def published_scores(path: Path) -> dict[str, dict[tuple[str, str, str], float]]:
    """Scores by model and by (task, split, subset); a score that was run replaces a claimed one."""
    by_model: dict[str, dict[tuple[str, str, str], float]] = defaultdict(dict)
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        rows = sorted(csv.DictReader(handle), key=lambda row: row["revision"] != "external")
    for row in rows:  # a later row replaces an earlier one
        if row["main_score"] != "nan":
            key = (row["task"], row["split"], row["subset"])
            by_model[row["model"]][key] = float(row["main_score"])
    return by_model


def scores_of(
    published: dict[str, dict[tuple[str, str, str], float]], tasks: dict[str, Any]
) -> Scores:
    """Mean scores over splits and subsets, of the models that have all tasks."""
    table: dict[str, dict[str, float]] = {}
    for model, scores in published.items():
        of_task: dict[str, list[float]] = defaultdict(list)
        for (name, split, subset), score in scores.items():
            task = tasks.get(name)
            if task is not None and split in task.eval_splits and subset in task.hf_subsets:
                of_task[name].append(score)
        table[model] = {name: float(np.mean(values)) for name, values in of_task.items()}
    kept = [name for name in tasks if sum(name in row for row in table.values()) >= MIN_MODELS]
    models = sorted(model for model, row in table.items() if all(name in row for name in kept))
    return Scores(
        models=models,
        tasks=kept,
        values=np.array([[table[model][name] for name in kept] for model in models]),
        in_training=_in_training(models),
    )


def _in_training(models: list[str]) -> npt.NDArray[np.bool_]:
    """True for half of the models; all models of an organisation are in the same half."""
    organisation = [model.split("/")[0].lower() for model in models]
    n_models = Counter(organisation)
    sides: tuple[set[str], set[str]] = (set(), set())
    for largest in sorted(n_models, key=lambda name: (-n_models[name], name)):
        min(sides, key=lambda side: sum(n_models[name] for name in side)).add(largest)
    return np.array([name in sides[0] for name in organisation])


def _choose(
    scores: Scores, tasks: dict[str, Any], minutes: dict[str, float], budget: float
) -> Lite:
    """Try all subsets, and return the one whose mean correlates best with the full mean.

    C is the covariance of task scores, and c = C 1 / n is the covariance of each task with the full
    mean. The mean of a subset S correlates with the full mean at
    sum(c_S) / sqrt(sum(C_SS) var(full)), so a subset costs only a few sums. S has one task of each
    type and `N_EXTRA` = 2 others.
    """
    train = scores.values[scores.in_training]
    covariance = np.cov(train, rowvar=False)
    to_full = covariance.mean(axis=1)
    cost = np.array([minutes[name] for name in scores.tasks])
    types = [tasks[name].metadata.type for name in scores.tasks]
    allowed = [i for i in range(len(types)) if cost[i] <= MAX_TASK_MINUTES]
    of_type = [
        # If all tasks of a type are too long, its shortest task is used.
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


def _task_minutes(task: Any) -> float:
    """Minutes to encode a task's texts at the assumed rate."""
    entry = SuiteTask.model_validate(yaml.safe_load(_entry(task))[0])
    amount = task_amount(entry)
    assert amount is not None
    return amount.n_tokens / TOKENS_PER_S / 60


def _merge(facts: dict[str, Any], task: Any) -> None:
    """Add the facts of a task; its subsets and splits from several suites are merged."""
    metadata = task.metadata
    if hasattr(metadata, "tasks"):
        for part in metadata.tasks:
            _merge(facts, part)
        facts[metadata.name] = {
            "kind": metadata.type,
            "domains": sorted(domain.lower() for domain in metadata.domains or ()),
            "languages": {"default": _languages(metadata.languages)},
            "parts": [part.metadata.name for part in metadata.tasks],
        }
        return
    task_facts = facts.setdefault(
        metadata.name,
        {
            "kind": metadata.type,
            "data": metadata.dataset["path"],
            "domains": sorted(domain.lower() for domain in metadata.domains or ()),
            "languages": {},
            "sizes": {},
        },
    )
    by_subset = metadata.hf_subsets_to_langscripts
    all_stats = metadata.descriptive_stats or {}
    sizes = {
        split: {subset: _size(task, all_stats.get(split, {}), subset) for subset in task.hf_subsets}
        for split in task.eval_splits
    }
    languages = {subset: _languages(by_subset[subset]) for subset in task.hf_subsets}
    if len(languages) > MAX_SUBSETS:
        languages = {"*": sorted({code for codes in languages.values() for code in codes})}
        sizes = {
            split: {"*": _total(subset_sizes.values())} for split, subset_sizes in sizes.items()
        }
    task_facts["languages"] |= languages
    for split, subset_sizes in sizes.items():
        task_facts["sizes"].setdefault(split, {}).update(subset_sizes)


def _merge_mini(facts: dict[str, Any], task: Any) -> None:
    """Add the facts of a task of the mini set, whose texts are counted."""
    task.load_data()
    sizes: dict[str, dict[str, int]] = {}
    for subset in task.hf_subsets:
        data = task.dataset.get(subset, task.dataset)
        counted: Counter[str] = Counter()
        for split in data.values():
            is_search = isinstance(split, dict)
            rows = [*split["corpus"]] if is_search else []
            counted["n_documents"] += len(rows)
            counted["n_document_characters"] += sum(len(row["text"]) for row in rows)
            rows = split["queries"] if is_search else split
            texts = {
                text
                for row in rows
                for name, text in row.items()
                if name in ("text", "sentence1", "sentence2", "sentences")
            }
            counted["n_texts"] += len(texts)
            counted["n_characters"] += sum(map(len, texts))
        sizes[subset] = {name: n for name, n in counted.items() if n}
    by_subset = task.metadata.hf_subsets_to_langscripts
    facts[task.metadata.name] = {
        "kind": task.metadata.type,
        "languages": {subset: _languages(by_subset[subset]) for subset in task.hf_subsets},
        "sizes": {"test": sizes},
    }


def _languages(codes: Any) -> list[str]:
    return sorted({code.partition("-")[0] for code in codes})


def _total(sizes: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for size in sizes:
        total.update(size)
    return dict(total)


def _size(task: Any, whole: dict[str, Any], subset: str) -> dict[str, int]:
    """Numbers of distinct texts and of characters, from mteb's statistics of a split."""
    metadata = task.metadata
    size = {"n_texts": 0, "n_characters": 0, "n_documents": 0, "n_document_characters": 0}
    stats = whole.get("hf_subset_descriptive_stats", {}).get(subset, whole)
    for field, text in stats.items():
        if not text or not field.endswith(_TEXT_FIELDS):
            continue
        average, n = text["average_text_length"], text["unique_texts"]
        keys = ("n_documents", "n_document_characters")
        if not field.startswith("documents"):
            keys = ("n_texts", "n_characters")
            if metadata.type == "Classification":
                labels = stats["label_statistics"]["unique_labels"]
                # Ten training sets; texts that they repeat are counted again.
                n += task.n_experiments * task.samples_per_label * labels
        size[keys[0]] += n
        size[keys[1]] += round(average * n)
    return {name: n for name, n in size.items() if n}


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
    if list(task.hf_subsets) != ["default"] and len(task.hf_subsets) <= MAX_SUBSETS:
        subsets = ", ".join(f'"{name}"' if name in _NOT_TEXT else name for name in task.hf_subsets)
        fields.append(f"subsets: [{subsets}]")
    fields.append(f"splits: [{', '.join(task.eval_splits)}]")
    fields.append(f'revision: "{metadata.dataset["revision"]}"')
    return f"  - {{{', '.join(fields)}}}"


def _write(benchmark: Benchmark, tasks: list[Any], minutes: float) -> None:
    lines = [
        f"# Made by eval/suites/make.py from mteb {mteb.__version__}'s {benchmark.name}.",
        "schema: gteopt.suite/1",
        f"name: {benchmark.suite}",
        f"summary: MTEB in {benchmark.title}, {len(tasks)} tasks ({benchmark.name}).",
        f"minutes: {minutes:.0f}",
        "# The averages published in 2024 differ from this benchmark by these tasks.",
        f"published: {{n_tasks: {benchmark.n_published}, missing: {json.dumps(benchmark.missing)}, "
        f"added: {json.dumps(benchmark.added)}}}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{benchmark.suite}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_2024(benchmark: Benchmark) -> None:
    """Write the suite of the average of 2024, if mteb's definition differs from it today."""
    if not benchmark.missing and not benchmark.added:
        return
    tasks = tasks_of_2024(benchmark)
    minutes = sum(_task_minutes(task) for task in tasks)
    lines = [
        f"# Made by eval/suites/make.py from mteb {mteb.__version__}'s tasks.",
        "schema: gteopt.suite/1",
        f"name: {benchmark.suite}-2024",
        f"summary: MTEB in {benchmark.title}, the {len(tasks)} tasks of the averages published in "
        "2024.",
        f"minutes: {minutes:.0f}",
        f"published: {{n_tasks: {benchmark.n_published}}}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{benchmark.suite}-2024.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_later(benchmark: Later) -> None:
    tasks = [task for task in mteb.get_benchmark(benchmark.name).tasks if task.metadata.is_public]
    minutes = sum(_task_minutes(task) for task in tasks)
    lines = [
        f"# Made by eval/suites/make.py from mteb {mteb.__version__}'s {benchmark.name}.",
        "schema: gteopt.suite/1",
        f"name: {benchmark.suite}",
        f"summary: {benchmark.summary.format(n=len(tasks))} ({benchmark.name}).",
        f"minutes: {minutes:.0f}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{benchmark.suite}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_lite(benchmark: Benchmark, tasks: list[Any], lite: Lite) -> None:
    lines = [
        f"# Made by eval/suites/make.py: the best of {lite.n_subsets:,} subsets; see README.md.",
        "schema: gteopt.suite/1",
        f"name: {benchmark.suite}-lite",
        f"summary: {len(tasks)} short tasks whose mean predicts that of {benchmark.suite}.",
        f"minutes: {lite.minutes:.1f}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{benchmark.suite}-lite.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _minutes(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes:.0f} min ({minutes / 60:.1f} h)"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
