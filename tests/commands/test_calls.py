"""The Python functions write and return what the commands with the same names do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gteopt
from gteopt.cli.app import app
from gteopt.commands.choose import write_comparison_page
from gteopt.commands.evaluate import EvaluationSetup
from gteopt.commands.optimize import propose_plan
from gteopt.config.plan import BenchSpec, Workload
from gteopt.errors import InputError
from gteopt.kernels.cpu import multiplies_bfloat16
from gteopt.records.evaluation import EvalReport
from gteopt.report.compare import comparison_rows, item_rows

QUICK = BenchSpec(
    query_tokens=8, n_queries=10, repeats=1, warmup=0, workloads=(Workload(batch_size=1, tokens=8),)
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a variant of nano and texts."""
    folder = tmp_path_factory.mktemp("calls")
    gteopt.quantize("nano", "rtn-int8", folder / "int8")
    lines = [f"text number {i} is about {topic}" for i in range(8) for topic in ("rain", "tax")]
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def results(workspace: Path) -> Path:
    judges = gteopt.Judges(texts=workspace / "texts.txt")
    reports = gteopt.evaluate(workspace / "int8", judges, out=workspace / "results")
    assert {"int8"} <= set(reports)
    gteopt.bench([workspace / "int8"], baseline="nano", spec=QUICK, out=workspace / "results")
    return workspace / "results"


def test_all_lie_in_one_folder_and_the_choice_is_written_there(results: Path) -> None:
    choice = gteopt.choose(results, "balanced")
    assert json.loads((results / "choice.json").read_text())["reason"] == choice.reason
    assert "int8" in {candidate.name for candidate in choice.candidates}


def test_two_artifacts_are_compared(workspace: Path, results: Path) -> None:
    gteopt.quantize("nano", "rtn-int4", workspace / "int4")
    comparison = gteopt.compare(workspace / "int8", workspace / "int4")
    assert comparison.names == ("int8", "int4")
    assert len(comparison.manifests) == 2
    assert len(gteopt.compare(results, results).results) == 2


def test_two_artifacts_are_compared_by_their_settings_without_their_weights(
    workspace: Path, tmp_path: Path
) -> None:
    names = ("int8", "rtn-fp8")
    gteopt.quantize("nano", "rtn-fp8", tmp_path / "rtn-fp8")
    shutil.copytree(workspace / "int8", tmp_path / "int8")
    opened = tuple(gteopt.inspect(tmp_path / name).engines for name in names)
    weights = [path for name in names for path in (tmp_path / name).rglob("*.safetensors")]
    assert weights
    for path in weights:
        path.unlink()
        path.mkdir()  # reading a folder fails for every user, also for root
    comparison = gteopt.compare(tmp_path / "int8", tmp_path / "rtn-fp8")
    assert comparison.engines == opened
    assert len(set(opened)) == 2


def test_what_is_compared_with_itself_or_with_a_namesake_has_a_column_of_its_own(
    workspace: Path, results: Path, tmp_path: Path
) -> None:
    namesake = shutil.copytree(workspace / "int8", tmp_path / "int8")
    texts = gteopt.Judges(texts=workspace / "texts.txt")
    for second in (workspace / "int8", namesake):
        comparison = gteopt.compare(workspace / "int8", second, texts)
        rows = comparison_rows(comparison.names, comparison.manifests, (), comparison.engines)
        assert all(len(row) == 3 for row in rows)
        assert set(comparison.fidelity) == set(comparison.names)
        fidelity = comparison.fidelity[comparison.names[1]].fidelity
        assert fidelity.mean_cosine == pytest.approx(1)
    for second in (results, shutil.copytree(results, tmp_path / "results")):
        comparison = gteopt.compare(results, second)
        rows = comparison_rows(comparison.names, (), comparison.results)
        assert rows
        assert all(row[comparison.names[0]] == row[comparison.names[1]] for row in rows)
        assert all(len(row) == 3 for row in rows)
        page = write_comparison_page(results, second).read_text(encoding="utf-8")
        assert all(f"<b>{name}</b>" in page for name in comparison.names)
    shown = CliRunner().invoke(app, ("compare", str(results), str(results), "--json"))
    assert all(len(row) == 3 for row in json.loads(shown.stdout)["rows"])


