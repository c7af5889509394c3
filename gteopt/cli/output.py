"""What commands print: tables and JSON on stdout, notes on stderr."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gteopt.cli.progress_bars import Steps, shown
from gteopt.errors import InputError, visible

if TYPE_CHECKING:
    from gteopt.frozen import Frozen
    from gteopt.records.manifest import CalibrationRecord, Manifest
    from gteopt.records.publication import Publication
    from gteopt.records.results_folder import Results


class PlainConsole(Console):
    """Prints every string as it is written: names of folders and foreign errors are no markup.

    Control characters, which could move the cursor or change the title, are shown as escapes.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """The text with control characters made visible and without markup."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})


# Piped output has no width of its own; rich would assume 80 columns and drop some of a table's.
stdout = PlainConsole(width=None if sys.stdout.isatty() else 120)
stderr = PlainConsole(stderr=True)


def show_progress() -> AbstractContextManager[Steps]:
    return shown(stderr)


def print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


Style = Literal["table", "json", "csv", "markdown"]
"""How a result is printed."""


def style_of(as_json: bool, as_csv: bool = False, as_markdown: bool = False) -> Style:
    """The one style that was asked for.

    Raises:
        InputError: several.
    """
    if as_json + as_csv + as_markdown > 1:
        raise InputError("--json, --csv and --markdown exclude one another; give one of them")
    return "json" if as_json else "csv" if as_csv else "markdown" if as_markdown else "table"


def print_table(table: Table, style: Style) -> None:
    """A table for people, or its cells alone: as CSV, or as a Markdown table."""
    if style == "table":
        stdout.print(table)
        return
    columns = [[_plain(column.header), *map(_plain, column.cells)] for column in table.columns]
    rows = list(zip(*columns, strict=True))
    if style == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        return
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    typer.echo("\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]]))


def _plain(cell: object) -> str:
    """A cell's letters on one line, without markup."""
    text = cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
    return " ".join(text.split())


def show_record(record: Frozen, table: Table, style: Style) -> None:
    """One record as JSON, or its table."""
    if style == "json":
        print_json(json.loads(record.model_dump_json(by_alias=True)))
    else:
        print_table(table, style)


def show_records(records: Sequence[Frozen], table: Table, style: Style) -> None:
    """Several records as a JSON list, or their table."""
    if style == "json":
        print_json([json.loads(record.model_dump_json(by_alias=True)) for record in records])
    else:
        print_table(table, style)


def show_results(results: Results, style: Style, *, folder: Path | None = None) -> None:
    """The table of variants and the choice; with `folder`, how to use the pick."""
    from gteopt.report.pick import pick_lines, use_lines
    from gteopt.report.terminal import fidelity_table, terminal_table

    if style == "json":
        print_json(json.loads(results.model_dump_json(by_alias=True)))
        return
    if results.benched or results.evals:
        print_table(terminal_table(results), style)
        if style != "table":
            return
    if results.fidelity:
        stdout.print(fidelity_table(results.fidelity))
    if folder is not None and (folder / "screening.json").is_file():
        _show_screening(folder)
    if results.choice is None:
        return
    for line in pick_lines(results):
        stdout.print(line, soft_wrap=True)
    for line in use_lines(results, folder) if folder is not None else ():
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def _show_screening(folder: Path) -> None:
    from gteopt.records.files import read_record
    from gteopt.records.screening import ScreeningRecord

    record = read_record(folder / "screening.json", ScreeningRecord)
    for variant in record.variants:
        if variant.dropped is not None:
            stdout.print(
                f"dropped after a look at {record.n_texts} texts: {variant.name} "
                f"({variant.neighbour_overlap:.0%} of neighbours kept): {variant.dropped}",
                soft_wrap=True,
            )


def say(sentence: str) -> None:
    """What is done now, where a person waits and nothing else shows for some seconds."""
    if stderr.is_terminal:
        stderr.print(f"{sentence} ...", style="dim", markup=False, highlight=False, soft_wrap=True)


