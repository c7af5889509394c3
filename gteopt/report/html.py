"""One self-contained HTML page of what was measured.

Hides: layout, plotly, HTML. Refuses to know: torch, the network, how a number was measured, and how
the picked variant was chosen (the page repeats what `Choice` says).

The page carries plotly.js, its style and its script inside itself and forbids every request with
its content security policy, so that it opens the same from a disk, an attachment or a CI artifact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from gteopt.paths import ASSETS
from gteopt.records.bench import BenchReport
from gteopt.records.evaluation import BesidePublished, EvalReport, FidelityReport, TaskScore
from gteopt.records.files import write_atomically
from gteopt.records.results_folder import Results
from gteopt.report.rows import (
    COLUMNS,
    FIDELITY,
    LIMITS,
    MARKS,
    MISSING,
    Row,
    beside_published,
    failures,
    fidelity_cells,
    fidelity_notes,
    in_megabytes,
    index_rent,
    lengths_note,
    limits,
    limits_note,
    machine_line,
    megabytes,
    published_text,
    rows,
    suite_span,
    suite_verdict,
    task_key,
)
from gteopt.report.wording import points

# Mid-tones, readable on the light and on the dark page (contrast at least 3:1 on both).
_COLOUR = {"baseline": "#8a939e", "picked": "#1f9d74", "variant": "#4f83cc"}


def html_page(results: Results, *, title: str) -> str:
    """One HTML page that needs no other file and no network.

    Args:
        results: at least the baseline; a variant without an evaluation is shown without scores.
        title: heading of the page, as plain text.
    """
    lines = rows(results)
    return _PAGE.format(
        title=escape(title),
        css=(ASSETS / "report.css").read_text(encoding="utf-8"),
        js=(ASSETS / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        headline=_headline(results, lines),
        alert=_alert(results),
        sections="".join(_sections(results, lines)),
    )


def _sections(results: Results, lines: Sequence[Row]) -> Iterator[str]:
    """Those that there is something to show in."""
    if results.benched or results.evals:
        yield _section("variants", "Variants", "", _variants_table(lines) + _glossary())
    if results.benched and results.evals:
        size = _scatter(lines, "size", "Weights, MB", lambda row: in_megabytes(row.weight_bytes))
        speed = _scatter(lines, "speed", "Throughput, tokens/s", lambda row: row.tokens_per_s)
        charts = _charts(
            ("Quality against size (up and left is better)", size),
            ("Quality against speed (up and right is better)", speed),
        )
        yield _section("trade", "Quality against size and speed", _TRADE, charts)
    if results.bench is not None:
        yield _section("cost", "Speed and cost", _COST, _cost_table(results.bench))
    if results.evals:
        fidelity = _charts(*(_dots(lines, attribute) for attribute in _FIDELITY_CHARTS))
        yield _section("fidelity", "Fidelity to the baseline", _FIDELITY, fidelity)
    if results.fidelity:
        table = _fidelity_table(results.fidelity)
        yield _section("texts", "Fidelity on your own texts", "", table)
    if results.evals:
        yield _section("tasks", "Scores by task", _TASKS, _tasks_table(results, lines))
    yield _section("conditions", "Conditions of measurement", "", _conditions(results))


def _section(key: str, title: str, lead: str, body: str) -> str:
    lead = f'<p class="muted">{lead}</p>' if lead else ""
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{lead}{body}</section>'


def _scrolled(label: str, table: str, kind: str = "") -> str:
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{label}">{table}</div>'
    )


def _charts(*charts: tuple[str, str]) -> str:
    figures = "".join(
        f"<figure><figcaption>{caption}</figcaption>{chart}</figure>" for caption, chart in charts
    )
    return f'<div class="charts">{figures}</div>'


def _glossary() -> str:
    terms = _description({column.title: column.meaning for column in COLUMNS})
    return f"<details><summary>What the columns mean</summary>{terms}</details>"


def write_report(folder: Path, results: Results, title: str) -> Path:
    """Write `report.html` into `folder` (whole or not at all) and return its path."""
    path = folder / "report.html"
    write_atomically(path, html_page(results, title=title).encode())
    return path


def _headline(results: Results, lines: Sequence[Row]) -> str:
    choice = results.choice
    if choice is None:
        return (
            '<p class="answer">No policy was applied, so nothing is recommended; '
            "<code>gteopt choose</code> does that.</p>"
        )
    kind = "answer" if choice.picked else "answer none"
    html = f'<p class="{kind}">{escape(choice.reason)}</p>'
    baseline, row = lines[0], next((row for row in lines if row.status == "picked"), None)
    if row is None or row.is_baseline:
        return html
    tiles: list[tuple[str, str]] = []
    if row.weight_ratio is not None:
        tiles.append((f"{1 / row.weight_ratio:.1f}×", "smaller weights"))
    if row.vector_bytes and baseline.vector_bytes and row.vector_bytes != baseline.vector_bytes:
        tiles.append((f"{baseline.vector_bytes / row.vector_bytes:.1f}×", "smaller vectors"))
    if row.speed_ratio is not None:
        tiles.append((f"{row.speed_ratio:.2f}×", "the baseline’s throughput"))
    if row.retention is not None:
        sure = f" ({_interval(row)}: {row.score_verdict})" if row.retention_low is not None else ""
        tiles.append((f"{row.retention * 100:.1f} %", f"of the baseline’s score{sure}"))
    if row.neighbour_overlap is not None:
        tiles.append((f"{row.neighbour_overlap * 100:.0f} %", "nearest neighbours kept"))
    items = "".join(f"<li><b>{value}</b> {words}</li>" for value, words in tiles)
    return f'{html}<ul class="tiles" aria-label="{escape(row.name)} in figures">{items}</ul>'


def _alert(results: Results) -> str:
    failed = failures(results.evals)
    if not failed:
        return ""
    items = "".join(f"<li>{escape(failure)}</li>" for failure in failed)
    return (
        '<aside class="alert"><strong>Partial evaluation.</strong> Scores marked * are means over '
        f"the remaining tasks and compare only with themselves.<ul>{items}</ul></aside>"
    )


def _interval(row: Row) -> str:
    assert row.retention_low is not None
    assert row.retention_high is not None
    return f"{row.retention_low * 100:.1f}–{row.retention_high * 100:.1f}"


def _variants_table(lines: Sequence[Row]) -> str:
    columns = [column for column in COLUMNS if column.attribute != "retention_low"]
    head = "".join(
        f'<th scope="col" title="{escape(column.meaning)}">{escape(column.title)}'
        f"<small>{escape(column.unit) or '&nbsp;'}</small></th>"
        for column in columns
    )
    body = ""
    for number, row in enumerate(lines):
        kind = f"{row.status} baseline" if row.is_baseline else row.status
        cells = ""
        for column in columns:
            sure = column.attribute == "retention" and row.retention_low is not None
            below = f"<small>{_interval(row)}</small>" if sure else ""
            cells += f"<td>{escape(column.text(row))}{below}</td>"
        verdict = f"{MARKS[row.status]} {escape(row.verdict)}"
        body += (
            f'<tr class="{kind}"><th scope="row"><i>{number}</i><div>{escape(row.name)}'
            f"<small>{verdict}</small></div></th>{cells}</tr>"
        )
    return _scrolled(
        "Table of variants",
        f'<table class="variants"><thead><tr><th scope="col">Variant</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>",
    )


def _scatter(
    lines: Sequence[Row], key: str, x_title: str, x_of: Callable[[Row], float | None]
) -> str:
    """Retention against size or speed, with what of it is sure as a step line: the Pareto front of
    the intervals' lower ends, which policies limit.

    A variant so far below the others that they would lie on each other is an arrow at the lower
    edge, with its retention beside its name. The labels are placed by report.js once the browser
    has laid the points out.
    """
    # (x, retention in %, number in the table, row)
    points = [
        (x, row.retention * 100, number, row)
        for number, row in enumerate(lines)
        if (x := x_of(row)) is not None and row.retention is not None
    ]
    floor = _floor([y for _, y, *_ in points])
    spans = [_span(row) for *_, row in points]
    near = [(y, *span) for (_, y, *_), span in zip(points, spans, strict=True) if y >= floor]
    y_axis = _axis(value for each in near for value in each)
    edge = y_axis["range"][0] + 0.03 * (y_axis["range"][1] - y_axis["range"][0])
    # Where each point is drawn, with the ends of its interval and its label.
    drawn = [y if y >= floor else edge for _, y, *_ in points]
    labels = [row.name if y >= floor else f"{row.name} ({y:.1f} %)" for _, y, _, row in points]
    starts = [(y, low if y >= floor else y) for y, (low, _) in zip(drawn, spans, strict=True)]
    ends = [(y, high if y >= floor else y) for y, (_, high) in zip(drawn, spans, strict=True)]
    smaller_is_better = key == "size"
    sure = [(x, low) for (x, *_), (low, _) in zip(points, spans, strict=True)]
    front: list[tuple[float, float]] = []
    for x, y in sorted(sure, key=lambda p: (p[0] if smaller_is_better else -p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    figure = go.Figure(
        [
            go.Scatter(
                x=[x for x, _ in front],
                y=[max(y, edge) for _, y in front],
                mode="lines",
                # Between two points of the front the one that costs less is the best to be had.
                line={"color": _COLOUR["baseline"], "width": 1.5, "dash": "dot", "shape": "hv"},
                hoverinfo="skip",
            ),
            go.Scatter(
                x=[x for x, *_ in points],
                y=drawn,
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - y for y, high in ends],
                    "arrayminus": [y - low for y, low in starts],
                    "thickness": 1.2,
                    "width": 4,
                    "color": _COLOUR["baseline"],
                },
                customdata=[
                    [label, number] for label, (*_, number, _) in zip(labels, points, strict=True)
                ],
                text=[
                    f"<b>{escape(row.name)}</b><br>{x:,.4g}<br>retention {_retention(row)}"
                    for x, *_, row in points
                ],
                hovertemplate="%{text}<extra></extra>",
                mode="markers",
                marker={
                    "size": [13 if row.status == "picked" else 10 for *_, row in points],
                    "color": [_colour(row) for *_, row in points],
                    "opacity": 1,
                    "symbol": [
                        "triangle-down" if y < floor else "diamond" if row.is_baseline else "circle"
                        for _, y, _, row in points
                    ],
                },
            ),
        ]
    )
    figure.update_layout(**_layout(height=420 + 10 * max(0, len(points) - 8)))
    figure.update_xaxes(title=x_title, **_axis(x for x, *_ in points))
    figure.update_yaxes(title="Retention, %", **y_axis)
    return f'<div class="labelled">{_html(figure, key)}<div class="labels"></div></div>'


def _span(row: Row) -> tuple[float, float]:
    """Ends of the interval of retention in %; the retention itself where there is none."""
    assert row.retention is not None
    if row.retention_low is None or row.retention_high is None:
        return 100 * row.retention, 100 * row.retention
    return 100 * row.retention_low, 100 * row.retention_high


def _retention(row: Row) -> str:
    assert row.retention is not None
    sure = f", {_interval(row)}" if row.retention_low is not None else ""
    return f"{row.retention * 100:.2f} %{sure}"


def _floor(values: Sequence[float]) -> float:
    """The least retention (in %) that an axis has to reach.

    It leaves out what loses over five points, and over three times as much as the median variant
    that loses anything: among variants at 97 to 100 % one at 65 % would make all others one point.
    """
    losses = sorted(100 - value for value in values if value < 100)
    typical = losses[len(losses) // 2] if losses else 0.0
    return 100 - max(5.0, 3 * typical)


def _dots(lines: Sequence[Row], attribute: str) -> tuple[str, str]:
    """A caption and a chart of one measure of fidelity, a line a variant."""
    title, is_distance = _FIDELITY_CHARTS[attribute]
    shown = [row for row in lines if getattr(row, attribute) is not None and not row.is_baseline]
    values = [getattr(row, attribute) for row in shown]
    # Distances of two variants differ by a factor, which only a logarithmic axis shows; its least
    # value stands for all that float32 cannot tell from zero.
    found = [max(1 - value, _LEAST) if is_distance else 100 * value for value in values]
    text = [
        (f"{each:.2g}" if each > _LEAST else f"below {_LEAST:g}") if is_distance else f"{each:.1f}"
        for each in found
    ]
    names = [escape(row.name) for row in shown]
    colours = [_colour(row) for row in shown]
    about = {"y": names, "text": text, "textposition": "outside", "cliponaxis": False}
    trace: Any
    if is_distance:
        about["textposition"] = "middle right"
        about["text"] = [f"  {each}" for each in text]
        marker = {"color": colours, "size": 9}
        trace = go.Scatter(x=found, mode="markers+text", marker=marker, hoverinfo="skip", **about)
    else:
        trace = go.Bar(
            x=found, orientation="h", marker={"color": colours}, hoverinfo="skip", **about
        )
    figure = go.Figure(trace)
    figure.update_layout(**_layout(height=70 + 26 * max(1, len(shown))), bargap=0.35)
    if is_distance:
        exponents = [math.log10(each) for each in found] or [_LEAST]
        low, high = math.floor(min(exponents)), math.ceil(max(exponents))
        room = max(1, high - low)  # on the right it is for text
        figure.update_xaxes(
            type="log",
            range=[low - 0.05 * room, low + 1.25 * room],
            tickvals=[10.0**exponent for exponent in range(low, high + 1)],
            ticktext=[f"10{_raised(exponent)}" for exponent in range(low, high + 1)],
            tickangle=0,
        )
    else:
        # A bar's length is its value, so the axis starts at zero.
        figure.update_xaxes(range=[0, 116], tickvals=[0, 50, 100])
    figure.update_yaxes(
        autorange="reversed", automargin=True, ticks="", showgrid=is_distance, type="category"
    )
    return escape(title), _html(figure, attribute)


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _colour(row: Row) -> str:
    if row.status == "picked":
        return _COLOUR["picked"]
    return _COLOUR["baseline" if row.is_baseline else "variant"]


def _layout(height: int) -> dict[str, Any]:
    """Transparent and without colours of its own: report.css gives text and lines the page's."""
    return {
        "template": None,
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 28},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "showlegend": False,
        "dragmode": False,
    }


