"""Write the report: one self-contained HTML page of all measurements.

Hides: the page's layout, HTML. Refuses to know: torch, the network, how a number was measured, and
how the picked variant was chosen (the page repeats `Choice`).

The page includes plotly.js, its style and its script. Its content security policy forbids every
request, so that it opens alike from a disk, an attachment or a CI artifact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from plotly.offline import get_plotlyjs

from gteopt.config.policy import Policy
from gteopt.paths import ASSETS
from gteopt.records.bench import HOSTED_PRICE, BenchReport
from gteopt.records.evaluation import FidelityReport, ItemComparison
from gteopt.records.files import write_atomically
from gteopt.records.results_folder import Results
from gteopt.report import beside
from gteopt.report.charts import (
    FIDELITY_CHARTS,
    fidelity_chart,
    frontier_chart,
    latency_chart,
    quality_attribute,
    trade_chart,
)
from gteopt.report.conditions import conditions_section
from gteopt.report.examples import examples_section
from gteopt.report.markup import (
    charts_markup,
    facts_markup,
    interval_text,
    scroll_markup,
    section_markup,
    table_controls,
)
from gteopt.report.policy_switch import (
    policy_answer,
    policy_answers,
    policy_menu,
    policy_part,
    row_status_class,
    row_status_line,
)
from gteopt.report.rows import (
    COLUMNS,
    FIDELITY,
    LIMITS,
    MISSING,
    PRICE_OPTION,
    Row,
    failure_sentences,
    fidelity_cells,
    fidelity_notes,
    index_rent,
    limits_note,
    machine_line,
    result_rows,
    to_megabytes,
    workload_limits,
)
from gteopt.report.task_table import tasks_table

NO_OTHERS: Mapping[str, Results | str] = {}


def html_page(
    results: Results,
    *,
    title: str,
    folder: str = "RESULTS",
    artifacts: Mapping[str, str] | None = None,
    date: str = "",
    others: Mapping[str, Results | str] = NO_OTHERS,
) -> str:
    """Make an HTML page that needs no other file and no network.

    Args:
        results: at least the baseline; a variant without an evaluation is shown without scores.
        title: heading of the page, as plain text.
        folder: the results folder, for the commands on the page.
        artifacts: folders of variants by name, for the commands on the page.
        date: date of the last measurement; empty if unknown.
        others: by policy, the same results judged by it, or why it cannot judge them. The page
            switches between them.
    """
    lines = result_rows(results)
    answer = policy_answer(results, folder, artifacts or {})
    return _PAGE.format(
        title=escape(title),
        measured=escape(_measured(results, date)),
        css=(ASSETS / "report.css").read_text(encoding="utf-8"),
        js=(ASSETS / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        header=policy_menu(results, others)
        + policy_part("headline", answer["headline"])
        + _alert(results),
        sections=policy_part("limits", answer["limits"])
        + policy_part("use", answer["use"])
        + "".join(_sections(results, lines)),
        answers=policy_answers(results, others, folder, artifacts or {}),
    )


def write_report(
    folder: Path, results: Results, title: str, *, others: Mapping[str, Results | str] = NO_OTHERS
) -> Path:
    """Write `report.html` atomically into `folder`, and return its path.

    Args:
        folder: the results folder.
        results: contents of the folder.
        title: heading of the page.
        others: see `html_page`.
    """
    path = folder / "report.html"
    manifests = [*folder.glob("variants/*/gteopt.json"), *folder.glob("*/gteopt.json")]
    artifacts = {manifest.parent.name: str(manifest.parent) for manifest in manifests}
    records = [folder / "bench.json", *folder.glob("eval/*.json"), *folder.glob("fidelity/*.json")]
    times = [record.stat().st_mtime for record in records if record.is_file()]
    date = f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d}" if times else ""
    page = html_page(
        results, title=title, folder=str(folder), artifacts=artifacts, date=date, others=others
    )
    write_atomically(path, page.encode())
    return path


def comparison_page(
    names: beside.Names,
    both: Sequence[Results],
    *,
    pairs: Mapping[str, ItemComparison] = beside.NO_PAIRS,
) -> str:
    """Make an HTML page of two results folders that needs no other file and no network.

    Args:
        names: names of the two runs.
        both: results of the two runs.
        pairs: see `beside.comparison_sections`.
    """
    results, lines = beside.merge_results(names, both)
    sections = [*beside.comparison_sections(names, both, pairs), *_trade_section(results, lines)]
    if results.evals:
        sections.append(
            section_markup("tasks", "Scores by task", _TASKS, tasks_table(results, lines))
        )
    for name, run in zip(names, both, strict=True):
        key = f"conditions-{len(sections)}"
        sections.append(
            section_markup(key, f"Conditions of {escape(name)}", "", conditions_section(run))
        )
    return _PAGE.format(
        title=escape(" beside ".join(names)),
        measured="",
        css=(ASSETS / "report.css").read_text(encoding="utf-8"),
        js=(ASSETS / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        header=beside.comparison_header(names, both) + _alert(results),
        sections="".join(sections),
        answers="",
    )


def _measured(results: Results, date: str) -> str:
    """Date and machines of the measurements, in one line."""
    machines = [report.machine for report in results.evals.values()]
    machines += [report.machine for report in results.fidelity.values()]
    if results.bench is not None:
        machines.insert(0, results.bench.machine)
    described = dict.fromkeys(machine_line(machine) for machine in machines)
    return ", ".join(filter(None, [date, "; ".join(described)]))


def _sections(results: Results, lines: Sequence[Row]) -> Iterator[str]:
    """The sections for which there are measurements."""
    if results.benched or results.evals:
        policy = results.choice.policy if results.choice else None
        yield section_markup(
            "variants", "Variants", "", _variants_table(lines, policy) + _glossary()
        )
    yield from _trade_section(results, lines)
    if results.bench is not None:
        yield section_markup("cost", "Speed and cost", _COST, _cost_table(results.bench))
    if any(row.mean_cosine is not None for row in lines if not row.is_baseline):
        drawn = [
            (escape(caption), fidelity_chart(lines, attribute))
            for attribute, (caption, _) in FIDELITY_CHARTS.items()
        ]
        yield section_markup(
            "fidelity", "Fidelity to the baseline", _FIDELITY, charts_markup(*drawn)
        )
    if results.fidelity:
        table = _fidelity_table(results.fidelity)
        yield section_markup("texts", "Fidelity on your own texts", "", table)
    yield examples_section(results.examples, results.choice.picked if results.choice else None)
    if results.evals:
        yield section_markup("tasks", "Scores by task", _TASKS, tasks_table(results, lines))
    yield section_markup("conditions", "Conditions of measurement", "", conditions_section(results))


def _trade_section(results: Results, lines: Sequence[Row]) -> Iterator[str]:
    """The charts of quality against cost, and of latency, for which there are measurements."""
    quality = quality_attribute(lines)
    variants = [row for row in lines if getattr(row, quality) is not None]
    drawn: list[tuple[str, str]] = []
    if any(row.weight_bytes is not None for row in variants):
        chart = trade_chart(
            lines, "size", "Weights, MB", lambda row: to_megabytes(row.weight_bytes)
        )
        drawn.append(("Quality against size (up and left is better)", chart))
    if any(row.speed_ratio is not None for row in variants):
        # The ratio is measured in turns, and the choice reads it too. Tokens a second of variants
        # come from different times, so their order can be another one.
        chart = trade_chart(
            lines,
            "speed",
            "Speed, × baseline",
            lambda row: 1.0 if row.is_baseline and row.speed_ratio else row.speed_ratio,
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
    if (frontier := frontier_chart(results)) is not None:
        drawn.append(("Neighbours kept by bytes a vector (up and left is better)", frontier))
    if any(row.p50_ms is not None for row in lines):
        drawn.append(("Latency of one query (left is better)", latency_chart(lines)))
    if drawn:
        yield section_markup(
            "trade", "Quality against what it costs", _TRADE, charts_markup(*drawn)
        )


_STATUS = {
    "◦ Pareto front": "No other variant that keeps the limits is at least as good in everything "
    "that the policy judges, and better in something."
}


def _glossary() -> str:
    terms = facts_markup({column.title: column.meaning for column in COLUMNS} | _STATUS)
    return f"<details><summary>What the columns mean</summary>{terms}</details>"


def _alert(results: Results) -> str:
    failed = failure_sentences(results.evals)
    if not failed:
        return ""
    items = "".join(f"<li>{escape(failure)}</li>" for failure in failed)
    return (
        '<aside class="alert"><strong>Partial evaluation.</strong> Scores marked * are means over '
        f"the other tasks; do not compare them with other scores.<ul>{items}</ul></aside>"
    )


_DECIDING = ("retention", "weight_bytes", "speed_ratio", "neighbour_overlap", "vector_bytes")
_SHOWN_AS: dict[str, str] = {"retention_low": "retention", "index_bytes": "vector_bytes"}
"""The column that shows a metric of policies, where the names differ."""


def _deciding(policy: Policy | None) -> list[str]:
    """Attributes of the columns that matter most; first those that the policy names."""
    metrics = [] if policy is None else [policy.objective.metric, *policy.limits]
    named = [_SHOWN_AS.get(metric, metric) for metric in metrics]
    return list(dict.fromkeys([*named, *_DECIDING]))


def _variants_table(lines: Sequence[Row], policy: Policy | None) -> str:
    """All figures of all variants; columns that matter most are first, empty ones left out."""
    first = _deciding(policy)
    places = {attribute: place for place, attribute in enumerate(first)}
    columns = [
        column
        for column in sorted(COLUMNS, key=lambda column: places.get(column.attribute, len(first)))
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
        cells = ""
        for column in columns:
            has_interval = column.attribute == "retention" and row.retention_low is not None
            below = f"<small>{interval_text(row)}</small>" if has_interval else ""
            value = getattr(row, column.attribute)
            sort_key = "" if value is None else f"{value:.10g}"
            cells += f'<td data-value="{sort_key}">{escape(column.text(row))}{below}</td>'
        # A number stays on one line with its unit.
        verdict = escape(row_status_line(row)).replace(" %", "&nbsp;%")
        body += (
            f'<tr class="{row_status_class(row)}"><th scope="row" data-value="{escape(row.name)}">'
            f"<div>{escape(row.name)}<small>{verdict}</small></div></th>{cells}</tr>"
        )
    boxes = "".join(
        f'<label><input type="checkbox" value="{place}" checked> {escape(column.title)}</label>'
        for place, column in enumerate(columns, 1)
    )
    tools = f"<details><summary>columns</summary><div>{boxes}</div></details>"
    return table_controls("table-variants", "variants", tools) + scroll_markup(
        "Table of variants",
        '<table id="table-variants" class="variants sortable"><thead><tr><th scope="col" '
        f'data-title="Variant">Variant<small>&nbsp;</small></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>",
    )


def _cost_table(bench: BenchReport) -> str:
    """A table with one line for each variant and workload, without empty columns."""
    lines = [(record.name, record.cells()) for record in workload_limits(bench)]
    shown = [
        column
        for column in range(len(LIMITS))
        if any(cells[column] != MISSING for _, cells in lines)
    ]
    head = "".join(f'<th scope="col">{escape(LIMITS[column])}</th>' for column in shown)
    body, previous = "", ""
    for name, cells in lines:
        heading = "" if name == previous else _cost_heading(bench, name)
        row = "".join(f"<td>{escape(cells[column])}</td>" for column in shown)
        body += f"<tr>{heading}{row}</tr>"
        previous = name
    table = (
        f'<table class="cost"><thead><tr><th scope="col">Variant</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    note = limits_note(bench)
    about = escape(note[0].upper() + note[1:]).replace(
        PRICE_OPTION, f'<code class="option">{PRICE_OPTION}</code>'
    )
    return f"{scroll_markup('Speed and cost', table)}<p>{about}.</p>"


def _cost_heading(bench: BenchReport, name: str) -> str:
    """A variant's heading, with the figures that are equal for all its workloads."""
    variant = bench.variants[name]
    read = variant.latency.weight_gb_per_s
    query = f"one query reads weights at {read:.1f} GB/s; " if read is not None else ""
    rent = index_rent(bench, name)
    monthly = "" if rent is None else f", ${rent:.2f} a month in memory"
    size = f"a million vectors take {variant.index_bytes_per_million / 1e9:.2f} GB"
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
    notes = "".join(f"<p>{escape(note)}</p>" for note in fidelity_notes(reports))
    table = (
        f'<table><thead><tr><th scope="col">Variant</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
    return scroll_markup("Fidelity on your own texts", table) + notes


_TRADE = """Quality is the share of the baseline’s score that a variant keeps, with its 95 %
interval. Without scores, it is the share of nearest neighbours kept. The baseline is a diamond, and
the pick is a star. An arrow at the edge is a variant far below the others; its value is in the
legend. The dotted line is the Pareto front of the intervals’ lower ends. Point at a marker to see
its figures. Click a name in the legend to hide the variant."""
_COST = f"""The workload 32x128 is a batch of 32 texts of 128 tokens. Throughput counts tokens
without padding, from token ids to vectors. The share of peak is relative to the fastest matrix
product that was measured on this device. The last column is the hourly price of a machine at which
a million tokens cost ${HOSTED_PRICE}. That is a listed price of gte-Qwen2-7B-instruct as a hosted
model. Below each name are the speed at which one query reads the weights, and the size of a million
vectors."""
_FIDELITY = """How close a variant’s vectors and rankings are to the baseline’s. These figures need
no labels, and they change earlier than task scores."""
_TASKS = """Each cell has the main score in %, and below it the share of the baseline’s score that
is kept. Darker cells lose more."""

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
{header}
</header>
{sections}
</main>
{answers}
<script>{js}</script>
</body>
</html>
"""
