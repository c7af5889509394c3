"""Which variant to deploy: a policy and what was measured in, a choice and its reason out.

Hides: where each metric lies in the reports, what a broken limit is, how admissible variants are
ordered. Refuses to know: torch, files, how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gteopt.errors import InputError, join_problems
from gteopt.recipe import HIGHER_IS_BETTER, METRIC_WORDS, Metric, Policy, metric_amount
from gteopt.records import BrokenLimit, Candidate, Choice, EvalReport, Results, VariantBench

_COSTS: tuple[Metric, ...] = ("weight_bytes", "index_bytes", "tokens_per_s")
_FROM_EVAL: dict[Metric, Callable[[EvalReport], float]] = {
    "retention": lambda report: math.nan if report.retention is None else report.retention,
    "retention_low": lambda report: (
        math.nan if report.retention_low is None else report.retention_low
    ),
    "mean_cosine": lambda report: report.fidelity.mean_cosine,
    "neighbour_overlap": lambda report: report.fidelity.neighbour_overlap,
    "spearman": lambda report: report.fidelity.spearman,
}
_FROM_BENCH: dict[Metric, Callable[[VariantBench], float]] = {
    "weight_bytes": lambda variant: variant.weight_bytes,
    "peak_memory_bytes": lambda variant: variant.peak_memory_bytes,
    "p95_ms": lambda variant: variant.latency.p95_ms,
    "tokens_per_s": lambda variant: variant.tokens_per_s,
    "index_bytes": lambda variant: variant.index_bytes_per_million,
}


def choose(policy: Policy, results: Results) -> Choice:
    """Pick the variant that is best in the policy's objective among those that keep its limits.

    Every measured variant is a candidate, the baseline too; compared with itself it has retention,
    cosine, overlap and correlation 1. A metric that was not measured breaks each limit on it, and a
    candidate without the objective's metric is not picked. Ties go to the higher retention, then
    to the first name.

    A candidate is on the Pareto front where no other is at least as good in all of quality, weight
    bytes, index bytes, tokens a second and the policy's objective, and better in one. Quality is
    retention; where an evaluation is partial, retentions are means over different tasks, and where
    the baseline's score is not above 0 there are none: quality is then neighbour overlap. A
    candidate that lacks one of these is not on the front.

    Raises:
        InputError: nothing was measured, or the reports do not belong together (other bytes of the
            same variant, another suite, another baseline).
    """
    _check_belong_together(results)
    names = sorted(results.bench.variants.keys() | results.evals.keys())
    metrics = {name: _metrics(name, results) for name in names}
    partial = any(report.partial for report in results.evals.values())
    without = any(report.retention is None for report in results.evals.values())
    quality: Metric = "neighbour_overlap" if partial or without else "retention"
    front = pareto_front(metrics, {quality, policy.objective.metric, *_COSTS})
    candidates = tuple(
        Candidate(
            name=name,
            metrics=metrics[name],
            broken=_broken_limits(policy, metrics[name]),
            on_pareto_front=name in front,
        )
        for name in names
    )
    objective = policy.objective.metric
    admissible = [c for c in candidates if not c.broken and objective in c.metrics]
    if not admissible:
        return Choice(
            policy=policy, picked=None, reason=_why_none(policy, candidates), candidates=candidates
        )
    sign = -1 if policy.objective.maximise is not None else 1
    best = min(
        admissible,
        key=lambda c: (sign * c.metrics[objective], -c.metrics.get("retention", 0.0), c.name),
    )
    reason = _why(policy, best, len(admissible), len(candidates), results.evals.get(best.name))
    return Choice(policy=policy, picked=best.name, reason=reason, candidates=candidates)


def pareto_front(metrics: dict[str, dict[Metric, float]], axes: set[Metric]) -> set[str]:
    """Names that no other dominates on `axes`; a name that lacks an axis neither is nor counts."""
    points = {
        name: [found[a] if a in HIGHER_IS_BETTER else -found[a] for a in sorted(axes)]
        for name, found in metrics.items()
        if axes <= found.keys()
    }
    return {
        name
        for name, point in points.items()
        if not any(
            other != point
            and all(theirs >= ours for theirs, ours in zip(other, point, strict=True))
            for other in points.values()
        )
    }


def _check_belong_together(results: Results) -> None:
    bench, evals = results.bench.variants, results.evals
    if not bench and not evals:
        raise InputError("the results hold no variant; run `gteopt bench` and `gteopt evaluate`")
    problems = [
        f"'{name}': bench measured {bench[name].artifact_sha256[:12]}, the evaluation scored "
        f"{evals[name].artifact_sha256[:12]}"
        for name in sorted(bench.keys() & evals.keys())
        if bench[name].artifact_sha256 != evals[name].artifact_sha256
    ]
    for what, found in (
        ("suites", {f"{r.suite} {r.suite_sha256[:12]}" for r in evals.values()}),
        ("baselines", {f"{r.baseline} {r.baseline_sha256[:12]}" for r in evals.values()}),
    ):
        if len(found) > 1:
            problems.append(
                f"the evaluations are of {len(found)} {what}: {', '.join(sorted(found))}"
            )
    if problems:
        raise InputError(
            join_problems(
                "the results do not belong together; measure again what is out of date", problems
            )
        )


def _metrics(name: str, results: Results) -> dict[Metric, float]:
    """Every metric that was measured for one variant, finite."""
    found: dict[Metric, float] = {}
    report = results.evals.get(name)
    if report is not None:
        found |= {metric: float(read(report)) for metric, read in _FROM_EVAL.items()}
    elif name == results.bench.baseline:
        found |= dict.fromkeys(_FROM_EVAL, 1.0)
    variant = results.bench.variants.get(name)
    if variant is not None:
        found |= {metric: float(read(variant)) for metric, read in _FROM_BENCH.items()}
    return {metric: value for metric, value in found.items() if math.isfinite(value)}


def _broken_limits(policy: Policy, metrics: dict[Metric, float]) -> tuple[BrokenLimit, ...]:
    """The limits that are not kept; a value exactly at its limit keeps it."""
    broken = []
    for metric, limit in policy.limits.items():
        found = metrics.get(metric)
        if limit.min is not None and (found is None or found < limit.min):
            broken.append(BrokenLimit(metric=metric, bound="min", limit=limit.min, found=found))
        if limit.max is not None and (found is None or found > limit.max):
            broken.append(BrokenLimit(metric=metric, bound="max", limit=limit.max, found=found))
    return tuple(broken)


def _why(
    policy: Policy, best: Candidate, n_admissible: int, n_all: int, report: EvalReport | None
) -> str:
    metric = policy.objective.metric
    word = "lowest" if policy.objective.minimise is not None else "highest"
    quality = [
        f"{METRIC_WORDS[m]} {metric_amount(m, best.metrics[m])}"
        for m in ("retention", "neighbour_overlap")
        if m in best.metrics and m != metric
    ]
    best_amount = metric_amount(metric, best.metrics[metric])
    reason = (
        f"{best.name} has the {word} {METRIC_WORDS[metric]} ({best_amount}) of the {n_admissible} "
        f"of {n_all} variants that keep every limit of policy '{policy.name}'"
    )
    if quality:
        reason += f", with {' and '.join(quality)}"
    if report is not None and report.partial:
        failed = ", ".join(task.task for task in report.failed) or "unnamed tasks"
        reason += f"; its evaluation is PARTIAL, without {failed}"
    elif report is not None and report.no_retention is not None:
        reason += f"; NO retention: {report.no_retention}"
    elif "retention" not in best.metrics:
        reason += "; its quality was NOT evaluated"
    return reason + "."


def _why_none(policy: Policy, candidates: Sequence[Candidate]) -> str:
    """Name the candidate that misses least, as shares of the limits, and what it misses."""
    nearest = min(candidates, key=lambda c: (*_distance(c), c.name))
    if not nearest.broken:
        return (
            f"No variant can be picked: those that keep every limit of policy '{policy.name}' "
            f"({', '.join(c.name for c in candidates if not c.broken)}) have no "
            f"{METRIC_WORDS[policy.objective.metric]} measured."
        )
    misses = []
    for miss in nearest.broken:
        side = "at least" if miss.bound == "min" else "at most"
        bound = f"{side} {metric_amount(miss.metric, miss.limit)}"
        if miss.found is None:
            misses.append(f"{METRIC_WORDS[miss.metric]} was not measured and must be {bound}")
        else:
            short = metric_amount(miss.metric, abs(miss.found - miss.limit))
            misses.append(
                f"{METRIC_WORDS[miss.metric]} is {metric_amount(miss.metric, miss.found)} and must "
                f"be {bound} ({short} off)"
            )
    return (
        f"None of the {len(candidates)} variants keeps every limit of policy '{policy.name}'; "
        f"nearest is {nearest.name}, whose {', whose '.join(misses)}."
    )


def _distance(candidate: Candidate) -> tuple[int, float]:
    """How many limits cannot be judged, and the sum of the others' misses relative to the limit."""
    unknown = sum(miss.found is None for miss in candidate.broken)
    relative = sum(
        abs(miss.found - miss.limit) / (abs(miss.limit) or 1.0)
        for miss in candidate.broken
        if miss.found is not None
    )
    return unknown, relative
