"""Faulty data are named before anything is encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gteopt.errors import InputError
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_task_data, resolve_tasks

Rows = list[dict[str, Any]]
PAIRS: Rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": float(i)} for i in range(4)]
NAN: Rows = [*PAIRS[:3], {**PAIRS[3], "score": float("nan")}]
SAME: Rows = [{**row, "score": 2.0} for row in PAIRS]
RENAMED: Rows = [{"first": "a", "second": "b", "score": 1.0}] * 3
INTENTS: Rows = [{"text": f"text {i}", "label": i % 2} for i in range(20)]
ONE_CLASS: Rows = [{**row, "label": 3} for row in INTENTS]
NO_POSITIVE: Rows = [{"sent1": ["a", "b"], "sent2": ["c", "d"], "labels": [0, 0]}]
DOCUMENTS: Rows = [{"_id": "d1", "title": "", "text": "one"}]
QUERIES: Rows = [{"_id": "q1", "text": "which"}]
JUDGED: Rows = [{"query-id": "q1", "corpus-id": "d1", "score": 0}]


def write(folder: Path, configs: dict[str, dict[str, Rows]]) -> None:
    folder.mkdir(parents=True)
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = folder / f"{config}-{split}.jsonl"
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            card.append(f"  - {{split: {split}, path: {path.name}}}")
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


@pytest.mark.parametrize(
    ("task", "data", "configs", "expected"),
    [
        (
            "STSBenchmark",
            "mteb/stsbenchmark-sts",
            {"default": {"test": RENAMED}},
            "has the columns first, second, score; mteb expects sentence1, sentence2, score",
        ),
        (
            "STSBenchmark",
            "mteb/stsbenchmark-sts",
            {"default": {"test": NAN}},
            "1 of 4 scores are not finite numbers",
        ),
        (
            "STSBenchmark",
            "mteb/stsbenchmark-sts",
            {"default": {"test": SAME}},
            "every score is 2; a rank correlation needs different scores",
        ),
        (
            "STSBenchmark",
            "mteb/stsbenchmark-sts",
            {"default": {"validation": PAIRS}},
            "has no split 'test' of subset 'default'",
        ),
        (
            "Banking77Classification",
            "mteb/banking77",
            {"default": {"train": ONE_CLASS, "test": INTENTS}},
            "every label is 3; at least two classes are needed",
        ),
        (
            "Banking77Classification",
            "mteb/banking77",
            {"default": {"test": INTENTS}},
            "has no split 'train' to train the classifier on",
        ),
        (
            "SprintDuplicateQuestions",
            "mteb/sprintduplicatequestions-pairclassification",
            {"default": {"test": NO_POSITIVE}},
            "every label is 0; at least two classes are needed",
        ),
        (
            "NFCorpus",
            "mteb/nfcorpus",
            {
                "corpus": {"corpus": DOCUMENTS},
                "queries": {"queries": QUERIES},
                "default": {"test": JUDGED},
            },
            "judges no document as relevant for any query",
        ),
    ],
)
def test_each_fault_of_the_data_is_named(
    task: str, data: str, configs: dict[str, dict[str, Rows]], expected: str, tmp_path: Path
) -> None:
    write(tmp_path / data, configs)
    entry = {"task": task, "splits": ["test"]}
    suite = Suite.model_validate({"schema": "gteopt.suite/1", "name": "test", "tasks": [entry]})
    with pytest.raises(InputError) as caught:
        load_task_data(resolve_tasks(suite, tmp_path))
    assert expected in str(caught.value)
    assert str(tmp_path / data) in str(caught.value)
