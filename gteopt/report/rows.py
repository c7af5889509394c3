"""One row for each variant: what the terminal's tables and the report show.

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
from gteopt.records.environment import Machine
from gteopt.records.evaluation import (
    BesidePublished,
    Difference,
    EvalReport,
    FidelityReport,
    TaskScore,
    Verdict,
)
from gteopt.records.results_folder import Results
from gteopt.report.wording import METRIC_WORDS, metric_amount, unknown

Status = Literal["picked", "front", "rejected", "other"]

_MEGABYTE = 1e6
MISSING = "–"
_OTHER_DATA = "≠"
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
    names = [results.baseline, *results.benched, *results.evals, *results.fidelity]
    return [_row(name, results) for name in dict.fromkeys(names)]


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


def noise_note(report: BenchReport) -> str:
    """How far ratios may be off; with few repeats, that nobody knows."""
    if report.spec.repeats < MIN_REPEATS:
        return (
            f"; {report.spec.repeats} repeats are too few to say how sure a ratio is, give "
            f"--repeats {MIN_REPEATS} or more"
        )
    return f", and {report.baseline} against itself differs by up to {report.noise:.0%}"


def load_note(report: BenchReport) -> str:
    """What other programs did meanwhile; empty where that was little."""
    if report.other_load is None or report.other_load < BUSY_MACHINE:
        return ""
    return (
        f"; other programs used {report.other_load:.0%} of the processor meanwhile, so speeds and "
        f"latencies are lower than those of an idle machine"
    )


BUSY_MACHINE = 0.1
"""Share of the processor from which on other programs are said to disturb a measurement."""
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
    """One record for each variant and workload."""
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
        "; more than the peak: other work slowed the device while the peak was measured, so do "
        "not trust these shares"
        if max(shares, default=0) > _NOISE_ABOVE_PEAK
        else ""
    )
    return (
        f"measured peaks in GFLOP/s: {peaks or 'none'}{busy}; {price_note}; hosted price: "
        f"${HOSTED_PRICE} per million tokens; {report.energy or 'energy was not counted'}"
    )


def is_own_baseline(report: EvalReport) -> bool:
    """Whether it is the baseline itself that was scored."""
    return report.artifact_sha256 == report.baseline_sha256


def suite_span(report: EvalReport) -> str:
    """Difference of the scores, in points, with its interval."""
    return MISSING if is_own_baseline(report) else _span(report.difference)


def suite_verdict(report: EvalReport) -> str:
    """What may be said of that difference."""
    if is_own_baseline(report):
        return "baseline"
    return report.difference.verdict if report.difference else MISSING


def _span(difference: Difference | None) -> str:
    """A difference of scores in points, with its interval."""
    if difference is None:
        return MISSING
    value, low, high = (
        f"{each * 100:+.2f}" for each in (difference.value, difference.low, difference.high)
    )
    return f"{value} [{low}, {high}]"


def encodings_note(reports: Sequence[EvalReport | FidelityReport]) -> str:
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
    """A published score, marked where it is of another revision of the data."""
    if found is None:
        return MISSING
    return f"{_OTHER_DATA if found.same_data is False else ''}{found.score * 100:.2f}"


def beside_published(report: EvalReport) -> list[str]:
    """What the baseline's scores say beside those that are published for the same model."""
    found, average = report.published, report.published_average
    sentences = []
    if found is not None:
        sentences.append(
            f"published for {report.baseline}: {found.score * 100:.2f} over {found.n_tasks} of the "
            f"tasks; here {found.baseline_score * 100:.2f}, {found.difference * 100:+.2f} "
            f"({found.source})"
        )
        if found.other_conditions:
            sentences.append(
                f"not the same as what was published: {'; '.join(found.other_conditions)}"
            )
    if average is not None:
        sentences.append(
            f"its card's average for {average.benchmark}: {average.score * 100:.2f} over "
            f"{average.n_tasks} tasks, as they were then"
        )
    other = [task.task for task in report.tasks if task.published and not _is_alike(task.published)]
    if other:
        named = ", ".join(dict.fromkeys(other))
        sentences.append(
            f"{_OTHER_DATA} published for another revision of the data, and not in the mean: "
            f"{named}"
        )
    return sentences


