"""Make the tables for the terminal.

Hides: which columns fit, rich. Refuses to know: how a number was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import OverflowMethod
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gteopt.config.engines import engines_in_words
from gteopt.records.bench import BenchReport
from gteopt.records.evaluation import EvalReport, FidelityReport, TaskScore, Verdict
from gteopt.records.inspection import Inspection
from gteopt.records.manifest import Manifest
from gteopt.records.results_folder import Results
from gteopt.report.fitted_table import FittedTable
from gteopt.report.rows import (
    COLUMNS,
    FIDELITY,
    LIMITS,
    MARKS,
    MISSING,
    Row,
    add_scores,
    encodings_note,
    failure_sentences,
    fidelity_cells,
    fidelity_notes,
    index_rent,
    is_own_baseline,
    kernels_note,
    lengths_note,
    limits_note,
    load_note,
    machine_line,
    noise_note,
    published_sentences,
    published_text,
    result_rows,
    suite_span,
    suite_verdict,
    task_key,
    workload_limits,
)
from gteopt.report.wording import score_points


def terminal_table(results: Results) -> Table:
    """A table of the results, at most 105 characters wide for names of up to 24 letters.

    Its caption lists the broken limits of rejected variants, and failed tasks.
    """
    lines = result_rows(results)
    table = FittedTable([row.name for row in lines], marked=True)
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
    notes += [f"* {failure}" for failure in failure_sentences(results.evals)]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


def bench_table(report: BenchReport) -> Table:
    """A table of speed and memory of each variant, with its throughput on each workload."""
    lines = result_rows(Results(bench=report, evals={}, choice=None))
    table = FittedTable([row.name for row in lines])
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
        f"{report.baseline}, measured in turns with it{noise_note(report)}{load_note(report)}"
        f"{lengths_note(report)}{_backend_note(report)}"
        f"{_part_note(report)}; linear layers by kernel: {kernels_note(report)}",
        style="not italic",
    )
    return table


def _backend_note(report: BenchReport) -> str:
    backend = report.versions.get("backend", "torch")
    if backend == "auto":
        return "".join(
            f"; {name} runs on {variant.backend}: {variant.backend_reason}"
            for name, variant in report.variants.items()
            if variant.backend_reason is not None
        )
    if backend == "torch":
        return ""
    return f"; the variants run on {backend}, {report.baseline} on torch"


def _part_note(report: BenchReport) -> str:
    """A note on figures of random weights; empty for real weights."""
    dummy = report.dummy
    if dummy is None:
        return ""
    if dummy.n_layers == dummy.of_layers:
        return f"; random weights in the shape of {dummy.base}"
    return (
        f"; random weights, {dummy.n_layers} of the {dummy.of_layers} blocks of {dummy.base}: no "
        f"figure in this table is for the whole model"
    )


def whole_model_table(report: BenchReport) -> Table | None:
    """A table of calculated figures of the whole model; None unless two depths were measured."""
    dummy = report.dummy
    if dummy is None or not dummy.whole:
        return None
    table = FittedTable(list(dummy.whole))
    headings = ("query ms", "tokens/s", "weights", "$/M tokens")
    for importance, heading in enumerate(headings):
        table.add_figures(heading, heading, importance=importance)
    for name, whole in dummy.whole.items():
        cost = report.cost_per_million_tokens(name)
        table.add_row(
            Text(name),
            f"{whole.query_ms:,.1f}",
            f"{whole.tokens_per_s:,.0f}",
            decimal(whole.weight_bytes),
            MISSING if cost is None else f"{cost:.4f}",
        )
    table.caption = Text(
        f"calculated, not measured: figures for all {dummy.of_layers} blocks of {dummy.base}, on a "
        f"straight line through {dummy.shallow_layers} and {dummy.n_layers} blocks",
        style="not italic",
    )
    return table


def limits_table(report: BenchReport) -> Table:
    """A table of `workload_limits`, with a query's bandwidth and the size and cost of an index.

    The last three are the same on all workloads. An index costs its share of the machine's memory.
    """
    table = FittedTable(list(report.variants))
    importance = {"workload": 0, "$/M tokens": 1, LIMITS[-1]: 2, "of peak": 3, "GFLOP/s": 4}
    for heading in LIMITS:
        if heading not in _IN_BENCH_ANYWAY:
            first, _, rest = heading.partition(" ")
            lines = f"{first}\n{rest}".strip()
            table.add_figures(lines, heading, importance=importance.get(heading, 9))
    table.add_figures("query\nGB/s", "GB/s that a query reads", importance=8)
    table.add_figures("index\nGB/M", "GB of a million vectors", importance=7)
    table.add_figures("index\n$/month", "$ a month for a million vectors in memory", importance=5)
    for line in workload_limits(report):
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


_IN_BENCH_ANYWAY = ("tokens/s", "× baseline")
"""Columns that `limits_table` leaves out, because `bench_table` has them."""


def eval_table(reports: Mapping[str, EvalReport]) -> Table:
    """A table of score, fidelity and all tasks, with one column for each variant."""
    evals = list(reports.values())
    names = [task.task for report in evals for task in report.tasks]
    table = FittedTable(names, heading="", stacked=True)
    published = {
        task_key(task): task.published
        for report in evals
        for task in report.tasks
        if task.published is not None
    }
    if published:
        table.add_figures("published", "published")
    for name in reports:
        table.add_figures(Text(name), name)
    lines = [add_scores(Row(name, False, "other", ""), reports[name]) for name in reports]
    for column in COLUMNS:
        if column.attribute in _IN_EVAL:
            cells = [*([""] if published else []), *(column.text(row) for row in lines)]
            table.add_row(Text(f"{column.title} {column.unit}"), *cells, style="bold")
    if any(not is_own_baseline(report) for report in evals):
        empty = [""] if published else []
        spans = [suite_span(report).replace(" [", "\n[") for report in evals]
        table.add_row("Difference", *empty, *spans, style="bold")
        table.add_row("Verdict", *empty, *map(suite_verdict, evals), style="bold")
    table.add_section()
    scores = [
        {
            task_key(task): f"{task.score * 100:.2f}{'*' if task.is_stopped else ''}"
            f"{_mark(report, task)}"
            for task in report.tasks
        }
        for report in evals
    ]
    for key in dict.fromkeys(key for by_key in scores for key in by_key):
        task, split, subset = key
        heading = Text(f"{task} {subset} {split}".replace(" default ", " "))
        cells = [published_text(published.get(key))] if published else []
        cells += [by_key.get(key, MISSING) for by_key in scores]
        table.add_row(heading, *cells)
    about = dict.fromkeys(f"suite {r.suite}, against {r.baseline}" for r in evals)
    about |= dict.fromkeys(f"no retention: {r.no_retention}" for r in evals if r.no_retention)
    about |= dict.fromkeys(f"neighbours: {r.fidelity.among}" for r in evals)
    notes = [
        *about,
        *_about_verdicts(evals),
        *(f"* {failure}" for failure in failure_sentences(reports)),
    ]
    notes += [
        *dict.fromkeys(note for report in evals for note in report.notes),
        encodings_note(evals),
    ]
    notes += [sentence for report in evals for sentence in published_sentences(report)]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


def grid_table(reports: Mapping[str, EvalReport]) -> Table:
    """A table with one line for each combination of variant, length and code."""
    evals = list(reports.values())
    table = FittedTable(list(reports))
    headings = ("vector\nbytes", "score\n%", "difference\n95 %", "nn@10\n%", "ρ")
    for heading, importance in zip(headings, (3, 0, 4, 1, 5), strict=True):
        table.add_figures(heading, heading.replace("\n", " "), importance=importance)
    table.add_figures("verdict", "verdict", importance=2, left=True)
    for name, report in reports.items():
        fidelity = report.fidelity
        table.add_row(
            Text(name),
            f"{report.bytes_per_vector:,}",
            f"{report.score * 100:.2f}{'*' if report.partial else ''}",
            suite_span(report),
            f"{fidelity.neighbour_overlap * 100:.1f}",
            f"{fidelity.spearman:.3f}",
            suite_verdict(report),
            style="dim" if is_own_baseline(report) else "",
        )
    first = evals[0]
    n_rows = sum(not is_own_baseline(report) for report in evals)
    notes = [
        f"suite {first.suite}, against {first.baseline}; differences are in points, with a 95 % "
        f"paired bootstrap interval",
        f"verdicts use a margin of {score_points(first.margin)} and hold for "
        f"{f'all {n_rows} lines together (Holm)' if first.correction == 'family' else 'each line'}",
    ]
    notes += [f"* {failure}" for failure in failure_sentences(reports)]
    notes += [
        *dict.fromkeys(note for report in evals for note in report.notes),
        encodings_note(evals),
    ]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


_VERDICT_MARKS: dict[Verdict, str] = {
    "equivalent": "=",
    "better": "+",
    "worse": "-",
    "undecided": "?",
}


def _mark(report: EvalReport, task: TaskScore) -> str:
    """The verdict on a task as one character, which keeps the numbers aligned."""
    if is_own_baseline(report):
        return ""
    return f" {_VERDICT_MARKS[task.difference.verdict] if task.difference else ' '}"


def _about_verdicts(reports: Sequence[EvalReport]) -> list[str]:
    """How to read the verdicts, and why some tasks have no interval."""
    judged = [report for report in reports if not is_own_baseline(report)]
    if not judged:
        return []
    marks = ", ".join(f"{mark} {verdict}" for verdict, mark in _VERDICT_MARKS.items())
    notes = [
        f"differences are in points, with a 95 % paired bootstrap interval; verdicts use a margin "
        f"of {score_points(judged[0].margin)}: {marks}; verdicts hold for "
        + (
            f"all {judged[0].n_claims} tasks together, and for all {len(judged)} means together "
            f"(Holm)"
            if judged[0].correction == "family"
            else "each task and each mean alone"
        )
    ]
    without = dict.fromkeys(
        f"no interval of {task.task}"
        f"{'' if task.subset == 'default' else f' {task.subset}'}: {task.no_interval}"
        for report in judged
        for task in report.tasks
        if task.no_interval is not None
    )
    return [*notes, *without]


def fidelity_table(reports: Mapping[str, FidelityReport]) -> Table:
    """A table of closeness to the baseline on the user's texts, with one line per variant."""
    table = FittedTable(list(reports))
    for heading, importance in zip(FIDELITY, (2, 1, 4, 0, 3), strict=True):
        table.add_figures(heading.replace(" ", "\n"), heading, importance=importance)
    for name, report in reports.items():
        table.add_row(Text(name), *fidelity_cells(report))
    table.caption = Text("\n".join(fidelity_notes(reports)), style="not italic")
    return table


