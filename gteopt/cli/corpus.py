"""Commands for a whole corpus: embed, search."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal

from gteopt.cli.errors import exit_with_error, resume_hint
from gteopt.cli.options import (
    EMBED,
    FIND,
    JOB,
    OUTPUT,
    WHERE,
    AsJson,
    BackendOption,
    Device,
    HubDir,
    Kernels,
    price_option,
)
from gteopt.cli.output import print_json, show_backend, show_progress, stderr, stdout
from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.commands.search import SearchResult
    from gteopt.corpus.estimate import EmbedEstimate
    from gteopt.corpus.jobs import EmbedReport
    from gteopt.corpus.verify import VerifiedCounts

BAD_LEFT = 3
"""Exit code of a finished job with more dead letters than allowed."""
TERMINATED = 143
"""Exit code after SIGTERM, as in shells."""


def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="files, folders, globs in quotes, s3://, gs://, hf://, or ORG/NAME of a data set: "
            "jsonl, csv, tsv, parquet, txt, arrow; a BEIR folder"
        ),
    ],
    model: Annotated[
        str, typer.Option(help="artifact folder, 'nano', or ORG/NAME", rich_help_panel=EMBED)
    ],
    out: Annotated[
        str,
        typer.Option(
            help="folder for the vectors: a local path, s3:// or gs://",
            rich_help_panel=OUTPUT,
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help='column, or a template like "{title} {body}"; "text" when left out',
            rich_help_panel=EMBED,
        ),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(help="column that holds ids; FILE:ROW when left out", rich_help_panel=EMBED),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="columns to copy beside the vector", metavar="COL,COL", rich_help_panel=EMBED
        ),
    ] = None,
    role: Annotated[
        Literal["document", "query"],
        typer.Option(help="role whose prompt the texts get", rich_help_panel=EMBED),
    ] = "document",
    instruction: Annotated[
        str | None,
        typer.Option(
            help="instruction to put before queries, with --role query", rich_help_panel=EMBED
        ),
    ] = None,
    long: Annotated[
        str,
        typer.Option(
            help="for texts above the model's length: error (a dead letter), truncate, or "
            "chunk[:TOKENS[:OVERLAP]]",
            rich_help_panel=EMBED,
        ),
    ] = "truncate",
    pool: Annotated[
        Literal["none", "mean"],
        typer.Option(
            help="mean stores one vector for all chunks of a document", rich_help_panel=EMBED
        ),
    ] = "none",
    code: Annotated[
        Literal["artifact", "float32", "float16"],
        typer.Option(
            help="code of the vectors; `gteopt truncate` fits smaller ones", rich_help_panel=OUTPUT
        ),
    ] = "artifact",
    vector_type: Annotated[
        Literal["list", "fixed_size_list"],
        typer.Option(
            help="Parquet type of the vectors; every reader supports list", rich_help_panel=OUTPUT
        ),
    ] = "list",
    export: Annotated[
        list[str] | None,
        typer.Option(
            help="also write npy, faiss-flat, faiss-hnsw, faiss-ivf or lance",
            metavar="FORM",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="texts encoded together", rich_help_panel=WHERE)
    ] = 32,
    shard_rows: Annotated[
        int,
        typer.Option(
            min=1, help="rows in a shard; a crash loses one at most", rich_help_panel=OUTPUT
        ),
    ] = 4096,
    dtype: Annotated[
        str,
        typer.Option(help="dtype that the model computes in", rich_help_panel=WHERE),
    ] = "auto",
    backend: BackendOption = "torch",
    kernels: Kernels = "deterministic",
    device: Device = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            help="one process per device: cuda:0,cuda:1, or cpu,cpu",
            metavar="LIST",
            rich_help_panel=WHERE,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="embed on a Ray cluster: auto (this machine's), HOST:PORT, or local",
            metavar="auto|ADDRESS",
            rich_help_panel=WHERE,
        ),
    ] = None,
    actors: Annotated[
        str | None,
        typer.Option(
            help="workers on Ray: N, or MIN-MAX if nodes come and go", rich_help_panel=WHERE
        ),
    ] = None,
    grow: Annotated[
        bool,
        typer.Option("--grow", help="add new files to an existing job", rich_help_panel=JOB),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="embed shards with dead letters again", rich_help_panel=JOB
        ),
    ] = False,
    unique_ids: Annotated[
        bool,
        typer.Option("--unique-ids", help="refuse duplicate ids", rich_help_panel=JOB),
    ] = False,
    max_bad: Annotated[
        int,
        typer.Option(
            min=0, help="exit with code 3 above this many dead letters", rich_help_panel=JOB
        ),
    ] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="only estimate tokens, hours, dollars and bytes",
            rich_help_panel=JOB,
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="check a finished folder and re-embed 64 rows", rich_help_panel=JOB
        ),
    ] = False,
    price_per_hour: Annotated[
        float | None, price_option(JOB, "price of all devices together in dollars per hour")
    ] = None,
    hub_dir: HubDir = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="print events on stdout as JSON lines", rich_help_panel=OUTPUT),
    ] = False,
) -> None:
    """Embed every row of a corpus exactly once; the same command resumes after a crash.

    Rows without a vector are written to OUT/dead with the reason. See docs/embedding.md.

    Example: `gteopt embed corpus.jsonl.gz --model artifacts/nano-int4 --id doc_id --out vectors`
    """
    from gteopt.commands import embed as command

    options: dict[str, Any] = {
        "text": text,
        "id": id,
        "keep": keep or (),
        "role": role,
        "instruction": instruction,
        "long": long,
        "pool": pool,
        "code": code,
        "vector_type": vector_type,
        "batch_size": batch_size,
        "shard_rows": shard_rows,
        "dtype": dtype,
        "backend": backend,
        "kernels": kernels,
        "device": device,
        "devices": devices,
        "ray": ray,
        "actors": _actors(actors),
        "grow": grow,
        "retry_failed": retry_failed,
        "unique_ids": unique_ids,
        "hub_dir": hub_dir,
        "export": _exports(export),
    }
    if dry_run and verify:
        raise InputError(
            "--dry-run is for before a job, --verify for after it; give only one of them"
        )
    try:
        with show_progress() as progress:
            if dry_run:
                estimate = command.dry_run_embed(
                    inputs, model, out, price_per_hour=price_per_hour, progress=progress, **options
                )
            elif verify:
                checked = command.verify(inputs, model, out, progress=progress, **options)
            else:
                report = command.embed(
                    inputs,
                    model,
                    out,
                    progress=progress,
                    events=_print_event if as_json else command.ignore_job_event,
                    price_per_hour=price_per_hour,
                    **options,
                )
    except command.EmbedTerminated:
        exit_with_error(f"terminated{resume_hint('embed')}", TERMINATED)
    if dry_run:
        _show_estimate(estimate, as_json=as_json)
    elif verify:
        _show_verified(checked, as_json=as_json)
    else:
        if not as_json:
            _show_embedded(report)
        if report.n_bad > max_bad:
            raise typer.Exit(BAD_LEFT)


def search(
    folder: Annotated[str, typer.Argument(help="folder that `gteopt embed` made")],
    query: Annotated[list[str] | None, typer.Argument(help="texts to search for")] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="a file with a query per line", metavar="FILE", rich_help_panel=FIND),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="number of results per query", rich_help_panel=FIND)
    ] = 10,
    instruction: Annotated[
        str | None, typer.Option(help="instruction to put before the queries", rich_help_panel=FIND)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="new location of the model, if it moved", rich_help_panel=FIND),
    ] = None,
    index: Annotated[
        bool,
        typer.Option(
            "--index", help="search index.faiss instead of every vector", rich_help_panel=FIND
        ),
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            help="folder of another variant: report how many of these rows it finds too",
            rich_help_panel=FIND,
        ),
    ] = None,
    hub_dir: HubDir = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the nearest rows of an embedding folder, for example to test that it works.

    Example: `gteopt search vectors "how do plants make energy" --top 10`
    """
    from gteopt.commands.search import compare_search_results
    from gteopt.commands.search import search as search_folder

    texts = [*(query or ()), *_lines(queries)]
    if not texts:
        raise InputError("nothing to search for; write a query, or give --queries FILE")
    common: dict[str, Any] = {
        "top": top,
        "instruction": instruction,
        "device": device,
        "hub_dir": hub_dir,
    }
    comparison = None
    with show_progress() as progress:
        results = search_folder(
            folder, texts, model=model, index=index, progress=progress, **common
        )
        if compare is not None:
            others = search_folder(compare, texts, progress=progress, **common)
            comparison = compare_search_results(results, others)
    if as_json:
        content: dict[str, Any] = {"found": [result.model_dump() for result in results]}
        if comparison is not None:
            content["comparison"] = comparison.model_dump()
        print_json(content)
        return
    for result in results:
        _show_result(result)
    if comparison is not None:
        stdout.print(f"{compare} finds {comparison.kept:.1%} of these rows too", markup=False)
        for text, kept in comparison.by_query[:5]:
            if kept < 1:
                stdout.print(f"  {kept:5.0%}  {text}", markup=False, highlight=False)


