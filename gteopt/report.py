"""What was measured, for people: one table in the terminal, one self-contained HTML page.

Hides: layout, wording of limits, plotly, HTML. Refuses to know: torch, the network, how a number
was measured, and how the picked variant was chosen (the page repeats what `Choice` says).

The page carries plotly.js, its style and its script inside itself and forbids every request with
its content security policy, so that it opens the same from a disk, an attachment or a CI artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from gteopt.recipe import METRIC_WORDS, metric_amount
from gteopt.records import (
    HOSTED_PRICE,
    BenchReport,
    BesidePublished,
    BrokenLimit,
    Difference,
    EvalReport,
    FidelityReport,
    Machine,
    Results,
    TaskScore,
    Verdict,
    break_even_price_per_hour,
    cost_per_million_tokens,
    write_atomically,
)

Status = Literal["picked", "front", "rejected", "other"]

_MEGABYTE = 1e6
_MISSING = "–"
_DIFFERS = "≠"
_ASSETS = Path(__file__).parent / "assets"
_MARKS: dict[Status, str] = {"picked": "✓", "front": "◦", "rejected": "✗", "other": ""}
# Mid-tones, readable on the light and on the dark page (contrast at least 3:1 on both).
_COLOUR = {"baseline": "#8a939e", "picked": "#1f9d74", "variant": "#4f83cc"}


@dataclass(frozen=True)
class Row:
    """One variant as the tables show it; None where it was not measured.

    Attributes:
        weight_ratio: its weight bytes / the baseline's.
        vector_bytes: of one stored vector.
        retention: its score / the baseline's.
        tokens_per_s: geometric mean over the workloads, as is `speed_ratio`.
        speed_ratio: its speed / the baseline's, interleaved with it.
        status: what the policy made of it; "rejected" breaks a limit.
        verdict: the same in words, with the limits that it breaks.
        partial: some task failed; the score is the mean over the others.
    """

    name: str
    is_baseline: bool
    status: Status
    verdict: str
    partial: bool = False
    weight_bytes: int | None = None
    weight_ratio: float | None = None
    dims: int | None = None
    vector_bytes: int | None = None
    score: float | None = None
    retention: float | None = None
    mean_cosine: float | None = None
    p1_cosine: float | None = None
    neighbour_overlap: float | None = None
    spearman: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    tokens_per_s: float | None = None
    speed_ratio: float | None = None
    peak_memory_bytes: int | None = None
    load_s: float | None = None


def rows(results: Results) -> list[Row]:
    """The baseline's row, then the variants' in the order they were measured."""
    names = [results.bench.baseline, *results.bench.variants, *results.evals]
    return [_row(name, results) for name in dict.fromkeys(names)]


def terminal_table(results: Results) -> Table:
    """The results as a table 100 columns wide (for names of up to 24 letters).

    Below the table stand the limits that each rejected variant breaks and the tasks that failed.
    """
    lines = rows(results)
    table = _table([row.name for row in lines], marked=True)
    columns = [column for column in _COLUMNS if column.attribute in _IN_TERMINAL]
    for column in columns:
        table.add_column(column.terminal, justify="right", no_wrap=True)
    for row in lines:
        style = "bold green" if row.status == "picked" else "dim" if row.is_baseline else ""
        cells = [column.text(row) for column in columns]
        table.add_row(_MARKS[row.status], Text(row.name), *cells, style=style)
    notes = ["✓ picked   ◦ on the Pareto front   ✗ breaks a limit   * partial: some task failed"]
    notes += [f"✗ {row.name}: {row.verdict}" for row in lines if row.status == "rejected"]
    notes += [f"* {failure}" for failure in _failures(results.evals)]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


def bench_table(report: BenchReport) -> Table:
    """Speed and memory of each variant, the throughput of each workload in tokens/s."""
    lines = rows(Results(bench=report, evals={}, choice=None))
    table = _table([row.name for row in lines])
    columns = [column for column in _COLUMNS if column.attribute in _IN_BENCH]
    for column in columns:
        table.add_column(column.terminal, justify="right", no_wrap=True)
    for workload in report.spec.workloads:
        about = "" if workload.lengths == "equal" else "~"
        heading = f"{workload.batch_size}×{about}{workload.tokens}\ntok/s"
        table.add_column(heading, justify="right", no_wrap=True)
    for row in lines:
        cells = [column.text(row) for column in columns]
        cells += [f"{t.tokens_per_s:,.0f}" for t in report.variants[row.name].throughput]
        table.add_row(Text(row.name), *cells, style="dim" if row.is_baseline else "")
    table.caption = Text(
        f"{_machine(report.machine)}; {report.device}, {report.n_threads} threads; latency of "
        f"single queries of {report.spec.query_tokens} tokens; × is relative to "
        f"{report.baseline}, measured in turns with it{_backend_note(report)}{_part_note(report)}",
        style="not italic",
    )
    return table


def _backend_note(report: BenchReport) -> str:
    backend = report.versions.get("backend", "torch")
    return "" if backend == "torch" else f"; the variants run on {backend}, it on torch"


def _part_note(report: BenchReport) -> str:
    """What must be said of figures of random weights."""
    dummy = report.dummy
    if dummy is None:
        return ""
    if dummy.n_layers == dummy.of_layers:
        return f"; random weights in the shape of {dummy.base}"
    return (
        f"; random weights, {dummy.n_layers} of the {dummy.of_layers} blocks of {dummy.base}: no "
        f"figure here is that of the whole model"
    )


_NOISE_ABOVE_PEAK = 1.1


def limits_table(report: BenchReport) -> Table:
    """How near each variant comes to what the device can do, and what its tokens cost.

    A row a variant and workload: 10^9 operations a second and their share of the measured peak;
    joules of the device for a million tokens, where they were counted; dollars for a million tokens
    at the price of the machine, where it was said; the hourly price at which they cost what the
    hosted model does; dollars of storage are left to the user, bytes of an index of a million
    vectors are not.
    """
    table = _table(list(report.variants))
    for heading in (
        "workload",
        "GFLOP/s",
        "of peak",
        "J/M tokens",
        "$/M tokens",
        "$/h for hosted price",
        "index GB/M",
    ):
        table.add_column(heading, justify="right")
    whole = report.dummy is None or report.dummy.n_layers == report.dummy.of_layers
    for name, variant in report.variants.items():
        for record, workload in zip(variant.throughput, report.spec.workloads, strict=True):
            price = report.price_per_hour
            cost = (
                f"{cost_per_million_tokens(price, record.tokens_per_s):.4f}"
                if price is not None and whole
                else _MISSING
            )
            even = f"{break_even_price_per_hour(record.tokens_per_s):.3f}" if whole else _MISSING
            table.add_row(
                Text(name),
                workload.name,
                _MISSING if record.gflops is None else f"{record.gflops:,.0f}",
                _MISSING if record.peak_ratio is None else f"{record.peak_ratio:.0%}",
                _MISSING
                if record.joules_per_million_tokens is None
                else f"{record.joules_per_million_tokens:,.0f}",
                cost,
                even,
                f"{variant.index_bytes_per_million / 1e9:.2f}",
            )
    peaks = ", ".join(f"{kind} {value:,.0f}" for kind, value in report.peak_gflops.items())
    price_note = (
        "no price said (--price-per-hour)"
        if report.price_per_hour is None
        else f"at ${report.price_per_hour:g} an hour"
    )
    shares = [each.peak_ratio or 0 for v in report.variants.values() for each in v.throughput]
    busy = (
        "; more than the peak: other work slowed the device while the peak was measured, so no "
        "share here is to be trusted"
        if max(shares, default=0) > _NOISE_ABOVE_PEAK
        else ""
    )
    table.caption = Text(
        f"measured peaks in GFLOP/s: {peaks or 'none'}{busy}; {price_note}; hosted price: "
        f"${HOSTED_PRICE} per million tokens; {report.energy or 'energy was not counted'}",
        style="not italic",
    )
    return table


def eval_table(reports: Mapping[str, EvalReport]) -> Table:
    """Score, fidelity and every task, one column a variant."""
    evals = list(reports.values())
    table = _table([task.task for report in evals for task in report.tasks], heading="")
    known = {
        _task_key(task): task.published
        for report in evals
        for task in report.tasks
        if task.published is not None
    }
    if known:
        table.add_column("published", justify="right", no_wrap=True)
    for name in reports:
        table.add_column(Text(name), justify="right", overflow="fold")
    lines = [_with_scores(Row(name, False, "other", ""), reports[name]) for name in reports]
    for column in _COLUMNS:
        if column.attribute in _IN_EVAL:
            cells = [*([""] if known else []), *(column.text(row) for row in lines)]
            table.add_row(Text(f"{column.title} {column.unit}"), *cells, style="bold")
    if any(not _is_own_baseline(report) for report in evals):
        empty = [""] if known else []
        spans = [_suite_span(report).replace(" [", "\n[") for report in evals]
        table.add_row("Difference", *empty, *spans, style="bold")
        table.add_row("Verdict", *empty, *map(_suite_verdict, evals), style="bold")
    table.add_section()
    scores = [
        {_task_key(task): f"{task.score * 100:.2f}{_mark(report, task)}" for task in report.tasks}
        for report in evals
    ]
    for key in dict.fromkeys(key for by_key in scores for key in by_key):
        task, split, subset = key
        heading = Text(f"{task} {subset} {split}".replace(" default ", " "))
        cells = [_published_text(known.get(key))] if known else []
        cells += [by_key.get(key, _MISSING) for by_key in scores]
        table.add_row(heading, *cells)
    suites = dict.fromkeys(f"suite {r.suite}, against {r.baseline}" for r in evals)
    notes = [*suites, *_about_verdicts(evals), *(f"* {each}" for each in _failures(reports))]
    notes += [*dict.fromkeys(note for report in evals for note in report.notes), _encodings(evals)]
    notes += [sentence for report in evals for sentence in _beside_published(report)]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


def grid_table(reports: Mapping[str, EvalReport]) -> Table:
    """One line a variant, length and code: score, difference from the baseline, fidelity."""
    evals = list(reports.values())
    table = _table(list(reports))
    for heading in ("vector\nbytes", "score\n%", "difference\n95 %", "nn@10\n%", "ρ"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, report in reports.items():
        found = report.fidelity
        table.add_row(
            Text(name),
            _MISSING if report.bytes_per_vector is None else f"{report.bytes_per_vector:,}",
            f"{report.score * 100:.2f}{'*' if report.partial else ''}",
            _suite_span(report),
            f"{found.neighbour_overlap * 100:.1f}",
            f"{found.spearman:.3f}",
            _suite_verdict(report),
            style="dim" if _is_own_baseline(report) else "",
        )
    first = evals[0]
    n_rows = sum(not _is_own_baseline(report) for report in evals)
    notes = [
        f"suite {first.suite}, against {first.baseline}; differences in points with their 95 % "
        f"paired bootstrap interval",
        f"verdicts against a margin of {first.margin * 100:g} points; worse and better hold for "
        f"all {n_rows} lines together (Holm)",
    ]
    notes += [f"* {failure}" for failure in _failures(reports)]
    notes += [*dict.fromkeys(note for report in evals for note in report.notes), _encodings(evals)]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


_VERDICT_MARKS: dict[Verdict, str] = {
    "equivalent": "=",
    "better": "+",
    "worse": "-",
    "undecided": "?",
}


def _is_own_baseline(report: EvalReport) -> bool:
    return report.artifact_sha256 == report.baseline_sha256


def _suite_span(report: EvalReport) -> str:
    return _MISSING if _is_own_baseline(report) else _span(report.difference)


def _suite_verdict(report: EvalReport) -> str:
    if _is_own_baseline(report):
        return "baseline"
    return report.difference.verdict if report.difference else _MISSING


def _mark(report: EvalReport, task: TaskScore) -> str:
    """What is claimed of a task, in a character, so that numbers stay below each other."""
    if _is_own_baseline(report):
        return ""
    return f" {_VERDICT_MARKS[task.difference.verdict] if task.difference else ' '}"


def _about_verdicts(reports: Sequence[EvalReport]) -> list[str]:
    """How verdicts are to be read, and which tasks have none for what reason."""
    judged = [report for report in reports if not _is_own_baseline(report)]
    if not judged:
        return []
    marks = ", ".join(f"{mark} {verdict}" for verdict, mark in _VERDICT_MARKS.items())
    notes = [
        f"differences in points with their 95 % paired bootstrap interval; verdicts against a "
        f"margin of {judged[0].margin * 100:g} points: {marks}; better and worse hold for all "
        f"{judged[0].n_claims} tasks together, and for all {len(judged)} means (Holm)"
    ]
    without = dict.fromkeys(
        f"no interval of {task.task}"
        f"{'' if task.subset == 'default' else f' {task.subset}'}: {task.no_interval}"
        for report in judged
        for task in report.tasks
        if task.no_interval is not None
    )
    return [*notes, *without]


def _span(difference: Difference | None) -> str:
    """A difference of scores in points, with its interval."""
    if difference is None:
        return _MISSING
    value, low, high = (
        f"{each * 100:+.2f}" for each in (difference.value, difference.low, difference.high)
    )
    return f"{value} [{low}, {high}]"


def _encodings(reports: Sequence[EvalReport | FidelityReport]) -> str:
    """How many texts were encoded, how many encodings the cache saved, and what was cut."""
    asked = sum(report.n_asked_texts for report in reports)
    encoded = sum(report.n_encoded_texts for report in reports)
    cut = {report.variant: report.n_cut_texts for report in reports if report.n_cut_texts}
    said = f"texts encoded: {encoded:,}; encodings saved: {asked - encoded:,}"
    if cut:
        said += "; cut at the model's most tokens: " + ", ".join(
            f"{n:,} of {name}" for name, n in cut.items()
        )
    return said


def _published_text(found: BesidePublished | None) -> str:
    if found is None:
        return _MISSING
    return f"{_DIFFERS if found.differs else ''}{found.score * 100:.2f}"


def _beside_published(report: EvalReport) -> list[str]:
    """What the baseline's scores say beside those that are published for the same model."""
    found, average = report.published, report.published_average
    sentences = []
    if found is not None:
        sentence = (
            f"published for {report.baseline}: {found.score * 100:.2f} over {found.n_tasks} of the "
            f"tasks; here {found.baseline_score * 100:.2f}"
        )
        if found.low is None or found.high is None:
            sentence += ", no interval"
        else:
            word = "outside" if found.differs else "within"
            sentence += (
                f", 95 % interval {found.low * 100:.2f} to {found.high * 100:.2f}: {word} of it"
            )
        sentences.append(f"{sentence} ({found.source})")
    if average is not None:
        sentences.append(
            f"its card's average for {average.benchmark}: {average.score * 100:.2f} over "
            f"{average.n_tasks} tasks, as they were then"
        )
    differing = [task for task in report.tasks if task.published and task.published.differs]
    if differing:
        named = ", ".join(dict.fromkeys(task.task for task in differing))
        sentences.append(
            f"{_DIFFERS} more than the baseline's 95 % interval away from the published score "
            f"({named}): not the texts drawn; look at instruction, dtype, data and revision"
        )
    return sentences


