"""What changes between two runs besides the model: clock, locale, time zone, revision of data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gteopt
from gteopt.commands.choose import choose_by_policy
from gteopt.commands.evaluate import EvaluationSetup, evaluate_suite
from gteopt.config.policy import load_policy
from gteopt.config.recipe import Recipe
from gteopt.errors import InputError
from gteopt.evaluation.runner import run_suite
from gteopt.evaluation.suites import Suite, add_own_task, read_suite
from gteopt.progress import ignore_progress

SUITE = Suite.model_validate(
    {
        "schema": "gteopt.suite/1",
        "name": "few",
        "tasks": [{"task": "MiniSTS", "subsets": ["en", "fr"]}],
    }
)
AGAIN = """
import json, sys
from pathlib import Path
import gteopt
from gteopt.evaluation.runner import run_suite
from gteopt.evaluation.suites import Suite
suite = Suite.model_validate_json(sys.argv[1])
run = run_suite(gteopt.load("nano", device="cpu"), suite, store=Path(sys.argv[2]))
print(json.dumps([[row.score for row in run.scores], run.encodings_now.n_encoded]))
"""


def test_another_clock_locale_and_time_zone_change_no_score_and_encode_nothing(
    tmp_path: Path,
) -> None:
    """In the second run, files have times in the future, and the locale is ASCII."""
    first_run = run_suite(gteopt.load("nano", device="cpu"), SUITE, store=tmp_path)
    assert first_run.encodings_now.n_encoded > 0
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9))
    surroundings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "NZ"}
    again = subprocess.run(
        [sys.executable, "-c", AGAIN, SUITE.model_dump_json(by_alias=True), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **surroundings},
        timeout=300,
    )
    scores, n_encoded = json.loads(again.stdout.splitlines()[-1])
    assert scores == [row.score for row in first_run.scores]
    assert n_encoded == 0


def test_a_suite_of_another_revision_of_data_is_another_suite() -> None:
    """`choose` compares this hash, so it refuses results of both in one folder."""
    suite = read_suite("mteb-fr")
    task = suite.tasks[0].model_copy(update={"revision": "0" * 40})
    changed = suite.model_copy(update={"tasks": (task, *suite.tasks[1:])})
    assert suite.sha256({}) != changed.sha256({})


def test_results_of_changed_data_in_one_folder_are_refused_in_words(tmp_path: Path) -> None:
    """One folder holds reports from before and from after the change."""
    pairs = tmp_path / "pairs.csv"
    rows = [f"the {i}th bird,a bird number {i % 7},{i % 5}" for i in range(24)]
    scheme = {"bits": 8, "group_size": "per_channel", "symmetric": True}
    recipe = {
        "schema": "gteopt.recipe/1",
        "name": "int8",
        "weights": {"method": "rtn", "scheme": scheme},
    }
    artifact = tmp_path / "int8"
    gteopt.quantize("nano", Recipe.model_validate(recipe), artifact, device="cpu")
    for variant, n_rows in (("before", 20), ("after", 24)):
        pairs.write_text("\n".join(["sentence1,sentence2,score", *rows[:n_rows], ""]))
        evaluate_suite(
            {"nano": "nano", variant: str(artifact)},
            add_own_task(None, pairs),
            tmp_path / "results",
            how=EvaluationSetup(device="cpu"),
            progress=ignore_progress,
        )
    with pytest.raises(InputError) as caught:
        choose_by_policy(tmp_path / "results", load_policy("balanced"))
    assert "the evaluations are of 2 suites: own " in str(caught.value)
    assert "repeat the outdated measurements" in str(caught.value)
