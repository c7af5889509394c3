"""The choice among variants, against hand-computed cases and brute force."""

from __future__ import annotations

import random

import pytest

from gteopt.config.plan import BenchSpec
from gteopt.config.policy import HIGHER_IS_BETTER, Limit, Metric, Objective, Policy, load_policy
from gteopt.config.yaml_files import list_shipped_names
from gteopt.errors import InputError
from gteopt.records.bench import BenchReport, LatencyRecord, ThroughputRecord, VariantBench
from gteopt.records.environment import MachineRecord
from gteopt.records.evaluation import EvalReport, FailedTask, Fidelity, ScoreDifference, TaskScore
from gteopt.records.results_folder import Results
from gteopt.report.choose import choose_variant, pareto_front
from gteopt.report.pick import pick_lines
from gteopt.report.rows import result_rows

MACHINE = MachineRecord(cpu="c", n_cores=2, memory_bytes=1, gpu=None, os="o", python="3")
MB = 1_000_000


def policy(objective: Objective, **limits: Limit) -> Policy:
    named = {name: limit.model_dump() for name, limit in limits.items()}
    return Policy.model_validate(
        {"schema": "gteopt.policy/1", "name": "mine", "limits": named, "objective": objective}
    )


def bench(
    *,
    weight_bytes: int = 10 * MB,
    p95_ms: float = 5.0,
    tokens_per_s: float = 1000.0,
    index_bytes: int = 1000 * MB,
    device_bytes: int | None = None,
    ratio: float | None = None,
) -> VariantBench:
    speed = ThroughputRecord(
        batch_size=8,
        tokens=64,
        texts_per_s=1,
        tokens_per_s=tokens_per_s,
        baseline_ratio=tokens_per_s / 1000 if ratio is None else ratio,
    )
    return VariantBench(
        artifact_sha256="a",
        weight_bytes=weight_bytes,
        load_s=1,
        imports_process_bytes=100 * MB,
        peak_process_bytes=400 * MB,
        peak_device_bytes=device_bytes,
        latency=LatencyRecord(tokens=16, n_queries=50, p50_ms=1, p95_ms=p95_ms, p99_ms=9),
        throughput=(speed,),
        kernels={},
        dims=256,
        code="float32",
        bytes_per_vector=1024,
        index_bytes_per_million=index_bytes,
    )


def evaluation(
    name: str,
    *,
    retention: float = 0.98,
    overlap: float = 0.9,
    cosine: float = 0.99,
    spearman: float = 0.97,
    failed: tuple[FailedTask, ...] = (),
    artifact: str = "a",
    suite: str = "s",
    within: tuple[float, float] | None = None,
) -> EvalReport:
    """A report; `within` are the ends of the retention's interval."""
    difference = None
    if within is not None:
        low, high = (end / 2 - 0.5 for end in within)
        value = retention / 2 - 0.5
        difference = ScoreDifference(value=value, low=low, high=high, verdict="undecided", p=0.5)
    return EvalReport(
        variant=name,
        artifact_sha256=artifact,
        baseline="base",
        baseline_sha256="b",
        suite="mini",
        suite_sha256=suite,
        tasks=(),
        failed=failed,
        partial=bool(failed),
        score=retention / 2,
        baseline_score=0.5,
        retention=retention,
        difference=difference,
        retention_low=within[0] if within else None,
        retention_high=within[1] if within else None,
        dims=4,
        code="float32",
        bytes_per_vector=16,
        fidelity=Fidelity(
            n_texts=9,
            mean_cosine=cosine,
            p1_cosine=0.9,
            neighbour_overlap=overlap,
            spearman=spearman,
            n_queries=4,
            n_documents=5,
            n_all_documents=5,
        ),
        machine=MACHINE,
        versions={},
    )


def results(
    variants: dict[str, VariantBench],
    evals: list[EvalReport],
    baseline: str = "base",
    price: float | None = None,
) -> Results:
    report = BenchReport(
        spec=BenchSpec(),
        baseline=baseline,
        variants=variants,
        device="cpu",
        n_threads=2,
        machine=MACHINE,
        versions={},
        price_per_hour=price,
    )
    return Results(bench=report, evals={e.variant: e for e in evals}, choice=None)


SMALLEST = Objective(minimise="weight_bytes")


