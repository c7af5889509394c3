"""A published model through our runner, through plain mteb on the same data, and as published.

    python benchmarks/reproduce.py --hub-dir ../shared/hub

The model is all-MiniLM-L6-v2 in float32, as it was published, from the test extra; the suite is
`offline`. Plain mteb runs its own loader of Sentence Transformers and its own evaluation. Both run
in this process, from nothing that an earlier run has left, and each task's rows are written as a
whole, with the machine and versions that they were measured on. `--tasks` measures some alone;
the file keeps its rows of the others.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import mteb
import torch
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from peers_quality import model_folder
from pydantic import Field
from sentence_transformers import SentenceTransformer

import gteopt
from gteopt.evaluation.mteb_isolation import isolated
from gteopt.evaluation.reference import find_reference
from gteopt.evaluation.runner import EncodeOptions, run_suite
from gteopt.evaluation.tasks import ResolvedTask, load_suite, resolve
from gteopt.frozen import Frozen
from gteopt.machine import machine, versions
from gteopt.records.environment import Conditions, Machine
from gteopt.records.files import read_record, write_record

RESULTS = Path(__file__).parent / "results" / "reproduce.json"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BATCH_SIZE = 32
WHY = {
    "LCQMC": "the folder has its first 4,000 of 12,500 pairs",
    "EightTagsClustering": "the folder has 4,372 of 49,373 sentences",
}
"""Why a score is not the published one, where it is not within 0.01 or hardly is."""


class Row(Frozen):
    """One task and subset; scores 0 to 1.

    Attributes:
        published: None where the source has none.
        reason: why it differs from the published score; None where it does not.
    """

    task: str
    subset: str
    ours: float
    plain_mteb: float
    published: float | None
    reason: str | None
    machine: Machine
    versions: Conditions


class Reproduction(Frozen):
    """The whole comparison; `source` of what is published."""

    schema_: Literal["gteopt.reproduce/2"] = Field(default="gteopt.reproduce/2", alias="schema")
    model: str
    source: str
    rows: tuple[Row, ...]


def main() -> None:
    """Measure, task by task, and write after each."""
    suite = load_suite("offline")
    names = [each.task for each in suite.tasks]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    reference = find_reference(MODEL)
    assert reference is not None
    published = {(each.task, each.split, each.subset): each.score for each in reference.scores}
    folder = model_folder("all-MiniLM-L6-v2")
    encoder = gteopt.load(folder, device="cpu", dtype="float32")
    plain = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), device="cpu"))
    conditions = {
        **versions(),
        "mteb": version("mteb"),
        "dtype": "float32",
        "torch_threads": str(torch.get_num_threads()),
        "batch_size": str(BATCH_SIZE),
    }
    how = EncodeOptions(dtype="float32", batch_size=BATCH_SIZE)
    for task in (each for each in suite.tasks if each.task in options.tasks):
        alone = suite.model_copy(update={"tasks": (task,)})
        run = run_suite(encoder, alone, hub_dir=options.hub_dir, options=how)
        assert not run.failed, run.failed
        with isolated(offline=True):
            (resolved,) = resolve(alone, options.hub_dir)
            theirs = plain_scores(plain, resolved)
        rows = [
            Row(
                task=each.task,
                subset=each.subset,
                ours=each.score,
                plain_mteb=theirs[each.split, each.subset],
                published=published.get((each.task, each.split, each.subset)),
                reason=WHY.get(each.task),
                machine=machine(),
                versions=conditions,
            )
            for each in run.scores
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
    """Main scores by (split, subset), by mteb's own code from end to end."""
    task = resolved.task
    # Without this, `datasets` may hand out what another folder of this name held.
    with nullcontext() if resolved.local is None else resolved.local.reading():
        task.load_data()
    # Local data have no commit, but mteb's results want one.
    dataset = {**task.metadata.dataset, "revision": resolved.revision}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    result = mteb.evaluate(
        model, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": BATCH_SIZE}
    )
    return {
        (split, each["hf_subset"]): each["main_score"]
        for split, scores in result[0].scores.items()
        for each in scores
    }


if __name__ == "__main__":
    main()
