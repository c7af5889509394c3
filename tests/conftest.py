"""Fixtures that more than one test file needs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the repository, which users do not have."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not (folder / "hub").is_dir():
        pytest.skip("needs ../shared/hub (MTEB data in the Hub's layout) beside the checkout")
    return folder