def fidelity_table(reports: Mapping[str, FidelityReport]) -> Table:
    """Closeness to the baseline on a user's own texts, one line a variant."""
    table = _table(list(reports))
    for heading in (
        "vector bytes",
        "cosine",
        "p1 cosine",
        "neighbours kept",
        "rank correlation",
    ):
        table.add_column(heading, justify="right")
    for name, report in reports.items():
        found = report.fidelity
        cells = (found.mean_cosine, found.p1_cosine, found.neighbour_overlap, found.spearman)
        table.add_row(
            Text(name), f"{report.bytes_per_vector:,}", *(f"{cell:.4f}" for cell in cells)
        )
    rows = list(reports.values())
    first = rows[0]
    notes = [
        f"{first.fidelity.n_texts} texts of {first.texts}, against {first.baseline}; neighbours "
        f"and ranks on the vectors as stored",
        *dict.fromkeys(note for row in rows for note in row.notes),
        _encodings(rows),
    ]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


def _table(names: Sequence[str], *, heading: str = "variant", marked: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, caption_justify="left")
    if marked:
        table.add_column("")
    # The one column that may wrap where room is short: rich drops whole columns otherwise.
    longest = max(map(len, names), default=0)
    table.add_column(heading, overflow="fold", min_width=min(16, longest))
    return table


