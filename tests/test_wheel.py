"""The wheel works outside the checkout, in its own environment, with the files that it ships.

The environment holds the wheel alone. A path file names the site-packages of the running
environment, which hold the dependencies, because installing them takes minutes and gigabytes. Path
files in there are not read, so an editable install of the checkout cannot be imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from gteopt.version import __version__

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of the wheel's environment in an empty folder, and returns what it prints."""
    made = tmp_path_factory.mktemp("wheel")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(made), str(ROOT)]
    subprocess.run([*pip, *build], check=True, env=bare)
    (wheel,) = made.glob("gteopt-*.whl")
    environment, folder = made / "environment", made / "folder"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, env=bare)
    site_packages = next((environment / "lib").glob("python*/site-packages"))
    (site_packages / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def program(name: str, *arguments: str) -> str:
        ran = subprocess.run(
            [environment / "bin" / name, *arguments],
            cwd=folder,
            env=bare,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return program


def test_the_wheel_is_what_is_imported(run: Run) -> None:
    location = run("python", "-c", "import gteopt; print(gteopt.__file__)").strip()
    assert "/environment/lib/" in location
    assert run("gteopt", "--version").strip() == f"gteopt {__version__}"


def test_what_ships_is_found(run: Run) -> None:
    listed = {name: run("gteopt", name, "--csv") for name in ("recipes", "suites", "plans")}
    assert "gptq-int4," in listed["recipes"]
    assert "mini," in listed["suites"]
    assert "demo," in listed["plans"]
    assert "edit this plan" in run("gteopt", "init", "plan")


def test_a_model_is_looked_at_planned_built_and_checked(run: Run) -> None:
    facts = json.loads(run("gteopt", "inspect", "nano", "--recipe", "rtn-int4", "--json"))
    assert facts["dims"] == 256
    planned = run(
        "gteopt", "optimize", "nano", "--max-weights", "13MB", "--dry-run", "--out", "out"
    )
    assert "Next: gteopt run out/plan.yaml" in planned
    run("gteopt", "quantize", "nano", "--recipe", "rtn-int4", "--out", "int4")
    assert "all match the manifest" in run("gteopt", "verify", "int4")
    script = "import gteopt; print(gteopt.load('int4').encode('a text').shape)"
    assert run("python", "-c", script).strip() == "(256,)"
