"""Tuning starts at the solver's weight, has the right gradients, and lowers the error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gteopt
from gteopt.build import tuning
from gteopt.build.calibration_texts import draw_calibration_texts, tokenize_calibration
from gteopt.build.layer_plan import plan_layers
from gteopt.build.replay import copy_block, open_blocks, replay_block_
from gteopt.build.tuning import TuningSchedule, tune_block, tune_model
from gteopt.config.recipe import Calibration, LayerScheme, Recipe, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.tokenization import Tokens
from gteopt.errors import InputError
from gteopt.model.checkpoint import open_checkpoint
from gteopt.quant.affine import QuantizedWeight, quantize_rtn
from gteopt.quant.grid import NF4_LEVELS, code_range
from gteopt.quant.learned_rounding import TunableLinear

FEW = Calibration(n_texts=64, max_tokens=64)
SCHEMES = [
    LayerScheme(bits=4, group_size=32, symmetric=False),
    LayerScheme(bits=3, group_size=64, symmetric=True),
    LayerScheme(bits=8, group_size="per_channel", symmetric=True),
    LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4"),
]


def layer(scheme: LayerScheme, seed: int = 0) -> tuple[nn.Linear, TunableLinear, QuantizedWeight]:
    torch.manual_seed(seed)
    linear = nn.Linear(128, 24)
    start = quantize_rtn(linear.weight, scheme, clip_search=True)
    return linear, TunableLinear(linear, start), start


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_starts_and_exports_as_exactly_the_weight_it_was_given(scheme: LayerScheme) -> None:
    linear, tunable, start = layer(scheme)
    # exp(log s) differs from s by a rounding of float32
    torch.testing.assert_close(tunable.weight(), start.dequantize(), rtol=1e-5, atol=0)
    out = tunable.export()
    assert torch.equal(out.codes, start.codes)
    assert torch.equal(out.scale, start.scale)
    assert torch.equal(out.zero, start.zero)
    x = torch.randn(5, 128)
    wanted = nn.functional.linear(x, start.dequantize(), linear.bias)
    torch.testing.assert_close(tunable(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_a_straight_through_estimator(scheme: LayerScheme) -> None:
    _, tunable, start = layer(scheme)
    target = torch.randn(24, 128)
    (tunable.weight() - target).square().sum().backward()  # type: ignore[no-untyped-call]

    latent = tunable.latent.detach().double().requires_grad_(True)
    log_scale = tunable.log_scale.detach().double().requires_grad_(True)
    rounded = latent.round().clamp(*code_range(scheme)).detach()
    if scheme.number_format == "nf4":
        levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
        # The slope at a level is half the distance between its two neighbours.
        padded = torch.cat([2 * levels[:1] - levels[1:2], levels, 2 * levels[-1:] - levels[-2:-1]])
        slope = (padded[2:] - padded[:-2]) / 2
        at = rounded.int()
        steps = (levels[at] + slope[at] * (latent - latent.detach())).reshape(*log_scale.shape, -1)
    else:
        codes = latent + (rounded - latent.detach())
        steps = codes.reshape(*log_scale.shape, -1) - start.zero.double()[..., None]
    weight = (steps * log_scale.exp()[..., None]).flatten(1)
    (weight - target.double()).square().sum().backward()  # type: ignore[no-untyped-call]

    for parameter, wanted in ((tunable.latent, latent), (tunable.log_scale, log_scale)):
        assert parameter.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(parameter.grad.double(), wanted.grad, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", dtype="float32")


@pytest.fixture(scope="module")
def tokens(nano: Encoder) -> list[Tokens]:
    return tokenize_calibration(nano.tokenization, draw_calibration_texts(FEW), FEW.max_tokens)


@pytest.fixture(scope="module")
def rounded(nano: Encoder) -> dict[str, QuantizedWeight]:
    recipe = load_recipe("rtn-int4")
    names = plan_layers(open_checkpoint("nano"), recipe).schemes
    modules = dict(nano.module.named_modules())
    return {name: quantize_rtn(modules[name].weight, scheme) for name, scheme in names.items()}


def test_tuned_codes_bring_held_out_vectors_closer_and_the_teacher_stays_as_it_was(
    nano: Encoder, tokens: list[list[int]], rounded: Mapping[str, QuantizedWeight]
) -> None:
    held_out = [
        drawn.text
        for drawn in draw_calibration_texts(Calibration(n_texts=400, max_tokens=64))[200:]
    ]
    before = {name: p.clone() for name, p in nano.module.state_dict().items()}
    wanted = nano.embed(held_out)

    def error(weights: Mapping[str, QuantizedWeight], rest: Mapping[str, torch.Tensor]) -> float:
        other = gteopt.load("nano", dtype="float32")
        changed = {f"{name}.weight": weight.dequantize() for name, weight in weights.items()}
        other.module.load_state_dict({**changed, **rest}, strict=False)
        return float(1 - (other.embed(held_out) * wanted).sum(axis=1).mean())

    tuned = tune_model(
        nano, rounded, tokens, TuningSchedule(n_steps=40, batch_size=16, text_tokens=32)
    )
    assert error(tuned.weights, tuned.rest) < 0.9 * error(rounded, {})
    assert tuned.record.error_after < tuned.record.error_before
    assert 0 < tuned.record.codes_changed < 0.2
    for name, p in nano.module.state_dict().items():
        assert torch.equal(p, before[name]), name


def test_the_same_seed_learns_the_same_codes(
    nano: Encoder, tokens: list[list[int]], rounded: Mapping[str, QuantizedWeight]
) -> None:
    schedule = TuningSchedule(n_steps=3, batch_size=4, text_tokens=16)
    first, second = (tune_model(nano, rounded, tokens, schedule) for _ in range(2))
    assert first.record == second.record
    for name in rounded:
        assert torch.equal(first.weights[name].codes, second.weights[name].codes)
        assert torch.equal(first.weights[name].scale, second.weights[name].scale)


def test_tuning_that_makes_things_worse_is_thrown_away(
    nano: Encoder, tokens: list[list[int]], rounded: Mapping[str, QuantizedWeight]
) -> None:
    wild = TuningSchedule(n_steps=4, batch_size=4, text_tokens=16, codes_rate=3.0, rest_rate=0.3)
    kept = tune_model(nano, rounded, tokens, wild)
    assert kept.record.codes_changed == 0
    assert kept.record.error_after == kept.record.error_before
    assert all(torch.equal(kept.weights[n].codes, rounded[n].codes) for n in rounded)
    original = nano.module.state_dict()
    assert all(torch.equal(p, original[n]) for n, p in kept.rest.items())


@pytest.fixture
def guided(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The shipped recipe on few texts and for few steps."""
    schedule = TuningSchedule(n_steps=6, batch_size=8, text_tokens=32)
    monkeypatch.setitem(tuning.SCHEDULES, "standard", schedule)
    return load_recipe("gptq-int4-guided").model_copy(update={"calibration": FEW})


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def interrupted(recipe: Recipe, out: Path, step: int, during: str = "tuning") -> None:
    class Killed(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith(during) and done == step:
            raise Killed

    with pytest.raises(Killed):
        gteopt.quantize("nano", recipe, out, progress=stop)


def test_a_build_interrupted_while_tuning_goes_on_behind_the_solver_to_the_same_bytes(
    guided: Recipe, tmp_path: Path
) -> None:
    whole = gteopt.quantize("nano", guided, tmp_path / "whole")
    interrupted(guided, tmp_path / "again", step=3)
    steps: list[str] = []

    def note(what: str, done: int, total: int) -> None:
        steps.append(what)

    gteopt.quantize("nano", guided, tmp_path / "again", progress=note)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "whole")
    assert whole.tuning is not None
    assert whole.tuning.n_steps == 6
    assert whole.tuning.error_after < whole.tuning.error_before
    plain = gteopt.quantize(
        "nano", guided.with_effort("fast"), tmp_path / "plain"
    )  # same bits, same format: tuning costs nothing at run time
    assert plain.tuning is None
    assert (plain.weight_bytes, plain.format) == (whole.weight_bytes, whole.format)
    assert plain.recipe_sha256 != whole.recipe_sha256