def html_page(results: Results, *, title: str) -> str:
    """One HTML page that needs no other file and no network.

    Args:
        results: at least the baseline; a variant without an evaluation is shown without scores.
        title: heading of the page, as plain text.
    """
    from plotly.offline import get_plotlyjs  # plotly is for the page alone; tables do without

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
            for column in _COLUMNS
        ),
        size=_scatter(lines, "size", "Weights, MB", lambda row: _in_megabytes(row.weight_bytes)),
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


def _row(name: str, results: Results) -> Row:
    bench, evaluation = results.bench.variants.get(name), results.evals.get(name)
    is_baseline = name == results.bench.baseline
    status, verdict = _verdict(name, results)
    row = Row(name, is_baseline, status, verdict)
    if bench:
        row = replace(
            row,
            weight_bytes=bench.weight_bytes,
            weight_ratio=bench.weight_bytes
            / results.bench.variants[results.bench.baseline].weight_bytes,
            dims=bench.dims,
            vector_bytes=bench.bytes_per_vector,
            p50_ms=bench.latency.p50_ms,
            p95_ms=bench.latency.p95_ms,
            tokens_per_s=bench.tokens_per_s,
            speed_ratio=bench.speed_ratio,
            peak_memory_bytes=bench.peak_memory_bytes,
            load_s=bench.load_s,
        )
    if evaluation:
        row = _with_scores(row, evaluation)
        if not bench:
            row = replace(row, dims=evaluation.dims, vector_bytes=evaluation.bytes_per_vector)
    elif is_baseline and results.evals:
        # Every evaluation repeats the baseline's score over the tasks that it covers itself; one
        # that is not partial covers them all.
        fullest = min(results.evals.values(), key=lambda report: report.partial)
        row = replace(row, score=fullest.baseline_score, retention=1.0)
    return row


