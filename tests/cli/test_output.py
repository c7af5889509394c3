"""What commands print besides tables for people: CSV, Markdown, templates, next commands."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from gteopt.cli.lists import init
from gteopt.cli.output import choose_output_style, print_table
from gteopt.cli.progress_bars import format_time_left
from gteopt.config.plan import load_plan
from gteopt.config.policy import load_policy
from gteopt.config.recipe import load_recipe
from gteopt.config.yaml_files import read_yaml
from gteopt.errors import InputError, install_command
from gteopt.evaluation.suites import Suite
from gteopt.paths import ASSETS

PACKAGE = ASSETS.parent


def table() -> Table:
    shown = Table("variant", "tokens\n/s")
    shown.add_row(Text("a|b"), "1,000")
    shown.add_row("[bold]c[/]", "7")
    return shown


def test_csv_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(table(), "csv")
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows == [["variant", "tokens /s"], ["a|b", "1,000"], ["c", "7"]]


def test_markdown_escapes_what_separates_cells(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(table(), "markdown")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["| variant | tokens /s |", "|---|---|", "| a\\|b | 1,000 |", "| c | 7 |"]


def test_styles_exclude_one_another() -> None:
    assert (
        choose_output_style(False),
        choose_output_style(True),
        choose_output_style(False, True),
    ) == ("table", "json", "csv")
    with pytest.raises(InputError, match="exclude each other"):
        choose_output_style(True, True)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about 1 s left"), (22, "about 22 s left"), (89, "about 89 s left"),
     (142, "about 2 min left"), (9000, "about 2 h left")],
)  # fmt: skip
def test_a_remaining_time_is_rounded_to_a_readable_unit(seconds: float, words: str) -> None:
    assert format_time_left(seconds) == words


def test_init_writes_files_that_are_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("recipe", "policy", "plan", "suite"):
        init(kind)
    assert load_recipe("my-recipe.yaml").weights.method == "gptq"
    assert load_policy("my-policy.yaml").limits
    assert load_plan("my-plan.yaml").recipes == ("gptq-nf4", "int8")
    assert read_yaml(Path("my-suite.yaml"), Suite).tasks
    assert "Next: gteopt run my-plan.yaml" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"my-plan.yaml exists"):
        init("plan")


def test_the_command_that_installs_an_extra_is_copied_into_a_shell_as_it_stands(
    tmp_path: Path,
) -> None:
    (tmp_path / "gteopts").touch()  # the bare pattern gteopt[serve] matches this name
    argument = install_command("serve").removeprefix("pip install ")
    for shell in filter(shutil.which, ("bash", "zsh")):
        line = f"printf %s {argument}"
        printed = subprocess.run([shell, "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert printed.stdout == "gteopt[serve]"


def test_each_message_about_an_extra_takes_its_command_from_one_place() -> None:
    sources = {path for path in PACKAGE.rglob("*.py") if "gteopt[" in path.read_text()}
    assert sources == {PACKAGE / "errors.py"}
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"install_command\(['\"](\w+)", text))
    extras = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert named <= set(extras["optional-dependencies"])
