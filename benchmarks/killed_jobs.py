"""An embedding job that is killed at random moments: the driver, a worker, or both at once.

Each run of the job is a fork of this process with two workers of its own. When a job is finished
and more kills are wanted, another one begins. Every finished folder is compared with that of a job
that nobody killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gteopt.commands.embed import embed

DEVICES = "cpu,cpu"
SHARD_ROWS = 4


@dataclass
class Killed:
    """What was done to the jobs, and what became of them."""

    kills: Counter[str] = field(default_factory=Counter)
    n_jobs: int = 0
    n_differing: int = 0
    n_shards: int = 0
    n_embedded_twice: int = 0


def kill_jobs(corpus: Path, folder: Path, n_kills: int, seed: int) -> dict[str, Any]:
    """Kill jobs over a corpus so many times, each process about as often.

    Args:
        corpus: a .jsonl file of so many rows that a job takes a few seconds.
        folder: for the output folders.
        n_kills: how many.
        seed: of the moments and of who is killed.
    """
    whole = folder / "whole"
    began = time.monotonic()
    _end(_fork(corpus, whole))
    longest_s = time.monotonic() - began
    expected = folder_bytes(whole)
    found, moments = Killed(n_shards=_n_shards(expected)), random.Random(seed)
    while sum(found.kills.values()) < n_kills:
        out = folder / f"killed{found.n_jobs}"
        while not _run_once(corpus, out, found, moments, n_kills, longest_s):
            pass
        found.n_jobs += 1
        found.n_differing += folder_bytes(out) != expected
        written = out.with_suffix(".log").read_text().split()
        found.n_embedded_twice += len(written) - len(set(written))
    return {
        "n_kills": dict(found.kills),
        "n_jobs": found.n_jobs,
        "n_shards_of_a_job": found.n_shards,
        "n_folders_that_differ": found.n_differing,
        "n_finished_shards_embedded_again": found.n_embedded_twice,
    }


def folder_bytes(out: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def _n_shards(content: Mapping[str, bytes]) -> int:
    return sum(name.startswith("data/") for name in content)


def _run_once(
    corpus: Path, out: Path, found: Killed, moments: random.Random, n_kills: int, longest_s: float
) -> bool:
    """One run; whether it came to its end."""
    driver = _fork(corpus, out)
    while True:
        due = time.monotonic() + moments.uniform(0, longest_s)
        while time.monotonic() < due:
            if driver.status() == psutil.STATUS_ZOMBIE:
                _end(driver)
                return True
            time.sleep(0.01)
        if sum(found.kills.values()) >= n_kills:
            _end(driver)
            return True
        workers = [each for each in driver.children() if "spawn_main" in " ".join(each.cmdline())]
        victim = moments.choice(("driver", "worker", "both"))
        if victim != "driver" and not workers:
            continue  # none has begun yet
        with suppress(psutil.NoSuchProcess):
            if victim != "driver":
                moments.choice(workers).kill()
            if victim != "worker":
                driver.kill()
        found.kills[victim] += 1
        print(f"killed {victim}: {sum(found.kills.values())} of {n_kills}", flush=True)
        if victim != "worker":
            os.waitpid(driver.pid, 0)
            psutil.wait_procs(workers, timeout=60)
            return False


def _fork(corpus: Path, out: Path) -> psutil.Process:
    """A run of the job in a process of its own, which notes each finished shard in a log."""
    pid = os.fork()
    if pid:
        return psutil.Process(pid)
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, facts: Mapping[str, Any]) -> None:
        if event == "shard":
            os.write(log, f"{facts['name']}\n".encode())

    code = 1
    try:
        embed(str(corpus), "nano", out, events=note, devices=DEVICES, shard_rows=SHARD_ROWS)
        code = 0
    finally:
        os._exit(code)


def _end(driver: psutil.Process) -> None:
    """Wait for a run that nobody kills."""
    _, status = os.waitpid(driver.pid, 0)
    assert not os.WIFSIGNALED(status), signal.Signals(os.WTERMSIG(status))
    assert os.WEXITSTATUS(status) == 0, "a run failed; its error stands above"


def rows_of(path: Path, n_rows: int) -> Path:
    """A .jsonl file of texts of different lengths, some of which are dead letters."""
    texts: list[object] = ["wing " * (1 + i % 7) + str(i) for i in range(n_rows)]
    texts[n_rows // 2], texts[-1] = "", 5
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return path
