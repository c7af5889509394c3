"""Turns a policy and what was measured into a choice and its reason.

Hides: where each metric lies in the reports, what a broken limit is, how admissible variants are
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
from gteopt.report.wording import METRIC_SOURCES, METRIC_WORDS, metric_amount, points, unknown

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


def choose(policy: Policy, results: Results) -> Choice:
    """Pick the variant that is best in the policy's objective among those that keep its limits.

    Every measured variant is a candidate, and so is the baseline. Compared with itself it has
    retention, cosine, overlap and correlation 1. A metric that was not measured breaks each limit
    on it. A candidate without the objective's metric is not picked.

    Speeds and costs are compared by their ratio to the baseline's, measured in turns with them,
    because tokens a second depend on whatever else the machine does. Candidates tie where the
    objective is equal. Speeds also tie where they differ by no more than the baseline's from
    itself. Ties are broken by, in this order:

    1. lying on the Pareto front;
    2. an interval of retention that does not lie wholly below another's;
    3. more neighbours kept, because retentions of close variants differ by noise;
    4. retention, the objective, the name.

    The Pareto front is drawn among the candidates that keep every limit. One is on it where no
    other is at least as good on every axis and better on one. The axes are score, neighbours kept,
    weight bytes, index bytes, tokens a second and the objective. The score is the lower end of
    retention's interval where the policy limits that, and retention otherwise. It does not count
    where an evaluation is partial or the baseline's score is not above 0. An axis that was measured
    for no candidate does not count either. A candidate that alone lacks one is not on the front.

    Where only texts without labels were compared, fidelity decides. Limits on retention then leave
    the policy, because nothing can keep or break them, and the reason says so.

    Raises:
        InputError: nothing was measured; the reports do not belong together (other bytes of the
            same variant, another suite, another baseline); or the objective needs labels and there
            are none.
    """
    _check_belong_together(results)
    policy = _for_unlabelled(policy) if results.fidelity and not results.evals else policy
    names = sorted(results.benched.keys() | results.evals.keys() | results.fidelity.keys())
    metrics = {name: _metrics(name, results) for name in names}
    fair = {name: found | _in_turns(name, found, results) for name, found in metrics.items()}
    broken = {name: _broken_limits(policy, metrics[name]) for name in names}
    front = _front(policy, {name: fair[name] for name in names if not broken[name]}, results)
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
    best, *tied = _best_first(policy, admissible, fair, results)
    reason = _why(policy, best, tied, len(admissible), len(candidates), results)
    return Choice(policy=policy, picked=best.name, reason=reason, candidates=candidates)


_LABELLED: frozenset[Metric] = frozenset({"retention", "retention_low"})


def _for_unlabelled(policy: Policy) -> Policy:
    """The policy without limits that need labels."""
    limits = {metric: limit for metric, limit in policy.limits.items() if metric not in _LABELLED}
    if policy.objective.metric in _LABELLED:
        raise InputError(
            f"policy {policy.name} asks for the best {METRIC_WORDS[policy.objective.metric]}, "
            f"which needs labels; these results have none. Maximise neighbour_overlap, or "
            f"evaluate with --data or --suite"
        )
    return policy.model_copy(update={"limits": limits})


def _front(policy: Policy, judged: dict[str, dict[Metric, float]], results: Results) -> set[str]:
    """Names on the Pareto front of those that keep every limit; see `choose`."""
    axes: set[Metric] = {"neighbour_overlap", policy.objective.metric, *_COSTS}
    evals = results.evals.values()
    if not any(report.partial or report.retention is None for report in evals):
        axes.add("retention_low" if "retention_low" in policy.limits else "retention")
    measured = {metric for found in judged.values() for metric in found}
    return pareto_front(judged, axes & measured)


def _best_first(
    policy: Policy,
    admissible: Sequence[Candidate],
    fair: Mapping[str, Mapping[Metric, float]],
    results: Results,
) -> list[Candidate]:
    """The candidates that tie for the best, the one to pick first; see `choose`.

    `fair` are their metrics with speeds as `_in_turns` has them.
    """
    metric = policy.objective.metric
    sign = -1 if policy.objective.maximise is not None else 1
    best = min(sign * fair[c.name][metric] for c in admissible)
    within = abs(best) * _noise(metric, results)
    tied = [c for c in admissible if sign * fair[c.name][metric] <= best + within]
    least = max(c.metrics.get("retention_low", 0.0) for c in tied)

    def order(candidate: Candidate) -> tuple[bool, bool, float, float, float, str]:
        report = results.evals.get(candidate.name)
        high = report.retention_high if report is not None else None
        found = candidate.metrics
        return (
            not candidate.on_pareto_front,
            high is not None and high < least,
            -found.get("neighbour_overlap", 0.0),
            -found.get("retention", 0.0),
            sign * fair[candidate.name][metric],
            candidate.name,
        )

    return sorted(tied, key=order)


def _in_turns(name: str, found: Mapping[Metric, float], results: Results) -> dict[Metric, float]:
    """Speed and cost of a variant as shares of the baseline's, where they were measured."""
    if results.bench is None or name not in results.bench.variants:
        return {}
    ratio = 1.0 if name == results.bench.baseline else results.bench.variants[name].speed_ratio
    shares: dict[Metric, float] = {"tokens_per_s": ratio, "cost_per_million_tokens": 1 / ratio}
    return {metric: share for metric, share in shares.items() if metric in found}


