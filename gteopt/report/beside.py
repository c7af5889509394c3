"""Compare two results folders on one page: figures side by side, with their change.

Hides: which conditions must be equal for a comparison. Refuses to know: how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape

from gteopt.records.evaluation import EvalReport, FidelityReport, ItemComparison
from gteopt.records.results_folder import Results
from gteopt.report.markup import interval_text, scroll_markup, section_markup
from gteopt.report.rows import COLUMNS, MISSING, Column, Row, machine_line, result_rows
from gteopt.report.wording import score_points

Names = tuple[str, str]
NO_PAIRS: Mapping[str, ItemComparison] = {}


def merge_results(names: Names, both: Sequence[Results]) -> tuple[Results, list[Row]]:
    """Both runs as one, for charts and tasks; a variant's name starts with its run's name."""
    lines: list[Row] = []
    evals: dict[str, EvalReport] = {}
    for name, results in zip(names, both, strict=True):
        lines += [replace(row, name=f"{name}: {row.name}") for row in result_rows(results)]
        evals |= {
            f"{name}: {variant}": report.model_copy(update={"variant": f"{name}: {variant}"})
            for variant, report in results.evals.items()
        }
    return Results(bench=None, evals=evals, choice=None), lines


def describe_differences(names: Names, both: Sequence[Results]) -> list[str]:
    """Sentences on conditions that differ between the runs, and their effect on the figures."""
    facts = [_facts(results) for results in both]
    return [
        f"{fact} differ: {facts[0][fact] or 'none'} in {names[0]}, {facts[1][fact] or 'none'} in "
        f"{names[1]}; {effect}"
        for fact, effect in _EFFECTS.items()
        if facts[0][fact] != facts[1][fact]
    ]


_EFFECTS = {
    "machines": "compare speeds only with the same baseline's",
    "devices": "compare speeds only with the same baseline's",
    "workloads": "throughputs are of different work",
    "suites": "scores are not comparable",
    "texts": "neighbours kept are not comparable",
    "baselines": "retention and speed are ratios to different models",
}
"""Conditions that should be equal, with the effect of a difference."""


def _facts(results: Results) -> dict[str, str]:
    bench, evals, close = results.bench, results.evals.values(), results.fidelity.values()
    judged: list[EvalReport | FidelityReport] = [*evals, *close]
    machines = [report.machine for report in judged]
    machines += [bench.machine] if bench is not None else []
    baselines = {report.baseline_sha256[:12] for report in judged}
    if bench is not None and bench.baseline in bench.variants:
        baselines.add(bench.variants[bench.baseline].artifact_sha256[:12])
    suites = {f"{report.suite} {report.suite_sha256[:12]}" for report in evals}
    texts = {f"{report.texts} {report.texts_sha256[:12]}" for report in close}
    return {
        "machines": "; ".join(sorted({machine_line(machine) for machine in machines})),
        "devices": "" if bench is None else f"{bench.device}, {bench.n_threads} threads",
        "workloads": "" if bench is None else ", ".join(w.name for w in bench.spec.workloads),
        "suites": "; ".join(sorted(suites)),
        "texts": "; ".join(sorted(texts)),
        "baselines": "; ".join(sorted(baselines)),
    }


def comparison_header(names: Names, both: Sequence[Results]) -> str:
    """What each run recommends, and which conditions differ."""
    answers = "".join(
        f'<p class="answer"><b>{escape(name)}</b>: {escape(_answer(results))}</p>'
        for name, results in zip(names, both, strict=True)
    )
    sentences = describe_differences(names, both)
    if not sentences:
        return answers
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    alert = f"<strong>Measured under different conditions.</strong><ul>{items}</ul>"
    return f'{answers}<aside class="alert">{alert}</aside>'


def _answer(results: Results) -> str:
    if results.choice is None:
        return "no policy was applied"
    picked = results.choice.picked or "nothing"
    return f"policy {results.choice.policy.name} picks {picked}"


def comparison_sections(
    names: Names, both: Sequence[Results], pairs: Mapping[str, ItemComparison] = NO_PAIRS
) -> Iterator[str]:
    """The page's tables of figures.

    Args:
        names: names of the two runs.
        both: results of the two runs.
        pairs: comparison of item scores by variant, if both runs kept item scores.
    """
    yield section_markup("figures", "Figures side by side", _FIGURES, _figures(names, both))
    if pairs:
        yield section_markup("paired", "Scores paired item by item", _PAIRED, _paired(names, pairs))


def _figures(names: Names, both: Sequence[Results]) -> str:
    """A table with a block for each variant and a line for each figure that differs."""
    before, after = ({row.name: row for row in result_rows(results)} for results in both)
    blocks = ""
    for variant in dict.fromkeys([*before, *after]):
        pair = (before.get(variant), after.get(variant))
        lines = "".join(
            _line(column, pair)
            for column in COLUMNS
            if column.attribute != "retention_low"
            and _cell(column, pair[0]) != _cell(column, pair[1])
        )
        if lines:
            heading = f'<th scope="rowgroup" colspan="4">{escape(variant)}</th>'
            blocks += f"<tbody><tr>{heading}</tr>{lines}</tbody>"
    if not blocks:
        return "<p>Every figure is the same.</p>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return scroll_markup(
        "Figures of both runs",
        f'<table class="beside"><thead><tr><th scope="col">Figure</th>{head}'
        f'<th scope="col">Change</th></tr></thead>{blocks}</table>',
    )


def _line(column: Column, pair: tuple[Row | None, Row | None]) -> str:
    cells = "".join(f"<td>{_cell(column, row)}</td>" for row in pair)
    unit = f"<small>{escape(column.unit)}</small>" if column.unit else ""
    heading = f'<th scope="row">{escape(column.title)}{unit}</th>'
    return f"<tr>{heading}{cells}<td>{escape(format_change(column, *pair))}</td></tr>"


def _cell(column: Column, row: Row | None) -> str:
    if row is None:
        return MISSING
    sure = column.attribute == "retention" and row.retention_low is not None
    below = f"<small>{interval_text(row)}</small>" if sure else ""
    return f"{escape(column.text(row))}{below}"


_SHARES = frozenset({"score", "retention", "neighbour_overlap"})
_UNITLESS = frozenset({"mean_cosine", "p1_cosine", "spearman"})


def format_change(column: Column, first: Row | None, second: Row | None) -> str:
    """The change from the first run to the second: shares in points, most others in per cent."""
    before = None if first is None else getattr(first, column.attribute)
    after = None if second is None else getattr(second, column.attribute)
    if before is None or after is None:
        return MISSING
    if column.attribute in _SHARES:
        return f"{100 * (after - before):+.2f} points"
    if column.attribute in _UNITLESS:
        return f"{after - before:+.4f}"
    if before == after:
        return "the same"
    return f"{100 * (after / before - 1):+.1f} %" if before else MISSING


def _paired(names: Names, pairs: Mapping[str, ItemComparison]) -> str:
    body = ""
    for variant, pair in pairs.items():
        span, verdict = MISSING, MISSING
        if pair.difference is not None:
            low, high = 100 * pair.difference.low, 100 * pair.difference.high
            span = f"{100 * pair.difference.value:+.2f} [{low:+.2f}, {high:+.2f}]"
            verdict = pair.difference.verdict
        body += (
            f'<tr><th scope="row">{escape(variant)}</th><td>{100 * pair.baseline_score:.2f}</td>'
            f"<td>{100 * pair.score:.2f}</td><td>{span}</td><td>{verdict}</td></tr>"
        )
    head = "".join(f'<th scope="col">{escape(name)}, %</th>' for name in names)
    margins = {score_points(pair.margin) for pair in pairs.values()}
    table = (
        f'<table><thead><tr><th scope="col">Variant</th>{head}<th scope="col">Difference, points'
        f'</th><th scope="col">Verdict</th></tr></thead><tbody>{body}</tbody></table>'
    )
    note = f"<p>Verdicts use a margin of {', '.join(sorted(margins))}.</p>"
    return scroll_markup("Paired scores", table) + note


_FIGURES = (
    """The change is from the first run to the second. Figures that are equal are left out."""
)
_PAIRED = """Both runs kept the score of every query, pair or document. The difference pairs these
scores, and has a 95 % interval."""
