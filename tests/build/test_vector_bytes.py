"""A recipe that gives only the bytes of a vector: its artifact, here and in other libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gteopt
from gteopt.config.recipe import Calibration, Vectors, load_recipe
from gteopt.errors import InputError
from gteopt.model.checkpoint import open_checkpoint

TEXTS = ["A bridge.", "Ein Fluss fließt ins Meer.", "一座桥"]


def test_bytes_of_a_recipe_choose_a_code_that_every_library_compares_alike(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    recipe = load_recipe("bf16").model_copy(
        update={
            "calibration": Calibration(n_texts=256, max_tokens=32),
            "vectors": Vectors(code="pq", bytes=24),
        }
    )
    made = gteopt.quantize("nano", recipe, tmp_path / "small", dtype="float32")
    assert (made.vectors.code, made.vectors.bytes_per_vector) == ("pq", 24)
    assert made.vectors.trials[0].neighbours_kept > 0.3
    assert made.vectors.similarity == "dot"
    ours, theirs = gteopt.load(tmp_path / "small"), SentenceTransformer(str(tmp_path / "small"))
    rows = ours.encode(TEXTS)
    assert ours.vectors.quantize(rows).shape == (3, 24)
    np.testing.assert_allclose(theirs.encode(TEXTS), rows, atol=1e-5)
    assert theirs.similarity_fn_name == "dot"
    np.testing.assert_allclose(theirs.similarity(rows, rows), rows @ rows.T, atol=1e-5)
    # Artifacts of the same weights share their hash. Unit rows are compared by cosine again.
    gteopt.truncate(tmp_path / "small", tmp_path / "full")
    settings = json.loads((tmp_path / "full" / "config_sentence_transformers.json").read_text())
    assert settings["similarity_fn_name"] == "cosine"
    small, full = (open_checkpoint(tmp_path / name) for name in ("small", "full"))
    assert small.weights_sha256 == full.weights_sha256
    full_rows = gteopt.load(tmp_path / "full").encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(full_rows, axis=1), 1, atol=1e-5)
    again = SentenceTransformer(str(tmp_path / "full"))
    np.testing.assert_allclose(again.encode(TEXTS), full_rows, atol=1e-5)
    with pytest.raises(InputError, match=r"no code of vectors with 256 .* nearest: 256 and 1024"):
        gteopt.truncate(tmp_path / "small", tmp_path / "x", bytes=300)
    assert not (tmp_path / "x").exists()
