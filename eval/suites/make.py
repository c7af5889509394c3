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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import numpy.typing as npt
import yaml
from scipy.stats import spearmanr

from gteopt.config.yaml_files import read_yaml, shipped_names
from gteopt.evaluation.mini_tasks import MINI_TASKS
from gteopt.evaluation.suites import Suite, SuiteTask
from gteopt.evaluation.task_facts import amount_of, read_task_facts

FOLDER = Path(__file__).parent
TOKENS_PER_S = 36_000  # assumed: a 7B encoder in bf16 on one H200, short and long texts mixed
N_EXTRA = 2  # tasks of a lite suite beyond one of each type
MAX_TASK_MINUTES = 5.0
MAX_SUBSETS = 200  # of a task with more (41,412 pairs of languages), only the sums are kept
LITE_MINUTES = {"mteb-en": 10.0, "c-mteb": 10.0, "mteb-fr": 10.0, "mteb-pl": 5.0}
MIN_MODELS = 40  # a task with fewer scores is left out of the mean that is predicted
_NOT_TEXT = {"no", "yes", "on", "off", "y", "n"}  # YAML 1.1 reads them as truth values
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
class Later:
    """A benchmark of mteb's that no average of 2024 was published for.

    Attributes:
        summary: what the suite lists; `{n}` is its number of tasks.
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
    published = published_scores(reference / "mteb_scores.csv.gz")
    suites, lites = [], []
    facts: dict[str, Any] = {}
    for each in (*BENCHMARKS, *LATER):
        tasks = list(mteb.get_benchmark(each.name).tasks)
        if isinstance(each, Benchmark):
            tasks += tasks_of_2024(each)
        for task in tasks:
            if task.metadata.is_public:
                _merge(facts, task)
    for name in shipped_names("eval/suites"):
        for entry in read_yaml(FOLDER / f"{name}.yaml", Suite).tasks:
            if entry.task not in facts and not entry.task.startswith("Mini"):
                _merge(facts, mteb.get_task(entry.task, eval_splits=list(entry.splits or ())))
    for task_class in MINI_TASKS.values():
        _merge_mini(facts, task_class())
    whole = {"schema": "gteopt.tasks/1", "mteb": mteb.__version__, "tasks": facts}
    lines = json.dumps(whole, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    # A line a task, so that a change shows as one.
    (FOLDER / "tasks.json").write_text(lines.replace('},"', '},\n"') + "\n", encoding="utf-8")
    read_task_facts.cache_clear()
    for later in LATER:
        _write_later(later)
    for each in BENCHMARKS:
        _write_2024(each)
    for each in BENCHMARKS:
        tasks = {task.metadata.name: task for task in mteb.get_benchmark(each.name).tasks}
        minutes = {name: _task_minutes(task) for name, task in tasks.items()}
        scores = scores_of(published, tasks)
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


def tasks_of_2024(each: Benchmark) -> list[Any]:
    """The tasks that the average of 2024 is over, as the installed mteb has them."""
    kept = [
        task for task in mteb.get_benchmark(each.name).tasks if task.metadata.name not in each.added
    ]
    for name in each.missing:
        task, _, subset = name.removesuffix(")").partition(" (")
        whole = mteb.get_task(task)
        splits = [split for split in whole.eval_splits if split.startswith("test")]
        kept.append(
            mteb.get_task(task, hf_subsets=[subset] if subset else None, eval_splits=splits)
        )
    assert len(kept) == each.n_published, each.suite
    return kept


def published_scores(path: Path) -> dict[str, dict[tuple[str, str, str], float]]:
    """Score by model, then task, split and subset; a score that was run before a claimed one."""
    found: dict[str, dict[tuple[str, str, str], float]] = defaultdict(dict)
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        rows = sorted(csv.DictReader(handle), key=lambda row: row["revision"] != "external")
    for row in rows:  # later rows win
        if row["main_score"] != "nan":
            key = (row["task"], row["split"], row["subset"])
            found[row["model"]][key] = float(row["main_score"])
    return found


def scores_of(
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


def _task_minutes(task: Any) -> float:
    """Minutes that encoding a task's texts takes, at the assumed rate."""
    entry = SuiteTask.model_validate(yaml.safe_load(_entry(task))[0])
    amount = amount_of(entry)
    assert amount is not None
    return amount.n_tokens / TOKENS_PER_S / 60


