"""A whole suite on synthetic data: does it end with an interval, and does a policy pick?

    python benchmarks/synthetic_suite.py            # benchmarks/results/synthetic_suite.json
    python benchmarks/synthetic_suite.py --suite mteb-fr

Writes every data set of the suite in the Hub's layout, a few texts each, scores the embedded model
and its rtn-int8 variant on all of them with plain `gteopt run`, and says how many tasks have a
score, an interval and entries that make mteb's own score. Scores of such data mean nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gteopt.commands.run import run
from gteopt.config.plan import Plan
from gteopt.evaluation.suites import SuiteTask, read_suite
from gteopt.evaluation.task_facts import TaskFacts, read_task_facts
from gteopt.machine import machine, versions
from gteopt.progress import quiet

FOLDER = Path(__file__).parent
SUBJECTS = [
    "rivers",
    "engines",
    "bread",
    "violins",
    "glaciers",
    "taxes",
    "bees",
    "castles",
    "vaccines",
    "sails",
]
DETAILS = [
    "old",
    "new",
    "broken",
    "small",
    "famous",
    "cheap",
    "quiet",
    "heavy",
    "bright",
    "lost",
    "wooden",
    "early",
]
N_PAIRS, N_QUERIES, N_DOCUMENTS, N_LABELLED = 40, 14, 40, 36

Rows = list[dict[str, Any]]
Configs = dict[str, dict[str, Rows]]
"""Rows by config, then split."""


class Texts:
    """Seeded sentences on a few subjects."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def on(self, subject: int) -> str:
        """A sentence on one subject."""
        words = " ".join(self.rng.choice(DETAILS, 3))
        return f"{words} {SUBJECTS[subject % len(SUBJECTS)]} number {self.rng.integers(1000)}"

    def any(self) -> tuple[int, str]:
        """A subject and a sentence on it."""
        subject = int(self.rng.integers(len(SUBJECTS)))
        return subject, self.on(subject)


def similar(task: Any, texts: Texts) -> Rows:
    """Pairs with a grade: of one subject or of two."""
    first, second = task.column_names
    rows: Rows = []
    for _ in range(N_PAIRS):
        a, b = texts.any(), texts.any()
        grade = 4.0 * (a[0] == b[0]) + float(texts.rng.random())
        rows.append({first: a[1], second: b[1], "score": grade})
    return rows


def classified(task: Any, texts: Texts) -> Rows:
    """Texts labelled by their subject."""
    rows = []
    for number in range(N_LABELLED):
        label = number % 3
        rows.append({task.input_column_name: texts.on(label), task.label_column_name: label})
    return rows


def clustered(task: Any, texts: Texts) -> Rows:
    """Three sets of texts with their subjects."""
    rows = []
    for _ in range(3):
        labels = [number % 4 for number in range(24)]
        sentences = [texts.on(label) for label in labels]
        rows.append({task.input_column_name: sentences, task.label_column_name: labels})
    return rows


def paired(task: Any, texts: Texts) -> Rows:
    """All pairs in one row, as these data sets have them."""
    labels = [number % 2 for number in range(N_PAIRS)]
    first = [texts.any() for _ in labels]
    second = [texts.on(a[0] + 1 - label) for a, label in zip(first, labels, strict=True)]
    return [{"sent1": [text for _, text in first], "sent2": second, "labels": labels}]


def summarized(task: Any, texts: Texts) -> Rows:
    """Texts with summaries of people and of machines, and grades of the latter."""
    rows = []
    for number in range(12):
        rows.append(
            {
                "text": texts.on(number),
                "human_summaries": [texts.on(number) for _ in range(3)],
                "machine_summaries": [texts.on(number + shift) for shift in range(5)],
                "relevance": [float(each) for each in texts.rng.uniform(1, 5, 5)],
            }
        )
    return rows


def searched(texts: Texts, split: str, *, reranks: bool, n_wordings: int) -> Configs:
    """A corpus, queries and which documents answer them; candidates where a task reranks.

    Several wordings of one query have ids of one stem ("q3_0", "q3_1") and the same answers.
    """
    documents = [texts.any() for _ in range(N_DOCUMENTS)]
    asked = [texts.any() for _ in range(N_QUERIES)]
    queries: list[tuple[str, str]] = []
    judged: Rows = []
    for i, (wanted, text) in enumerate(asked):
        others = [texts.on(wanted) for _ in range(n_wordings - 1)]
        ids = [f"q{i}" if n_wordings == 1 else f"q{i}_{each}" for each in range(n_wordings)]
        queries += zip(ids, [text, *others], strict=True)
        judged += [
            {"query-id": each, "corpus-id": f"d{j}", "score": 1}
            for each in ids
            for j, (subject, _) in enumerate(documents)
            if subject == wanted or j == i
        ]
    rows = [{"_id": f"d{j}", "title": "", "text": text} for j, (_, text) in enumerate(documents)]
    found: Configs = {
        "corpus": {"corpus": rows},
        "queries": {"queries": [{"_id": each, "text": text} for each, text in queries]},
        "default": {split: judged},
    }
    if reranks:
        every = [f"d{j}" for j in range(N_DOCUMENTS)]
        ranked = [{"query-id": each, "corpus-ids": every} for each, _ in queries]
        found["top_ranked"] = {split: ranked}
    return found


