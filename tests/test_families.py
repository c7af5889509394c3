"""Each family, as its authors publish it, computes what an independent forward pass says.

The checkpoints are small and random, with the published layout: config.json, tensor names, module
files. The forward pass is written out here in float64, one unpadded text at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

import gteopt
from gteopt.commands.inspect import inspect
from gteopt.config.recipe import Calibration, LayerScheme, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError, IntegrityError
from gteopt.model.artifact import read_manifest
from gteopt.model.checkpoint import open_checkpoint
from gteopt.model.families import PUBLISHED

TEXTS = ["A bridge.", "Photosynthesis turns light into sugar, in every leaf of a plant.", "水", ""]
INSTRUCTION = "Find the answer"


@dataclass(frozen=True)
class Model:
    """One published layout at a small size.

    Attributes:
        config: of the transformer.
        causal, window: what a token sees: nothing behind it, nothing `window` or more before it.
        start, end: token ids around a text.
        template: of a query.
    """

    name: str
    config: dict[str, Any]
    causal: bool
    window: int | None
    start: list[int]
    end: list[int]
    template: str
    latent: dict[str, int] | None = None
    auto_map: bool = False
    st: bool = True


VOCABULARY = 512
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
QWEN2 = {
    **SIZE,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "sliding_window": 131_072,
    "max_window_layers": 2,
}
QWEN3 = {
    **SIZE,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 32,  # not hidden_size / heads, as in the real 0.6B
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 3,
    "attention_bias": False,
}
MISTRAL = {
    **SIZE,
    "model_type": "mistral",
    "architectures": ["MistralModel"],
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "sliding_window": 6,
}
ENDOFTEXT, BOS, EOS = VOCABULARY - 1, 1, 2
SPACED, UNSPACED = "Instruct: {}\nQuery: ", "Instruct: {}\nQuery:"
MODELS = [
    Model(
        "gte-Qwen2-7B-instruct",
        {**QWEN2, "num_key_value_heads": 2},
        causal=False,
        window=None,
        start=[],
        end=[ENDOFTEXT],
        template=SPACED,
        auto_map=True,
    ),
    Model(
        "gte-Qwen1.5-7B-instruct",
        {**QWEN2, "num_key_value_heads": 4},
        causal=False,
        window=None,
        start=[],
        end=[ENDOFTEXT],
        template=SPACED,
        auto_map=True,
    ),
    Model("Qwen3-Embedding-0.6B", QWEN3, True, None, [], [ENDOFTEXT], UNSPACED),
    Model("e5-mistral-7b-instruct", MISTRAL, True, 6, [BOS], [EOS], SPACED),
    Model(
        "NV-Embed-v1",
        MISTRAL,
        causal=False,
        window=None,
        start=[BOS],
        end=[EOS],
        template=SPACED,
        latent={"num_latents_value": 16, "num_cross_heads": 4, "cross_dim_head": 24},
        auto_map=True,
        st=False,
    ),
]
IDS = [model.name for model in MODELS]


def random_weights(model: Model) -> dict[str, Tensor]:
    """Float32 tensors of the bare transformer (and pooling), by their published names."""
    generator = torch.Generator().manual_seed(len(model.name))
    c = model.config
    d, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    width = c.get("head_dim", d // heads)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * float(size[-1] ** -0.5)

    def around_one(n: int) -> Tensor:
        return 1 + 0.2 * torch.randn(n, generator=generator)

    w = {"embed_tokens.weight": normal(c["vocab_size"], d) * 8, "norm.weight": around_one(d)}
    for i in range(c["num_hidden_layers"]):
        p = f"layers.{i}."
        w[p + "input_layernorm.weight"] = around_one(d)
        w[p + "post_attention_layernorm.weight"] = around_one(d)
        for name, rows in (("q", heads * width), ("k", kv * width), ("v", kv * width)):
            w[f"{p}self_attn.{name}_proj.weight"] = normal(rows, d) * 1.5
            if c["model_type"] == "qwen2":
                w[f"{p}self_attn.{name}_proj.bias"] = normal(rows)
        if c["model_type"] == "qwen3":
            w[p + "self_attn.q_norm.weight"] = around_one(width)
            w[p + "self_attn.k_norm.weight"] = around_one(width)
        w[p + "self_attn.o_proj.weight"] = normal(d, heads * width)
        w[p + "mlp.gate_proj.weight"] = normal(c["intermediate_size"], d)
        w[p + "mlp.up_proj.weight"] = normal(c["intermediate_size"], d)
        w[p + "mlp.down_proj.weight"] = normal(d, c["intermediate_size"])
    if model.latent is not None:
        inner = model.latent["num_cross_heads"] * model.latent["cross_dim_head"]
        a, m = (f"latent_attention_model.cross_attend_blocks.{i}." for i in (0, 1))
        w["latent_attention_model.latents"] = normal(model.latent["num_latents_value"], d) * 4
        for norm in (a + "norm.", a + "norm_context.", m + "norm."):
            w[norm + "weight"], w[norm + "bias"] = around_one(d), normal(d)
        w[a + "fn.to_q.weight"] = normal(inner, d) * 2
        w[a + "fn.to_kv.weight"] = normal(2 * inner, d)
        w[a + "fn.to_out.weight"] = normal(d, inner)
        w[m + "fn.net.0.weight"], w[m + "fn.net.0.bias"] = normal(8 * d, d), normal(8 * d)
        w[m + "fn.net.2.weight"], w[m + "fn.net.2.bias"] = normal(d, 4 * d), normal(d)
    return w


def write_tokenizer(folder: Path, *, mistral: bool) -> None:
    """A byte-level BPE with the family's special tokens, which it does not add by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"] if mistral else []
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, "Ġa", "in"])}
    if not mistral:
        vocabulary["<|endoftext|>"] = ENDOFTEXT
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a"), ("i", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special or ["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = (
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        if mistral
        else {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def publish(
    folder: Path, model: Model, *, prefix: str = "", head: bool = False
) -> dict[str, Tensor]:
    """Write the model as its authors do, in two shards; returns its weights by bare names."""
    folder.mkdir(parents=True)
    weights = random_weights(model)
    stored = {
        (name if name.startswith("latent_") else f"{prefix}{name}"): tensor
        for name, tensor in weights.items()
    }
    if head:
        stored["lm_head.weight"] = torch.randn(VOCABULARY, model.config["hidden_size"])
    names = sorted(stored)
    shards = {"model-00001-of-00002.safetensors": names[::2]}
    shards["model-00002-of-00002.safetensors"] = names[1::2]
    for file, own in shards.items():
        save_file({n: stored[n] for n in own}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in shards.items() for name in own}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config: dict[str, Any] = dict(model.config)
    if model.latent is not None:
        config = {
            "model_type": "nvembed",
            "architectures": ["NVEmbedModel"],
            "auto_map": {"AutoModel": "modeling_nvembed.NVEmbedModel"},
            "is_mask_instruction": True,
            "mask_type": "b",
            "padding_side": "right",
            "hidden_size": model.config["hidden_size"],
            "text_config": {**model.config, "model_type": "bidir_mistral"},
            "latent_attention_config": {
                "model_type": "latent_attention",
                "hidden_dim": model.config["hidden_size"],
                "latent_dim": model.config["hidden_size"],
                "output_normalize": True,
                **model.latent,
            },
        }
    elif model.auto_map:
        config["auto_map"] = {"AutoModel": "modeling_qwen.Qwen2Model"}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, mistral=model.config["model_type"] == "mistral")
    if model.st:
        kinds = ["Transformer", "Pooling", "Normalize"]
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        pooling = {"pooling_mode_lasttoken": True, "word_embedding_dimension": 64}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        prompts = {"web_search_query": model.template.format("Given a web search query, find")}
        st_config = {"prompts": prompts, "default_prompt_name": None}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(st_config))
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    return weights


