"""Pieces of HTML that several parts of the report page use."""

from __future__ import annotations

from html import escape


def section(key: str, title: str, lead: str, body: str) -> str:
    lead = f'<p class="muted">{lead}</p>' if lead else ""
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{lead}{body}</section>'


def scrolled(label: str, table: str, kind: str = "") -> str:
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{label}">{table}</div>'
    )


def charts(*charts: tuple[str, str]) -> str:
    figures = "".join(
        f"<figure><figcaption>{caption}</figcaption>{chart}</figure>" for caption, chart in charts
    )
    return f'<div class="charts">{figures}</div>'


def description(facts: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(f)}</dd>" for term, f in facts.items())
    return f"<dl>{items}</dl>"
