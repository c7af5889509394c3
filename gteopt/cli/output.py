"""Print results: tables and JSON on stdout, notes on stderr."""

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

from gteopt.cli.progress_bars import ProgressSteps, show_steps
from gteopt.errors import InputError, escape_control_characters

if TYPE_CHECKING:
    from gteopt.frozen import Frozen
    from gteopt.records.manifest import CalibrationRecord, Manifest
    from gteopt.records.publication import Publication
    from gteopt.records.results_folder import Results


class PlainConsole(Console):
    """Prints every string literally, because names and foreign errors may look like markup.

    Control characters are shown as escapes, because they could move the cursor.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """The text with control characters made visible and without markup."""
        return super().render_str(
            escape_control_characters(text), **{**options, "markup": False, "emoji": False}
        )


# Piped output has no width. rich would assume 80 characters and drop columns of tables.
stdout = PlainConsole(width=None if sys.stdout.isatty() else 120)
stderr = PlainConsole(stderr=True)


def show_progress() -> AbstractContextManager[ProgressSteps]:
    """Progress bars on stderr."""
    return show_steps(stderr)


def show_backend(name: str, backend: str, reason: str) -> None:
    """A line on stderr: which backend "auto" took for what is named, and why."""
    said = f"{name}: computed by {backend}, which auto took: {reason}"
    stderr.print(said, style="dim", highlight=False, soft_wrap=True)


def print_json(content: object) -> None:
    """Print indented JSON on stdout."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


Style = Literal["table", "json", "csv", "markdown"]
"""How a result is printed."""


def choose_output_style(as_json: bool, as_csv: bool = False, as_markdown: bool = False) -> Style:
    """The requested style.

    Raises:
        InputError: more than one style.
    """
    if as_json + as_csv + as_markdown > 1:
        raise InputError("--json, --csv and --markdown exclude each other; give only one")
    return "json" if as_json else "csv" if as_csv else "markdown" if as_markdown else "table"


def print_table(table: Table, style: Style) -> None:
    """Print a table for people, or only its cells as CSV or Markdown."""
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
    """A cell's text on one line, without markup."""
    text = cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
    return " ".join(text.split())


def show_record(record: Frozen, table: Table, style: Style) -> None:
    """Print one record as JSON, or its table."""
    if style == "json":
        print_json(json.loads(record.model_dump_json(by_alias=True)))
    else:
        print_table(table, style)


def show_records(records: Sequence[Frozen], table: Table, style: Style) -> None:
    """Print several records as a JSON list, or their table."""
    if style == "json":
        print_json([json.loads(record.model_dump_json(by_alias=True)) for record in records])
    else:
        print_table(table, style)


def show_results(results: Results, style: Style, *, folder: Path | None = None) -> None:
    """Print the table of variants and the choice; with `folder`, also how to use the pick."""
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
                f"dropped in the screening on {record.n_texts} texts: {variant.name} "
                f"({variant.neighbour_overlap:.0%} of neighbours kept): {variant.dropped}",
                soft_wrap=True,
            )


def print_status(sentence: str) -> None:
    """Tell a person at a terminal what happens in the next seconds."""
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
    """Print an artifact's main facts, and a command to run next.

    Args:
        manifest: the artifact's manifest.
        out: the artifact's folder.
        as_json: print the manifest instead.
        was_there: the same artifact existed before.
        next_command: suggested command; a measurement beside the base when left out.
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
    calibration = manifest.calibration
    if calibration is not None:
        stdout.print(_calibrated_on(manifest, calibration), soft_wrap=True)
    if calibration is not None and calibration.n_cut:
        stdout.print(
            f"{calibration.n_cut} of {calibration.n_texts} calibration texts were longer than "
            f"{calibration.max_tokens} tokens and were cut",
            soft_wrap=True,
        )
    command = f"gteopt bench {out} --baseline {manifest.base.id} --out {out}-results"
    show_next(next_command or command)


def _calibrated_on(manifest: Manifest, calibration: CalibrationRecord) -> str:
    """The size of the calibration texts, with warnings if they are few or all short."""
    from gteopt.build.calibration_texts import check_calibration_lengths, check_calibration_tokens

    size = (
        f"calibrated on {calibration.n_tokens:,} tokens of {calibration.n_texts:,} texts "
        f"({calibration.source})"
    )
    if calibration.n_random:
        size += f" and {calibration.n_random} of random tokens"
    widths = (layer.in_features for layer in manifest.layers if layer.method == "gptq")
    too_few = check_calibration_tokens(calibration.n_tokens, max(widths, default=0))
    too_short = check_calibration_lengths(calibration)
    return "\nWarning: ".join(part for part in (size, too_few, too_short) if part is not None)


def show_next(command: str) -> None:
    """Print a command to run next."""
    stdout.print(f"Next: {command}", markup=False, highlight=False, soft_wrap=True)


def show_publication(publication: Publication, out: Path | None, *, as_json: bool) -> None:
    """Print the files of a publication and where they are."""
    if as_json:
        print_json(json.loads(publication.model_dump_json(by_alias=True)))
        return
    from gteopt.model.artifact import is_loadable_file

    table = Table(title=f"{out or publication.url}", title_justify="left", box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("")
    for file in publication.files:
        state = "" if publication.commit is None else "sent" if file.sent else "already there"
        table.add_row(file.path, f"{file.n_bytes:,} bytes", state)
    for path in publication.deleted:
        table.add_row(path, "", "deleted, from an earlier version")
    for path in publication.kept:
        table.add_row(path, "", "kept, not part of the artifact")
    stdout.print(table)
    n_bytes = sum(file.n_bytes for file in publication.files)
    total = f"{len(publication.files)} files, {decimal(n_bytes, precision=2)}"
    if publication.commit is None:
        stdout.print(
            f"Not sent: {total} for {publication.repo}, written to {out}. The Hub was not asked "
            f"for its files. Publishing will delete files of an earlier version and keep others.",
            soft_wrap=True,
        )
        return
    n_sent = sum(file.n_bytes for file in publication.files if file.sent)
    stdout.print(
        f"{publication.url} holds {total}, of which {decimal(n_sent, precision=2)} were sent now, "
        f"commit {publication.commit[:12]}",
        soft_wrap=True,
    )
    if unknown := [path for path in publication.kept if is_loadable_file(Path(path))]:
        stderr.print(
            f"gteopt.load refuses {publication.repo} because it holds {', '.join(unknown)}: some "
            f"loader might read it, and no hash covers it. `gteopt pull` ignores it.",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def show_list(title: str, rows: list[dict[str, str]], style: Style) -> None:
    """Print a list of names with their columns."""
    if style == "json":
        print_json(rows)
        return
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    print_table(table, style)