def show_manifest(
    manifest: Manifest,
    out: Path,
    *,
    as_json: bool,
    was_there: bool = False,
    next_command: str | None = None,
) -> None:
    """What an artifact is, where it lies, and the command that usually follows.

    Args:
        manifest: of the artifact.
        out: its folder.
        as_json: print the record instead.
        was_there: the same artifact was there before.
        next_command: what is suggested; a measurement beside the base when left out.
    """
    if as_json:
        print_json(json.loads(manifest.model_dump_json(by_alias=True)))
        return
    ratio = manifest.weight_bytes / manifest.base.weight_bytes
    stdout.print(
        f"{out}: {manifest.recipe.name} of {manifest.base.id}, weights "
        f"{decimal(manifest.weight_bytes, precision=2)} ({ratio:.0%} of {manifest.base.dtype}), "
        f"{manifest.vectors.dims} dimensions, {manifest.vectors.bytes_per_vector} bytes a vector"
        f"{' (already built)' if was_there else ''}",
        soft_wrap=True,
    )
    seen = manifest.calibration
    if seen is not None:
        stdout.print(_calibrated_on(manifest, seen), soft_wrap=True)
    if seen is not None and seen.n_cut:
        stdout.print(
            f"{seen.n_cut} of {seen.n_texts} calibration texts were longer than "
            f"{seen.max_tokens} tokens and were cut there",
            soft_wrap=True,
        )
    command = f"gteopt bench {out} --baseline {manifest.base.id} --out {out}-results"
    show_next(next_command or command)


def _calibrated_on(manifest: Manifest, seen: CalibrationRecord) -> str:
    """How much the build looked at, and whether the widest solved layer saw too little of it."""
    from gteopt.build.calibration_texts import few_tokens

    told = f"calibrated on {seen.n_tokens:,} tokens of {seen.n_texts:,} texts ({seen.source})"
    widest = max((each.in_features for each in manifest.layers if each.method == "gptq"), default=0)
    too_few = few_tokens(seen.n_tokens, widest)
    return told if too_few is None else f"{told}\nWarning: {too_few}"


def show_next(command: str) -> None:
    """The command that usually follows."""
    stdout.print(f"Next: {command}", markup=False, highlight=False, soft_wrap=True)


def show_publication(done: Publication, out: Path | None, *, as_json: bool) -> None:
    if as_json:
        print_json(json.loads(done.model_dump_json(by_alias=True)))
        return
    from gteopt.model.artifact import is_read

    table = Table(title=f"{out or done.url}", title_justify="left", box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("")
    for each in done.files:
        state = "" if done.commit is None else "sent" if each.sent else "was there"
        table.add_row(each.path, f"{each.n_bytes:,} bytes", state)
    for path in done.deleted:
        table.add_row(path, "", "deleted, of an earlier version")
    for path in done.kept:
        table.add_row(path, "", "kept, not of the artifact")
    stdout.print(table)
    n_bytes = sum(each.n_bytes for each in done.files)
    whole = f"{len(done.files)} files, {decimal(n_bytes, precision=2)}"
    if done.commit is None:
        stdout.print(
            f"Not sent: {whole} for {done.repo}, written to {out}. The hub was not asked what is "
            f"there: files that only an earlier version had will be deleted, others kept.",
            soft_wrap=True,
        )
        return
    sent = sum(each.n_bytes for each in done.files if each.sent)
    stdout.print(
        f"{done.url} holds {whole}, {decimal(sent, precision=2)} of it sent now, "
        f"commit {done.commit[:12]}",
        soft_wrap=True,
    )
    if unknown := [path for path in done.kept if is_read(Path(path))]:
        stderr.print(
            f"gteopt.load refuses {done.repo} while it holds {', '.join(unknown)}, which some "
            f"loader might read and no hash covers; `gteopt pull` passes it over",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def show_list(title: str, rows: list[dict[str, str]], style: Style) -> None:
    """Names with what they stand for."""
    if style == "json":
        print_json(rows)
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    print_table(table, style)
