"""Every length and code from one encoding scores as an artifact made with the same settings."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import gteopt
from gteopt.cli.app import main
from gteopt.commands.evaluate import EvaluationSetup, VectorGrid, evaluate_suite, parse_vector_grid
from gteopt.config.recipe import Recipe, VectorCode
from gteopt.errors import InputError
from gteopt.evaluation.runner import run_suite
from gteopt.evaluation.suites import Suite, add_own_task
from gteopt.evaluation.tasks import load_suite
from gteopt.progress import ignore_progress
from gteopt.records.evaluation import EvalReport
from gteopt.records.files import read_record
from gteopt.report.terminal import eval_table, grid_table

SUITE_OF_PAIRS = Suite.model_validate(
    {
        "schema": "gteopt.suite/1",
        "name": "pairs",
        "tasks": [{"task": "MiniSTS", "subsets": ["en"]}],
    }
)
TOPICS = (
    *("ships at sea", "trees in spring", "old coins", "fast trains", "sour bread", "night sky"),
    *("deep caves", "wool socks", "river ice", "brass bells"),
)
"""As many queries as an interval needs."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """A search among short texts, and k-means: two uses of vectors."""
    folder = tmp_path_factory.mktemp("grid") / "library"
    (folder / "qrels").mkdir(parents=True)
    documents = [
        (f"d{i}{j}", f"{topic} {word}")
        for i, topic in enumerate(TOPICS)
        for j, word in enumerate(("seen", "bought", "lost", "drawn", "loved"))
    ]
    corpus = [{"_id": document_id, "text": text} for document_id, text in documents]
    queries = [{"_id": f"q{i}", "text": f"all about {topic}"} for i, topic in enumerate(TOPICS)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        content = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(content)
    lines = [
        f"q{document_id[1]}\t{document_id}\t1\n"
        for document_id, _ in documents
        if document_id[2] != "4"
    ]
    (folder / "qrels" / "test.tsv").write_text("".join(lines))
    tasks = [
        {"task": "library", "data": str(folder)},
        {"task": "MiniTopicClustering", "subsets": ["en"]},
    ]
    return Suite.model_validate({"schema": "gteopt.suite/1", "name": "small", "tasks": tasks})


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, and rounded weights whose recipe shortens by PCA; both calibrate on few texts."""
    scheme = {"bits": 8, "group_size": "per_channel", "symmetric": True}
    recipes: dict[str, dict[str, Any]] = {
        "base": {"weights": {"method": "none"}},
        "pca": {
            "weights": {"method": "rtn", "scheme": scheme},
            "dims": {"n": 16, "method": "pca"},
        },
    }
    calibration = {"n_texts": 24, "max_tokens": 16}
    folders = {}
    for name, recipe in recipes.items():
        full = {"schema": "gteopt.recipe/1", "name": name, "calibration": calibration, **recipe}
        folders[name] = tmp_path_factory.mktemp("grid") / name
        gteopt.quantize("nano", Recipe.model_validate(full), folders[name], device="cpu")
    return folders


@pytest.fixture(scope="module")
def reports(
    artifacts: dict[str, Path], suite: Suite, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EvalReport]:
    return evaluate_suite(
        {name: str(path) for name, path in artifacts.items()},
        suite,
        tmp_path_factory.mktemp("results"),
        how=EvaluationSetup(device="cpu", grid=VectorGrid((24, 16), ("float32", "int8", "binary"))),
        progress=ignore_progress,
    )


@pytest.mark.parametrize(("dims", "code"), [(24, "int8"), (16, "binary"), (16, "float32")])
def test_a_row_scores_as_the_truncated_artifact_does_alone(
    reports: dict[str, EvalReport],
    artifacts: dict[str, Path],
    suite: Suite,
    tmp_path: Path,
    dims: int,
    code: VectorCode,
) -> None:
    short = tmp_path / "short"
    gteopt.truncate(artifacts["pca"], short, dims=dims, method="pca", vectors=code, device="cpu")
    alone = run_suite(gteopt.load(short, device="cpu"), suite)
    row = reports[f"pca-{dims}-{code}"]
    assert not alone.failed
    assert {t.task: t.score for t in row.tasks} == {t.task: t.score for t in alone.scores}
    assert row.bytes_per_vector == alone.vectors.bytes_per_vector


def test_a_grid_encodes_each_text_once_for_all_rows(reports: dict[str, EvalReport]) -> None:
    # The baseline's own vectors, and six rows for each of the two models.
    assert next(iter(reports)) == "base"
    assert len(reports) == 1 + 2 * 6
    encoded = {name: report.n_encoded_texts for name, report in reports.items()}
    assert [name for name, n in encoded.items() if n] == ["base", "pca-24-float32"]
    assert encoded["base"] == encoded["pca-24-float32"]
    assert {report.n_asked_texts for report in reports.values()} == {encoded["base"]}
    table = str(grid_table(reports).caption)
    n_texts = encoded["base"]
    assert f"texts encoded: {2 * n_texts:,}; encodings saved: {11 * n_texts:,}" in table
    assert "for all 12 lines together (Holm)" in table


def test_a_grid_judges_all_rows_against_the_baselines_own_vectors(
    reports: dict[str, EvalReport],
) -> None:
    assert {report.baseline for report in reports.values()} == {"base"}
    assert len({report.artifact_sha256 for report in reports.values()}) == 13
    n_claims = {report.n_claims for report in reports.values()}
    assert n_claims == {12 * len(reports["base"].tasks)}
    assert reports["base"].retention == 1
    # The stored vectors decide: fewer dimensions and fewer bits are farther from the base.
    cosines = [
        reports[name].fidelity.mean_cosine for name in ("base", "base-16-float32", "base-16-binary")
    ]
    assert cosines[0] == pytest.approx(1, abs=1e-6)
    assert cosines == sorted(cosines, reverse=True)
    assert len(set(cosines)) == 3


