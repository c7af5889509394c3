"""The report shows every number that was measured, and a real browser renders it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console
from rich.table import Table

from gteopt.commands.choose import choose_by_policy, write_choice_page, write_comparison_page
from gteopt.config.plan import BenchSpec, Workload
from gteopt.config.policy import Limit, Metric, Objective, Policy, load_policy
from gteopt.config.recipe import VectorCode
from gteopt.config.yaml_files import list_shipped_names
from gteopt.records.bench import BenchReport, LatencyRecord, ThroughputRecord, VariantBench
from gteopt.records.choice import BrokenLimit, Candidate, Choice
from gteopt.records.environment import MachineRecord
from gteopt.records.evaluation import (
    EvalReport,
    FailedTask,
    Fidelity,
    FidelityReport,
    ScoreDifference,
    TaskScore,
)
from gteopt.records.files import read_record, write_record
from gteopt.records.results_folder import Results, read_results
from gteopt.report import beside
from gteopt.report.charts import axis_floor, pareto_line, thin_ticks
from gteopt.report.html import comparison_page, html_page, write_report
from gteopt.report.rows import COLUMNS, MISSING, index_rent, machine_line, result_rows
from gteopt.report.terminal import _IN_TERMINAL, bench_table, eval_table, terminal_table
from gteopt.report.wording import METRIC_WORDS, metric_amount

MACHINE = MachineRecord(
    cpu="AMD EPYC 9B14 (avx512_bf16, avx512_vnni)",
    n_cores=2,
    memory_bytes=25_276_502_016,
    gpu=None,
    os="Linux-6.1-x86_64-with-glibc2.36",
    python="3.11.7",
)
VERSIONS = {"gteopt": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0", "numpy": "2.4.6"}
REASON = (
    "gptq-int4-pca128 keeps 98.4 % of the baseline's score with 5.1 MB of weights, the smallest "
    "of the variants that keep every limit."
)


@dataclasses.dataclass(frozen=True)
class DemoVariant:
    name: str
    weight_bytes: int
    dims: int
    code: VectorCode
    bytes_per_vector: int
    speed: float
    retention: float
    cosine: float
    overlap: float


DEMO = (
    DemoVariant("none", 16_781_824, 256, "float32", 1024, 1.01, 1.0, 1.0, 1.0),
    DemoVariant("int8", 13_700_000, 256, "float32", 1024, 1.42, 0.9991, 0.9989, 0.973),
    DemoVariant("gptq-int4", 12_100_000, 256, "float32", 1024, 0.96, 0.9937, 0.9912, 0.921),
    DemoVariant("gptq-int4-pca128", 12_100_000, 128, "float32", 512, 0.95, 0.9841, 0.9912, 0.884),
    DemoVariant("int8-slice64-int8", 13_700_000, 64, "int8", 64, 1.40, 0.9612, 0.9989, 0.801),
    DemoVariant(
        "gptq-int4-slice128-binary", 12_100_000, 128, "binary", 16, 0.94, 0.9423, 0.9912, 0.742
    ),
)
TASKS = (
    ("MiniRetrieval", "Retrieval", "en", "ndcg_at_10", 0.8123),
    ("MiniRetrieval", "Retrieval", "zh", "ndcg_at_10", 0.7741),
    ("MiniSTS", "STS", "default", "cosine_spearman", 0.7218),
    ("MiniIntent", "Classification", "pl", "accuracy", 0.8894),
    ("MiniBitext", "BitextMining", "en-fr", "f1", 0.6502),
)


def test_the_dotted_line_joins_lower_ends_and_not_measured_values(demo: Results) -> None:
    # (MB, lower end of retention): the second is not better than the first of the same size.
    assert pareto_line([(20, 98), (10, 95), (10, 97)], larger_is_better=False) == [
        (10, 97),
        (20, 98),
    ]
    assert pareto_line([(20, 98), (10, 95)], larger_is_better=True) == [(20, 98)]
    # The chart's line joins lower ends: int8 keeps 99.91 %, and at least 98.61 %.
    size = without_plotly(html_page(judged(demo), title="demo")).split('id="chart-size"')[1]
    line = json.loads(re.search(r"\[(\{.*?\}),\{", size)[1])  # type: ignore[index]
    assert line["mode"] == "lines"
    assert line["y"][-1] == pytest.approx(98.7)


def test_the_chart_of_speed_shows_what_was_measured_in_turns(demo: Results) -> None:
    page = without_plotly(html_page(demo, title="demo")).split('id="chart-speed"')[1]
    traces, _ = json.JSONDecoder().raw_decode(page, page.index("[{"))
    shown = {
        trace["name"].split(" (")[0]: trace["x"] for trace in traces if trace["mode"] != "lines"
    }
    assert shown == {
        v.name: [1.0 if v.name == DEMO[0].name else pytest.approx(v.speed)] for v in DEMO
    }


def test_rows_give_the_baseline_first_and_every_ratio_against_it(demo: Results) -> None:
    table_rows = result_rows(demo)
    assert [row.name for row in table_rows] == [variant.name for variant in DEMO]
    for row, variant in zip(table_rows, DEMO, strict=True):
        assert row.weight_ratio == variant.weight_bytes / DEMO[0].weight_bytes
        assert row.speed_ratio == pytest.approx(variant.speed)
        assert row.retention == variant.retention
        assert (row.dims, row.vector_bytes) == (variant.dims, variant.bytes_per_vector)


def test_the_verdict_names_each_broken_limit_in_numbers(demo: Results) -> None:
    verdicts = {row.name: row.verdict for row in result_rows(demo)}
    assert verdicts["gptq-int4-pca128"] == "picked"
    assert verdicts["int8"] == "on the Pareto front"
    assert verdicts["int8-slice64-int8"] == "retention 96.12 % < 97 %"
    assert verdicts["gptq-int4-slice128-binary"] == (
        "retention 94.23 % < 97 %; neighbour overlap was not measured (`gteopt evaluate --out` "
        "measures it), limit 80 %"
    )


@pytest.mark.parametrize("metric", get_args(Metric))
def test_every_metric_that_a_policy_can_limit_has_a_verdict(demo: Results, metric: Metric) -> None:
    assert demo.choice is not None
    broken = BrokenLimit(metric=metric, bound="max", limit=1.0, found=2.0)
    candidates = [c.model_copy(update={"broken": (broken,)}) for c in demo.choice.candidates]
    choice = demo.choice.model_copy(update={"picked": None, "candidates": tuple(candidates)})
    for row in result_rows(demo.model_copy(update={"choice": choice})):
        if row.name in {c.name for c in candidates}:
            limit, value = metric_amount(metric, 1.0), metric_amount(metric, 2.0)
            assert row.verdict == f"{METRIC_WORDS[metric]} {value} > {limit}"


def test_a_variant_without_an_evaluation_has_a_row_without_scores(demo: Results) -> None:
    evals = {name: report for name, report in demo.evals.items() if name not in ("none", "int8")}
    by_name = {row.name: row for row in result_rows(demo.model_copy(update={"evals": evals}))}
    assert by_name["int8"].score is None
    assert by_name["int8"].speed_ratio is not None
    assert by_name["none"].retention == 1.0
    assert by_name["none"].score == demo.evals["none"].score


@pytest.mark.parametrize("width", [100, 120])
def test_the_terminal_table_fits_with_every_name_on_one_line(demo: Results, width: int) -> None:
    text = rendered(demo, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for variant in DEMO:
        assert any(variant.name in line and f"{variant.dims}" in line for line in lines), (
            variant.name
        )
    assert any(line.lstrip().startswith("✓ gptq-int4-pca128 ") for line in lines)
    assert "✗ int8-slice64-int8: retention 96.12 % < 97 %" in text


@pytest.mark.parametrize("width", [200, 80, 60, 40, 32])
def test_a_narrow_terminal_loses_whole_columns_which_are_named_and_no_digit(
    demo: Results, width: int
) -> None:
    text = rendered(demo, width)
    assert max(map(len, text.splitlines())) <= width
    note = " ".join(text.split()).partition("do not fit: ")[2].partition(" (use a wider")[0]
    missing = set(note.split(", ")) - {""}
    assert bool(missing) == (width < 200)
    shown = [c for c in COLUMNS if c.attribute in _IN_TERMINAL and c.title not in missing]
    assert shown
    by_name = {row.name: row for row in result_rows(demo)}
    for name in ("none", "int8", "gptq-int4"):
        line = next(line for line in text.splitlines() if f" {name} " in line)
        assert line.split()[-len(shown) :] == [column.text(by_name[name]) for column in shown]


def test_variants_that_find_no_room_side_by_side_stand_below(demo: Results) -> None:
    text = printed(eval_table(demo.evals), 60)
    assert max(map(len, text.splitlines())) <= 60
    for variant in DEMO:
        assert variant.name in text
        assert f"{TASKS[0][-1] * variant.retention * 100:.2f}" in text


def test_the_bench_table_shows_every_workload_of_every_variant(demo: Results) -> None:
    assert demo.bench is not None
    text = printed(bench_table(demo.bench), 100)
    assert max(map(len, text.splitlines())) <= 100
    for workload in demo.bench.spec.workloads:
        assert f"{workload.batch_size}×{workload.tokens}" in text
    for variant in DEMO:
        line = next(line for line in text.splitlines() if f"{variant.name} " in line)
        assert line.count(f"{31_000 * variant.speed:,.0f}") == len(demo.bench.spec.workloads)


def test_the_evaluation_table_shows_every_task_and_language(demo: Results) -> None:
    evals = {name: demo.evals[name] for name in ("none", "int8", "gptq-int4")}
    text = printed(eval_table(evals), 100)
    assert max(map(len, text.splitlines())) <= 100
    for task, _, subset, _, score in TASKS:
        line = next(
            line for line in text.splitlines() if task in line and f"{score:.2%}"[:-1] in line
        )
        assert subset in line or subset == "default"
        assert f"{score * 0.9991 * 100:.2f}" in line


def test_differences_are_shown_with_their_intervals_and_verdicts(demo: Results) -> None:
    report = demo.evals["int8"]
    difference = ScoreDifference(value=-0.004, low=-0.007, high=-0.001, verdict="worse", p=0.004)
    tasks = [task.model_copy(update={"difference": difference}) for task in report.tasks]
    tasks[0] = tasks[0].model_copy(update={"difference": None, "no_interval": "only 4 queries"})
    judged = report.model_copy(update={"difference": difference, "tasks": tuple(tasks)})
    evals = {**demo.evals, "int8": judged}
    text = printed(eval_table({"int8": judged}), 100)
    assert "-0.40" in text
    assert "[-0.70, -0.10]" in text
    assert text.count(f"{tasks[1].score * 100:.2f} -") == 1
    assert f"no interval of {tasks[0].task} {tasks[0].subset}: only 4 queries" in " ".join(
        text.split()
    )
    page = html_page(demo.model_copy(update={"evals": evals}), title="demo")
    for part in ("-0.40", "[-0.70, -0.10]", "worse"):
        assert f"<small>{part}</small>" in page


def test_a_partial_score_is_marked_in_the_table_and_on_the_page(demo: Results) -> None:
    failed = FailedTask(task="MiniBitext", reason="the data set is damaged")
    partial = demo.evals["int8"].model_copy(update={"partial": True, "failed": (failed,)})
    results = demo.model_copy(update={"evals": {**demo.evals, "int8": partial}})
    sentence = "int8: task MiniBitext failed: the data set is damaged"
    assert sentence in rendered(results, 100)
    assert re.search(r"\d\*", rendered(results, 100))
    page = html_page(results, title="demo")
    assert sentence in page
    assert "Partial evaluation" in page


def judged(demo: Results) -> Results:
    """The demo with an interval of two points around each retention."""
    evals = {}
    for name, report in demo.evals.items():
        value = report.score - report.baseline_score
        assert report.retention is not None
        around = ScoreDifference(
            value=value, low=value - 0.01, high=value + 0.01, verdict="undecided", p=0.3
        )
        evals[name] = report.model_copy(
            update={
                "difference": around,
                "retention_low": report.retention - 0.013,
                "retention_high": report.retention + 0.013,
            }
        )
    return demo.model_copy(update={"evals": evals})


def test_a_retention_never_stands_on_the_page_without_its_interval(demo: Results) -> None:
    page = html_page(judged(demo), title="demo")
    headline = "<b>98.4 %</b> of the baseline’s score (97.1–99.7: undecided)"
    assert headline in page
    assert ">98.4<small>97.1–99.7</small></td>" in page
    assert page.count('"error_y":') == 3 * len(DEMO)


def test_a_variant_far_below_the_others_is_an_arrow_with_its_figure(demo: Results) -> None:
    assert axis_floor([100, 99.9, 99.4, 99.6, 99.8, 65.1]) == 95
    assert axis_floor([100, 96, 95, 92, 90]) < 90
    far = demo.evals["int8"].model_copy(update={"retention": 0.651})
    page = html_page(demo.model_copy(update={"evals": {**demo.evals, "int8": far}}), title="demo")
    assert without_plotly(page).count('"symbol":"triangle-down"') == 3
    assert without_plotly(page).count('"name":"int8 (65.1 %)"') == 3


def test_what_tokens_cost_is_on_the_page(demo: Results) -> None:
    assert demo.bench is not None
    workload = Workload(batch_size=64, tokens=128, lengths="lognormal")
    priced = demo.bench.model_copy(
        update={
            "price_per_hour": 2.0,
            "peak_gflops": {"float32": 420.0},
            "spec": BenchSpec(workloads=(workload,)),
            "variants": {
                name: measured.model_copy(
                    update={
                        "throughput": tuple(
                            record.model_copy(
                                update={
                                    **workload.model_dump(),
                                    "peak_ratio": 0.62,
                                    "gflops": 260.0,
                                }
                            )
                            for record in measured.throughput[:1]
                        )
                    }
                )
                for name, measured in demo.bench.variants.items()
            },
        }
    )
    page = html_page(demo.model_copy(update={"bench": priced}), title="demo")
    # int8: 31,000 * 1.42 tokens/s at 2 dollars an hour; 0.008 dollars a million tokens.
    cells = ("64x~128", "44,020", "1.42", "260", "62%", "0.0126", "1.268")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "float32 420; costs at $2 an hour; an index of a million vectors costs" in page
    assert "hosted price: $0.008 per million tokens" in page
    rent = index_rent(priced, priced.baseline)
    assert rent is not None
    assert f"{rent:.2f} a month in memory" in page
    assert "the deviation of their logarithm is 0.8" in page
    assert f"64x~128 tokens; {priced.spec.repeats} rounds" in page
    assert "64 × 128" not in page


def test_a_page_is_made_of_an_evaluation_or_of_own_texts_alone(demo: Results) -> None:
    page = html_page(demo.model_copy(update={"bench": None}), title="quality only")
    assert "Scores by task" in page
    assert "Speed and cost" not in page
    assert "Not measured (<code>gteopt bench --out</code>)" in page
    report = demo.evals["int8"]
    texts = FidelityReport(
        variant="int8",
        baseline="none",
        texts="mine.txt",
        texts_sha256="7" * 64,
        dims=64,
        code="int8",
        bytes_per_vector=64,
        n_asked_texts=9,
        n_encoded_texts=9,
        notes=("a note of its own",),
        **report.model_dump(
            include={"artifact_sha256", "baseline_sha256", "fidelity", "machine", "versions"}
        ),
    )
    alone = Results(bench=None, evals={}, fidelity={"int8": texts}, choice=None)
    page = html_page(alone, title="own texts")
    assert f"<td>{report.fidelity.neighbour_overlap:.4f}</td>" in page
    assert "1,024 texts of mine.txt, against none" in page
    assert "a note of its own" in page
    assert "Scores by task" not in page


def test_names_and_reasons_are_escaped_everywhere(demo: Results) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    assert demo.bench is not None
    bench = demo.bench.variants["int8"]
    results = demo.model_copy(
        update={
            "bench": demo.bench.model_copy(
                update={"variants": {**demo.bench.variants, evil: bench}}
            ),
            "evals": {**demo.evals, evil: demo.evals["int8"]},
            "choice": None,
        }
    )
    page = html_page(results, title=evil)
    assert evil not in page
    assert "<img" not in without_plotly(page)


def test_the_page_without_plotly_is_small(demo: Results) -> None:
    assert len(without_plotly(html_page(demo, title="demo"))) < 100_000


def test_the_report_is_written_whole_and_holds_the_page(demo: Results, tmp_path: Path) -> None:
    path = write_report(tmp_path, demo, "demo")
    page = html_page(demo, title="demo", folder=str(tmp_path))
    assert path.read_text(encoding="utf-8") == page
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(("n_variants", "width"), [(6, 1280), (2, 500), (30, 1280), (30, 500)])
def test_chromium_renders_every_variant_without_error_or_request(
    n_variants: int, width: int, tmp_path: Path
) -> None:
    results = demo_results(many(n_variants))
    write_report(tmp_path, results, f"{n_variants} variants")
    dom, log, urls = browse(tmp_path / "report.html", width, tmp_path)
    assert "CONSOLE" not in log, log
    assert urls == []
    page = Page()
    page.feed(dom)
    n_charts = 8 if n_variants > 2 else 7  # two variants of one vector size have no index chart
    assert page.n_charts == n_charts
    assert page.n_charts_drawn == n_charts
    names = {variant.name for variant in many(n_variants)}
    assert names <= page.texts


SCRIPT = r"""
const table = document.getElementById("table-variants");
const names = () => [...table.tBodies[0].rows].filter((row) => !row.hidden)
  .map((row) => row.cells[0].dataset.value);
