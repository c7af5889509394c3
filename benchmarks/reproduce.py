"""A published model through our runner, through plain mteb on the same data, and as published.

    .venv/bin/python benchmarks/reproduce.py --hub-dir ../shared/hub \
        --out benchmarks/results/reproduce.json

The model is all-MiniLM-L6-v2 in float32, as it was published, from the test extra; the suite is
`offline`. Plain mteb runs its own loader of Sentence Transformers and its own evaluation. Rows that
the file already holds are not measured again; `--store DIR` keeps our runner's finished tasks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mteb
import torch
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from peers_quality import model_folder
from sentence_transformers import SentenceTransformer

import gteopt
from gteopt.evaluation import EncodeOptions, load_suite, run_suite
from gteopt.evaluation.tasks import ResolvedTask, resolve
from gteopt.machine import machine, versions
from gteopt.records import find_reference

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
WHY = {
    "LCQMC": "the folder has its first 4,000 of 12,500 pairs",
    "EightTagsClustering": "the folder has 4,372 of 49,373 sentences",
}
"""Why a score is not the published one, where it is not within 0.01 or hardly is."""


@dataclass(frozen=True)
class Row:
    """One task and subset; scores 0 to 1.

    Attributes:
        plain_mteb: None where it was not run.
        published: None where the source has none.
        reason: why it differs from the published score; None where it does not.
    """

    task: str
    subset: str
    ours: float
    plain_mteb: float | None
    published: float | None
    plain_difference: float | None
    published_difference: float | None
    reason: str | None


def main() -> None:
    """Measure every task of the suite."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--tasks", nargs="+", help="that plain mteb runs too, instead of all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    folder = model_folder("all-MiniLM-L6-v2")
    suite = load_suite("offline")
    reference = find_reference(MODEL)
    assert reference is not None
    published = {(each.task, each.split, each.subset): each.score for each in reference.scores}
    rows: list[Row] = []
    if options.out.is_file():
        rows = [Row(**each) for each in json.loads(options.out.read_text())["rows"]]
    encoder = gteopt.load(folder, device="cpu", dtype="float32")
    store = options.store or Path(tempfile.mkdtemp())
    how = EncodeOptions(dtype="float32")
    run = run_suite(encoder, suite, hub_dir=options.hub_dir, store=store, options=how)
    assert not run.failed, run.failed
    plain = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), device="cpu"))
    tasks = {each.name: each for each in resolve(suite, options.hub_dir)}
    for resolved in tasks.values():
        ours = [each for each in run.scores if each.task == resolved.name]
        is_plain = resolved.name in (options.tasks or tasks)
        known_rows = [r for r in rows if r.task == resolved.name]
        if known_rows and (not is_plain or known_rows[0].plain_mteb is not None):
            continue
        rows = [r for r in rows if r.task != resolved.name]
        theirs = plain_scores(plain, resolved) if is_plain else {}
        for each in ours:
            known = published.get((each.task, each.split, each.subset))
            other = theirs.get((each.split, each.subset))
            row = Row(
                task=each.task,
                subset=each.subset,
                ours=each.score,
                plain_mteb=other,
                published=known,
                plain_difference=None if other is None else each.score - other,
                published_difference=None if known is None else each.score - known,
                reason=WHY.get(each.task),
            )
            rows.append(row)
            print(f"{row.task:30}{row.subset:10}{row.ours:10.6f}", other, known, flush=True)
        record = {
            "schema": "gteopt.reproduce/1",
            "model": MODEL,
            "source": reference.source,
            "rows": [asdict(row) for row in rows],
            "machine": machine().model_dump(),
            "versions": {**versions(), "mteb": version("mteb")},
            "dtype": "float32",
            "n_threads": torch.get_num_threads(),
            "batch_size": 32,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


def plain_scores(model: Any, resolved: ResolvedTask) -> dict[tuple[str, str], float]:
    """Main scores by (split, subset), by mteb's own code from end to end."""
    task = resolved.task
    task.load_data()
    # Local data have no commit, but mteb's results want one.
    dataset = {**task.metadata.dataset, "revision": resolved.revision}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    result = mteb.evaluate(
        model, task, cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 32}
    )
    return {
        (split, each["hf_subset"]): each["main_score"]
        for split, scores in result[0].scores.items()
        for each in scores
    }


if __name__ == "__main__":
    main()
