"""Draw the charts of the report page, as HTML for plotly.js.

Hides: plotly. Refuses to know: torch, files, the rest of the page.

Charts set no colours for text and lines, because report.css sets the page's colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import plotly.io

from gteopt.records.evaluation import EvalReport, FidelityReport
from gteopt.records.results_folder import Results
from gteopt.report.rows import Row

# Mid-tones with a contrast of at least 3:1 on the light and on the dark page.
_GREY, _GREEN, _BLUE = "#8a939e", "#1f9d74", "#4f83cc"
_COLOURS = (_BLUE, "#c9772b", "#9b6dd1", "#c4518f", "#3d97a8", "#a8842c", "#cf5b4e", "#6f8f3a")
_SYMBOLS = ("circle", "square", "cross", "triangle-up", "x")
# The legend is above the plot, because a long legend below it would cover the axis title.
_LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
_SIZE, _PICKED_SIZE = 11, 15
_LEAST_DISTANCE = 1e-6
"""Smaller distances are within the rounding of float32, and are drawn as this one."""
_LEAST_FRONTIER = 3
"""Least number of vector sizes for the chart of neighbours kept by size."""
_MOST_NAMED = 10
"""With more variants, the legend names only the baseline, the pick and the Pareto front."""
FIDELITY_CHARTS = {
    "mean_cosine": ("1 − mean cosine to the baseline (left is closer)", True),
    "p1_cosine": ("1 − 1st-percentile cosine (left is closer)", True),
    "neighbour_overlap": ("Overlap of the 10 nearest neighbours, %", False),
    "spearman": ("1 − Spearman correlation of similarities (left is closer)", True),
}
"""Caption by attribute of `Row`, and whether the chart shows the distance from 1."""


def quality_attribute(lines: Sequence[Row]) -> str:
    """The attribute that charts show as quality: retention, or without scores neighbours kept."""
    scored = any(row.retention is not None for row in lines if not row.is_baseline)
    return "retention" if scored else "neighbour_overlap"


def trade_chart(
    lines: Sequence[Row],
    key: str,
    x_title: str,
    x_of: Callable[[Row], float | None],
    *,
    larger_is_better: bool = False,
    logarithmic: bool = False,
) -> str:
    """A chart of quality against a cost, with one trace for each variant.

    The dotted line is the Pareto front of the intervals' lower ends, which policies can limit. A
    variant far below the others is an arrow at the lower edge, so that the others stay apart.
    """
    quality = quality_attribute(lines)
    points = [
        (x, 100 * y, row)
        for row in lines
        if (x := x_of(row)) is not None and (y := getattr(row, quality)) is not None
    ]
    floor = axis_floor([y for _, y, _ in points])
    spans = [_span(row, quality) for *_, row in points]
    inside = [(y, *span) for (_, y, _), span in zip(points, spans, strict=True) if y >= floor]
    y_axis = _axis(value for values in inside for value in values)
    low, high = y_axis["range"]
    edge = low + 0.03 * (high - low)
    lower_ends = [(x, span[0]) for (x, *_), span in zip(points, spans, strict=True)]
    front = pareto_line(lower_ends, larger_is_better=larger_is_better)
    figure = go.Figure(
        go.Scatter(
            x=[x for x, _ in front],
            y=[max(y, edge) for _, y in front],
            mode="lines",
            name="Pareto front of lower ends",
            # Between two points of the front, the cheaper one is the best choice: draw steps.
            line={"color": _GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
            hoverinfo="skip",
        )
    )
    named = [row for *_, row in points if len(points) <= _MOST_NAMED or _stands_out(row)]
    for number, ((x, y, row), span) in enumerate(zip(points, spans, strict=True)):
        trace = _point(number, row, (x, y), span, floor=floor, edge=edge)
        figure.add_trace(trace.update(showlegend=row in named))
    n_legend_lines = math.ceil((len(named) + 1) / 2)
    figure.update_layout(**_layout(height=350 + 20 * n_legend_lines, legend=True))
    figure.update_layout(legend=_LEGEND)
    if logarithmic:
        figure.update_xaxes(title=x_title, type="log", automargin=True, zeroline=False)
        ticks = thin_ticks(sorted({round(x) for x, *_ in points}))
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{x:,}" for x in ticks])
    else:
        figure.update_xaxes(title=x_title, **_axis(x for x, *_ in points))
    y_title = "Retention, %" if quality == "retention" else "10 nearest kept, %"
    figure.update_yaxes(title=y_title, **y_axis)
    return _html(figure, key)


def _stands_out(row: Row) -> bool:
    return row.is_baseline or row.status in ("picked", "front")


def _point(
    number: int,
    row: Row,
    at: tuple[float, float],
    span: tuple[float, float],
    *,
    floor: float,
    edge: float,
) -> Any:
    """The marker of a variant, with its interval; below the floor, an arrow at the edge."""
    x, y = at
    below = y < floor
    interval = f" ({span[0]:.1f}–{span[1]:.1f})" if span[0] < span[1] else ""
    colour, symbol = _COLOURS[number % len(_COLOURS)], _SYMBOLS[number % len(_SYMBOLS)]
    if row.is_baseline:
        colour, symbol = _GREY, "diamond"
    shown = edge if below else y
    is_picked = row.status == "picked"
    own = (colour, "triangle-down" if below else symbol)
    picked = (_GREEN, "triangle-down" if below else "star")
    shape = picked if is_picked else own
    return go.Scatter(
        x=[x],
        y=[shown],
        # The page's script draws `picked` if the policy picks the variant, and `own` otherwise.
        meta={"variant": row.name, "own": own, "picked": picked},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [0 if below else span[1] - y],
            "arrayminus": [0 if below else y - span[0]],
            "thickness": 1.2,
            "width": 4,
            "color": _GREY,
        },
        name=escape(row.name) + (f" ({y:.1f} %)" if below else ""),
        text=[f"<b>{escape(row.name)}</b><br>{x:,.4g}<br>{y:.2f} %{interval}"],
        hovertemplate="%{text}<extra></extra>",
        mode="markers",
        marker={
            "size": _PICKED_SIZE if is_picked else _SIZE,
            "color": shape[0],
            "symbol": shape[1],
        },
    )


def pareto_line(
    points: Iterable[tuple[float, float]], *, larger_is_better: bool
) -> list[tuple[float, float]]:
    """The Pareto front of points (cost, quality), starting at the best cost."""
    sign = -1 if larger_is_better else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (sign * p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def axis_floor(values: Sequence[float]) -> float:
    """The least quality, in %, that an axis must include.

    A variant is below it if it loses more than five points and more than three times the median
    loss. On an axis that includes such a variant, the others would fall on one point.
    """
    losses = sorted(100 - value for value in values if value < 100)
    typical = losses[len(losses) // 2] if losses else 0.0
    return 100 - max(5.0, 3 * typical)


def latency_chart(lines: Sequence[Row]) -> str:
    """A chart of percentiles of one query's time, with three bars per variant."""
    shown = [row for row in lines if row.p50_ms is not None]
    names = [escape(row.name) for row in shown]
    figure = go.Figure(
        [
            go.Bar(
                y=names,
                x=[getattr(row, f"{percentile}_ms") for row in shown],
                name=percentile,
                orientation="h",
                marker={"color": colour},
                hovertemplate="%{y}: %{x:.2f} ms<extra>" + percentile + "</extra>",
            )
            for percentile, colour in (("p50", _BLUE), ("p95", _COLOURS[1]), ("p99", _GREY))
        ]
    )
    figure.update_layout(**_layout(height=120 + 44 * max(1, len(shown)), legend=True))
    figure.update_layout(barmode="group", bargap=0.3, legend=_LEGEND)
    figure.update_xaxes(title="ms", rangemode="tozero", automargin=True)
    figure.update_yaxes(autorange="reversed", automargin=True, ticks="", type="category")
    return _html(figure, "latency")


