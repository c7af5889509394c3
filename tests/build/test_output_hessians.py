"""Gradients by layers' outputs: against autograd of the whole model, and what they are worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import gteopt
from gteopt.build import output_hessians
from gteopt.build.calibration_texts import (
    draw_calibration_texts,
    draw_random_texts,
    tokenize_calibration,
)
from gteopt.build.estimate import estimate_builds
from gteopt.build.layer_plan import plan_layers
from gteopt.build.output_hessians import (
    N_PROBES,
    measure_output_hessians,
    output_hessian_path,
    read_output_hessians,
)
from gteopt.build.replay import StateSpill
from gteopt.config.recipe import Calibration, GptqWeights, Recipe, load_recipe
from gteopt.encoder.description import RuntimeOptions
from gteopt.encoder.loading import load_checkpoint
from gteopt.model.checkpoint import open_checkpoint
from gteopt.progress import Progress

FEW = Calibration(n_texts=12, max_tokens=32)


def measured(
    folder: Path, layers: list[str], *, streams: bool = False
) -> dict[str, dict[str, list[Tensor]]]:
    """The matrices by block and layer."""
    checkpoint = open_checkpoint("nano")
    plan = plan_layers(checkpoint, load_recipe("gptq-int4"))
    encoder = load_checkpoint(
        checkpoint, RuntimeOptions(dtype="float32"), later=plan.blocks if streams else None
    )
    tokens = tokenize_calibration(encoder.tokenization, draw_calibration_texts(FEW), 32)
    spill = StateSpill(0 if streams else 1 << 30, folder / "spill")
    measure_output_hessians(encoder, tokens, layers, folder, spill=spill)
    return {path.stem: read_output_hessians(path) for path in sorted(folder.glob("*.safetensors"))}


def test_the_matrices_are_those_of_autograd_through_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts fit one batch, so the oracle draws the same directions."""
    encoder = gteopt.load("nano", dtype="float32")
    modules = dict(encoder.module.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    tokens = tokenize_calibration(encoder.tokenization, draw_calibration_texts(FEW), 32)
    batch = sorted(tokens, key=len)
    outputs: dict[str, Tensor] = {}
    for name in layers:

        def note(_module: object, _args: object, out: Tensor, name: str = name) -> None:
            outputs[name] = out

        modules[name].register_forward_hook(note)
    ids, mask = encoder.pad(batch)
    encoder.module.get_input_embeddings().weight.requires_grad_(True)  # type: ignore[operator]
    states = encoder.module(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = encoder.pooled(states, encoder.pool_mask(batch, mask))
    vectors = torch.nn.functional.normalize(pooled.double())
    probes = torch.randn(
        N_PROBES, *vectors.shape, generator=torch.Generator().manual_seed(0)
    ).double()
    sums = {name: torch.zeros(out.shape[-1], out.shape[-1]) for name, out in outputs.items()}
    for probe in probes:
        product = (vectors * probe).sum()
        gradients = torch.autograd.grad(product, list(outputs.values()), retain_graph=True)
        for name, gradient in zip(outputs, gradients, strict=True):
            rows = gradient[mask.bool()]
            sums[name] += rows.T @ rows
    matrices = measured(tmp_path / "whole", layers)
    assert {layer for block in matrices.values() for layer in block} == outputs.keys()
    for of_block in matrices.values():
        for name, (matrix,) in of_block.items():
            ours, expected = matrix.float(), sums[name]
            ours, expected = ours / ours.diagonal().sum(), expected / expected.diagonal().sum()
            assert (ours - expected).norm() < 0.01 * expected.norm()  # bfloat16

    monkeypatch.setattr(output_hessians, "MOST_OUTPUTS", 100)
    parts = measured(tmp_path / "parts", layers, streams=True)
    for block, of_block in parts.items():
        for name, pieces in of_block.items():
            (whole,) = matrices[block][name]
            assert [len(piece) for piece in pieces] == [
                min(100, len(whole) - start) for start in range(0, len(whole), 100)
            ]
            for i, piece in enumerate(pieces):
                span = slice(100 * i, 100 * i + len(piece))
                assert torch.allclose(piece.float(), whole[span, span].float(), rtol=0.02)


def test_a_pass_back_leaves_no_weights_in_memory(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("nano")
    plan = plan_layers(checkpoint, load_recipe("gptq-int4"))
    encoder = load_checkpoint(checkpoint, RuntimeOptions(dtype="float32"), later=plan.blocks)
    tokens = tokenize_calibration(encoder.tokenization, draw_calibration_texts(FEW), 32)
    seen: list[tuple[int, int]] = []
    measure_output_hessians(
        *(encoder, tokens, ["layers.1.mlp.up_proj"], tmp_path),
        spill=StateSpill(0, tmp_path / "spill"),
        progress=lambda _what, done, total: seen.append((done, total)),
    )
    assert all(p.is_meta for p in encoder.module.get_submodule(str(plan.blocks)).parameters())
    assert seen[-1] == (seen[-1][1],) * 2
    counts = [len(read_output_hessians(path)) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert counts == [0, 1, 0, 0]


def test_inspect_counts_what_the_pass_leaves_on_disk(tmp_path: Path) -> None:
    """No hidden state may stay in memory, so the inputs of all blocks lie beside the matrices."""
    checkpoint, made = open_checkpoint("nano"), recipe(0.5)
    (predicted,) = estimate_builds(checkpoint, [made], activation_bytes=0)
    plan = plan_layers(checkpoint, made)
    encoder = load_checkpoint(checkpoint, later=plan.blocks)
    texts = draw_calibration_texts(made.calibration)
    texts += draw_random_texts(made, encoder.tokenization)
    tokens = tokenize_calibration(encoder.tokenization, texts, made.calibration.max_tokens)
    spill = StateSpill(0, tmp_path / "spill")
    measure_output_hessians(encoder, tokens, plan.schemes, tmp_path, spill=spill)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert predicted.disk_bytes == pytest.approx(written, rel=0.05)


def recipe(share: float, n_texts: int = 128, max_tokens: int = 128) -> Recipe:
    made = load_recipe("gptq-int4")
    weights = made.weights.model_copy(update={"row_feedback": share})
    spec = Calibration(n_texts=n_texts, max_tokens=max_tokens)
    return made.model_copy(update={"weights": weights, "calibration": spec})


def test_vectors_of_unseen_texts_are_closer_with_row_feedback(tmp_path: Path) -> None:
    drawn = draw_calibration_texts(Calibration(n_texts=400))[200:]
    texts = [text.text for text in drawn]
    wanted = gteopt.load("nano", dtype="float32").embed(texts)
    errors = []
    for share in (0.0, 0.5):
        gteopt.quantize("nano", recipe(share), tmp_path / str(share), dtype="float32")
        vectors = gteopt.load(tmp_path / str(share)).embed(texts)
        errors.append(float(1 - (vectors * wanted).sum(axis=1).mean()))
    assert errors[1] < 0.95 * errors[0]


def test_a_build_that_is_killed_ends_in_the_same_bytes_and_leaves_no_matrices(
    tmp_path: Path,
) -> None:
    class Killed(Exception):
        pass

    def stop_at(what: str, at: int) -> Progress:
        def stop(now: str, done: int, total: int) -> None:
            if now.startswith(what) and done == at:
                raise Killed

        return stop

    made, out = recipe(0.5, n_texts=16, max_tokens=32), tmp_path / "killed"
    stage = tmp_path / ".killed.partial"
    for what, at in (("measuring gradients", 14), ("quantizing", 2)):
        with pytest.raises(Killed):
            gteopt.quantize("nano", made, out, dtype="float32", progress=stop_at(what, at))
    assert output_hessian_path(stage / "output-hessians", "layers.3").is_file()
    again: list[str] = []
    gteopt.quantize(
        "nano", made, out, dtype="float32", progress=lambda what, *_: again.append(what)
    )
    assert not any(what.startswith("measuring gradients") for what in again)
    gteopt.quantize("nano", made, tmp_path / "whole", dtype="float32")
    assert (out / "gteopt.json").read_bytes() == (tmp_path / "whole/gteopt.json").read_bytes()
    assert not list(out.rglob("output-hessians"))
    assert not stage.exists()


def test_large_models_and_tuned_builds_are_solved_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint("nano")
    assert plan_layers(checkpoint, recipe(0.5)).corrects_rows
    assert not plan_layers(checkpoint, recipe(0.5).with_effort("standard")).corrects_rows
    assert not plan_layers(checkpoint, recipe(0.0)).corrects_rows
    monkeypatch.setattr("gteopt.build.layer_plan.MOST_WEIGHTS", 10_000)
    assert not plan_layers(checkpoint, recipe(0.5)).corrects_rows


def test_smoothing_and_row_feedback_exclude_each_other() -> None:
    weights = load_recipe("int8").weights
    assert isinstance(weights, GptqWeights)
    with pytest.raises(ValueError, match="smooth: true needs row_feedback: 0"):
        GptqWeights.model_validate({**weights.model_dump(), "row_feedback": 0.5})
