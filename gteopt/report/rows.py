"""Collect the figures of each variant in one row, for the terminal's tables and the report.

Hides: which columns there are, and the wording of limits and verdicts. Refuses to know: torch,
HTML, rich.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.filesize import decimal

from gteopt.records.bench import (
    HOSTED_PRICE,
    HOURS_A_MONTH,
    MIN_REPEATS,
    BenchReport,
    break_even_price_per_hour,
    cost_per_million_tokens,
    index_cost_per_month,
)
from gteopt.records.choice import BrokenLimit, Candidate
from gteopt.records.environment import MachineRecord
from gteopt.records.evaluation import (
    EvalReport,
    FidelityReport,
    PublishedComparison,
    ScoreDifference,
    TaskScore,
    Verdict,
)
from gteopt.records.results_folder import Results
from gteopt.report.wording import METRIC_WORDS, explain_unknown_metric, metric_amount

Status = Literal["picked", "front", "rejected", "other"]

_MEGABYTE = 1e6
MISSING = "–"
_OTHER_DATA = "≠"
MARKS: dict[Status, str] = {"picked": "✓", "front": "◦", "rejected": "✗", "other": ""}


@dataclass(frozen=True)
class Row:
    """The figures of one variant; a figure is None if it was not measured.

    Attributes:
        weight_ratio: weight bytes / the baseline's weight bytes.
        vector_bytes: bytes of one stored vector.
        retention: score / the baseline's score.
        retention_low, retention_high: ends of the 95 % interval; None for the baseline itself.
        score_verdict: verdict on the difference of the scores.
        tokens_per_s: geometric mean over the workloads.
        speed_ratio: speed / the baseline's speed, measured in turns; geometric mean too.
        status: the policy's decision; "rejected" means that a limit is broken.
        verdict: the status in words, with the broken limits.
        partial: whether a task failed or was stopped; the score is the mean over the others.
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


def result_rows(results: Results) -> list[Row]:
    """The row of the baseline, then the rows of the variants in the order of measurement."""
    names = [results.baseline, *results.benched, *results.evals, *results.fidelity]
    return [_row(name, results) for name in dict.fromkeys(names)]


def kernels_note(report: BenchReport) -> str:
    """The number of layers per kernel, for each variant."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{n} {kernel}" for kernel, n in variant.kernels.items())
        for name, variant in report.variants.items()
    )


def lengths_note(report: BenchReport) -> str:
    """How lengths of mixed workloads are drawn; empty if there is no such workload."""
    if all(workload.lengths == "equal" for workload in report.spec.workloads):
        return ""
    return (
        "; ~: log-normal lengths with that median (the deviation of their logarithm is 0.8), "
        "from an eighth of the median to four times the median"
    )


def noise_note(report: BenchReport) -> str:
    """The noise of ratios; with few repeats, a note that it is unknown."""
    if report.spec.repeats < MIN_REPEATS:
        return (
            f"; {report.spec.repeats} repeats are too few to say how sure a ratio is; give "
            f"--repeats {MIN_REPEATS} or more"
        )
    return f"; two timings of {report.baseline} differ by up to {report.noise:.0%}"


def load_note(report: BenchReport) -> str:
    """A note on the load by other programs; empty if it was small."""
    if report.other_load is None or report.other_load < BUSY_MACHINE:
        return ""
    return (
        f"; other programs used {report.other_load:.0%} of the processor during the measurement, "
        f"so an idle machine would be faster"
    )


BUSY_MACHINE = 0.1
"""Other programs disturb a measurement if they use at least this share of the processor."""
_NOISE_ABOVE_PEAK = 1.1
"""Largest share of the measured peak that noise explains."""


@dataclass(frozen=True)
class WorkloadLimits:
    """How much of the device's peak a variant reaches on one workload, and what tokens cost.

    Attributes:
        gflops, peak_ratio, joules: see `ThroughputRecord`.
        dollars: cost of a million tokens at the machine's price; None if no price was given.
        even: hourly price of the machine at which tokens cost as much as the hosted model's.
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
        """The cells of a table's line, under the headings `LIMITS`."""
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
"""Headings of `WorkloadLimits.cells`."""


