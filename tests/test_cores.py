"""Cores that a container allows, in both layouts of Linux's control groups, and torch's threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gteopt import cores
from gteopt.machine import describe_machine

NO_QUOTA = "max 100000"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of control groups; the process is in `a/b` of it, on 16 cores."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    (tmp_path / "own").write_text("0::/a/b\n")
    (tmp_path / "a/b").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("own", "parent", "outermost", "expected"),
    [
        (None, None, None, 16),
        (NO_QUOTA, NO_QUOTA, NO_QUOTA, 16),
        (None, None, "400000 100000", 4),
        ("150000 100000", None, NO_QUOTA, 2),  # one and a half: the half is worth a thread
        ("50000 100000", None, None, 1),
        (NO_QUOTA, "300000 100000", "800000 100000", 3),  # the tightest quota counts, in any group
        ("6400000 100000", None, None, 16),
        ("nonsense", "", None, 16),
    ],
)
def test_the_tightest_quota_from_the_own_group_outwards_limits_the_cores(
    groups: Path, own: str | None, parent: str | None, outermost: str | None, expected: int
) -> None:
    for folder, content in (("a/b", own), ("a", parent), (".", outermost)):
        if content is not None:
            (groups / folder / "cpu.max").write_text(content + "\n")
    assert cores.n_cores() == expected


def test_limits_of_the_first_version_of_control_groups_are_read(groups: Path) -> None:
    (groups / "own").write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    for name, content in (
        ("cpu/cpu.cfs_quota_us", "250000"),
        ("cpu/cpu.cfs_period_us", "100000"),
        ("memory/memory.limit_in_bytes", "1000000"),
    ):
        (groups / name).parent.mkdir(exist_ok=True)
        (groups / name).write_text(content + "\n")
    assert (cores.n_cores(), describe_machine().memory_bytes) == (3, 1_000_000)
    (groups / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert cores.n_cores() == 16


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(None, 4), ("", 4), ("2", 2), ("64", 4), ("3,1", 3), ("0", 4), ("all", 4)],
)
def test_threads_are_those_wanted_and_no_more_than_cores(
    groups: Path, wanted: str | None, expected: int
) -> None:
    (groups / "cpu.max").write_text("400000 100000")
    assert cores.n_threads(wanted) == expected


@pytest.mark.parametrize(("wanted", "is_told"), [(None, False), ("1", False), ("64", True)])
def test_the_command_line_takes_no_more_threads_than_a_container_has_cores(
    tmp_path: Path, wanted: str | None, is_told: bool
) -> None:
    """A quota of one core, on a machine that may have more: torch would take them all."""
    (tmp_path / "cpu.max").write_text("100000 100000")
    code = (
        "import sys; from pathlib import Path; from gteopt import cores; from gteopt.cli.app "
        "import main; cores.CGROUPS = Path(sys.argv.pop())\n"
        "try: main()\nexcept SystemExit: pass\n"
        "import torch; print(torch.get_num_threads())"
    )
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {} if wanted is None else {"OMP_NUM_THREADS": wanted}
    command = [sys.executable, "-c", code, "recipes", str(tmp_path)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "1"
    assert ("OMP_NUM_THREADS=64 is above the number of cores" in ran.stderr) == is_told