def test_kernels_are_those_that_were_asked_for_and_the_record_says_so(workspace: Path) -> None:
    judges = gteopt.Judges(texts=workspace / "texts.txt")
    reports = gteopt.evaluate(workspace / "int8", judges, how=EvaluationSetup(kernels="decoded"))
    assert "decoded" in reports["int8"].versions["arithmetic"]
    assert "decoded" not in reports["nano"].versions["arithmetic"]
    with pytest.raises(InputError, match=r"unknown kernels 'nosuch'.*measured"):
        gteopt.inspect(workspace / "int8", kernels="nosuch")
    with pytest.raises(InputError, match=r"unknown kernels 'nosuch'.*measured"):
        gteopt.load("nano", device="cpu", kernels="nosuch")  # without quantized layers, too
    measured = gteopt.inspect("nano", device="cpu", kernels="measured").kernels
    assert ("packed once" in str(measured)) == multiplies_bfloat16()


def test_two_results_folders_are_compared_item_by_item(workspace: Path, tmp_path: Path) -> None:
    rows = ["sentence1,sentence2,score", *(f"rain {i},rain {i * i},{i}" for i in range(24))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    judges = gteopt.Judges(data=tmp_path / "pairs.csv")
    for name, recipe in (("first", "rtn-int8"), ("second", "rtn-int4")):
        gteopt.quantize("nano", recipe, tmp_path / name / "mine")
        gteopt.evaluate(tmp_path / name / "mine", judges, out=tmp_path / name / "results")
    folders = [tmp_path / name / "results" for name in ("first", "second")]
    comparison = gteopt.compare(folders[0], folders[1])
    assert comparison.names != ("results", "results")
    assert set(comparison.items) == {"nano", "mine"}
    mine = comparison.items["mine"]
    scores = [gteopt.compare(folder, folder).items["mine"].score for folder in folders]
    assert (mine.baseline_score, mine.score) == tuple(scores)
    assert mine.difference is not None
    assert mine.difference.low <= mine.score - mine.baseline_score <= mine.difference.high
    table_rows = item_rows(comparison.items, comparison.names)
    assert [row["variant"] for row in table_rows] == ["mine", "nano"]
    assert table_rows[1]["verdict"] == "equivalent"
    assert (comparison.notes, table_rows[0]["tasks"]) == ((), "1")


def test_data_may_be_the_name_of_a_data_set(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "hub/org/pairs/test.csv"
    file.parent.mkdir(parents=True)
    rows = ["sentence1,sentence2,score", *(f"rain {i},rain {i * i},{i}" for i in range(24))]
    file.write_text("\n".join(rows))
    setup = EvaluationSetup(hub_dir=tmp_path / "hub")
    named = gteopt.Judges(data="org/pairs:test")
    by_name = gteopt.evaluate(workspace / "int8", named, how=setup)["int8"]
    assert isinstance(by_name, EvalReport)
    by_file = gteopt.evaluate(workspace / "int8", gteopt.Judges(data=str(file)))["int8"]
    assert isinstance(by_file, EvalReport)
    assert (by_name.score, by_name.suite_sha256) == (by_file.score, by_file.suite_sha256)
    limits = gteopt.Limits(max_weights="13MB")
    search = gteopt.Search(hub_dir=tmp_path / "hub")
    assert propose_plan("nano", named, limits, search, out=tmp_path / "out").plan.data == file
    int8 = workspace / "int8"
    with pytest.raises(InputError, match="no file of dev"):
        gteopt.compare(int8, int8, gteopt.Judges(data="org/pairs:dev"), how=setup)


def test_a_wrong_call_is_told_before_anything_is_measured(workspace: Path) -> None:
    with pytest.raises(InputError, match="nothing to evaluate on"):
        gteopt.evaluate(workspace / "int8", gteopt.Judges())
    with pytest.raises(InputError, match="does not exist"):
        gteopt.evaluate(workspace / "int8", gteopt.Judges(texts=workspace / "no.txt"))
    texts_and_suite = gteopt.Judges(texts=workspace / "texts.txt", suite="mini")
    with pytest.raises(InputError, match="leave out suite and data"):
        gteopt.evaluate(workspace / "int8", texts_and_suite)
    with pytest.raises(InputError, match="budget '1': write the unit"):
        gteopt.evaluate(workspace / "int8", gteopt.Judges(suite="mini", budget="1"))
    columns_alone = gteopt.Judges(suite="mini", columns=(("query", "q"),))
    with pytest.raises(InputError, match="columns names the columns of data or texts"):
        gteopt.evaluate(workspace / "int8", columns_alone)
    with pytest.raises(InputError, match="margin 2"):
        gteopt.evaluate(workspace / "int8", gteopt.Judges(texts=workspace / "texts.txt"), margin=2)
    with pytest.raises(InputError, match="did you mean balanced"):
        gteopt.choose(workspace, "balancd")
    with pytest.raises(InputError, match="two artifacts are named int8"):
        gteopt.bench([workspace / "int8", workspace / "other" / "int8"])
