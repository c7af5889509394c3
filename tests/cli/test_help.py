"""Help is short and in groups: each option has a panel, and two lines at most."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from gteopt.cli.app import app

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
OPTION = re.compile(r"│ [ *]{0,5}(--?[a-z][a-z-]*)")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_a_group_and_takes_two_lines(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"}).output
    n_lines: dict[str, int] = {}
    panel, option = "", ""
    for line in shown.splitlines():
        if line.startswith("╭"):
            panel, option = line.strip("╭─╮ "), ""
        elif (match := OPTION.match(line)) is not None:
            option = match[1]
            assert not re.search(r"  <[^>]*$", line), f"the choices of {option} are broken"
            n_lines[option] = 1
            assert (option == "--help") == (panel == "Options"), f"{option} is in {panel}"
        elif option and line.startswith("│"):
            # The default, the variable and whether it is required have lines of their own.
            n_lines[option] += not line.strip("│ ").startswith("[")
    assert {"--help"} < set(n_lines) or command == "export"
    assert [name for name, n in n_lines.items() if n > 2] == []
