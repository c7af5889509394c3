"""A task's token limit and normalization decide the vectors of that task and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import gteopt
from gteopt.corpus.workers import start_local_workers
from gteopt.encoder.changed_encoder import change_encoder
from gteopt.encoder.encoder import Encoder
from gteopt.evaluation.instructions import TaskInstruction
from gteopt.evaluation.mteb_model import TaskModel
from gteopt.evaluation.runner import SuiteEncodeOptions, run_suite
from gteopt.evaluation.suites import Suite, read_protocol
from gteopt.evaluation.task_facts import apply_protocol
from gteopt.evaluation.task_vectors import TaskVectors
from gteopt.evaluation.views import own_view

TEXTS = ["short", "a somewhat longer text about rivers and the mills beside them " * 4]


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


def suite_of(*tasks: dict[str, Any], **fields: Any) -> Suite:
    document = {"schema": "gteopt.suite/1", "name": "test", "tasks": tasks, **fields}
    return Suite.model_validate(document)


def test_texts_are_cut_where_the_task_says_and_the_encoder_stays_as_it_was(nano: Encoder) -> None:
    changed = change_encoder(nano, 16, normalize=True)
    assert isinstance(changed, Encoder)
    vectors = changed.embed(TEXTS)
    expected = nano.embed_tokens(nano.tokenization.tokenize(TEXTS, max_tokens=16))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert nano.tokenization.max_tokens > 16
    assert np.abs(nano.embed(TEXTS)[1] - vectors[1]).max() > 1e-3


def test_vectors_keep_their_length_where_the_protocol_does_not_normalize(
    nano: Encoder, tmp_path: Path
) -> None:
    changed = change_encoder(nano, 512, normalize=False)
    assert isinstance(changed, Encoder)
    raw = changed.embed(TEXTS)
    lengths = np.linalg.norm(raw, axis=1)
    assert (np.abs(lengths - 1) > 0.1).all()
    np.testing.assert_allclose(raw / lengths[:, None], nano.embed(TEXTS), atol=1e-6)

    vectors = TaskVectors(nano, tmp_path, SuiteEncodeOptions(dtype="float32"), lambda note: None)
    from gteopt.evaluation.tasks import resolve_tasks

    (task,) = resolve_tasks(suite_of({"task": "MiniSTS", "normalize": False}), None)
    model = TaskModel(vectors.of(task), own_view(nano), TaskInstruction())
    encoded = model.encode([{"text": TEXTS}])
    np.testing.assert_allclose(encoded, changed.embed(TEXTS, role="query"), rtol=1e-4, atol=1e-5)
    assert vectors.of(task) is not vectors.usual()


def test_a_protocol_changes_classification_and_leaves_similarity(
    nano: Encoder, tmp_path: Path
) -> None:
    """Cosines ignore the lengths of vectors; logistic regression does not."""
    suite = suite_of({"task": "MiniIntentClassification"}, {"task": "MiniSTS", "subsets": ["en"]})
    usual = run_suite(nano, suite, store=tmp_path)
    authors = run_suite(nano, apply_protocol(suite, read_protocol("gte-authors")), store=tmp_path)
    usual_scores, authors_scores = (
        {score.task: score.score for score in run.scores} for run in (usual, authors)
    )
    assert usual_scores["MiniSTS"] == pytest.approx(authors_scores["MiniSTS"], abs=1e-3)
    assert usual_scores["MiniIntentClassification"] != authors_scores["MiniIntentClassification"]
    assert usual.suite_sha256 != authors.suite_sha256


def test_workers_give_the_bits_of_one_process_under_a_protocol(
    nano: Encoder, tmp_path: Path
) -> None:
    """Usual, cut and unnormalized tasks in one suite, on the same two processes."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        suite = suite_of(
            {"task": "MiniSTS", "subsets": ["en"], "max_tokens": 16},
            {"task": "MiniIntentClassification", "normalize": False},
            {"task": "MiniBitextMining", "subsets": ["en-fr"]},
        )
        alone = run_suite(nano, suite, store=tmp_path / "alone")
        with start_local_workers(["cpu", "cpu"]) as workers:
            options = SuiteEncodeOptions(encode=workers.encoding(nano, "nano", hub_dir=None))
            together = run_suite(nano, suite, store=tmp_path / "together", options=options)
    finally:
        torch.set_num_threads(n_threads)
    assert together.scores == alone.scores
    assert together.notes == ()
    vectors = [stored(tmp_path / name) for name in ("alone", "together")]
    assert len(vectors[0]) > 100
    assert vectors[0] == vectors[1]
    assert len({folder for folder, _ in vectors[0]}) == 3


def stored(store: Path) -> dict[tuple[str, bytes], bytes]:
    """Bytes of every vector on disk, by its cache and the key of its text."""
    vectors: dict[tuple[str, bytes], bytes] = {}
    for path in store.rglob("*.safetensors"):
        shard = load_file(path)
        if "keys" in shard:
            cache = path.relative_to(store).parts[0]
            pairs = zip(shard["keys"], shard["vectors"], strict=True)
            vectors |= {(cache, key.tobytes()): row.tobytes() for key, row in pairs}
    return vectors