def test_the_smallest_that_keeps_the_limits_is_picked_and_the_rest_say_what_they_broke() -> None:
    choice = choose_variant(
        policy(SMALLEST, retention=Limit(min=0.97), p95_ms=Limit(max=6)),
        results(
            {
                "int8": bench(weight_bytes=8 * MB),
                "int4": bench(weight_bytes=5 * MB, p95_ms=6.5),
                "int2": bench(weight_bytes=3 * MB),
            },
            [
                evaluation("int8", retention=0.991, overlap=0.93),
                evaluation("int4", retention=0.95),
                evaluation("int2", retention=0.6),
            ],
        ),
    )
    assert choice.picked == "int8"
    assert choice.reason == (
        "int8 has the lowest weight size (8 MB) of the 1 of 3 variants that keep every limit of "
        "policy 'mine', with retention 99.1 % and neighbour overlap 93 %."
    )
    broken = {
        c.name: [(b.metric, b.bound, b.limit, b.found) for b in c.broken] for c in choice.candidates
    }
    assert broken == {
        "int8": [],
        "int4": [("retention", "min", 0.97, 0.95), ("p95_ms", "max", 6.0, 6.5)],
        "int2": [("retention", "min", 0.97, 0.6)],
    }


def test_metrics_are_read_from_where_the_reports_keep_them() -> None:
    variants = {
        "cpu": bench(weight_bytes=3, p95_ms=4.5, tokens_per_s=77, index_bytes=88),
        "gpu": bench(device_bytes=55),
    }
    report = evaluation("cpu", retention=0.9, overlap=0.8, cosine=0.7, spearman=0.6)
    choice = choose_variant(policy(SMALLEST), results(variants, [report]))
    metrics = {c.name: c.metrics for c in choice.candidates}
    assert metrics["cpu"] == {
        "retention": 0.9,
        "mean_cosine": 0.7,
        "neighbour_overlap": 0.8,
        "spearman": 0.6,
        "weight_bytes": 3,
        "peak_memory_bytes": 400 * MB,
        "p95_ms": 4.5,
        "tokens_per_s": pytest.approx(77),
        "speed_ratio": pytest.approx(0.077),
        "index_bytes": 88,
    }
    assert metrics["gpu"]["peak_memory_bytes"] == 55
    assert "retention" not in metrics["gpu"]


def test_a_limit_exactly_met_is_kept() -> None:
    limits = {"retention": Limit(min=0.98, max=0.98), "weight_bytes": Limit(max=10 * MB)}
    choice = choose_variant(policy(SMALLEST, **limits), results({"a": bench()}, [evaluation("a")]))
    assert choice.picked == "a"


def test_an_unmeasured_metric_breaks_its_limit_with_nothing_found() -> None:
    choice = choose_variant(
        policy(SMALLEST, spearman=Limit(min=0.1), p95_ms=Limit(max=99)),
        results({"a": bench()}, [evaluation("b")]),
    )
    assert choice.picked is None
    broken = {c.name: [(b.metric, b.found) for b in c.broken] for c in choice.candidates}
    assert broken == {"a": [("spearman", None)], "b": [("p95_ms", None)]}
    assert (
        "Spearman correlation was not measured (`gteopt evaluate --out` measures it) and must be "
        "at least 0.1"
    ) in choice.reason


def test_a_measured_retention_without_an_interval_is_not_called_unmeasured() -> None:
    variants = {"base": bench(), "a": bench()}
    judged = results(variants, [evaluation("a", retention=0.98)])
    choice = choose_variant(policy(SMALLEST, retention_low=Limit(min=0.97)), judged)
    assert choice.picked == "base"
    judged = judged.model_copy(update={"choice": choice})
    for sentence in (result_rows(judged)[1].verdict, pick_lines(judged)[1]):
        assert "retention of 98 % has no interval" in sentence
        assert "not measured" not in sentence


def test_the_reason_says_over_how_many_tasks_a_mean_is() -> None:
    def task(name: str, above: bool) -> TaskScore:
        return TaskScore(
            task=name,
            task_type="STS",
            split="test",
            subset="default",
            metric="m",
            score=0.5,
            baseline_score=0.5,
            n_samples=9,
            instruction=None,
            dataset_revision="r",
            above_chance=above,
        )

    tasks = (task("t", True), task("u", True), task("v", False))
    report = evaluation("a", within=(0.95, 1.01)).model_copy(
        update={"tasks": tasks, "n_interval_tasks": 1}
    )
    reason = choose_variant(policy(SMALLEST), results({"a": bench()}, [report])).reason
    assert "over 2 of 3 tasks, the interval over 1 of these; 95 % interval 95.0 to 101.0" in reason