def test_the_command_scores_a_grid_and_goes_on_where_it_was(
    artifacts: dict[str, Path],
    suite: Suite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def evaluate(*options: str) -> list[EvalReport]:
        data = str(suite.tasks[0].data)
        base, pca = (str(artifacts[name]) for name in ("base", "pca"))
        command = ["gteopt", "evaluate", pca, "--baseline", base, "--data", data, *options]
        command += ["--device", "cpu", "--out", str(tmp_path), "--json"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        return [EvalReport.model_validate(report) for report in json.loads(capsys.readouterr().out)]

    before = evaluate("--dims", "256,16", "--vectors", "binary,float32")
    assert [report.variant for report in before] == [
        *("base-256-float32", "base-256-binary", "base-16-float32", "base-16-binary"),
        *("pca-256-float32", "pca-256-binary", "pca-16-float32", "pca-16-binary"),
    ]
    assert {report.baseline for report in before} == {"base-256-float32"}
    assert read_record(tmp_path / "eval" / "pca-16-binary.json", EvalReport) == before[-1]
    # Another code needs no new encodings. The other rows report the counts of the first run.
    after = evaluate("--dims", "256,16", "--vectors", "float32,binary,int8")
    took = {report.variant: (report.n_asked_texts, report.n_encoded_texts) for report in before}
    n_texts, _ = took["pca-16-binary"]
    new = {f"{name}-{dims}-int8": (n_texts, 0) for name in artifacts for dims in (256, 16)}
    assert {e.variant: (e.n_asked_texts, e.n_encoded_texts) for e in after} == took | new


def test_all_that_cannot_be_scored_is_told_before_anything_is_encoded(
    artifacts: dict[str, Path], suite: Suite, tmp_path: Path
) -> None:
    flipped = tmp_path / "flipped"
    shutil.copytree(artifacts["pca"], flipped)
    weights = flipped / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    sources = {"base": "nano", "flipped": str(flipped), "lost": "./nowhere"}

    def refused(sources: dict[str, str], **settings: Any) -> str:
        with pytest.raises(InputError, match="cannot start") as caught:
            evaluate_suite(
                sources,
                suite,
                tmp_path,
                how=EvaluationSetup(device="cpu", **settings),
                progress=lambda what, *_: pytest.fail(what),
            )
        return str(caught.value)

    message = refused(sources)
    assert "flipped" in message
    assert "model.safetensors" in message
    assert "lost (./nowhere)" in message
    # Scores of one backend are not written over those of another.
    sources = {"base": "nano", "pca": str(artifacts["pca"])}
    pairs = SUITE_OF_PAIRS
    written = evaluate_suite(
        sources, pairs, tmp_path, how=EvaluationSetup(device="cpu"), progress=ignore_progress
    )
    assert {report.versions["backend"] for report in written.values()} == {"torch"}
    assert "pca.json holds scores of pca with backend torch" in refused(sources, backend="openvino")


def test_a_baseline_below_zero_leaves_differences_and_fidelity(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """The grades are reversed: the more alike two texts are, the lower is their grade."""
    rows = [("a cat", "a cat", 0), ("a cat", "the cats", 1), ("a cat", "a dog", 2)]
    rows += [("a cat", "tax law", 3), ("rain", "quantum field theory", 4)]
    path = tmp_path / "pairs.jsonl"
    lines = ({"sentence1": a, "sentence2": b, "score": grade} for a, b, grade in rows)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    sources = {"base": "nano", "mine": str(artifacts["pca"])}
    out, steps = tmp_path / "out", set[str]()
    results = evaluate_suite(
        sources,
        add_own_task(None, path),
        out,
        how=EvaluationSetup(device="cpu"),
        progress=lambda what, *_: steps.add(what),
    )
    # A row has one name everywhere. It never has the name of the recipe or of the base.
    assert {step.partition(":")[0] for step in steps} == {"base", "mine"}
    report = read_record(out / "eval" / "mine.json", EvalReport)
    assert report == results["mine"]
    assert report.baseline == "base"
    assert report.baseline_score < 0
    assert report.retention is None
    assert report.retention_low is None
    assert 0 < report.fidelity.mean_cosine < 0.9  # its recipe cuts the vectors
    assert report.no_retention is not None
    assert "the baseline base scores -" in report.no_retention
    assert report.no_retention in str(eval_table(results).caption)
    assert grid_table(results).row_count == 2


def test_wrong_grids_are_told_before_anything_is_encoded(artifacts: dict[str, Path]) -> None:
    with pytest.raises(InputError) as caught:
        parse_vector_grid("256,many,0", "int5,binary")
    for expected in ("'many' is not a number", "'0' is not a number", "unknown code 'int5'"):
        assert expected in str(caught.value)
    assert parse_vector_grid("64, 32,64", None) == VectorGrid(dims=(64, 32))
    with pytest.raises(InputError, match="dims 512 is more than the 256"):
        evaluate_suite(
            {name: str(path) for name, path in artifacts.items()},
            load_suite("mini"),
            None,
            how=EvaluationSetup(device="cpu", grid=VectorGrid(dims=(512,))),
            progress=lambda what, *_: pytest.fail(what),
        )