def test_a_shortened_variant_is_fitted_on_the_tuned_weights(guided: Recipe, tmp_path: Path) -> None:
    short = Recipe.model_validate(
        {**guided.model_dump(by_alias=True), "name": "short", "dims": {"n": 32, "method": "pca"}}
    )
    gteopt.quantize("nano", short, tmp_path / "short")
    gteopt.quantize("nano", guided, tmp_path / "full")
    gteopt.truncate(tmp_path / "full", tmp_path / "cut", dims=32, method="pca")
    texts = ["a text", "another one about trees"]
    once = gteopt.load(tmp_path / "short").encode(texts)
    twice = gteopt.load(tmp_path / "cut").encode(texts)
    np.testing.assert_allclose(once, twice, atol=1e-5)


def test_effort_is_for_gptq_recipes_only() -> None:
    with pytest.raises(InputError, match="recipe rtn-int8 does not support effort: only weights"):
        load_recipe("rtn-int8").with_effort("best")
    with pytest.raises(InputError, match="recipe int8 does not support effort: layers with 8-bit"):
        load_recipe("int8").with_effort("best")
    assert load_recipe("int8").with_effort("fast") == load_recipe("int8")


def test_a_model_too_large_to_tune_at_once_is_refused_only_where_that_was_asked_for(
    guided: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gteopt.build.layer_plan.MOST_WEIGHTS", 1_000_000)
    weights = guided.weights.model_copy(update={"tune_by": "model"})
    whole = guided.model_copy(update={"weights": weights})
    with pytest.raises(InputError, match=r"takes up to 0\.001 billion.*use auto or block"):
        gteopt.quantize("nano", whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_norms_and_biases_of_a_block_bring_its_output_closer_on_other_texts(
    nano: Encoder, rounded: Mapping[str, QuantizedWeight]
) -> None:
    """The error falls by more than 4 %, and no code changes."""
    texts = draw_calibration_texts(Calibration(n_texts=120, max_tokens=48))
    blocks, inputs = open_blocks(nano, tokenize_calibration(nano.tokenization, texts[:80], 48))
    wanted = [batch.copy() for batch in inputs]
    replay_block_(blocks[0], wanted)
    start = {n: weight for n, weight in rounded.items() if n.startswith(f"{blocks[0].name}.")}
    schedule = tuning.BLOCK_SCHEDULES["standard"]
    assert schedule is not None
    tuned = tune_block(blocks[0], start, inputs, wanted, replace(schedule, n_steps=20))
    assert tuned.record.codes_changed == 0
    assert tuned.record.error_after < tuned.record.error_before

    blocks, inputs = open_blocks(nano, tokenize_calibration(nano.tokenization, texts[80:], 48))
    within = len(blocks[0].name) + 1

    def error(weights: Mapping[str, QuantizedWeight], rest: Mapping[str, torch.Tensor]) -> float:
        changed = copy_block(blocks[0])
        state = {f"{n[within:]}.weight": weight.dequantize() for n, weight in weights.items()}
        state |= {n[within:]: p for n, p in rest.items()}
        changed.module.load_state_dict(state, strict=False)
        errors = []
        with torch.inference_mode():
            for i, batch in enumerate(inputs):
                out, exact = (block.run(i, batch.hidden) for block in (changed, blocks[0]))
                left = (out - exact).square().sum(-1) / exact.square().sum(-1)
                errors.append(left[batch.real])
        return float(torch.cat(errors).mean())

    assert error(tuned.weights, tuned.rest) < 0.96 * error(start, {})


@pytest.fixture
def large(guided: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that tunes block by block, because the nano counts as too large here."""
    monkeypatch.setattr("gteopt.build.layer_plan.MOST_WEIGHTS", 1_000_000)
    few = replace(tuning.BLOCK_SCHEDULES["standard"] or TuningSchedule(0), n_steps=6)
    monkeypatch.setitem(tuning.BLOCK_SCHEDULES, "standard", few)
    return guided


def test_a_large_model_is_tuned_block_by_block_and_a_kill_between_them_changes_no_byte(
    large: Recipe, tmp_path: Path
) -> None:
    whole = gteopt.quantize("nano", large, tmp_path / "whole")
    assert whole.tuning is not None
    assert (whole.tuning.by, whole.tuning.n_steps, whole.tuning.codes_changed) == ("block", 6, 0)
    assert whole.tuning.error_after < whole.tuning.error_before
    interrupted(large, tmp_path / "again", step=2, during="quantizing")
    gteopt.quantize("nano", large, tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "whole")


def test_a_block_whose_tuning_makes_things_worse_keeps_what_the_solver_left(
    nano: Encoder, tokens: list[Tokens], rounded: Mapping[str, QuantizedWeight]
) -> None:
    blocks, inputs = open_blocks(nano, tokens)
    wanted = [batch.copy() for batch in inputs]
    replay_block_(blocks[0], wanted)
    start = {n: weight for n, weight in rounded.items() if n.startswith(f"{blocks[0].name}.")}
    before = {n: p.clone() for n, p in blocks[0].module.state_dict().items()}
    wild = TuningSchedule(n_steps=3, codes_rate=3.0, scales_rate=0.5, rest_rate=0.3)
    tuned = tune_block(blocks[0], start, inputs, wanted, wild)
    assert tuned.record.error_after == tuned.record.error_before > 0
    assert all(torch.equal(tuned.weights[n].codes, start[n].codes) for n in start)
    after = blocks[0].module.state_dict()
    assert all(torch.equal(p, after[n]) for n, p in before.items())


def test_every_effort_has_a_schedule() -> None:
    assert tuning.SCHEDULES["fast"] is None
    standard, best = tuning.SCHEDULES["standard"], tuning.SCHEDULES["best"]
    assert isinstance(standard, TuningSchedule)
    assert isinstance(best, TuningSchedule)
    assert standard.n_steps < best.n_steps
    assert tuning.BLOCK_SCHEDULES.keys() == tuning.SCHEDULES.keys()