def test_a_pick_that_was_measured_slower_says_so_first() -> None:
    variants = {"base": bench(), "a": bench(weight_bytes=1, ratio=0.63)}
    judged = results(variants, [evaluation("a")])
    choice = choose_variant(policy(SMALLEST), judged)
    first_line = pick_lines(judged.model_copy(update={"choice": choice}))[0]
    assert first_line.startswith("Pick: a: slower in this measurement, 0.63 x the baseline's speed")


def test_a_nan_counts_as_unmeasured() -> None:
    choice = choose_variant(
        policy(SMALLEST, spearman=Limit(max=2)),
        results({"a": bench()}, [evaluation("a", spearman=float("nan"))]),
    )
    assert [b.found for b in choice.candidates[0].broken] == [None]


def test_a_candidate_without_the_objective_is_not_picked() -> None:
    choice = choose_variant(
        policy(Objective(maximise="tokens_per_s")),
        results({"slow": bench(tokens_per_s=1)}, [evaluation("slow"), evaluation("unbenched")]),
    )
    assert choice.picked == "slow"
    alone = choose_variant(policy(SMALLEST), results({}, [evaluation("unbenched")]))
    assert alone.picked is None
    assert "weight size was not measured" in alone.reason
    assert "'mine' (unbenched); `gteopt bench --out` measures it." in alone.reason


def test_the_baseline_equals_itself_without_an_evaluation() -> None:
    choice = choose_variant(
        policy(SMALLEST, retention=Limit(min=0.99), mean_cosine=Limit(min=1)),
        results({"base": bench(), "small": bench(weight_bytes=1)}, [evaluation("small")]),
    )
    assert choice.picked == "base"


def test_a_tie_is_not_broken_by_a_retention_within_the_intervals() -> None:
    # A difference of 0.19 points of retention is noise; 11.5 points of neighbours are not.
    uncut = evaluation("int4", retention=0.9937, overlap=0.911, within=(0.987, 1.000))
    short = evaluation("int4-pca", retention=0.9956, overlap=0.796, within=(0.986, 1.005))
    measured = results({"int4": bench(), "int4-pca": bench()}, [uncut, short])
    choice = choose_variant(policy(SMALLEST, retention_low=Limit(min=0.97)), measured)
    assert choice.picked == "int4"
    assert "retention 99.37 % (95 % interval 98.7 to 100.0 %, score undecided" in choice.reason
    assert "tied with int4-pca (neighbour overlap 79.6 %)" in choice.reason


def test_a_tie_is_broken_by_a_retention_whose_interval_lies_below_anothers() -> None:
    good = evaluation("good", retention=0.99, overlap=0.80, within=(0.98, 1.0))
    bad = evaluation("bad", retention=0.90, overlap=0.81, within=(0.89, 0.91))
    choice = choose_variant(
        policy(SMALLEST), results({n: bench() for n in ("good", "bad")}, [good, bad])
    )
    assert choice.picked == "good"


def test_further_ties_go_to_the_higher_retention_then_the_first_name() -> None:
    variants = {name: bench() for name in "cab"}
    evals = [evaluation("a", retention=0.9), evaluation("b"), evaluation("c")]
    assert choose_variant(policy(SMALLEST), results(variants, evals)).picked == "b"


@pytest.mark.parametrize(("noise", "picked"), [(0.02, "base"), (0.005, "int4")])
def test_a_speed_ties_with_what_it_beats_by_less_than_the_measurements_noise(
    noise: float, picked: str
) -> None:
    variants = {
        "base": bench(tokens_per_s=1000, ratio=1 - noise),
        "int4": bench(tokens_per_s=1010),
    }
    fastest = policy(Objective(maximise="tokens_per_s"))
    choice = choose_variant(fastest, results(variants, [evaluation("int4", overlap=0.9)]))
    assert choice.picked == picked
    assert ("within the noise of 2.0%" in choice.reason) == (picked == "base")


