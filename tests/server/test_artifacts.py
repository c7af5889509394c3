"""A served artifact has what it stores: its ranges, lengths, quality and page."""

from __future__ import annotations

import base64
import html
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pydantic import ValidationError

import gteopt
from gteopt.config.recipe import load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.errors import IntegrityError, NumericsError
from gteopt.machine import describe_machine
from gteopt.records.canary import CANARY, CanaryRecord
from gteopt.records.evaluation import EvalReport, Fidelity
from gteopt.records.files import write_record
from gteopt.server.answers import shorten_vectors
from gteopt.server.batching import CostModel
from gteopt.server.models import ServedModel, measure_cost
from tests.server.running_server import Running, running

TEXTS = ["how tall is mont blanc", "Mont Blanc is 4,806 metres high.", "a"]
NOT_FINITE = base64.b64encode(np.full(2, np.nan, "<f2").tobytes()).decode()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model nano, rounded to 8 bits, with 128 dimensions of one byte each."""
    folder = tmp_path_factory.mktemp("served")
    recipe = load_recipe("rtn-int8")
    gteopt.quantize("nano", recipe, folder / "int8")
    gteopt.truncate(folder / "int8", folder / "int8-128", dims=128, vectors="int8")
    return folder / "int8-128"


@pytest.fixture(scope="module")
def short(artifact: Path) -> Iterator[Running]:
    with running({"short": str(artifact)}) as server:
        yield server


def test_int8_is_coded_with_the_stored_ranges(short: Running) -> None:
    encoder = short.service.models["short"].encoder
    expected = encoder.vectors.quantize(encoder.encode(TEXTS))
    answer = short.embed(model="short", input=TEXTS, output_dtype="int8").json()
    codes = np.array([row["embedding"] for row in answer["data"]])
    # A value on the edge between two codes may fall to either side.
    assert np.abs(codes - expected).max() <= 1
    assert (codes != expected).mean() < 0.01
    assert answer["output_dtype"] == "int8"
    moved = short.embed(model="short", input=TEXTS, output_dtype="uint8").json()
    np.testing.assert_array_equal(
        np.array([row["embedding"] for row in moved["data"]]) - 128, codes
    )
    packed = short.embed(
        model="short", input=TEXTS, output_dtype="int8", encoding_format="base64"
    ).json()
    bytes_of = [base64.b64decode(row["embedding"]) for row in packed["data"]]
    np.testing.assert_array_equal([np.frombuffer(content, np.int8) for content in bytes_of], codes)


def test_a_shortened_artifact_supports_the_lengths_that_it_still_has(short: Running) -> None:
    assert short.service.models["short"].supported_dims == (128, 64, 32)
    refused = short.embed(model="short", input="a", dimensions=256)
    assert "128, 64, 32" in refused.json()["error"]["message"]
    ranges = short.embed(model="short", input="a", dimensions=64, output_dtype="int8")
    assert "ranges of int8 are for 128 dimensions" in ranges.json()["error"]["message"]
    assert short.embed(model="short", input="a", dimensions=64).status_code == 200


def test_text_embeddings_inference_clients_get_bare_vectors(short: Running) -> None:
    vectors = short.client.post("/embed", json={"inputs": TEXTS}).json()
    expected = short.service.models["short"].encoder.encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_damaged_artifact_is_not_served(artifact: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(artifact, damaged)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"), running({"a": str(damaged)}):
        pass


def test_a_server_computes_the_vector_that_the_build_stored(short: Running) -> None:
    served = short.service.models["short"]
    manifest = served.encoder.manifest
    assert manifest is not None
    assert manifest.canary is not None
    assert manifest.canary.cosine(served.encoder.encode([manifest.canary.text])[0]) > 0.999
    assert short.client.get("/readyz").json() == {"ready": True}


@pytest.mark.parametrize("change", ["another text", "fewer dimensions"])
def test_an_artifact_that_computes_another_vector_is_not_served(
    artifact: Path, change: str
) -> None:
    encoder = gteopt.load(artifact)
    assert encoder.manifest is not None
    other_vector = encoder.encode(["a text about something else"])[0]
    vector = other_vector if change == "another text" else encoder.encode([CANARY])[0, :64]
    stored = encoder.manifest.model_copy(update={"canary": CanaryRecord.of(CANARY, vector)})
    object.__setattr__(encoder.checkpoint, "manifest", stored)
    with pytest.raises(NumericsError, match="that the artifact stores"):
        ServedModel("a", str(artifact), encoder).warm_up(seconds=0.1)


def test_an_artifact_without_a_stored_vector_is_served(artifact: Path) -> None:
    encoder = gteopt.load(artifact)
    assert encoder.manifest is not None
    older = encoder.manifest.model_copy(update={"canary": None})
    object.__setattr__(encoder.checkpoint, "manifest", older)
    served = ServedModel("a", str(artifact), encoder)
    served.warm_up(seconds=0.1)
    assert served.is_right(encoder.encode([CANARY])[0])


@pytest.mark.parametrize("vector", ["no base64!", "", "AA==", NOT_FINITE])
def test_a_stored_vector_without_numbers_is_refused(vector: str) -> None:
    with pytest.raises(ValidationError, match="canary's vector"):
        CanaryRecord(text="a", vector=vector)


@pytest.mark.parametrize("place", ["NAME", "variants/NAME"])
def test_info_repeats_license_retention_and_fidelity_of_the_results(
    artifact: Path, place: str, tmp_path: Path
) -> None:
    """`run` leaves an artifact in `variants` of its results folder; others lie in it directly."""
    artifact = Path(shutil.copytree(artifact, tmp_path / place))
    encoder = gteopt.load(artifact)
    fidelity = Fidelity(
        n_texts=100,
        mean_cosine=0.99,
        p1_cosine=0.97,
        neighbour_overlap=0.82,
        spearman=0.99,
        n_queries=20,
        n_documents=80,
        n_all_documents=80,
    )
    report = EvalReport(
        variant=artifact.name,
        artifact_sha256=encoder.sha256,
        baseline="nano",
        baseline_sha256="b" * 64,
        dims=384,
        code="float32",
        bytes_per_vector=1536,
        suite="stsb",
        suite_sha256="c" * 64,
        tasks=(),
        failed=(),
        partial=False,
        score=0.5806,
        baseline_score=0.5815,
        retention=0.9985,
        retention_low=0.9951,
        retention_high=1.0012,
        fidelity=fidelity,
        machine=describe_machine(),
        versions={},
    )
    other_report = report.model_copy(update={"variant": "other", "artifact_sha256": "d" * 64})
    for record in (report, other_report):
        write_record(tmp_path / "eval" / f"{record.variant}.json", record)
    about = ServedModel("a", str(artifact), encoder).about
    assert encoder.manifest is not None
    assert about["license"] == encoder.manifest.base.license
    (quality,) = about["quality"]
    assert quality["suite"] == "stsb"
    ends = ("retention", "retention_low", "retention_high")
    assert [quality[end] for end in ends] == [0.9985, 0.9951, 1.0012]
    assert [quality["mean_cosine"], quality["neighbour_overlap"]] == [0.99, 0.82]


def test_a_cut_vector_is_a_unit_vector_again() -> None:
    rows = np.array([[3 / 13, 4 / 13, 12 / 13], [0, 0, 1]], np.float32)
    expected = np.array([[0.6, 0.8], [0, 0]])
    np.testing.assert_allclose(shorten_vectors(rows, 2), expected, atol=1e-7)


def test_the_warm_up_ends_in_time_on_a_slow_device() -> None:
    shapes = []

    def run(n_texts: int, n_tokens: int) -> float:
        shapes.append((n_texts, n_tokens))
        return 0.5 + 0.01 * n_texts * n_tokens

    cost = measure_cost(run, seconds=2.0)
    assert len(shapes) <= 6
    assert cost.text_s(100) > 0


@pytest.mark.parametrize(
    ("n_threads", "n_cores", "this_thread_s", "wall_s", "alone_s"),
    [
        pytest.param(1, 2, 1.0, 1.0, 1.0, id="one thread"),
        pytest.param(1, 2, 1.0, 3.0, 1.0, id="one thread, busy cores"),
        pytest.param(2, 2, 0.5, 0.5, 0.5, id="two threads"),
        pytest.param(2, 2, 0.5, 2.0, 0.5, id="two threads, busy cores"),
        pytest.param(4, 2, 0.25, 0.5, 0.5, id="more threads than cores"),
        pytest.param(4, 2, 0.25, 2.0, 0.5, id="more threads than cores, busy cores"),
        pytest.param(4, 4, 0.0, 0.25, 0.25, id="only other threads compute"),
        pytest.param(4, 4, 0.7, 0.7, 0.7, id="mostly one thread computes"),
        pytest.param(1, 2, 0.0, 0.5, 0.5, id="more threads than torch says"),
    ],
)
def test_the_cost_of_a_pass_is_its_time_on_idle_cores(
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_threads: int,
    n_cores: int,
    this_thread_s: float,
    wall_s: float,
    alone_s: float,
) -> None:
    """A pass takes 1 ms of CPU time for each token. Clocks are in these milliseconds."""
    served = ServedModel("a", str(artifact), gteopt.load(artifact, device="cpu"))
    now = {"perf_counter": 0.0, "process_time": 0.0, "thread_time": 0.0}

    def compute(tokens: Sequence[Sequence[int]]) -> None:
        work_s = 1e-3 * sum(map(len, tokens))
        for clock, share in zip(now, (wall_s, 1.0, this_thread_s), strict=True):
            now[clock] += work_s * share

    monkeypatch.setattr(served, "compute", compute)
    monkeypatch.setattr("torch.get_num_threads", lambda: n_threads)
    monkeypatch.setattr("gteopt.cores.n_cores", lambda: n_cores)
    monkeypatch.setattr("gteopt.server.models.n_cores", lambda: n_cores, raising=False)
    for clock in now:
        monkeypatch.setattr(f"time.{clock}", lambda clock=clock: now[clock])
    served.warm_up()
    assert served.cost.pass_s([100, 50]) == pytest.approx(0.15 * alone_s)
    # A pass of the budget's seconds holds as many tokens as the server says.
    budget = served.budget
    assert budget.seconds == pytest.approx(0.02)
    assert served.batch_tokens == pytest.approx(budget.seconds / (1e-3 * alone_s), abs=1)


def test_a_pass_may_be_longer_where_queries_run_between_its_blocks(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass with much fixed work needs many tokens; a query then waits for one block."""
    served = ServedModel("a", str(artifact), gteopt.load(artifact, device="cpu"))
    monkeypatch.setattr("gteopt.server.models.measure_cost", lambda *_: CostModel(0.2, 0, 1e-3, 0))
    for n_blocks, longest_s in ((1, 0.1), (4, 0.1), (12, 0.3), (28, 0.7)):
        config = cast("dict[str, Any]", served.encoder.checkpoint.config)
        monkeypatch.setitem(config, "num_hidden_layers", n_blocks)
        served.warm_up()
        assert served.budget.seconds == pytest.approx(longest_s)


def test_what_is_padded_is_computed_in_groups_of_like_length(
    short: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = short.service.models["short"]
    texts = ["word " * n for n in (1, 100, 2, 90, 3, 80)]
    tokens = served.encoder.tokenization.tokenize(texts)
    monkeypatch.setattr(Encoder, "pads", property(lambda self: True))
    padded = ServedModel("short", served.source, served.encoder)
    longest = max(map(len, tokens))
    lengths = [len(ids) for ids in tokens]
    assert 0 < padded.padding(lengths) < 0.4 * (longest * len(tokens) - sum(lengths))
    np.testing.assert_allclose(padded.compute(tokens), served.encoder.encode(texts), atol=1e-5)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_shows_what_is_served(short: Running, tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom"),
            short.url,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "short" in ran.stdout.partition("<tbody>")[2].partition("</tbody>")[0], ran.stderr
    assert "128, 64, 32" in ran.stdout
    example = html.unescape(ran.stdout.partition('id="example">')[2].partition("</pre>")[0])
    assert short.url in example
    names: dict[str, Any] = {}
    exec(example, names)
    assert len(names["client"].embeddings.create(model="short", input=["a text"]).data) == 1
