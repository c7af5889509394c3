"""Neighbours kept over bytes a vector, the best of each library, as a picture.

    python benchmarks/vector_frontier.py   # vector_codes.json to vector_codes.svg, both in results/

Lines join the best code of a library at each number of bytes; what keeps less than fewer bytes do
is left out.
"""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "vector_codes.json"
_COLOURS = {"gteopt": "#1f9d74", "faiss": "#4f83cc", "sentence-transformers": "#c9772b"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 300, 230, 40, 30, 40


def frontier(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(bytes, share kept) of codes that no shorter or equal one beats, shortest first."""
    found: list[tuple[int, float]] = []
    for row in sorted(rows, key=lambda row: (row["n_bytes"], -row["neighbours_kept"])):
        if not found or row["neighbours_kept"] > found[-1][1]:
            found.append((row["n_bytes"], row["neighbours_kept"]))
    return found


def panel(model: str, rows: list[dict[str, Any]], left: int) -> list[str]:
    """One model's picture: bytes on a logarithmic axis, shares from 0 to 1."""
    sizes = [row["n_bytes"] for row in rows]
    low, high = math.log2(min(sizes)), math.log2(max(sizes))

    def at(n_bytes: float, kept: float) -> tuple[float, float]:
        x = left + (math.log2(n_bytes) - low) / (high - low) * _WIDTH
        return x, _TOP + (1 - kept) * _HEIGHT

    parts = [f'<text x="{left}" y="18" font-weight="600">{escape(model)}</text>']
    for tenths in range(0, 11, 2):
        y = at(1 << math.ceil(low), tenths / 10)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="#8a939e" stroke-opacity="0.3"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tenths * 10}</text>')
    for n_bytes in (12, 48, 192, 768):
        if min(sizes) <= n_bytes <= max(sizes):
            x = at(n_bytes, 0)[0]
            y = _TOP + _HEIGHT + 16
            parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{n_bytes}</text>')
    for library, colour in _COLOURS.items():
        points = [at(*p) for p in frontier([row for row in rows if row["by"] == library])]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return parts


def picture(rows: list[dict[str, Any]]) -> str:
    """The SVG, a panel a model and a legend; it has no colours of its own for the page."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    parts: list[str] = []
    for number, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        parts += panel(model, own, _LEFT + number * (_WIDTH + _LEFT + 10))
    y = _TOP + _HEIGHT + _BOTTOM
    for number, (library, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + number * 160
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">● {escape(library)}</text>')
    words = "10 nearest kept, %, over bytes a vector"
    parts.append(f'<text x="{_LEFT + 480}" y="{y}">{words}</text>')
    width = max(len(models) * (_WIDTH + _LEFT + 10), 800)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 12}" '
        f'font-family="sans-serif" font-size="12" fill="#6b7580">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    svg = picture(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
    RESULTS.with_suffix(".svg").write_text(svg, encoding="utf-8")