def workload_limits(report: BenchReport) -> list[WorkloadLimits]:
    """The limits of each variant on each workload."""
    price = report.price_per_hour
    return [
        WorkloadLimits(
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


def index_rent(report: BenchReport, name: str) -> float | None:
    """Dollars a month for a million vectors of a variant; None if no price was given."""
    if report.price_per_hour is None:
        return None
    n_bytes = report.variants[name].index_bytes_per_million
    return index_cost_per_month(report.price_per_hour, n_bytes, report.machine.memory_bytes)


PRICE_OPTION = "--price-per-hour"


def limits_note(report: BenchReport) -> str:
    """The basis of the table of limits: peaks, prices and energy."""
    peaks = ", ".join(f"{kind} {value:,.0f}" for kind, value in report.peak_gflops.items())
    price_note = (
        f"no costs without a price ({PRICE_OPTION})"
        if report.price_per_hour is None
        else f"costs at ${report.price_per_hour:g} an hour; an index of a million vectors costs "
        f"its share of {decimal(report.machine.memory_bytes, precision=1)} of memory, for "
        f"{HOURS_A_MONTH} hours a month"
    )
    shares = [
        record.peak_ratio or 0
        for variant in report.variants.values()
        for record in variant.throughput
    ]
    warning = (
        "; shares are more than the peak, so other work slowed the device while the peak was "
        "measured; do not trust them"
        if max(shares, default=0) > _NOISE_ABOVE_PEAK
        else ""
    )
    return (
        f"measured peaks in GFLOP/s: {peaks or 'none'}{warning}; {price_note}; hosted price: "
        f"${HOSTED_PRICE} per million tokens; {report.energy or 'energy was not counted'}"
    )


def is_own_baseline(report: EvalReport) -> bool:
    """Whether the scored artifact is the baseline itself."""
    return report.artifact_sha256 == report.baseline_sha256


def suite_span(report: EvalReport) -> str:
    """The difference of mean scores from the baseline's, in points, with its interval."""
    return MISSING if is_own_baseline(report) else _span(report.difference)


def suite_verdict(report: EvalReport) -> str:
    """The verdict on that difference."""
    if is_own_baseline(report):
        return "baseline"
    return report.difference.verdict if report.difference else MISSING


def _span(difference: ScoreDifference | None) -> str:
    """A difference of scores in points, with its interval."""
    if difference is None:
        return MISSING
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.2f} [{low:+.2f}, {high:+.2f}]"


def encodings_note(reports: Sequence[EvalReport | FidelityReport]) -> str:
    """The numbers of texts that were encoded, taken from the cache, and cut."""
    asked = sum(report.n_asked_texts for report in reports)
    encoded = sum(report.n_encoded_texts for report in reports)
    cut = {report.variant: report.n_cut_texts for report in reports if report.n_cut_texts}
    note = f"texts encoded: {encoded:,}; encodings saved: {asked - encoded:,}"
    if cut:
        note += "; texts cut at the model's token limit: " + ", ".join(
            f"{n:,} by {name}" for name, n in cut.items()
        )
    return note


def published_text(published: PublishedComparison | None) -> str:
    """A published score; a mark tells that it is for another revision of the data."""
    if published is None:
        return MISSING
    return f"{_OTHER_DATA if published.same_data is False else ''}{published.score * 100:.2f}"


def published_sentences(report: EvalReport) -> list[str]:
    """Sentences that compare the baseline's scores with published scores of the same model."""
    published, average = report.published, report.published_average
    sentences = []
    if published is not None:
        sentences.append(
            f"published for {report.baseline}: {published.score * 100:.2f} over "
            f"{published.n_tasks} of the tasks; here {published.baseline_score * 100:.2f}, "
            f"{published.difference * 100:+.2f} ({published.source})"
        )
        if published.other_conditions:
            sentences.append(
                f"conditions that differ from the published ones: "
                f"{'; '.join(published.other_conditions)}"
            )
    if average is not None:
        sentences.append(
            f"average for {average.benchmark} on the model's card: {average.score * 100:.2f} over "
            f"{average.n_tasks} tasks, which may have changed since"
        )
    other = [
        task.task
        for task in report.tasks
        if task.published is not None and task.published.same_data is False
    ]
    if other:
        names = ", ".join(dict.fromkeys(other))
        sentences.append(
            f"{_OTHER_DATA} published for another revision of the data, so not in the mean: {names}"
        )
    return sentences


FIDELITY = ("vector bytes", "cosine", "p1 cosine", "neighbours kept", "rank correlation")
"""Headings of `fidelity_cells`."""


def fidelity_cells(report: FidelityReport) -> list[str]:
    fidelity = report.fidelity
    figures = (
        *(fidelity.mean_cosine, fidelity.p1_cosine),
        *(fidelity.neighbour_overlap, fidelity.spearman),
    )
    return [f"{report.bytes_per_vector:,}", *(f"{figure:.4f}" for figure in figures)]


def fidelity_notes(reports: Mapping[str, FidelityReport]) -> list[str]:
    """The texts that were compared, notes on them, and the number of encodings."""
    records = list(reports.values())
    texts = dict.fromkeys(
        f"{report.fidelity.n_texts:,} texts of {report.texts}, against {report.baseline}; "
        f"neighbours and ranks are of stored vectors"
        for report in records
    )
    return [
        *texts,
        *dict.fromkeys(note for report in records for note in report.notes),
        encodings_note(records),
    ]


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
        row = add_scores(row, evaluation)
        if not bench:
            row = replace(row, dims=evaluation.dims, vector_bytes=evaluation.bytes_per_vector)
    elif (close := results.fidelity.get(name)) is not None:
        row = replace(
            row,
            dims=close.dims,
            vector_bytes=close.bytes_per_vector,
            mean_cosine=close.fidelity.mean_cosine,
            p1_cosine=close.fidelity.p1_cosine,
            neighbour_overlap=close.fidelity.neighbour_overlap,
            spearman=close.fidelity.spearman,
        )
    elif is_baseline and results.evals:
        # An evaluation has the baseline's score over its own tasks. An evaluation that is not
        # partial has all tasks.
        fullest = min(results.evals.values(), key=lambda report: report.partial)
        row = replace(
            row, score=fullest.baseline_score, retention=None if fullest.retention is None else 1.0
        )
    return row


def add_scores(row: Row, evaluation: EvalReport) -> Row:
    """The row with the figures of an evaluation."""
    is_baseline = is_own_baseline(evaluation)
    verdict = evaluation.difference.verdict if evaluation.difference is not None else None
    return replace(
        row,
        partial=evaluation.partial,
        score=evaluation.score,
        retention=evaluation.retention,
        retention_low=None if is_baseline else evaluation.retention_low,
        retention_high=None if is_baseline else evaluation.retention_high,
        score_verdict=None if is_baseline else verdict,
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
        return "rejected", "; ".join(_in_words(limit, candidate) for limit in candidate.broken)
    if candidate.on_pareto_front:
        return "front", "on the Pareto front"
    return "other", "keeps the limits, not on the Pareto front"


def _in_words(limit: BrokenLimit, candidate: Candidate) -> str:
    word, allowed = METRIC_WORDS[limit.metric], metric_amount(limit.metric, limit.limit)
    if limit.found is None:
        return f"{explain_unknown_metric(limit.metric, candidate.metrics)}, limit {allowed}"
    sign = "<" if limit.bound == "min" else ">"
    return f"{word} {metric_amount(limit.metric, limit.found)} {sign} {allowed}"


def _fixed(digits: int, factor: float = 1) -> Callable[[float], str]:
    return lambda value: f"{value * factor:,.{digits}f}"


def format_megabytes(n_bytes: float) -> str:
    value = n_bytes / _MEGABYTE
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def to_megabytes(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / _MEGABYTE


@dataclass(frozen=True)
class Column:
    """A column of figures; `terminal` is the short heading for tables on the terminal."""

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
    Column(
        *("Weights", "MB", "weights\nMB", "weight_bytes", format_megabytes),
        "Memory of the transformer's parameters and buffers (1 MB = 1,000,000 bytes).",
    ),
    Column(
        *("Size", "× baseline", "size\n×", "weight_ratio", _fixed(2)),
        "Weight bytes divided by the baseline's; below 1 is smaller.",
    ),
    Column(*("Dims", "", "dims", "dims", _fixed(0)), "Dimensions of a stored vector."),
    Column(
        *("Vector", "bytes", "vector\nbytes", "vector_bytes", _fixed(0)),
        "Bytes of one stored vector, which equals the megabytes of a million vectors; the search "
        "structure is not counted.",
    ),
    Column(
        *("Score", "%", "score\n%", "score", _fixed(2, 100)),
        "Mean main score over the suite's tasks; languages are averaged within a task first. "
        "An asterisk marks a partial score: a task failed, or was stopped once it was decided.",
    ),
    Column(
        *("Retention", "%", "kept\n%", "retention", _fixed(1, 100)),
        "Score divided by the baseline's score on the same data in the same environment. The "
        "95 % interval is below it.",
    ),
    Column(
        *("At least", "%", "at least\n%", "retention_low", _fixed(1, 100)),
        "Lower end of retention's 95 % paired bootstrap interval; policies can limit it.",
    ),
    Column(
        *("Cosine", "mean", "mean\ncos", "mean_cosine", _fixed(3)),
        "Mean cosine of a text's stored vector with the baseline's vector of the same text. "
        "Left-out dimensions count as zero.",
    ),
    Column(
        *("NN@10", "%", "nn@10\n%", "neighbour_overlap", _fixed(1, 100)),
        "Share of the baseline's 10 nearest neighbours that are among the variant's 10, for stored "
        "vectors.",
    ),
    Column(
        *("Spearman", "ρ", "ρ", "spearman", _fixed(3)),
        "Rank correlation of the variant's similarities with the baseline's, for stored vectors.",
    ),
    Column(
        *("p50", "ms", "p50\nms", "p50_ms", _fixed(2)),
        "Median latency of a single query, from text to stored vector.",
    ),
    Column(
        *("p95", "ms", "p95\nms", "p95_ms", _fixed(2)),
        "95th percentile of the latency of a single query, from text to stored vector.",
    ),
    Column(
        *("p99", "ms", "p99\nms", "p99_ms", _fixed(2)),
        "99th percentile of the latency of a single query, from text to stored vector.",
    ),
    Column(
        *("Tokens", "per s", "tokens\n/s", "tokens_per_s", _fixed(0)),
        "Throughput from token ids to vectors: geometric mean over the workloads.",
    ),
    Column(
        *("Speed", "× baseline", "speed\n×", "speed_ratio", _fixed(2)),
        "Throughput divided by the baseline's, measured in turns with it; above 1 is faster. The "
        "baseline's row compares two timings of the same model, which shows the noise.",
    ),
    Column(
        *("Peak", "MB", "peak\nMB", "peak_memory_bytes", format_megabytes),
        "Peak memory. On a GPU: allocated device memory. On a CPU: resident memory of a new "
        "process, with interpreter and libraries.",
    ),
    Column(
        *("Load", "s", "load\ns", "load_s", _fixed(2)),
        "Seconds from path to first vector in a new process, without imports; files are in the "
        "page cache.",
    ),
)


def failure_sentences(evals: Mapping[str, EvalReport]) -> list[str]:
    """One sentence for each task that could not be scored."""
    return [
        f"{report.variant}: task {failed.task} failed: {failed.reason}"
        for report in evals.values()
        for failed in report.failed
    ]


def task_key(task: TaskScore) -> tuple[str, str, str]:
    """Task, split and subset, which identify a score in its report."""
    return task.task, task.split, task.subset


def names_in_mean(tasks: Sequence[TaskScore]) -> set[str]:
    """Names of the tasks in the mean: those where the baseline is above chance, or all if none.

    This repeats the rule of `gteopt.evaluation.chance.scores_above_chance`, which makes the mean.
    """
    return {task.task for task in tasks if task.above_chance is not False} or {
        task.task for task in tasks
    }


def machine_line(machine: MachineRecord) -> str:
    """The facts of a machine in one line."""
    parts = [
        machine.cpu,
        f"{machine.n_cores} cores",
        f"{machine.memory_bytes / 1e9:.1f} GB memory",
        machine.gpu or "no GPU",
        machine.os,
        f"Python {machine.python}",
    ]
    return ", ".join(parts)
