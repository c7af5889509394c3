"""The documentation cannot lie: commands, examples, links, tables and references are checked."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml
from pydantic import BaseModel

import gteopt
from gteopt.cli.app import app
from gteopt.config.plan import Plan
from gteopt.config.policy import Metric, Policy
from gteopt.config.recipe import Recipe
from gteopt.config.yaml_files import list_shipped_names
from gteopt.model.families import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "docs" / "cli.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [page for page in PAGES if page != GENERATED]
LINKED = [
    *WRITTEN,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name / "README.md" for name in ("artifacts", "eval/suites", "eval/mini")),
    ROOT / "eval" / "reference" / "README.md",
]
FENCED = re.compile(r"(<!-- not run: .+? -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
DOCUMENTS: dict[str, type[BaseModel]] = {
    "gteopt.recipe/1": Recipe,
    "gteopt.plan/1": Plan,
    "gteopt.policy/1": Policy,
}
SHORT = 25
"""The largest number of words in a sentence."""
LONG = {"cli.md": 10_000}
"""Pages whose sentences may still be longer."""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, kind: str) -> list[str]:
    """Code blocks of one language, without those that say why they are not run."""
    fenced = FENCED.findall(text_of(page))
    return [body for reason, language, body in fenced if language == kind and not reason]


def paragraphs(page: Path) -> Iterator[str]:
    """Prose: no code, tables, headings or comments; a list item is a paragraph of its own."""
    text = FENCED.sub("\n\n", text_of(page))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(\|.*|#.*)$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    yield from (
        " ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()
    )


def test_the_cli_reference_is_what_the_program_says() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "typer", "gteopt.cli.app", "utils", "docs", "--name", "gteopt"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert text_of(GENERATED).split() == ran.stdout.split(), "run `make docs`"


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_generated_tables_say_what_results_and_types_say(page: Path) -> None:
    filled = runpy.run_path(str(ROOT / "docs" / "generate.py"))["filled"]
    assert text_of(page) == filled(page), "run `make docs`"


def test_every_generated_table_stands_on_some_page() -> None:
    tables = runpy.run_path(str(ROOT / "docs" / "generate.py"))["TABLES"]
    shown = {
        name for page in WRITTEN for name in re.findall(r"<!-- table (\S+) -->", text_of(page))
    }
    assert set(tables) == shown


def test_every_field_that_a_user_writes_is_described() -> None:
    references = (
        text_of(ROOT / "docs" / f"{name}.md") for name in ("recipes", "plans", "choosing")
    )
    rows = [line for text in references for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert [row for row in rows if row.endswith("|  |")] == []


def code_lines(text: str) -> Iterator[str]:
    """Lines of shell commands and their output, and inline code."""
    for _, language, body in FENCED.findall(text):
        if language not in ("python", "yaml", "json"):
            yield from body.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCED.sub("", text))


def unknown_commands(text: str) -> list[str]:
    """Code whose gteopt command, option of it or Python file does not exist."""
    group: Any = typer.main.get_command(app)
    options: dict[str, set[str]] = {
        verb: {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
        for verb, command in group.commands.items()
    }
    every_option = set[str]().union(*options.values())

    def is_known(line: str) -> bool:
        line = line.partition(" #")[0]
        files = re.findall(r"\bpython ((?:[\w-]+/)+[\w-]+\.py)", line)
        if not all((ROOT / name).is_file() for name in files):
            return False
        verb, _, arguments = line.partition(" ")
        if typed := re.search(r"(?<![\w-])gteopt ([a-z][\w-]*)(.*)", line):
            verb, arguments = typed[1], typed[2]
        elif verb.startswith("--"):  # an option alone, as the text around it names the command
            return verb.partition("=")[0] in every_option
        elif verb not in options:  # another program
            return True
        given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", arguments))
        return verb in options and given <= options[verb]

    return [line for line in code_lines(text) if not is_known(line)]


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_every_command_exists_with_its_options(page: Path) -> None:
    assert unknown_commands(text_of(page)) == []


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ("gteopt bench nano", "gteopt bennch nano"),
        ("$ gteopt evaluate nano --languages pl", "$ gteopt evaluate nano --language pl"),
        ("gteopt bench nano \\\n  --out o", "gteopt bench nano \\\n  --suite mini"),
        ("gteopt quantize nano --recipe=int8", "gteopt quantize nano --recipes=int8"),
        ('ray exec c.yaml "gteopt embed a --ray auto"', 'ray exec c.yaml "gteopt embed a --rai b"'),
        ("python benchmarks/grid.py", "python benchmarks/grit.py"),
        ("gteopt suites  # no --option", "hf download && gteopt suites --option"),
    ],
)
def test_an_unknown_command_is_seen_in_blocks_and_inline_code(known: str, unknown: str) -> None:
    reason = "<!-- not run: takes long -->\n"
    for language in ("sh", "bash", "console", ""):
        assert unknown_commands(f"{reason}```{language}\n{known}\n```\n") == []
        assert unknown_commands(f"{reason}```{language}\n{known}\n{unknown}\n```\n") != []
    if "\n" not in known:
        assert unknown_commands(f"`{known}` and then `{unknown}`") == [unknown]


@pytest.mark.parametrize(
    ("known", "unknown"), [("bench --out", "bench --suite"), ("--languages pl", "--language pl")]
)
def test_an_unknown_option_is_seen_in_inline_code(known: str, unknown: str) -> None:
    assert unknown_commands(f"`{known}` and `{unknown}`, as `hf download --local-dir`") == [unknown]


@pytest.fixture(scope="module")
def written_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the examples of all pages, so each artifact is built once."""
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("page", [p for p in WRITTEN if blocks(p, "python")], ids=named)
def test_the_python_examples_run_one_after_another(
    page: Path, written_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written_in)
    names: dict[str, Any] = {}
    for source in blocks(page, "python"):
        exec(compile(source, page.name, "exec"), names)


