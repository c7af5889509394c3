"""Fill the generated tables of README.md and of the pages in docs/.

    python docs/generate.py           # write them
    python docs/generate.py --check   # exit 1 and name the pages that are out of date

The text between `<!-- table NAME -->` and `<!-- /table -->` of a page is replaced. Figures come
from benchmarks/results, fields from the pydantic types, and recipes from their YAML files.
"""

from __future__ import annotations

import inspect
import json
import re
import runpy
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gteopt.config.plan import ColumnRole, Plan, PlanBench, Screening, Workload
from gteopt.config.policy import Limit, Metric, Objective, Policy, load_policy
from gteopt.config.recipe import (
    Calibration,
    Dims,
    GptqWeights,
    LayerScheme,
    NoWeights,
    Recipe,
    RtnWeights,
    Vectors,
    load_recipe,
)
from gteopt.config.yaml_files import list_shipped_names
from gteopt.evaluation.suites import read_suite
from gteopt.evaluation.task_choice import choose_suite_part, read_task_scores
from gteopt.evaluation.task_facts import read_task_facts, task_amount
from gteopt.model.config_file import attention_of
from gteopt.model.families import FAMILIES, PUBLISHED
from gteopt.speed.random_model import read_model_shapes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Rows = Iterable[Sequence[str]]


def main() -> int:
    """Write all pages, or name the pages that would change."""
    stale = [page for page in PAGES if filled(page) != page.read_text(encoding="utf-8")]
    if "--check" in sys.argv:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date; run `make docs`")
        return bool(stale)
    for page in stale:
        page.write_text(filled(page), encoding="utf-8")
    return 0


def filled(page: Path) -> str:
    """The text of a page with up-to-date tables."""

    def table(marked: re.Match[str]) -> str:
        return marked[1] + TABLES[marked[2]]() + "\n" + marked[3]

    return MARKED.sub(table, page.read_text(encoding="utf-8"))


