"""Show the user's texts whose neighbours changed most, before and after, on the report page.

Refuses to know: how neighbours are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from gteopt.records.examples import Example, Examples
from gteopt.report.markup import section_markup

_MOST_CHARACTERS = 240


def examples_section(examples: Mapping[str, Examples], picked: str | None) -> str:
    """A section with one fold for each variant, the pick's first and open; may be empty."""
    if not examples:
        return ""
    names = sorted(examples, key=lambda name: name != picked)
    body = "".join(
        f"<details{' open' if number == 0 else ''}><summary>{escape(name)}</summary>"
        f"{_all(examples[name])}</details>"
        for number, name in enumerate(names)
    )
    return section_markup("examples", "Neighbours that changed most", _LEAD, body)


def _all(examples: Examples) -> str:
    if not examples.examples:
        return "<p>Every text keeps its ten nearest neighbours.</p>"
    return "".join(_example(example, examples.baseline) for example in examples.examples)


def _example(example: Example, baseline: str) -> str:
    before, after = set(example.before), set(example.after)
    return (
        f'<article class="example"><h3>{_shown(example.text)}</h3>'
        f"<p>{example.n_kept} of {len(example.before)} nearest neighbours kept</p>"
        f'<div class="sides"><div><h4>{escape(baseline)}</h4>'
        f"{_listed(example.before, after, 'lost')}</div>"
        f"<div><h4>variant</h4>{_listed(example.after, before, 'new')}</div></div></article>"
    )


def _listed(texts: Sequence[str], others: set[str], word: str) -> str:
    """A list of texts that marks those that the other side lacks."""
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


_LEAD = """The ten texts that keep the fewest of their ten nearest neighbours. Of a large
collection, only a sample is compared. The page shows your texts in plain text: check them before
you share it."""