def _is_alike(found: BesidePublished) -> bool:
    return found.same_data is not False


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
    return [
        *texts,
        *dict.fromkeys(note for row in rows for note in row.notes),
        encodings_note(rows),
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
        row = with_scores(row, evaluation)
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
        # Every evaluation repeats the baseline's score over the tasks that it covers itself; one
        # that is not partial covers them all.
        fullest = min(results.evals.values(), key=lambda report: report.partial)
        row = replace(
            row, score=fullest.baseline_score, retention=None if fullest.retention is None else 1.0
        )
    return row


def with_scores(row: Row, evaluation: EvalReport) -> Row:
    own = is_own_baseline(evaluation)
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
        return "rejected", "; ".join(_in_words(limit, candidate) for limit in candidate.broken)
    if candidate.on_pareto_front:
        return "front", "on the Pareto front"
    return "other", "keeps the limits, off the Pareto front"


def _in_words(limit: BrokenLimit, candidate: Candidate) -> str:
    word, allowed = METRIC_WORDS[limit.metric], metric_amount(limit.metric, limit.limit)
    if limit.found is None:
        return f"{unknown(limit.metric, candidate.metrics)}, limit {allowed}"
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
class Column:
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
    Column(
        *("Weights", "MB", "weights\nMB", "weight_bytes", megabytes),
        "Parameters and buffers of the transformer as they lie in memory (1 MB = 1,000,000 bytes).",
    ),
    Column(
        *("Size", "× baseline", "size\n×", "weight_ratio", _fixed(2)),
        "Weight bytes divided by the baseline's; below 1 is smaller.",
    ),
    Column(*("Dims", "", "dims", "dims", _fixed(0)), "Dimensions of a stored vector."),
    Column(
        *("Vector", "bytes", "vector\nbytes", "vector_bytes", _fixed(0)),
        "Bytes of one stored vector, which is also megabytes of a million of them; the search "
        "structure is not counted.",
    ),
    Column(
        *("Score", "%", "score\n%", "score", _fixed(2, 100)),
        "Mean main score over the suite's tasks; languages are averaged within a task first. "
        "An asterisk marks a partial score: some task failed, or was stopped once decided.",
    ),
    Column(
        *("Retention", "%", "kept\n%", "retention", _fixed(1, 100)),
        "Score divided by the baseline's score on the same data in the same environment; below it "
        "the 95 % interval.",
    ),
    Column(
        *("At least", "%", "at least\n%", "retention_low", _fixed(1, 100)),
        "Lower end of retention's 95 % paired bootstrap interval, which policies limit.",
    ),
    Column(
        *("Cosine", "mean", "mean\ncos", "mean_cosine", _fixed(3)),
        "Mean cosine between what is stored of a text and the baseline's vector of it. Dimensions "
        "that were left out count as zero, so that cutting is not free.",
    ),
    Column(
        *("NN@10", "%", "nn@10\n%", "neighbour_overlap", _fixed(1, 100)),
        "Share of the baseline's 10 nearest neighbours that are among the variant's 10, on the "
        "vectors as stored.",
    ),
    Column(
        *("Spearman", "ρ", "ρ", "spearman", _fixed(3)),
        "Rank correlation of the variant's similarities with the baseline's, on the vectors as "
        "stored.",
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
        "Throughput divided by the baseline's, measured in turns with it; above 1 is faster. In "
        "the baseline's own row: two timings of the same model, which shows the noise.",
    ),
    Column(
        *("Peak", "MB", "peak\nMB", "peak_memory_bytes", megabytes),
        "Memory. On a GPU: the peak of allocated device memory. On a CPU: the peak resident "
        "memory of a fresh process, interpreter and libraries included.",
    ),
    Column(
        *("Load", "s", "load\ns", "load_s", _fixed(2)),
        "From path to first vector in a fresh process, imports excluded, files in the page cache.",
    ),
)


def failures(evals: Mapping[str, EvalReport]) -> list[str]:
    """One sentence for each task that could not be scored."""
    return [
        f"{report.variant}: task {failed.task} failed: {failed.reason}"
        for report in evals.values()
        for failed in report.failed
    ]


def task_key(task: TaskScore) -> tuple[str, str, str]:
    """What tells a score from the others of its report: task, split and subset."""
    return task.task, task.split, task.subset


def names_in_mean(tasks: Sequence[TaskScore]) -> set[str]:
    """Tasks that a mean is over: those where the baseline is above chance, or all if it is on none.

    The same as `gteopt.evaluation.chance.counted`, which made the mean.
    """
    return {task.task for task in tasks if task.above_chance is not False} or {
        task.task for task in tasks
    }


def machine_line(machine: Machine) -> str:
    """A machine in one line."""
    parts = [
        machine.cpu,
        f"{machine.n_cores} cores",
        f"{machine.memory_bytes / 1e9:.1f} GB memory",
        machine.gpu or "no GPU",
        machine.os,
        f"Python {machine.python}",
    ]
    return ", ".join(parts)