def _axis(values: Iterable[float]) -> dict[str, Any]:
    """A range with room for markers and labels around the values."""
    found = list(values)
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
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


def _tasks_table(results: Results, lines: Sequence[Row]) -> str:
    """One line a task, split and language; a column a variant, with its retention below."""
    shown = [row for row in lines if row.name in results.evals and not row.is_baseline]
    scores = {
        row.name: {task_key(task): task for task in results.evals[row.name].tasks} for row in shown
    }
    tasks = {key: task for by_key in scores.values() for key, task in by_key.items()}
    own = results.evals.get(results.baseline)
    if own is not None:
        tasks = {task_key(task): task for task in own.tasks} | tasks
    known = {task_key(task): task.published for task in own.tasks} if own else {}
    body = ""
    if shown:
        means = [results.evals[row.name] for row in shown]
        cells = "".join(_mean_cell(each) for each in means)
        body = (
            f'<tr><th scope="row">Mean<small>difference, 95 % interval, verdict</small></th>'
            f"<td>{means[0].baseline_score * 100:.2f}</td>{cells}</tr>"
        )
    for key, task in tasks.items():
        cells = "".join(_task_cell(scores[row.name].get(key)) for row in shown)
        body += (
            f'<tr><th scope="row">{escape(task.task)}<small>{escape(task.subset)} · '
            f"{escape(task.split)} · {escape(task.metric)} · {task.n_samples:,} samples</small>"
            f"</th><td>{task.baseline_score * 100:.2f}{_published_cell(known.get(key))}</td>"
            f"{cells}</tr>"
        )
    head = "".join(f'<th scope="col">{escape(row.name)}</th>' for row in shown)
    notes = beside_published(own) if own else []
    if shown:
        notes.insert(0, _about_means(results.evals[shown[0].name]))
    table = (
        f'<table><thead><tr><th scope="col">Task</th><th scope="col">'
        f"{escape(results.baseline)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    below = "".join(f"<p>{escape(each)}</p>" for each in notes)
    return _scrolled("Table of task scores", table, "tasks") + below


def _mean_cell(report: EvalReport) -> str:
    value, _, span = suite_span(report).partition(" ")
    spans = "".join(f"<small>{each}</small>" for each in (value, span, suite_verdict(report)))
    return f"<td>{report.score * 100:.2f}{spans}</td>"


def _about_means(report: EvalReport) -> str:
    return (
        f"Of the means: difference from the baseline in points, its 95 % paired bootstrap interval "
        f"and the verdict against a margin of {points(report.margin)}."
    )


def _cost_table(bench: BenchReport) -> str:
    """A line a variant and workload; what does not depend on the workload below the name."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in LIMITS)
    body, former = "", ""
    for line in limits(bench):
        variant = bench.variants[line.name]
        read = variant.latency.weight_gb_per_s
        query = f"one query reads {read:.1f} GB/s, " if read is not None else ""
        rent = index_rent(bench, line.name)
        monthly = "" if rent is None else f", ${rent:.2f} a month in memory"
        about = (
            f"<small>{query}{variant.index_bytes_per_million / 1e9:.2f} GB a million documents"
            f"{monthly}</small>"
        )
        n_lines = len(variant.throughput)
        name = f'<th scope="rowgroup" rowspan="{n_lines}">{escape(line.name)}{about}</th>'
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in line.cells())
        body += f"<tr>{name if line.name != former else ''}{cells}</tr>"
        former = line.name
    table = (
        f'<table class="cost"><thead><tr><th scope="col">Variant</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    note = limits_note(bench)
    return f"{_scrolled('Speed and cost', table)}<p>{escape(note[0].upper() + note[1:])}.</p>"


def _fidelity_table(reports: Mapping[str, FidelityReport]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in FIDELITY)
    body = ""
    for name, report in reports.items():
        cells = "".join(f"<td>{cell}</td>" for cell in fidelity_cells(report))
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    notes = "".join(f"<p>{escape(each)}</p>" for each in fidelity_notes(reports))
    table = (
        f'<table><thead><tr><th scope="col">Variant</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    return _scrolled("Fidelity on your own texts", table) + notes


def _published_cell(found: BesidePublished | None) -> str:
    return "" if found is None else f"<small>published {published_text(found)}</small>"


def _task_cell(task: TaskScore | None) -> str:
    if task is None:
        return f"<td>{MISSING}</td>"
    if task.baseline_score <= 0:
        return f"<td>{task.score * 100:.2f}</td>"
    retention = task.score / task.baseline_score
    # Full tint at a loss of a quarter: beyond that a variant is of no use anyway.
    loss = min(1.0, max(0.0, (1 - retention) * 4))
    verdict = f" · {task.difference.verdict}" if task.difference else ""
    return (
        f'<td style="--loss:{loss:.3f}">{task.score * 100:.2f}'
        f"<small>{retention * 100:.1f} %{verdict}</small></td>"
    )


def _conditions(results: Results) -> str:
    return (
        _speed_conditions(results.bench)
        if results.bench is not None
        else "<h3>Speed and memory</h3><p>Not measured (<code>gteopt bench --out</code>).</p>"
    ) + _quality_conditions([*results.evals.values()], [*results.fidelity.values()])


def _speed_conditions(bench: BenchReport) -> str:
    spec = bench.spec
    imports = [variant.imports_process_bytes for variant in bench.variants.values()]
    speed = {
        "Machine": machine_line(bench.machine),
        "Device": f"{bench.device}, {bench.n_threads} threads",
        "Versions": _pairs(bench.versions),
        "Baseline": bench.baseline,
        "Latency": (
            f"{spec.n_queries} single queries of {spec.query_tokens} tokens, in turns with the "
            f"baseline, after {spec.warmup} uncounted ones"
        ),
        "Throughput": "; ".join(f"{w.name} tokens" for w in spec.workloads)
        + f"; {spec.repeats} rounds each, in turns with the baseline, after {spec.warmup} "
        f"uncounted ones; medians{lengths_note(bench)}",
        "Peak memory": (
            f"process peaks include {megabytes(min(imports))} to {megabytes(max(imports))} MB of "
            "interpreter and libraries"
        ),
        "Kernels": "; ".join(
            f"{name}: {_pairs({kernel: str(n) for kernel, n in variant.kernels.items()})}"
            for name, variant in bench.variants.items()
        ),
    }
    return f"<h3>Speed and memory</h3>{_description(speed)}"


def _quality_conditions(evals: Sequence[EvalReport], texts: Sequence[FidelityReport]) -> str:
    html = ""
    if texts:
        own = {
            "Texts": "; ".join(
                dict.fromkeys(f"{e.texts} (sha256 {e.texts_sha256})" for e in texts)
            ),
            "Machine": "; ".join(dict.fromkeys(machine_line(each.machine) for each in texts)),
            "Versions": "; ".join(dict.fromkeys(_pairs(each.versions) for each in texts)),
        }
        html = f"<h3>Own texts</h3>{_description(own)}"
    if not evals:
        return f"{html}<h3>Quality</h3><p>No variant was evaluated.</p>"
    suites = dict.fromkeys(f"{report.suite} (sha256 {report.suite_sha256})" for report in evals)
    machines = dict.fromkeys(machine_line(report.machine) for report in evals)
    versions = dict.fromkeys(_pairs(report.versions) for report in evals)
    fidelity_texts = dict.fromkeys(
        f"{report.fidelity.n_texts:,} texts (neighbours {report.fidelity.among})"
        for report in evals
    )
    quality = {
        "Suite": "; ".join(suites),
        "Machine": "; ".join(machines),
        "Versions": "; ".join(versions),
        "Fidelity": f"over {'; '.join(fidelity_texts)} of the suite, no labels",
    }
    tasks = {task.task: task for report in evals for task in report.tasks}
    body = "".join(
        f'<tr><th scope="row">{escape(task.task)}</th><td>{escape(task.task_type)}</td>'
        f"<td><code>{escape(task.dataset_revision)}</code></td>"
        f"<td>{escape(task.instruction) if task.instruction else 'none'}</td></tr>"
        for task in tasks.values()
    )
    return (
        f"{html}<h3>Quality</h3>{_description(quality)}"
        '<div class="scroll words" tabindex="0" role="region" aria-label="Data sets"><table><thead>'
        '<tr><th scope="col">Task</th><th scope="col">Type</th><th scope="col">Data set revision'
        '</th><th scope="col">Instruction (a search: of its queries)</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _description(facts: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(f)}</dd>" for term, f in facts.items())
    return f"<dl>{items}</dl>"


def _pairs(pairs: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


_LEAST = 1e-6
_FIDELITY_CHARTS = {  # attribute of Row -> title, whether its distance from 1 is drawn
    "mean_cosine": ("1 − mean cosine to the baseline (left is closer)", True),
    "p1_cosine": ("1 − 1st-percentile cosine (left is closer)", True),
    "neighbour_overlap": ("Overlap of the 10 nearest neighbours, %", False),
    "spearman": ("1 − Spearman correlation of similarities (left is closer)", True),
}

_TRADE = """Retention is the share of the baseline’s score (diamond) that a variant keeps, with its
95 % interval; what lies far below the others is an arrow at the edge. On the dotted line lie
the lower ends of intervals that no other variant beats on both axes. What the table calls on the
Pareto front is beaten by no other that keeps the limits in score, neighbours, weights, index and
speed together. A label that finds no room is the variant’s number in the
table."""
_COST = """Throughput of real tokens, from token ids to vectors; the share of the best product that
this device was measured to do; what a million tokens cost on it; and the hourly price at which they
would cost what the hosted model does."""
_FIDELITY = """How close a variant’s vectors and rankings stay to the baseline’s, without labels.
Task scores move late; these move first."""
_TASKS = "Main score, %; below it the share of the baseline’s score that is kept."

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
<script>{plotly}</script>
</head>
<body>
<main>
<header>
<p class="muted">gteopt report</p>
<h1>{title}</h1>
{headline}
{alert}
</header>
{sections}
</main>
<script>{js}</script>
</body>
</html>
"""