const heading = (title) => [...table.tHead.rows[0].cells]
  .find((cell) => cell.dataset.title.startsWith(title));
const say = (key, value) => document.body.setAttribute("data-" + key, value);
heading("Speed").click(); say("rising", names().join(","));
heading("Speed").click(); say("falling", names().join(","));
const search = document.querySelector(".tools input[type=search]");
search.value = "INT8"; search.dispatchEvent(new Event("input")); say("filtered", names().length);
const link = document.querySelector(".tools a[download]");
link.addEventListener("click", (event) => event.preventDefault()); link.click();
say("csv", decodeURIComponent(link.href.split(",").slice(1).join(",")).split("\r\n").length);
const box = document.querySelector(".tools input[type=checkbox]");
box.checked = false; box.dispatchEvent(new Event("change"));
say("hidden", [...table.rows].every((row) => row.cells[1].hidden));
"""


def test_the_table_sorts_filters_hides_columns_and_saves_what_it_shows(
    demo: Results, tmp_path: Path
) -> None:
    path = write_report(tmp_path, demo, "demo")
    page = path.read_text(encoding="utf-8")
    path.write_text(page.replace("</body>", f"<script>{SCRIPT}</script></body>"), encoding="utf-8")
    dom, log, _ = browse(path, 1280, tmp_path)
    assert "CONSOLE" not in log, log
    shown = dict(re.findall(r'data-(rising|falling|filtered|csv|hidden)="([^"]*)"', dom))
    by_speed = [variant.name for variant in sorted(DEMO, key=lambda variant: variant.speed)]
    assert shown["rising"].split(",") == by_speed
    assert shown["falling"].split(",") == by_speed[::-1]
    matching = [variant.name for variant in DEMO if "int8" in variant.name]
    assert int(shown["filtered"]) == len(matching)
    assert int(shown["csv"]) == len(matching) + 1
    assert shown["hidden"] == "true"


SWITCH = r"""
const menu = document.getElementById("policy");
const table = document.getElementById("table-variants");
const said = {};
const starred = () => document.getElementById("chart-size").data
  .filter((trace) => trace.meta && trace.marker.color === trace.meta.picked[0])
  .map((trace) => trace.meta.variant);