BY_KIND: dict[str, Callable[[Any, Texts], Rows]] = {
    "STS": similar,
    "Classification": classified,
    "Clustering": clustered,
    "PairClassification": paired,
    "Summarization": summarized,
}


def configs_of(task: Any, facts: TaskFacts, entry: SuiteTask, texts: Texts) -> Configs:
    """The rows of a task's data set."""
    (split,) = (entry.splits or ("test",))[:1]
    if facts.kind in ("Retrieval", "Reranking"):
        merges = task.metadata.main_score.startswith("max_over_subqueries")
        return searched(
            texts, split, reranks=facts.kind == "Reranking", n_wordings=2 if merges else 1
        )
    make = BY_KIND[facts.kind]
    splits = [*(entry.splits or ("test",))]
    if facts.kind == "Classification":
        splits = ["train", *splits]
    subsets = entry.subsets or ("default",)
    if getattr(task, "fast_loading", False):  # all subsets in one table, with their names
        named = [(subset, each) for subset in subsets for each in splits]
        rows = {
            (subset, each): [{**row, "lang": subset} for row in make(task, texts)]
            for subset, each in named
        }
        return {
            "default": {
                each: [row for subset in subsets for row in rows[subset, each]] for each in splits
            }
        }
    return {subset: {each: make(task, texts) for each in splits} for subset in subsets}


def write_data(folder: Path, configs: Configs) -> None:
    """One JSON file a config and split, and a card that names them, as on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            name = f"{config}-{split}.jsonl"
            (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            card.append(f"  - {{split: {split}, path: {name}}}")
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def write_suite_data(suite_name: str, hub_dir: Path) -> int:
    """Data for every task of a suite; returns how many data sets that are."""
    import mteb

    facts = read_task_facts()
    by_folder: dict[str, Configs] = {}
    for entry in read_suite(suite_name).tasks:
        names = facts[entry.task].parts or (entry.task,)
        for name in names:
            task = mteb.get_task(name, hf_subsets=list(entry.subsets or ()) or None)
            texts = Texts(len(by_folder))
            own = configs_of(task, facts[name], entry, texts)
            by_folder.setdefault(facts[name].data, {}).update(own)
    for data, configs in by_folder.items():
        write_data(hub_dir / data, configs)
    return len(by_folder)


def main() -> None:
    """Score, choose, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="mteb-en")
    parser.add_argument("--out", type=Path, default=FOLDER / "results" / "synthetic_suite.json")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gteopt-synthetic-") as scratch:
        hub_dir, out = Path(scratch, "hub"), Path(scratch, "results")
        n_data = write_suite_data(arguments.suite, hub_dir)
        plan = Plan.model_validate(
            {
                "schema": "gteopt.plan/1",
                "name": "synthetic",
                "base": "nano",
                "recipes": ["rtn-int8"],
                "suite": arguments.suite,
                "policy": "balanced",
                "out": out,
                "bench": {
                    "n_queries": 10,
                    "workloads": [{"batch_size": 8, "tokens": 32}],
                    "repeats": 1,
                },
            }
        )
        results = run(
            plan, beside=Path(scratch), hub_dir=hub_dir, device="cpu", workers=None, progress=quiet
        )
    report = results.evals["rtn-int8"]
    choice = results.choice
    assert choice is not None
    kinds = Counter(task.task_type for task in report.tasks)
    record = {
        "command": f"python benchmarks/synthetic_suite.py --suite {arguments.suite}",
        "suite": report.suite,
        "n_data_sets": n_data,
        "n_tasks": len({task.task for task in report.tasks}),
        "n_rows_by_kind": dict(sorted(kinds.items())),
        "failed": [failed.model_dump() for failed in report.failed],
        "n_interval_tasks": report.n_interval_tasks,
        "without_interval": {
            task.task: task.no_interval for task in report.tasks if task.no_interval
        },
        "difference": None if report.difference is None else report.difference.model_dump(),
        "retention": [report.retention_low, report.retention, report.retention_high],
        "picked": choice.picked,
        "reason": choice.reason,
        "seconds": round(time.monotonic() - started),
        "note": "two cores shared with other work",
        "machine": machine().model_dump(),
        "versions": {**versions(), "mteb": version("mteb"), "datasets": version("datasets")},
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: record[name] for name in ("n_tasks", "failed", "picked", "reason")}))


if __name__ == "__main__":
    main()