@pytest.mark.parametrize("page", [p for p in WRITTEN if blocks(p, "yaml")], ids=named)
def test_the_yaml_examples_are_valid(page: Path) -> None:
    for source in blocks(page, "yaml"):
        content = yaml.safe_load(source)
        if "schema" in content:
            DOCUMENTS[content["schema"]].model_validate(content)
        elif "calibration" in content:
            whole = {"schema": "gteopt.recipe/1", "name": "example", **content}
            Recipe.model_validate(whole)


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    prose = FENCED.sub("", text_of(page))
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        linked_page = (page.parent / path).resolve() if path else page
        assert linked_page.exists(), target
        if anchor:
            assert anchor in anchors(linked_page), target


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text_of(page)), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_the_readme_is_short_and_names_every_page() -> None:
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= 200
    assert len(readme.encode()) <= 12_000
    assert [named(page) for page in PAGES[1:] if f"]({named(page)})" not in readme] == []


@pytest.mark.parametrize(
    "page", [*WRITTEN, ROOT / "CONTRIBUTING.md", ROOT / "artifacts" / "README.md"], ids=named
)
def test_sentences_are_short_and_figures_stand_in_tables(page: Path) -> None:
    most = LONG.get(page.name, SHORT)
    too_long, too_many = [], []
    for paragraph in paragraphs(page):
        for sentence in re.split(r"(?<=[.!?])\s+|(?<=:)\s*$|;\s", paragraph):
            if len(re.findall(r"\w[\w'’/.+-]*", sentence)) > most:
                too_long.append(sentence)
        if len(re.findall(r"(?<![\w.,-])\d[\d.,]*(?![\w-])", paragraph)) > 3:
            too_many.append(paragraph)
    assert too_long == []
    assert too_many == []


def test_every_metric_of_a_policy_is_defined() -> None:
    page = text_of(ROOT / "docs" / "choosing.md")
    assert [metric for metric in get_args(Metric) if f"\n| `{metric}` |" not in page] == []


def test_every_public_name_is_on_the_page_about_python() -> None:
    page = text_of(ROOT / "docs" / "python.md")
    assert [name for name in gteopt.__all__ if f"`gteopt.{name}`" not in page] == []


def test_the_recipes_page_names_the_default_recipe() -> None:
    group: Any = typer.main.get_command(app)
    params = group.commands["quantize"].params
    default = next(param.default for param in params if "--recipe" in param.opts)
    page = text_of(ROOT / "docs" / "recipes.md")
    assert f"`gteopt quantize` takes `{default}` where no recipe is named" in page


def test_the_glossary_has_at_most_forty_terms_in_order() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", text_of(ROOT / "docs" / "glossary.md"), re.MULTILINE)
    terms = [row.lower() for row in rows[2:]]
    assert 20 <= len(terms) <= 40
    assert terms == sorted(terms)


def test_every_family_of_a_published_model_is_in_the_readme() -> None:
    readme = text_of(ROOT / "README.md").lower()
    families = {model.family for model in PUBLISHED.values() if model.family is not None}
    assert sorted(family for family in families if family not in readme) == []


def test_every_shipped_recipe_that_changes_weights_names_a_paper() -> None:
    texts = {name: (ROOT / "recipes" / f"{name}.yaml") for name in list_shipped_names("recipes")}
    assert [n for n, path in texts.items() if "https://arxiv.org/abs/" not in path.read_text()] == [
        "bf16"
    ]


def test_the_reproduced_scores_are_what_was_measured_and_plain_mtebs() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "reproduce.json").read_text())
    page = text_of(ROOT / "eval" / "reference" / "README.md")
    table = page.split("<!-- reproduced -->")[1].split("<!-- /reproduced -->")[0]
    lines = []
    for row in stored["rows"]:
        assert row["ours"] == pytest.approx(row["plain_mteb"], abs=1e-5), row["task"]
        published, reason = row["published"], row["reason"] or ""
        assert reason or published is None or abs(row["ours"] - published) < 0.01, row["task"]
        name = row["task"] if row["subset"] == "default" else f"{row['task']} {row['subset']}"
        lines.append(
            f"| {name} | {row['ours']:.6f} | {row['plain_mteb']:.6f} "
            f"| {'' if published is None else f'{published:.6f}'} | {reason} |"
        )
    assert table.strip().splitlines()[2:] == lines


def test_the_grid_agrees_with_plain_mteb() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "grid.json").read_text())
    rows = {row["name"]: row for row in stored["rows"]}
    assert len(rows) == stored["plain_rows"] == 36
    # Plain mteb gives the rows' own scores, from vectors that no cache has rounded.
    assert len(stored["plain"]) == 6
    for run in stored["plain"]:
        row = rows[f"{run['name']}-{run['dims']}-{run['code']}"]
        assert run["score"] == pytest.approx(row["score"], abs=1.1e-4)
