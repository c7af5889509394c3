"""The card says what the artifact is, in words that the hub and the engines accept."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import gteopt
from gteopt.build.card import render_card
from gteopt.cli.app import app
from gteopt.config.recipe import FormatName, LayerScheme, Recipe, load_recipe
from gteopt.model.artifact import artifact_sha256, read_manifest
from gteopt.model.checkpoint import open_checkpoint

OWN = Recipe.model_validate(
    {
        "schema": "gteopt.recipe/1",
        "name": "mine",
        "weights": {
            "method": "rtn",
            "scheme": {"bits": 4, "group_size": 64, "symmetric": False},
            "skip": ["*.down_proj"],
        },
        "format": "gteopt",
        "dims": {"n": 64},
        "vectors": {"code": "binary"},
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("card")
    for recipe in ("bf16", "rtn-int4", OWN):
        name = recipe if isinstance(recipe, str) else recipe.name
        gteopt.quantize("nano", recipe, out / name)
    gteopt.quantize("nano", load_recipe("rtn-int4").with_format("compressed-tensors"), out / "ct")
    return out


def metadata(text: str) -> dict[str, Any]:
    """The metadata that the Hub's client reads from a card."""
    data: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return data


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bf16", "rtn-int4", "mine"])
def test_the_card_follows_from_the_artifact_and_names_no_path(folder: Path, name: str) -> None:
    artifact = folder / name
    assert text_of(artifact) == render_card(read_manifest(artifact), open_checkpoint(artifact))
    assert str(folder) not in text_of(artifact)
    assert "README.md" in {file.path for file in read_manifest(artifact).files}


def test_the_hub_reads_the_metadata(folder: Path) -> None:
    data = metadata(text_of(folder / "rtn-int4"))
    assert data["license"] == "cc-by-nc-sa-4.0"
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert {"gptq", "4-bit"} <= set(data["tags"])
    assert "base_model" not in data  # the embedded model is not on the Hub


def test_a_hub_base_is_named_with_the_relation_to_it(folder: Path) -> None:
    manifest = read_manifest(folder / "rtn-int4")
    base = manifest.base.model_copy(update={"id": "Alibaba-NLP/gte-Qwen2-7B-instruct"})
    manifest = manifest.model_copy(update={"base": base})
    data = metadata(render_card(manifest, open_checkpoint("nano")))
    assert data["base_model"] == "Alibaba-NLP/gte-Qwen2-7B-instruct"
    assert data["base_model_relation"] == "quantized"


@pytest.mark.parametrize("name", ["bf16", "mine"])
def test_the_python_of_the_card_runs(folder: Path, name: str) -> None:
    code = re.findall(r"```python\n(.*?)```", text_of(folder / name), re.DOTALL)
    assert len(code) == 1
    exec(code[0].replace("FOLDER", str(folder / name)), {})


def test_the_command_of_the_card_makes_the_same_artifact(folder: Path, tmp_path: Path) -> None:
    command = re.findall(r"```sh\n(gteopt .*?)\n```", text_of(folder / "rtn-int4"))
    arguments = shlex.split(command[0].replace("FOLDER", str(tmp_path / "again")))[1:]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert artifact_sha256(tmp_path / "again") == artifact_sha256(folder / "rtn-int4")


def test_a_recipe_of_ones_own_stands_in_the_card(folder: Path, tmp_path: Path) -> None:
    recipes = re.findall(r"```yaml\n(.*?)```", text_of(folder / "mine"), re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipes[0])
    assert load_recipe(str(tmp_path / "recipe.yaml")).sha256() == OWN.sha256()


def test_flags_that_change_a_shipped_recipe_stand_in_the_command(folder: Path) -> None:
    manifest = read_manifest(folder / "rtn-int4")
    best = load_recipe("gptq-int4").with_effort("best")
    for recipe, flags in (
        (best.with_int8_embedding(), "--effort best --embed-int8"),
        (best.with_format("compressed-tensors"), "--effort best --format compressed-tensors"),
    ):
        text = render_card(manifest.model_copy(update={"recipe": recipe}), open_checkpoint("nano"))
        assert f"--recipe gptq-int4 {flags} --out FOLDER" in text


def scheme(bits: int, *, symmetric: bool) -> LayerScheme:
    return LayerScheme.model_validate({"bits": bits, "group_size": 64, "symmetric": symmetric})


@pytest.mark.parametrize(
    ("format", "schemes", "served"),
    [
        ("gptq", [scheme(4, symmetric=True)], True),
        ("gptq", [scheme(8, symmetric=True)], True),
        ("gptq", [scheme(4, symmetric=False)], False),
        ("gptq", [scheme(3, symmetric=True)], False),
        ("compressed-tensors", [scheme(8, symmetric=False)], True),
        ("compressed-tensors", [scheme(2, symmetric=False)], False),
        ("compressed-tensors", [scheme(4, symmetric=True), scheme(8, symmetric=True)], False),
    ],
)
def test_servers_are_named_for_what_their_kernels_read(
    folder: Path, format: FormatName, schemes: list[LayerScheme], served: bool
) -> None:
    """As the engines' sources say: 4 or 8 bits, one scheme, zero points in one format only."""
    made = read_manifest(folder / "rtn-int4")
    layers = tuple(
        layer.model_copy(update={"scheme": schemes[i % len(schemes)]})
        for i, layer in enumerate(made.layers)
    )
    manifest = made.model_copy(update={"format": format, "layers": layers})
    text = render_card(manifest, open_checkpoint("nano"))
    assert ("**vLLM**" in text) == served
    assert ("Not vLLM or SGLang" in text) == (not served)


@pytest.mark.parametrize(
    ("format", "opens"),
    [
        (None, {"gteopt", "Sentence Transformers", "transformers", "vLLM"}),
        ("gptq", {"gteopt", "Sentence Transformers", "transformers"}),  # asymmetric
        ("compressed-tensors", {"gteopt", "Sentence Transformers", "transformers", "vLLM"}),
        ("gteopt", {"gteopt"}),
    ],
)
def test_only_engines_that_open_the_layout_are_named(
    folder: Path, format: FormatName | None, opens: set[str]
) -> None:
    names = {None: "bf16", "gptq": "rtn-int4", "gteopt": "mine", "compressed-tensors": "ct"}
    name = names[format]
    assert read_manifest(folder / name).format == format
    assert set(re.findall(r"^- \*\*(.+?)\*\*:", text_of(folder / name), re.MULTILINE)) == opens
