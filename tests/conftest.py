"""Fixtures that more than one test file needs."""

from __future__ import annotations

import os
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Tests that run side by side share the cores, and so do the processes that they start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it at its first import. Kernels for GPUs then run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def minilm_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all-MiniLM-L6-v2's float32 vectors, which the first test to need them writes."""
    return tmp_path_factory.mktemp("minilm")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the repository, which users do not have."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not (folder / "hub").is_dir():
        pytest.skip("needs ../shared/hub (MTEB data in the Hub's format) beside the checkout")
    return folder
