"""Run one embedding job again and again, killed at random moments, until it is finished.

    python -m tests.support.killed_jobs CORPUS OUT N_KILLS SEED [SHARD_ROWS]

The model is loaded once. Each run is a fork of this process, and SIGKILL ends it at a random time.
Prints the number of kills, of rows and of bad rows.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.support.embedding import embed_with


def main(corpus: str, out: str, n_kills: str, seed: str, shard_rows: str = "4") -> None:
    """Run the job; the module's docstring names the arguments."""
    import gteopt

    torch.set_num_threads(1)  # a forked process has no threads but its own
    encoder = gteopt.load("nano", device="cpu")
    moments = random.Random(int(seed))
    log = Path(out).with_suffix(".log")
    killed = 0
    whole_s = 2.0
    while True:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            report = embed_with(encoder, Path(corpus), Path(out), shard_rows=int(shard_rows))
            log.write_text(f"{report.n_rows} {report.n_bad}")
            os._exit(0)
        if killed < int(n_kills):
            time.sleep(moments.uniform(0, whole_s / int(n_kills) * 2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        assert status == 0, status
        if killed == 0:
            whole_s = time.monotonic() - began
        break
    sys.stdout.write(f"{killed} {log.read_text()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
