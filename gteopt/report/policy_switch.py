"""Let the report page switch between policies: it holds every answer, and a menu shows one.

Hides: how the page stores the answers. Refuses to know: how a pick is chosen;
`choose_variant` did that for each policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from gteopt.records.results_folder import Results
from gteopt.report.recommendation import limits_section, recommendation_headline, use_section
from gteopt.report.rows import MARKS, Row, result_rows


def policy_answer(results: Results, folder: str, artifacts: Mapping[str, str]) -> dict[str, str]:
    """The parts of the page that depend on the policy, by name."""
    return {
        "headline": recommendation_headline(results, result_rows(results)),
        "limits": limits_section(results.choice),
        "use": use_section(results.choice, folder, artifacts),
    }


def policy_part(name: str, html: str) -> str:
    """A part of the page that a policy may replace."""
    return f'<div data-part="{name}">{html}</div>'


def policy_menu(results: Results, others: Mapping[str, Results | str]) -> str:
    """The menu of policies; empty if there is only one."""
    options = _options(results, others)
    if len(options) < 2:
        return ""
    items = "".join(
        f'<option value="{number}">{escape(label)}</option>' for number, label in enumerate(options)
    )
    return f'<p class="policy"><label>Policy <select id="policy">{items}</select></label></p>'


def policy_answers(
    results: Results,
    others: Mapping[str, Results | str],
    folder: str,
    artifacts: Mapping[str, str],
) -> str:
    """One inert template for each line of the menu: the page's parts and the variants' status."""
    options = _options(results, others)
    if len(options) < 2:
        return ""
    html = ""
    for number, judged in enumerate(options.values()):
        if isinstance(judged, str):
            reason = f'<p class="answer none">This policy cannot be applied: {escape(judged)}</p>'
            parts, lines = (
                {"headline": reason, "limits": "", "use": ""},
                result_rows(_unjudged(results)),
            )
        else:
            parts, lines = policy_answer(judged, folder, artifacts), result_rows(judged)
        statuses = json.dumps(
            {row.name: [row_status_class(row), row_status_line(row)] for row in lines}
        )
        inner = "".join(policy_part(name, text) for name, text in parts.items())
        html += (
            f'<template data-policy="{number}" data-statuses="{escape(statuses)}">{inner}'
            f"</template>"
        )
    return html


def row_status_class(row: Row) -> str:
    """CSS class of a variant's line in the table."""
    return f"{row.status} baseline" if row.is_baseline else row.status


def row_status_line(row: Row) -> str:
    """The line below a variant's name."""
    return f"{MARKS[row.status]} {row.verdict}"


def _options(results: Results, others: Mapping[str, Results | str]) -> dict[str, Results | str]:
    """The lines of the menu, with the applied policy first."""
    applied = results.choice.policy if results.choice else None
    options: dict[str, Results | str] = {}
    options["none" if applied is None else f"{applied.name} (applied)"] = results
    for name, judged in others.items():
        is_applied = (
            isinstance(judged, Results)
            and judged.choice is not None
            and judged.choice.policy == applied
        )
        if not is_applied:
            options[name] = judged
    return options


def _unjudged(results: Results) -> Results:
    return results.model_copy(update={"choice": None})
