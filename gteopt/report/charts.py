"""The charts of the report page, as HTML that plotly.js draws.

Hides: plotly. Refuses to know: torch, files, the rest of the page.

Charts have no colours of their own for text and lines: report.css gives them the page's.
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

# Mid-tones, readable on the light and on the dark page (contrast at least 3:1 on both).
_GREY, _GREEN, _BLUE = "#8a939e", "#1f9d74", "#4f83cc"
_COLOURS = (_BLUE, "#c9772b", "#9b6dd1", "#c4518f", "#3d97a8", "#a8842c", "#cf5b4e", "#6f8f3a")
_SYMBOLS = ("circle", "square", "cross", "triangle-up", "x")
# Above the plot: below it, the legend would lie on the axis title where it takes several lines.
_LEGEND = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
_SIZE, _PICKED_SIZE = 11, 15
_LEAST_DISTANCE = 1e-6
"""All that float32 cannot tell from zero."""
_LEAST_FRONTIER = 3
"""Different sizes of a vector from which on their neighbours are drawn."""
_MOST_NAMED = 10
"""Beyond so many variants a legend names only the baseline, the pick and the Pareto front."""
FIDELITY_CHARTS = {
    "mean_cosine": ("1 − mean cosine to the baseline (left is closer)", True),
    "p1_cosine": ("1 − 1st-percentile cosine (left is closer)", True),
    "neighbour_overlap": ("Overlap of the 10 nearest neighbours, %", False),
    "spearman": ("1 − Spearman correlation of similarities (left is closer)", True),
}
"""By attribute of `Row`: the caption, and whether its distance from 1 is drawn."""


def quality_of(lines: Sequence[Row]) -> str:
    """The attribute of quality that charts show: retention, or neighbours without scores."""
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

    The step line joins the Pareto front of the intervals' lower ends, which policies limit. A
    variant far below the others is an arrow at the lower edge, so that the others keep apart.
    """
    quality = quality_of(lines)
    points = [
        (x, 100 * y, row)
        for row in lines
        if (x := x_of(row)) is not None and (y := getattr(row, quality)) is not None
    ]
    floor = axis_floor([y for _, y, _ in points])
    spans = [_span(row, quality) for *_, row in points]
    near = [(y, *span) for (_, y, _), span in zip(points, spans, strict=True) if y >= floor]
    y_axis = _axis(value for values in near for value in values)
    low, high = y_axis["range"]
    edge = low + 0.03 * (high - low)
    sure = [(x, span[0]) for (x, *_), span in zip(points, spans, strict=True)]
    front = pareto_line(sure, larger_is_better=larger_is_better)
    figure = go.Figure(
        go.Scatter(
            x=[x for x, _ in front],
            y=[max(y, edge) for _, y in front],
            mode="lines",
            name="surely not beaten",
            # Between two points of the front the one that costs less is the best to be had.
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
        ticks = spread(sorted({round(x) for x, *_ in points}))
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{x:,}" for x in ticks])
    else:
        figure.update_xaxes(title=x_title, **_axis(x for x, *_ in points))
    words = "Retention, %" if quality == "retention" else "10 nearest kept, %"
    figure.update_yaxes(title=words, **y_axis)
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
    """One variant: its marker, and its interval where it lies in the picture."""
    x, y = at
    below = y < floor
    sure = f" ({span[0]:.1f}–{span[1]:.1f})" if span[0] < span[1] else ""
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
        # The page's script draws one of the two, as the policy picks the variant or not.
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
        text=[f"<b>{escape(row.name)}</b><br>{x:,.4g}<br>{y:.2f} %{sure}"],
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
    """The points (cost, quality) that no other beats on both, from the best cost on."""
    sign = -1 if larger_is_better else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (sign * p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def axis_floor(values: Sequence[float]) -> float:
    """The least quality (in %) that an axis has to reach.

    It leaves out a variant that loses over five points and over three times the median loss. Among
    variants at 97 to 100 %, one at 65 % would make all others one point.
    """
    losses = sorted(100 - value for value in values if value < 100)
    typical = losses[len(losses) // 2] if losses else 0.0
    return 100 - max(5.0, 3 * typical)


def latency_chart(lines: Sequence[Row]) -> str:
    """Percentiles of one query's time, three bars a variant."""
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
    """A chart of neighbours kept by bytes a vector, with one trace for each code.

    The dotted line joins the points that no other beats at as many bytes or fewer. None is returned
    where fewer than three sizes of vectors were scored.
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
            name="the most kept",
            line={"color": _GREY, "width": 1.5, "dash": "dot", "shape": "hv"},
            hoverinfo="skip",
        )
    )
    codes = dict.fromkeys(report.code for *_, report in points.values())
    for number, code in enumerate(codes):
        own = [point for point in points.values() if point[2].code == code]
        words = [
            f"<b>{escape(report.variant)}</b><br>{n_bytes:,} bytes<br>{kept:.1f} %"
            + (f"<br>score {100 * report.score:.2f}" if isinstance(report, EvalReport) else "")
            for n_bytes, kept, report in own
        ]
        figure.add_trace(
            go.Scatter(
                x=[n_bytes for n_bytes, *_ in own],
                y=[kept for _, kept, _ in own],
                mode="markers",
                name=code,
                text=words,
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
    shown = spread(ticks)
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


def spread(ticks: Sequence[int]) -> list[int]:
    """The ticks whose labels keep apart on a logarithmic axis: each is 1.5 times the last."""
    shown: list[int] = []
    for tick in ticks:
        if not shown or tick >= 1.5 * shown[-1]:
            shown.append(tick)
    return shown


def fidelity_chart(lines: Sequence[Row], attribute: str) -> str:
    """One measure of fidelity, a line a variant."""
    is_distance = FIDELITY_CHARTS[attribute][1]
    shown = [row for row in lines if getattr(row, attribute) is not None and not row.is_baseline]
    measured = [getattr(row, attribute) for row in shown]
    # Distances of two variants differ by a factor, which only a logarithmic axis shows.
    values = [max(1 - value, _LEAST_DISTANCE) if is_distance else 100 * value for value in measured]
    colours = [_GREEN if row.status == "picked" else _BLUE for row in shown]
    names = [escape(row.name) for row in shown]
    trace = _distances(names, values, colours) if is_distance else _bars(names, values, colours)
    figure = go.Figure(trace.update(meta=_own_names(shown)))
    figure.update_layout(**_layout(height=70 + 26 * max(1, len(shown))), bargap=0.35)
    if is_distance:
        figure.update_xaxes(**_powers_of_ten(values))
    else:
        # A bar's length is its value, so the axis starts at zero.
        figure.update_xaxes(range=[0, 116], tickvals=[0, 50, 100])
    figure.update_yaxes(
        autorange="reversed", automargin=True, ticks="", showgrid=is_distance, type="category"
    )
    return _html(figure, attribute)


def _own_names(shown: Sequence[Row]) -> dict[str, Any]:
    """What the page's script needs to colour the pick of another policy."""
    return {"variants": [row.name for row in shown], "own": _BLUE, "picked": _GREEN}


def _distances(names: list[str], values: list[float], colours: list[str]) -> Any:
    least = _LEAST_DISTANCE
    words = [f"  {v:.2g}" if v > least else f"  below {least:g}" for v in values]
    marker = {"color": colours, "size": 9}
    return go.Scatter(
        x=values,
        y=names,
        mode="markers+text",
        marker=marker,
        text=words,
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
    """A logarithmic axis with a tick a power of ten, and room for text on the right."""
    exponents = [math.log10(value) for value in values] or [0.0]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    room = max(1, high - low)
    powers = range(low, high + 1)
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return {
        "type": "log",
        "range": [low - 0.05 * room, low + 1.25 * room],
        "tickvals": [10.0**exponent for exponent in powers],
        "ticktext": [f"10{str(exponent).translate(raised)}" for exponent in powers],
        "tickangle": 0,
    }


def _span(row: Row, quality: str) -> tuple[float, float]:
    """Ends of the interval of retention in %; the value itself where there is none."""
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
    """A range with room for markers around the values."""
    shown = list(values)
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return {"range": [low - room, high + room], "automargin": True, "zeroline": False}


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
