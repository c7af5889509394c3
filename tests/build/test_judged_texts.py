"""The errors by kind of text in benchmarks/text_kinds.py, and robustness.py's settings."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gteopt
from gteopt.config.recipe import Calibration
from gteopt.quant.gptq import GptqOptions
from gteopt.quant.hessian import HessianAccumulator

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KINDS = {"queries": 12, "documents": 30}


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARKS / "text_kinds.py"))


@pytest.fixture
def robustness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return runpy.run_path(str(BENCHMARKS / "robustness.py"))


def vectors(seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    drawn = {kind: draw.normal(size=(n, 8)) for kind, n in KINDS.items()}
    return {
        kind: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        for kind, x in drawn.items()
    }


def test_texts_that_did_not_move_have_no_error_and_keep_their_neighbours(
    kinds: dict[str, Any],
) -> None:
    for kind_error in kinds["kind_errors"](vectors(), vectors()).values():
        assert abs(kind_error.error) < 1e-6
        assert kind_error.p1_cosine > 1 - 1e-6
        assert kind_error.neighbour_overlap == 1


def test_only_the_kind_that_moved_has_an_error_and_it_is_the_worst(kinds: dict[str, Any]) -> None:
    moved = vectors() | {"documents": vectors(seed=1)["documents"]}
    errors = kinds["kind_errors"](vectors(), moved)
    cosines = (vectors()["documents"] * moved["documents"]).sum(axis=1)
    mean, worst, kind = kinds["mean_and_worst"](errors)
    assert kind == "documents"
    assert worst == pytest.approx(1 - cosines.mean(), abs=1e-6)
    assert mean == pytest.approx(worst / 2, abs=1e-6)
    # Queries did not move, but documents did, and a neighbour may be of any kind.
    assert abs(errors["queries"].error) < 1e-6
    assert errors["queries"].neighbour_overlap < 0.9


def test_a_row_of_twice_the_weight_counts_as_two(robustness: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(0)
    x, x0, weight = (torch.randn(5, 16, generator=draw) for _ in range(3))
    twice = HessianAccumulator(16)
    twice.add(torch.cat([x, x[:1]]), torch.cat([x0, x0[:1]]))
    weighed = robustness["_weighing"]([torch.tensor([2.0, 1, 1, 1, 1])])(16)
    weighed.add(x, x0)
    torch.testing.assert_close(weighed.hessian, twice.hessian)
    expected, cross_term = twice.cross_term(weight), weighed.cross_term(weight)
    assert expected is not None
    torch.testing.assert_close(cross_term, expected)


def test_full_shrinkage_leaves_only_the_diagonal(robustness: dict[str, Any]) -> None:
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) + 1
    hessian = x.T @ x / 40
    factor = robustness["_shrinking"](1.0)(hessian, GptqOptions())
    assert torch.count_nonzero(factor.upper - factor.upper.diagonal().diag()) == 0


def test_weights_follow_the_tokens_of_the_builds_batches(robustness: dict[str, Any]) -> None:
    base = gteopt.load("nano", dtype="float32")
    settings, spec = robustness["SETTINGS"], Calibration(n_texts=40)
    alike = robustness["text_weights"](base, spec, settings["kinds weigh alike"].weigh)
    by_length = robustness["text_weights"](base, spec, settings["tokens weigh 1/L"].weigh)
    assert [len(batch) for batch in alike] == [len(batch) for batch in by_length]
    assert float(torch.cat(by_length).sum()) == pytest.approx(40, abs=1e-3)  # each text counts 1
    total = float(torch.cat(alike).sum())  # each kind counts 1
    assert total == pytest.approx(round(total), abs=1e-3)
    assert total >= 2
