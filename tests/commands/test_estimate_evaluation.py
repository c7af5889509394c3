"""A dry run says what an evaluation takes; missing data are reported before a model is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gteopt.commands.estimate_evaluation import estimate_evaluation
from gteopt.errors import InputError
from gteopt.evaluation.data_check import check_data, missing_data
from gteopt.evaluation.suites import read_suite
from gteopt.report.estimate_table import estimate_lines

RUN = (
    "import sys\n"
    "from gteopt.cli.app import main\n"
    "try:\n"
    "    main()\n"
    "finally:\n"
    "    heavy = {'torch', 'mteb', 'transformers', 'datasets'} & set(sys.modules)\n"
    "    print('HEAVY', sorted(heavy), file=sys.stderr)\n"
)


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def test_a_dry_run_of_56_tasks_loads_neither_torch_nor_mteb(tmp_path: Path) -> None:
    ran = cli(
        "evaluate",
        *("nano", "--suite", "mteb-en", "--dry-run", "--price-per-hour", "2", "--json"),
        HF_HOME=str(tmp_path),
    )
    assert ran.returncode == 0, ran.stderr
    assert "HEAVY []" in ran.stderr
    estimate = json.loads(ran.stdout)
    assert len(estimate["tasks"]) == 56
    assert estimate["n_texts"] == sum(task["n_texts"] for task in estimate["tasks"])
    assert len(estimate["missing"]) == 67  # CQADupstack is twelve data sets
    assert estimate["seconds"] == pytest.approx(estimate["n_tokens"] / estimate["tokens_per_s"])
    assert estimate["dollars"] == pytest.approx(2 * estimate["seconds"] / 3600)


def test_a_suite_without_its_data_offline_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    for options in ((), ("--hub-dir", str(tmp_path))):
        ran = cli(
            *("evaluate", "nano", "--suite", "mteb-fr", *options),
            HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="1",
        )
        assert ran.returncode == 1
        assert "HEAVY []" in ran.stderr
        assert ran.stderr.count("hf download") == 25


def test_what_is_downloaded_is_not_missing(tmp_path: Path) -> None:
    suite = read_suite("stsb")
    assert len(missing_data(suite, tmp_path)) == len(suite.tasks)
    for _, data, _ in missing_data(suite, tmp_path):
        (tmp_path / data).mkdir(parents=True)
    assert missing_data(suite, tmp_path) == []
    check_data(suite, tmp_path)


def test_the_hub_is_asked_once_whatever_the_number_of_tasks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    with pytest.raises(InputError, match="the Hub cannot be reached"):
        check_data(read_suite("mteb-en"), None)


def test_an_estimate_says_what_it_does_not_know(tmp_path: Path) -> None:
    from gteopt.evaluation.suites import add_own_task

    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\nc,d,2\ne,f,3\n")
    suite = add_own_task(read_suite("mini"), path)
    estimate = estimate_evaluation({"base": "nano", "mine": "nano"}, suite)
    lines = " ".join(estimate_lines(estimate))
    assert "2 models (base, mine)" in lines
    assert "not counted, as their size is unknown: pairs" in lines
    assert estimate.missing == ()
    assert estimate.seconds is not None
    assert estimate.tokens_per_s is not None
    assert estimate.seconds == pytest.approx(2 * estimate.n_tokens / estimate.tokens_per_s)
