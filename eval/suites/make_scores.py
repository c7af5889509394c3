"""Make scores.json: what models score on the tasks of a suite, from the published results.

    python eval/suites/make_scores.py ../shared/reference

`gteopt evaluate --budget` chooses tasks by these scores. Half of the models choose the tasks, and
the other half shows the error of the choice. No organisation has models in both halves. The scores
come from the public repository embeddings-benchmark/results, in hundredths of a point.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mteb
from make import BENCHMARKS, LATER, published_scores, scores_of

FOLDER = Path(__file__).parent
SOURCE = "embeddings-benchmark/results, state of 2026-08-20"
SUITES = (*(benchmark.suite for benchmark in BENCHMARKS), "mteb-en-v2")


def main(reference: Path) -> None:
    """Write the file."""
    published = published_scores(reference / "mteb_scores.csv.gz")
    suites: dict[str, Any] = {}
    for benchmark in (*BENCHMARKS, *LATER):
        if benchmark.suite not in SUITES:
            continue
        tasks = {task.metadata.name: task for task in mteb.get_benchmark(benchmark.name).tasks}
        scores = scores_of(published, tasks)
        suites[benchmark.suite] = {
            "tasks": scores.tasks,
            "models": scores.models,
            "choosing": [int(is_training) for is_training in scores.in_training],
            "scores": [[round(10_000 * score) for score in row] for row in scores.values],
        }
    whole = {"schema": "gteopt.task-scores/1", "source": SOURCE, "suites": suites}
    text = json.dumps(whole, separators=(",", ":"))
    # One line per model, so that a diff shows which model changed.
    (FOLDER / "scores.json").write_text(text.replace("],[", "],\n[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
