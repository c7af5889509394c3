"""Compare the scores of gteopt and of plain mteb on synthetic data, task by task.

    python benchmarks/agreement.py            # minutes; writes benchmarks/results/agreement.json

The data of real tasks are large. `synthetic_suite.py` writes a few texts for each task in the Hub's
layout. all-MiniLM-L6-v2 in float32 is scored on them by gteopt's runner, and by mteb's own loader
and evaluation. Only the difference of the scores means something, because the texts are made up. Up
to five tasks of each type are taken, the shortest names first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from model_folders import model_folder
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from reproduce import plain_scores
from results_files import conditions, write_results
from sentence_transformers import SentenceTransformer
from synthetic_suite import write_suite_data

import gteopt
from gteopt.evaluation.mteb_isolation import isolate_mteb
from gteopt.evaluation.runner import SuiteEncodeOptions, run_suite
from gteopt.evaluation.suites import Suite, SuiteTask, read_suite
from gteopt.evaluation.task_facts import read_task_facts
from gteopt.evaluation.tasks import resolve_tasks

FOLDER = Path(__file__).parent
SUITE = "mteb-en"
MOST_OF_A_TYPE = 5


def chosen_tasks(suite: Suite) -> list[SuiteTask]:
    """A few tasks of each type, without aggregates, whose parts are retrieval tasks anyway."""
    facts, by_kind = read_task_facts(), dict[str, list[SuiteTask]]()
    for task in sorted(suite.tasks, key=lambda task: (len(task.task), task.task)):
        task_facts = facts[task.task]
        if not task_facts.parts and len(by_kind.setdefault(task_facts.kind, [])) < MOST_OF_A_TYPE:
            by_kind[task_facts.kind].append(task)
    return [task for kind in sorted(by_kind) for task in by_kind[kind]]


def main() -> None:
    """Score each task both ways, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=FOLDER / "results" / "agreement.json")
    arguments = parser.parse_args()
    folder = model_folder("all-MiniLM-L6-v2")
    encoder = gteopt.load(folder, device="cpu", dtype="float32")
    plain = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), device="cpu"))
    facts, rows = read_task_facts(), []
    with tempfile.TemporaryDirectory(prefix="gteopt-agreement-") as scratch:
        hub_dir = Path(scratch)
        write_suite_data(SUITE, hub_dir)
        for task in chosen_tasks(read_suite(SUITE)):
            alone = Suite(schema="gteopt.suite/1", name="alone", tasks=(task,))
            run = run_suite(
                encoder, alone, hub_dir=hub_dir, options=SuiteEncodeOptions(dtype="float32")
            )
            assert not run.failed, run.failed
            with isolate_mteb(offline=True):
                (resolved,) = resolve_tasks(alone, hub_dir)
                theirs = plain_scores(plain, resolved)
            for score in run.scores:
                row = {
                    "task": score.task,
                    "kind": facts[score.task].kind,
                    "subset": score.subset,
                    "gteopt": score.score,
                    "plain_mteb": theirs[score.split, score.subset],
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    record = {
        "command": "python benchmarks/agreement.py",
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "rows": rows,
        **conditions({"mteb": version("mteb"), "dtype": "float32"}),
    }
    write_results(arguments.out, record)


if __name__ == "__main__":
    main()