def frontier_chart(results: Results) -> str | None:
    """A chart of neighbours kept by bytes of a vector, with one trace for each code.

    The dotted line is the Pareto front. The result is None if fewer than three sizes were measured.
    """
    reports: list[EvalReport | FidelityReport] = [*results.evals.values()]
    reports += results.fidelity.values()
    points = {
        report.variant: (report.bytes_per_vector, 100 * report.fidelity.neighbour_overlap, report)
        for report in reports
        if report.artifact_sha256 != report.baseline_sha256
    }
    ticks = sorted({n_bytes for n_bytes, *_ in points.values()})
    if len(ticks) < _LEAST_FRONTIER:
        return None
    front = pareto_line([point[:2] for point in points.values()], larger_is_better=False)
    figure = go.Figure(
        go.Scatter(
            x=[x for x, _ in front],
            y=[y for _, y in front],
            mode="lines",
            name="Pareto front",
            line={"color": _GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
            hoverinfo="skip",
        )
    )
    codes = dict.fromkeys(report.code for *_, report in points.values())
    for number, code in enumerate(codes):
        coded = [point for point in points.values() if point[2].code == code]
        texts = [
            f"<b>{escape(report.variant)}</b><br>{n_bytes:,} bytes<br>{kept:.1f} %"
            + (f"<br>score {100 * report.score:.2f}" if isinstance(report, EvalReport) else "")
            for n_bytes, kept, report in coded
        ]
        figure.add_trace(
            go.Scatter(
                x=[n_bytes for n_bytes, *_ in coded],
                y=[kept for _, kept, _ in coded],
                mode="markers",
                name=code,
                text=texts,
                hovertemplate="%{text}<extra></extra>",
                marker={
                    "size": _SIZE,
                    "color": _COLOURS[number % len(_COLOURS)],
                    "symbol": _SYMBOLS[number % len(_SYMBOLS)],
                },
            )
        )
    figure.update_layout(**_layout(height=370, legend=True))
    figure.update_layout(legend=_LEGEND)
    shown = thin_ticks(ticks)
    figure.update_xaxes(
        title="Bytes a vector (MB a million)",
        type="log",
        automargin=True,
        zeroline=False,
        tickvals=shown,
        ticktext=[f"{n_bytes:,}" for n_bytes in shown],
    )
    figure.update_yaxes(title="10 nearest kept, %", **_axis(y for _, y, _ in points.values()))
    return _html(figure, "frontier")


def thin_ticks(ticks: Sequence[int]) -> list[int]:
    """The ticks whose labels do not overlap on a logarithmic axis: each is 1.5 times the last."""
    shown: list[int] = []
    for tick in ticks:
        if not shown or tick >= 1.5 * shown[-1]:
            shown.append(tick)
    return shown


def fidelity_chart(lines: Sequence[Row], attribute: str) -> str:
    """A chart of one measure of fidelity, with one line per variant."""
    is_distance = FIDELITY_CHARTS[attribute][1]
    shown = [row for row in lines if getattr(row, attribute) is not None and not row.is_baseline]
    measured = [getattr(row, attribute) for row in shown]
    # Distances differ by factors, which need a logarithmic axis.
    values = [max(1 - value, _LEAST_DISTANCE) if is_distance else 100 * value for value in measured]
    colours = [_GREEN if row.status == "picked" else _BLUE for row in shown]
    names = [escape(row.name) for row in shown]
    trace = _distances(names, values, colours) if is_distance else _bars(names, values, colours)
    figure = go.Figure(trace.update(meta=_recolouring(shown)))
    figure.update_layout(**_layout(height=70 + 26 * max(1, len(shown))), bargap=0.35)
    if is_distance:
        figure.update_xaxes(**_powers_of_ten(values))
    else:
        # The length of a bar shows its value, so the axis starts at zero.
        figure.update_xaxes(range=[0, 116], tickvals=[0, 50, 100])
    figure.update_yaxes(
        autorange="reversed", automargin=True, ticks="", showgrid=is_distance, type="category"
    )
    return _html(figure, attribute)


def _recolouring(shown: Sequence[Row]) -> dict[str, Any]:
    """Names and colours with which the page's script marks the pick of another policy."""
    return {"variants": [row.name for row in shown], "own": _BLUE, "picked": _GREEN}


def _distances(names: list[str], values: list[float], colours: list[str]) -> Any:
    least = _LEAST_DISTANCE
    texts = [f"  {value:.2g}" if value > least else f"  below {least:g}" for value in values]
    marker = {"color": colours, "size": 9}
    return go.Scatter(
        x=values,
        y=names,
        mode="markers+text",
        marker=marker,
        text=texts,
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
    )


def _bars(names: list[str], values: list[float], colours: list[str]) -> Any:
    return go.Bar(
        x=values,
        y=names,
        orientation="h",
        marker={"color": colours},
        text=[f"{value:.1f}" for value in values],
        textposition="outside",
        cliponaxis=False,
        hoverinfo="skip",
    )


def _powers_of_ten(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with a tick at each power of ten, and space for text on the right."""
    exponents = [math.log10(value) for value in values] or [0.0]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    width = max(1, high - low)
    powers = range(low, high + 1)
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return {
        "type": "log",
        "range": [low - 0.05 * width, low + 1.25 * width],
        "tickvals": [10.0**exponent for exponent in powers],
        "ticktext": [f"10{str(exponent).translate(raised)}" for exponent in powers],
        "tickangle": 0,
    }


def _span(row: Row, quality: str) -> tuple[float, float]:
    """Ends of the interval of retention in %; without an interval, the value twice."""
    value = 100 * getattr(row, quality)
    if quality != "retention" or row.retention_low is None or row.retention_high is None:
        return value, value
    return 100 * row.retention_low, 100 * row.retention_high


def _layout(height: int, legend: bool = False) -> dict[str, Any]:
    return {
        "template": None,
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 28},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "showlegend": legend,
        "dragmode": False,
    }


def _axis(values: Iterable[float]) -> dict[str, Any]:
    """An axis with a margin for markers around the values."""
    shown = list(values)
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return {"range": [low - margin, high + margin], "automargin": True, "zeroline": False}


def _html(figure: Any, key: str) -> str:
    html: str = plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{key}",
        default_height=f"{figure.layout.height}px",
        config={"displayModeBar": False},
    )
    return html
