"""The figure of codes over bytes: which codes it shows, and the limit that no code passes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
N_BYTES = 4


@pytest.fixture(scope="module")
def codes() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return runpy.run_path(str(BENCHMARKS / "vector_codes.py"))


def normal_vectors(codes: dict[str, Any], n_dims: int = 16) -> Any:
    """Normal vectors; dimension i has the variance 1 / i."""
    draw = np.random.default_rng(0)
    sizes = 1 / (1 + np.arange(n_dims))
    x = [draw.normal(size=(n, n_dims)) * np.sqrt(sizes) for n in (400, 400, 60)]
    fitted, documents, queries = (rows.astype(np.float32) for rows in x)
    return codes["Collection"](fitted, documents, queries, np.ones((60, 400)))


def kept(codes: dict[str, Any], collection: Any, n_bytes: int) -> float:
    _, _, ranking = next(codes["gaussian_limit"](collection, n_bytes))
    row = codes["row_of"]("normal", collection, "limit", "limit", n_bytes, ranking)
    return float(row.neighbours_kept)


def test_no_code_of_ours_keeps_more_of_normal_vectors_than_the_limit(codes: dict[str, Any]) -> None:
    collection = normal_vectors(codes)
    _, n_bytes, ranking = next(codes["ours"](collection, N_BYTES))
    ours = codes["row_of"]("normal", collection, "gteopt", "", n_bytes, ranking).neighbours_kept
    assert n_bytes <= N_BYTES
    assert 0.1 < ours <= kept(codes, collection, N_BYTES)


def test_the_limit_rises_with_bytes_up_to_everything(codes: dict[str, Any]) -> None:
    collection = normal_vectors(codes)
    shares = [kept(codes, collection, n_bytes) for n_bytes in (1, 2, 4, 8, 64)]
    assert shares == sorted(shares)
    assert shares[0] < 0.7
    assert shares[-1] > 0.99


def test_the_frontier_leaves_out_what_fewer_bytes_beat() -> None:
    frontier = runpy.run_path(str(BENCHMARKS / "vector_frontier.py"))["frontier"]
    rows = [
        {"n_bytes": n_bytes, "neighbours_kept": share, "ndcg_at_10": ndcg}
        for n_bytes, share, ndcg in ((24, 0.7, 0.5), (12, 0.6, 0.4), (24, 0.8, 0.3), (48, 0.8, 0.6))
    ]
    assert frontier(rows) == [(12, 0.6, 0.4), (24, 0.8, 0.3)]
