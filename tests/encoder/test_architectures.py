"""Every architecture of the table in docs/models.md: a tiny random model of it gives the vectors of
Sentence Transformers, is quantized, and its artifact opens in both libraries.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gteopt
from tests.support.architectures import ARCHITECTURES, TEXTS, make, sentence_transformer

RECIPES = ("rtn-int4", "int8")
QUICK = ("bert", "mpnet", "modernbert", "qwen3", "gemma3_text", "t5")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of one architecture."""
    return make(request.param, tmp_path_factory.mktemp("models") / request.param)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: np.ndarray = (a * b).sum(axis=1) / norms
    return cosines


def test_the_vectors_are_those_of_sentence_transformers(model: Path) -> None:
    found = gteopt.load(model, dtype="float32").encode(TEXTS)
    # Alone: padding of a batch may not change a vector, and in some architectures it does there.
    wanted = np.concatenate([sentence_transformer(model).encode([text]) for text in TEXTS])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_artifact_opens_in_both_libraries(model: Path, recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    manifest = gteopt.quantize(model, recipe, out, dtype="float32")
    assert manifest.layers
    found = gteopt.load(out).encode(TEXTS)
    assert cosines(found, gteopt.load(model, dtype="float32").encode(TEXTS)).min() > 0.85
    if manifest.format == "compressed-tensors":
        theirs = np.concatenate([sentence_transformer(out).encode([text]) for text in TEXTS])
        assert cosines(found, theirs).min() > 0.99


@pytest.mark.parametrize("name", QUICK)
def test_gptq_keeps_more_than_rounding(name: str, tmp_path: Path) -> None:
    folder = make(name, tmp_path / "base")
    recipe = tmp_path / "few.yaml"
    recipe.write_text(
        "schema: gteopt.recipe/1\nname: few\nsummary: few texts\nweights:\n  method: gptq\n"
        "  scheme: {bits: 4, group_size: 32, symmetric: false}\n"
        "calibration: {n_texts: 16, max_tokens: 64}\n"
    )
    wanted = gteopt.load(folder, dtype="float32").encode(TEXTS)
    gteopt.quantize(folder, str(recipe), tmp_path / "out", dtype="float32")
    assert cosines(gteopt.load(tmp_path / "out").encode(TEXTS), wanted).min() > 0.95