def _merge(facts: dict[str, Any], task: Any) -> None:
    """Add a task's facts; subsets and splits add up over the suites that have it."""
    metadata = task.metadata
    if hasattr(metadata, "tasks"):
        for part in metadata.tasks:
            _merge(facts, part)
        facts[metadata.name] = {
            "kind": metadata.type,
            "domains": sorted(each.lower() for each in metadata.domains or ()),
            "languages": {"default": _languages(metadata.languages)},
            "parts": [part.metadata.name for part in metadata.tasks],
        }
        return
    found = facts.setdefault(
        metadata.name,
        {
            "kind": metadata.type,
            "data": metadata.dataset["path"],
            "domains": sorted(each.lower() for each in metadata.domains or ()),
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
        sizes = {split: {"*": _total(each.values())} for split, each in sizes.items()}
    found["languages"] |= languages
    for split, own in sizes.items():
        found["sizes"].setdefault(split, {}).update(own)


def _merge_mini(facts: dict[str, Any], task: Any) -> None:
    """Add a task of the mini set, whose texts are here to be counted."""
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
    for each in sizes:
        total.update(each)
    return dict(total)


def _size(task: Any, whole: dict[str, Any], subset: str) -> dict[str, int]:
    """Distinct texts and characters of a subset, from mteb's descriptive statistics of a split."""
    metadata = task.metadata
    size = {"n_texts": 0, "n_characters": 0, "n_documents": 0, "n_document_characters": 0}
    stats = whole.get("hf_subset_descriptive_stats", {}).get(subset, whole)
    for field, text in stats.items():
        if not text or not field.endswith(_TEXT_FIELDS):
            continue
        average, n = text["average_text_length"], text["unique_texts"]
        what = ("n_documents", "n_document_characters")
        if not field.startswith("documents"):
            what = ("n_texts", "n_characters")
            if metadata.type == "Classification":
                labels = stats["label_statistics"]["unique_labels"]
                # Ten training sets, which repeat texts; not counted less for that.
                n += task.n_experiments * task.samples_per_label * labels
        size[what[0]] += n
        size[what[1]] += round(average * n)
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
        subsets = ", ".join(f'"{each}"' if each in _NOT_TEXT else each for each in task.hf_subsets)
        fields.append(f"subsets: [{subsets}]")
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


def _write_2024(each: Benchmark) -> None:
    """The list of 2024, where mteb's definition has moved since."""
    if not each.missing and not each.added:
        return
    tasks = tasks_of_2024(each)
    minutes = sum(_task_minutes(task) for task in tasks)
    lines = [
        f"# Made by eval/suites/make.py from mteb {mteb.__version__}'s tasks.",
        "schema: gteopt.suite/1",
        f"name: {each.suite}-2024",
        f"summary: MTEB in {each.title}, the {len(tasks)} tasks of the averages published in 2024.",
        f"minutes: {minutes:.0f}",
        f"published: {{n_tasks: {each.n_published}}}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{each.suite}-2024.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_later(each: Later) -> None:
    tasks = [task for task in mteb.get_benchmark(each.name).tasks if task.metadata.is_public]
    minutes = sum(_task_minutes(task) for task in tasks)
    lines = [
        f"# Made by eval/suites/make.py from mteb {mteb.__version__}'s {each.name}.",
        "schema: gteopt.suite/1",
        f"name: {each.suite}",
        f"summary: {each.summary.format(n=len(tasks))} ({each.name}).",
        f"minutes: {minutes:.0f}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{each.suite}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_lite(each: Benchmark, tasks: list[Any], lite: Lite) -> None:
    lines = [
        f"# Made by eval/suites/make.py: the best of {lite.n_subsets:,} subsets; see README.md.",
        "schema: gteopt.suite/1",
        f"name: {each.suite}-lite",
        f"summary: {len(tasks)} short tasks whose mean predicts that of {each.suite}.",
        f"minutes: {lite.minutes:.1f}",
        "tasks:",
        *(_entry(task) for task in tasks),
    ]
    (FOLDER / f"{each.suite}-lite.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _minutes(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes:.0f} min ({minutes / 60:.1f} h)"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