def test_a_speed_counts_beside_the_baselines_and_not_by_the_clock_of_another_hour() -> None:
    # The machine was busy while int8 and its baseline were measured.
    variants = {
        "base": bench(tokens_per_s=1000),
        "int8": bench(tokens_per_s=700, ratio=1.4),
        "int4": bench(tokens_per_s=1100, ratio=1.1),
    }
    evals = [evaluation("int8"), evaluation("int4")]
    choice = choose_variant(policy(Objective(maximise="tokens_per_s")), results(variants, evals))
    assert choice.picked == "int8"
    assert "(700 tokens/s, 1.40 times the baseline's, measured in turns)" in choice.reason
    cheap = policy(Objective(minimise="cost_per_million_tokens"))
    assert choose_variant(cheap, results(variants, evals, price=3.0)).picked == "int8"


def test_a_retention_without_interval_keeps_no_limit_on_its_lower_end() -> None:
    limits = {"retention_low": Limit(min=0.9)}
    measured = results({"a": bench()}, [evaluation("a", retention=0.99)])
    choice = choose_variant(policy(SMALLEST, **limits), measured)
    assert choice.picked is None
    assert "retention of 99 % has no interval (no task has one)" in choice.reason
    base_report = evaluation("base", retention=1.0).model_copy(update={"artifact_sha256": "b"})
    variants = {"base": bench().model_copy(update={"artifact_sha256": "b"})}
    assert (
        choose_variant(policy(SMALLEST, **limits), results(variants, [base_report])).picked
        == "base"
    )


def test_without_a_bench_the_index_is_known_and_the_rest_says_what_measures_it() -> None:
    report = evaluation("a").model_copy(update={"bytes_per_vector": 64})
    measured = Results(bench=None, evals={"a": report}, choice=None)
    choice = choose_variant(policy(Objective(minimise="index_bytes")), measured)
    assert choice.picked == "a"
    assert choice.candidates[0].metrics["index_bytes"] == 64e6
    weights = choose_variant(policy(SMALLEST), measured)
    assert weights.picked is None
    assert "weight size was not measured" in weights.reason
    assert "`gteopt bench --out` measures it" in weights.reason


def test_a_price_gives_the_cost_of_tokens_and_without_one_there_is_none() -> None:
    cheap = policy(Objective(minimise="cost_per_million_tokens"))
    variants = {"slow": bench(tokens_per_s=1000), "fast": bench(tokens_per_s=4000)}
    choice = choose_variant(cheap, results(variants, [], price=3.6))
    assert choice.picked == "fast"
    # 3.6 dollars an hour are 0.001 a second, in which it does 4000 tokens.
    assert choice.candidates[0].metrics["cost_per_million_tokens"] == pytest.approx(0.25)
    without = choose_variant(cheap, results(variants, []))
    assert without.picked is None
    assert "--price-per-hour" in without.reason


def test_when_none_fits_the_reason_names_the_nearest_and_its_misses() -> None:
    choice = choose_variant(
        policy(SMALLEST, retention=Limit(min=1.0), weight_bytes=Limit(max=4 * MB)),
        results(
            {"near": bench(weight_bytes=5 * MB), "far": bench(weight_bytes=9 * MB)},
            [evaluation("near", retention=0.98), evaluation("far", retention=1.0)],
        ),
    )
    assert choice.picked is None
    assert choice.reason == (
        "None of the 2 variants keeps every limit of policy 'mine'; nearest is near, whose "
        "retention is 98 % and must be at least 100 % (2 % off), whose weight size is 5 MB and "
        "must be at most 4 MB (1 MB off)."
    )


def test_a_partial_evaluation_is_never_picked_silently() -> None:
    failed = (FailedTask(task="Banking77", reason="no data"),)
    choice = choose_variant(
        policy(SMALLEST), results({"a": bench()}, [evaluation("a", failed=failed)])
    )
    assert choice.picked == "a"
    assert "its evaluation is PARTIAL, without Banking77" in choice.reason


def test_without_any_retention_variants_are_chosen_by_neighbours_and_that_is_said() -> None:
    why = "the baseline base scores -0.6300, so retention is undefined"
    undefined = {"retention": None, "no_retention": why, "baseline_score": -0.63}
    evals = [
        evaluation(name, overlap=overlap).model_copy(update=undefined)
        for name, overlap in (("close", 0.9), ("far", 0.4))
    ]
    measured = results({"close": bench(), "far": bench(weight_bytes=5 * MB)}, evals)
    choice = choose_variant(policy(SMALLEST, neighbour_overlap=Limit(min=0.8)), measured)
    assert choice.picked == "close"
    assert f"NO retention: {why}" in choice.reason
    assert [candidate.name for candidate in choice.candidates if candidate.on_pareto_front] == [
        "close"
    ]
    none_fits = choose_variant(policy(SMALLEST, retention=Limit(min=0.9)), measured)
    assert none_fits.picked is None


