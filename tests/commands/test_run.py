"""A second run of a plan skips finished work and repeats the parts that changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gteopt
from gteopt.commands.bench import BenchReportFile, bench_to_file
from gteopt.commands.choose import choose_by_policy
from gteopt.commands.evaluate import find_common_base
from gteopt.commands.run import run
from gteopt.config.plan import BenchSpec, Plan, PlanBench, Workload, load_plan
from gteopt.config.policy import Limit, Objective, Policy
from gteopt.errors import InputError
from gteopt.model.artifact import artifact_sha256
from gteopt.progress import ignore_progress
from gteopt.records.bench import BenchReport
from gteopt.records.evaluation import EvalReport
from gteopt.records.files import read_record, write_record
from gteopt.records.results_folder import Results, read_results

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
  scheme: {bits: 8, group_size: per_channel, symmetric: true, activation_bits: 8}
dims: {n: 64, method: slice}
vectors: {code: int8}
calibration: {n_texts: 24, max_tokens: 16}
"""
"""A recipe with the weights of rtn-int8."""
SPEC = PlanBench(
    query_tokens=8,
    n_queries=10,
    workloads=(Workload(batch_size=2, tokens=16),),
    warmup=1,
    repeats=2,
)


class Steps:
    """Notes the name of every step that reports progress."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.names:
            self.names.append(what)


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
def first_run(folder: Path) -> tuple[Results, list[str]]:
    steps = Steps()
    return run(plan(folder, "rtn-int4", "rtn-int8"), progress=steps), steps.names


def test_a_plan_builds_measures_scores_chooses_and_reports(
    folder: Path, first_run: tuple[Results, list[str]]
) -> None:
    results, steps = first_run
    names = {"bf16", "rtn-int4", "rtn-int8"}
    assert set(results.benched) == set(results.evals) == names
    assert results.choice is not None
    assert {candidate.name for candidate in results.choice.candidates} == names
    assert results.evals["bf16"].retention == 1.0
    assert results.evals["bf16"].fidelity.mean_cosine == pytest.approx(1.0, abs=1e-6)
    int8, int4 = (results.evals[name].fidelity for name in ("rtn-int8", "rtn-int4"))
    assert int8.mean_cosine > int4.mean_cosine
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in names)
    assert read_results(folder / "out") == results
    assert any("quantizing nano with rtn-int4" in step for step in steps)
    assert any("MiniSTS" in step for step in steps)


def test_a_second_run_does_nothing_again_and_says_the_same(
    folder: Path, first_run: tuple[Results, list[str]]
) -> None:
    steps = Steps()
    again = run(plan(folder, "rtn-int4", "rtn-int8"), progress=steps)
    assert again == first_run[0]
    # The first run has counted these texts.
    assert sum(report.n_encoded_texts for report in again.evals.values()) > 0
    assert steps.names == [f"{name}: comparing with bf16" for name in again.evals]


def test_a_price_gives_costs_and_is_no_reason_to_measure_again(
    folder: Path, first_run: tuple[Results, list[str]]
) -> None:
    del first_run
    steps = Steps()
    priced = SPEC.model_copy(update={"price_per_hour": 2.0})
    again = run(
        plan(folder, "rtn-int4", "rtn-int8").model_copy(update={"bench": priced}), progress=steps
    )
    assert not any(step.startswith("measuring") for step in steps.names)
    assert again.bench is not None
    assert again.bench.price_per_hour == 2.0
    assert again.choice is not None
    assert all(
        "cost_per_million_tokens" in candidate.metrics for candidate in again.choice.candidates
    )


def test_only_what_a_changed_plan_touches_is_done_again(
    folder: Path, first_run: tuple[Results, list[str]]
) -> None:
    steps = Steps()
    before = artifact_sha256(folder / "out" / "variants" / "rtn-int8")
    changed = plan(folder, "rtn-int8", "short.yaml", policy="smallest-index")
    results = run(changed, beside=folder, progress=steps)
    assert artifact_sha256(folder / "out" / "variants" / "rtn-int8") == before
    assert set(results.evals) == {"bf16", "rtn-int8", "short"}
    # short.yaml has the weights of rtn-int8.
    assert not any(step.startswith("quantizing") for step in steps.names)
    assert not any(step.startswith("rtn-int8: MiniSTS") for step in steps.names)
    assert any(step.startswith("short: MiniSTS") for step in steps.names)
    assert results.evals["short"].n_encoded_texts == 0  # no text is encoded again
    assert not any(step == "measuring speed of rtn-int8" for step in steps.names)
    assert any(step == "measuring speed of short" for step in steps.names)
    assert not (folder / "out" / "eval" / "rtn-int4.json").exists()
    assert read_results(folder / "out") == results  # nothing of rtn-int4 is left


def test_evaluations_that_no_run_wrote_are_left_and_said(
    folder: Path, first_run: tuple[Results, list[str]]
) -> None:
    del first_run
    out = folder / "out" / "eval"
    foreign = read_record(out / "rtn-int8.json", EvalReport).model_copy(update={"variant": "mine"})
    write_record(out / "mine.json", foreign)
    with pytest.warns(UserWarning, match="also holds mine, which no run of this plan wrote"):
        results = run(plan(folder, "rtn-int8"), beside=folder)
    assert read_record(out / "mine.json", EvalReport) == foreign
    assert set(results.evals) == {"bf16", "rtn-int8"}
    (out / "mine.json").unlink()


def test_all_that_cannot_be_measured_is_told_before_a_folder_is_looked_at(tmp_path: Path) -> None:
    sources = {"nano": "nano", "one": "nope/one", "two": "nope/two"}
    long = BenchSpec(query_tokens=8, workloads=(Workload(batch_size=1, tokens=9000),))
    with pytest.raises(InputError) as caught:
        bench_to_file(
            sources,
            long,
            BenchReportFile(tmp_path / "out"),
            baseline="nano",
            hub_dir=tmp_path,
            device="cpu",
            skip_too_long=True,
            progress=ignore_progress,
        )
    problems = str(caught.value).splitlines()[1:]
    assert [line.partition(":")[0].strip(" -") for line in problems] == [
        "one (nope/one)",
        "two (nope/two)",
        "every workload is beyond the models' limit of 2048 tokens",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "differs"),
    [
        ("n_threads", 77, "threads: 77 there"),
        ("device", "cuda:0", "device: cuda:0 there, cpu now"),
        ("versions", {"backend": "openvino"}, "backend: openvino there, torch now"),
        ("spec", BenchSpec(), "spec: 32x32, 32x128, 8x512; 50 queries"),
    ],
)
def test_variants_are_not_added_to_a_benchmark_under_other_conditions(
    folder: Path,
    first_run: tuple[Results, list[str]],
    tmp_path: Path,
    field: str,
    value: object,
    differs: str,
) -> None:
    del first_run
    report = read_record(folder / "out" / "bench.json", BenchReport)
    if isinstance(value, dict):
        value = {**report.versions, **value}
    named = {"nano": report.variants["bf16"]}
    old = report.model_copy(update={"baseline": "nano", "variants": named, field: value})
    write_record(tmp_path / "bench.json", old)
    with pytest.raises(InputError, match="under other conditions") as caught:
        bench_into(tmp_path, "nano")
    assert differs in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2  # only that differs
    assert read_record(tmp_path / "bench.json", BenchReport) == old


def test_a_run_measures_again_what_was_measured_with_other_threads(
    folder: Path, first_run: tuple[Results, list[str]]
) -> None:
    del first_run
    path = folder / "out" / "bench.json"
    old = read_record(path, BenchReport)
    write_record(path, old.model_copy(update={"n_threads": 77}))
    steps = Steps()
    again = run(plan(folder, "rtn-int8"), beside=folder, progress=steps)
    assert "measuring speed of rtn-int8" in steps.names
    assert again.bench is not None
    assert again.bench.n_threads == torch.get_num_threads()


def bench_into(
    folder: Path, *sources: str, progress: Steps | None = None, price: float | None = None
) -> BenchReport:
    named = {Path(source).name: source for source in sources}
    return bench_to_file(
        named,
        SPEC.spec,
        BenchReportFile(folder, price),
        baseline=next(iter(named)),
        hub_dir=None,
        device="cpu",
        progress=progress or Steps(),
    )


class Stops(Steps):
    """Ctrl-C in the middle of one step."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == self.step:
            raise KeyboardInterrupt


