"""The command that finds a variant within limits: optimize."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gteopt.cli.options import (
    LIMITS,
    OUTPUT,
    WHERE,
    AsCsv,
    AsJson,
    AsMarkdown,
    Base,
    Budget,
    Columns,
    Device,
    HubDir,
    Languages,
    OwnData,
    OwnTexts,
    SuiteName,
    check_finite_option,
    price_option,
)
from gteopt.cli.output import (
    choose_output_style,
    print_json,
    print_status,
    show_progress,
    show_results,
    stdout,
)
from gteopt.cli.own_data import check_own_data, parse_columns, parse_name_list

if TYPE_CHECKING:
    from gteopt.commands.optimize import PlanProposal


def optimize(
    model: Base,
    data: OwnData = None,
    texts: OwnTexts = None,
    columns: Columns = None,
    suite: SuiteName = None,
    languages: Languages = None,
    budget: Budget = None,
    max_weights: Annotated[
        str | None,
        typer.Option(help="weights in memory: 40MB or 40MiB", rich_help_panel=LIMITS),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="peak memory while encoding: 2GB", rich_help_panel=LIMITS),
    ] = None,
    max_query_ms: Annotated[
        str | None,
        typer.Option(help="p95 latency of one query: 20ms", rich_help_panel=LIMITS),
    ] = None,
    min_speedup: Annotated[
        str | None,
        typer.Option(help="bulk speed over the baseline's: 1.5x", rich_help_panel=LIMITS),
    ] = None,
    max_vector_bytes: Annotated[
        str | None, typer.Option(help="size of one stored vector: 256B", rich_help_panel=LIMITS)
    ] = None,
    max_index: Annotated[
        str | None,
        typer.Option(help="size of all vectors, with --for: 10GB", rich_help_panel=LIMITS),
    ] = None,
    n_vectors: Annotated[
        str | None,
        typer.Option(
            "--for", help="number of vectors for --max-index: 50M", rich_help_panel=LIMITS
        ),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=check_finite_option,
            help="dollars per million tokens",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None, price_option(LIMITS, "price of the machine in dollars per hour, for costs")
    ] = None,
    min_quality: Annotated[
        str | None,
        typer.Option(
            help="share of the score, or of neighbours, to keep at 95 % confidence",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    goal: Annotated[
        Literal["size", "speed", "index", "cost", "quality"],
        typer.Option(
            "--optimize", help="what to optimise within the limits", rich_help_panel=LIMITS
        ),
    ] = "size",
    engine: Annotated[
        Literal["any", "sentence-transformers", "transformers", "vllm", "gteopt", "openvino"],
        typer.Option(
            help="must open the pick: any, sentence-transformers, transformers, vllm, gteopt, "
            "openvino",
            metavar="ENGINE",
            rich_help_panel=WHERE,
        ),
    ] = "any",
    effort: Annotated[
        Literal["fast", "standard", "best"],
        typer.Option(help="effort of builds that are measured in full", rich_help_panel=WHERE),
    ] = "fast",
    hub_dir: HubDir = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="results folder; artifacts/MODEL when left out", rich_help_panel=OUTPUT),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="stop after writing the plan", rich_help_panel=OUTPUT),
    ] = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Find the cheapest variant of a model that keeps your limits.

    Example: `gteopt optimize nano --data pairs.csv --max-weights 14MB --min-quality 97%`
    """
    from gteopt.config.limits import Limits

    style = choose_output_style(as_json, as_csv, as_markdown)
    limits = Limits(
        max_weights=max_weights,
        max_memory=max_memory,
        max_query_ms=max_query_ms,
        min_speedup=min_speedup,
        max_vector_bytes=max_vector_bytes,
        max_index=max_index,
        n_vectors=n_vectors,
        max_cost=max_cost,
        price_per_hour=price_per_hour,
        min_quality=min_quality,
        optimize=goal,
    )
    limits.policy(labelled=texts is None)  # refuses wrong amounts before heavy imports
    roles = parse_columns(columns)
    data = check_own_data(data, texts, suite, roles, hub_dir)
    print_status("importing torch and the evaluation library")
    from gteopt.commands.judges import Judges
    from gteopt.commands.optimize import Search, propose_plan, run_proposal

    judges = Judges(
        data=data,
        texts=texts,
        columns=tuple(roles.items()),
        suite=suite,
        languages=parse_name_list(languages),
        budget=budget,
    )
    search = Search(engine=engine, effort=effort, hub_dir=hub_dir, device=device)
    folder = out or Path("artifacts", Path(model).name)
    print_status(f"inspecting {model}")
    proposal = propose_plan(model, judges, limits, search, out=folder)
    if style == "table":
        _show_proposal(proposal)
    if dry_run:
        if style == "json":
            print_json(proposal.plan.model_dump(mode="json", by_alias=True))
        else:
            stdout.print(f"Plan: {proposal.file}", soft_wrap=True)
            stdout.print(f"Next: gteopt run {proposal.file}", soft_wrap=True)
        return
    with show_progress() as progress:
        results = run_proposal(proposal, search, progress=progress)
    show_results(results, style, folder=folder)


def _show_proposal(proposal: PlanProposal) -> None:
    from rich.filesize import decimal
    from rich.table import Table

    from gteopt.config.engines import engines_in_words

    base = proposal.inspection
    stdout.print(
        f"{base.id}: {base.architecture}, {base.n_parameters / 1e6:,.1f} M parameters, "
        f"{base.dims} dimensions, at most {base.max_tokens:,} tokens",
        soft_wrap=True,
    )
    table = Table(title="candidate recipes", title_justify="left")
    for name in ("recipe", "weights", "bytes a vector", "build", "disk", "engines, or why not"):
        table.add_column(
            name, justify="left" if name in ("recipe", "engines, or why not") else "right"
        )
    for trial in proposal.trials:
        estimate = trial.estimate
        table.add_row(
            trial.recipe.name,
            "-" if estimate.weight_bytes is None else decimal(estimate.weight_bytes, precision=1),
            f"{estimate.bytes_per_vector or 0:,}",
            f"{estimate.build_s or 0:,.0f} s",
            "-" if estimate.disk_bytes is None else decimal(estimate.disk_bytes, precision=1),
            f"not tried: {trial.dropped}" if trial.dropped else engines_in_words(estimate.engines),
            style="dim" if trial.dropped else "",
        )
    stdout.print(table)
    least, most = (seconds / 60 for seconds in proposal.seconds)
    stdout.print(
        f"about {least:.0f} to {most:.0f} minutes on {base.estimated_for.device}"  # type: ignore[union-attr]
        if most >= 1
        else "less than a minute"
    )
    for note in proposal.notes:
        stdout.print(f"note: {note}", soft_wrap=True)
