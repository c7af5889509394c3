"""Commands that measure: run, bench, evaluate."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

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
    check_finite_option,
    price_option,
    shipped_option,
)
from gteopt.cli.output import (
    choose_output_style,
    print_status,
    show_next,
    show_progress,
    show_record,
    show_records,
    show_results,
    stdout,
)
from gteopt.cli.own_data import check_own_data, parse_columns
from gteopt.cli.suite_options import apply_suite_time, filter_named_suite
from gteopt.commands.names import name_sources
from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.config.plan import BenchSpec
    from gteopt.corpus.workers import ScoreWorkers
    from gteopt.evaluation.suites import Suite


def run(
    plan: PlanName,
    out: Annotated[
        Path | None,
        typer.Option(help="results folder; the plan's when left out", rich_help_panel=OUTPUT),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        price_option(MEASURE, "price of the machine in dollars per hour; the plan's when left out"),
    ] = None,
    hub_dir: HubDir = None,
    device: Device = "auto",
    devices: Devices = None,
    ray: Ray = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Carry out a plan: build, measure, score and choose. A second run does only what is missing.

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
    print_status("importing torch and the evaluation library")
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
    show_results(results, choose_output_style(as_json, as_csv, as_markdown), folder=document.out)


def bench(
    artifacts: Artifacts,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="baseline of ratios; the first artifact when left out", rich_help_panel=MEASURE
        ),
    ] = None,
    dummy_weights: Annotated[
        bool,
        typer.Option(
            "--dummy-weights",
            help="build a published model's shape with random weights",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="recipes for --dummy-weights; rtn-int8, rtn-int4 and nf4 when left out",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="blocks to build with --dummy-weights; all that fit when left out",
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
        int, typer.Option(min=1, help="tokens of a single query", rich_help_panel=MEASURE)
    ] = 16,
    queries: Annotated[
        int, typer.Option(min=10, help="number of single queries to time", rich_help_panel=MEASURE)
    ] = 50,
    repeats: Annotated[
        int,
        typer.Option(
            min=1,
            help="counted runs of each workload; with 6 or more, speed ratios get an interval",
            rich_help_panel=MEASURE,
        ),
    ] = 7,
    price_per_hour: Annotated[
        float | None, price_option(MEASURE, "price of the machine in dollars per hour, for costs")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="results folder; its bench.json is extended", rich_help_panel=OUTPUT),
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
    GPU, is 128x128, 32x512, 8x2048, 2x8192, 1x32768 and 128x~128. Lengths of a set that are above
    the model's maximum are skipped.

    Example: `gteopt bench artifacts/nano-int4 --baseline nano --out artifacts/results`
    """
    print_status("importing torch")
    from gteopt.commands.bench import BenchReportFile, bench_dummy_to_file, bench_to_file
    from gteopt.config.plan import WORKLOADS
    from gteopt.report.terminal import bench_table, limits_table, whole_model_table
    from gteopt.speed.protocol import default_workloads

    style = choose_output_style(as_json, as_csv, as_markdown)
    names = workload or [default_workloads(device)]
    spec = _bench_spec(names, query_tokens, queries, repeats)
    sources = name_sources([*([baseline] if baseline else []), *artifacts])
    if not dummy_weights and (recipe or layers is not None):
        raise InputError("--recipe and --layers need --dummy-weights")
    if out is not None and out.is_file():
        raise InputError(f"--out {out} is a file; give a folder for results")
    if dummy_weights and len(sources) != 1:
        raise InputError("--dummy-weights needs exactly one model and no --baseline")
    skip = any(name in WORKLOADS for name in names)
    file = BenchReportFile(out, price_per_hour)
    with show_progress() as progress:
        if dummy_weights:
            report = bench_dummy_to_file(
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
            report = bench_to_file(
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
    if (estimates := whole_model_table(report)) is not None:
        stdout.print(estimates)
    if out is not None:
        stdout.print(f"Result: {out / 'bench.json'}", soft_wrap=True)
        show_next(f"gteopt evaluate {' '.join(artifacts)} --suite mini --out {out}")


_WHERE = frozenset(
    {
        *("hub_dir", "device", "devices", "ray", "out", "cache_gb", "examples"),
        *("as_json", "as_csv", "as_markdown"),
    }
)
"""Options that do not change an evaluation's results, only where it runs and what it keeps."""


def _asked(context: typer.Context) -> tuple[str, ...]:
    """The typed options that results depend on, for `EvalReport.asked`."""
    words: list[str] = []
    for option in context.command.params:
        name, value = str(option.name), context.params.get(str(option.name))
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in {"artifacts", *_WHERE}:
            continue
        # A report may be published, so it names files without their folders.
        if isinstance(value, Path) or (name in ("suite", "baseline") and Path(str(value)).exists()):
            value = Path(str(value)).resolve().name
        words += [option.opts[0], str(value)]
    return tuple(words)


def _bench_spec(names: Sequence[str], query_tokens: int, n_queries: int, repeats: int) -> BenchSpec:
    from gteopt.config.plan import WORKLOADS, BenchSpec, Workload

    workloads: list[Workload] = []
    wrong = []
    for name in names:
        match = re.fullmatch(r"([1-9]\d*)x(~?)([1-9]\d*)", name, re.ASCII)
        if name in WORKLOADS:
            workloads += WORKLOADS[name]
        elif match is None:
            wrong.append(name)
        else:
            lengths: Literal["equal", "lognormal"] = "lognormal" if match[2] else "equal"
            workloads.append(
                Workload(batch_size=int(match[1]), tokens=int(match[3]), lengths=lengths)
            )
    if wrong:
        raise InputError(
            f"--workload {', '.join(wrong)}: write TEXTSxTOKENS (8x128), TEXTSx~TOKENS for lengths "
            f"around a median (64x~128), or a set: {', '.join(WORKLOADS)}"
        )
    return BenchSpec(
        query_tokens=query_tokens,
        n_queries=n_queries,
        repeats=repeats,
        workloads=tuple(dict.fromkeys(workloads)),
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
            help="store your texts whose neighbours changed most, as plain text, in --out",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    languages: Languages = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="instruction to put before the queries of --data", rich_help_panel=JUDGES
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="base to compare with; the artifacts' own base when left out",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(
            help="dimensions to score each artifact in, encoded once: 256,128,64",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            help="vector codes to score each artifact in: float32,int8,binary",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            help="a difference of scores (0 to 1) that does not matter to you",
            rich_help_panel=JUDGES,
        ),
    ] = 0.01,
    per_row: Annotated[
        bool,
        typer.Option(
            "--per-row",
            help="control the error rate of verdicts per row, not over the whole table",
            rich_help_panel=JUDGES,
        ),
    ] = False,
    stop_when: Annotated[
        Literal["decided"] | None,
        typer.Option(
            help="decided: stop a variant's task once its verdict is certain; the task is then "
            "left out of the mean",
            rich_help_panel=JUDGES,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        shipped_option(
            "eval/protocols",
            JUDGES,
            "score like a model's authors: gte-authors, e5-authors, or a file",
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="score only tasks of these mteb domains: legal,medical", rich_help_panel=JUDGES
        ),
    ] = None,
    budget: Budget = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="only estimate what would be encoded, and how long it takes",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None,
        price_option(OUTPUT, "price of the machine in dollars per hour, with --dry-run"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="results folder; makes runs resumable", rich_help_panel=OUTPUT),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="dtype to compute in: bfloat16, float32, or auto (as the artifact was built)",
            rich_help_panel=WHERE,
        ),
    ] = "auto",
    cache_gb: Annotated[
        float,
        typer.Option(
            min=0,
            callback=check_finite_option,
            help="limit of disk space for cached vectors; those of earlier tasks go first",
            rich_help_panel=WHERE,
        ),
    ] = 20,
    cache_dtype: Annotated[
        Literal["float16", "float32"],
        typer.Option(
            help="dtype of cached vectors; float32 keeps scores to the sixth digit",
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
    style = choose_output_style(as_json, as_csv, as_markdown)
    roles = parse_columns(columns)
    if suite is None and data is None and texts is None:
        raise InputError("nothing to evaluate on; give --suite, --data or --texts")
    data = check_own_data(data, texts, suite, roles, hub_dir)
    if examples and ((texts is None and data is None) or out is None):
        raise InputError(
            "--examples stores your texts in the results folder; give --texts or --data, and --out"
        )
    from gteopt.evaluation.data_check import check_data
    from gteopt.evaluation.suites import add_own_task

    if instruction is not None and data is None:
        raise InputError(
            "--instruction needs --data; a suite's tasks have instructions of their own"
        )
    loaded = filter_named_suite(suite, protocol, languages, domain) if suite else None
    if budget is not None:
        candidates = name_sources([*([baseline] if baseline else []), *artifacts])
        loaded = apply_suite_time(budget, loaded, candidates, out, hub_dir)
    if data is not None:
        loaded = add_own_task(loaded, data, instruction=instruction, columns=roles)
    if not 0 < margin < 1:
        raise InputError(f"--margin {margin:g}: give a difference of scores, between 0 and 1")
    if dry_run:
        if loaded is None:
            raise InputError("--dry-run counts the texts of a suite; give --suite or --data")
        _show_estimate(
            name_sources([*([baseline] if baseline else []), *artifacts]),
            loaded,
            out,
            hub_dir=hub_dir,
            price_per_hour=price_per_hour,
            cache_bytes=int(cache_gb * 1e9),
            as_json=as_json,
        )
        return
    if loaded is not None:
        check_data(loaded, hub_dir)  # before the slow import of torch and mteb
    print_status("importing torch and the evaluation library")
    from gteopt.commands.evaluate import (
        EvaluationSetup,
        evaluate_suite,
        evaluate_texts,
        find_common_base,
        parse_vector_grid,
    )
    from gteopt.evaluation.runner import SuiteEncodeOptions
    from gteopt.evaluation.tasks import check_tasks
    from gteopt.report.terminal import eval_table, fidelity_table, grid_table

    if loaded is not None:
        check_tasks(loaded, suite or loaded.name)
    sources = name_sources([baseline or find_common_base(artifacts), *artifacts])
    grid = parse_vector_grid(dims, vectors) if dims or vectors else None
    options = SuiteEncodeOptions(cache_bytes=int(cache_gb * 1e9), dtype=cache_dtype)
    with _workers(devices, ray, device) as workers, show_progress() as progress:
        how = EvaluationSetup(
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
            fidelity = evaluate_texts(
                sources, texts, out, how=how, columns=roles, progress=progress
            )
        elif loaded is not None:
            reports = evaluate_suite(
                sources, loaded, out, how=how, margin=margin, progress=progress
            )
    if texts is not None:
        show_records(list(fidelity.values()), fidelity_table(fidelity), style)
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
def _workers(devices: str | None, ray: str | None, device: str) -> Iterator[ScoreWorkers | None]:
    """The workers that encode texts; None stands for this process."""
    if devices is None and ray is None:
        yield None
        return
    if devices is not None and ray is not None:
        raise InputError(
            "--devices is for this machine, --ray for a cluster; give only one of them"
        )
    import torch

    from gteopt.corpus.ray_actors import start_ray_workers
    from gteopt.corpus.workers import start_local_workers
    from gteopt.machine import parse_devices

    with ExitStack() as stack:
        if devices is not None:
            workers = stack.enter_context(start_local_workers(parse_devices(devices)))
        else:
            assert ray is not None
            # Ray prints messages on stdout, which would break the output of --json.
            stack.enter_context(redirect_stdout(sys.stderr))
            opened = start_ray_workers(ray, device=device, n_threads=torch.get_num_threads())
            workers = stack.enter_context(opened)
        yield workers