def _with_scores(row: Row, evaluation: EvalReport) -> Row:
    return replace(
        row,
        partial=evaluation.partial,
        score=evaluation.score,
        retention=evaluation.retention,
        mean_cosine=evaluation.fidelity.mean_cosine,
        p1_cosine=evaluation.fidelity.p1_cosine,
        neighbour_overlap=evaluation.fidelity.neighbour_overlap,
        spearman=evaluation.fidelity.spearman,
    )


def _verdict(name: str, results: Results) -> tuple[Status, str]:
    choice = results.choice
    if choice is None:
        return "other", "no policy applied"
    if choice.picked == name:
        return "picked", "picked"
    candidate = next((c for c in choice.candidates if c.name == name), None)
    if candidate is None:
        return "other", "baseline" if name == results.bench.baseline else "not judged"
    if candidate.broken:
        return "rejected", "; ".join(_in_words(limit) for limit in candidate.broken)
    if candidate.on_pareto_front:
        return "front", "on the Pareto front"
    return "other", "keeps the limits, off the Pareto front"


def _in_words(limit: BrokenLimit) -> str:
    word, allowed = METRIC_WORDS[limit.metric], metric_amount(limit.metric, limit.limit)
    if limit.found is None:
        return f"{word} not measured, limit {allowed}"
    sign = "<" if limit.bound == "min" else ">"
    return f"{word} {metric_amount(limit.metric, limit.found)} {sign} {allowed}"


