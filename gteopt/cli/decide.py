"""Commands that decide from measurements: choose, report, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gteopt.cli.options import (
    AsCsv,
    AsJson,
    AsMarkdown,
    Columns,
    Device,
    HubDir,
    Languages,
    OwnData,
    OwnTexts,
    PolicyName,
    SuiteName,
)
from gteopt.cli.output import (
    choose_output_style,
    print_json,
    print_status,
    print_table,
    show_list,
    show_progress,
    show_results,
    stderr,
    stdout,
)
from gteopt.cli.own_data import check_own_data, parse_columns, parse_name_list
from gteopt.errors import InputError


def choose(
    results_dir: Annotated[Path, typer.Argument(help="folder with bench.json, eval/ or fidelity/")],
    policy: PolicyName,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Pick the best variant by a policy's limits, objective and margin.

    Verdicts in eval/ are recomputed with that margin, and report.html is written again.

    Example: `gteopt choose artifacts/demo --policy smallest-index`
    """
    from gteopt.commands.choose import choose_by_policy
    from gteopt.config.policy import load_policy

    style = choose_output_style(as_json, as_csv, as_markdown)
    results = choose_by_policy(results_dir, load_policy(policy))
    if style == "json":
        assert results.choice is not None
        print_json(json.loads(results.choice.model_dump_json(by_alias=True)))
    else:
        show_results(results, style, folder=results_dir)


def report(
    results_dir: Annotated[Path, typer.Argument(help="folder with bench.json, eval/ or fidelity/")],
    other: Annotated[
        Path | None, typer.Argument(help="another results folder, to show both on one page")
    ] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Write report.html for a results folder, and print its table.

    With another folder, the page shows both side by side; `gteopt compare` prints their table.

    Example: `gteopt report artifacts/demo`
    """
    from gteopt.commands.choose import write_choice_page, write_comparison_page
    from gteopt.records.results_folder import read_results
    from gteopt.report.pick import use_lines

    style = choose_output_style(as_json, as_csv, as_markdown)
    if other is not None:
        if style != "table":
            raise InputError(
                f"a page of two folders prints no table; use `gteopt compare {results_dir} {other}`"
            )
        stdout.print(f"Report: {write_comparison_page(results_dir, other)}", soft_wrap=True)
        return
    results = read_results(results_dir)
    path = write_choice_page(results_dir, results)
    show_results(results, style, folder=results_dir)
    if style == "table" and not use_lines(results, results_dir):  # they name the page, too
        stdout.print(f"Report: {path}", soft_wrap=True)


def compare(
    first: Annotated[str, typer.Argument(help="an artifact or a results folder")],
    second: Annotated[str, typer.Argument(help="another artifact or results folder")],
    suite: SuiteName = None,
    data: OwnData = None,
    texts: OwnTexts = None,
    columns: Columns = None,
    languages: Languages = None,
    hub_dir: HubDir = None,
    device: Device = "auto",
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Compare two artifacts or two results folders.

    With a suite or data, the second artifact is scored against the first. In two results folders,
    variants of the same name are compared item by item. Differences have intervals.

    Example: `gteopt compare artifacts/nano-int4 artifacts/nano-int8 --suite mini`
    """
    style = choose_output_style(as_json, as_csv, as_markdown)
    roles = parse_columns(columns)
    data = check_own_data(data, texts, suite, roles, hub_dir)
    print_status("importing torch and the evaluation library")
    from gteopt.commands.compare import compare as compare_sources
    from gteopt.commands.evaluate import EvaluationSetup
    from gteopt.commands.judges import Judges
    from gteopt.report.compare import comparison_rows, item_rows
    from gteopt.report.terminal import eval_table, fidelity_table

    judges = None
    if data is not None or texts is not None or suite is not None:
        judges = Judges(data, texts, tuple(roles.items()), suite, parse_name_list(languages))
    with show_progress() as progress:
        pair = compare_sources(
            first,
            second,
            judges,
            how=EvaluationSetup(hub_dir=hub_dir, device=device),
            progress=progress,
        )
    rows = comparison_rows(pair.names, pair.manifests, pair.results, pair.engines)
    if style == "json":
        measured = [*pair.evals.values(), *pair.fidelity.values(), *pair.items.values()]
        records = [json.loads(record.model_dump_json(by_alias=True)) for record in measured]
        print_json({"rows": rows, "measured": records})
        return
    show_list("side by side", rows, style)
    if pair.items:
        title = f"{pair.names[1]} against {pair.names[0]}, item by item"
        show_list(title, item_rows(pair.items, pair.names), style)
    for note in pair.notes:
        stderr.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if pair.evals:
        print_table(eval_table(pair.evals), style)
    if pair.fidelity:
        print_table(fidelity_table(pair.fidelity), style)
