"""Choose a variant by a policy, and state the reason.

Hides: where each metric is in the records, what a broken limit is, how admissible variants are
ordered. Refuses to know: torch, files, how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from gteopt.config.policy import HIGHER_IS_BETTER, Metric, Policy
from gteopt.errors import InputError, join_problems
from gteopt.records.bench import VariantBench
from gteopt.records.choice import BrokenLimit, Candidate, Choice
from gteopt.records.evaluation import EvalReport
from gteopt.records.results_folder import Results
from gteopt.report.rows import names_in_mean
from gteopt.report.wording import (
    METRIC_SOURCES,
    METRIC_WORDS,
    explain_unknown_metric,
    metric_amount,
    score_points,
)

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
    "speed_ratio": lambda variant: variant.speed_ratio,
    "index_bytes": lambda variant: variant.index_bytes_per_million,
}


def choose_variant(policy: Policy, results: Results) -> Choice:
    """Pick the variant with the best objective among those that keep the policy's limits.

    Candidates are all measured variants and the baseline. The baseline's retention, cosine, overlap
    and correlation are 1. A metric that was not measured breaks each limit on it. A candidate
    without the objective's metric is not picked.

    Speeds and costs are compared as ratios to the baseline's, measured in turns, because absolute
    speeds depend on other load. Candidates tie if their objectives are equal. Speeds also tie if
    they differ by at most the noise, which is the difference of the baseline from itself. Ties are
    broken in this order:

    1. a candidate on the Pareto front goes first;
    2. then one whose interval of retention does not lie wholly below another's;
    3. then one that keeps more neighbours, because close retentions differ by noise;
    4. then by retention, the objective and the name.

    The Pareto front is among the candidates that keep every limit. A candidate is on it if no other
    is at least as good on every axis and better on one. The axes are score, neighbours kept, weight
    bytes, index bytes, tokens a second and the objective. The score is the lower end of retention's
    interval if the policy limits that, and retention otherwise. The score is left out if an
    evaluation is partial or the baseline's score is not above 0. An axis that no candidate has is
    left out too. A candidate that lacks an axis which another has is not on the front.

    If only texts without labels were compared, fidelity decides. Limits on retention are then
    removed from the policy, because they cannot be judged, and the reason says that no labels were
    used.

    Raises:
        InputError: nothing was measured; the records differ in a variant's bytes, in the suite or
            in the baseline; or the objective needs labels, but there are none.
    """
    _check_belong_together(results)
    policy = _for_unlabelled(policy) if results.fidelity and not results.evals else policy
    names = sorted(results.benched.keys() | results.evals.keys() | results.fidelity.keys())
    metrics = {name: _metrics(name, results) for name in names}
    relative = {
        name: values | _relative_speeds(name, values, results) for name, values in metrics.items()
    }
    broken = {name: _broken_limits(policy, metrics[name]) for name in names}
    front = _front(policy, {name: relative[name] for name in names if not broken[name]}, results)
    candidates = tuple(
        Candidate(
            name=name,
            metrics=metrics[name],
            broken=broken[name],
            on_pareto_front=name in front,
        )
        for name in names
    )
    admissible = [c for c in candidates if not c.broken and policy.objective.metric in c.metrics]
    if not admissible:
        return Choice(
            policy=policy, picked=None, reason=_why_none(policy, candidates), candidates=candidates
        )
    best, *tied = _best_first(policy, admissible, relative, results)
    reason = _why(policy, best, tied, len(admissible), len(candidates), results)
    return Choice(policy=policy, picked=best.name, reason=reason, candidates=candidates)


_LABELLED: frozenset[Metric] = frozenset({"retention", "retention_low"})


def _for_unlabelled(policy: Policy) -> Policy:
    """The policy without limits that need labels."""
    limits = {metric: limit for metric, limit in policy.limits.items() if metric not in _LABELLED}
    if policy.objective.metric in _LABELLED:
        raise InputError(
            f"policy {policy.name} optimises {METRIC_WORDS[policy.objective.metric]}, which needs "
            f"labels, but these results have none; maximise neighbour_overlap, or evaluate with "
            f"--data or --suite"
        )
    return policy.model_copy(update={"limits": limits})


def _front(policy: Policy, judged: dict[str, dict[Metric, float]], results: Results) -> set[str]:
    """Names on the Pareto front of the judged candidates; see `choose_variant`."""
    axes: set[Metric] = {"neighbour_overlap", policy.objective.metric, *_COSTS}
    evals = results.evals.values()
    if not any(report.partial or report.retention is None for report in evals):
        axes.add("retention_low" if "retention_low" in policy.limits else "retention")
    measured = {metric for values in judged.values() for metric in values}
    return pareto_front(judged, axes & measured)


def _best_first(
    policy: Policy,
    admissible: Sequence[Candidate],
    relative: Mapping[str, Mapping[Metric, float]],
    results: Results,
) -> list[Candidate]:
    """The candidates that tie for the best, with the pick first; see `choose_variant`.

    `relative` has their metrics, with the speeds of `_relative_speeds`.
    """
    metric = policy.objective.metric
    sign = -1 if policy.objective.maximise is not None else 1
    best = min(sign * relative[c.name][metric] for c in admissible)
    within = abs(best) * _noise(metric, results)
    tied = [c for c in admissible if sign * relative[c.name][metric] <= best + within]
    greatest_low = max(c.metrics.get("retention_low", 0.0) for c in tied)

    def order(candidate: Candidate) -> tuple[bool, bool, float, float, float, str]:
        report = results.evals.get(candidate.name)
        high = report.retention_high if report is not None else None
        return (
            not candidate.on_pareto_front,
            high is not None and high < greatest_low,
            -candidate.metrics.get("neighbour_overlap", 0.0),
            -candidate.metrics.get("retention", 0.0),
            sign * relative[candidate.name][metric],
            candidate.name,
        )

    return sorted(tied, key=order)


def _relative_speeds(
    name: str, measured: Mapping[Metric, float], results: Results
) -> dict[Metric, float]:
    """Speed and cost of a variant as ratios to the baseline's; only metrics that were measured."""
    if results.bench is None or name not in results.bench.variants:
        return {}
    ratio = 1.0 if name == results.bench.baseline else results.bench.variants[name].speed_ratio
    ratios: dict[Metric, float] = {"tokens_per_s": ratio, "cost_per_million_tokens": 1 / ratio}
    return {metric: value for metric, value in ratios.items() if metric in measured}


