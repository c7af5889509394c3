"""Every architecture of the table in docs/models.md, as a tiny random model.

It gives the vectors of Sentence Transformers, is quantized, and its artifact opens in both.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import gteopt
from gteopt.errors import UnsupportedError
from tests.support.architectures import (
    ARCHITECTURES,
    REFUSED,
    SCHEMES,
    TEXTS,
    make,
    sentence_transformer,
)

OPENED_WITH = {
    "gptq": ("optimum", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors",),
}
"""Format -> the libraries with which Sentence Transformers opens it on a CPU."""


def recipe(folder: Path, scheme: str) -> str:
    method, text = SCHEMES[scheme]
    path = folder / "recipe.yaml"
    path.write_text(
        f"schema: gteopt.recipe/1\nname: tiny\nsummary: tiny\nweights:\n  method: {method}\n"
        f"  scheme: {text}\n"
        + ("calibration: {n_texts: 16, max_tokens: 64}\n" if method == "gptq" else "")
    )
    return str(path)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of one architecture."""
    return make(request.param, tmp_path_factory.mktemp("models") / request.param)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: np.ndarray = (a * b).sum(axis=1) / norms
    return cosines


def test_the_vectors_are_those_of_sentence_transformers(model: Path) -> None:
    vectors = gteopt.load(model, dtype="float32").encode(TEXTS)
    # Text by text: padding in Sentence Transformers changes vectors of some architectures.
    wanted = np.concatenate([sentence_transformer(model).encode([text]) for text in TEXTS])
    np.testing.assert_allclose(vectors, wanted, atol=1e-5)


def test_a_copy_opens_in_sentence_transformers(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    gteopt.quantize(model, "bf16", out, dtype="float32")
    theirs = np.concatenate([sentence_transformer(out).encode([text]) for text in TEXTS])
    np.testing.assert_allclose(gteopt.load(out).encode(TEXTS), theirs, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_artifact_opens_in_both_libraries(model: Path, scheme: str, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    if (why := REFUSED.get((model.name, scheme))) is not None:
        with pytest.raises(UnsupportedError, match=why):
            gteopt.quantize(model, recipe(tmp_path, scheme), out, dtype="float32")
        return
    manifest = gteopt.quantize(model, recipe(tmp_path, scheme), out, dtype="float32")
    assert manifest.layers
    vectors = gteopt.load(out).encode(TEXTS)
    assert cosines(vectors, gteopt.load(model, dtype="float32").encode(TEXTS)).min() > 0.9
    # The libraries are in the environment of `make interop`. What GPTQ makes has the same layout as
    # other builds of 4 bits.
    libraries = OPENED_WITH.get(str(manifest.format))
    if scheme != "GPTQ" and libraries and all(find_spec(library) for library in libraries):
        opened = sentence_transformer(out)
        theirs = np.concatenate([opened.encode([text]) for text in TEXTS])
        assert cosines(vectors, theirs).min() > 0.99


@pytest.mark.parametrize("architecture", ["t5", "modernbert"])
def test_packed_weights_of_an_architecture_that_reads_weights_stay_in_our_format(
    architecture: str, tmp_path: Path
) -> None:
    """Their code reads `weight` of linear layers, which packed layers of other libraries lack."""
    model = make(architecture, tmp_path / architecture)
    made = gteopt.quantize(model, recipe(tmp_path, "4 bits"), tmp_path / "out", dtype="float32")
    assert made.format == "gteopt"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_build_says_which_share_of_the_weights_stays_in_experts(tmp_path: Path) -> None:
    model = make("qwen3_moe", tmp_path / "qwen3_moe")
    manifest = gteopt.quantize(model, recipe(tmp_path, "4 bits"), tmp_path / "out", dtype="float32")
    experts = [module for module in manifest.unquantized if module.name.endswith("experts")]
    assert len(experts) == 2
    share = sum(module.n_parameters for module in experts) / manifest.base.n_parameters
    assert manifest.expert_share == share
    assert f"| experts | {share:.0%} of all weights" in (tmp_path / "out" / "README.md").read_text()
    shown = run(sys.executable, "-m", "gteopt", "inspect", str(tmp_path / "out"))
    assert f"{share:.0%} of all weights in experts" in " ".join(shown.split())
    assert any(f"are {share:.0%} of all weights" in note for note in gteopt.inspect(model).notes)
    assert {module.reason.partition(": ")[2] for module in experts} == {
        f"{share:.0%} of all weights stay as they are for that"
    }