def forward_float64(
    model: Model, weights: dict[str, Tensor], ids: list[int], n_prompt: int
) -> NDArray[np.float64]:
    """One text's vector, written out: RMSNorm, RoPE, grouped queries, window, SwiGLU, pooling."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    c = model.config
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    width, eps, n = c.get("head_dim", c["hidden_size"] // heads), c["rms_norm_eps"], len(ids)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[name]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    angle = torch.outer(
        torch.arange(n, dtype=torch.float64),
        c["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width),
    )
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def rotate(x: Tensor) -> Tensor:  # [H, T, width]
        half = width // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    distance = torch.arange(n)[:, None] - torch.arange(n)[None]  # how far behind a key lies
    hidden_keys = torch.zeros(n, n, dtype=torch.bool)
    if model.causal:
        hidden_keys |= distance < 0
    if model.window is not None:
        hidden_keys |= distance >= model.window
    x = w["embed_tokens.weight"][ids]  # [T, D]
    for i in range(c["num_hidden_layers"]):
        p = f"layers.{i}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = (
            linear(h, f"{p}self_attn.{name}_proj").view(n, -1, width).transpose(0, 1)
            for name in "qkv"
        )
        if c["model_type"] == "qwen3":
            q = norm(q, p + "self_attn.q_norm.weight")
            k = norm(k, p + "self_attn.k_norm.weight")
        k, v = (each.repeat_interleave(heads // kv, 0) for each in (rotate(k), v))
        scores = (rotate(q) @ k.transpose(-1, -2) / width**0.5).masked_fill(hidden_keys, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        x = x + linear(mixed, p + "self_attn.o_proj")
        h = norm(x, p + "post_attention_layernorm.weight")
        gate = linear(h, p + "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, p + "mlp.up_proj"), p + "mlp.down_proj")
    x = norm(x, "norm.weight")
    vector = x[-1] if model.latent is None else latent_mean(model.latent, w, x)[n_prompt:].mean(0)
    return np.asarray((vector / vector.norm()).numpy())


def latent_mean(latent: dict[str, int], w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Lee et al. 2024, section 3.1: tokens attend to latents, then a GEGLU MLP; [T, D]."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    a, m = (f"latent_attention_model.cross_attend_blocks.{i}." for i in (0, 1))
    context = layer_norm(w["latent_attention_model.latents"], a + "norm_context")
    q = layer_norm(x, a + "norm") @ w[a + "fn.to_q.weight"].T
    k, v = (context @ w[a + "fn.to_kv.weight"].T).chunk(2, -1)
    width = latent["cross_dim_head"]
    mixed = torch.cat(
        [
            (q[:, at] @ k[:, at].T / width**0.5).softmax(-1) @ v[:, at]
            for at in (slice(h * width, (h + 1) * width) for h in range(latent["num_cross_heads"]))
        ],
        -1,
    )
    x = x + mixed @ w[a + "fn.to_out.weight"].T
    wide = layer_norm(x, m + "norm") @ w[m + "fn.net.0.weight"].T + w[m + "fn.net.0.bias"]
    value, gate = wide.chunk(2, -1)
    return x + (value * gelu(gate)) @ w[m + "fn.net.2.weight"].T + w[m + "fn.net.2.bias"]


def text_ids(encoder: Encoder, model: Model, text: str) -> list[int]:
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*model.start, *ids, *model.end]


def prefixes(model: Model) -> tuple[str, str]:
    """Where the transformer's names stand in a file without and with the language model's head."""
    nested = "embedding_model." if model.latent is not None else ""
    return nested, f"{nested}model."


@pytest.fixture(scope="module", params=MODELS, ids=IDS)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, Path, dict[str, Tensor]]:
    model: Model = request.param
    folder = tmp_path_factory.mktemp("hub") / model.name
    return model, folder, publish(folder, model, prefix=prefixes(model)[0])


Published3 = tuple[Model, Path, dict[str, Tensor]]


def test_vectors_equal_the_float64_forward_pass_alone_and_batched(published: Published3) -> None:
    model, folder, weights = published
    encoder = gteopt.load(folder, dtype="float32")
    expected = [
        forward_float64(model, weights, text_ids(encoder, model, text), 0) for text in TEXTS
    ]
    found = encoder.encode(TEXTS)
    assert np.abs(found - np.stack(expected)).max() < 2e-5
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert np.abs(alone - found).max() < 1e-5
    tokens = encoder.tokenize(TEXTS)
    assert np.abs(encoder.embed_tokens(tokens, padding="left") - found).max() < 1e-5


def test_queries_carry_the_familys_prompt_and_pooling_leaves_out_what_it_should(
    published: Published3,
) -> None:
    model, folder, weights = published
    encoder = gteopt.load(folder, dtype="float32")
    prompt = model.template.format(INSTRUCTION)
    n_prompt = 0
    if model.latent is not None:  # as the authors' code counts
        n_prompt = len(encoder.tokenizer.tokenize(prompt))
    expected = [
        forward_float64(model, weights, text_ids(encoder, model, prompt + text), n_prompt)
        for text in TEXTS
    ]
    found = encoder.encode(TEXTS, role="query", instruction=INSTRUCTION)
    assert np.abs(found - np.stack(expected)).max() < 2e-5


def test_the_other_attention_direction_gives_clearly_other_vectors(published: Published3) -> None:
    model, folder, weights = published
    encoder = gteopt.load(folder, dtype="float32")
    other = replace(model, causal=not model.causal)
    ids = text_ids(encoder, model, TEXTS[1])
    assert encoder.encode([TEXTS[1]])[0] @ forward_float64(other, weights, ids, 0) < 0.99


def test_a_file_with_the_language_models_head_gives_the_same_vectors(
    published: Published3, tmp_path: Path
) -> None:
    model, folder, _ = published
    publish(tmp_path / model.name, model, prefix=prefixes(model)[1], head=True)
    with_head = gteopt.load(tmp_path / model.name, dtype="float32")
    np.testing.assert_array_equal(
        with_head.encode(TEXTS), gteopt.load(folder, dtype="float32").encode(TEXTS)
    )


def test_a_build_of_each_family_is_close_and_opens_again(
    published: Published3, tmp_path: Path
) -> None:
    model, folder, weights = published
    scheme = LayerScheme(bits=8, group_size=32, symmetric=False)
    recipe = load_recipe("gptq-int4")
    recipe = recipe.model_copy(
        update={
            "weights": recipe.weights.model_copy(update={"scheme": scheme}),
            "calibration": Calibration(n_texts=48, max_tokens=64),
        }
    )
    manifest = gteopt.quantize(folder, recipe, tmp_path / "out", dtype="float32")
    assert len(manifest.layers) == 21
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    trained = [64, 32] if model.name.startswith("Qwen3") else None  # published without a word of it
    assert config.get("matryoshka_dimensions") == trained
    assert manifest.base.family == open_checkpoint(folder).family.name  # type: ignore[union-attr]
    base, variant = gteopt.load(folder, dtype="float32"), gteopt.load(tmp_path / "out")
    for role in ("document", "query"):
        cosines = (base.encode(TEXTS, role=role) * variant.encode(TEXTS, role=role)).sum(1)
        assert cosines.min() > 0.999
    assert variant.weight_bytes < 0.9 * base.weight_bytes
    left = {each.name: each.n_parameters for each in manifest.unquantized}
    if model.latent is not None:
        own = sum(t.numel() for name, t in weights.items() if name.startswith("latent_"))
        assert left["latent_attention_model"] == own
        assert manifest.layout == "gteopt"
        assert manifest.base.n_parameters == sum(t.numel() for t in weights.values())


def test_sentence_transformers_opens_an_artifact_with_the_same_vectors_or_not_at_all(
    published: Published3, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model, folder, _ = published
    gteopt.quantize(folder, "bf16", tmp_path / "out", dtype="float32")
    ours = gteopt.load(tmp_path / "out")
    np.testing.assert_allclose(
        ours.encode(TEXTS), gteopt.load(folder, dtype="float32").encode(TEXTS), atol=1e-5
    )
    if model.latent is not None:
        assert not (tmp_path / "out" / "modules.json").exists()
        with pytest.raises(ValueError, match="nvembed"):
            SentenceTransformer(str(tmp_path / "out"))
        return
    theirs = SentenceTransformer(str(tmp_path / "out"))
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS), atol=1e-5)
    queries = ours.encode(TEXTS, role="query")
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name="query"), queries, atol=1e-5)


def test_shortened_vectors_of_a_nested_model_come_from_its_own_pooling(tmp_path: Path) -> None:
    model = MODELS[-1]
    publish(tmp_path / model.name, model, prefix="embedding_model.")
    gteopt.quantize(tmp_path / model.name, "bf16", tmp_path / "full", dtype="float32")
    gteopt.truncate(tmp_path / "full", tmp_path / "short", dims=16, vectors="int8")
    full, short = gteopt.load(tmp_path / "full"), gteopt.load(tmp_path / "short")
    expected = full.encode(TEXTS)[:, :16]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(short.encode(TEXTS), expected, atol=1e-6)
    assert read_manifest(tmp_path / "short").weight_bytes == full.manifest.weight_bytes  # type: ignore[union-attr]


def test_a_tensor_that_latent_pooling_needs_is_never_random(tmp_path: Path) -> None:
    model = MODELS[-1]
    folder = tmp_path / model.name
    publish(folder, model, prefix="embedding_model.")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "latent_attention_model.cross_attend_blocks.0.fn.to_q.weight"
    from safetensors.torch import load_file

    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"cross_attend_blocks\.0\.fn\.to_q"):
        gteopt.load(folder)


def without_hints(folder: Path) -> None:
    (folder / "modules.json").unlink()
    (folder / "config_sentence_transformers.json").unlink()


def other_prompts(folder: Path) -> None:
    config = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model", [m for m in MODELS if m.causal], ids=lambda m: m.name)
@pytest.mark.parametrize(
    ("folder_name", "change", "known"),
    [
        ("as-published", None, True),
        ("my-model", None, True),  # its prompts tell
        ("as-published", without_hints, True),  # its name tells
        ("my-model", other_prompts, False),  # another encoder: as its folder says
    ],
)
def test_language_model_configs_are_told_apart_by_name_or_prompts(
    tmp_path: Path,
    model: Model,
    folder_name: str,
    change: Callable[[Path], None] | None,
    known: bool,
) -> None:
    folder = tmp_path / (model.name if folder_name == "as-published" else folder_name)
    publish(folder, model)
    if change is not None:
        change(folder)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.family is not None) == known
    assert (checkpoint.attention, checkpoint.pooling) == ("causal", "lasttoken")


def mean_pooling(folder: Path) -> None:
    config = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "pooling"), [(mean_pooling, "mean"), (other_prompts, "lasttoken")]
)
def test_another_bidirectional_qwen2_is_run_as_its_folder_says(
    tmp_path: Path, change: Callable[[Path], None], pooling: str
) -> None:
    """`is_causal: false` alone is no gte-Qwen: no end token, prompt or pooling of that family."""
    folder = tmp_path / "my-model"
    model = replace(MODELS[0], auto_map=False, config={**MODELS[0].config, "is_causal": False})
    publish(folder, model)
    assert open_checkpoint(folder).family is not None
    change(folder)
    found = open_checkpoint(folder)
    assert (found.family, found.attention, found.pooling) == (None, "bidirectional", pooling)
    assert found.end_token is None


def test_what_cannot_be_told_is_refused_until_the_user_names_the_family(tmp_path: Path) -> None:
    model = next(m for m in MODELS if m.name.startswith("e5"))
    folder = tmp_path / "my-model"
    publish(folder, model)
    without_hints(folder)
    with pytest.raises(InputError, match=r"name the family \(--family"):
        open_checkpoint(folder)
    with pytest.raises(InputError, match="did you mean e5-mistral"):
        open_checkpoint(folder, family="e5-mistal")
    with pytest.raises(InputError, match=r"no nv-embed model: its config\.json lacks"):
        open_checkpoint(folder, family="nv-embed")
    named = gteopt.load(folder, family="e5-mistral", dtype="float32")
    gteopt.quantize(folder, "bf16", tmp_path / "out", family="e5-mistral", dtype="float32")
    assert " --family e5-mistral " in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    again = gteopt.load(tmp_path / "out")  # its manifest remembers
    assert again.checkpoint.family == named.checkpoint.family
    np.testing.assert_allclose(again.encode(TEXTS), named.encode(TEXTS), atol=1e-6)


def test_inspect_tells_the_familys_facts(tmp_path: Path) -> None:
    facts = {}
    for model in MODELS:
        owner = next(name for name in PUBLISHED if name.endswith(model.name)).split("/")[0]
        folder = tmp_path / owner / model.name
        publish(folder, model, prefix=prefixes(model)[0])
        facts[model.name] = inspect(f"{owner}/{model.name}", hub_dir=tmp_path)
    assert {f.license for f in facts.values()} == {"apache-2.0", "mit", "cc-by-nc-4.0"}
    assert [facts[name].max_tokens for name in IDS] == [32_768, 32_768, 32_768, 4096, 32_768]
    assert facts["Qwen3-Embedding-0.6B"].matryoshka_dims == (64, 32)
    assert facts["NV-Embed-v1"].pooling == "latent"
    assert facts["NV-Embed-v1"].license == "cc-by-nc-4.0"
    around = [(facts[name].start_token, facts[name].end_token) for name in IDS]
    assert around == [(None, "<|endoftext|>")] * 3 + [("<s>", "</s>")] * 2
    assert all(each.published_scores for each in facts.values())
    assert any("gteopt takes the family's" in note for note in facts[IDS[0]].notes)


def test_replayed_blocks_give_the_models_own_output_however_often(published: Published3) -> None:
    """Published configs say `use_cache: true`: keys of an earlier run must not be seen."""
    from gteopt.build.replay import advance_, behind_blocks, open_blocks, stages

    _, folder, _ = published
    assert "use_cache" not in json.loads((folder / "config.json").read_text())  # so it is true
    encoder = gteopt.load(folder, dtype="float32")
    tokens = sorted(encoder.tokenize(TEXTS, role="query"), key=len)
    blocks, inputs = open_blocks(encoder, tokens)
    for block in blocks:
        for _ in range(2):
            stages(block, inputs)
        advance_(block, inputs)
    found = behind_blocks(encoder, blocks, [batch.hidden for batch in inputs], inputs)
    np.testing.assert_allclose(found.numpy(), encoder.embed_tokens(tokens), atol=1e-5)
