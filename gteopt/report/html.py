"""One self-contained HTML page of what was measured.

Hides: the page's layout, HTML. Refuses to know: torch, the network, how a number was measured, and
how the picked variant was chosen (the page repeats what `Choice` says).

The page carries plotly.js, its style and its script inside itself. Its content security policy
forbids every request, so that it opens the same from a disk, an attachment or a CI artifact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from gteopt.paths import ASSETS
from gteopt.records.bench import BenchReport
from gteopt.records.choice import Choice
from gteopt.records.evaluation import BesidePublished, EvalReport, FidelityReport, TaskScore
from gteopt.records.files import write_atomically
from gteopt.records.results_folder import Results
from gteopt.report.charts import (
    FIDELITY_CHARTS,
    fidelity_chart,
    latency_chart,
    quality_of,
    trade_chart,
)
from gteopt.report.conditions import conditions
from gteopt.report.markup import charts, description, scrolled, section
from gteopt.report.pick import is_slower, pick_lines
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
from gteopt.report.wording import METRIC_WORDS, metric_amount, points


def html_page(
    results: Results,
    *,
    title: str,
    folder: str = "RESULTS",
    artifact: str = "ARTIFACT",
    date: str = "",
) -> str:
    """One HTML page that needs no other file and no network.

    Args:
        results: at least the baseline; a variant without an evaluation is shown without scores.
        title: heading of the page, as plain text.
        folder: where the results lie, for the commands on the page.
        artifact: where the picked artifact lies, for the same.
        date: of the last measurement; empty where nobody knows.
    """
    lines = rows(results)
    return _PAGE.format(
        title=escape(title),
        measured=escape(_measured(results, date)),
        css=(ASSETS / "report.css").read_text(encoding="utf-8"),
        js=(ASSETS / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        headline=_headline(results, lines),
        alert=_alert(results),
        sections="".join(_sections(results, lines, folder, artifact)),
    )


def write_report(folder: Path, results: Results, title: str) -> Path:
    """Write `report.html` into `folder` (whole or not at all) and return its path."""
    path = folder / "report.html"
    picked = results.choice.picked if results.choice else None
    places = [place / picked for place in (folder, folder / "variants") if picked is not None]
    artifact = next((str(place) for place in places if (place / "gteopt.json").is_file()), None)
    records = [folder / "bench.json", *folder.glob("eval/*.json"), *folder.glob("fidelity/*.json")]
    times = [record.stat().st_mtime for record in records if record.is_file()]
    date = f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d}" if times else ""
    page = html_page(
        results, title=title, folder=str(folder), artifact=artifact or "ARTIFACT", date=date
    )
    write_atomically(path, page.encode())
    return path


def _measured(results: Results, date: str) -> str:
    """When and where, in one line."""
    machines = [report.machine for report in results.evals.values()]
    machines += [report.machine for report in results.fidelity.values()]
    if results.bench is not None:
        machines.insert(0, results.bench.machine)
    said = dict.fromkeys(machine_line(machine) for machine in machines)
    return ", ".join(filter(None, [date, "; ".join(said)]))


def _sections(results: Results, lines: Sequence[Row], folder: str, artifact: str) -> Iterator[str]:
    """Those that there is something to show in."""
    if results.choice is not None:
        if results.choice.policy.limits:
            title = f"Limits of the policy {escape(results.choice.policy.name)}"
            yield section("limits", title, "", _limits_table(results.choice))
        if results.choice.picked is not None:
            yield section("use", "Use it", "", _commands(folder, artifact))
    if results.benched or results.evals:
        yield section("variants", "Variants", "", _variants_table(lines) + _glossary())
    yield from _trade_section(lines)
    if results.bench is not None:
        yield section("cost", "Speed and cost", _COST, _cost_table(results.bench))
    if any(row.mean_cosine is not None for row in lines if not row.is_baseline):
        drawn = [(escape(FIDELITY_CHARTS[a][0]), fidelity_chart(lines, a)) for a in FIDELITY_CHARTS]
        yield section("fidelity", "Fidelity to the baseline", _FIDELITY, charts(*drawn))
    if results.fidelity:
        table = _fidelity_table(results.fidelity)
        yield section("texts", "Fidelity on your own texts", "", table)
    if results.evals:
        yield section("tasks", "Scores by task", _TASKS, _tasks_table(results, lines))
    yield section("conditions", "Conditions of measurement", "", conditions(results))


def _trade_section(lines: Sequence[Row]) -> Iterator[str]:
    """Quality against size, speed and index, and the latencies: what of it was measured."""
    quality = quality_of(lines)
    variants = [row for row in lines if getattr(row, quality) is not None]
    drawn: list[tuple[str, str]] = []
    if any(row.weight_bytes is not None for row in variants):
        chart = trade_chart(lines, "size", "Weights, MB", lambda r: in_megabytes(r.weight_bytes))
        drawn.append(("Quality against size (up and left is better)", chart))
    if any(row.tokens_per_s is not None for row in variants):
        chart = trade_chart(
            lines,
            "speed",
            "Throughput, tokens/s",
            lambda row: row.tokens_per_s,
            larger_is_better=True,
        )
        drawn.append(("Quality against speed (up and right is better)", chart))
    if len({row.vector_bytes for row in variants if row.vector_bytes is not None}) > 1:
        chart = trade_chart(
            lines,
            "index",
            "Bytes a vector (MB a million)",
            lambda row: row.vector_bytes,
            logarithmic=True,
        )
        drawn.append(("Quality against the index (up and left is better)", chart))
    if any(row.p50_ms is not None for row in lines):
        drawn.append(("Latency of one query (left is better)", latency_chart(lines)))
    if drawn:
        yield section("trade", "Quality against what it costs", _TRADE, charts(*drawn))


def _glossary() -> str:
    terms = description({column.title: column.meaning for column in COLUMNS})
    return f"<details><summary>What the columns mean</summary>{terms}</details>"


def _headline(results: Results, lines: Sequence[Row]) -> str:
    """What to use, what it gains and what it costs, and on which machine that was measured."""
    choice = results.choice
    if choice is None:
        return (
            '<p class="answer">No policy was applied, so nothing is recommended; '
            "<code>gteopt choose</code> does that.</p>"
        )
    baseline, row = lines[0], next((row for row in lines if row.status == "picked"), None)
    reason = f'<p class="runner">{escape(choice.reason)}</p>'
    if row is None:
        return f'<p class="answer none">Nothing can be recommended.</p>{reason}'
    if row.is_baseline:
        return f'<p class="answer">Keep {escape(row.name)}, the model as it is.</p>{reason}'
    tiles = "".join(
        f'<li class="{kind}"><b>{value}</b> {words}</li>'
        for kind, value, words in _tiles(results, baseline, row)
    )
    warning = " It is slower than the baseline." if is_slower(results, row.name) else ""
    runner_up = "".join(f'<p class="muted">{escape(line)}</p>' for line in pick_lines(results)[1:])
    return (
        f'<p class="answer">Use <b>{escape(row.name)}</b>.{warning}</p>'
        f'<ul class="tiles" aria-label="{escape(row.name)} in figures">{tiles}</ul>'
        f"{reason}{runner_up}"
    )


def _tiles(results: Results, baseline: Row, row: Row) -> Iterator[tuple[str, str, str]]:
    """Kind ("gain", "cost" or neither), figure and words of what the pick changes."""
    if row.weight_ratio is not None:
        kind = "gain" if row.weight_ratio < 1 else "cost"
        yield kind, f"{row.weight_ratio:.2f}×", f"of the weights: {_megabytes_of(row, baseline)}"
    if row.vector_bytes and baseline.vector_bytes and row.vector_bytes != baseline.vector_bytes:
        words = f"of the index: {row.vector_bytes:,} bytes a vector, not {baseline.vector_bytes:,}"
        yield "gain", f"{row.vector_bytes / baseline.vector_bytes:.2g}×", words
    if row.speed_ratio is not None:
        ends = results.benched[row.name].speed_interval
        kind, words = "", "too few repeats to say how sure" if ends is None else "about as fast"
        if ends is not None and (ends[0] > 1 or ends[1] < 1):
            kind, words = ("gain", "faster") if ends[0] > 1 else ("cost", "slower")
        sure = "" if ends is None else f" ({ends[0]:.2f}–{ends[1]:.2f})"
        yield kind, f"{row.speed_ratio:.2f}×", f"the baseline’s throughput{sure}: {words}"
    if row.retention is not None:
        sure = f" ({_interval(row)}: {row.score_verdict})" if row.retention_low is not None else ""
        kind = {"worse": "cost", "better": "gain"}.get(row.score_verdict or "", "")
        yield kind, f"{row.retention * 100:.1f} %", f"of the baseline’s score{sure}"
    if row.neighbour_overlap is not None:
        words = "of the 10 nearest neighbours kept"
        yield "", f"{row.neighbour_overlap * 100:.0f} %", words


def _megabytes_of(row: Row, baseline: Row) -> str:
    assert row.weight_bytes is not None
    assert baseline.weight_bytes is not None
    return f"{megabytes(row.weight_bytes)} MB, not {megabytes(baseline.weight_bytes)}"


def _limits_table(choice: Choice) -> str:
    """A line a limit, a column a candidate, the picked one first."""
    candidates = sorted(choice.candidates, key=lambda each: each.name != choice.picked)
    head = "".join(f'<th scope="col">{escape(each.name)}</th>' for each in candidates)
    body = ""
    for metric, limit in choice.policy.limits.items():
        bounds = [("at least", limit.min), ("at most", limit.max)]
        words = " and ".join(f"{w} {metric_amount(metric, v)}" for w, v in bounds if v is not None)
        cells = ""
        for candidate in candidates:
            value = candidate.metrics.get(metric)
            text = MISSING if value is None else metric_amount(metric, value)
            broken = any(miss.metric == metric for miss in candidate.broken)
            kind = "broken" if broken else "" if value is None else "kept"
            cells += f'<td class="{kind}">{escape(text)}</td>'
        name = METRIC_WORDS[metric]
        body += f'<tr><th scope="row">{escape(name)}<small>{escape(words)}</small></th>{cells}</tr>'
    table = (
        f'<table class="limits"><thead><tr><th scope="col">Limit</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    return scrolled("Limits of the policy", table)


def _commands(folder: str, artifact: str) -> str:
    """The lines that load, check, serve and publish the picked artifact."""
    shell = (
        f"gteopt verify {artifact}\n"
        f"gteopt publish {artifact} --repo ORG/NAME --results {folder} --dry-run\n"
        f"gteopt choose {folder} --policy fastest   # another policy, nothing measured anew"
    )
    python = f'import gteopt\nvectors = gteopt.load("{artifact}").encode(["a text"])'
    where = (
        "<p><code>ARTIFACT</code> is the folder that you built it in.</p>"
        if artifact == "ARTIFACT"
        else ""
    )
    return f"{where}<pre>{escape(shell)}</pre><pre>{escape(python)}</pre>"


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


_DECIDING = ("weight_bytes", "speed_ratio", "retention", "neighbour_overlap", "vector_bytes")


def _variants_table(lines: Sequence[Row]) -> str:
    """Every number of every variant, those that decide first; no column is empty."""
    columns = [
        column
        for column in sorted(COLUMNS, key=lambda each: each.attribute not in _DECIDING)
        if column.attribute != "retention_low"
        and any(getattr(row, column.attribute) is not None for row in lines)
    ]
    head = "".join(
        f'<th scope="col" title="{escape(column.meaning)}" data-title="{escape(column.title)} '
        f'{escape(column.unit)}">{escape(column.title)}'
        f"<small>{escape(column.unit) or '&nbsp;'}</small></th>"
        for column in columns
    )
    body = ""
    for row in lines:
        kind = f"{row.status} baseline" if row.is_baseline else row.status
        cells = ""
        for column in columns:
            sure = column.attribute == "retention" and row.retention_low is not None
            below = f"<small>{_interval(row)}</small>" if sure else ""
            value = getattr(row, column.attribute)
            own = "" if value is None else f"{value:.10g}"
            cells += f'<td data-value="{own}">{escape(column.text(row))}{below}</td>'
        verdict = f"{MARKS[row.status]} {escape(row.verdict)}"
        body += (
            f'<tr class="{kind}"><th scope="row" data-value="{escape(row.name)}">'
            f"<div>{escape(row.name)}<small>{verdict}</small></div></th>{cells}</tr>"
        )
    chosen = "".join(
        f'<label><input type="checkbox" value="{place}" checked> {escape(column.title)}</label>'
        for place, column in enumerate(columns, 1)
    )
    tools = f"<details><summary>columns</summary><div>{chosen}</div></details>"
    return _tools("table-variants", "variants", tools) + scrolled(
        "Table of variants",
        '<table id="table-variants" class="variants sortable"><thead><tr><th scope="col" '
        f'data-title="Variant">Variant<small>&nbsp;</small></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>",
    )


def _tools(table: str, name: str, more: str = "") -> str:
    """What stands above a table that can be sorted, filtered and saved."""
    return (
        f'<div class="tools" data-table="{table}"><input type="search" placeholder="filter" '
        f'aria-label="Filter {name}">{more}<a href="#" download="{name}.csv">CSV</a>'
        "<span>click a heading to sort</span></div>"
    )


def _tasks_table(results: Results, lines: Sequence[Row]) -> str:
    """A heat map: one line a task, split and language; a column a variant, with its retention."""
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
        cells = "".join(_mean_cell(report) for report in means)
        body = (
            f'<tr><th scope="row" data-value="Mean">Mean<small>difference, 95 % interval, verdict'
            f"</small></th>{_score_cell(means[0].baseline_score)}{cells}</tr>"
        )
    for key, task in tasks.items():
        cells = "".join(_task_cell(scores[row.name].get(key)) for row in shown)
        below = _published_cell(known.get(key))
        body += (
            f'<tr data-language="{escape(task.subset)}">'
            f'<th scope="row" data-value="{escape(f"{task.task} {task.subset}")}">'
            f"{escape(task.task)}<small>{escape(task.subset)} · "
            f"{escape(task.split)} · {escape(task.metric)} · {task.n_samples:,} samples"
            f"{_NOT_ABOVE_CHANCE if task.above_chance is False else ''}</small>"
            f"</th>{_score_cell(task.baseline_score, below)}{cells}</tr>"
        )
    head = "".join(
        f'<th scope="col" data-title="{escape(row.name)}">{escape(row.name)}</th>' for row in shown
    )
    notes = beside_published(own) if own else []
    notes = [*dict.fromkeys(n for each in results.evals.values() for n in each.notes), *notes]
    if shown:
        notes.insert(0, _about_means(results.evals[shown[0].name]))
    table = (
        '<table id="table-tasks" class="sortable"><thead><tr><th scope="col" data-title="Task">Task'
        f'</th><th scope="col" data-title="{escape(results.baseline)}">'
        f"{escape(results.baseline)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    subsets = sorted({task.subset for task in tasks.values()})
    tools = "".join(f"<option>{escape(subset)}</option>" for subset in subsets)
    select = (
        f'<select aria-label="Language"><option value="">all languages</option>{tools}</select>'
    )
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    filters = _tools("table-tasks", "tasks", select if len(subsets) > 1 else "")
    return filters + scrolled("Table of task scores", table, "tasks") + below


def _score_cell(score: float, below: str = "", style: str = "") -> str:
    return f'<td data-value="{score:.6f}"{style}>{score * 100:.2f}{below}</td>'


def _mean_cell(report: EvalReport) -> str:
    value, _, span = suite_span(report).partition(" ")
    spans = "".join(f"<small>{each}</small>" for each in (value, span, suite_verdict(report)))
    return _score_cell(report.score, spans)


def _about_means(report: EvalReport) -> str:
    return (
        f"Of the means: difference from the baseline in points, its 95 % paired bootstrap interval "
        f"and the verdict against a margin of {points(report.margin)}."
    )


def _cost_table(bench: BenchReport) -> str:
    """A line a variant and workload; what does not depend on the workload below the name."""
    cells_of = [(line.name, line.cells()) for line in limits(bench)]
    shown = [
        column for column in range(len(LIMITS)) if any(c[column] != MISSING for _, c in cells_of)
    ]
    head = "".join(f'<th scope="col">{escape(LIMITS[column])}</th>' for column in shown)
    body, former = "", ""
    for name, cells in cells_of:
        heading = "" if name == former else _cost_heading(bench, name)
        own = "".join(f"<td>{escape(cells[column])}</td>" for column in shown)
        body += f"<tr>{heading}{own}</tr>"
        former = name
    table = (
        f'<table class="cost"><thead><tr><th scope="col">Variant</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    note = limits_note(bench)
    return f"{scrolled('Speed and cost', table)}<p>{escape(note[0].upper() + note[1:])}.</p>"


def _cost_heading(bench: BenchReport, name: str) -> str:
    """A variant's name over its workloads, with what all of them share."""
    variant = bench.variants[name]
    read = variant.latency.weight_gb_per_s
    query = f"one query reads {read:.1f} GB/s, " if read is not None else ""
    rent = index_rent(bench, name)
    monthly = "" if rent is None else f", ${rent:.2f} a month in memory"
    size = f"{variant.index_bytes_per_million / 1e9:.2f} GB a million documents"
    return (
        f'<th scope="rowgroup" rowspan="{len(variant.throughput)}">{escape(name)}'
        f"<small>{query}{size}{monthly}</small></th>"
    )


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
    return scrolled("Fidelity on your own texts", table) + notes


