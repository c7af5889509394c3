"""Compare a model's scores by our runner, by plain mteb on the same data, and as published.

    python benchmarks/reproduce.py --hub-dir ../shared/hub

The model is all-MiniLM-L6-v2 in float32, as it was published, from the test extra. The suite is
`offline`. Plain mteb uses its own loader of Sentence Transformers and its own evaluation. Both run
in this process without a cache. The rows of a task are written together, with their machine and
versions. `--tasks` names the tasks to measure; the file keeps its rows of other tasks.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mteb
import torch
from model_folders import model_folder
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from pydantic import Field
from sentence_transformers import SentenceTransformer

import gteopt
from gteopt.evaluation.mteb_isolation import isolate_mteb
from gteopt.evaluation.reference import find_reference
from gteopt.evaluation.runner import SuiteEncodeOptions, run_suite
from gteopt.evaluation.tasks import ResolvedTask, load_suite, resolve_tasks
from gteopt.frozen import Frozen
from gteopt.machine import describe_machine, read_library_versions
from gteopt.records.environment import Conditions, MachineRecord
from gteopt.records.files import read_record, write_record

RESULTS = Path(__file__).parent / "results" / "reproduce.json"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BATCH_SIZE = 32
WHY = {
    "LCQMC": "the folder has its first 4,000 of 12,500 pairs",
    "EightTagsClustering": "the folder has 4,372 of 49,373 sentences",
}
"""Why the score of a task differs from the published score."""


class Row(Frozen):
    """One task and subset; scores 0 to 1.

    Attributes:
        published: the published score; None if there is none.
        reason: why `ours` differs from `published`; None if it does not.
    """

    task: str
    subset: str
    ours: float
    plain_mteb: float
    published: float | None
    reason: str | None
    machine: MachineRecord
    versions: Conditions


class Reproduction(Frozen):
    """The whole comparison; `source` names the source of the published scores."""

    schema_: Literal["gteopt.reproduce/2"] = Field(default="gteopt.reproduce/2", alias="schema")
    model: str
    source: str
    rows: tuple[Row, ...]


def main() -> None:
    """Measure task by task, and write the results after each."""
    suite = load_suite("offline")
    names = [task.task for task in suite.tasks]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    reference = find_reference(MODEL)
    assert reference is not None
    published = {(s.task, s.split, s.subset): s.score for s in reference.scores}
    folder = model_folder("all-MiniLM-L6-v2")
    encoder = gteopt.load(folder, device="cpu", dtype="float32")
    plain = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), device="cpu"))
    conditions = {
        **read_library_versions(),
        "mteb": version("mteb"),
        "dtype": "float32",
        "torch_threads": str(torch.get_num_threads()),
        "batch_size": str(BATCH_SIZE),
    }
    how = SuiteEncodeOptions(dtype="float32", batch_size=BATCH_SIZE)
    for task in suite.tasks:
        if task.task not in options.tasks:
            continue
        alone = suite.model_copy(update={"tasks": (task,)})
        run = run_suite(encoder, alone, hub_dir=options.hub_dir, options=how)
        assert not run.failed, run.failed
        with isolate_mteb(offline=True):
            (resolved,) = resolve_tasks(alone, options.hub_dir)
            theirs = plain_scores(plain, resolved)
        rows = [
            Row(
                task=score.task,
                subset=score.subset,
                ours=score.score,
                plain_mteb=theirs[score.split, score.subset],
                published=published.get((score.task, score.split, score.subset)),
                reason=WHY.get(score.task),
                machine=describe_machine(),
                versions=conditions,
            )
            for score in run.scores
        ]
        for row in rows:
            print(row.task, row.subset, row.ours, row.plain_mteb, row.published, flush=True)
        kept: tuple[Row, ...] = ()
        if options.out.is_file():
            kept = read_record(options.out, Reproduction).rows
        rows += [row for row in kept if row.task != task.task]
        rows.sort(key=lambda row: names.index(row.task))
        write_record(
            options.out, Reproduction(model=MODEL, source=reference.source, rows=tuple(rows))
        )


def plain_scores(model: Any, resolved: ResolvedTask) -> dict[tuple[str, str], float]:
    """Main scores by (split, subset); all of the work is done by mteb's own code."""
    task = resolved.task
    # Without this, `datasets` may return the data of another folder with this name.
    with nullcontext() if resolved.local is None else resolved.local.reading():
        task.load_data()
    # Local data have no commit, but mteb's results need a revision.
    dataset = {**task.metadata.dataset, "revision": resolved.revision}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    result = mteb.evaluate(
        model, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": BATCH_SIZE}
    )
    return {
        (split, subset["hf_subset"]): subset["main_score"]
        for split, subsets in result[0].scores.items()
        for subset in subsets
    }


if __name__ == "__main__":
    main()