def _noise(metric: Metric, results: Results) -> float:
    """Relative noise of a metric; 0 for metrics that are not speeds."""
    speeds = ("tokens_per_s", "speed_ratio", "cost_per_million_tokens")
    if results.bench is None or metric not in speeds:
        return 0.0
    return results.bench.noise


def pareto_front(metrics: dict[str, dict[Metric, float]], axes: set[Metric]) -> set[str]:
    """Names that no other name dominates on `axes`; names that lack an axis are left out."""
    points = {
        name: [values[a] if a in HIGHER_IS_BETTER else -values[a] for a in sorted(axes)]
        for name, values in metrics.items()
        if axes <= values.keys()
    }
    return {
        name
        for name, point in points.items()
        if not any(
            other != point and all(b >= a for a, b in zip(point, other, strict=True))
            for other in points.values()
        )
    }


def _check_belong_together(results: Results) -> None:
    bench, evals = results.benched, results.evals
    if not bench and not evals and not results.fidelity:
        raise InputError("the results hold no variant; run `gteopt bench` and `gteopt evaluate`")
    problems = [
        f"'{name}': bench measured {bench[name].artifact_sha256[:12]}, but the evaluation scored "
        f"{evals[name].artifact_sha256[:12]}"
        for name in sorted(bench.keys() & evals.keys())
        if bench[name].artifact_sha256 != evals[name].artifact_sha256
    ]
    problems += [
        f"'{name}': bench measured {bench[name].artifact_sha256[:12]}, but the texts were compared "
        f"with {report.artifact_sha256[:12]}"
        for name, report in sorted(results.fidelity.items())
        if name in bench and bench[name].artifact_sha256 != report.artifact_sha256
    ]
    # A grid gives its baseline another name than an artifact's evaluation, so hashes are compared.
    for kind, names in (
        ("suites", {r.suite_sha256: r.suite for r in evals.values()}),
        ("baselines", {r.baseline_sha256: r.baseline for r in evals.values()}),
    ):
        if len(names) > 1:
            listed = sorted(f"{name} {sha256[:12]}" for sha256, name in names.items())
            problems.append(f"the evaluations are of {len(names)} {kind}: {', '.join(listed)}")
    if problems:
        raise InputError(
            join_problems(
                "the results do not belong together; repeat the outdated measurements", problems
            )
        )


