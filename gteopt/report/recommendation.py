"""Make the report page's recommendation: what to use, its gains and costs, limits and commands.

Hides: which figures of the pick are shown. Refuses to know: how the pick was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from gteopt.records.choice import Choice
from gteopt.records.results_folder import Results
from gteopt.report.markup import interval_text, scroll_markup, section_markup
from gteopt.report.pick import is_slower, pick_lines
from gteopt.report.rows import MISSING, Row, format_megabytes
from gteopt.report.wording import METRIC_WORDS, metric_amount


def recommendation_headline(results: Results, lines: Sequence[Row]) -> str:
    """The recommended variant, with its gains and costs."""
    choice = results.choice
    if choice is None:
        return (
            '<p class="answer">No policy was applied, so nothing is recommended; '
            "apply one with <code>gteopt choose</code>.</p>"
        )
    baseline, row = lines[0], next((row for row in lines if row.status == "picked"), None)
    reason = f'<p class="runner">{escape(choice.reason)}</p>'
    if row is None:
        return f'<p class="answer none">Nothing can be recommended.</p>{reason}'
    if row.is_baseline:
        return f'<p class="answer">Keep {escape(row.name)}, the unchanged model.</p>{reason}'
    tiles = "".join(
        f'<li class="{kind}"><b>{value}</b> {words}</li>'
        for kind, value, words in _tiles(results, baseline, row)
    )
    warning = " It is slower than the baseline." if is_slower(results, row.name) else ""
    runner_up = "".join(f'<p class="muted">{escape(line)}</p>' for line in pick_lines(results)[1:])
    return (
        f'<p class="answer">Use <b>{escape(row.name)}</b>.{warning}</p>'
        f'<ul class="tiles" aria-label="{escape(row.name)} in figures">{tiles}</ul>'
        f"{reason}{runner_up}"
    )


def _tiles(results: Results, baseline: Row, row: Row) -> Iterator[tuple[str, str, str]]:
    """What the pick changes: kind ("gain", "cost" or ""), figure and words of each tile."""
    if row.weight_ratio is not None:
        kind = "gain" if row.weight_ratio < 1 else "cost"
        yield kind, f"{row.weight_ratio:.2f}×", f"of the weights: {_megabytes_of(row, baseline)}"
    if row.vector_bytes and baseline.vector_bytes and row.vector_bytes != baseline.vector_bytes:
        words = f"of the index: {row.vector_bytes:,} bytes a vector, not {baseline.vector_bytes:,}"
        yield "gain", f"{row.vector_bytes / baseline.vector_bytes:.2g}×", words
    if row.speed_ratio is not None:
        ends = results.benched[row.name].speed_interval
        kind, words = "", "too few repeats for an interval" if ends is None else "about as fast"
        if ends is not None and (ends[0] > 1 or ends[1] < 1):
            kind, words = ("gain", "faster") if ends[0] > 1 else ("cost", "slower")
        sure = "" if ends is None else f" ({ends[0]:.2f}–{ends[1]:.2f})"
        yield kind, f"{row.speed_ratio:.2f}×", f"the baseline’s throughput{sure}: {words}"
    if row.retention is not None:
        sure = (
            f" ({interval_text(row)}: {row.score_verdict})" if row.retention_low is not None else ""
        )
        kind = {"worse": "cost", "better": "gain"}.get(row.score_verdict or "", "")
        yield kind, f"{row.retention * 100:.1f} %", f"of the baseline’s score{sure}"
    if row.neighbour_overlap is not None:
        words = "of the 10 nearest neighbours kept"
        yield "", f"{row.neighbour_overlap * 100:.0f} %", words


def _megabytes_of(row: Row, baseline: Row) -> str:
    assert row.weight_bytes is not None
    assert baseline.weight_bytes is not None
    return f"{format_megabytes(row.weight_bytes)} MB, not {format_megabytes(baseline.weight_bytes)}"


_LIMITS = """A pick must keep every limit. Retention is the share of the baseline’s score that a
variant keeps. Neighbour overlap is the share of the baseline’s 10 nearest neighbours that stay."""


def limits_section(choice: Choice | None) -> str:
    """The policy's limits with the figures of each candidate; empty without limits."""
    if choice is None or not choice.policy.limits:
        return ""
    title = f"Limits of the policy {escape(choice.policy.name)}"
    return section_markup("limits", title, _LIMITS, _limits_table(choice))


def use_section(choice: Choice | None, folder: str, artifacts: Mapping[str, str]) -> str:
    """The commands that use the pick; empty if nothing was picked.

    Args:
        choice: the decision.
        folder: the results folder.
        artifacts: folders of variants by name, as far as they are known.
    """
    if choice is None or choice.picked is None:
        return ""
    artifact = artifacts.get(choice.picked, UNKNOWN)
    return section_markup("use", "Use it", "", _commands(folder, artifact))


def _limits_table(choice: Choice) -> str:
    """A table with one line for each limit and one column for each candidate, the pick first."""
    candidates = sorted(choice.candidates, key=lambda candidate: candidate.name != choice.picked)
    head = "".join(f'<th scope="col">{escape(candidate.name)}</th>' for candidate in candidates)
    body = ""
    for metric, limit in choice.policy.limits.items():
        bounds = [("at least", limit.min), ("at most", limit.max)]
        words = " and ".join(
            f"{side} {metric_amount(metric, bound)}" for side, bound in bounds if bound is not None
        )
        cells = ""
        for candidate in candidates:
            value = candidate.metrics.get(metric)
            text = MISSING if value is None else metric_amount(metric, value)
            broken = any(miss.metric == metric for miss in candidate.broken)
            kind = "broken" if broken else "" if value is None else "kept"
            cells += f'<td class="{kind}">{escape(text)}</td>'
        name = METRIC_WORDS[metric]
        body += f'<tr><th scope="row">{escape(name)}<small>{escape(words)}</small></th>{cells}</tr>'
    table = (
        f'<table class="limits"><thead><tr><th scope="col">Limit</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    return scroll_markup("Limits of the policy", table)


def _commands(folder: str, artifact: str) -> str:
    """The lines that load, check, serve and publish the picked artifact."""
    shell = (
        f"gteopt verify {artifact}\n"
        f"gteopt serve {artifact}\n"
        f"gteopt publish {artifact} --repo ORG/NAME --results {folder} --dry-run\n"
        f"gteopt choose {folder} --policy fastest   # another policy, from the same measurements"
    )
    python = f'import gteopt\nvectors = gteopt.load("{artifact}").encode(["a text"])'
    where = (
        "<p><code>ARTIFACT</code> is the folder of the built variant.</p>"
        if artifact == UNKNOWN
        else ""
    )
    return f"{where}<pre>{escape(shell)}</pre><pre>{escape(python)}</pre>"


UNKNOWN = "ARTIFACT"
"""Placeholder for the unknown folder of an artifact."""
