"""Commands that list shipped files and write a template: recipes, suites, policies, plans, init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gteopt.cli.options import OUTPUT, AsCsv, AsJson, AsMarkdown
from gteopt.cli.output import choose_output_style, show_list, show_next, stdout
from gteopt.errors import InputError


def recipes(
    as_json: AsJson = False, as_csv: AsCsv = False, as_markdown: AsMarkdown = False
) -> None:
    """List the recipes that ship with gteopt.

    Example: `gteopt recipes`
    """
    from gteopt.config.recipe import load_recipe
    from gteopt.config.yaml_files import list_shipped_names

    shipped = [load_recipe(name) for name in list_shipped_names("recipes")]
    rows = [{"name": recipe.name, "summary": recipe.summary} for recipe in shipped]
    show_list("recipes", rows, choose_output_style(as_json, as_csv, as_markdown))


def suites(as_json: AsJson = False, as_csv: AsCsv = False, as_markdown: AsMarkdown = False) -> None:
    """List the evaluation suites that ship with gteopt.

    Example: `gteopt suites`
    """
    from gteopt.config.yaml_files import list_shipped_names
    from gteopt.evaluation.suites import read_suite

    shipped = [read_suite(name) for name in list_shipped_names("eval/suites")]
    rows = [
        {
            "name": suite.name,
            "summary": suite.summary,
            "tasks": str(len(suite.tasks)),
            "minutes (7B, H200)": f"{suite.minutes:g}" if suite.minutes else "",
        }
        for suite in shipped
    ]
    show_list("suites", rows, choose_output_style(as_json, as_csv, as_markdown))


def policies(
    as_json: AsJson = False, as_csv: AsCsv = False, as_markdown: AsMarkdown = False
) -> None:
    """List the policies that ship with gteopt.

    Example: `gteopt policies`
    """
    from gteopt.config.policy import load_policy
    from gteopt.config.yaml_files import list_shipped_names

    shipped = [load_policy(name) for name in list_shipped_names("recipes/policies")]
    rows = [{"name": policy.name, "summary": policy.summary} for policy in shipped]
    show_list("policies", rows, choose_output_style(as_json, as_csv, as_markdown))


def plans(as_json: AsJson = False, as_csv: AsCsv = False, as_markdown: AsMarkdown = False) -> None:
    """List the plans that ship with gteopt.

    Example: `gteopt plans`
    """
    from gteopt.config.plan import load_plan
    from gteopt.config.yaml_files import list_shipped_names

    shipped = [load_plan(name) for name in list_shipped_names("recipes/plans")]
    rows = [{"name": plan.name, "summary": plan.summary, "base": plan.base} for plan in shipped]
    show_list("plans", rows, choose_output_style(as_json, as_csv, as_markdown))


def init(
    kind: Annotated[
        Literal["recipe", "policy", "plan", "suite"], typer.Argument(help="kind of file to write")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="file to write; my-KIND.yaml when left out", rich_help_panel=OUTPUT),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented YAML file as a start.

    Example: `gteopt init recipe --out my-recipe.yaml`
    """
    from gteopt.paths import ASSETS

    file = out or Path(f"my-{kind}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {file}: the file must end in .yaml")
    if file.exists():
        raise InputError(f"{file} exists; remove it or give another --out")
    template = (ASSETS / "templates" / f"{kind}.yaml").read_text(encoding="utf-8")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(template, encoding="utf-8")
    next_commands = {
        "recipe": f"gteopt quantize nano --recipe {file} --out artifacts/mine",
        "policy": f"gteopt choose RESULTS --policy {file}",
        "plan": f"gteopt run {file}",
        "suite": f"gteopt evaluate nano --suite {file}",
    }
    if as_json:
        typer.echo(f'{{"file": "{file.as_posix()}"}}')
        return
    stdout.print(f"{file}: edit this {kind}", soft_wrap=True)
    show_next(next_commands[kind])
