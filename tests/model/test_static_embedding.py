"""A model that is a table of token vectors is loaded, shortened and coded, never quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer

import gteopt
from gteopt.errors import InputError, UnsupportedError
from gteopt.paths import ASSETS
from gteopt.report.compare import comparison_rows
from gteopt.report.terminal import artifact_table

TEXTS = ["A bridge.", "Photosynthesis turns light into sugar.", "\u6c34", "", "A bridge. " * 300]


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static embedding as sentence-transformers saves it."""
    tokenizer = Tokenizer.from_file(str(ASSETS / "nano" / "tokenizer.json"))
    n_tokens = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    generator = torch.Generator().manual_seed(0)
    table = StaticEmbedding(tokenizer, torch.randn(n_tokens, 64, generator=generator))
    folder = tmp_path_factory.mktemp("static") / "static"
    SentenceTransformer(modules=[table, Normalize()], device="cpu").save(str(folder))
    return folder


def theirs(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def in_a_folder_of_its_own(static: Path, target: Path) -> Path:
    """The same model as older releases save it."""
    folder = Path(shutil.copytree(static, target))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_StaticEmbedding"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "0_StaticEmbedding").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).rename(folder / "0_StaticEmbedding" / name)
    return folder


def test_its_vectors_are_those_of_sentence_transformers(static: Path, tmp_path: Path) -> None:
    wanted = theirs(static).encode(TEXTS)
    other = in_a_folder_of_its_own(static, tmp_path / "other")
    np.testing.assert_array_equal(theirs(other).encode(TEXTS), wanted)
    for folder in (static, other):
        encoder = gteopt.load(folder, dtype="float32")
        np.testing.assert_allclose(encoder.encode(TEXTS), wanted, atol=1e-5)
    assert not wanted[3].any()  # a text without tokens


def test_texts_are_cut_where_the_tokenizers_file_says(static: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(static, tmp_path / "cut"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))
    long = [" ".join(TEXTS[:2])]
    with pytest.warns(UserWarning, match="longer than 8 tokens"):
        vectors = gteopt.load(folder, dtype="float32").encode(long)
    np.testing.assert_allclose(vectors, theirs(folder).encode(long), atol=1e-6)


@pytest.mark.parametrize("dims", [None, 16])
def test_an_artifact_opens_in_both_libraries(
    static: Path, tmp_path: Path, dims: int | None
) -> None:
    gteopt.quantize(static, "bf16", tmp_path / "full", dtype="float32")
    out = tmp_path / "full"
    if dims is not None:
        out = tmp_path / "short"
        gteopt.truncate(tmp_path / "full", out, dims=dims, method="slice")
    engines = (out / "README.md").read_text(encoding="utf-8").partition("## Engines")[2]
    assert "Sentence Transformers" in engines
    assert "vLLM" not in engines
    vectors = gteopt.load(out).encode(TEXTS[:3])
    wanted = theirs(static).encode(TEXTS[:3])[:, : dims or 64]
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)
    np.testing.assert_allclose(theirs(out).encode(TEXTS[:3]), wanted, atol=1e-6)
    assert gteopt.verify(out).base.n_parameters == gteopt.inspect(static).n_parameters


def test_int8_vectors_are_those_of_the_same_values(static: Path, tmp_path: Path) -> None:
    gteopt.quantize(static, "bf16", tmp_path / "full", dtype="float32")
    gteopt.truncate(tmp_path / "full", tmp_path / "int8", vectors="int8")
    full, coded = gteopt.load(tmp_path / "full"), gteopt.load(tmp_path / "int8")
    codes = coded.vectors.quantize(coded.vectors.project(full.encode(TEXTS[:3])))
    assert codes.dtype == np.int8
    decoded = coded.vectors.dequantize(codes)
    cosines = (full.encode(TEXTS[:3]) * decoded).sum(1) / np.linalg.norm(decoded, axis=1)
    assert cosines.min() > 0.999


def test_a_recipe_for_weights_says_that_there_are_none(static: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="has no layers to quantize"):
        gteopt.quantize(static, "int8", tmp_path / "out")
    estimates = {estimate.recipe: estimate for estimate in gteopt.inspect(static).estimates}
    assert estimates["bf16"].engines == ("sentence-transformers", "gteopt")
    problems = {name: estimate.problem for name, estimate in estimates.items()}
    assert problems["bf16"] is None
    assert "has no layers to quantize" in str(problems["gptq-int4"])


def test_no_list_names_an_engine_that_does_not_open_a_table(static: Path, tmp_path: Path) -> None:
    gteopt.quantize(static, "bf16", tmp_path / "full", dtype="float32")
    gteopt.truncate(tmp_path / "full", tmp_path / "int8", vectors="int8")
    found = gteopt.compare(tmp_path / "full", tmp_path / "int8")
    rows = comparison_rows(found.names, found.manifests, (), found.engines)
    opened = next(row for row in rows if row[""] == "opened by")
    assert opened == {"": "opened by", "full": "sentence-transformers, gteopt", "int8": "gteopt"}
    inspection = gteopt.inspect(tmp_path / "full")
    assert inspection.manifest is not None
    cells = artifact_table(inspection, inspection.manifest).columns[1].cells
    assert "sentence-transformers, gteopt" in [str(cell) for cell in cells]


def test_a_table_under_another_name_and_a_pickle_are_refused(static: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(static, tmp_path / "other"))
    table = load_file(folder / "model.safetensors")["embedding.weight"]
    save_file({"embeddings": table}, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"no table embedding\.weight"):
        gteopt.load(folder)
    save_file({"embedding.weight": table[:7]}, folder / "model.safetensors")
    with pytest.raises(InputError, match="beyond"):
        gteopt.load(folder).encode(TEXTS)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="pickle"):
        gteopt.load(folder)
