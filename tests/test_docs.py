"""The README and the command-line reference cannot lie."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from gteopt.cli.app import app
from gteopt.config.plan import load_plan
from gteopt.config.yaml_files import shipped_names
from gteopt.model.families import FAMILIES, PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def generated_reference() -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "typer", "gteopt.cli.app", "utils", "docs", "--name", "gteopt"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return ran.stdout


def test_the_cli_reference_is_what_the_program_says() -> None:
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written.split() == generated_reference().split(), "run `make docs`"


def test_every_command_in_the_readme_exists_with_its_options() -> None:
    group = typer.main.get_command(app)
    lines = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("gteopt ")]
    assert len(commands) >= 8
    for words in commands:
        command = group.commands[words[1]]  # type: ignore[attr-defined]
        options = {name for each in command.params for name in each.opts}
        assert {word for word in words if word.startswith("--")} <= options, words


def test_the_table_of_families_says_what_the_program_knows() -> None:
    table = README.split("<!-- families -->")[1].split("<!-- /families -->")[0]
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.strip().splitlines()[2:]
    ]
    expected = []
    for name, model in PUBLISHED.items():
        family = FAMILIES[model.family]
        pooling = {"lasttoken": "last token", "latent": "latent attention, mean"}[family.pooling]
        around = f"... `{family.end_token}`"
        dims = f"{model.dims:,}"
        expected.append(
            [
                name,
                family.name,
                family.attention,
                pooling,
                f"`{family.start_token}` {around}" if family.start_token else around,
                f"{dims}, down to {family.least_dims}" if family.least_dims else dims,
                f"{family.max_tokens:,}",
                model.license,
                ", ".join(f"{suite} {score:.2f}" for suite, score in model.scores.items()),
            ]
        )
    assert rows == expected


def test_the_python_example_in_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [body for kind, body in BLOCKS if kind == "python"]
    assert len(sources) == 1
    exec(compile(sources[0], "README.md", "exec"), {})
    assert (tmp_path / "artifacts" / "nano-int4" / "gteopt.json").is_file()


def test_the_readmes_results_table_has_every_variant_of_the_demo() -> None:
    for name in load_plan("demo").recipes:
        assert f"| `{name}` |" in README


def test_every_shipped_recipe_is_named_in_the_readme() -> None:
    assert [name for name in shipped_names("recipes") if f"`{name}`" not in README] == []


def test_every_shipped_recipe_that_changes_weights_names_a_paper() -> None:
    texts = {name: (ROOT / "recipes" / f"{name}.yaml") for name in shipped_names("recipes")}
    assert [n for n, path in texts.items() if "https://arxiv.org/abs/" not in path.read_text()] == [
        "bf16"
    ]


def test_links_inside_the_repository_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_comparison_in_the_readme_is_what_was_measured() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "peers_quality.json").read_text())
    rows = {(row["model"], row["peer"]): row for row in stored["rows"]}
    table = README.split("<!-- peers -->")[1].split("<!-- /peers -->")[0].strip().splitlines()[2:]
    assert len(table) > 20
    for line in table:
        peer, bits, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found = [rows.get((model, peer)) for model in ("all-MiniLM-L6-v2", "gte-nano")]
        sizes = [row["bits_per_weight"] for row in found if row and not row["error"]]
        assert bits == f"{max(sizes):.2f}", peer
        for row, (error, neighbours, seconds) in zip(found, (cells[:3], cells[3:]), strict=True):
            if row is None or row["error"]:
                assert (error, neighbours, seconds) == ("fails" if row else "", "", ""), peer
                continue
            assert error == f"{1 - row['mean_cosine']:.5f}", peer
            assert neighbours == f"{100 * row['neighbour_overlap']:.1f} %", peer
            assert seconds == f"{row['build_s']:.0f} s", peer


@pytest.mark.parametrize("model", ["minilm", "qwen2"])
def test_the_speeds_in_the_readme_are_what_was_measured(model: str) -> None:
    path = ROOT / "benchmarks" / "results" / f"peers_speed_cpu_{model}.json"
    stored = json.loads(path.read_text())
    table = README.split(f"<!-- speed {model} -->")[1].split("<!-- /speed -->")[0]
    lines = []
    for row in stored["rows"]:
        bulk, query = row["timings"]["bulk"], row["timings"]["query"]
        lines.append(
            f"| {row['engine']} | {row['cosine']:.4f} | {bulk['ratio']:.2f} | {query['ratio']:.2f} "
            f"| {query['seconds'] * 1e3:.1f} ms |"
        )
    assert table.strip().splitlines()[2:] == lines


def test_the_reproduced_scores_are_what_was_measured_and_plain_mtebs() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "reproduce.json").read_text())
    page = (ROOT / "eval" / "reference" / "README.md").read_text(encoding="utf-8")
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


def test_the_grid_in_the_readme_is_what_was_measured() -> None:
    stored = json.loads((ROOT / "benchmarks" / "results" / "grid.json").read_text())
    rows = {row["name"]: row for row in stored["rows"]}
    table = README.split("<!-- grid -->")[1].split("<!-- /grid -->")[0].strip().splitlines()[2:]
    lines = []
    for dims in (256, 128, 64, 32):
        for code in ("float32", "int8", "binary"):
            of_row = [rows[f"{name}-{dims}-{code}"] for name in ("nano", "int8", "gptq-int4")]
            cells = []
            for row in of_row:
                cells.append(f"{100 * row['score']:.2f} {row['verdict']}")
                cells.append(f"{100 * row['neighbour_overlap']:.1f} %")
            size = f"{of_row[0]['bytes_per_vector']:,}"
            lines.append(f"| {dims} | {code} | {size} | {' | '.join(cells)} |")
    assert table == lines
    assert len(rows) == len(lines) * 3 == stored["plain_rows"]
    said = README.split("<!-- grid-time -->")[1].split("<!-- /grid-time -->")[0]
    for figure in (
        f"took {stored['grid']['cpu_s']:,.0f} s of CPU",
        f"{stored['n_texts']:,} texts encoded, {stored['n_saved']:,} encodings saved",
        f"would take {stored['plain_cpu_s']:,.0f} s, {stored['speedup_cpu']:.1f} times",
    ):
        assert figure in said
    # Plain mteb gives the rows' own scores, from vectors that no cache has rounded.
    assert len(stored["plain"]) == 6
    for run in stored["plain"]:
        row = rows[f"{run['name']}-{run['dims']}-{run['code']}"]
        assert run["score"] == pytest.approx(row["score"], abs=1.1e-4)
