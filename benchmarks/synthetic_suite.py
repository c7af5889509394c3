"""Score a whole suite on synthetic data, to see its intervals and what a policy picks.

    python benchmarks/synthetic_suite.py    # writes benchmarks/results/synthetic_suite.json
    python benchmarks/synthetic_suite.py --suite mteb-fr

Writes each data set of the suite in the Hub's layout, with a few texts. Scores the embedded model
and its rtn-int8 variant on all data sets, like `gteopt run`. Counts the tasks with a score and with
an interval. The scores mean nothing, because the texts are made up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from results_files import conditions, write_results

from gteopt.commands.run import run
from gteopt.config.plan import Plan
from gteopt.evaluation.suites import SuiteTask, read_suite
from gteopt.evaluation.task_facts import TaskFacts, read_task_facts
from gteopt.progress import ignore_progress
from gteopt.speed.clock import Stopwatch

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
"""Rows by config, then by split."""


class Texts:
    """Random sentences on a few subjects."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def on(self, subject: int) -> str:
        """A sentence on a subject."""
        words = " ".join(self.rng.choice(DETAILS, 3))
        return f"{words} {SUBJECTS[subject % len(SUBJECTS)]} number {self.rng.integers(1000)}"

    def any(self) -> tuple[int, str]:
        """A random subject and a sentence on it."""
        subject = int(self.rng.integers(len(SUBJECTS)))
        return subject, self.on(subject)


def similar(task: Any, texts: Texts) -> Rows:
    """Pairs of sentences; pairs on the same subject have high grades."""
    first, second = task.column_names
    rows: Rows = []
    for _ in range(N_PAIRS):
        a, b = texts.any(), texts.any()
        grade = 4.0 * (a[0] == b[0]) + float(texts.rng.random())
        rows.append({first: a[1], second: b[1], "score": grade})
    return rows


def classified(task: Any, texts: Texts) -> Rows:
    """Texts whose label is their subject."""
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
    """All pairs in one row, which is the layout of these data sets."""
    labels = [number % 2 for number in range(N_PAIRS)]
    first = [texts.any() for _ in labels]
    second = [texts.on(a[0] + 1 - label) for a, label in zip(first, labels, strict=True)]
    return [{"sent1": [text for _, text in first], "sent2": second, "labels": labels}]


def summarized(task: Any, texts: Texts) -> Rows:
    """Texts with human and machine summaries, and grades of the machine summaries."""
    rows = []
    for number in range(12):
        rows.append(
            {
                "text": texts.on(number),
                "human_summaries": [texts.on(number) for _ in range(3)],
                "machine_summaries": [texts.on(number + shift) for shift in range(5)],
                "relevance": [float(grade) for grade in texts.rng.uniform(1, 5, 5)],
            }
        )
    return rows


def searched(texts: Texts, split: str, *, reranks: bool, n_wordings: int) -> Configs:
    """A corpus, queries and judgements; candidates too if the task reranks.

    All wordings of a query have the same answers, and ids like "q3_0" and "q3_1".
    """
    documents = [texts.any() for _ in range(N_DOCUMENTS)]
    subjects_and_queries = [texts.any() for _ in range(N_QUERIES)]
    queries: list[tuple[str, str]] = []
    judged: Rows = []
    for i, (query_subject, text) in enumerate(subjects_and_queries):
        other_wordings = [texts.on(query_subject) for _ in range(n_wordings - 1)]
        ids = [f"q{i}" if n_wordings == 1 else f"q{i}_{number}" for number in range(n_wordings)]
        queries += zip(ids, [text, *other_wordings], strict=True)
        judged += [
            {"query-id": query_id, "corpus-id": f"d{j}", "score": 1}
            for query_id in ids
            for j, (subject, _) in enumerate(documents)
            if subject == query_subject or j == i
        ]
    rows = [{"_id": f"d{j}", "title": "", "text": text} for j, (_, text) in enumerate(documents)]
    configs: Configs = {
        "corpus": {"corpus": rows},
        "queries": {"queries": [{"_id": query_id, "text": text} for query_id, text in queries]},
        "default": {split: judged},
    }
    if reranks:
        all_documents = [f"d{j}" for j in range(N_DOCUMENTS)]
        ranked = [{"query-id": query_id, "corpus-ids": all_documents} for query_id, _ in queries]
        configs["top_ranked"] = {split: ranked}
    return configs


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
    if getattr(task, "fast_loading", False):  # one table has all subsets, with their names
        rows = {
            (subset, name): [{**row, "lang": subset} for row in make(task, texts)]
            for subset in subsets
            for name in splits
        }
        return {
            "default": {
                name: [row for subset in subsets for row in rows[subset, name]] for name in splits
            }
        }
    return {subset: {name: make(task, texts) for name in splits} for subset in subsets}


def write_data(folder: Path, configs: Configs) -> None:
    """Write a JSON file for each config and split, and a card that names the files."""
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
    """Write data for every task of a suite; returns the number of data sets."""
    import mteb

    facts = read_task_facts()
    by_folder: dict[str, Configs] = {}
    for entry in read_suite(suite_name).tasks:
        names = facts[entry.task].parts or (entry.task,)
        for name in names:
            task = mteb.get_task(name, hf_subsets=list(entry.subsets or ()) or None)
            texts = Texts(len(by_folder))
            configs = configs_of(task, facts[name], entry, texts)
            by_folder.setdefault(facts[name].data, {}).update(configs)
    for data, configs in by_folder.items():
        write_data(hub_dir / data, configs)
    return len(by_folder)


def main() -> None:
    """Score, choose, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="mteb-en")
    parser.add_argument("--out", type=Path, default=FOLDER / "results" / "synthetic_suite.json")
    arguments = parser.parse_args()
    watch = Stopwatch()
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
            plan,
            beside=Path(scratch),
            hub_dir=hub_dir,
            device="cpu",
            workers=None,
            progress=ignore_progress,
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
        "seconds": round(watch.wall_s),
        "note": "two cores shared with other work",
        **conditions({"mteb": version("mteb"), "datasets": version("datasets")}),
    }
    write_results(arguments.out, record)
    print(json.dumps({name: record[name] for name in ("n_tasks", "failed", "picked", "reason")}))


if __name__ == "__main__":
    main()
