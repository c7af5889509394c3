"""The report page's examples: own texts whose neighbours changed most, before and after.

Refuses to know: how neighbours are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from gteopt.records.examples import Example, Examples
from gteopt.report.markup import section

_MOST_CHARACTERS = 240


def examples_section(found: Mapping[str, Examples], picked: str | None) -> str:
    """One fold for each variant, the pick's first and open; empty without examples."""
    if not found:
        return ""
    names = sorted(found, key=lambda name: name != picked)
    body = "".join(
        f"<details{' open' if number == 0 else ''}><summary>{escape(name)}</summary>"
        f"{_all(found[name])}</details>"
        for number, name in enumerate(names)
    )
    return section("examples", "Neighbours that changed most", _LEAD, body)


def _all(found: Examples) -> str:
    if not found.examples:
        return "<p>Every text keeps its ten nearest others.</p>"
    return "".join(_example(each, found.baseline) for each in found.examples)


def _example(example: Example, baseline: str) -> str:
    before, after = set(example.before), set(example.after)
    return (
        f'<article class="example"><h3>{_shown(example.text)}</h3>'
        f"<p>{example.n_kept} of {len(example.before)} nearest kept</p>"
        f'<div class="sides"><div><h4>{escape(baseline)}</h4>'
        f"{_listed(example.before, after, 'lost')}</div>"
        f"<div><h4>variant</h4>{_listed(example.after, before, 'new')}</div></div></article>"
    )


def _listed(texts: Sequence[str], others: set[str], word: str) -> str:
    """A list that marks what the other side lacks."""
    items = "".join(
        f"<li>{_shown(text)}</li>"
        if text in others
        else f'<li class="{word}">{_shown(text)} <b>{word}</b></li>'
        for text in texts
    )
    return f"<ol>{items}</ol>"


def _shown(text: str) -> str:
    short = text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
    return escape(short)


_LEAD = """The ten texts that keep the fewest of their ten nearest. A large collection is
looked at by a sample. These are your own texts in clear, so look before you pass this page on."""
