"""Make the pieces of HTML that several parts of the report page use."""

from __future__ import annotations

from html import escape

from gteopt.report.rows import Row


def section_markup(key: str, title: str, lead: str, body: str) -> str:
    lead = f'<p class="muted">{lead}</p>' if lead else ""
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{lead}{body}</section>'


def scroll_markup(label: str, table: str, kind: str = "") -> str:
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{label}">{table}</div>'
    )


def charts_markup(*charts: tuple[str, str]) -> str:
    figures = "".join(
        f"<figure><figcaption>{caption}</figcaption>{chart}</figure>" for caption, chart in charts
    )
    return f'<div class="charts">{figures}</div>'


def facts_markup(facts: dict[str, str]) -> str:
    items = "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts.items()
    )
    return f"<dl>{items}</dl>"


def table_controls(table: str, name: str, more: str = "") -> str:
    """The controls above a table that can be sorted, filtered and saved."""
    return (
        f'<div class="tools" data-table="{table}"><input type="search" placeholder="filter" '
        f'aria-label="Filter {name}">{more}<a href="#" download="{name}.csv">CSV</a>'
        "<span>click a heading to sort</span></div>"
    )


def interval_text(row: Row) -> str:
    """The 95 % interval of a row's retention, which must have one."""
    assert row.retention_low is not None
    assert row.retention_high is not None
    return f"{row.retention_low * 100:.1f}–{row.retention_high * 100:.1f}"