def test_a_variant_without_evaluation_is_never_picked_silently() -> None:
    choice = choose_variant(policy(SMALLEST), results({"a": bench()}, []))
    assert choice.picked == "a"
    assert "its quality was NOT evaluated" in choice.reason


def test_reports_that_do_not_belong_together_are_refused_all_at_once() -> None:
    mixed = results(
        {"a": bench(), "b": bench()},
        [evaluation("a", artifact="other"), evaluation("b", suite="other")],
    )
    with pytest.raises(InputError) as caught:
        choose_variant(policy(SMALLEST), mixed)
    assert "'a': bench measured a, but the evaluation scored other" in str(caught.value)
    assert "of 2 suites: mini other, mini s" in str(caught.value)


def test_one_baseline_under_two_names_is_one() -> None:
    evals = [
        evaluation("a"),
        evaluation("b").model_copy(update={"baseline": "base-256-float32", "suite": "mini-own"}),
    ]
    assert (
        choose_variant(policy(SMALLEST), results({"a": bench(), "b": bench()}, evals)).picked == "a"
    )
    evals[1] = evals[1].model_copy(update={"baseline_sha256": "other"})
    with pytest.raises(InputError, match="of 2 baselines: base b, base-256-float32 other"):
        choose_variant(policy(SMALLEST), results({"a": bench(), "b": bench()}, evals))


def test_results_without_variants_are_refused() -> None:
    with pytest.raises(InputError, match="hold no variant"):
        choose_variant(policy(SMALLEST), results({}, []))


def test_the_front_leaves_the_score_out_where_an_evaluation_is_partial() -> None:
    variants = {"a": bench(), "b": bench()}
    near, good = evaluation("a", overlap=0.9, retention=0.8), evaluation("b", overlap=0.8)
    failed = (FailedTask(task="t", reason="r"),)
    for second, front in (
        (good, {"a", "b"}),
        (evaluation("b", overlap=0.8, failed=failed), {"a"}),
    ):
        choice = choose_variant(policy(SMALLEST), results(variants, [near, second]))
        assert {c.name for c in choice.candidates if c.on_pareto_front} == front


def test_the_front_is_drawn_on_the_end_of_the_interval_that_the_policy_limits() -> None:
    # The score of b may be better, but the lower end of its interval is worse.
    variants = {name: bench() for name in "ab"}
    evals = [
        evaluation("a", retention=0.98, within=(0.97, 0.99)),
        evaluation("b", retention=0.99, within=(0.95, 1.03)),
    ]
    for limit, front in (("retention_low", {"a"}), ("retention", {"b"})):
        choice = choose_variant(
            policy(SMALLEST, **{limit: Limit(min=0.9)}), results(variants, evals)
        )
        assert {c.name for c in choice.candidates if c.on_pareto_front} == front
        assert choice.picked in front


def test_what_breaks_a_limit_pushes_nothing_off_the_front() -> None:
    variants = {"slow": bench(p95_ms=90), "quick": bench(p95_ms=5)}
    evals = [evaluation("slow", retention=1.0), evaluation("quick", retention=0.9)]
    choice = choose_variant(policy(SMALLEST, p95_ms=Limit(max=10)), results(variants, evals))
    assert {c.name for c in choice.candidates if c.on_pareto_front} == {"quick"}


def test_only_variants_on_the_front_are_picked_from_a_tie() -> None:
    # The same vectors in half the bytes: the name alone would pick `a`.
    variants = {"a": bench(index_bytes=1000), "b": bench(index_bytes=500)}
    assert (
        choose_variant(policy(SMALLEST), results(variants, [evaluation(n) for n in "ab"])).picked
        == "b"
    )