def test_variants_benched_later_lie_beside_the_earlier_and_survive_an_interruption(
    folder: Path, first_run: tuple[Results, list[str]], tmp_path: Path
) -> None:
    del first_run
    int8, short = str(folder / "out" / "variants" / "rtn-int8"), str(tmp_path / "short")
    gteopt.quantize("nano", str(folder / "short.yaml"), short, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        bench_into(tmp_path, "nano", int8, progress=Stops("measuring speed of rtn-int8"))
    assert set(read_record(tmp_path / "bench.json", BenchReport).variants) == {"nano"}
    before = bench_into(tmp_path, "nano", int8, price=2.0)
    after = bench_to_file(
        {"mine": "nano", "short": short},
        SPEC.spec,
        BenchReportFile(tmp_path),
        baseline="mine",
        hub_dir=None,
        device="cpu",
        progress=Steps(),
    )
    assert list(after.variants) == ["nano", "short", "rtn-int8"]
    assert after.variants["rtn-int8"] == before.variants["rtn-int8"]
    assert after.price_per_hour == 2.0
    assert read_record(tmp_path / "bench.json", BenchReport) == after
    with pytest.raises(InputError, match="baseline: nano there, short now"):
        bench_into(tmp_path, short)


def test_a_policys_margin_settles_the_verdicts_again_and_the_page_follows(
    folder: Path, first_run: tuple[Results, list[str]]
) -> None:
    del first_run
    out = folder / "out"
    for margin, verdict in ((0.9, "equivalent"), (1e-9, None)):
        policy = Policy(
            schema="gteopt.policy/1",
            name=f"within {margin:g}",
            limits={"weight_bytes": Limit(min=0)},
            objective=Objective(minimise="weight_bytes"),
            margin=margin,
        )
        results = choose_by_policy(out, policy)
        assert read_results(out) == results
        assert results.choice is not None
        assert results.choice.reason in (out / "report.html").read_text().replace("&#x27;", "'")
        report = results.evals["rtn-int8"]
        assert report.margin == margin
        assert report.difference is not None
        assert (report.difference.verdict == "equivalent") == (verdict == "equivalent")


def test_an_unknown_device_is_told_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        run(plan(tmp_path, "rtn-int8"), device="gpu")
    assert not (tmp_path / "out").exists()


def test_every_problem_of_a_plan_is_told_before_anything_is_built(tmp_path: Path) -> None:
    broken = plan(tmp_path, "int9", "gptq-int4", "gptq-int4", policy="balancd")
    with pytest.raises(InputError) as caught:
        run(broken)
    message = str(caught.value)
    assert "unknown recipe 'int9'" in message
    assert "gptq-int4 is named twice" in message
    assert "did you mean balanced" in message
    assert not (tmp_path / "out").exists()


def test_a_plan_may_name_a_data_set(tmp_path: Path) -> None:
    data = tmp_path / "hub/org/pairs/test.csv"
    data.parent.mkdir(parents=True)
    rows = ["sentence1,sentence2,score", *(f"rain {i},rain {i * i},{i}" for i in range(24))]
    data.write_text("\n".join(rows))
    file = tmp_path / "plan.yaml"
    file.write_text(
        f"schema: gteopt.plan/1\nname: named\nbase: nano\nrecipes: [rtn-int8]\ndata: org/pairs\n"
        f"screening: {{n_texts: 20, keep: 1}}\nout: {tmp_path / 'out'}\n"
        f"bench: {SPEC.model_dump_json(exclude={'price_per_hour'})}\n"
    )
    found = run(load_plan(str(file)), hub_dir=tmp_path / "hub").evals["rtn-int8"]
    assert [task.task for task in found.tasks] == ["test"]
    assert found.asked == ("--data", "pairs")
    assert "rain 529" in (tmp_path / "out/screening/texts.txt").read_text()
    unknown = load_plan(str(file)).model_copy(update={"data": Path("org/nosuch")})
    with pytest.raises(InputError, match=r"plan named cannot run.*\n.*download.*org/nosuch"):
        run(unknown, hub_dir=tmp_path / "hub")


def test_the_baseline_of_artifacts_is_their_common_base(
    folder: Path, first_run: tuple[Results, list[str]]
) -> None:
    del first_run
    assert find_common_base([str(folder / "out" / "variants" / "rtn-int8")]) == "nano"
    with pytest.raises(InputError, match="different bases"):
        find_common_base([str(folder / "out" / "variants" / "rtn-int8"), "some/other"])
