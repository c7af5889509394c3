"""Commands that measure: run, bench, evaluate."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gteopt.cli.names import names_of
from gteopt.cli.options import (
    JUDGES,
    MEASURE,
    OUTPUT,
    WHERE,
    Artifacts,
    AsCsv,
    AsJson,
    AsMarkdown,
    BackendOption,
    Budget,
    Columns,
    Device,
    Devices,
    HubDir,
    Kernels,
    Languages,
    OwnData,
    OwnTexts,
    PlanName,
    Ray,
    SuiteName,
    finite,
    known_file,
)
from gteopt.cli.output import (
    say,
    show_next,
    show_progress,
    show_record,
    show_records,
    show_results,
    stdout,
    style_of,
)
from gteopt.cli.own_data import check_own_data, parse_columns
from gteopt.cli.suite_options import named_suite, within
from gteopt.commands.names import named
from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.config.plan import BenchSpec
    from gteopt.corpus.workers import Workers
    from gteopt.evaluation.suites import Suite


def run(
    plan: PlanName,
    out: Annotated[
        Path | None,
        typer.Option(help="results folder instead of the plan's", rich_help_panel=OUTPUT),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="price of this machine in dollars, instead of the plan's",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    hub_dir: HubDir = None,
    device: Device = "auto",
    devices: Devices = None,
    ray: Ray = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Build, measure, score and choose: a whole plan, or what is left of it.

    Example: `gteopt run recipes/plans/demo.yaml`
    """
    from gteopt.config.plan import load_plan
    from gteopt.config.yaml_files import find_yaml

    document = load_plan(plan)
    if out is not None:
        document = document.model_copy(update={"out": out})
    if price_per_hour is not None:
        priced = document.bench.model_copy(update={"price_per_hour": price_per_hour})
        document = document.model_copy(update={"bench": priced})
    beside = find_yaml("recipes/plans", plan).parent
    say("importing torch and the evaluation library")
    from gteopt.commands.run import run as run_plan

    with _workers(devices, ray, device) as workers, show_progress() as progress:
        results = run_plan(
            document,
            beside=beside,
            hub_dir=hub_dir,
            device=device,
            workers=workers,
            progress=progress,
        )
    show_results(results, style_of(as_json, as_csv, as_markdown), folder=document.out)


