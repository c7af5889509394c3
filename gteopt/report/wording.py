"""Word metrics and their amounts, for tables and the report."""

from __future__ import annotations

from collections.abc import Mapping

from gteopt.config.policy import Metric

METRIC_WORDS: dict[Metric, str] = {
    "retention": "retention",
    "retention_low": "lower end of retention's 95 % interval",
    "mean_cosine": "mean cosine",
    "neighbour_overlap": "neighbour overlap",
    "spearman": "Spearman correlation",
    "weight_bytes": "weight size",
    "peak_memory_bytes": "peak memory",
    "p95_ms": "p95 latency",
    "tokens_per_s": "throughput",
    "speed_ratio": "speed relative to the baseline's",
    "index_bytes": "index size per million vectors",
    "cost_per_million_tokens": "cost per million tokens",
}

_EVALUATE, _BENCH = "`gteopt evaluate --out` measures it", "`gteopt bench --out` measures it"
METRIC_SOURCES: dict[Metric, str] = {
    "retention": _EVALUATE,
    "retention_low": f"{_EVALUATE} where every task has an interval",
    "mean_cosine": _EVALUATE,
    "neighbour_overlap": _EVALUATE,
    "spearman": _EVALUATE,
    "weight_bytes": _BENCH,
    "peak_memory_bytes": _BENCH,
    "p95_ms": _BENCH,
    "tokens_per_s": _BENCH,
    "speed_ratio": _BENCH,
    "index_bytes": _BENCH,
    "cost_per_million_tokens": "`gteopt bench --price-per-hour --out` measures it",
}
"""The command that measures a metric, in words."""


def explain_unknown_metric(metric: Metric, measured: Mapping[Metric, float]) -> str:
    """Say why a limit on a metric cannot be judged.

    Args:
        metric: the metric without a value.
        measured: the measured metrics of the same variant.
    """
    if metric == "retention_low" and "retention" in measured:
        amount = metric_amount("retention", measured["retention"])
        return f"retention of {amount} has no interval (no task has one)"
    return f"{METRIC_WORDS[metric]} was not measured ({METRIC_SOURCES[metric]})"


def metric_amount(metric: Metric, value: float) -> str:
    """A metric's value with its unit, to four significant digits."""
    if metric.endswith("_bytes"):
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= scale:
                return f"{value / scale:.4g} {unit}"
        return f"{value:.0f} bytes"
    if metric == "p95_ms":
        return f"{value:.4g} ms"
    if metric == "tokens_per_s":
        return f"{value:,.0f} tokens/s"
    if metric == "speed_ratio":
        return f"{value:.2f} x"
    if metric == "cost_per_million_tokens":
        return f"${value:.4g}"
    if metric in ("retention", "retention_low", "neighbour_overlap"):
        return f"{100 * value:.4g} %"
    return f"{value:.4g}"


def score_points(share: float) -> str:
    """A difference of scores, given from 0 to 1, in points."""
    return f"{100 * share:g} point{'' if share == 0.01 else 's'}"
