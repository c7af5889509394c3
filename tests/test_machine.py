"""The process keeps freed memory for the next layer, unless the user has set the allocator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gteopt.machine import keep_freed_memory

FAULTS_OF_PASSES = """
import resource
import gteopt

encoder = gteopt.load("nano", device="cpu", dtype="float32")
texts = ["A bridge over the river carries trains by night. " * 12] * 32
for _ in range(3):
    encoder.encode(texts)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    encoder.encode(texts)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**variables: str) -> int:
    """Pages that the system cleared during some passes of 32 texts, in a process of its own."""
    command = [sys.executable, "-c", FAULTS_OF_PASSES]
    environment = {**os.environ, **variables}
    return int(subprocess.check_output(command, text=True, env=environment).split()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has these settings")
def test_a_pass_takes_the_memory_of_the_pass_before() -> None:
    ours = page_faults()
    without = page_faults(MALLOC_TRIM_THRESHOLD_="131072")  # glibc's value at the start
    assert ours < 0.05 * without


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "65536")
    assert not keep_freed_memory()