def _actors(text: str | None) -> tuple[int, int] | None:
    """The least and the most actors of `--actors`."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text, re.ASCII)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise InputError(f"--actors {text}: write a number, or MIN-MAX (2-16)")
    return int(match[1]), int(match[2] or match[1])


def _exports(lists: list[str] | None) -> tuple[str, ...]:
    """The names of `--export`, which may be given several times and hold lists."""
    from typing import get_args

    from gteopt.corpus.exports import Export
    from gteopt.errors import suggest_names

    names = [name for text in lists or () for name in text.split(",")]
    for name in names:
        if name not in get_args(Export):
            raise InputError(f"--export {name}: {suggest_names(name, get_args(Export))}")
    return tuple(names)


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise InputError(f"--queries {path} does not exist; give a file with a query per line")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _print_event(event: str, facts: Mapping[str, Any]) -> None:
    typer.echo(json.dumps({"event": event, **facts}, ensure_ascii=False))


def _show_embedded(report: EmbedReport) -> None:
    size = decimal(report.n_bytes, precision=1)
    bad = ", ".join(f"{n:,} {reason}" for reason, n in report.bad.items())
    stdout.print(
        f"{report.out}: {report.n_rows:,} rows = {report.n_embedded:,} embedded + "
        f"{report.n_bad:,} dead letters; {report.n_vectors:,} vectors, {size}",
        soft_wrap=True,
    )
    if report.backend is not None and report.backend_reason is not None:
        show_backend(report.out, report.backend, report.backend_reason)
    seconds = max(report.seconds, 1e-9)
    stdout.print(
        f"shards: {report.shards_now:,} now, {report.shards_before:,} before; "
        f"{report.texts_now / seconds:,.0f} texts/s, {report.tokens_now / seconds:,.0f} tokens/s"
        + ("" if report.peak_ratio is None else f", {report.peak_ratio:.0%} of the measured peak")
        + ("" if report.dollars is None else f", ${report.dollars:,.2f}"),
        soft_wrap=True,
    )
    for worker in report.workers if len(report.workers) > 1 else ():
        stdout.print(
            f"  {worker.name}: {worker.n_shards:,} shards, {worker.texts_per_s:,.0f} texts/s, the "
            f"last after {worker.last_s:,.0f} s",
            markup=False,
            soft_wrap=True,
        )
    notes = []
    if report.bad:
        notes.append(f"dead letters ({bad}) are in {report.out}/dead")
    if report.n_cut:
        notes.append(f"{report.n_cut:,} texts were truncated; --long offers other ways")
    if report.n_duplicate_ids:
        notes.append(f"{report.n_duplicate_ids:,} rows have the id of an earlier row")
    for note in notes:
        stderr.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _show_estimate(estimate: EmbedEstimate, *, as_json: bool) -> None:
    if as_json:
        print_json(estimate.model_dump())
        return
    stdout.print(
        f"{estimate.n_rows:,} rows, {estimate.n_tokens:,} tokens (± {estimate.n_tokens_error:,}, "
        f"counted in {estimate.n_sampled:,} rows); shards: {estimate.n_shards:,}",
        soft_wrap=True,
    )
    cost = "" if estimate.dollars is None else f", ${estimate.dollars:,.2f}"
    stdout.print(
        f"{estimate.hours:,.2f} hours at {estimate.tokens_per_s:,.0f} tokens/s{cost}; vectors take "
        f"{decimal(estimate.n_bytes, precision=1)}",
        soft_wrap=True,
    )
    if estimate.n_cut:
        stdout.print(
            f"about {estimate.n_cut:,} texts are longer than the model's maximum", soft_wrap=True
        )


def _show_verified(checked: VerifiedCounts, *, as_json: bool) -> None:
    if as_json:
        print_json(checked.model_dump())
        return
    least = "" if checked.min_cosine is None else f", cosine at least {checked.min_cosine:.4f}"
    stdout.print(
        f"{checked.n_shards:,} shards intact; {checked.n_rows:,} rows, {checked.n_vectors:,} "
        f"vectors, {checked.n_bad:,} dead letters; {checked.n_again} rows embedded again{least}",
        soft_wrap=True,
    )


def _show_result(result: SearchResult) -> None:
    stdout.print(result.query, style="bold", markup=False, highlight=False, soft_wrap=True)
    for hit in result.hits:
        columns = "  ".join(str(value)[:100] for value in hit.columns.values())
        stdout.print(f"  {hit.score:.4f}  {hit.id}  {columns}", markup=False, highlight=False)