@pytest.mark.parametrize("name", list_shipped_names("recipes/policies"))
def test_the_pick_of_every_shipped_policy_is_on_the_front(name: str) -> None:
    shipped = load_policy(name)
    n_picked = 0
    for seed in range(100):
        rng = random.Random(seed)
        names = [f"v{i}" for i in range(rng.randint(1, 9))]
        # Few distinct values, so that there are ties; ends of intervals in any order.
        variants = {
            n: bench(
                weight_bytes=rng.randint(1, 3),
                index_bytes=rng.randint(1, 3),
                ratio=rng.choice([0.9, 1.0, 1.01, 1.5]),
            )
            for n in names
        }
        evals = []
        for n in names:
            low, middle, high = sorted(rng.choice([0.9, 0.96, 0.98, 1.0]) for _ in range(3))
            overlap = rng.choice([0.6, 0.85, 0.95, 0.96])
            report = evaluation(
                n,
                retention=middle,
                overlap=overlap,
                cosine=0.999,
                spearman=0.995,
                within=(low, high),
            )
            evals.append(report)
        variants["base"] = bench(weight_bytes=3, index_bytes=3, ratio=rng.choice([0.98, 1.0]))
        choice = choose_variant(shipped, results(variants, evals))
        assert choice.picked in {c.name for c in choice.candidates if c.on_pareto_front}
        n_picked += choice.picked != "base"
    assert n_picked > 10


METRICS: list[Metric] = ["retention", "p95_ms", "weight_bytes", "tokens_per_s"]


def random_metrics(seed: int) -> dict[str, dict[Metric, float]]:
    rng = random.Random(seed)
    # Few distinct values, so that ties and equal points occur; a third lacks an axis.
    return {
        f"v{i}": {m: float(rng.randint(1, 4)) for m in METRICS if rng.random() < 0.9}
        for i in range(rng.randint(1, 12))
    }


def dominates(a: dict[Metric, float], b: dict[Metric, float], axes: list[Metric]) -> bool:
    signs = {m: 1 if m in HIGHER_IS_BETTER else -1 for m in axes}
    gains = [signs[m] * (a[m] - b[m]) for m in axes]
    return min(gains) >= 0 and max(gains) > 0


@pytest.mark.parametrize("seed", range(50))
def test_the_front_equals_brute_force(seed: int) -> None:
    metrics = random_metrics(seed)
    complete = {name: values for name, values in metrics.items() if set(METRICS) <= values.keys()}
    expected = {
        name
        for name in complete
        if not any(dominates(rival, complete[name], METRICS) for rival in complete.values())
    }
    assert pareto_front(metrics, set(METRICS)) == expected


@pytest.mark.parametrize("seed", range(50))
def test_no_admissible_candidate_beats_the_picked_one_in_the_objective(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"v{i}" for i in range(rng.randint(1, 9))]
    measured = results(
        {n: bench(weight_bytes=rng.randint(1, 5), tokens_per_s=rng.randint(1, 5)) for n in names},
        [evaluation(n, retention=rng.randint(5, 10) / 10) for n in names],
    )
    objective = rng.choice([SMALLEST, Objective(maximise="tokens_per_s")])
    choice = choose_variant(policy(objective, retention=Limit(min=0.7)), measured)
    admissible = {n for n in names if (measured.evals[n].retention or 0) >= 0.7}
    if not admissible:
        assert choice.picked is None
        return
    assert choice.picked in admissible
    metrics = {c.name: c.metrics for c in choice.candidates}
    axes: list[Metric] = [objective.metric, "retention"]
    assert not any(
        dominates(metrics[n], metrics[choice.picked], axes[:1])
        or dominates(metrics[n], metrics[choice.picked], axes)
        for n in admissible
    )


@pytest.mark.parametrize("name", list_shipped_names("recipes/policies"))
def test_every_shipped_policy_can_be_kept_by_the_baseline(name: str) -> None:
    shipped = load_policy(name)
    choice = choose_variant(shipped, results({"base": bench()}, []))
    assert choice.picked == "base"
    assert shipped.name == name
    assert shipped.summary
    assert f"policy '{name}'" in choice.reason


@pytest.mark.parametrize("name", list_shipped_names("recipes/policies"))
def test_every_shipped_policy_names_its_limits_and_judges_by_the_intervals_end(name: str) -> None:
    shipped = load_policy(name)
    assert "retention" not in shipped.limits
    assert "retention_low" in shipped.limits
    for metric, limit in shipped.limits.items():
        assert limit.min is not None
        percent = metric in ("retention_low", "neighbour_overlap")
        assert (f"{limit.min:.0%}".replace("%", " %") if percent else str(limit.min)) in (
            shipped.summary
        )
