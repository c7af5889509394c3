"""Sum up a choice in a few lines: the pick's gains and costs, the runner-up, and how to use it.

Refuses to know: torch, files beyond their names, how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gteopt.records.choice import Candidate, Choice
from gteopt.records.results_folder import Results
from gteopt.report.rows import Row, load_note, result_rows
from gteopt.report.wording import METRIC_WORDS, explain_unknown_metric, metric_amount


def speed_words(results: Results, name: str) -> str | None:
    """A variant's speed relative to the baseline's, with its interval; None if not measured.

    It says "slower" or "faster" only if the interval excludes 1.
    """
    if results.bench is None or name not in results.benched or name == results.baseline:
        return None
    variant = results.benched[name]
    ratio, ends = f"{variant.speed_ratio:.2f} x the baseline's speed", variant.speed_interval
    if ends is None:
        word = "slower in this measurement, " if variant.speed_ratio < 1 else ""
        return f"{word}{ratio} (too few repeats for an interval)"
    low, high = ends
    word = "SLOWER, " if high < 1 else "faster, " if low > 1 else "about as fast, "
    return f"{word}{ratio} ({low:.2f} to {high:.2f})"


def is_slower(results: Results, name: str) -> bool:
    """Whether a variant's interval of speed lies wholly below the baseline's speed."""
    variant = results.benched.get(name)
    if variant is None or name == results.baseline:
        return False
    ends = variant.speed_interval
    return ends is not None and ends[1] < 1


def pick_lines(results: Results) -> list[str]:
    """One line each: the pick with its gains and costs, the runner-up with its reason, a note."""
    choice = results.choice
    assert choice is not None
    if choice.picked is None:
        return [f"Nothing to pick: {choice.reason}"]
    by_name = {row.name: row for row in result_rows(results)}
    row = by_name[choice.picked]
    if row.is_baseline:
        lines = [f"Pick: {row.name}, the unchanged model; no variant within the limits is better."]
    else:
        lines = [f"Pick: {row.name}: {', '.join(_changes(results, row, by_name))}."]
    load = load_note(results.bench).removeprefix("; ") if results.bench is not None else ""
    return [*lines, *_runner_up(choice), *([f"Note: {load}."] if load else [])]


def _changes(results: Results, row: Row, by_name: dict[str, Row]) -> Iterator[str]:
    baseline = by_name[results.baseline]
    speed = speed_words(results, row.name)
    if speed is not None and speed.lower().startswith("slower"):
        yield speed
        speed = None
    if row.weight_bytes is not None and baseline.weight_bytes is not None:
        yield (
            f"{metric_amount('weight_bytes', row.weight_bytes)} of weights instead of "
            f"{metric_amount('weight_bytes', baseline.weight_bytes)} ({row.weight_ratio:.2f} x)"
        )
    if row.vector_bytes and baseline.vector_bytes and row.vector_bytes != baseline.vector_bytes:
        yield f"{row.vector_bytes:,} bytes a vector instead of {baseline.vector_bytes:,}"
    if speed is not None:
        yield speed
    if row.p95_ms is not None and baseline.p95_ms is not None:
        yield f"a query takes {row.p95_ms:.1f} ms (p95) instead of {baseline.p95_ms:.1f} ms"
    if row.retention is not None:
        sure = ""
        if row.retention_low is not None and row.retention_high is not None:
            sure = (
                f" ({row.retention_low * 100:.1f} to {row.retention_high * 100:.1f}, "
                f"{row.score_verdict})"
            )
        yield f"{row.retention * 100:.1f} % of the score{sure}"
    if row.neighbour_overlap is not None:
        yield f"{row.neighbour_overlap * 100:.1f} % of the 10 nearest neighbours"


def _runner_up(choice: Choice) -> Iterator[str]:
    metric = choice.policy.objective.metric
    others = [candidate for candidate in choice.candidates if candidate.name != choice.picked]
    admissible = [c for c in others if not c.broken and metric in c.metrics]
    sign = -1 if choice.policy.objective.maximise is not None else 1
    if admissible:
        second = min(admissible, key=lambda c: sign * c.metrics[metric])
        picked = next(c for c in choice.candidates if c.name == choice.picked)
        amounts = [metric_amount(metric, c.metrics[metric]) for c in (second, picked)]
        if amounts[0] == amounts[1] and "neighbour_overlap" in second.metrics:
            metric = "neighbour_overlap"
            amounts = [metric_amount(metric, c.metrics[metric]) for c in (second, picked)]
        yield (
            f"Runner-up: {second.name}: {METRIC_WORDS[metric]} {amounts[0]} against {amounts[1]}."
        )
    elif others:
        nearest = min(others, key=lambda c: len(c.broken))
        yield f"Runner-up: none; {nearest.name} breaks a limit: {_misses(nearest)}."


def _misses(candidate: Candidate) -> str:
    words = []
    for miss in candidate.broken:
        if miss.found is None:
            measured = explain_unknown_metric(miss.metric, candidate.metrics)
        else:
            measured = f"{METRIC_WORDS[miss.metric]} {metric_amount(miss.metric, miss.found)}"
        side = "at least" if miss.bound == "min" else "at most"
        words.append(f"{measured}, {side} {metric_amount(miss.metric, miss.limit)}")
    return "; ".join(words)


def use_lines(results: Results, folder: Path) -> list[str]:
    """The commands and the Python line that load, serve and publish the pick."""
    choice = results.choice
    if choice is None or choice.picked is None or choice.picked == results.baseline:
        return []
    artifact = folder / "variants" / choice.picked
    return [
        f"load:     python -c \"import gteopt; gteopt.load('{artifact}')\"",
        f"serve:    gteopt serve {artifact}",
        f"publish:  gteopt publish {artifact} --repo ORG/NAME --results {folder}",
        f"report:   {folder / 'report.html'}",
    ]
