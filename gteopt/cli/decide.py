"""Commands that decide by what was measured: choose, report, compare."""

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
    print_json,
    print_table,
    say,
    show_list,
    show_progress,
    show_results,
    stderr,
    stdout,
    style_of,
)
from gteopt.cli.own_data import check_own_data, parse_columns, parse_list
from gteopt.errors import InputError


def choose(
    results_dir: Annotated[Path, typer.Argument(help="folder with bench.json, eval/ or fidelity/")],
    policy: PolicyName,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Pick the variant that a policy asks for, by its limits and its margin.

    Verdicts in eval/ are settled against that margin, and report.html is written anew.

    Example: `gteopt choose artifacts/demo --policy smallest-index`
    """
    from gteopt.commands.choose import judge
    from gteopt.config.policy import load_policy

    style = style_of(as_json, as_csv, as_markdown)
    results = judge(results_dir, load_policy(policy))
    if style == "json":
        assert results.choice is not None
        print_json(json.loads(results.choice.model_dump_json(by_alias=True)))
    else:
        show_results(results, style, folder=results_dir)


def report(
    results_dir: Annotated[Path, typer.Argument(help="folder with bench.json, eval/ or fidelity/")],
    other: Annotated[
        Path | None, typer.Argument(help="another such folder: one page shows both")
    ] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Write report.html from what a results folder holds, and print its table.

    With another folder, the page shows both side by side; `gteopt compare` prints their table.

    Example: `gteopt report artifacts/demo`
    """
    from gteopt.commands.choose import write_comparison, write_page
    from gteopt.records.results_folder import read_results

    style = style_of(as_json, as_csv, as_markdown)
    if other is not None:
        if style != "table":
            raise InputError(f"a page of two has no table; `gteopt compare {results_dir} {other}`")
        stdout.print(f"Report: {write_comparison(results_dir, other)}", soft_wrap=True)
        return
    results = read_results(results_dir)
    path = write_page(results_dir, results)
    show_results(results, style, folder=results_dir)
    if style == "table":
        stdout.print(f"Report: {path}", soft_wrap=True)


def compare(
    first: Annotated[str, typer.Argument(help="an artifact, or a results folder")],
    second: Annotated[str, typer.Argument(help="a second one of the same kind")],
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
    """Put two artifacts or two results folders side by side.

    With data, the second artifact is scored against the first. Of two results folders, variants of
    the same name are compared item by item. Differences have intervals.

    Example: `gteopt compare artifacts/nano-int4 artifacts/nano-int8 --suite mini`
    """
    style = style_of(as_json, as_csv, as_markdown)
    roles = parse_columns(columns)
    data = check_own_data(data, texts, suite, roles, hub_dir)
    say("importing torch and the evaluation library")
    from gteopt.commands.compare import compare as side_by_side
    from gteopt.commands.evaluate import Setup
    from gteopt.commands.optimize import Judges
    from gteopt.report.compare import comparison_rows, item_rows
    from gteopt.report.terminal import eval_table, fidelity_table

    judges = None
    if data is not None or texts is not None or suite is not None:
        judges = Judges(data, texts, tuple(roles.items()), suite, parse_list(languages))
    with show_progress() as progress:
        found = side_by_side(
            first,
            second,
            judges,
            how=Setup(hub_dir=hub_dir, device=device),
            progress=progress,
        )
    rows = comparison_rows(found.names, found.manifests, found.results)
    if style == "json":
        measured = [*found.evals.values(), *found.fidelity.values(), *found.items.values()]
        records = [json.loads(record.model_dump_json(by_alias=True)) for record in measured]
        print_json({"rows": rows, "measured": records})
        return
    show_list("side by side", rows, style)
    if found.items:
        title = f"{found.names[1]} against {found.names[0]}, item by item"
        show_list(title, item_rows(found.items, found.names), style)
    for note in found.notes:
        stderr.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if found.evals:
        print_table(eval_table(found.evals), style)
    if found.fidelity:
        print_table(fidelity_table(found.fidelity), style)