def _metrics(name: str, results: Results) -> dict[Metric, float]:
    """All finite metrics that were measured for one variant."""
    metrics: dict[Metric, float] = {}
    report = results.evals.get(name)
    if report is not None:
        metrics |= {metric: float(read(report)) for metric, read in _FROM_EVAL.items()}
        if report.artifact_sha256 == report.baseline_sha256:
            metrics["retention_low"] = 1.0  # the baseline's ratio to itself is exact
        metrics["index_bytes"] = report.bytes_per_vector * 1e6
    elif (close := results.fidelity.get(name)) is not None:
        metrics |= {
            "mean_cosine": close.fidelity.mean_cosine,
            "neighbour_overlap": close.fidelity.neighbour_overlap,
            "spearman": close.fidelity.spearman,
            "index_bytes": close.bytes_per_vector * 1e6,
        }
    elif name == results.baseline and (results.evals or len(results.benched) == 1):
        # If no variant was evaluated, a score would let the baseline win, so it gets none.
        metrics |= dict.fromkeys(_FROM_EVAL, 1.0)
    elif name == results.baseline and results.fidelity:
        metrics |= {"mean_cosine": 1.0, "neighbour_overlap": 1.0, "spearman": 1.0}
    if results.bench is not None and (variant := results.bench.variants.get(name)) is not None:
        metrics |= {metric: float(read(variant)) for metric, read in _FROM_BENCH.items()}
        cost = results.bench.cost_per_million_tokens(name)
        metrics |= {} if cost is None else {"cost_per_million_tokens": cost}
    return {metric: value for metric, value in metrics.items() if math.isfinite(value)}


def _broken_limits(policy: Policy, metrics: dict[Metric, float]) -> tuple[BrokenLimit, ...]:
    """The broken limits; a value exactly at its limit keeps it."""
    broken = []
    for metric, limit in policy.limits.items():
        value = metrics.get(metric)
        if limit.min is not None and (value is None or value < limit.min):
            broken.append(BrokenLimit(metric=metric, bound="min", limit=limit.min, found=value))
        if limit.max is not None and (value is None or value > limit.max):
            broken.append(BrokenLimit(metric=metric, bound="max", limit=limit.max, found=value))
    return tuple(broken)


