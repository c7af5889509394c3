"""What was measured, as tables for the terminal: one line a variant, one column a quantity.

Hides: which columns there are, wording of limits and verdicts, rich. Refuses to know: torch, HTML,
how a number was measured, and how the picked variant was chosen (rows repeat what `Choice` says).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, OverflowMethod, RenderResult
from rich.filesize import decimal
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from gteopt.recipe import METRIC_SOURCES, METRIC_WORDS, metric_amount, points
from gteopt.records import (
    HOSTED_PRICE,
    HOURS_A_MONTH,
    BenchReport,
    BesidePublished,
    BrokenLimit,
    Difference,
    EvalReport,
    FidelityReport,
    Inspection,
    Machine,
    Manifest,
    Results,
    TaskScore,
    Verdict,
    break_even_price_per_hour,
    cost_per_million_tokens,
    index_cost_per_month,
)

Status = Literal["picked", "front", "rejected", "other"]

_MEGABYTE = 1e6
MISSING = "–"
_DIFFERS = "≠"
MARKS: dict[Status, str] = {"picked": "✓", "front": "◦", "rejected": "✗", "other": ""}


@dataclass(frozen=True)
class Row:
    """One variant as the tables show it; None where it was not measured.

    Attributes:
        weight_ratio: its weight bytes / the baseline's.
        vector_bytes: of one stored vector.
        retention: its score / the baseline's.
        retention_low, retention_high: ends of its 95 % interval; None of the baseline itself.
        score_verdict: what may be said of the score's difference from the baseline's.
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
    retention_low: float | None = None
    retention_high: float | None = None
    score_verdict: Verdict | None = None
    mean_cosine: float | None = None
    p1_cosine: float | None = None
    neighbour_overlap: float | None = None
    spearman: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    tokens_per_s: float | None = None
    speed_ratio: float | None = None
    peak_memory_bytes: int | None = None
    load_s: float | None = None


def rows(results: Results) -> list[Row]:
    """The baseline's row, then the variants' in the order they were measured."""
    names = [results.baseline, *results.benched, *results.evals]
    return [_row(name, results) for name in dict.fromkeys(names)]


def terminal_table(results: Results) -> Table:
    """The results as a table 105 columns wide (for names of up to 24 letters), or less.

    Below the table stand the limits that each rejected variant breaks and the tasks that failed.
    """
    lines = rows(results)
    table = _FittedTable([row.name for row in lines], marked=True)
    columns = [column for column in COLUMNS if column.attribute in _IN_TERMINAL]
    for column in columns:
        importance = _IN_TERMINAL.index(column.attribute)
        table.add_figures(column.terminal, column.title, importance=importance)
    for row in lines:
        style = "bold green" if row.status == "picked" else "dim" if row.is_baseline else ""
        cells = [column.text(row) for column in columns]
        table.add_row(MARKS[row.status], Text(row.name), *cells, style=style)
    notes = []
    if results.choice is not None:
        notes.append("✓ picked   ◦ on the Pareto front   ✗ breaks a limit")
    notes += [f"✗ {row.name}: {row.verdict}" for row in lines if row.status == "rejected"]
    notes += [f"* {failure}" for failure in failures(results.evals)]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


def bench_table(report: BenchReport) -> Table:
    """Speed and memory of each variant, the throughput of each workload in tokens/s."""
    lines = rows(Results(bench=report, evals={}, choice=None))
    table = _FittedTable([row.name for row in lines])
    columns = [column for column in COLUMNS if column.attribute in _IN_BENCH]
    for column in columns:
        importance = _IN_BENCH.index(column.attribute)
        table.add_figures(column.terminal, column.title, importance=importance)
    for workload in report.spec.workloads:
        name = workload.name.replace("x", "×")
        table.add_figures(f"{name}\ntok/s", f"{name} tok/s", importance=2)
    for row in lines:
        cells = [column.text(row) for column in columns]
        cells += [f"{t.tokens_per_s:,.0f}" for t in report.variants[row.name].throughput]
        table.add_row(Text(row.name), *cells, style="dim" if row.is_baseline else "")
    table.caption = Text(
        f"{machine_line(report.machine)}; {report.device}, {report.n_threads} threads; latency of "
        f"single queries of {report.spec.query_tokens} tokens; × is relative to "
        f"{report.baseline}, measured in turns with it, and {report.baseline} against itself "
        f"differs by up to {report.noise:.0%}{lengths_note(report)}{_backend_note(report)}"
        f"{_part_note(report)}; linear layers by kernel: {kernels_note(report)}",
        style="not italic",
    )
    return table


