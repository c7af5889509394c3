"""Show the estimated cost of an evaluation as a table.

Refuses to know: how it was estimated.
"""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gteopt.records.evaluation import EvaluationEstimate

_MOST_TASKS = 60


def estimate_table(estimate: EvaluationEstimate) -> Table:
    """A table of tasks with their texts and tokens; time, disk, download and dollars are below."""
    table = Table(title=f"{estimate.suite}: what would be encoded", title_style="bold")
    table.add_column("task")
    for heading in ("texts", "tokens"):
        table.add_column(heading, justify="right")
    by_size = sorted(estimate.tasks, key=lambda task: -(task.n_tokens or 0))
    for task in by_size[:_MOST_TASKS]:
        cells = ("?" if n is None else f"{n:,}" for n in (task.n_texts, task.n_tokens))
        table.add_row(Text(task.task), *cells)
    if len(by_size) > _MOST_TASKS:
        table.add_row(f"{len(by_size) - _MOST_TASKS} smaller tasks", "", "")
    table.add_section()
    table.add_row("all", f"{estimate.n_texts:,}", f"{estimate.n_tokens:,}", style="bold")
    table.caption = Text("\n".join(estimate_lines(estimate)), style="not italic")
    return table


def estimate_lines(estimate: EvaluationEstimate) -> list[str]:
    """Time, disk, download and dollars, one line each."""
    n = len(estimate.models)
    models = f"{n} model{'s' if n > 1 else ''} ({', '.join(estimate.models)})"
    lines = []
    if estimate.seconds is None or estimate.tokens_per_s is None:
        lines.append(f"time for {models}: {estimate.rate_source}")
    else:
        lines.append(
            f"encoding with {models}: about {_duration(estimate.seconds)} at "
            f"{estimate.tokens_per_s:,.0f} tokens/s ({estimate.rate_source})"
        )
        if estimate.dollars is not None:
            lines.append(f"${estimate.dollars:,.2f} at ${estimate.price_per_hour:g} an hour")
    lines.append(
        f"disk: up to {decimal(estimate.vector_bytes)} of vectors for each model (--cache-gb)"
    )
    if estimate.missing:
        lines.append(
            f"to download: data of {len(estimate.missing)} tasks, about "
            f"{decimal(estimate.download_bytes)} of text ({', '.join(estimate.missing[:5])}"
            f"{', ...' if len(estimate.missing) > 5 else ''})"
        )
    unknown = [task.task for task in estimate.tasks if task.n_tokens is None]
    if unknown:
        lines.append(f"not counted, as their size is unknown: {', '.join(unknown)}")
    return lines


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