def markdown(headings: Sequence[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read(name: str) -> Any:
    """The content of one file of benchmarks/results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# Figures ------------------------------------------------------------------------------------------

_PEERS_4_BITS = (
    "llm-compressor GPTQ W4A16_ASYM",
    "llm-compressor GPTQ W4A16",
    "optimum GPTQ 4-bit asym",
    "bitsandbytes nf4",
)
_PEERS_8_BITS = ("llm-compressor GPTQ W8A8", "torchao W8A8", "torch dynamic W8A8")
PEER_RATIOS = (  # recipe, row in peers_quality, rows of the peers
    ("gptq-int4", "gteopt gptq-int4", _PEERS_4_BITS),
    ("gptq-nf4", "gteopt gptq-nf4", _PEERS_4_BITS),
    ("mixed-nf4", "gteopt mixed-nf4", _PEERS_4_BITS),
    ("mixed-nf4 standard", "gteopt mixed-nf4 standard", _PEERS_4_BITS),
    ("int8", "gteopt int8", _PEERS_8_BITS),
    ("int8-static", "gteopt int8-static", _PEERS_8_BITS),
    ("fp8", "gteopt fp8", _PEERS_8_BITS),
)
MINILM_ROWS = (  # name in the README, row in peers_quality, row in peers_speed
    ("bf16", None, "gteopt bf16"),
    ("bf16, OpenVINO", None, "gteopt bf16, OpenVINO"),
    ("`int8`, OpenVINO", "gteopt int8", "gteopt int8, OpenVINO"),
    ("`int8-static`, OpenVINO", "gteopt int8-static", "gteopt int8-static, OpenVINO"),
    ("`mixed-nf4`", "gteopt mixed-nf4", None),
    ("`gptq-nf4`", "gteopt gptq-nf4", None),
    ("`gptq-int4`, OpenVINO", "gteopt gptq-int4", "gteopt 4-bit, OpenVINO"),
    ("`rtn-int4`", "gteopt rtn-int4", None),
    ("*llm-compressor GPTQ, 4 bits*", "llm-compressor GPTQ W4A16_ASYM", None),
    ("*torchao W8A8, compiled*", "torchao W8A8", "torchao int8 dynamic, compiled"),
    ("*bitsandbytes NF4*", "bitsandbytes nf4", "bitsandbytes nf4"),
    ("*OpenVINO int8 (NNCF)*", None, "OpenVINO int8"),
)


def minilm() -> str:
    """Quality and speed of all-MiniLM-L6-v2 on one processor, with peers in italics."""
    quality = {
        row["peer"]: row
        for row in read("peers_quality")["rows"]
        if row["model"] == "all-MiniLM-L6-v2"
    }
    speed = {row["engine"]: row for row in read("peers_speed_cpu_minilm")["rows"]}
    query = speed["sentence-transformers fp32"]["timings"]["query"]["seconds"]
    rows = [
        [
            "*sentence-transformers, float32*",
            "32",
            "0",
            "0",
            "100 %",
            "1.00",
            f"{1000.0 * query:.1f} ms",
        ]
    ]
    for label, of_quality, of_speed in MINILM_ROWS:
        cells = ["16" if "bf16" in label else "–", "–", "–", "–", "–", "–"]
        if of_quality:
            quality_row = quality[of_quality]
            cells[:4] = [f"{quality_row['bits_per_weight']:.2f}", *quality_cells(quality_row)]
        if of_speed:
            timings = speed[of_speed]["timings"]
            if not of_quality:
                cells[1] = f"{1 - speed[of_speed]['cosine']:.5f} †"
            cells[4:] = [
                f"{timings['bulk']['ratio']:.2f}",
                f"{1e3 * timings['query']['seconds']:.1f} ms",
            ]
        rows.append([label, *cells])
    return markdown(
        (
            "variant",
            "bits",
            "1 − cosine",
            "worst kind",
            "10 nearest kept",
            "bulk speed",
            "one query",
        ),
        rows,
    )


def quality_cells(row: dict[str, Any]) -> list[str]:
    """Mean error over kinds of text, that of the worst kind, and neighbours kept."""
    return [
        f"{row['mean']:.5f}",
        f"{row['worst']:.5f}",
        f"{100 * row['neighbour_overlap']:.1f} %",
    ]


def peers_quality() -> str:
    """All quantizers on both models, grouped by bits and sorted by error."""
    models = ("all-MiniLM-L6-v2", "gte-nano")
    by_peer: dict[str, dict[str, Any]] = {}
    for row in read("peers_quality")["rows"]:
        by_peer.setdefault(row["peer"], {})[row["model"]] = row
    measured: list[tuple[int, float, list[str]]] = []
    for peer, by_model in by_peer.items():
        built = [row for row in by_model.values() if not row["error"]]
        if not built:
            continue
        bits = max(row["bits_per_weight"] for row in built)
        cells = [peer, f"{bits:.2f}"]
        for model in models:
            row = by_model.get(model)
            if row is None:
                cells += ["–", "–", "–", "–"]
            elif row["error"]:
                cells += ["fails", "–", "–", "–"]
            else:
                cells += [*quality_cells(row), f"{row['cpu_s']:.0f} s"]
        group = 0 if bits > 6 else 1 if bits >= 4 else 2
        first = by_model.get(models[0]) or by_model[models[1]]
        measured.append((group, first["mean"] or 0, cells))
    rows = [cells for *_, cells in sorted(measured, key=lambda entry: entry[:2])]
    columns = ("worst kind", "nearest kept", "CPU time")
    return markdown(
        ("variant", "bits", "MiniLM: 1 − cosine", *columns, "gte-nano: 1 − cosine", *columns), rows
    )


def peers_ratios() -> str:
    """The error of each recipe as a share of the best peer's with as many bits of activations."""
    rows = []
    for label, ours, of_peers in PEER_RATIOS:
        cells = [f"`{label}`"]
        for model in ("all-MiniLM-L6-v2", "gte-nano"):
            by_peer = {r["peer"]: r for r in read("peers_quality")["rows"] if r["model"] == model}
            peers = [by_peer[peer] for peer in of_peers if not by_peer[peer]["error"]]
            for field in ("mean", "worst"):
                best = min(row[field] for row in peers)
                cells.append(f"{by_peer[ours][field] / best:.2f}" if ours in by_peer else "–")
        rows.append(cells)
    return markdown(("recipe", "MiniLM: mean", "worst kind", "gte-nano: mean", "worst kind"), rows)


def calibration() -> str:
    """Errors by calibration texts, on kinds of text from other sources."""
    rows = [
        (
            row["model"],
            row["calibration"],
            f"{row['n_tokens']:,}",
            f"{row['mean']:.5f}",
            f"{row['worst']:.5f}",
            max(row["errors"], key=row["errors"].get),
            f"{row['cpu_s']:.0f} s",
        )
        for row in read("calibration_curve")["rows"]
    ]
    return markdown(
        ("model", "calibrated on", "tokens", "mean of kinds", "worst kind", "which", "CPU time"),
        rows,
    )


def failures() -> str:
    """Peers that failed on a model, with the first words of their errors."""
    return markdown(
        ("peer", "model", "what it said"),
        [
            (row["peer"], row["model"], f"`{' '.join(row['error'].split())[:90]}`")
            for row in read("peers_quality")["rows"]
            if row["error"]
        ],
    )


def new_language() -> str:
    """The error of recipes that were calibrated without three languages."""
    rows = [
        (
            row["model"],
            f"`{row['recipe']}`",
            row["setting"],
            "–" if row["n_static"] == 0 else f"{row['n_static']} of {row['n_layers']}",
            f"{row['errors']['sentences']:.5f}",
            f"{row['errors']['fr, pl, zh']:.5f}",
            f"{row['errors']['zh questions']:.5f}",
            f"{row['mean']:.5f}",
            f"{row['worst']:.5f}",
        )
        for row in read("robustness")["rows"]
        if row["calibration"].endswith("no fr, no pl, no zh")
    ]
    heads = ("sentences", "fr, pl, zh", "zh questions", "mean of kinds", "worst kind")
    return markdown(("model", "recipe", "setting", "static", *heads), rows)


def gptaq() -> str:
    """The error by the share of GPTAQ's correction, with all of the built-in languages."""
    shares = {"GPTAQ 0": "0", "GPTAQ 0.25": "0.25", "as it is": "0.5", "GPTAQ 0.75": "0.75"}
    return _by_setting("share of GPTAQ", shares)


def row_feedback() -> str:
    """The error by the share of the correlations that rows are corrected by."""
    shares = ("0", "0.25", "0.5", "0.75")
    settings = {
        "as it is" if share == "0.5" else f"row feedback {share}": share for share in shares
    }
    return _by_setting("row feedback", settings)


def _by_setting(heading: str, shares: Mapping[str, str]) -> str:
    """Errors of `gptq-int4` by setting, on the kinds of text that are judged."""
    found = {
        (row["model"], row["setting"]): row
        for row in read("robustness")["rows"]
        if row["recipe"] == "gptq-int4" and row["calibration"] == "builtin, 256 texts"
    }
    rows = [
        (model, share, *(f"{found[model, setting][field]:.5f}" for field in ("mean", "worst")))
        for model in ("all-MiniLM-L6-v2", "gte-nano")
        for setting, share in shares.items()
    ]
    return markdown(("model", heading, "mean of kinds", "worst kind"), rows)


def ablation() -> str:
    """Errors and build times as parts of the method are added."""
    by_parts: dict[str, dict[str, Any]] = {}
    for row in read("ablation")["rows"]:
        by_parts.setdefault(row["parts"], {})[row["model"]] = row
    rows = []
    for parts, by_model in by_parts.items():
        bits = max(row["bits_per_weight"] for row in by_model.values())
        cells = [parts, f"{bits:.2f}"]
        for model in ("all-MiniLM-L6-v2", "gte-nano"):
            row = by_model.get(model)
            cells += (
                ["–", "–"] if row is None else [f"{row['error']:.5f}", f"{row['build_s']:.0f} s"]
            )
        rows.append(cells)
    return markdown(
        ("parts", "bits", "MiniLM: 1 − cosine", "build", "gte-nano: 1 − cosine", "build"), rows
    )


def speed(name: str) -> Callable[[], str]:
    """A table of engines on one model and processor."""

    def table() -> str:
        rows = []
        for row in read(f"peers_speed_cpu_{name}")["rows"]:
            bulk, query = row["timings"]["bulk"], row["timings"]["query"]
            weights = row.get("weight_bytes")
            rows.append(
                (
                    row["engine"],
                    f"{row['cosine']:.4f}",
                    f"{bulk['ratio']:.2f}",
                    f"{bulk['gflops']:.0f}",
                    f"{query['ratio']:.2f}",
                    f"{query['seconds'] * 1e3:.1f} ms",
                    f"{weights / 1e6:.1f} MB" if weights else "–",
                )
            )
        headings = ("engine", "cosine", "bulk: speed", "bulk: GFLOP/s", "query: speed")
        return markdown((*headings, "query: time", "weights"), rows)

    return table


def speed_makers() -> str:
    """Speed of all-MiniLM-L6-v2 on processors of two makers, relative to float32 in its run."""
    amd = {row["engine"]: row["timings"] for row in read("peers_speed_cpu_minilm")["rows"]}
    rows = []
    for row in read("peers_speed_cpu_amx")["rows"]:
        both = (amd[row["engine"]], row["timings"])
        cells = [f"{timings[load]['ratio']:.2f}" for load in ("bulk", "query") for timings in both]
        rows.append((row["engine"], *cells))
    headings = ("bulk: AMD", "bulk: Intel", "query: AMD", "query: Intel")
    return markdown(("engine", *headings), rows)


def speed_kernels() -> str:
    """Number types with the usual products, and with those that were chosen by measuring."""
    models = {"minilm": "MiniLM", "qwen2": "Qwen2"}
    by_name = {(row["model"], row["engine"]): row for row in read("kernels_cpu")["rows"]}
    rows = []
    for (model, engine), usual in by_name.items():
        measured = by_name.get((model, f"{engine}, measured"))
        if measured is None:
            continue
        cells = [models[model], engine.removeprefix("gteopt ")]
        for load in ("query", "bulk"):
            cells += [
                f"{row['timings'][load]['seconds'] * 1e3:.1f} ms" for row in (usual, measured)
            ]
        cells += [f"{row['weight_bytes'] / 1e6:.0f} MB" for row in (usual, measured)]
        rows.append(cells)
    headings = [
        f"{what}{chosen}" for what in ("query", "bulk", "weights") for chosen in ("", ", measured")
    ]
    return markdown(("model", "number type", *headings), rows)


def speed_threads() -> str:
    """What a second thread gains, beside what a second process gains on the same machine."""
    rows = [
        (
            row["model"].split(",")[0].split(" with")[0],
            row["engine"],
            f"{row['one_s']:.2f} s",
            f"{row['two_s']:.2f} s",
            f"{row['thread_gain']:.2f}",
            f"{row['machine_gain']:.2f}",
        )
        for row in read("threads")["rows"]
    ]
    headings = ("one thread", "two threads", "times", "two processes: times")
    return markdown(("model", "engine", *headings), rows)


def solver_peers() -> str:
    """Solvers of gteopt and of other libraries on one problem."""
    rows = [
        (
            row["solver"],
            row["shape"].replace("x", " × "),
            f"{row['statistics_cpu_s']:.2f} s",
            f"{row['solve_cpu_s']:.2f} s",
            f"{row['output_snr_db']:.2f} dB",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
        )
        for row in read("solver")["peers"]["rows"]
        if row["solver"] != "now"
    ]
    headings = ("solver", "outputs × inputs", "Hessian", "solve", "signal to noise", "peak memory")
    return markdown(headings, rows)


def peaks() -> str:
    """Operations a second of the best large product, by number type and run."""
    runs = ("minilm", "qwen2", "avx2")
    by_run = {run: read(f"peers_speed_cpu_{run}")["peaks_gflops"] for run in runs}
    return markdown(
        ("product", *(f"{run} run, GFLOP/s" for run in runs)),
        [(kind, *(f"{by_run[run][kind]:.0f}" for run in runs)) for kind in by_run["minilm"]],
    )


def vector_codes() -> str:
    """Neighbours kept at equal bytes: gteopt's code, and the best code of each other library."""
    rows = read("vector_codes")["rows"]
    cells = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    pairs = {(models.index(row["model"]), row["n_bytes"]) for row in rows}
    for model, n_bytes in [(models[number], size) for number, size in sorted(pairs)]:
        best: dict[str, Any] = {}
        for row in rows:
            if (row["model"], row["n_bytes"]) == (model, n_bytes):
                if row["neighbours_kept"] > best.get(row["by"], row)["neighbours_kept"]:
                    best[row["by"]] = row
                best.setdefault(row["by"], row)
        ours = best["gteopt"]
        line = [model, str(n_bytes), ours["code"], f"**{ours['neighbours_kept']:.3f}**"]
        for by in ("faiss", "sentence-transformers"):
            peer = best.get(by)
            line.append(f"{peer['neighbours_kept']:.3f} ({peer['code']})" if peer else "")
        limit = best.get("Gaussian limit")
        line.append(f"{limit['neighbours_kept']:.3f}" if limit else "")
        cells.append([*line, f"{ours['ndcg_at_10']:.3f}"])
    headings = (
        "vectors",
        "bytes",
        "gteopt stores",
        "gteopt",
        "faiss, best",
        "sentence-transformers, best",
        "ideal code",
    )
    return markdown((*headings, "nDCG@10"), cells)


def vector_margin() -> str:
    """Lead over sentence-transformers' codes: of gteopt's codes, and of an ideal code."""
    cells = []
    rows = read("vector_codes")["rows"]
    sizes = sorted({row["n_bytes"] for row in rows if row["by"] != "gteopt"})
    for n_bytes in sizes:
        for model in dict.fromkeys(row["model"] for row in rows):
            size_rows = [row for row in rows if (row["model"], row["n_bytes"]) == (model, n_bytes)]
            kept = {
                by: 100 * max(row["neighbours_kept"] for row in size_rows if row["by"] == by)
                for by in ("gteopt", "sentence-transformers", "Gaussian limit")
            }
            peer = kept["sentence-transformers"]
            ahead, most = kept["gteopt"] - peer, kept["Gaussian limit"] - peer
            cells.append((str(n_bytes), model, f"{ahead:.1f}", f"{most:.1f}"))
    return markdown(("bytes", "vectors", "points ahead", "an ideal code"), cells)


def grid() -> str:
    """Scores and neighbours over lengths and codes."""
    by_name = {row["name"]: row for row in read("grid")["rows"]}
    rows = []
    for dims in (256, 128, 64, 32):
        for code in ("float32", "int8", "binary"):
            of_row = [by_name[f"{name}-{dims}-{code}"] for name in ("nano", "int8", "gptq-int4")]
            cells = [str(dims), code, f"{of_row[0]['bytes_per_vector']:,}"]
            for row in of_row:
                cells += [
                    f"{100 * row['score']:.2f} {row['verdict']}",
                    f"{100 * row['neighbour_overlap']:.1f} %",
                ]
            rows.append(cells)
    return markdown(
        (
            "dims",
            "code",
            "bytes",
            "gte-nano: score",
            "nearest kept",
            "`int8`: score",
            "nearest kept",
            "`gptq-int4`: score",
            "nearest kept",
        ),
        rows,
    )


PUBLISHED_RETENTION = (
    (
        "Qwen3-Embedding-4B",
        "W4A16, GPTQ, groups of 128",
        "float32",
        99.28,
        "its model page, C-MTEB",
    ),
    (
        "Octen-Embedding-4B",
        "int8",
        "float32, 1,024 dims",
        99.28,
        "paired from published MTEB results",
    ),
    ("EmbeddingGemma-300m", "Q8_0, quantization-aware", "float32", 99.64, "its card, MTEB v2"),
    ("EmbeddingGemma-300m", "Q4_0, quantization-aware", "float32", 99.13, "its card, MTEB v2"),
    ("voyage-3.5", "as served", "int8", 100.4, "paired from published MTEB results"),
    ("voyage-3.5", "as served", "binary", 94.0, "paired from published MTEB results"),
    ("Cohere embed-v4", "as served", "int8", 100.1, "paired from published MTEB results"),
    ("Cohere embed-v4", "as served", "binary", 95.2, "paired from published MTEB results"),
)
"""Model, weights, vectors, retention in percent, and source."""


def retention() -> str:
    """Retention of recipes and codes on two models, and published retention of other models."""
    rows = []
    for row in read("retention")["rows"]:
        kept = row["retention"], row["retention_low"], row["retention_high"]
        if None in kept or (row["recipe"], row["code"]) == ("base", "float32"):
            continue
        recipe = "float32" if row["recipe"] == "base" else f"`{row['recipe']}`"
        rows.append(_retained(row["model"], recipe, row["code"], kept, row, "eight tasks"))
    rows += [
        [f"*{model}*", weights, code, f"{kept:g} %", "–", "–", source]
        for model, weights, code, kept, source in PUBLISHED_RETENTION
    ]
    headings = ("model", "weights", "vectors", "score kept", "95 % interval", "nearest kept")
    return markdown((*headings, "where"), rows)


def _retained(
    model: str,
    weights: str,
    code: str,
    kept: tuple[float, float, float],
    row: dict[str, Any],
    where: str,
) -> list[str]:
    """A row of `retention`; `kept` is the share of the score and the ends of its interval."""
    value, low, high = (100 * share for share in kept)
    neighbours = f"{100 * row['neighbour_overlap']:.1f} %"
    interval = f"{low:.2f} to {high:.2f}"
    return [model, weights, code, f"{value:.2f} %", interval, neighbours, where]


def grid_time() -> str:
    """CPU time of the grid in one run, and in separate runs of plain mteb."""
    result = read("grid")
    return markdown(
        ("run", "CPU time", "texts encoded", "encodings saved"),
        [
            (
                "one run of `gteopt evaluate`",
                f"{result['grid']['cpu_s']:,.0f} s",
                f"{result['n_texts']:,}",
                f"{result['n_saved']:,}",
            ),
            (
                f"{result['plain_rows']} runs of plain mteb, predicted from {len(result['plain'])}",
                f"{result['plain_cpu_s']:,.0f} s ({result['speedup_cpu']:.1f} times)",
                "–",
                "–",
            ),
        ],
    )


def builds() -> str:
    """Builds of published shapes: time, memory, and predicted memory."""
    rows = []
    for row in read("scale")["builds"]:
        beyond = row["peak_bytes"] - row["imports_bytes"]
        strength = row.get("gptaq_strength", row.get("compensate"))
        rows.append(
            (
                f"`{row['recipe']}`, GPTAQ {strength:g}"
                + (f", rows {row['row_feedback']:g}" if row.get("row_feedback") else ""),
                f"{_SHAPES[row['shape']['hidden']]}, {row['shape']['layers']} layers",
                f"{row['n_texts']} × {row['max_tokens']}",
                row["machine"]["cpu"].removeprefix("AMD "),
                str(row["n_threads"]),
                f"{row['seconds']:,.0f} s",
                f"{row['cpu_seconds']:,.0f} s",
                f"{beyond / 1e9:.2f} GB",
                f"{row['predicted_bytes'] / 1e9:.2f} GB",
            )
        )
    headings = ("recipe", "shape", "texts × tokens", "processor", "threads", "wall", "CPU")
    return markdown((*headings, "memory beyond imports", "predicted"), rows)


_SHAPES = {1536: "1.5B", 3584: "7B"}
"""Name of the gte-Qwen2, by hidden size."""


def build_times() -> str:
    """Predicted CPU seconds of builds beside measured ones."""
    rows = []
    for row in read("scale")["builds"]:
        if "predicted_s" not in row:
            continue
        predicted = row["predicted_s"] * row["machine"]["n_cores"]
        rows.append(
            (
                f"`{row['recipe']}`",
                f"{_SHAPES[row['shape']['hidden']]}, {row['shape']['layers']} layers",
                f"{row['n_tokens']:,}",
                f"{predicted:,.0f} s",
                f"{row['cpu_seconds']:,.0f} s",
            )
        )
    return markdown(("recipe", "shape", "calibration tokens", "predicted CPU", "CPU"), rows)


def whole() -> str:
    """A build of all blocks of the gte-Qwen2-7B shape, beside the predictions of `inspect`."""
    results = read("whole")
    predicted = results["inspected"]["estimate"]
    lives = [life["events"] for life in results["lives"]]
    last = [events[-1] for events in lives]
    # A block that is kept is read within a second; a block that is made takes minutes.
    steps = [event["wall_s"] for event in lives[-1] if event["what"].startswith("quantizing")]
    n_kept = sum(later - earlier < 1 for earlier, later in pairwise(steps))
    n_found = results["lives"][-1]["blocks_found"]
    loaded, encoded = results["loaded"][1:]
    seconds = sum(event["wall_s"] for event in last) + results["kill"]["after_s"]
    cpu_seconds = sum(event["cpu_s"] for event in last)
    peak = max(event["peak_bytes"] for event in last)
    rows = [
        ("wall time with the killed minute", f"{seconds:,.0f} s", f"{predicted['build_s']:,.0f} s"),
        ("CPU time", f"{cpu_seconds:,.0f} s", "–"),
        ("peak memory", f"{peak / 1e9:.2f} GB", f"{predicted['build_bytes'] / 1e9:.2f} GB"),
        (
            "weight files",
            f"{results['sizes']['weight_files_bytes'] / 1e9:.3f} GB",
            f"{predicted['weight_bytes'] / 1e9:.3f} GB",
        ),
        ("blocks kept after the kill", f"{n_kept} of {n_found}", "all"),
        ("load of the artifact", f"{loaded['wall_s'] - results['loaded'][0]['wall_s']:.1f} s", "–"),
        (
            f"first text, {encoded['n_tokens']} tokens",
            f"{encoded['wall_s'] - loaded['wall_s']:.1f} s",
            "–",
        ),
    ]
    return markdown(("", "measured", "`inspect`"), rows)


def loads() -> str:
    """Load times of eight gte-Qwen2-1.5B blocks from disks of several speeds."""
    rows = []
    for row in read("scale")["load"]["rows"]:
        disk = "as it is" if row["disk_gb_s"] is None else f"{row['disk_gb_s']:g} GB/s"
        rows.append(
            (
                f"`{row['recipe']}`",
                row["backend"],
                "in memory" if row["cache"] == "warm" else disk,
                f"{row['read_s']:.2f} s",
                f"{row['load_s']:.2f} s",
                f"{row['first_vector_s']:.2f} s",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
            )
        )
    headings = ("recipe", "backend", "disk", "files alone", "load", "first vector")
    return markdown((*headings, "peak beyond imports"), rows)


def serving() -> str:
    """Medians over rounds for each server, by model and threads."""

    def ms(value: float | None) -> str:
        return "–" if value is None else f"{value:,.0f} ms"

    parts = ("run", "run_qwen2", "run_qwen2_one_thread")
    models = ("MiniLM, 1 thread", "Qwen2 shape, 2 threads", "Qwen2 shape, 1 thread")
    rows = [
        (
            model,
            name,
            f"{row['share_of_offline']:.2f}",
            ms(row["query_alone_p50_ms"]),
            ms(row["query_under_bulk_p50_ms"]),
            ms(row["query_under_bulk_p95_ms"]),
            ms(row["batch_ms"]),
            f"{row['cpu_outside_busiest_thread']:.0%}",
        )
        for part, model in zip(parts, models, strict=True)
        for name, row in read("serving")[part]["medians"].items()
    ]
    headings = ("model", "server", "bulk, share of offline `encode`", "query alone, p50")
    under = ("under bulk, p50", "p95", "`batch_ms`", "CPU outside the busiest thread")
    return markdown((*headings, *under), rows)


def soaked() -> str:
    """Answers and memory of a server under many requests, some of which hung up."""
    rows = []
    for texts, part in (("short", "soak"), ("of all lengths", "soak_mixed")):
        soak = read("serving")[part]
        rows.append(
            (
                texts,
                *(f"{soak[name]:,}" for name in ("answered", "wrong", "lost", "failed")),
                f"{soak['dropped']:,}",
                f"{soak['seconds']:,.0f} s",
                f"{soak['memory_mb'][-1][1]:,.0f} MB",
                f"{soak['memory_growth_after_two_minutes']:.1%}",
            )
        )
    headings = ("texts", "answered", "wrong", "lost", "failed", "hung up on", "time")
    return markdown((*headings, "memory at the end", "growth after two minutes"), rows)


def device_share() -> str:
    """CPU time of a server outside the thread that computes."""
    result = read("serving")["cpu_wide"]
    row = (
        result["model"],
        f"{result['texts']:,}",
        f"{result['bytes_per_text']:,}",
        f"{result['device_thread_cpu_s']:.1f} s",
        f"{result['other_threads_cpu_s']:.1f} s",
        f"{result['share_outside_device_thread']:.1%}",
    )
    headings = ("model", "texts", "bytes a text in base64", "CPU of the device thread")
    return markdown((*headings, "of the others", "share of the others"), [row])


def embedded() -> str:
    """Costs of `gteopt embed` beside the model, and results of jobs that were killed."""
    results = read("embedding")
    resumed, killed, runs = results["resume"], results["kills"], results["memory"]["runs"]
    runs_of = [results["throughput"], results["throughput_qwen2"]]
    kills = ", ".join(f"{n} {who}" for who, n in sorted(killed["n_kills"].items()))
    rows = [
        (
            f"to find {resumed['n_shards']:,} shards done",
            f"{resumed['processor_seconds']:.1f} s of CPU, {resumed['seconds']:.1f} s in all",
        ),
        (
            f"{sum(killed['n_kills'].values())} times SIGKILL at random moments ({kills})",
            f"{killed['n_jobs']} jobs, {killed['n_folders_that_differ']} folders differ, "
            f"{killed['n_finished_shards_embedded_again']} finished shards embedded again",
        ),
        (
            "peak memory of " + " and ".join(f"{run['rows']:,}" for run in runs) + " rows",
            " and ".join(f"{run['peak_mb']:,.0f} MB" for run in runs),
        ),
        *(
            (
                f"time of {SHOWN_PEERS[name]} / that of `embed`: MiniLM and a Qwen2 shape",
                " and ".join(f"{run['embed_to_others'][name]:.2f}" for run in runs_of),
            )
            for name in SHOWN_PEERS
        ),
    ]
    for name in sorted(name for name in results if name.partition("_")[0] == "share"):
        share = results[name]
        took = share["beside_the_model_us_per_text"]
        times = f"{took:,.0f} µs of {share['encode_us_per_text'] + took:,.0f} µs a text"
        label = f"CPU beside the model ({share['model']})"
        rows.append((label, f"{times}: {share['share_without_noise']:.2%} of `encode`"))
    return markdown(("what", "measured"), rows)


SHOWN_PEERS = {
    "encode": "gteopt's `encode` of the same texts in memory",
    "st_encode_save": "sentence-transformers' `encode` and `numpy.save`",
    "st_multi_process_save": "its pool of one process and `numpy.save`",
    "datasets_map": "`datasets.map` around its `encode`",
    "ray_data": "Ray Data around its `encode`",
}
"""Other ways to embed a corpus, and how the table names them."""


def long_texts() -> str:
    """Memory and time of single long texts."""
    return markdown(
        ("tokens of one text", "memory beyond the model", "CPU time"),
        [
            (f"{t['n_tokens']:,}", f"{t['peak_bytes'] / 1e9:.2f} GB", f"{t['cpu_seconds']:.0f} s")
            for t in read("scale")["long"]["texts"]
        ],
    )


def machines() -> str:
    """Where each results file was measured."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        first = (results.get("rows") or results.get("builds") or [{}])[0]
        machine = results.get("machine") or first.get("machine")
        versions = results.get("versions") or first.get("versions") or {}
        if not machine:
            continue
        names = ("torch", "transformers", "sentence-transformers", "openvino")
        libraries = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
        threads = (
            results.get("n_threads") or first.get("n_threads") or versions.get("torch_threads")
        )
        rows.append(
            (
                f"[{path.name}](../benchmarks/results/{path.name})",
                machine["cpu"],
                str(threads or "–"),
                machine["gpu"] or "none",
                libraries or "not known",
            )
        )
    return markdown(("file", "processor", "threads", "GPU", "versions"), rows)


def budget() -> str:
    """Error of the predicted score, by suite and time budget."""
    rows = []
    for name in sorted(read_task_scores()):
        suite = read_suite(name)
        amounts = {task.task: task_amount(task, 512) for task in suite.tasks}
        seconds = {task: amount.n_tokens / 5000 for task, amount in amounts.items() if amount}
        cells = []
        for minutes in (2, 10, 30, 120):
            stands = choose_suite_part(suite, seconds, 60.0 * minutes).stands_for
            cells.append(f"{100 * stands.error:.1f} ({len(stands.weights)})" if stands else "all")
        rows.append([f"`{name}`", *cells])
    return markdown(["suite", "2 min (tasks)", "10 min", "30 min", "2 h"], rows)


def coverage() -> str:
    """How often intervals contain the true difference."""
    return markdown(
        ("scores", "units", "evaluations", "covered"),
        [
            (c["case"], str(c["n_units"]), str(c["n_repeats"]), f"{c['covered']:.1%}")
            for c in read("error_rates")["coverage"]
        ],
    )


def false_equivalence() -> str:
    """Share of tables with a false equivalence, with and without the correction."""
    return markdown(
        ("rows of the table", "tables", "family-wise", "per row"),
        [
            (
                str(t["n_rows"]),
                f"{t['n_tables']:,}",
                f"{t['tables_family']:.1%}",
                f"{t['tables_row']:.1%}",
            )
            for t in read("error_rates")["false_equivalence"]
        ],
    )


def equivalence_cost() -> str:
    """Share of equal rows that are called equivalent, with and without the correction."""
    return markdown(
        ("rows of the table", "standard error / margin", "family-wise", "per row"),
        [
            (
                str(t["n_rows"]),
                f"{t['standard_error'] / 0.01:.1f}",
                f"{t['rows_family']:.0%}",
                f"{t['rows_row']:.0%}",
            )
            for t in read("error_rates")["cost"]
        ],
    )


def agreement() -> str:
    """Numbers of scores, and of scores with an interval, by type of task."""
    result = read("synthetic_suite")
    without = Counter(read_task_facts()[task].kind for task in result["without_interval"])
    return markdown(
        ("type of task", "scores", "with entries that give mteb's score again, and an interval"),
        [(kind, str(n), str(n - without[kind])) for kind, n in result["n_rows_by_kind"].items()],
    )


def beside_mteb() -> str:
    """Greatest difference between gteopt's and plain mteb's scores, by type of task."""
    rows = read("agreement")["rows"]
    cells = []
    for kind in sorted({row["kind"] for row in rows}):
        kind_rows = [row for row in rows if row["kind"] == kind]
        most = max(abs(row["gteopt"] - row["plain_mteb"]) for row in kind_rows)
        n_tasks = len({row["task"] for row in kind_rows})
        cells.append((kind, str(n_tasks), str(len(kind_rows)), f"{most:.1e}" if most else "0"))
    headings = ("type of task", "tasks", "scores", "greatest difference of a score, 0 to 1")
    return markdown(headings, cells)


# What a user writes -------------------------------------------------------------------------------

HOMES = {  # page and heading with the table of a type
    "NoWeights": "recipes.md#weights",
    "RtnWeights": "recipes.md#weights",
    "GptqWeights": "recipes.md#weights",
    "LayerScheme": "recipes.md#scheme",
    "Calibration": "recipes.md#calibration",
    "Dims": "recipes.md#dims-and-vectors",
    "Vectors": "recipes.md#dims-and-vectors",
    "PlanBench": "plans.md#every-field",
    "Workload": "plans.md#every-field",
    "Screening": "plans.md#every-field",
    "Policy": "choosing.md#your-own",
    "Limit": "choosing.md#your-own",
    "Objective": "choosing.md#your-own",
}
UNITS = {
    "bits": "bits a weight",
    "Vectors.bits": "bits a dimension",
    "bytes": "bytes a vector",
    "group_size": "input features",
    "activation_bits": "bits an input",
    "activation_outliers": "size of an input",
    "damping": "share of the mean diagonal",
    "gptaq_strength": "share of the error",
    "row_feedback": "share of the correlations",
    "budget": "bits a weight, mean",
    "Plan.budget": "time",
    "n_texts": "texts",
    "keep": "variants",
    "max_tokens": "tokens",
    "n": "dimensions",
    "rescore": "candidates a result",
    "query_tokens": "tokens",
    "n_queries": "queries",
    "batch_size": "texts",
    "tokens": "tokens",
    "warmup": "runs",
    "repeats": "runs",
    "price_per_hour": "dollars an hour",
    "margin": "score, 0 to 1",
    "min": "as the metric",
    "max": "as the metric",
}


def fields(*documents: type[BaseModel]) -> Callable[[], str]:
    """A table of the fields of one or several types."""

    def table() -> str:
        rows = []
        for document in documents:
            meanings = described(document)
            for name, info in document.model_fields.items():
                name = info.alias or name
                rows.append(
                    (
                        f"`{name}`",
                        allowed(info.annotation, info),
                        default(info),
                        UNITS.get(f"{document.__name__}.{name}") or UNITS.get(name, "–"),
                        meanings.get(name, ""),
                    )
                )
        return markdown(("field", "type", "default", "unit", "meaning"), rows)

    return table


def described(document: type[BaseModel]) -> dict[str, str]:
    """Descriptions of fields, from `Field` or from the docstring's `Attributes` section."""
    meanings: dict[str, str] = {}
    for parent in reversed(document.__mro__):
        if not (isinstance(parent, type) and issubclass(parent, BaseModel)) or not parent.__doc__:
            continue
        section = inspect.cleandoc(parent.__doc__).partition("Attributes:\n")[2]
        for entry in re.finditer(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            for name in entry[1].split(", "):
                meanings[name] = " ".join(entry[2].split()).rstrip(".").replace("|", "\\|")
    meanings["schema"] = "which version of which document this is; required"
    for name, info in document.model_fields.items():
        if info.description:
            meanings[info.alias or name] = info.description
    return meanings


def allowed(annotation: Any, info: FieldInfo | None = None) -> str:
    """A type in the words of the docs, such as "list of text"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Metric:
        return "[metric](choosing.md#every-metric)"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(a, info) for a in arguments if a is not type(None))
    if origin is tuple:
        return f"list of {allowed(arguments[0])}"
    if origin is dict:
        key = "role" if get_args(arguments[0]) == get_args(ColumnRole) else "metric"
        return f"{allowed(arguments[1])} by {key}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}]({HOMES[annotation.__name__]})"
    if hasattr(annotation, "__metadata__"):
        inner = FieldInfo.from_annotation(annotation)
        return allowed(arguments[0] if arguments else inner.annotation, inner)
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true, false"}
    name = names.get(getattr(annotation, "__name__", ""), "path")
    return name + bounds(info)


def bounds(info: FieldInfo | None) -> str:
    """The range of a number."""
    if info is None:
        return ""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    metadata = list(info.metadata)
    for argument in get_args(info.annotation):
        metadata += getattr(argument, "__metadata__", ())
    parts = []
    for item in metadata:
        for inner in getattr(item, "metadata", [item]):
            parts += [
                f"{sign} {getattr(inner, key):g}"
                for key, sign in signs.items()
                if getattr(inner, key, None) is not None
            ]
    return f" {' and '.join(parts)}" if parts else ""


def default(info: FieldInfo) -> str:
    """The default value, in the words of the docs."""
    value = info.default
    if info.default_factory is not None:
        return "empty"
    if value is PydanticUndefined:
        return "required"
    if value is None or value == () or value == "":
        return "none" if value is None else "empty"
    if isinstance(value, NoWeights):
        return "`method: none`"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return ", ".join(f"`{item.name}`" for item in value)
    return f"`{value}`"


def recipes() -> str:
    """All shipped recipes with their summaries and papers."""
    rows = []
    for name in list_shipped_names("recipes"):
        text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        papers = dict.fromkeys(re.findall(r"https://arxiv\.org/abs/([\d.]+\d)", text))
        links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
        rows.append(
            (f"[`{name}`](../recipes/{name}.yaml)", load_recipe(name).summary, links or "–")
        )
    return markdown(("recipe", "what it makes", "papers"), rows)


def policies() -> str:
    """All shipped policies with their limits and objectives."""
    rows = []
    for name in list_shipped_names("recipes/policies"):
        policy = load_policy(name)
        limits = "; ".join(
            f"`{metric}` {sign} {value:g}"
            for metric, limit in policy.limits.items()
            for sign, value in (("≥", limit.min), ("≤", limit.max))
            if value is not None
        )
        aim = "least" if policy.objective.minimise else "most"
        link = f"[`{name}`](../recipes/policies/{name}.yaml)"
        rows.append((link, limits, f"{aim} `{policy.objective.metric}`"))
    return markdown(("policy", "limits", "optimises"), rows)


def families() -> str:
    """Facts that gteopt knows about published models."""
    poolings = {
        "lasttoken": "last token",
        "latent": "latent attention, mean",
        "mean": "mean",
        "cls": "first token",
        None: "as its folder says",
    }
    sizes = read_model_shapes()
    rows = []
    for name, model in PUBLISHED.items():
        family = FAMILIES[model.family] if model.family else None
        around = "-"
        if family is not None and family.end_token is not None:
            end = f"... `{family.end_token}`"
            around = f"`{family.start_token}` {end}" if family.start_token else end
        shape = sizes.get(name.rpartition("/")[2])
        attention = model.attention or (family.attention if family else None)
        if attention is None and shape is not None:
            attention = attention_of(shape)
        dims = f"{model.dims:,}"
        least = family.least_dims if family else None
        if model.trained_dims:
            least = model.trained_dims[-1]
        tokens = model.max_tokens or (family.max_tokens if family else None)
        assert tokens is not None, name
        rows.append(
            (
                name,
                family.name if family else "-",
                attention or "as its folder says",
                poolings[model.pooling or (family.pooling if family else None)],
                around.replace("|", "\\|"),
                f"{dims}, down to {least}" if least else dims,
                f"{tokens:,}",
                "yes" if shape is not None else "no",
                model.license or "-",
                ", ".join(f"{suite} {score:.2f}" for suite, score in model.scores.items()) or "-",
            )
        )
    headings = ("model", "family", "attention", "pooling", "around a text", "dimensions", "tokens")
    return markdown((*headings, "sizes known", "license", "published averages"), rows)


def architectures() -> str:
    """Results of the conformance test for each architecture."""
    known = runpy.run_path(str(ROOT / "tests" / "support" / "architectures.py"))
    rows = []
    for name, (kind, _) in known["ARCHITECTURES"].items():
        builds = [known["REFUSED"].get((name, scheme)) for scheme in known["SCHEMES"]]
        answers = [f"no: {why}" if why else "yes" for why in builds]
        rows.append((name, f"`{kind}`", "yes", *answers, "yes"))
    headings = ("architecture", "`model_type`", "same vectors", *known["SCHEMES"])
    return markdown((*headings, "opens in Sentence Transformers"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "vector-codes": vector_codes,
    "minilm": minilm,
    "vector-margin": vector_margin,
    "peers-quality": peers_quality,
    "peers-ratios": peers_ratios,
    "new-language": new_language,
    "gptaq": gptaq,
    "row-feedback": row_feedback,
    "whole": whole,
    "calibration": calibration,
    "failures": failures,
    "ablation": ablation,
    "speed-minilm": speed("minilm"),
    "speed-qwen2": speed("qwen2"),
    "speed-avx2": speed("avx2"),
    "speed-makers": speed_makers,
    "speed-kernels": speed_kernels,
    "speed-threads": speed_threads,
    "solver-peers": solver_peers,
    "peaks": peaks,
    "grid": grid,
    "retention": retention,
    "grid-time": grid_time,
    "builds": builds,
    "build-times": build_times,
    "loads": loads,
    "long-texts": long_texts,
    "serving": serving,
    "soak": soaked,
    "device-share": device_share,
    "embedded": embedded,
    "machines": machines,
    "budget": budget,
    "coverage": coverage,
    "false-equivalence": false_equivalence,
    "equivalence-cost": equivalence_cost,
    "agreement": agreement,
    "beside-mteb": beside_mteb,
    "recipes": recipes,
    "policies": policies,
    "families": families,
    "architectures": architectures,
    "fields-recipe": fields(Recipe),
    "fields-weights-none": fields(NoWeights),
    "fields-weights-rtn": fields(RtnWeights),
    "fields-weights-gptq": fields(GptqWeights),
    "fields-scheme": fields(LayerScheme),
    "fields-calibration": fields(Calibration),
    "fields-dims": fields(Dims),
    "fields-vectors": fields(Vectors),
    "fields-plan": fields(Plan),
    "fields-screening": fields(Screening),
    "fields-bench": fields(PlanBench),
    "fields-workload": fields(Workload),
    "fields-policy": fields(Policy),
    "fields-limit": fields(Limit),
    "fields-objective": fields(Objective),
}


if __name__ == "__main__":
    sys.exit(main())
