"""Kill embedding jobs at random moments: the driver, a worker, or both at once.

Each run of a job is a fork of this process with two workers. When a job is finished and more kills
are wanted, another job begins. Each finished folder is compared with the folder of a job that was
not killed.
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
from gteopt.speed.clock import Stopwatch

DEVICES = "cpu,cpu"
SHARD_ROWS = 4


@dataclass
class Killed:
    """Kills by victim, and the state of the jobs afterwards."""

    kills: Counter[str] = field(default_factory=Counter)
    n_jobs: int = 0
    n_differing: int = 0
    n_shards: int = 0
    n_embedded_twice: int = 0


def kill_jobs(corpus: Path, folder: Path, n_kills: int, seed: int) -> dict[str, Any]:
    """Kill jobs `n_kills` times; driver, worker and both are victims about equally often.

    Args:
        corpus: a .jsonl file with enough rows for a job of a few seconds.
        folder: parent of the output folders.
        n_kills: number of kills over all jobs.
        seed: seed of the moments and the victims.
    """
    whole = folder / "whole"
    watch = Stopwatch()
    _end(_fork(corpus, whole))
    longest_s = watch.wall_s
    expected = folder_bytes(whole)
    killed, moments = Killed(n_shards=_n_shards(expected)), random.Random(seed)
    while sum(killed.kills.values()) < n_kills:
        out = folder / f"killed{killed.n_jobs}"
        while not _run_once(corpus, out, killed, moments, n_kills, longest_s):
            pass
        killed.n_jobs += 1
        killed.n_differing += folder_bytes(out) != expected
        written = out.with_suffix(".log").read_text().split()
        killed.n_embedded_twice += len(written) - len(set(written))
    return {
        "n_kills": dict(killed.kills),
        "n_jobs": killed.n_jobs,
        "n_shards_of_a_job": killed.n_shards,
        "n_folders_that_differ": killed.n_differing,
        "n_finished_shards_embedded_again": killed.n_embedded_twice,
    }


def folder_bytes(out: Path) -> dict[str, bytes]:
    """Bytes of each file of a folder, by path."""
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def _n_shards(content: Mapping[str, bytes]) -> int:
    return sum(name.startswith("data/") for name in content)


def _run_once(
    corpus: Path, out: Path, killed: Killed, moments: random.Random, n_kills: int, longest_s: float
) -> bool:
    """Run the job until it ends or is killed; returns whether it ended."""
    driver = _fork(corpus, out)
    while True:
        due = time.monotonic() + moments.uniform(0, longest_s)
        while time.monotonic() < due:
            if driver.status() == psutil.STATUS_ZOMBIE:
                _end(driver)
                return True
            time.sleep(0.01)
        if sum(killed.kills.values()) >= n_kills:
            _end(driver)
            return True
        workers = [p for p in driver.children() if "spawn_main" in " ".join(p.cmdline())]
        victim = moments.choice(("driver", "worker", "both"))
        if victim != "driver" and not workers:
            continue  # no worker has begun yet
        with suppress(psutil.NoSuchProcess):
            if victim != "driver":
                moments.choice(workers).kill()
            if victim != "worker":
                driver.kill()
        killed.kills[victim] += 1
        print(f"killed {victim}: {sum(killed.kills.values())} of {n_kills}", flush=True)
        if victim != "worker":
            os.waitpid(driver.pid, 0)
            psutil.wait_procs(workers, timeout=60)
            return False


def _fork(corpus: Path, out: Path) -> psutil.Process:
    """Fork a process that runs the job and writes each finished shard to a log."""
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
    """Wait for a run to end by itself."""
    _, status = os.waitpid(driver.pid, 0)
    assert not os.WIFSIGNALED(status), signal.Signals(os.WTERMSIG(status))
    assert os.WEXITSTATUS(status) == 0, "a run failed; its error is printed above"


def rows_of(path: Path, n_rows: int) -> Path:
    """A .jsonl file of texts of different lengths; two rows cannot be embedded."""
    texts: list[object] = ["wing " * (1 + i % 7) + str(i) for i in range(n_rows)]
    texts[n_rows // 2], texts[-1] = "", 5
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