def bench(
    artifacts: Artifacts,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="what ratios refer to; the first artifact when left out", rich_help_panel=MEASURE
        ),
    ] = None,
    dummy_weights: Annotated[
        bool,
        typer.Option(
            "--dummy-weights",
            help="build the model named, of a published shape, with random weights",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="with --dummy-weights: rtn-int8, rtn-int4 and nf4 when left out",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="with --dummy-weights: blocks to build; all that fit when left out",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="TEXTSxTOKENS (8x128), lengths around a median (64x~128), or a set: short, long",
            metavar="SHAPE",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    query_tokens: Annotated[
        int, typer.Option(min=1, help="length of the single query", rich_help_panel=MEASURE)
    ] = 16,
    queries: Annotated[
        int, typer.Option(min=10, help="single queries that are timed", rich_help_panel=MEASURE)
    ] = 50,
    repeats: Annotated[
        int, typer.Option(min=1, help="runs of each workload that count", rich_help_panel=MEASURE)
    ] = 5,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
            help="price of this machine in dollars; it gives the cost of tokens",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="results folder: adds to its bench.json", rich_help_panel=OUTPUT),
    ] = None,
    hub_dir: HubDir = None,
    device: Device = "auto",
    backend: BackendOption = "torch",
    kernels: Kernels = "deterministic",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Measure speed and memory, each artifact interleaved with the baseline.

    The set short, the default on a CPU, is 32x32, 32x128 and 8x512. The set long, the default on a
    GPU, is 128x128, 32x512, 8x2048, 2x8192, 1x32768 and 128x~128. A set leaves out lengths that the
    model does not take.

    Example: `gteopt bench artifacts/nano-int4 --baseline nano --out artifacts/results`
    """
    say("importing torch")
    from gteopt.commands.bench import ReportFile, measure, measure_dummy
    from gteopt.config.plan import WORKLOADS
    from gteopt.report.terminal import bench_table, limits_table, whole_model_table
    from gteopt.speed.protocol import default_workloads

    style = style_of(as_json, as_csv, as_markdown)
    names = workload or [default_workloads(device)]
    spec = _bench_spec(names, query_tokens, queries, repeats)
    sources = named([*([baseline] if baseline else []), *artifacts])
    if not dummy_weights and (recipe or layers is not None):
        raise InputError("--recipe and --layers belong to --dummy-weights")
    if out is not None and out.is_file():
        raise InputError(f"--out {out} is a file; results need a folder")
    if dummy_weights and len(sources) != 1:
        raise InputError("--dummy-weights takes one model and no --baseline")
    skip = any(name in WORKLOADS for name in names)
    file = ReportFile(out, price_per_hour)
    with show_progress() as progress:
        if dummy_weights:
            report = measure_dummy(
                artifacts[0],
                recipe or ["rtn-int8", "rtn-int4", "nf4"],
                spec,
                file,
                n_layers=layers,
                progress=progress,
                skip_too_long=skip,
                device=device,
                backend=backend,
                kernels=kernels,
            )
        else:
            report = measure(
                sources,
                spec,
                file,
                baseline=next(iter(sources)),
                progress=progress,
                hub_dir=hub_dir,
                skip_too_long=skip,
                device=device,
                backend=backend,
                kernels=kernels,
            )
    show_record(report, bench_table(report), style)
    if style != "table":
        return
    stdout.print(limits_table(report))
    if (whole := whole_model_table(report)) is not None:
        stdout.print(whole)
    if out is not None:
        stdout.print(f"Result: {out / 'bench.json'}", soft_wrap=True)
        show_next(f"gteopt evaluate {' '.join(artifacts)} --suite mini --out {out}")


_WHERE = frozenset(
    {
        *("hub_dir", "device", "devices", "ray", "out", "cache_gb", "examples"),
        *("as_json", "as_csv", "as_markdown"),
    }
)
"""Options that decide where an evaluation runs and what it keeps, not what it finds."""


def _asked(context: typer.Context) -> tuple[str, ...]:
    """The options that were typed and decide what is found, as `EvalReport.asked` has them."""
    words: list[str] = []
    for option in context.command.params:
        name, value = str(option.name), context.params.get(str(option.name))
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in {"artifacts", *_WHERE}:
            continue
        # Where a file lies is nobody else's business; what it is called is.
        if isinstance(value, Path) or (name in ("suite", "baseline") and Path(str(value)).exists()):
            value = Path(str(value)).resolve().name
        words += [option.opts[0], str(value)]
    return tuple(words)


def _bench_spec(names: Sequence[str], query_tokens: int, n_queries: int, repeats: int) -> BenchSpec:
    from gteopt.config.plan import WORKLOADS, BenchSpec, Workload

    found: list[Workload] = []
    wrong = []
    for name in names:
        match = re.fullmatch(r"([1-9]\d*)x(~?)([1-9]\d*)", name, re.ASCII)
        if name in WORKLOADS:
            found += WORKLOADS[name]
        elif match is None:
            wrong.append(name)
        else:
            lengths: Literal["equal", "lognormal"] = "lognormal" if match[2] else "equal"
            found.append(Workload(batch_size=int(match[1]), tokens=int(match[3]), lengths=lengths))
    if wrong:
        raise InputError(
            f"--workload {', '.join(wrong)}: write TEXTSxTOKENS (8x128), TEXTSx~TOKENS for lengths "
            f"around a median (64x~128), or a set: {', '.join(WORKLOADS)}"
        )
    return BenchSpec(
        query_tokens=query_tokens,
        n_queries=n_queries,
        repeats=repeats,
        workloads=tuple(dict.fromkeys(found)),
    )


def evaluate(
    context: typer.Context,
    artifacts: Artifacts,
    suite: SuiteName = None,
    data: OwnData = None,
    texts: OwnTexts = None,
    columns: Columns = None,
    examples: Annotated[
        bool,
        typer.Option(
            "--examples",
            help="put the own texts whose neighbours changed most, in clear, into --out",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    languages: Languages = None,
    instruction: Annotated[
        str | None, typer.Option(help="what the queries of --data are for", rich_help_panel=JUDGES)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="the base to judge against; the artifacts' own when left out",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(
            help="lengths to score each in, from the same encodings: 256,128,64",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            help="codes to score each length in: float32,int8,binary", rich_help_panel=MEASURE
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            help="a difference of scores, 0 to 1, that does not matter; see policies",
            rich_help_panel=JUDGES,
        ),
    ] = 0.01,
    per_row: Annotated[
        bool,
        typer.Option(
            "--per-row",
            help="verdicts hold for each row alone; without it, for all rows of the table together",
            rich_help_panel=JUDGES,
        ),
    ] = False,
    stop_when: Annotated[
        Literal["decided"] | None,
        typer.Option(
            help="decided: end a variant's task once its verdict cannot change; it is then no part "
            "of the mean",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="score as a model's authors do: gte-authors, e5-authors, or a file",
            callback=known_file("eval/protocols"),
            autocompletion=names_of("eval/protocols"),
            rich_help_panel=JUDGES,
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="only tasks of one of these domains of mteb: legal,medical", rich_help_panel=JUDGES
        ),
    ] = None,
    budget: Budget = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="say what would be encoded, how long it takes, and stop",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
            help="price of this machine in dollars, with --dry-run",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="results folder; makes runs resumable", rich_help_panel=OUTPUT),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="models compute in bfloat16 or float32; auto is that of the artifact's build",
            rich_help_panel=WHERE,
        ),
    ] = "auto",
    cache_gb: Annotated[
        float,
        typer.Option(
            min=0,
            callback=finite,
            help="most disk for cached vectors; those of earlier tasks go first",
            rich_help_panel=WHERE,
        ),
    ] = 20,
    cache_dtype: Annotated[
        Literal["float16", "float32"],
        typer.Option(
            help="how vectors are cached; float32 keeps scores to the sixth digit",
            rich_help_panel=WHERE,
        ),
    ] = "float16",
    hub_dir: HubDir = None,
    device: Device = "auto",
    backend: BackendOption = "torch",
    kernels: Kernels = "deterministic",
    devices: Devices = None,
    ray: Ray = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Score artifacts on a suite and measure their fidelity to the baseline.

    Example: `gteopt evaluate artifacts/nano-int4 --suite mini --out artifacts/results`
    """
    style = style_of(as_json, as_csv, as_markdown)
    roles = parse_columns(columns)
    if suite is None and data is None and texts is None:
        raise InputError("nothing to evaluate on; give --suite, --data or --texts")
    data = check_own_data(data, texts, suite, roles, hub_dir)
    if examples and ((texts is None and data is None) or out is None):
        raise InputError(
            "--examples keeps own texts in the results folder; give --texts or --data, and --out"
        )
    from gteopt.evaluation.data_check import check_data
    from gteopt.evaluation.suites import with_data

    if instruction is not None and data is None:
        raise InputError("--instruction goes with --data; a suite's file names those of its tasks")
    loaded = named_suite(suite, protocol, languages, domain) if suite else None
    if budget is not None:
        asked_for = named([*([baseline] if baseline else []), *artifacts])
        loaded = within(budget, loaded, asked_for, out, hub_dir)
    if data is not None:
        loaded = with_data(loaded, data, instruction=instruction, columns=roles)
    if not 0 < margin < 1:
        raise InputError(f"--margin {margin:g}: give a share of a score, between 0 and 1")
    if dry_run:
        if loaded is None:
            raise InputError("--dry-run counts the texts of a suite; give --suite or --data")
        _show_estimate(
            named([*([baseline] if baseline else []), *artifacts]),
            loaded,
            out,
            hub_dir=hub_dir,
            price_per_hour=price_per_hour,
            cache_bytes=int(cache_gb * 1e9),
            as_json=as_json,
        )
        return
    if loaded is not None:
        check_data(loaded, hub_dir)  # before torch and mteb are imported, which takes longer
    say("importing torch and the evaluation library")
    from gteopt.commands.evaluate import Setup, base_of, compare_texts, parse_grid, score
    from gteopt.evaluation.runner import EncodeOptions
    from gteopt.evaluation.tasks import check_suite
    from gteopt.report.terminal import eval_table, fidelity_table, grid_table

    if loaded is not None:
        check_suite(loaded, suite or loaded.name)
    sources = named([baseline or base_of(artifacts), *artifacts])
    grid = parse_grid(dims, vectors) if dims or vectors else None
    options = EncodeOptions(cache_bytes=int(cache_gb * 1e9), dtype=cache_dtype)
    with _workers(devices, ray, device) as workers, show_progress() as progress:
        how = Setup(
            hub_dir=hub_dir,
            device=device,
            dtype=dtype,
            backend=backend,
            kernels=kernels,
            grid=grid,
            workers=workers,
            options=options,
            asked=_asked(context),
            correction="row" if per_row else "family",
            examples=examples,
            stops=stop_when is not None,
        )
        if texts is not None:
            close = compare_texts(sources, texts, out, how=how, columns=roles, progress=progress)
        elif loaded is not None:
            reports = score(sources, loaded, out, how=how, margin=margin, progress=progress)
    if texts is not None:
        show_records(list(close.values()), fidelity_table(close), style)
    else:
        table = eval_table(reports) if grid is None else grid_table(reports)
        show_records(list(reports.values()), table, style)
    if out is not None and style == "table":
        stdout.print(f"Result: {out / ('eval' if texts is None else 'fidelity')}", soft_wrap=True)
        show_next(f"gteopt choose {out} --policy balanced")


