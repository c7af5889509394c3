"""A task's own limit of tokens and treatment of lengths decide its vectors, and nothing else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gteopt
from gteopt.encoder.encoder import Encoder
from gteopt.errors import UnsupportedError
from gteopt.evaluation.mteb_model import TaskModel
from gteopt.evaluation.runner import EncodeOptions, run_suite
from gteopt.evaluation.suites import Suite, read_protocol
from gteopt.evaluation.task_facts import under_protocol
from gteopt.evaluation.task_vectors import TaskVectors, changed_encoder
from gteopt.evaluation.views import own_view

TEXTS = ["short", "a somewhat longer text about rivers and the mills beside them " * 4]


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


def suite_of(*tasks: dict[str, Any], **more: Any) -> Suite:
    document = {"schema": "gteopt.suite/1", "name": "test", "tasks": tasks, **more}
    return Suite.model_validate(document)


def test_texts_are_cut_where_the_task_says_and_the_encoder_stays_as_it_was(nano: Encoder) -> None:
    changed = changed_encoder(nano, 16, normalize=True)
    assert isinstance(changed, Encoder)
    vectors = changed.embed(TEXTS)
    expected = nano.embed_tokens(nano.tokenization.tokenize(TEXTS, max_tokens=16))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert nano.tokenization.max_tokens > 16
    assert np.abs(nano.embed(TEXTS)[1] - vectors[1]).max() > 1e-3


def test_vectors_keep_their_length_where_the_protocol_does_not_normalize(
    nano: Encoder, tmp_path: Path
) -> None:
    changed = changed_encoder(nano, 512, normalize=False)
    assert isinstance(changed, Encoder)
    raw = changed.embed(TEXTS)
    lengths = np.linalg.norm(raw, axis=1)
    assert (np.abs(lengths - 1) > 0.1).all()
    np.testing.assert_allclose(raw / lengths[:, None], nano.embed(TEXTS), atol=1e-6)

    vectors = TaskVectors(nano, tmp_path, EncodeOptions(dtype="float32"), lambda note: None)
    from gteopt.evaluation.tasks import resolve

    (task,) = resolve(suite_of({"task": "MiniSTS", "normalize": False}), None)
    model = TaskModel(vectors.of(task), own_view(nano), None)
    found = model.encode([{"text": TEXTS}])
    np.testing.assert_allclose(found, changed.embed(TEXTS, role="query"), rtol=1e-4, atol=1e-5)
    assert vectors.of(task) is not vectors.usual()


def test_a_protocol_changes_classification_and_leaves_similarity(
    nano: Encoder, tmp_path: Path
) -> None:
    """Cosines do not see lengths; logistic regression does."""
    suite = suite_of({"task": "MiniIntentClassification"}, {"task": "MiniSTS", "subsets": ["en"]})
    usual = run_suite(nano, suite, store=tmp_path)
    authors = run_suite(nano, under_protocol(suite, read_protocol("gte-authors")), store=tmp_path)
    scores, others = ({each.task: each.score for each in run.scores} for run in (usual, authors))
    assert scores["MiniSTS"] == pytest.approx(others["MiniSTS"], abs=1e-3)
    assert scores["MiniIntentClassification"] != others["MiniIntentClassification"]
    assert usual.suite_sha256 != authors.suite_sha256


def test_workers_refuse_a_protocol_that_changes_vectors(nano: Encoder, tmp_path: Path) -> None:
    from gteopt.corpus.shards import LocalEncoding

    suite = suite_of({"task": "MiniSTS", "subsets": ["en"], "max_tokens": 16})
    options = EncodeOptions(encode=LocalEncoding(nano, 8))
    with pytest.raises(UnsupportedError, match="--devices"):
        run_suite(nano, suite, store=tmp_path, options=options)