const coloured = () => {
  const [trace] = document.getElementById("chart-mean_cosine").data;
  return trace.meta.variants.filter((_, place) => trace.marker.color[place] === trace.meta.picked);
};
window.addEventListener("load", () => {
  for (const option of menu.options) {
    menu.value = option.value;
    menu.dispatchEvent(new Event("change"));
    said[option.text] = {
      answer: document.querySelector(".answer").innerText,
      limits: document.querySelector("[data-part=limits]").innerText,
      use: document.querySelector("[data-part=use]").innerText,
      rows: [...table.tBodies[0].rows].filter((row) => row.classList.contains("picked"))
        .map((row) => row.cells[0].dataset.value),
      verdicts: Object.fromEntries([...table.tBodies[0].rows]
        .map((row) => [row.cells[0].dataset.value, row.querySelector("th small").innerText])),
      starred: starred(), coloured: coloured(),
    };
  }
  document.body.setAttribute("data-said", JSON.stringify(said));
});
"""


@pytest.fixture
def folder(demo: Results, tmp_path: Path) -> Path:
    """A results folder of the demo, with intervals and without a choice."""
    assert demo.bench is not None
    results = judged(demo)
    write_record(tmp_path / "bench.json", demo.bench)
    for name, report in results.evals.items():
        changes = {"artifact_sha256": "1" * 64} if name == "none" else {}
        write_record(tmp_path / "eval" / f"{name}.json", report.model_copy(update=changes))
    bench = demo.bench.variants
    own_bench = bench["none"].model_copy(update={"artifact_sha256": "1" * 64})
    variants = {**bench, "none": own_bench}
    write_record(tmp_path / "bench.json", demo.bench.model_copy(update={"variants": variants}))
    return tmp_path


def test_switching_the_policy_shows_what_gteopt_choose_picks_by_it(
    folder: Path, tmp_path: Path
) -> None:
    shipped = {name: load_policy(name) for name in list_shipped_names("recipes/policies")}
    judged_by = {name: choose_by_policy(folder, policy) for name, policy in shipped.items()}
    choices = {name: results.choice for name, results in judged_by.items()}
    picks = {name: choice.picked for name, choice in choices.items() if choice is not None}
    assert len(set(picks.values())) >= 3  # else the test could not tell policies apart
    path = write_choice_page(folder, choose_by_policy(folder, shipped["balanced"]))
    page = path.read_text(encoding="utf-8")
    path.write_text(page.replace("</body>", f"<script>{SWITCH}</script></body>"), encoding="utf-8")
    dom, log, urls = browse(path, 1280, tmp_path)
    assert "CONSOLE" not in log, log
    assert urls == []
    by_policy = json.loads(unescape(re.search(r'data-said="([^"]*)"', dom)[1]))  # type: ignore[index]
    assert set(by_policy) == {"balanced (applied)", *picks} - {"balanced"}
    for name, picked in picks.items():
        shown = by_policy["balanced (applied)" if name == "balanced" else name]
        assert shown["rows"] == ([picked] if picked else [])
        assert (picked or "Nothing can be recommended") in shown["answer"]
        assert name in shown["limits"]
        assert shown["starred"] == shown["rows"]
        assert shown["coloured"] == ([picked] if picked not in (None, "none") else [])
        assert bool(shown["use"]) == (picked is not None)
        verdicts = {row.name: row.verdict for row in result_rows(judged_by[name])}
        for row_name, words in verdicts.items():
            assert shown["verdicts"][row_name].endswith(words)


def test_a_policy_that_needs_labels_says_so_on_a_page_without_any(
    demo: Results, tmp_path: Path
) -> None:
    refused = "it asks for the best retention, which needs labels"
    page = html_page(demo, title="demo", others={"most-faithful": refused})
    assert '<option value="1">most-faithful</option>' in page
    assert f"This policy cannot be applied: {refused}" in page
    assert "<select" not in html_page(demo, title="demo").split("<header>")[1].split("</header>")[0]


def two_runs(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of a results folder; in the second, int8 is a fifth smaller and a point worse."""
    monday, friday = tmp_path / "runs" / "monday", tmp_path / "runs" / "friday"
    for copy in (monday, friday):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
    bench = read_record(friday / "bench.json", BenchReport)
    int8 = bench.variants["int8"]
    smaller = int8.model_copy(update={"weight_bytes": round(0.8 * int8.weight_bytes)})
    machine = MACHINE.model_copy(update={"cpu": "Ampere Altra"})
    changed = {"variants": {**bench.variants, "int8": smaller}, "machine": machine}
    write_record(friday / "bench.json", bench.model_copy(update=changed))
    report = read_record(friday / "eval" / "int8.json", EvalReport)
    assert report.retention is not None
    worse = report.model_copy(update={"retention": report.retention - 0.01})
    write_record(friday / "eval" / "int8.json", worse)
    (friday / "eval" / "gptq-int4.json").unlink()
    return monday, friday


