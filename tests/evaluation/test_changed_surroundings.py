"""What changes between two runs besides the model: clock, locale, time zone, revision of data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gteopt
from gteopt.evaluation.runner import run_suite
from gteopt.evaluation.suites import Suite, read_suite

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
print(json.dumps([[each.score for each in run.scores], run.encodings_now.n_encoded]))
"""


def test_another_clock_locale_and_time_zone_change_no_score_and_encode_nothing(
    tmp_path: Path,
) -> None:
    """Files are from the future for the second run, which speaks ASCII alone."""
    first = run_suite(gteopt.load("nano", device="cpu"), SUITE, store=tmp_path)
    assert first.encodings_now.n_encoded > 0
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
    assert scores == [each.score for each in first.scores]
    assert n_encoded == 0


def test_a_suite_of_another_revision_of_data_is_another_suite() -> None:
    """Results of both in one folder are then refused by `choose`, which compares this hash."""
    suite = read_suite("mteb-fr")
    task = suite.tasks[0].model_copy(update={"revision": "0" * 40})
    other = suite.model_copy(update={"tasks": (task, *suite.tasks[1:])})
    assert suite.sha256({}) != other.sha256({})