def _backend_note(report: BenchReport) -> str:
    backend = report.versions.get("backend", "torch")
    return "" if backend == "torch" else f"; the variants run on {backend}, it on torch"


def kernels_note(report: BenchReport) -> str:
    """Which kernels every variant ran on."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{n} {kernel}" for kernel, n in variant.kernels.items())
        for name, variant in report.variants.items()
    )


def lengths_note(report: BenchReport) -> str:
    """How lengths of mixed workloads are drawn; empty where there is none."""
    if all(each.lengths == "equal" for each in report.spec.workloads):
        return ""
    return (
        "; ~: log-normal lengths around that median (the deviation of their logarithm is 0.8), "
        "from an eighth of it to four times"
    )


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


@dataclass(frozen=True)
class Limits:
    """How near a variant comes to what the device can do on one workload, and what that costs.

    Attributes:
        gflops, peak_ratio, joules: see `ThroughputRecord`.
        dollars: for a million tokens at the price of the machine; None where it was not said.
        even: dollars an hour at which a million tokens cost what the hosted model's do.
    """

    name: str
    workload: str
    tokens_per_s: float
    speed_ratio: float
    gflops: float | None
    peak_ratio: float | None
    joules: float | None
    dollars: float | None
    even: float | None

    def cells(self) -> tuple[str, ...]:
        """As `LIMITS` heads them."""
        return (
            self.workload,
            f"{self.tokens_per_s:,.0f}",
            f"{self.speed_ratio:.2f}",
            MISSING if self.gflops is None else f"{self.gflops:,.0f}",
            MISSING if self.peak_ratio is None else f"{self.peak_ratio:.0%}",
            MISSING if self.joules is None else f"{self.joules:,.0f}",
            MISSING if self.dollars is None else f"{self.dollars:.4f}",
            MISSING if self.even is None else f"{self.even:.3f}",
        )


LIMITS = (
    *("workload", "tokens/s", "× baseline", "GFLOP/s", "of peak", "J/M tokens", "$/M tokens"),
    "$/h for hosted price",
)
"""Headings of `Limits.cells`."""


def limits(report: BenchReport) -> list[Limits]:
    """A line a variant and workload."""
    price = report.price_per_hour
    return [
        Limits(
            name=name,
            workload=record.workload.name,
            tokens_per_s=record.tokens_per_s,
            speed_ratio=record.baseline_ratio,
            gflops=record.gflops,
            peak_ratio=record.peak_ratio,
            joules=record.joules_per_million_tokens,
            dollars=cost_per_million_tokens(price, record.tokens_per_s)
            if price is not None and report.is_whole
            else None,
            even=break_even_price_per_hour(record.tokens_per_s) if report.is_whole else None,
        )
        for name, variant in report.variants.items()
        for record in variant.throughput
    ]


def limits_table(report: BenchReport) -> Table:
    """`limits`, and what a query reads and an index takes, which are the same on all workloads.

    An index costs its share of the memory of this machine, where a price was said.
    """
    table = _FittedTable(list(report.variants))
    importance = {"workload": 0, "$/M tokens": 1, LIMITS[-1]: 2, "of peak": 3, "GFLOP/s": 4}
    for heading in LIMITS:
        if heading not in _IN_BENCH_ANYWAY:
            first, _, rest = heading.partition(" ")
            lines = f"{first}\n{rest}".strip()
            table.add_figures(lines, heading, importance=importance.get(heading, 9))
    table.add_figures("query\nGB/s", "GB/s that a query reads", importance=8)
    table.add_figures("index\nGB/M", "GB of a million vectors", importance=7)
    table.add_figures("index\n$/month", "$ a month of a million vectors in memory", importance=5)
    for line in limits(report):
        variant = report.variants[line.name]
        read = variant.latency.weight_gb_per_s
        cells = [
            cell
            for heading, cell in zip(LIMITS, line.cells(), strict=True)
            if heading not in _IN_BENCH_ANYWAY
        ]
        cells.append(MISSING if read is None else f"{read:.1f}")
        cells.append(f"{variant.index_bytes_per_million / 1e9:.2f}")
        cells.append(MISSING if (rent := index_rent(report, line.name)) is None else f"{rent:.2f}")
        table.add_row(Text(line.name), *cells)
    table.caption = Text(limits_note(report), style="not italic")
    return table


_IN_BENCH_ANYWAY = ("tokens/s", "× baseline")  # the table above has them


def index_rent(report: BenchReport, name: str) -> float | None:
    """Dollars a month for a million vectors of a variant; None where no price was said."""
    if report.price_per_hour is None:
        return None
    n_bytes = report.variants[name].index_bytes_per_million
    return index_cost_per_month(report.price_per_hour, n_bytes, report.machine.memory_bytes)


def limits_note(report: BenchReport) -> str:
    """What shares, prices and joules are of."""
    peaks = ", ".join(f"{kind} {value:,.0f}" for kind, value in report.peak_gflops.items())
    price_note = (
        "no price said (--price-per-hour)"
        if report.price_per_hour is None
        else f"at ${report.price_per_hour:g} an hour, of which an index of a million vectors in "
        f"memory takes its share of {decimal(report.machine.memory_bytes, precision=1)}, "
        f"{HOURS_A_MONTH} hours a month"
    )
    shares = [each.peak_ratio or 0 for v in report.variants.values() for each in v.throughput]
    busy = (
        "; more than the peak: other work slowed the device while the peak was measured, so no "
        "share here is to be trusted"
        if max(shares, default=0) > _NOISE_ABOVE_PEAK
        else ""
    )
    return (
        f"measured peaks in GFLOP/s: {peaks or 'none'}{busy}; {price_note}; hosted price: "
        f"${HOSTED_PRICE} per million tokens; {report.energy or 'energy was not counted'}"
    )


def eval_table(reports: Mapping[str, EvalReport]) -> Table:
    """Score, fidelity and every task, one column a variant."""
    evals = list(reports.values())
    names = [task.task for report in evals for task in report.tasks]
    table = _FittedTable(names, heading="", stacked=True)
    known = {
        task_key(task): task.published
        for report in evals
        for task in report.tasks
        if task.published is not None
    }
    if known:
        table.add_figures("published", "published")
    for name in reports:
        table.add_figures(Text(name), name)
    lines = [_with_scores(Row(name, False, "other", ""), reports[name]) for name in reports]
    for column in COLUMNS:
        if column.attribute in _IN_EVAL:
            cells = [*([""] if known else []), *(column.text(row) for row in lines)]
            table.add_row(Text(f"{column.title} {column.unit}"), *cells, style="bold")
    if any(not _is_own_baseline(report) for report in evals):
        empty = [""] if known else []
        spans = [suite_span(report).replace(" [", "\n[") for report in evals]
        table.add_row("Difference", *empty, *spans, style="bold")
        table.add_row("Verdict", *empty, *map(suite_verdict, evals), style="bold")
    table.add_section()
    scores = [
        {task_key(task): f"{task.score * 100:.2f}{_mark(report, task)}" for task in report.tasks}
        for report in evals
    ]
    for key in dict.fromkeys(key for by_key in scores for key in by_key):
        task, split, subset = key
        heading = Text(f"{task} {subset} {split}".replace(" default ", " "))
        cells = [published_text(known.get(key))] if known else []
        cells += [by_key.get(key, MISSING) for by_key in scores]
        table.add_row(heading, *cells)
    suites = dict.fromkeys(f"suite {r.suite}, against {r.baseline}" for r in evals)
    suites |= dict.fromkeys(f"no retention: {r.no_retention}" for r in evals if r.no_retention)
    suites |= dict.fromkeys(f"neighbours: {r.fidelity.among}" for r in evals)
    notes = [*suites, *_about_verdicts(evals), *(f"* {each}" for each in failures(reports))]
    notes += [*dict.fromkeys(note for report in evals for note in report.notes), _encodings(evals)]
    notes += [sentence for report in evals for sentence in beside_published(report)]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


def grid_table(reports: Mapping[str, EvalReport]) -> Table:
    """One line a variant, length and code: score, difference from the baseline, fidelity."""
    evals = list(reports.values())
    table = _FittedTable(list(reports))
    headings = ("vector\nbytes", "score\n%", "difference\n95 %", "nn@10\n%", "ρ")
    for heading, importance in zip(headings, (3, 0, 4, 1, 5), strict=True):
        table.add_figures(heading, heading.replace("\n", " "), importance=importance)
    table.add_figures("verdict", "verdict", importance=2, left=True)
    for name, report in reports.items():
        found = report.fidelity
        table.add_row(
            Text(name),
            MISSING if report.bytes_per_vector is None else f"{report.bytes_per_vector:,}",
            f"{report.score * 100:.2f}{'*' if report.partial else ''}",
            suite_span(report),
            f"{found.neighbour_overlap * 100:.1f}",
            f"{found.spearman:.3f}",
            suite_verdict(report),
            style="dim" if _is_own_baseline(report) else "",
        )
    first = evals[0]
    n_rows = sum(not _is_own_baseline(report) for report in evals)
    notes = [
        f"suite {first.suite}, against {first.baseline}; differences in points with their 95 % "
        f"paired bootstrap interval",
        f"verdicts against a margin of {points(first.margin)}; worse and better hold for "
        f"all {n_rows} lines together (Holm)",
    ]
    notes += [f"* {failure}" for failure in failures(reports)]
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


def suite_span(report: EvalReport) -> str:
    return MISSING if _is_own_baseline(report) else _span(report.difference)


def suite_verdict(report: EvalReport) -> str:
    if _is_own_baseline(report):
        return "baseline"
    return report.difference.verdict if report.difference else MISSING


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
        f"margin of {points(judged[0].margin)}: {marks}; better and worse hold for all "
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
        return MISSING
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


def published_text(found: BesidePublished | None) -> str:
    if found is None:
        return MISSING
    return f"{_DIFFERS if found.differs else ''}{found.score * 100:.2f}"


def beside_published(report: EvalReport) -> list[str]:
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
    table = _FittedTable(list(reports))
    for heading, importance in zip(FIDELITY, (2, 1, 4, 0, 3), strict=True):
        table.add_figures(heading.replace(" ", "\n"), heading, importance=importance)
    for name, report in reports.items():
        table.add_row(Text(name), *fidelity_cells(report))
    table.caption = Text("\n".join(fidelity_notes(reports)), style="not italic")
    return table


FIDELITY = ("vector bytes", "cosine", "p1 cosine", "neighbours kept", "rank correlation")
"""Headings of `fidelity_cells`."""


def fidelity_cells(report: FidelityReport) -> list[str]:
    found = report.fidelity
    figures = (found.mean_cosine, found.p1_cosine, found.neighbour_overlap, found.spearman)
    return [f"{report.bytes_per_vector:,}", *(f"{figure:.4f}" for figure in figures)]


def fidelity_notes(reports: Mapping[str, FidelityReport]) -> list[str]:
    """Which texts these are, and what happened to them."""
    rows = list(reports.values())
    texts = dict.fromkeys(
        f"{row.fidelity.n_texts:,} texts of {row.texts}, against {row.baseline}; neighbours and "
        f"ranks on the vectors as stored"
        for row in rows
    )
    return [*texts, *dict.fromkeys(note for row in rows for note in row.notes), _encodings(rows)]


def facts_table(found: Inspection) -> Table:
    """What a base is."""
    table = Table(title=found.id, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    facts = {
        "family": found.family or "Sentence Transformers encoder",
        "architecture": f"{found.architecture}, {found.attention} attention",
        "parameters": f"{found.n_parameters:,}",
        "dimensions": str(found.dims),
        "trained lengths": ", ".join(map(str, found.matryoshka_dims)) or "none stated",
        "longest input": f"{found.max_tokens:,} tokens",
        "pooling": f"{found.pooling}{', normalised' if found.normalised else ''}",
        "around a text": " ... ".join([found.start_token or "", found.end_token]).strip()
        if found.end_token
        else "as the tokenizer does",
        "query prompt": repr(found.query_prompt),
        "document prompt": repr(found.document_prompt),
        "license": found.license or "not stated",
        "published": ", ".join(f"{k} {v}" for k, v in found.published_scores.items()) or "-",
        "revision": found.revision or "-",
        "sha256": found.sha256 or "known once the weights are here",
    }
    if found.kernels is not None:
        facts["linear layers"] = ", ".join(f"{n} {name}" for name, n in found.kernels.items())
    for name, value in facts.items():
        table.add_row(name, value)
    for note in found.notes:
        table.add_row("note", note)
    return table


def estimates_table(found: Inspection) -> Table:
    """What recipes would make of a base, and what that takes."""
    title = "what each recipe would make of it"
    if (how := found.estimated_for) is not None:
        room = decimal(how.activation_bytes, precision=1)
        title += f", on {how.device} in {how.dtype}, at most {room} of hidden states in memory"
    table = Table(title=title, title_justify="left")
    for name in ("recipe", "weights", "bytes a vector", "build memory", "build disk", ""):
        table.add_column(name, justify="left" if name in ("recipe", "") else "right")
    for each in found.estimates:
        if each.weight_bytes is None or each.build_bytes is None or each.disk_bytes is None:
            table.add_row(each.recipe, "-", "-", "-", "-", f"cannot be built: {each.problem}")
        else:
            table.add_row(
                each.recipe,
                decimal(each.weight_bytes, precision=2),
                str(each.bytes_per_vector),
                decimal(each.build_bytes, precision=2),
                decimal(each.disk_bytes, precision=2),
                each.summary,
            )
    return table


def layers_table(manifest: Manifest) -> Table:
    """What an artifact holds, a line a layer."""
    recipe = manifest.recipe
    title = (
        f"{recipe.name} of {manifest.base.id}: weights "
        f"{decimal(manifest.weight_bytes, precision=2)}, vectors "
        f"{manifest.vectors.dims} x {manifest.vectors.code}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("layer", "shape", "method", "bits", "weight SNR dB", "output SNR dB", "note"):
        right = name in ("shape", "bits", "weight SNR dB", "output SNR dB")
        # Names differ at their ends, which must not be cut off.
        overflow: OverflowMethod = "fold" if name == "layer" else "ellipsis"
        table.add_column(name, justify="right" if right else "left", overflow=overflow)
    for layer in manifest.layers:
        element = "" if layer.scheme.element == "int" else f" {layer.scheme.element}"
        table.add_row(
            layer.name,
            f"{layer.out_features} x {layer.in_features}",
            layer.method,
            f"{layer.bits_per_weight:.2f}{element}",
            f"{layer.weight_snr_db:.1f}",
            "-" if layer.output_snr_db is None else f"{layer.output_snr_db:.1f}",
            layer.note or "",
        )
    if (embedding := manifest.embedding) is not None:
        shape = f"{embedding.out_features} x {embedding.in_features}"
        bits, snr = f"{embedding.bits_per_weight:.2f}", f"{embedding.weight_snr_db:.1f}"
        table.add_row(embedding.name, shape, embedding.method, bits, snr, "-", "token embeddings")
    for left in manifest.unquantized:
        table.add_row(left.name, f"{left.n_parameters:,}", "-", "", "", "", left.reason)
    return table


class _FittedTable(Table):
    """A table that leaves out whole columns where room is short, and cuts no figure or name.

    What it leaves out is said below it. Its caption is as wide as the terminal, not as the table.

    Args:
        names: first cells of the rows.
        heading: of them.
        marked: whether a column of marks comes first.
        stacked: whether columns that find no room stand in a further table below.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        heading: str = "variant",
        marked: bool = False,
        stacked: bool = False,
    ) -> None:
        super().__init__(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, caption_justify="left")
        if marked:
            self.add_column("")
        # The one column that may wrap where room is short.
        longest = max(map(len, names), default=0)
        self.add_column(heading, overflow="fold", min_width=min(16, longest))
        self._n_fixed = len(self.columns)
        self._stacked = stacked
        self._figures: list[tuple[int, str]] = []

    def add_figures(
        self, heading: str | Text, title: str, *, importance: int = 0, left: bool = False
    ) -> None:
        """Add a column; those of the highest `importance` leave first, later ones before others."""
        self.add_column(heading, justify="left" if left else "right", no_wrap=True)
        self._figures.append((importance, title))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The columns that there is room for, then the caption."""
        figures = range(self._n_fixed, len(self.columns))
        hidden: list[int] = []
        if self._stacked:
            block: list[int] = []
            for column in figures:
                if block and not self._fits([*block, column], console, options):
                    yield self._part(block)
                    block = []
                block.append(column)
            yield self._part(block)
        else:
            leaving = sorted(figures, key=lambda i: (self._figures[i - self._n_fixed][0], i))
            shown = list(figures)
            while len(shown) > 1 and not self._fits(shown, console, options):
                hidden.append(leaving.pop())
                shown.remove(hidden[-1])
            yield self._part(shown)
        if hidden:
            titles = ", ".join(self._figures[i - self._n_fixed][1] for i in sorted(hidden))
            yield Text(f"no room for: {titles} (a wider terminal or --json shows them)")
        if self.caption:
            yield self.caption

    def _fits(self, figures: Sequence[int], console: Console, options: ConsoleOptions) -> bool:
        part = self._part(figures)
        return Measurement.get(console, options.update(width=10_000), part).minimum <= (
            options.max_width
        )

    def _part(self, figures: Sequence[int]) -> Table:
        part = Table(box=self.box, pad_edge=False, padding=0)
        part.columns = [*self.columns[: self._n_fixed], *(_whole(self.columns[i]) for i in figures)]
        part.rows = self.rows
        return part


def _whole(column: Column) -> Column:
    """The same column, measured as wide as its widest line."""
    whole = copy(column)
    lines = [line for cell in [column.header, *column.cells] for line in str(cell).split("\n")]
    whole.min_width = max(map(cell_len, lines), default=0)
    return whole


def _row(name: str, results: Results) -> Row:
    bench, evaluation = results.benched.get(name), results.evals.get(name)
    is_baseline = name == results.baseline
    status, verdict = _verdict(name, results)
    row = Row(name, is_baseline, status, verdict)
    if bench:
        row = replace(
            row,
            weight_bytes=bench.weight_bytes,
            weight_ratio=bench.weight_bytes / results.benched[results.baseline].weight_bytes,
            dims=bench.dims,
            vector_bytes=bench.bytes_per_vector,
            p50_ms=bench.latency.p50_ms,
            p95_ms=bench.latency.p95_ms,
            p99_ms=bench.latency.p99_ms,
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
        row = replace(
            row, score=fullest.baseline_score, retention=None if fullest.retention is None else 1.0
        )
    return row


def _with_scores(row: Row, evaluation: EvalReport) -> Row:
    own = _is_own_baseline(evaluation)
    return replace(
        row,
        partial=evaluation.partial,
        score=evaluation.score,
        retention=evaluation.retention,
        retention_low=None if own else evaluation.retention_low,
        retention_high=None if own else evaluation.retention_high,
        score_verdict=evaluation.difference.verdict if evaluation.difference and not own else None,
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
        return "other", "baseline" if name == results.baseline else "not judged"
    if candidate.broken:
        return "rejected", "; ".join(_in_words(limit) for limit in candidate.broken)
    if candidate.on_pareto_front:
        return "front", "on the Pareto front"
    return "other", "keeps the limits, off the Pareto front"


def _in_words(limit: BrokenLimit) -> str:
    word, allowed = METRIC_WORDS[limit.metric], metric_amount(limit.metric, limit.limit)
    if limit.found is None:
        return f"{word} not measured ({METRIC_SOURCES[limit.metric]}), limit {allowed}"
    sign = "<" if limit.bound == "min" else ">"
    return f"{word} {metric_amount(limit.metric, limit.found)} {sign} {allowed}"


def _fixed(digits: int, factor: float = 1) -> Callable[[float], str]:
    return lambda value: f"{value * factor:,.{digits}f}"


def megabytes(n_bytes: float) -> str:
    value = n_bytes / _MEGABYTE
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def in_megabytes(n_bytes: int | None) -> float | None:
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
        text = MISSING if value is None else self.show(value)
        return f"{text}*" if self.attribute == "score" and row.partial else text


COLUMNS = (
    _Column(
        *("Weights", "MB", "weights\nMB", "weight_bytes", megabytes),
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
        "Score divided by the baseline's score on the same data in the same environment; below it "
        "the 95 % interval.",
    ),
    _Column(
        *("At least", "%", "at least\n%", "retention_low", _fixed(1, 100)),
        "Lower end of retention's 95 % paired bootstrap interval, which policies limit.",
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
        *("p99", "ms", "p99\nms", "p99_ms", _fixed(2)),
        "99th percentile of the latency of a single query, from text to stored vector.",
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
        *("Peak", "MB", "peak\nMB", "peak_memory_bytes", megabytes),
        "Memory. On a GPU: the peak of allocated device memory. On a CPU: the peak resident "
        "memory of a fresh process, interpreter and libraries included.",
    ),
    _Column(
        *("Load", "s", "load\ns", "load_s", _fixed(2)),
        "From path to first vector in a fresh process, imports excluded, files in the page cache.",
    ),
)


# Which of them the tables on the terminal show, those that find room longest first.
_IN_TERMINAL = (
    *("weight_bytes", "retention", "neighbour_overlap", "speed_ratio", "retention_low"),
    *("vector_bytes", "p95_ms", "dims", "score", "peak_memory_bytes", "weight_ratio"),
    *("mean_cosine", "tokens_per_s"),
)
_IN_BENCH = (
    *("weight_bytes", "speed_ratio", "p50_ms", "p95_ms", "peak_memory_bytes", "vector_bytes"),
    *("load_s", "p99_ms"),
)
_IN_EVAL = ("score", "retention", "mean_cosine", "neighbour_overlap", "spearman")


def failures(evals: Mapping[str, EvalReport]) -> list[str]:
    return [
        f"{report.variant}: task {failed.task} failed: {failed.reason}"
        for report in evals.values()
        for failed in report.failed
    ]


def task_key(task: TaskScore) -> tuple[str, str, str]:
    return task.task, task.split, task.subset


def machine_line(machine: Machine) -> str:
    parts = [
        machine.cpu,
        f"{machine.n_cores} cores",
        f"{machine.memory_bytes / 1e9:.1f} GB memory",
        machine.gpu or "no GPU",
        machine.os,
        f"Python {machine.python}",
    ]
    return ", ".join(parts)
