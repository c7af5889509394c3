"""Packed weights survive other libraries' layouts exactly, and those are read as specified."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gteopt
from gteopt.build.layer_plan import plan_layers
from gteopt.commands.inspect import inspect
from gteopt.config.recipe import LayerScheme, Recipe, load_recipe
from gteopt.errors import InputError, IntegrityError, UnsupportedError
from gteopt.formats import FORMATS, choose_format, format_of, gptq
from gteopt.formats.packed import LinearShape
from gteopt.kernels import make_linear
from gteopt.model.checkpoint import open_checkpoint
from gteopt.quant.affine import PackedWeight, QuantizedWeight, pack
from gteopt.quant.grid import code_range

SHAPE = LinearShape(64, 128)
SCHEMES = [
    LayerScheme.model_validate({"bits": bits, "group_size": size, "symmetric": symmetric})
    for bits, size, symmetric in itertools.product(
        (2, 3, 4, 8), (32, 64, 128, "per_channel"), (True, False)
    )
]
W8A8 = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
TOKEN_ZEROS = W8A8.model_copy(update={"activation_symmetric": False})
FP8 = W8A8.model_copy(update={"number_format": "e4m3"})
FP8_WEIGHT = FP8.model_copy(update={"activation_bits": 16})
OUTLIERS = W8A8.model_copy(update={"activation_outliers": 6.0})
EIGHT = [W8A8, TOKEN_ZEROS, FP8, FP8_WEIGHT]
NF4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
NF4_WIDE = NF4.model_copy(update={"group_size": 128})
BNB = [NF4, NF4_WIDE, OUTLIERS]
INT4 = ("gptq", "compressed-tensors")
TEXTS = ["A bridge.", "Ein Fluss fließt ins Meer.", "一座桥", "word " * 60]


def name_of(scheme: LayerScheme) -> str:
    kind = "sym" if scheme.symmetric else "asym"
    tokens = f"{scheme.activation_bits}{'' if scheme.activation_symmetric else 'z'}"
    tokens += "" if scheme.activation_outliers is None else "o"
    return f"{scheme.number_format}{scheme.bits}-{scheme.group_size}-{kind}-{tokens}"


def random_weight(scheme: LayerScheme, *, least_zero: int = 0, seed: int = 0) -> PackedWeight:
    """Codes, scales and zero points drawn from all that the scheme can hold."""
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(scheme)
    width = 128 if scheme.group_size == "per_channel" else scheme.group_size
    grid = (64, 128 // width)
    zero = torch.randint(least_zero, high + 1, grid, generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zero = torch.full(grid, 1 << (scheme.bits - 1), dtype=torch.uint8)
    codes = torch.randint(low, high + 1, (64, 128), generator=generator, dtype=torch.uint8)
    if scheme.number_format == "e4m3":
        codes[codes & 127 == 127] = 0  # not a number
    scale = (torch.rand(grid, generator=generator) / 100 + 1e-3).half()
    return pack(QuantizedWeight(codes, scale, zero, scheme))


def holds(format: str, scheme: LayerScheme) -> bool:
    """Whether a format can hold a scheme."""
    if format == "bitsandbytes":
        return scheme in BNB
    whole = scheme.number_format == "int" and scheme.activation_bits == 16
    return whole if format == "gptq" else scheme not in BNB


def same(a: PackedWeight, b: PackedWeight) -> bool:
    left, right = a.to_tensors(), b.to_tensors()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def bits_of(row: Tensor, bits: int, n: int) -> list[int]:
    """Fields of a row of int32 words, first field lowest, read one bit at a time."""
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
    return [(whole >> (i * bits)) & ((1 << bits) - 1) for i in range(n)]


@pytest.mark.parametrize("scheme", [*SCHEMES, *EIGHT, *BNB], ids=name_of)
@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_survives_every_layout_that_can_hold_it(format: Any, scheme: LayerScheme) -> None:
    form = FORMATS[format]
    problems = form.problems({"a": scheme}, {"a": SHAPE})
    if not holds(format, scheme):
        assert re.search("activation|number_format|holds only NF4", " ".join(problems))
        return
    weight = random_weight(scheme)
    config = form.quantization_config({"a": scheme}, [], "layers", "gteopt")
    assert json.loads(json.dumps(config)) == config
    tensors = form.to_tensors(weight)
    assert form.layers_in([f"a.{part}" for part in tensors]) == ["a"]
    read = form.from_tensors(config, "a", SHAPE, tensors)
    assert read.order is None
    one_group = scheme.model_copy(update={"group_size": "per_channel"})  # 128 of 128 features
    wide = scheme.group_size == 128 and scheme.number_format == "int"
    assert read.weight.scheme == (one_group if wide else scheme)
    assert same(read.weight, weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_means_what_its_specification_says(scheme: LayerScheme, version: gptq.Version) -> None:
    """The oracle decodes as AutoGPTQ: word by word, zero points plus one in version 1."""
    weight = random_weight(scheme, least_zero=1)
    tensors = gptq.to_tensors(weight, version=version)
    codes = torch.tensor([bits_of(row, scheme.bits, 128) for row in tensors["qweight"].t()])
    zero = torch.tensor([bits_of(row, scheme.bits, 64) for row in tensors["qzeros"]])
    groups = tensors["g_idx"].long()
    zero = zero + 1 if version == 1 else zero
    by_hand = (codes.t() - zero[groups]) * tensors["scales"].float()[groups]  # [I, O]
    torch.testing.assert_close(by_hand.t(), weight.unpack().dequantize(), rtol=0, atol=0)
    label = {1: "gptq", 2: "gptq_v2"}[version]
    config = {"bits": scheme.bits, "sym": scheme.symmetric, "checkpoint_format": label}
    assert same(gptq.from_tensors(config, "a", SHAPE, tensors).weight, weight)


@pytest.mark.parametrize("scheme", [*SCHEMES, *EIGHT], ids=name_of)
def test_compressed_tensors_means_what_its_specification_says(scheme: LayerScheme) -> None:
    """The oracle decodes signed integers, to which packing has added 2^(bits - 1)."""
    weight = random_weight(scheme)
    tensors = FORMATS["compressed-tensors"].to_tensors(weight)
    half = 1 << (scheme.bits - 1)
    if scheme.number_format == "e4m3":
        assert tensors["weight"].dtype == torch.float8_e4m3fn
        assert torch.equal(tensors["weight"].view(torch.uint8), weight.unpack().codes)
        codes = tensors["weight"].float()
    elif scheme.activation_bits == 8:
        codes = tensors["weight"].long()
    else:
        codes = torch.tensor([bits_of(row, scheme.bits, 128) for row in tensors["weight_packed"]])
        codes -= half
    scale = tensors["weight_scale"].float()
    zero = torch.zeros(scale.shape, dtype=torch.int64)
    if "weight_zero_point" in tensors:
        columns = tensors["weight_zero_point"].t()
        zero = torch.tensor([bits_of(column, scheme.bits, 64) for column in columns]).t() - half
    width = 128 // scale.shape[1]
    by_hand = (codes - zero.repeat_interleave(width, 1)) * scale.repeat_interleave(width, 1)
    torch.testing.assert_close(by_hand, weight.unpack().dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", [NF4, NF4_WIDE], ids=name_of)
def test_nf4_means_what_its_specification_says(scheme: LayerScheme) -> None:
    """The oracle decodes as bitsandbytes: flat, the first of two codes in the high half."""
    weight = random_weight(scheme)
    tensors = FORMATS["bitsandbytes"].to_tensors(weight)
    state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert (state["blocksize"], state["shape"]) == (scheme.group_size, [64, 128])
    numbers = tensors["weight.quant_map"]
    absmax = tensors["weight.absmax"]
    flat = []
    for place, byte in enumerate(tensors["weight"].flatten().tolist()):
        size = absmax[2 * place // state["blocksize"]]
        flat += [numbers[byte >> 4] * size, numbers[byte & 15] * size]
    by_hand = torch.stack(flat).view(64, 128)
    torch.testing.assert_close(by_hand, weight.unpack().dequantize(), rtol=0, atol=0)


def test_double_quantized_scales_are_read_by_the_letter() -> None:
    form = FORMATS["bitsandbytes"]
    tensors = form.to_tensors(random_weight(NF4))
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    state |= {"nested_blocksize": 100, "nested_dtype": "float32", "nested_offset": 0.004}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (128,), generator=generator, dtype=torch.uint8)
    shares, sizes = torch.linspace(0, 1, 256), torch.tensor([0.01, 0.02])
    tensors["weight.absmax"] = codes
    tensors["weight.nested_absmax"] = sizes
    tensors["weight.nested_quant_map"] = shares
    read = form.from_tensors({}, "a", SHAPE, tensors).weight
    by_hand = [shares[c] * sizes[i // 100] + 0.004 for i, c in enumerate(codes.tolist())]
    expected = torch.stack(by_hand).half().view(64, 2)
    torch.testing.assert_close(read.scale, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"blocksize": 256}, UnsupportedError, "blocks of 256 in rows of 128 features"),
        ({"quant_map": torch.zeros(16)}, IntegrityError, "does not hold the numbers of NF4"),
        ({"fp4": True}, UnsupportedError, "only NF4 is supported, not FP4"),
    ],
)
def test_what_bitsandbytes_has_beyond_nf4_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    form = FORMATS["bitsandbytes"]
    tensors = form.to_tensors(random_weight(NF4))
    key = "weight.quant_state.bitsandbytes__nf4"
    if "blocksize" in change:
        state = json.loads(bytes(tensors[key].tolist())) | change
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    if "quant_map" in change:
        tensors["weight.quant_map"] = change["quant_map"]
    if "fp4" in change:
        tensors["weight.quant_state.bitsandbytes__fp4"] = tensors.pop(key)
    with pytest.raises(error, match=message):
        form.from_tensors({}, "a", SHAPE, tensors)


@pytest.mark.parametrize(
    ("scheme", "form", "activations"),
    [
        (W8A8, "int-quantized", ("int", True)),
        (TOKEN_ZEROS, "int-quantized", ("int", False)),
        (FP8, "float-quantized", ("float", True)),
        (FP8_WEIGHT, "float-quantized", None),
    ],
    ids=["int8", "int8 with zero points", "fp8", "fp8 weights"],
)
def test_compressed_tensors_is_told_how_tokens_are_quantized(
    scheme: LayerScheme, form: str, activations: tuple[str, bool] | None
) -> None:
    format = FORMATS["compressed-tensors"]
    config = format.quantization_config({"a": scheme}, ["head"], "layers", "gteopt")
    assert (config["format"], config["ignore"]) == (form, ["head"])
    group = config["config_groups"]["group_0"]
    assert group["weights"]["type"] == ("float" if scheme.number_format == "e4m3" else "int")
    input_scheme = group["input_activations"]
    if activations is None:
        assert input_scheme is None
        return
    assert (input_scheme["type"], input_scheme["symmetric"]) == activations
    assert (input_scheme["strategy"], input_scheme["dynamic"], input_scheme["num_bits"]) == (
        "token",
        True,
        8,
    )
    input_scheme["strategy"] = "tensor"
    tensors = format.to_tensors(random_weight(scheme))
    with pytest.raises(UnsupportedError, match=r"strategy: tensor.*are not supported"):
        format.from_tensors(config, "a", SHAPE, tensors)


def test_a_zero_point_of_zero_needs_version_2() -> None:
    scheme = LayerScheme(bits=4, group_size=32, symmetric=False)
    weight = random_weight(scheme)
    with pytest.raises(UnsupportedError, match="cannot hold a zero point of 0; use version 2"):
        gptq.to_tensors(weight, version=1)
    assert gptq.gptq_version(scheme) == 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_borrowed_from_their_neighbours_are_read_back(bits: Any) -> None:
    """GPTQModel writes version 1 by one subtraction a word; a field of 0 borrows from the next."""
    scheme = LayerScheme(bits=bits, group_size=32, symmetric=False)
    weight = random_weight(scheme)
    tensors = gptq.to_tensors(weight, version=2)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    tensors["qzeros"] = tensors["qzeros"] - ones
    config = {"bits": bits, "sym": False, "checkpoint_format": "gptq"}
    assert same(gptq.from_tensors(config, "a", SHAPE, tensors).weight, weight)


@pytest.mark.parametrize("written", [1, 2])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_a_symmetric_checkpoint_with_the_wrong_version_is_read_right(
    written: gptq.Version, label: str
) -> None:
    """optimum 2.3 saves version 1 and labels it version 2."""
    scheme = LayerScheme(bits=4, group_size=32, symmetric=True)
    weight = random_weight(scheme)
    tensors = gptq.to_tensors(weight, version=written)
    config = {"bits": 4, "sym": True, "checkpoint_format": label}
    assert same(gptq.from_tensors(config, "a", SHAPE, tensors).weight, weight)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_act_order_checkpoints_multiply_like_their_weight_dequantized_by_hand(
    format: Any,
) -> None:
    scheme = LayerScheme(bits=4, group_size=32, symmetric=False)
    weight = random_weight(scheme)
    form = FORMATS[format]
    config = form.quantization_config({"a": scheme}, [], "layers", "gteopt")
    tensors = form.to_tensors(weight)
    groups = torch.arange(128).div(32, rounding_mode="floor")
    groups = groups[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    tensors["g_idx" if format == "gptq" else "weight_g_idx"] = groups.int()
    plain = weight.unpack()
    steps = plain.codes.float() - plain.zero.float()[:, groups]
    by_hand = steps * plain.scale.float()[:, groups]
    read = form.from_tensors(config, "a", SHAPE, tensors)
    assert read.order is not None
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    layer = make_linear(
        read.weight, None, device=torch.device("cpu"), dtype=torch.float32, order=read.order
    )
    torch.testing.assert_close(layer(x), x @ by_hand.t(), rtol=1e-5, atol=1e-5)
    tensors["g_idx" if format == "gptq" else "weight_g_idx"][0] = groups[1]
    if int(groups[0]) != int(groups[1]):
        with pytest.raises(IntegrityError, match="does not put 32 input features into each of 4"):
            form.from_tensors(config, "a", SHAPE, tensors)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_tensors_that_do_not_fit_the_layer_are_named(format: Any) -> None:
    scheme = LayerScheme(bits=4, group_size=32, symmetric=False)
    form = FORMATS[format]
    config = form.quantization_config({"a.b": scheme}, [], "layers", "gteopt")
    tensors = form.to_tensors(random_weight(scheme))
    first = next(iter(tensors))
    tensors[first] = tensors[first][:, :-1]
    tensors["stray"] = torch.zeros(1)
    with pytest.raises(IntegrityError) as caught:
        form.from_tensors(config, "a.b", SHAPE, tensors)
    for word in (f"{format} layer a.b", f"'{first}' is torch.int32", "'stray' does not belong"):
        assert word in str(caught.value)
    del tensors["stray"], tensors[first]
    with pytest.raises(IntegrityError, match=r"is missing"):
        form.from_tensors(config, "a.b", SHAPE, tensors)


def test_the_standard_layout_is_taken_whenever_one_can_hold_the_layers() -> None:
    int4 = LayerScheme(bits=4, group_size=64, symmetric=False)
    int8 = LayerScheme(bits=8, group_size=64, symmetric=False)
    shapes = {"a": SHAPE, "b": SHAPE}
    assert choose_format("auto", {"a": int4, "b": int4}, shapes) == "gptq"
    assert choose_format("auto", {"a": int4, "b": int8}, shapes) == "compressed-tensors"
    assert choose_format("auto", {"a": W8A8, "b": W8A8}, shapes) == "compressed-tensors"
    assert choose_format("auto", {"a": NF4, "b": NF4}, shapes) == "bitsandbytes"
    assert choose_format("auto", {"a": NF4, "b": int8}, shapes) == "gteopt"
    assert choose_format("gteopt", {"a": int4, "b": int4}, shapes) == "gteopt"
    with pytest.raises(InputError) as caught:
        choose_format("gptq", {"a": int4, "b": W8A8}, {"a": SHAPE, "b": LinearShape(63, 128)})
    for word in ("b: 63 x 128", "8-bit activations", "differ in bits", "format: auto"):
        assert word in str(caught.value)


def test_layers_whose_weights_a_forward_pass_reads_are_never_kept_packed() -> None:
    schemes, shapes = {"a": LayerScheme(bits=4, group_size=64, symmetric=False)}, {"a": SHAPE}
    for scheme in (*schemes.values(), NF4):
        assert choose_format("auto", {"a": scheme}, shapes, reads_weights=True) == "gteopt"
    assert choose_format("auto", {"a": W8A8}, shapes, reads_weights=True) == "compressed-tensors"
    for wanted in ("gptq", "bitsandbytes", "compressed-tensors"):
        with pytest.raises(InputError, match="code reads the weight of a layer"):
            choose_format(wanted, schemes, shapes, reads_weights=True)


def test_other_quantizers_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"quantized by 'awq' cannot be read.*gptq"):
        format_of({"quant_method": "awq"})
    with pytest.raises(UnsupportedError, match="format 'gptq_p'"):
        gptq.from_tensors({"checkpoint_format": "gptq_p"}, "a", SHAPE, {})


@pytest.mark.parametrize("value", ["a" * 10_000, ["a" * 5000] * 2], ids=["text", "list"])
@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": None},
        {"quant_method": "gptq", "checkpoint_format": None},
        {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"type": None}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"0": {"input_activations": None}}},
    ],
    ids=["method", "format", "type", "activations"],
)
def test_a_message_quotes_200_characters_of_a_foreign_value_at_most(
    config: dict[str, Any], value: Any
) -> None:
    def filled(part: Any) -> Any:
        return {k: filled(v) for k, v in part.items()} if isinstance(part, dict) else part or value

    config = filled(config)
    for group in config.get("config_groups", {}).values():
        group["targets"] = ["a"]
        if "input_activations" in group:
            group["input_activations"] = {"strategy": value}
    with pytest.raises(UnsupportedError) as caught:
        format_of(config).from_tensors(config, "a", SHAPE, {})
    assert "aaa" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("target", "is_read"),
    [
        ("re:.*self_attn\\.(q|k|v)_proj$", True),
        ("re:(model\\.)?layers\\.[0-9]+\\.mlp\\..*", True),
        ("re:(a+)+$", False),
        ("re:" + ".*" * 6 + "x", False),
        ("re:" + ".?" * 30 + "x", False),
        ("re:" + "(.|.)" * 30 + "x", False),
        ("re:" + "(" + "|".join(["a"] * 120) + ")x", False),
        ("re:(.{0,9}){0,9}x", False),
    ],
)
def test_a_target_that_could_match_for_hours_is_refused(target: str, is_read: bool) -> None:
    name = "model.layers.0.mlp.down_proj" if "mlp" in target else "model.layers.0.self_attn.k_proj"
    config = FORMATS["compressed-tensors"].quantization_config({name: W8A8}, [], "layers", "gteopt")
    config["config_groups"]["group_0"]["targets"] = [target]
    tensors = FORMATS["compressed-tensors"].to_tensors(random_weight(W8A8))
    with nullcontext() if is_read else pytest.raises(UnsupportedError, match="could take hours"):
        FORMATS["compressed-tensors"].from_tensors(config, name, SHAPE, tensors)


def recipe(scheme: LayerScheme, format: str = "auto", **weights: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "schema": "gteopt.recipe/1",
            "name": "test",
            "format": format,
            "weights": {"method": "rtn", "scheme": scheme.model_dump(), **weights},
        }
    )


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every format that can hold them."""
    folder = tmp_path_factory.mktemp("formats")
    scheme = LayerScheme(bits=4, group_size=64, symmetric=False)
    for format in ("gteopt", *INT4):
        made = gteopt.quantize("nano", recipe(scheme, format), folder / format)
        assert made.format == format
    return {name: folder / name for name in ("gteopt", *INT4)}


