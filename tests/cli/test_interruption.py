"""Ctrl-C in the first seconds ends the process at once, without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest


def started(preexec: str = "") -> subprocess.Popen[str]:
    """Start `gteopt inspect` of a shape, which takes seconds, and wait until Python is up."""
    script = (
        f"import sys\n{preexec}\nfrom gteopt.__main__ import main\n"
        "sys.argv = ['gteopt', 'inspect', 'gte-Qwen2-7B-instruct']\n"
        "print('up', flush=True)\nmain()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    return child


@pytest.mark.parametrize("delay_s", [0.02, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2])
def test_ctrl_c_while_gteopt_starts_is_quiet(delay_s: float) -> None:
    child = started()
    time.sleep(delay_s)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert err in ("", "gteopt: interrupted\n")


def test_a_parents_wish_to_ignore_ctrl_c_is_kept() -> None:
    """A shell sets this for a process that it starts with `&`."""
    child = started("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)")
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert "gte-Qwen2-7B-instruct" in out
