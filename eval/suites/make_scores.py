"""Make scores.json: what models score on the tasks of a suite, from the published results.

    python eval/suites/make_scores.py ../shared/reference

`gteopt evaluate --budget` chooses tasks by it. Half of the models choose, the others say how far
off the choice is; no organisation has models in both halves. The scores are figures of the public
repository embeddings-benchmark/results, in hundredths of a point.
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
SUITES = (*(each.suite for each in BENCHMARKS), "mteb-en-v2")


def main(reference: Path) -> None:
    """Write the file."""
    published = published_scores(reference / "mteb_scores.csv.gz")
    suites: dict[str, Any] = {}
    for each in (*BENCHMARKS, *LATER):
        if each.suite not in SUITES:
            continue
        tasks = {task.metadata.name: task for task in mteb.get_benchmark(each.name).tasks}
        found = scores_of(published, tasks)
        suites[each.suite] = {
            "tasks": found.tasks,
            "models": found.models,
            "choosing": [int(own) for own in found.in_training],
            "scores": [[round(10_000 * score) for score in row] for row in found.values],
        }
    whole = {"schema": "gteopt.task-scores/1", "source": SOURCE, "suites": suites}
    text = json.dumps(whole, separators=(",", ":"))
    # A line a model, so that a change shows as one.
    (FOLDER / "scores.json").write_text(text.replace("],[", "],\n[") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