def test_every_format_gives_the_same_vectors(int4: dict[str, Path]) -> None:
    vectors = gteopt.load(int4["gteopt"]).encode(TEXTS)
    for format in INT4:
        np.testing.assert_array_equal(gteopt.load(int4[format]).encode(TEXTS), vectors)
        config = json.loads((int4[format] / "config.json").read_text())
        assert config["is_causal"] is False
        assert config["matryoshka_dimensions"] == [256, 128, 64, 32]
        assert config["quantization_config"]["quant_method"] == format
        assert not (int4[format] / "weights").exists()


def test_weights_beyond_one_file_are_written_as_shards_with_an_index(
    int4: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gteopt.build.st_folder._FILE_BYTES", 1 << 18)
    scheme = LayerScheme(bits=4, group_size=64, symmetric=False)
    gteopt.quantize("nano", recipe(scheme), tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    whole = load_file(int4["gptq"] / "model.safetensors")
    for file in files:
        for name, tensor in load_file(tmp_path / "shards" / file).items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, whole.pop(name))
    assert whole == {}
    ours = gteopt.load(tmp_path / "shards").encode(TEXTS)
    np.testing.assert_array_equal(ours, gteopt.load(int4["gptq"]).encode(TEXTS))


@pytest.mark.parametrize("format", INT4)
def test_a_checkpoint_of_another_maker_opens_without_a_manifest(
    format: str, int4: dict[str, Path], tmp_path: Path
) -> None:
    """Its tensors have a prefix and a head, as quantizers of causal models save them."""
    foreign = Path(shutil.copytree(int4[format], tmp_path / "foreign"))
    (foreign / "gteopt.json").unlink()
    tensors = load_file(foreign / "model.safetensors")
    tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = torch.zeros(4, 256)
    save_file(tensors, foreign / "model.safetensors")
    encoder = gteopt.load(foreign)
    assert encoder.manifest is None
    np.testing.assert_array_equal(encoder.encode(TEXTS), gteopt.load(int4["gteopt"]).encode(TEXTS))
    facts = inspect(foreign)
    assert (facts.estimates, facts.n_parameters) == ((), inspect("nano").n_parameters)
    with pytest.raises(InputError, match="already quantized"):
        gteopt.quantize(foreign, "int8", tmp_path / "x")
    tensors.pop("model.norm.weight")
    save_file(tensors, foreign / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"missing: norm\.weight"):
        gteopt.load(foreign)


def test_layers_of_several_schemes_and_skipped_ones_are_written_and_read(tmp_path: Path) -> None:
    scheme = LayerScheme(bits=4, group_size=128, symmetric=False)
    skip = recipe(scheme, skip=["*.1.*", "*down_proj"])
    plan = plan_layers(open_checkpoint("nano"), skip)
    assert plan.format == "gptq"
    gteopt.quantize("nano", skip, tmp_path / "skip")
    config = json.loads((tmp_path / "skip" / "config.json").read_text())["quantization_config"]
    assert config["modules_in_block_to_quantize"] == [list(plan.schemes)]
    assert r"-:.*layers\.1\.mlp\.up_proj$" in config["dynamic"]
    encoder = gteopt.load(tmp_path / "skip")
    assert sum(n for kernel, n in encoder.kernels.items() if "linear" in kernel) == 10


@pytest.mark.parametrize("name", ["nf4", "int8-bnb"])
def test_bitsandbytes_checkpoints_give_the_vectors_of_our_own_layout(
    name: str, tmp_path: Path
) -> None:
    native = load_recipe(name).model_copy(update={"format": "gteopt"})
    gteopt.quantize("nano", native, tmp_path / "own")
    made = gteopt.quantize("nano", name, tmp_path / "theirs")
    assert made.format == "bitsandbytes"
    (tmp_path / "theirs" / "gteopt.json").unlink()
    ours = gteopt.load(tmp_path / "own").encode(TEXTS)
    np.testing.assert_array_equal(gteopt.load(tmp_path / "theirs").encode(TEXTS), ours)


def test_a_layout_for_weights_that_stay_as_they_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format: gptq needs quantized weights"):
        Recipe.model_validate({"schema": "gteopt.recipe/1", "name": "x", "format": "gptq"})