def _fixed(digits: int, factor: float = 1) -> Callable[[float], str]:
    return lambda value: f"{value * factor:,.{digits}f}"


def _megabytes(n_bytes: float) -> str:
    value = n_bytes / _MEGABYTE
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _in_megabytes(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / _MEGABYTE


@dataclass(frozen=True)
class _Column:
    """A number of a variant; `terminal` is its heading on the terminal, where room is short."""

    title: str
    unit: str
    terminal: str
    attribute: str
    show: Callable[[float], str]
    meaning: str

    def text(self, row: Row) -> str:
        value = getattr(row, self.attribute)
        text = _MISSING if value is None else self.show(value)
        return f"{text}*" if self.attribute == "score" and row.partial else text


_COLUMNS = (
    _Column(
        *("Weights", "MB", "weights\nMB", "weight_bytes", _megabytes),
        "Parameters and buffers of the transformer as they lie in memory (1 MB = 1,000,000 bytes).",
    ),
    _Column(
        *("Size", "× baseline", "size\n×", "weight_ratio", _fixed(2)),
        "Weight bytes divided by the baseline's; below 1 is smaller.",
    ),
    _Column(*("Dims", "", "dims", "dims", _fixed(0)), "Dimensions of a stored vector."),
    _Column(
        *("Vector", "bytes", "vector\nbytes", "vector_bytes", _fixed(0)),
        "Bytes of one stored vector, which is also megabytes of a million of them; the search "
        "structure is not counted.",
    ),
    _Column(
        *("Score", "%", "score\n%", "score", _fixed(2, 100)),
        "Mean main score over the suite's tasks; languages are averaged within a task first. "
        "An asterisk marks a partial score: some task failed.",
    ),
    _Column(
        *("Retention", "%", "kept\n%", "retention", _fixed(1, 100)),
        "Score divided by the baseline's score on the same data in the same environment.",
    ),
    _Column(
        *("Cosine", "mean", "mean\ncos", "mean_cosine", _fixed(3)),
        "Mean cosine between a text's vector and the baseline's vector of it, before vectors are "
        "shortened or coded.",
    ),
    _Column(
        *("NN@10", "%", "nn@10\n%", "neighbour_overlap", _fixed(1, 100)),
        "Share of the baseline's 10 nearest neighbours that are among the variant's 10, on the "
        "vectors as stored.",
    ),
    _Column(
        *("Spearman", "ρ", "ρ", "spearman", _fixed(3)),
        "Rank correlation of the variant's similarities with the baseline's, on the vectors as "
        "stored.",
    ),
    _Column(
        *("p50", "ms", "p50\nms", "p50_ms", _fixed(2)),
        "Median latency of a single query, from text to stored vector.",
    ),
    _Column(
        *("p95", "ms", "p95\nms", "p95_ms", _fixed(2)),
        "95th percentile of the latency of a single query, from text to stored vector.",
    ),
    _Column(
        *("Tokens", "per s", "tokens\n/s", "tokens_per_s", _fixed(0)),
        "Throughput from token ids to vectors: geometric mean over the workloads.",
    ),
    _Column(
        *("Speed", "× baseline", "speed\n×", "speed_ratio", _fixed(2)),
        "Throughput divided by the baseline's, measured in turns with it; above 1 is faster. In "
        "the baseline's own row: two timings of the same model, which shows the noise.",
    ),
    _Column(
        *("Peak", "MB", "peak\nMB", "peak_memory_bytes", _megabytes),
        "Memory. On a GPU: the peak of allocated device memory. On a CPU: the peak resident "
        "memory of a fresh process, interpreter and libraries included.",
    ),
    _Column(
        *("Load", "s", "load\ns", "load_s", _fixed(2)),
        "From path to first vector in a fresh process, imports excluded, files in the page cache.",
    ),
)


# Which of them each table on the terminal has room for.
_IN_TERMINAL = (
    *("weight_bytes", "weight_ratio", "dims", "vector_bytes", "score", "retention"),
    *("mean_cosine", "neighbour_overlap", "p95_ms", "tokens_per_s", "speed_ratio"),
    "peak_memory_bytes",
)
_IN_BENCH = (
    *("weight_bytes", "vector_bytes", "p50_ms", "p95_ms", "speed_ratio", "peak_memory_bytes"),
    "load_s",
)
_IN_EVAL = ("score", "retention", "mean_cosine", "neighbour_overlap", "spearman")


def _failures(evals: Mapping[str, EvalReport]) -> list[str]:
    return [
        f"{report.variant}: task {failed.task} failed: {failed.reason}"
        for report in evals.values()
        for failed in report.failed
    ]


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
    failures = _failures(results.evals)
    if not failures:
        return ""
    items = "".join(f"<li>{escape(failure)}</li>" for failure in failures)
    return (
        '<aside class="alert"><strong>Partial evaluation.</strong> Scores marked * are means over '
        f"the remaining tasks and compare only with themselves.<ul>{items}</ul></aside>"
    )


def _variants_table(lines: Sequence[Row]) -> str:
    head = "".join(
        f'<th scope="col" title="{escape(column.meaning)}">{escape(column.title)}'
        f"<small>{escape(column.unit) or '&nbsp;'}</small></th>"
        for column in _COLUMNS
    )
    body = ""
    for number, row in enumerate(lines):
        kind = f"{row.status} baseline" if row.is_baseline else row.status
        cells = "".join(f"<td>{escape(column.text(row))}</td>" for column in _COLUMNS)
        verdict = f"{_MARKS[row.status]} {escape(row.verdict)}"
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
    import plotly.graph_objects as go

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
    import plotly.graph_objects as go

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
    from plotly.io import to_html

    html: str = to_html(
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
        row.name: {_task_key(task): task for task in results.evals[row.name].tasks} for row in shown
    }
    tasks = {key: task for by_key in scores.values() for key, task in by_key.items()}
    own = results.evals.get(results.bench.baseline)
    if own is not None:
        tasks = {_task_key(task): task for task in own.tasks} | tasks
    known = {_task_key(task): task.published for task in own.tasks} if own else {}
    body = ""
    if shown:
        means = [results.evals[row.name] for row in shown]
        cells = "".join(
            f"<td>{each.score * 100:.2f}<small>{_suite_span(each)} · {_suite_verdict(each)}</small>"
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
    notes = "".join(f"<p>{escape(each)}</p>" for each in _beside_published(own)) if own else ""
    return (
        f'<table><thead><tr><th scope="col">Task</th><th scope="col">'
        f"{escape(results.bench.baseline)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{notes}"
    )


def _published_cell(found: BesidePublished | None) -> str:
    return "" if found is None else f"<small>published {_published_text(found)}</small>"


def _task_key(task: TaskScore) -> tuple[str, str, str]:
    return task.task, task.split, task.subset


def _task_cell(task: TaskScore | None) -> str:
    if task is None:
        return f"<td>{_MISSING}</td>"
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
        "Machine": _machine(bench.machine),
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
            f"process peaks include {_megabytes(min(imports))} to {_megabytes(max(imports))} MB of "
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
    machines = dict.fromkeys(_machine(report.machine) for report in evals)
    versions = dict.fromkeys(_pairs(report.versions) for report in evals)
    fidelity_texts = dict.fromkeys(f"{report.fidelity.n_texts:,} texts" for report in evals)
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


def _machine(machine: Machine) -> str:
    parts = [
        machine.cpu,
        f"{machine.n_cores} cores",
        f"{machine.memory_bytes / 1e9:.1f} GB memory",
        machine.gpu or "no GPU",
        machine.os,
        f"Python {machine.python}",
    ]
    return ", ".join(parts)


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
