"""One self-contained HTML page of what was measured.

Hides: layout, plotly, HTML. Refuses to know: torch, the network, how a number was measured, and how
the picked variant was chosen (the page repeats what `Choice` says).

The page carries plotly.js, its style and its script inside itself and forbids every request with
its content security policy, so that it opens the same from a disk, an attachment or a CI artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from gteopt.records import (
    BesidePublished,
    Results,
    TaskScore,
    write_atomically,
)
from gteopt.tables import (
    COLUMNS,
    MARKS,
    MISSING,
    Row,
    beside_published,
    failures,
    in_megabytes,
    machine_line,
    megabytes,
    published_text,
    rows,
    suite_span,
    suite_verdict,
    task_key,
)

_ASSETS = Path(__file__).parent / "assets"
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
        css=(_ASSETS / "report.css").read_text(encoding="utf-8"),
        js=(_ASSETS / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        headline=_headline(results, lines),
        alert=_alert(results),
        table=_variants_table(lines),
        glossary="".join(
            f"<dt>{escape(column.title)}</dt><dd>{escape(column.meaning)}</dd>"
            for column in COLUMNS
        ),
        size=_scatter(lines, "size", "Weights, MB", lambda row: in_megabytes(row.weight_bytes)),
        speed=_scatter(lines, "speed", "Throughput, tokens/s", lambda row: row.tokens_per_s),
        fidelity="".join(_bars(lines, attribute) for attribute in _FIDELITY_BARS),
        tasks=_tasks_table(results, lines),
        conditions=_conditions(results),
    )


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
    if row.vector_bytes is not None and baseline.vector_bytes is not None:
        tiles.append((f"{baseline.vector_bytes / row.vector_bytes:.1f}×", "smaller vectors"))
    if row.speed_ratio is not None:
        tiles.append((f"{row.speed_ratio:.2f}×", "the baseline’s throughput"))
    if row.retention is not None:
        tiles.append((f"{row.retention * 100:.1f} %", "of the baseline’s score"))
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


def _variants_table(lines: Sequence[Row]) -> str:
    head = "".join(
        f'<th scope="col" title="{escape(column.meaning)}">{escape(column.title)}'
        f"<small>{escape(column.unit) or '&nbsp;'}</small></th>"
        for column in COLUMNS
    )
    body = ""
    for number, row in enumerate(lines):
        kind = f"{row.status} baseline" if row.is_baseline else row.status
        cells = "".join(f"<td>{escape(column.text(row))}</td>" for column in COLUMNS)
        verdict = f"{MARKS[row.status]} {escape(row.verdict)}"
        body += (
            f'<tr class="{kind}"><th scope="row"><i>{number}</i><div>{escape(row.name)}'
            f"<small>{verdict}</small></div></th>{cells}</tr>"
        )
    return (
        f'<table class="variants"><thead><tr><th scope="col">Variant</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def _scatter(
    lines: Sequence[Row], key: str, x_title: str, x_of: Callable[[Row], float | None]
) -> str:
    """Retention against size or speed, with the Pareto front of these two numbers as a step line.

    The labels are placed by report.js once the browser has laid the points out.
    """
    # (x, retention in %, number in the table, row)
    points = [
        (x, row.retention * 100, number, row)
        for number, row in enumerate(lines)
        if (x := x_of(row)) is not None and row.retention is not None
    ]
    smaller_is_better = key == "size"
    front: list[tuple[float, float]] = []
    for x, y, _, _ in sorted(points, key=lambda p: (p[0] if smaller_is_better else -p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    names = [escape(row.name) for *_, row in points]
    figure = go.Figure(
        [
            go.Scatter(
                x=[x for x, _ in front],
                y=[y for _, y in front],
                mode="lines",
                # Between two points of the front the one that costs less is the best to be had.
                line={"color": _COLOUR["baseline"], "width": 1.5, "dash": "dot", "shape": "hv"},
                hoverinfo="skip",
            ),
            go.Scatter(
                x=[x for x, *_ in points],
                y=[y for _, y, *_ in points],
                customdata=[[row.name, number] for *_, number, row in points],
                text=names,
                hovertemplate="<b>%{text}</b><br>%{x:,.4~r}<br>retention %{y:.2f} %<extra></extra>",
                mode="markers",
                marker={
                    "size": [13 if row.status == "picked" else 10 for *_, row in points],
                    "color": [_colour(row) for *_, row in points],
                    "opacity": 1,
                    "symbol": ["diamond" if row.is_baseline else "circle" for *_, row in points],
                },
            ),
        ]
    )
    figure.update_layout(**_layout(height=420 + 10 * max(0, len(points) - 8)))
    figure.update_xaxes(title=x_title, **_axis(x for x, *_ in points))
    figure.update_yaxes(title="Retention, %", **_axis(y for _, y, *_ in points))
    return f'<div class="labelled">{_html(figure, key)}<div class="labels"></div></div>'


def _bars(lines: Sequence[Row], attribute: str) -> str:
    title, factor, digits = _FIDELITY_BARS[attribute]
    shown = [row for row in lines if getattr(row, attribute) is not None and not row.is_baseline]
    values = [getattr(row, attribute) * factor for row in shown]
    figure = go.Figure(
        go.Bar(
            x=values,
            y=[escape(row.name) for row in shown],
            orientation="h",
            marker={"color": [_colour(row) for row in shown]},
            text=[f"{value:.{digits}f}" for value in values],
            textposition="outside",
            cliponaxis=False,
            hoverinfo="skip",
        )
    )
    figure.update_layout(**_layout(height=70 + 26 * max(1, len(shown))), bargap=0.35)
    # A bar's length is its value, so the axis starts at zero; the space on the right is for text.
    figure.update_xaxes(range=[0, 1.16 * factor], tickvals=[0, 0.5 * factor, factor])
    figure.update_yaxes(autorange="reversed", automargin=True, ticks="", showgrid=False)
    chart = _html(figure, attribute)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


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
    own = results.evals.get(results.bench.baseline)
    if own is not None:
        tasks = {task_key(task): task for task in own.tasks} | tasks
    known = {task_key(task): task.published for task in own.tasks} if own else {}
    body = ""
    if shown:
        means = [results.evals[row.name] for row in shown]
        cells = "".join(
            f"<td>{each.score * 100:.2f}<small>{suite_span(each)} · {suite_verdict(each)}</small>"
            f"</td>"
            for each in means
        )
        body = (
            '<tr><th scope="row">Mean<small>difference in points with its 95 % paired bootstrap '
            f"interval; verdict against a margin of {means[0].margin * 100:g}</small></th>"
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
    notes = "".join(f"<p>{escape(each)}</p>" for each in beside_published(own)) if own else ""
    return (
        f'<table><thead><tr><th scope="col">Task</th><th scope="col">'
        f"{escape(results.bench.baseline)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{notes}"
    )


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
    bench, evals = results.bench, list(results.evals.values())
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
        "Throughput": "; ".join(f"{w.batch_size} × {w.tokens} tokens" for w in spec.workloads)
        + f"; {spec.repeats} rounds each, in turns with the baseline, after {spec.warmup} "
        "uncounted ones; medians",
        "Peak memory": (
            f"process peaks include {megabytes(min(imports))} to {megabytes(max(imports))} MB of "
            "interpreter and libraries"
        ),
        "Kernels": "; ".join(
            f"{name}: {_pairs({kernel: str(n) for kernel, n in variant.kernels.items()})}"
            for name, variant in bench.variants.items()
        ),
    }
    html = f"<h3>Speed and memory</h3>{_description(speed)}"
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


_FIDELITY_BARS = {  # attribute of Row -> title, factor, digits
    "mean_cosine": ("Mean cosine to the baseline", 1, 3),
    "p1_cosine": ("1st-percentile cosine", 1, 3),
    "neighbour_overlap": ("Overlap of the 10 nearest neighbours, %", 100, 1),
    "spearman": ("Spearman correlation of similarities", 1, 3),
}

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
<section aria-labelledby="variants">
<h2 id="variants">Variants</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Table of variants">{table}</div>
<details><summary>What the columns mean</summary><dl>{glossary}</dl></details>
</section>
<section aria-labelledby="trade">
<h2 id="trade">Quality against size and speed</h2>
<p class="muted">Retention is the share of the baseline’s score (diamond) that a variant keeps. On
the dotted line lie the variants that no other beats on both axes. A label that finds no room is the
variant’s number in the table.</p>
<div class="charts">
<figure><figcaption>Quality against size (up and left is better)</figcaption>{size}</figure>
<figure><figcaption>Quality against speed (up and right is better)</figcaption>{speed}</figure>
</div>
</section>
<section aria-labelledby="fidelity">
<h2 id="fidelity">Fidelity to the baseline</h2>
<p class="muted">How close a variant’s vectors and rankings stay to the baseline’s, without labels.
Task scores move late; these move first.</p>
<div class="charts">{fidelity}</div>
</section>
<section aria-labelledby="tasks">
<h2 id="tasks">Scores by task</h2>
<p class="muted">Main score, %; below it the share of the baseline’s score that is kept.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Table of task scores">{tasks}</div>
</section>
<section aria-labelledby="conditions">
<h2 id="conditions">Conditions of measurement</h2>
{conditions}
</section>
</main>
<script>{js}</script>
</body>
</html>
"""
