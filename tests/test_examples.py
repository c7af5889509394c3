"""The scripts in examples/ run as they are and print what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "arguments", "printed"),
    [
        ("own_model", ["nano", "out"], "cosine to the model's vectors: [0.99"),
        ("retrieval", ["out"], "'when can I borrow a book' with out: 'The library opens"),
        ("bulk_parquet", ["vectors.parquet"], "200 vectors of 256 dimensions"),
    ],
)
def test_an_example_runs(
    name: str,
    arguments: list[str],
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert printed in capsys.readouterr().out


def test_every_example_is_tested() -> None:
    tested = {"own_model", "retrieval", "bulk_parquet"}
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tested
