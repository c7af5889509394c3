"""What an artifact stores decides what it is served with: ranges, lengths, quality, its page."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gteopt
from gteopt.config.recipe import load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.errors import IntegrityError
from gteopt.server.answers import shorten
from gteopt.server.models import Served, measure_cost
from tests.server.running_server import Running, running

TEXTS = ["how tall is mont blanc", "Mont Blanc is 4,806 metres high.", "a"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano, rounded to 8 bits, with 128 dimensions of one byte each."""
    folder = tmp_path_factory.mktemp("served")
    recipe = load_recipe("rtn-int8")
    gteopt.quantize("nano", recipe, folder / "int8")
    gteopt.truncate(folder / "int8", folder / "int8-128", dims=128, vectors="int8")
    return folder / "int8-128"


@pytest.fixture(scope="module")
def short(artifact: Path) -> Iterator[Running]:
    with running({"short": str(artifact)}) as found:
        yield found


def test_int8_is_coded_with_the_stored_ranges(short: Running) -> None:
    encoder = short.service.models["short"].encoder
    expected = encoder.vectors.quantize(encoder.encode(TEXTS))
    answer = short.embed(model="short", input=TEXTS, output_dtype="int8").json()
    found = np.array([each["embedding"] for each in answer["data"]])
    # A value on the edge between two codes may fall to either side.
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.01
    assert answer["output_dtype"] == "int8"
    moved = short.embed(model="short", input=TEXTS, output_dtype="uint8").json()
    np.testing.assert_array_equal(
        np.array([each["embedding"] for each in moved["data"]]) - 128, found
    )
    packed = short.embed(
        model="short", input=TEXTS, output_dtype="int8", encoding_format="base64"
    ).json()
    bytes_of = [base64.b64decode(each["embedding"]) for each in packed["data"]]
    np.testing.assert_array_equal([np.frombuffer(each, np.int8) for each in bytes_of], found)


def test_a_shortened_artifact_supports_the_lengths_that_it_still_has(short: Running) -> None:
    assert short.service.models["short"].supported_dims == (128, 64, 32)
    refused = short.embed(model="short", input="a", dimensions=256)
    assert "128, 64, 32" in refused.json()["error"]["message"]
    ranges = short.embed(model="short", input="a", dimensions=64, output_dtype="int8")
    assert "ranges of int8 are for 128 dimensions" in ranges.json()["error"]["message"]
    assert short.embed(model="short", input="a", dimensions=64).status_code == 200


def test_text_embeddings_inference_clients_get_bare_vectors(short: Running) -> None:
    found = short.client.post("/embed", json={"inputs": TEXTS}).json()
    expected = short.service.models["short"].encoder.encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_damaged_artifact_is_not_served(artifact: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"), running({"a": str(damaged)}):
        pass


def test_a_cut_vector_is_a_unit_vector_again() -> None:
    rows = np.array([[3 / 13, 4 / 13, 12 / 13], [0, 0, 1]], np.float32)
    expected = np.array([[0.6, 0.8], [0, 0]])
    np.testing.assert_allclose(shorten(rows, 2), expected, atol=1e-7)


def test_the_warm_up_ends_in_time_on_a_slow_device() -> None:
    shapes = []

    def run(n_texts: int, n_tokens: int) -> float:
        shapes.append((n_texts, n_tokens))
        return 0.5 + 0.01 * n_texts * n_tokens

    cost = measure_cost(run, seconds=2.0)
    assert len(shapes) <= 6
    assert cost.text_s(100) > 0


def test_what_is_padded_is_computed_in_groups_of_like_length(
    short: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = short.service.models["short"]
    texts = ["word " * n for n in (1, 100, 2, 90, 3, 80)]
    tokens = served.encoder.tokenization.tokenize(texts)
    monkeypatch.setattr(Encoder, "pads", property(lambda self: True))
    padded = Served("short", served.source, served.encoder)
    longest = max(map(len, tokens))
    lengths = [len(each) for each in tokens]
    assert 0 < padded.padding(lengths) < 0.4 * (longest * len(tokens) - sum(lengths))
    np.testing.assert_allclose(padded.compute(tokens), served.encoder.encode(texts), atol=1e-5)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_shows_what_is_served(short: Running, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"),
            short.url,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "short" in done.stdout.partition("<tbody>")[2].partition("</tbody>")[0], done.stderr
    assert "128, 64, 32" in done.stdout
    assert short.url in done.stdout.partition('id="example"')[2]