def test_a_page_of_two_runs_says_what_changed_and_what_was_not_measured_alike(
    folder: Path, tmp_path: Path
) -> None:
    monday, friday = two_runs(folder, tmp_path)
    choose_by_policy(monday, load_policy("balanced"))
    path = write_comparison_page(monday, friday)
    assert path == monday / "report-beside-friday.html"
    dom, log, urls = browse(path, 1280, tmp_path)
    assert "CONSOLE" not in log, log
    assert urls == []
    assert "policy balanced picks" in dom
    assert "no policy was applied" in dom
    assert f"machines differ: {machine_line(MACHINE)} in monday; " not in dom
    assert "Ampere Altra" in dom
    assert "compare speeds only with the same baseline" in dom
    figures = dom.split('id="figures"')[1].split("</table>")[0]
    of_int8 = figures.split(">int8</th>")[1].split("rowgroup")[0]
    weights = "Weights<small>MB</small></th><td>13.7</td><td>11.0</td><td>-20.0 %</td>"
    assert weights in of_int8
    assert "<td>-1.00 points</td>" in of_int8
    assert "Cosine" not in of_int8  # the cosine did not change
    assert ">none</th>" not in figures
    of_int4 = figures.split(">gptq-int4</th>")[1].split("rowgroup")[0]
    assert f"<small>98.1–100.7</small></td><td>{MISSING}</td><td>{MISSING}</td>" in of_int4
    page = Page()
    page.feed(dom)
    assert page.n_charts == page.n_charts_drawn == 4
    assert {"monday: int8", "friday: int8"} <= page.texts


