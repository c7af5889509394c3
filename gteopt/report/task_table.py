"""Make the report page's heat map: a line for each task and language, a column for each variant.

Hides: the layout. Refuses to know: how a task is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gteopt.records.evaluation import EvalReport, PublishedComparison, TaskScore
from gteopt.records.results_folder import Results
from gteopt.report.markup import scroll_markup, table_controls
from gteopt.report.rows import (
    MISSING,
    Row,
    published_sentences,
    published_text,
    suite_span,
    suite_verdict,
    task_key,
)
from gteopt.report.wording import score_points


def tasks_table(results: Results, lines: Sequence[Row]) -> str:
    """A heat map with a line for each task, split and language, and a column for each variant."""
    shown = [row for row in lines if row.name in results.evals and not row.is_baseline]
    scores = {
        row.name: {task_key(task): task for task in results.evals[row.name].tasks} for row in shown
    }
    tasks = {key: task for by_key in scores.values() for key, task in by_key.items()}
    baseline = results.evals.get(results.baseline)
    if baseline is not None:
        tasks = {task_key(task): task for task in baseline.tasks} | tasks
    published = {task_key(task): task.published for task in baseline.tasks} if baseline else {}
    body = ""
    if shown:
        reports = [results.evals[row.name] for row in shown]
        cells = "".join(_mean_cell(report) for report in reports)
        body = (
            f'<tr><th scope="row" data-value="Mean">Mean<small>difference, 95 % interval, verdict'
            f"</small></th>{_score_cell(reports[0].baseline_score)}{cells}</tr>"
        )
    for key, task in tasks.items():
        cells = "".join(_task_cell(scores[row.name].get(key)) for row in shown)
        below = _published_cell(published.get(key))
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
    notes = list(dict.fromkeys(n for report in results.evals.values() for n in report.notes))
    notes += published_sentences(baseline) if baseline else []
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
    filters = table_controls("table-tasks", "tasks", select if len(subsets) > 1 else "")
    return filters + scroll_markup("Table of task scores", table, "tasks") + below


def _score_cell(score: float, below: str = "", style: str = "") -> str:
    return f'<td data-value="{score:.6f}"{style}>{score * 100:.2f}{below}</td>'


def _mean_cell(report: EvalReport) -> str:
    value, _, span = suite_span(report).partition(" ")
    lines = (value, span, suite_verdict(report))
    return _score_cell(report.score, "".join(f"<small>{line}</small>" for line in lines))


def _about_means(report: EvalReport) -> str:
    return (
        f"The line of means has the difference from the baseline in points, its 95 % paired "
        f"bootstrap interval, and the verdict for a margin of {score_points(report.margin)}. "
        f"Equivalent means that the interval lies within the margin. Undecided means that the "
        f"interval is too wide for any other verdict; more data would narrow it."
    )


def _published_cell(published: PublishedComparison | None) -> str:
    return "" if published is None else f"<small>published {published_text(published)}</small>"


def _task_cell(task: TaskScore | None) -> str:
    if task is None:
        return f'<td data-value="">{MISSING}</td>'
    if task.baseline_score <= 0:
        return _score_cell(task.score)
    retention = task.score / task.baseline_score
    # A loss of a quarter has the full tint, because variants that lose more are of no use.
    loss = min(1.0, max(0.0, (1 - retention) * 4))
    verdict = f" · {task.difference.verdict}" if task.difference else ""
    if task.sequential is not None and task.is_stopped:
        verdict += f" · stopped after {task.sequential.n_scored:,} of {task.sequential.n_all:,}"
    below = f"<small>{retention * 100:.1f} %{verdict}</small>"
    return _score_cell(task.score, below, f' style="--loss:{loss:.3f}"')


_NOT_ABOVE_CHANCE = " · not above chance, not in the mean"
