"""A plan is carried out once; what is done is recognised, what changed is done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from gteopt.artifact import artifact_sha256
from gteopt.errors import InputError
from gteopt.plan import base_of, run
from gteopt.recipe import BenchSpec, Plan, Workload
from gteopt.records import Results, read_results

SUITE = """
schema: gteopt.suite/1
name: tiny
tasks:
  - task: MiniSTS
    subsets: [en]
"""
SHORT = """
schema: gteopt.recipe/1
name: short
weights:
  method: rtn
  scheme: {bits: 8, group_size: row, symmetric: true, activation_bits: 8}
dims: {n: 64, method: slice}
vectors: {code: int8}
calibration: {n_texts: 24, max_tokens: 16}
"""
"""The weights of rtn-int8."""
SPEC = BenchSpec(
    query_tokens=8,
    n_queries=10,
    workloads=(Workload(batch_size=2, tokens=16),),
    warmup=1,
    repeats=2,
)


class Steps:
    """Notes the name of every step that reports progress."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.seen:
            self.seen.append(what)


def plan(folder: Path, *recipes: str, policy: str = "balanced") -> Plan:
    suite = folder / "tiny.yaml"
    suite.write_text(SUITE)
    (folder / "short.yaml").write_text(SHORT)
    return Plan(
        schema="gteopt.plan/1",
        name="test",
        base="nano",
        recipes=recipes,
        suite=str(suite),
        bench=SPEC,
        policy=policy,
        out=folder / "out",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[Results, list[str]]:
    steps = Steps()
    return run(plan(folder, "rtn-int4", "rtn-int8"), progress=steps), steps.seen


def test_a_plan_builds_measures_scores_chooses_and_reports(
    folder: Path, first: tuple[Results, list[str]]
) -> None:
    results, steps = first
    names = {"bf16", "rtn-int4", "rtn-int8"}
    assert set(results.bench.variants) == set(results.evals) == names
    assert results.choice is not None
    assert {each.name for each in results.choice.candidates} == names
    assert results.evals["bf16"].retention == 1.0
    assert results.evals["bf16"].fidelity.mean_cosine == pytest.approx(1.0, abs=1e-6)
    eight, four = (results.evals[name].fidelity for name in ("rtn-int8", "rtn-int4"))
    assert eight.mean_cosine > four.mean_cosine
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in names)
    assert read_results(folder / "out") == results
    assert any("quantizing nano with rtn-int4" in step for step in steps)
    assert any("MiniSTS" in step for step in steps)


def test_a_second_run_does_nothing_again_and_says_the_same(
    folder: Path, first: tuple[Results, list[str]]
) -> None:
    steps = Steps()
    again = run(plan(folder, "rtn-int4", "rtn-int8"), progress=steps)
    assert again == first[0]
    assert sum(each.n_encoded_texts for each in again.evals.values()) > 0  # by the first run
    assert steps.seen == [f"{name}: comparing with bf16" for name in again.evals]


def test_only_what_a_changed_plan_touches_is_done_again(
    folder: Path, first: tuple[Results, list[str]]
) -> None:
    steps = Steps()
    before = artifact_sha256(folder / "out" / "variants" / "rtn-int8")
    changed = plan(folder, "rtn-int8", "short.yaml", policy="smallest-index")
    results = run(changed, beside=folder, progress=steps)
    assert artifact_sha256(folder / "out" / "variants" / "rtn-int8") == before
    assert set(results.evals) == {"bf16", "rtn-int8", "short"}
    assert not any(step.startswith("quantizing") for step in steps.seen)  # shares the weights
    assert not any(step.startswith("rtn-int8: MiniSTS") for step in steps.seen)
    assert any(step.startswith("short: MiniSTS") for step in steps.seen)
    assert results.evals["short"].n_encoded_texts == 0  # nor is any text encoded again
    assert not (folder / "out" / "eval" / "rtn-int4.json").exists()


def test_every_problem_of_a_plan_is_told_before_anything_is_built(tmp_path: Path) -> None:
    broken = plan(tmp_path, "int9", "gptq-int4", "gptq-int4", policy="balancd")
    with pytest.raises(InputError) as caught:
        run(broken)
    message = str(caught.value)
    assert "unknown recipe 'int9'" in message
    assert "gptq-int4 is named twice" in message
    assert "did you mean balanced" in message
    assert not (tmp_path / "out").exists()


def test_the_baseline_of_artifacts_is_their_common_base(
    folder: Path, first: tuple[Results, list[str]]
) -> None:
    del first
    assert base_of([str(folder / "out" / "variants" / "rtn-int8")]) == "nano"
    with pytest.raises(InputError, match="different bases"):
        base_of([str(folder / "out" / "variants" / "rtn-int8"), "some/other"])
