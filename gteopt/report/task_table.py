"""The report page's heat map: one line for each task and language, one column for each variant.

Hides: its layout. Refuses to know: how a task is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gteopt.records.evaluation import BesidePublished, EvalReport, TaskScore
from gteopt.records.results_folder import Results
from gteopt.report.markup import scrolled, table_tools
from gteopt.report.rows import (
    MISSING,
    Row,
    beside_published,
    published_text,
    suite_span,
    suite_verdict,
    task_key,
)
from gteopt.report.wording import points


def tasks_table(results: Results, lines: Sequence[Row]) -> str:
    """A heat map with a line for each task, split and language, and a column for each variant."""
    shown = [row for row in lines if row.name in results.evals and not row.is_baseline]
    scores = {
        row.name: {task_key(task): task for task in results.evals[row.name].tasks} for row in shown
    }
    tasks = {key: task for by_key in scores.values() for key, task in by_key.items()}
    own = results.evals.get(results.baseline)
    if own is not None:
        tasks = {task_key(task): task for task in own.tasks} | tasks
    known = {task_key(task): task.published for task in own.tasks} if own else {}
    body = ""
    if shown:
        means = [results.evals[row.name] for row in shown]
        cells = "".join(_mean_cell(report) for report in means)
        body = (
            f'<tr><th scope="row" data-value="Mean">Mean<small>difference, 95 % interval, verdict'
            f"</small></th>{_score_cell(means[0].baseline_score)}{cells}</tr>"
        )
    for key, task in tasks.items():
        cells = "".join(_task_cell(scores[row.name].get(key)) for row in shown)
        below = _published_cell(known.get(key))
        body += (
            f'<tr data-language="{escape(task.subset)}">'
            f'<th scope="row" data-value="{escape(f"{task.task} {task.subset}")}">'
            f"{escape(task.task)}<small>{escape(task.subset)} · "
            f"{escape(task.split)} · {escape(task.metric)} · {task.n_samples:,} samples"
            f"{_NOT_ABOVE_CHANCE if task.above_chance is False else ''}</small>"
            f"</th>{_score_cell(task.baseline_score, below)}{cells}</tr>"
        )
    head = "".join(
        f'<th scope="col" data-title="{escape(row.name)}">{escape(row.name)}</th>' for row in shown
    )
    notes = beside_published(own) if own else []
    notes = [*dict.fromkeys(n for each in results.evals.values() for n in each.notes), *notes]
    if shown:
        notes.insert(0, _about_means(results.evals[shown[0].name]))
    table = (
        '<table id="table-tasks" class="sortable"><thead><tr><th scope="col" data-title="Task">Task'
        f'</th><th scope="col" data-title="{escape(results.baseline)}">'
        f"{escape(results.baseline)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    subsets = sorted({task.subset for task in tasks.values()})
    tools = "".join(f"<option>{escape(subset)}</option>" for subset in subsets)
    select = (
        f'<select aria-label="Language"><option value="">all languages</option>{tools}</select>'
    )
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    filters = table_tools("table-tasks", "tasks", select if len(subsets) > 1 else "")
    return filters + scrolled("Table of task scores", table, "tasks") + below


def _score_cell(score: float, below: str = "", style: str = "") -> str:
    return f'<td data-value="{score:.6f}"{style}>{score * 100:.2f}{below}</td>'


def _mean_cell(report: EvalReport) -> str:
    value, _, span = suite_span(report).partition(" ")
    spans = "".join(f"<small>{each}</small>" for each in (value, span, suite_verdict(report)))
    return _score_cell(report.score, spans)


def _about_means(report: EvalReport) -> str:
    return (
        f"Of the means: difference from the baseline in points, its 95 % paired bootstrap interval "
        f"and the verdict against a margin of {points(report.margin)}."
    )


def _published_cell(found: BesidePublished | None) -> str:
    return "" if found is None else f"<small>published {published_text(found)}</small>"


def _task_cell(task: TaskScore | None) -> str:
    if task is None:
        return f'<td data-value="">{MISSING}</td>'
    if task.baseline_score <= 0:
        return _score_cell(task.score)
    retention = task.score / task.baseline_score
    # Full tint at a loss of a quarter: beyond that a variant is of no use anyway.
    loss = min(1.0, max(0.0, (1 - retention) * 4))
    verdict = f" · {task.difference.verdict}" if task.difference else ""
    if task.sequential is not None and task.is_stopped:
        verdict += f" · stopped after {task.sequential.n_scored:,} of {task.sequential.n_all:,}"
    below = f"<small>{retention * 100:.1f} %{verdict}</small>"
    return _score_cell(task.score, below, f' style="--loss:{loss:.3f}"')


_NOT_ABOVE_CHANCE = " · not above chance, not in the mean"