def test_two_runs_alike_have_nothing_that_differs(folder: Path, tmp_path: Path) -> None:
    runs = [read_results(folder)] * 2
    assert beside.describe_differences(("a", "b"), runs) == []
    page = comparison_page(("a", "b"), runs)
    assert "Measured under different conditions" not in page
    assert "Every figure is the same." in page


def test_the_columns_that_the_policy_decides_by_come_first(demo: Results) -> None:
    page = html_page(demo, title="demo")
    table = page.split('id="table-variants"')[1].split("</thead>")[0]
    titles = re.findall(r'data-title="(\w[\w@]*)', table)
    assert titles[:4] == ["Variant", "Weights", "Retention", "NN@10"]


@pytest.mark.parametrize("n_sizes", [2, 3])
def test_neighbours_by_bytes_are_drawn_where_a_grid_was_scored(demo: Results, n_sizes: int) -> None:
    codes: tuple[tuple[VectorCode, int], ...] = (("float32", 1024), ("int8", 256), ("binary", 32))
    evals = {
        f"int8-256-{code}": demo.evals["int8"].model_copy(
            update={"variant": f"int8-256-{code}", "code": code, "bytes_per_vector": n_bytes}
        )
        for code, n_bytes in codes[:n_sizes]
    }
    page = html_page(Results(bench=None, evals=evals, choice=None), title="grid")
    assert ('id="chart-frontier"' in page) == (n_sizes == 3)