def _why(
    policy: Policy,
    best: Candidate,
    tied: Sequence[Candidate],
    n_admissible: int,
    n_all: int,
    results: Results,
) -> str:
    metric = policy.objective.metric
    word = "lowest" if policy.objective.minimise is not None else "highest"
    report = results.evals.get(best.name)
    quality = [
        f"{METRIC_WORDS[m]} {metric_amount(m, best.metrics[m])}{_certainty(m, report)}"
        for m in _SHOWN_QUALITY
        if m in best.metrics and m != metric
    ]
    noise = _noise(metric, results)
    best_amount = metric_amount(metric, best.metrics[metric])
    if ratio := _relative_speeds(best.name, best.metrics, results).get(metric):
        best_amount += f", {ratio:.2f} times the baseline's, measured in turns"
    reason = (
        f"{best.name} has the {word} {METRIC_WORDS[metric]} ({best_amount}"
        f"{f', within the noise of {noise:.1%}' if tied and noise else ''}) of the "
        f"{n_admissible} of {n_all} variants that keep every limit of policy '{policy.name}'"
    )
    if quality:
        reason += f", with {' and '.join(quality)}"
    if tied:
        others = ", ".join(
            f"{c.name} ({_overlap(c)})" if "neighbour_overlap" in c.metrics else c.name
            for c in tied
        )
        reason += f"; tied with {others}"
    if report is not None and report.partial:
        failed = ", ".join(task.task for task in report.failed) or "unnamed tasks"
        reason += f"; its evaluation is PARTIAL, without {failed}"
    elif report is not None and report.no_retention is not None:
        reason += f"; NO retention: {report.no_retention}"
    elif best.name in results.fidelity and not results.evals:
        reason += (
            f"; judged by its closeness to the baseline on {_n_texts(results, best.name):,} texts "
            f"without labels"
        )
    elif "retention" not in best.metrics:
        reason += "; its quality was NOT evaluated"
    return reason + "."


def _n_texts(results: Results, name: str) -> int:
    return results.fidelity[name].fidelity.n_texts


_SHOWN_QUALITY: tuple[Metric, ...] = ("retention", "neighbour_overlap")


def _overlap(candidate: Candidate) -> str:
    overlap = metric_amount("neighbour_overlap", candidate.metrics["neighbour_overlap"])
    return f"{METRIC_WORDS['neighbour_overlap']} {overlap}"


def _certainty(metric: Metric, report: EvalReport | None) -> str:
    """The number of tasks and the interval of a retention, in brackets; empty for other metrics."""
    if metric != "retention" or report is None:
        return ""
    parts = [_task_counts(report)] if report.tasks else []
    if report.difference is not None and report.artifact_sha256 != report.baseline_sha256:
        assert report.retention_low is not None
        assert report.retention_high is not None
        parts.append(
            f"95 % interval {100 * report.retention_low:.1f} to "
            f"{100 * report.retention_high:.1f} %, score {report.difference.verdict} against a "
            f"margin of {score_points(report.margin)}"
        )
    return f" ({'; '.join(parts)})" if parts else ""


def _task_counts(report: EvalReport) -> str:
    """The number of tasks in the mean, and of those with an interval if it is smaller."""
    tasks = {task.task for task in report.tasks}
    n, n_with_interval = len(names_in_mean(report.tasks)), report.n_interval_tasks
    of_all = f" of {len(tasks)}" if n < len(tasks) else ""
    words = f"over {n}{of_all} task{'' if n == 1 and not of_all else 's'}"
    if report.difference is not None and n_with_interval < n:
        words += f", the interval over {n_with_interval} of these"
    return words


def _why_none(policy: Policy, candidates: Sequence[Candidate]) -> str:
    """Name the candidate that is nearest to keeping all limits, and say what it misses."""
    nearest = min(candidates, key=lambda c: (*_distance(c), c.name))
    if not nearest.broken:
        return (
            f"No variant can be picked: {METRIC_WORDS[policy.objective.metric]} was not measured "
            f"for the variants that keep every limit of policy '{policy.name}' "
            f"({', '.join(c.name for c in candidates if not c.broken)}); "
            f"{METRIC_SOURCES[policy.objective.metric]}."
        )
    misses = []
    for miss in nearest.broken:
        side = "at least" if miss.bound == "min" else "at most"
        bound = f"{side} {metric_amount(miss.metric, miss.limit)}"
        if miss.found is None:
            misses.append(
                f"{explain_unknown_metric(miss.metric, nearest.metrics)} and must be {bound}"
            )
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
    """The number of limits that cannot be judged, and the sum of relative misses of the others."""
    unknown = sum(miss.found is None for miss in candidate.broken)
    relative = sum(
        abs(miss.found - miss.limit) / (abs(miss.limit) or 1.0)
        for miss in candidate.broken
        if miss.found is not None
    )
    return unknown, relative