def _noise(metric: Metric, results: Results) -> float:
    """How much of a metric is noise of the measurement, as a share."""
    speeds = ("tokens_per_s", "speed_ratio", "cost_per_million_tokens")
    if results.bench is None or metric not in speeds:
        return 0.0
    return results.bench.noise


def pareto_front(metrics: dict[str, dict[Metric, float]], axes: set[Metric]) -> set[str]:
    """Names that no other dominates on `axes`; names that lack an axis are left out."""
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
    bench, evals = results.benched, results.evals
    if not bench and not evals and not results.fidelity:
        raise InputError("the results hold no variant; run `gteopt bench` and `gteopt evaluate`")
    problems = [
        f"'{name}': bench measured {bench[name].artifact_sha256[:12]}, the evaluation scored "
        f"{evals[name].artifact_sha256[:12]}"
        for name in sorted(bench.keys() & evals.keys())
        if bench[name].artifact_sha256 != evals[name].artifact_sha256
    ]
    problems += [
        f"'{name}': bench measured {bench[name].artifact_sha256[:12]}, the texts were compared "
        f"with {report.artifact_sha256[:12]}"
        for name, report in sorted(results.fidelity.items())
        if name in bench and bench[name].artifact_sha256 != report.artifact_sha256
    ]
    # A grid names its baseline in another way than an artifact's evaluation; its content decides.
    for what, found in (
        ("suites", {r.suite_sha256: r.suite for r in evals.values()}),
        ("baselines", {r.baseline_sha256: r.baseline for r in evals.values()}),
    ):
        if len(found) > 1:
            each = sorted(f"{name} {sha256[:12]}" for sha256, name in found.items())
            problems.append(f"the evaluations are of {len(found)} {what}: {', '.join(each)}")
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
        if report.artifact_sha256 == report.baseline_sha256:
            found["retention_low"] = 1.0  # needs no resampling
        found["index_bytes"] = report.bytes_per_vector * 1e6
    elif (close := results.fidelity.get(name)) is not None:
        found |= {
            "mean_cosine": close.fidelity.mean_cosine,
            "neighbour_overlap": close.fidelity.neighbour_overlap,
            "spearman": close.fidelity.spearman,
            "index_bytes": close.bytes_per_vector * 1e6,
        }
    elif name == results.baseline and (results.evals or len(results.benched) == 1):
        # Beside unevaluated variants it would win by default, so it gets no score there.
        found |= dict.fromkeys(_FROM_EVAL, 1.0)
    elif name == results.baseline and results.fidelity:
        found |= {"mean_cosine": 1.0, "neighbour_overlap": 1.0, "spearman": 1.0}
    if results.bench is not None and (variant := results.bench.variants.get(name)) is not None:
        found |= {metric: float(read(variant)) for metric, read in _FROM_BENCH.items()}
        cost = results.bench.cost_per_million_tokens(name)
        found |= {} if cost is None else {"cost_per_million_tokens": cost}
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
        f"{METRIC_WORDS[m]} {metric_amount(m, best.metrics[m])}{_sure(m, report)}"
        for m in _SHOWN_QUALITY
        if m in best.metrics and m != metric
    ]
    noise = _noise(metric, results)
    best_amount = metric_amount(metric, best.metrics[metric])
    if share := _in_turns(best.name, best.metrics, results).get(metric):
        best_amount += f", {share:.2f} times the baseline's in turns with it"
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


def _sure(metric: Metric, report: EvalReport | None) -> str:
    """How sure a retention is, in brackets."""
    if metric != "retention" or report is None:
        return ""
    told = [_over(report)] if report.tasks else []
    if report.difference is not None and report.artifact_sha256 != report.baseline_sha256:
        assert report.retention_low is not None
        assert report.retention_high is not None
        told.append(
            f"95 % interval {100 * report.retention_low:.1f} to "
            f"{100 * report.retention_high:.1f} %, score {report.difference.verdict} against a "
            f"margin of {points(report.margin)}"
        )
    return f" ({'; '.join(told)})" if told else ""


def _over(report: EvalReport) -> str:
    """Over how many tasks a mean and its interval are."""
    tasks = {task.task for task in report.tasks}
    n, n_sure = len(names_in_mean(report.tasks)), report.n_interval_tasks
    of_all = f" of {len(tasks)}" if n < len(tasks) else ""
    told = f"over {n}{of_all} task{'' if n == 1 and not of_all else 's'}"
    if report.difference is not None and n_sure < n:
        told += f", the interval over {n_sure} of these"
    return told


def _why_none(policy: Policy, candidates: Sequence[Candidate]) -> str:
    """Name the candidate that misses least, as shares of the limits, and what it misses."""
    nearest = min(candidates, key=lambda c: (*_distance(c), c.name))
    if not nearest.broken:
        return (
            f"No variant can be picked: those that keep every limit of policy '{policy.name}' "
            f"({', '.join(c.name for c in candidates if not c.broken)}) have no "
            f"{METRIC_WORDS[policy.objective.metric]} measured "
            f"({METRIC_SOURCES[policy.objective.metric]})."
        )
    misses = []
    for miss in nearest.broken:
        side = "at least" if miss.bound == "min" else "at most"
        bound = f"{side} {metric_amount(miss.metric, miss.limit)}"
        if miss.found is None:
            misses.append(f"{unknown(miss.metric, nearest.metrics)} and must be {bound}")
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