def _show_estimate(
    sources: dict[str, str],
    suite: Suite,
    out: Path | None,
    *,
    hub_dir: Path | None,
    price_per_hour: float | None,
    cache_bytes: int,
    as_json: bool,
) -> None:
    from gteopt.commands.estimate_evaluation import estimate_evaluation
    from gteopt.report.estimate_table import estimate_table

    estimate = estimate_evaluation(
        sources,
        suite,
        out,
        hub_dir=hub_dir,
        price_per_hour=price_per_hour,
        cache_bytes=cache_bytes,
    )
    show_record(estimate, estimate_table(estimate), "json" if as_json else "table")


@contextmanager
def _workers(devices: str | None, ray: str | None, device: str) -> Iterator[Workers | None]:
    """Who encodes texts; None is this process."""
    if devices is None and ray is None:
        yield None
        return
    if devices is not None and ray is not None:
        raise InputError("--devices is for this machine, --ray for a cluster; give one of them")
    import torch

    from gteopt.corpus.ray_actors import ray_workers
    from gteopt.corpus.workers import local_workers
    from gteopt.machine import parse_devices

    with ExitStack() as stack:
        if devices is not None:
            workers = stack.enter_context(local_workers(parse_devices(devices)))
        else:
            assert ray is not None
            # Where --json writes, Ray tells which of a cluster's processes died.
            stack.enter_context(redirect_stdout(sys.stderr))
            opened = ray_workers(ray, device=device, n_threads=torch.get_num_threads())
            workers = stack.enter_context(opened)
        yield workers
