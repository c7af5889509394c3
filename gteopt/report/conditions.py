"""Make the report page's last section: machines, versions, data and how figures were measured."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gteopt.records.bench import BenchReport
from gteopt.records.evaluation import EvalReport, FidelityReport
from gteopt.records.results_folder import Results
from gteopt.report.markup import facts_markup
from gteopt.report.rows import format_megabytes, lengths_note, load_note, machine_line, noise_note


def conditions_section(results: Results) -> str:
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
            f"baseline, after {spec.warmup} warm-up queries"
        ),
        "Throughput": "; ".join(f"{w.name} tokens" for w in spec.workloads)
        + f"; {spec.repeats} rounds each, in turns with the baseline, after {spec.warmup} "
        f"warm-up rounds; medians{lengths_note(bench)}{noise_note(bench)}{load_note(bench)}",
        "Peak memory": (
            f"process peaks include {format_megabytes(min(imports))} to "
            f"{format_megabytes(max(imports))} MB for interpreter and libraries"
        ),
        "Kernels": "; ".join(
            f"{name}: {_pairs({kernel: str(n) for kernel, n in variant.kernels.items()})}"
            for name, variant in bench.variants.items()
        ),
    }
    return f"<h3>Speed and memory</h3>{facts_markup(speed)}"


def _quality_conditions(evals: Sequence[EvalReport], texts: Sequence[FidelityReport]) -> str:
    html = ""
    if texts:
        facts = {
            "Texts": "; ".join(
                dict.fromkeys(f"{report.texts} (sha256 {report.texts_sha256})" for report in texts)
            ),
            "Machine": "; ".join(dict.fromkeys(machine_line(report.machine) for report in texts)),
            "Versions": "; ".join(dict.fromkeys(_pairs(report.versions) for report in texts)),
        }
        html = f"<h3>Own texts</h3>{facts_markup(facts)}"
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
        "Fidelity": f"on {'; '.join(fidelity_texts)} of the suite, without labels",
    }
    tasks = {task.task: task for report in evals for task in report.tasks}
    body = "".join(
        f'<tr><th scope="row">{escape(task.task)}</th><td>{escape(task.task_type)}</td>'
        f"<td><code>{escape(task.dataset_revision)}</code></td>"
        f"<td>{escape(task.instruction) if task.instruction else 'none'}</td></tr>"
        for task in tasks.values()
    )
    return (
        f"{html}<h3>Quality</h3>{facts_markup(quality)}"
        '<div class="scroll words" tabindex="0" role="region" aria-label="Data sets"><table><thead>'
        '<tr><th scope="col">Task</th><th scope="col">Type</th><th scope="col">Data set revision'
        '</th><th scope="col">Instruction (searches: for queries only)</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _pairs(pairs: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items())