def facts_table(inspection: Inspection) -> Table:
    """A table of facts about a base."""
    table = Table(title=inspection.id, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    facts = {
        "family": inspection.family or "Sentence Transformers encoder",
        "architecture": f"{inspection.architecture}, {inspection.attention} attention",
        "parameters": f"{inspection.n_parameters:,}",
        "dimensions": str(inspection.dims),
        "trained lengths": ", ".join(map(str, inspection.matryoshka_dims)) or "none stated",
        "longest input": f"{inspection.max_tokens:,} tokens",
        "pooling": f"{inspection.pooling}{', normalised' if inspection.normalised else ''}",
        "around a text": " ... ".join([inspection.start_token or "", inspection.end_token]).strip()
        if inspection.end_token
        else "what the tokenizer adds",
        "query prompt": repr(inspection.query_prompt),
        "document prompt": repr(inspection.document_prompt),
        "license": inspection.license or "not stated",
        "published": ", ".join(f"{k} {v}" for k, v in inspection.published_scores.items()) or "-",
        "revision": inspection.revision or "-",
    }
    if inspection.sha256 is not None:
        facts["sha256"] = inspection.sha256
    facts |= _how_it_runs(inspection)
    for name, value in facts.items():
        table.add_row(name, value)
    for note in inspection.notes:
        table.add_row("note", note)
    return table


def _how_it_runs(inspection: Inspection) -> dict[str, str]:
    """The kernels and the backend of a model on this machine, if they were asked for."""
    facts = {}
    if inspection.kernels is not None:
        facts["linear layers"] = ", ".join(f"{n} {name}" for name, n in inspection.kernels.items())
    if inspection.backend is not None:
        facts["backend"] = f"{inspection.backend}: {inspection.backend_reason}"
    return facts


def estimates_table(inspection: Inspection) -> Table:
    """A table of the estimated artifact and the estimated build of each recipe."""
    title = "estimates for each recipe"
    if (target := inspection.estimated_for) is not None:
        hidden = decimal(target.activation_bytes, precision=1)
        title += (
            f", built on {target.device} in {target.dtype}, with at most {hidden} of hidden states "
            f"in memory"
        )
    table = Table(title=title, title_justify="left")
    on_gpu = target is not None and target.device == "cuda"
    memory = ("memory", "GPU memory") if on_gpu else ("memory",)
    for name in ("recipe", "weights", "bytes a vector", "build", *memory, "disk", "opened by"):
        is_text = name in ("recipe", "opened by")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name == "recipe")
    for row in inspection.estimates:
        if row.weight_bytes is None or row.build_bytes is None or row.disk_bytes is None:
            problem = f"cannot be built: {row.problem}"
            table.add_row(row.recipe, *["-"] * (4 + len(memory)), problem)
        else:
            table.add_row(
                row.recipe,
                decimal(row.weight_bytes, precision=2),
                str(row.bytes_per_vector),
                "-" if row.build_s is None else _duration(row.build_s),
                decimal(row.build_bytes, precision=1),
                *([decimal(row.device_bytes or 0, precision=1)] if on_gpu else []),
                decimal(row.disk_bytes, precision=1),
                engines_in_words(row.engines),
            )
    notes = ["build: time on this machine without imports, exact to a factor of two"]
    by_warning: dict[str, list[str]] = {}
    for row in inspection.estimates:
        if row.warning:
            by_warning.setdefault(row.warning, []).append(row.recipe)
    notes += [f"{', '.join(recipes)}: {warning}" for warning, recipes in by_warning.items()]
    table.caption = Text("\n".join(notes), style="not italic")
    return table