def test_ticks_of_a_logarithmic_axis_do_not_touch() -> None:
    assert thin_ticks([16, 32, 40, 48, 64, 1000, 1024]) == [16, 32, 48, 1000]


def test_the_first_lines_say_what_the_pick_costs(demo: Results) -> None:
    page = html_page(
        demo,
        title="demo",
        artifacts={"gptq-int4-pca128": "out/gptq-int4-pca128"},
        date="2026-01-31",
    )
    header = page.split("<header>")[1].split("</header>")[0]
    assert "Use <b>gptq-int4-pca128</b>. It is slower than the baseline." in header
    assert '<li class="cost"><b>0.95×</b> the baseline’s throughput (0.95–0.95): slower' in header
    assert "Runner-up: gptq-int4" in header
    assert "2026-01-31, AMD EPYC 9B14" in header
    assert "gteopt.load(&quot;out/gptq-int4-pca128&quot;)" in page
    assert "gteopt serve out/gptq-int4-pca128\n" in page


def test_columns_that_hold_nothing_are_not_shown(demo: Results) -> None:
    page = html_page(demo.model_copy(update={"bench": None}), title="quality only")
    table = page.split('id="table-variants"')[1].split("</table>")[0]
    assert "Retention" in table
    assert "p95" not in table


def test_chromium_renders_results_without_choice_and_evaluations(
    demo: Results, tmp_path: Path
) -> None:
    write_report(tmp_path, demo.model_copy(update={"choice": None, "evals": {}}), "speed only")
    dom, log, urls = browse(tmp_path / "report.html", 1280, tmp_path)
    assert "CONSOLE" not in log, log
    assert urls == []
    assert "nothing is recommended" in dom


