"""Draw neighbours kept and nDCG@10 over bytes per vector, for the best codes of each library.

    python benchmarks/vector_frontier.py   # vector_codes.json to vector_codes.svg, both in results/

A line joins the codes of a library that keep the most neighbours at each number of bytes. A code is
left out if a code of fewer bytes keeps as many. The lower panels show the nDCG@10 of the same codes
by Cranfield's judgements. The dashed line is the limit of codes for normally distributed vectors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "vector_codes.json"
_COLOURS = {
    "gteopt": "#1f9d74",
    "faiss": "#4f83cc",
    "sentence-transformers": "#c9772b",
    "Gaussian limit": "#8a939e",
}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _BETWEEN = 300, 200, 40, 30, 40, 50
Point = tuple[int, float, float]


@dataclass(frozen=True)
class Axis:
    """The vertical axis of a panel.

    Attributes:
        value: index in a `Point` of the value that is drawn.
        full: value at the upper end.
        step: distance between marks.
        top: vertical position of the upper end, in pixels.
    """

    value: int
    full: float
    step: float
    top: float


def frontier(rows: list[dict[str, Any]]) -> list[Point]:
    """(bytes, share kept, nDCG) of codes that keep more than all shorter codes, shortest first."""
    points: list[Point] = []
    for row in sorted(rows, key=lambda row: (row["n_bytes"], -row["neighbours_kept"])):
        if not points or row["neighbours_kept"] > points[-1][1]:
            points.append((row["n_bytes"], row["neighbours_kept"], row["ndcg_at_10"]))
    return points


def panel(rows: list[dict[str, Any]], left: int, axis: Axis) -> list[str]:
    """One panel of a model: bytes on a logarithmic axis, percent from 0."""
    sizes = [row["n_bytes"] for row in rows]
    low, high = math.log2(min(sizes)), math.log2(max(sizes))

    def at(n_bytes: float, value: float) -> tuple[float, float]:
        x = left + (math.log2(n_bytes) - low) / (high - low) * _WIDTH
        return x, axis.top + (1 - value / axis.full) * _HEIGHT

    parts: list[str] = []
    for number in range(round(axis.full / axis.step) + 1):
        mark = number * axis.step
        y = at(min(sizes), mark)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="#8a939e" stroke-opacity="0.3"/>')
        words = f"{100 * mark:g}"
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    for n_bytes in (12, 48, 192, 768):
        if min(sizes) <= n_bytes <= max(sizes):
            x, y = at(n_bytes, 0)
            parts.append(
                f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{n_bytes}</text>'
            )
    for library, colour in _COLOURS.items():
        best = frontier([row for row in rows if row["by"] == library])
        points = [at(point[0], point[axis.value]) for point in best]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        is_limit = library not in ("gteopt", "faiss", "sentence-transformers")
        dashed = ' stroke-dasharray="4 4"' if is_limit else ""
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>'
        )
        if not is_limit:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points
            ]
    return parts


def picture(rows: list[dict[str, Any]]) -> str:
    """The SVG: two panels for each model and a legend; its background is transparent."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    second = _TOP + _HEIGHT + _BETWEEN
    parts: list[str] = []
    for number, model in enumerate(models):
        model_rows = [row for row in rows if row["model"] == model]
        left = _LEFT + number * (_WIDTH + _LEFT + 10)
        parts.append(f'<text x="{left}" y="18" font-weight="600">{escape(model)}</text>')
        parts += panel(model_rows, left, Axis(1, 1.0, 0.2, _TOP))
        most = max(row["ndcg_at_10"] for row in model_rows)
        step = 0.1 if most > 0.2 else 0.05
        parts.append(f'<text x="{left}" y="{second - 8}">nDCG@10, %</text>')
        parts += panel(model_rows, left, Axis(2, math.ceil(most / step) * step, step, second))
    y = second + _HEIGHT + _BOTTOM
    for number, (library, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + number * 160
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">● {escape(library)}</text>')
    words = "above: 10 nearest kept, %, over bytes a vector"
    parts.append(f'<text x="{_LEFT + 640}" y="{y}">{words}</text>')
    width = max(len(models) * (_WIDTH + _LEFT + 10), 960)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 12}" '
        f'font-family="sans-serif" font-size="12" fill="#6b7580">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    svg = picture(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
    RESULTS.with_suffix(".svg").write_text(svg, encoding="utf-8")