def _published_cell(found: BesidePublished | None) -> str:
    return "" if found is None else f"<small>published {published_text(found)}</small>"


def _task_cell(task: TaskScore | None) -> str:
    if task is None:
        return f'<td data-value="">{MISSING}</td>'
    if task.baseline_score <= 0:
        return _score_cell(task.score)
    retention = task.score / task.baseline_score
    # Full tint at a loss of a quarter: beyond that a variant is of no use anyway.
    loss = min(1.0, max(0.0, (1 - retention) * 4))
    verdict = f" · {task.difference.verdict}" if task.difference else ""
    below = f"<small>{retention * 100:.1f} %{verdict}</small>"
    return _score_cell(task.score, below, f' style="--loss:{loss:.3f}"')


_NOT_ABOVE_CHANCE = " · not above chance, not in the mean"
_TRADE = """Quality is the share of the baseline’s score that a variant keeps, with its 95 %
interval, or without scores the share of nearest neighbours. The baseline is a diamond, the pick a
star. What lies far below the others is an arrow at the edge, with its value in the legend. No
variant surely beats those on the dotted line: it joins the lower ends of intervals. Point at a
marker for its figures, click a name in the legend to hide it."""
_COST = """Throughput of real tokens, from token ids to vectors; the share of the best product that
this device was measured to do; what a million tokens cost on it; and the hourly price at which they
would cost what the hosted model does."""
_FIDELITY = """How close a variant’s vectors and rankings stay to the baseline’s, without labels.
Task scores move late; these move first."""
_TASKS = """Main score, %; below it the share of the baseline’s score that is kept. The more a
variant loses, the darker its cell."""

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
<p class="muted">{measured}</p>
{headline}
{alert}
</header>
{sections}
</main>
<script>{js}</script>
</body>
</html>
"""