def test_the_check_for_requests_sees_a_page_that_asks_for_an_image(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>no_such_name</script>')
    _, log, urls = browse(page, 500, tmp_path)
    assert urls == ["http://127.0.0.1:9/x.png"]
    assert "CONSOLE" in log


@pytest.fixture(scope="module")
def demo() -> Results:
    return demo_results(DEMO)


def many(n_variants: int) -> list[DemoVariant]:
    """The first of the demo's variants, or all and more around them, as crowded as real ones."""
    if n_variants <= len(DEMO):
        return list(DEMO[:n_variants])
    extra = [
        dataclasses.replace(
            DEMO[1 + index % 5],
            name=f"mixed-int{2 + index % 7}-g{32 << index % 3}-v{index}",
            weight_bytes=12_000_000 + (index * 7919) % 23 * 90_000,
            speed=0.8 + (index * 31) % 17 / 30,
            retention=0.93 + (index * 13) % 19 / 300,
        )
        for index in range(n_variants - len(DEMO))
    ]
    return [*DEMO, *extra]


def demo_results(variants: tuple[DemoVariant, ...] | list[DemoVariant]) -> Results:
    spec = BenchSpec()
    policy = Policy(
        schema="gteopt.policy/1",
        name="balanced",
        summary="The smallest variant that keeps 97 % of the score.",
        limits={"retention": Limit(min=0.97), "neighbour_overlap": Limit(min=0.8)},
        objective=Objective(minimise="weight_bytes"),
    )
    picked = "gptq-int4-pca128" if len(variants) > 3 else variants[-1].name
    return Results(
        bench=BenchReport(
            spec=spec,
            baseline="none",
            variants={variant.name: variant_bench(variant, spec) for variant in variants},
            device="cpu",
            n_threads=2,
            machine=MACHINE,
            versions=VERSIONS,
        ),
        evals={variant.name: eval_report(variant) for variant in variants},
        choice=Choice(
            policy=policy,
            picked=picked,
            reason=REASON.replace("gptq-int4-pca128", picked),
            candidates=tuple(candidate(variant) for variant in variants),
        ),
    )


def variant_bench(variant: DemoVariant, spec: BenchSpec) -> VariantBench:
    return VariantBench(
        artifact_sha256="0" * 64,
        weight_bytes=variant.weight_bytes,
        load_s=0.31,
        imports_process_bytes=402_000_000,
        peak_process_bytes=402_000_000 + 3 * variant.weight_bytes,
        peak_device_bytes=None,
        latency=LatencyRecord(
            tokens=spec.query_tokens,
            n_queries=spec.n_queries,
            p50_ms=2.91 / variant.speed,
            p95_ms=3.44 / variant.speed,
            p99_ms=5.02 / variant.speed,
        ),
        throughput=tuple(
            ThroughputRecord(
                batch_size=workload.batch_size,
                tokens=workload.tokens,
                texts_per_s=31_000 * variant.speed / workload.tokens,
                tokens_per_s=31_000 * variant.speed,
                baseline_ratio=variant.speed,
                ratios=tuple(variant.speed + place / 1000 for place in (-3, -2, -1, 0, 1, 2, 3)),
            )
            for workload in spec.workloads
        ),
        kernels={"torch.linear": 28} if variant.name == "none" else {"int4": 28},
        dims=variant.dims,
        code=variant.code,
        bytes_per_vector=variant.bytes_per_vector,
        index_bytes_per_million=variant.bytes_per_vector * 1_000_000,
    )


def eval_report(variant: DemoVariant) -> EvalReport:
    baseline = sum(score for *_, score in TASKS) / len(TASKS)
    return EvalReport(
        variant=variant.name,
        artifact_sha256="0" * 64,
        baseline="none",
        baseline_sha256="1" * 64,
        suite="mini",
        suite_sha256="2f" * 32,
        tasks=tuple(
            TaskScore(
                task=task,
                task_type=task_type,
                split="test",
                subset=subset,
                metric=metric,
                score=score * variant.retention,
                baseline_score=score,
                instruction="Retrieve passages that answer the question"
                if task_type == "Retrieval"
                else None,
                dataset_revision="8f3c" * 10,
                n_samples=1120,
            )
            for task, task_type, subset, metric, score in TASKS
        ),
        failed=(),
        partial=False,
        score=baseline * variant.retention,
        baseline_score=baseline,
        retention=variant.retention,
        dims=1024,
        code="float32",
        bytes_per_vector=4096,
        fidelity=Fidelity(
            n_texts=1024,
            mean_cosine=variant.cosine,
            p1_cosine=2 * variant.cosine - 1,
            neighbour_overlap=variant.overlap,
            spearman=0.5 + variant.overlap / 2,
            n_queries=512,
            n_documents=512,
            n_all_documents=512,
        ),
        machine=MACHINE,
        versions=VERSIONS,
    )


def candidate(variant: DemoVariant) -> Candidate:
    broken = []
    if variant.retention < 0.97:
        broken.append(
            BrokenLimit(metric="retention", bound="min", limit=0.97, found=variant.retention)
        )
    if variant.code == "binary":
        broken.append(BrokenLimit(metric="neighbour_overlap", bound="min", limit=0.8, found=None))
    return Candidate(
        name=variant.name,
        metrics={"retention": variant.retention, "weight_bytes": variant.weight_bytes},
        broken=tuple(broken),
        on_pareto_front=not broken and variant.name != "none",
    )


def rendered(results: Results, width: int) -> str:
    return printed(terminal_table(results), width)


def printed(table: Table, width: int) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def without_plotly(page: str) -> str:
    return max(re.split(r"<script>/\*\*.*?</script>", page, flags=re.DOTALL), key=len)


def browse(path: Path, width: int, scratch: Path) -> tuple[str, str, list[str]]:
    """Open a page in headless Chromium.

    Returns:
        The DOM after scripts ran, the browser's log, the network URLs that the page asked for.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser on the PATH, one of: {', '.join(names)}")
    net_log = scratch / "net.json"
    run = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--enable-logging=stderr",
            f"--user-data-dir={scratch / 'profile'}",
            f"--log-net-log={net_log}",
            f"--window-size={width},2400",
            "--virtual-time-budget=8000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # Chromium also asks for updates and for the time. No page is the initiator of these requests.
    events = net_log.read_text().splitlines()
    requests = [event for event in events if '"initiator":' in event]
    from_page = [event for event in requests if '"initiator":"not an origin"' not in event]
    urls = [
        url for event in from_page for url in re.findall(r'"url":"((?:https?|wss?):[^"]*)"', event)
    ]
    return run.stdout, run.stderr, urls


class Page(HTMLParser):
    """Texts and charts of a rendered page."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: set[str] = set()
        self.n_charts = 0
        self.n_charts_drawn = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        kinds = attributes.get("class", "").split()
        self.n_charts += "plotly-graph-div" in kinds
        # The first of the layers that plotly stacks holds the drawn axes and points.
        self.n_charts_drawn += tag == "g" and "cartesianlayer" in kinds

    def handle_data(self, data: str) -> None:
        self.texts.add(data.strip())
