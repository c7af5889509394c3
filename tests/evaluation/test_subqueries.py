"""Searches whose score merges the wordings of a query score as in plain mteb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gteopt
from gteopt.encoder.encoder import Encoder
from gteopt.evaluation.runner import SuiteEncodeOptions, SuiteRun, run_suite
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_task_data, resolve_tasks, task_instruction

SUITE = Suite.model_validate(
    {"schema": "gteopt.suite/1", "name": "test", "tasks": [{"task": "MindSmallReranking"}]}
)
SUBJECTS = ("rivers", "engines", "bread", "violins", "taxes", "bees")
N_QUERIES, N_DOCUMENTS = 12, 30


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu", dtype="float32")


def write(hub_dir: Path, *, same_answers: bool) -> None:
    """Write two wordings of each query, with the same answers or with different ones."""
    rng = np.random.default_rng(5)
    documents = [f"about {SUBJECTS[j % 6]} number {rng.integers(1000)}" for j in range(N_DOCUMENTS)]
    queries: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    ranked: list[dict[str, Any]] = []
    for i in range(N_QUERIES):
        for wording, text in enumerate(("what is known of", "news about")):
            name = f"q{i}_{wording}"
            subject = i % 6 if same_answers else (i + wording) % 6
            queries.append({"_id": name, "text": f"{text} {SUBJECTS[i % 6]}"})
            judged += [
                {"query-id": name, "corpus-id": f"d{j}", "score": 1}
                for j in range(N_DOCUMENTS)
                if j % 6 == subject
            ]
            candidates = rng.permutation(N_DOCUMENTS)[:20]
            ranked.append({"query-id": name, "corpus-ids": [f"d{j}" for j in candidates]})
    corpus = [{"_id": f"d{j}", "title": "", "text": text} for j, text in enumerate(documents)]
    configs: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "corpus": ("corpus", corpus),
        "queries": ("queries", queries),
        "default": ("test", judged),
        "top_ranked": ("test", ranked),
    }
    folder = hub_dir / "mteb" / "MindSmallReranking"
    folder.mkdir(parents=True)
    card = ["---", "configs:"]
    for config, (split, rows) in configs.items():
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{config}.jsonl").write_text(lines)
        card.append(f"- config_name: {config}\n  data_files:")
        card.append(f"  - {{split: {split}, path: {config}.jsonl}}")
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


def scored(nano: Encoder, hub_dir: Path) -> SuiteRun:
    options = SuiteEncodeOptions(dtype="float32")
    return run_suite(nano, SUITE, hub_dir=hub_dir, options=options)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # mteb's own
def test_the_score_of_merged_queries_is_that_of_plain_mteb(nano: Encoder, tmp_path: Path) -> None:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType

    write(tmp_path, same_answers=True)
    run = scored(nano, tmp_path)
    (resolved,) = resolve_tasks(SUITE, tmp_path)
    instruction = task_instruction(resolved.task)

    class Plain(AbsEncoder):  # type: ignore[misc]
        mteb_model_meta = ModelMeta.create_empty({"name": "plain/nano", "revision": "1"})

        def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Any:
            texts = [text for batch in inputs for text in batch["text"]]
            if prompt_type == PromptType.query:
                return nano.embed(texts, role="query", instruction=instruction)
            return nano.embed(texts)

    assert resolved.local is not None
    with resolved.local.reading():
        resolved.task.load_data()
    theirs = resolved.task.evaluate(Plain(), "test", encode_kwargs={"batch_size": 32})["default"]
    (ours,) = run.scores
    assert ours.score == pytest.approx(theirs["max_over_subqueries_map_at_1000"], abs=1e-6)
    (samples,) = run.item_scores.values()
    assert samples.n_units == N_QUERIES


def test_the_order_in_which_judgments_are_read_decides_no_score(
    nano: Encoder, tmp_path: Path
) -> None:
    """If wordings have different answers, mteb takes those of the wording that it read last."""
    write(tmp_path, same_answers=False)
    assert len({scored(nano, tmp_path).scores[0].score for _ in range(3)}) == 1
    for _ in range(3):
        (resolved,) = resolve_tasks(SUITE, tmp_path)
        load_task_data([resolved])
        data = resolved.task.dataset["default"]["test"]
        assert list(data["relevant_docs"]) == list(data["queries"]["id"])