def artifact_table(inspection: Inspection, manifest: Manifest) -> Table:
    """A table of facts about an artifact."""
    table = Table(title=inspection.id, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    base, vectors = manifest.base, manifest.vectors
    snr = [layer.output_snr_db for layer in manifest.layers if layer.output_snr_db is not None]
    calibration, share = manifest.calibration, manifest.expert_share
    facts = {
        "made of": f"{base.id} by {manifest.recipe.name}, {base.n_parameters:,} parameters",
        "weights": f"{decimal(manifest.weight_bytes, precision=2)}, "
        f"{manifest.weight_bytes / base.weight_bytes:.0%} of {base.dtype}",
        "layers": f"{len(manifest.layers)} quantized, {len(manifest.unquantized)} groups not "
        f"quantized" + (f", {share:.0%} of all weights in experts" if share else ""),
        "output SNR": f"{min(snr):.1f} to {max(snr):.1f} dB" if snr else "not measured",
        "vectors": f"{vectors.dims} dimensions as {vectors.code}, {vectors.bytes_per_vector} bytes",
        "calibration": f"{calibration.n_texts} texts, {calibration.n_tokens:,} tokens of "
        f"{calibration.source}"
        if calibration
        else "none",
        "format": manifest.format or "not quantized",
        "opened by": engines_in_words(inspection.engines),
        "license": base.license or "not stated",
        "files": f"{len(manifest.files)}, all hashed",
    } | _how_it_runs(inspection)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _duration(seconds: float) -> str:
    """A time in seconds up to two minutes, then in minutes, then in hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def layers_table(manifest: Manifest) -> Table:
    """A table of the layers of an artifact."""
    recipe = manifest.recipe
    title = (
        f"{recipe.name} of {manifest.base.id}: weights "
        f"{decimal(manifest.weight_bytes, precision=2)}, vectors "
        f"{manifest.vectors.dims} x {manifest.vectors.code}"
    )
    table = Table(title=title, title_justify="left")
    for name in ("layer", "shape", "method", "bits", "weight SNR dB", "output SNR dB", "note"):
        right = name in ("shape", "bits", "weight SNR dB", "output SNR dB")
        # Layer names differ at their ends, so they are wrapped instead of cut.
        overflow: OverflowMethod = "fold" if name == "layer" else "ellipsis"
        table.add_column(name, justify="right" if right else "left", overflow=overflow)
    for layer in manifest.layers:
        number_format = (
            "" if layer.scheme.number_format == "int" else f" {layer.scheme.number_format}"
        )
        table.add_row(
            layer.name,
            f"{layer.out_features} x {layer.in_features}",
            layer.method,
            f"{layer.bits_per_weight:.2f}{number_format}",
            f"{layer.weight_snr_db:.1f}",
            "-" if layer.output_snr_db is None else f"{layer.output_snr_db:.1f}",
            layer.note or "",
        )
    if (embedding := manifest.embedding) is not None:
        shape = f"{embedding.out_features} x {embedding.in_features}"
        bits, snr = f"{embedding.bits_per_weight:.2f}", f"{embedding.weight_snr_db:.1f}"
        table.add_row(embedding.name, shape, embedding.method, bits, snr, "-", "token embeddings")
    for group in manifest.unquantized:
        table.add_row(group.name, f"{group.n_parameters:,}", "-", "", "", "", group.reason)
    return table


# Attributes of `COLUMNS` in each table, the most important first; narrow terminals drop the last.
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
