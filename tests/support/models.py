"""Models of each family in their published layout, with random weights; a float64 forward pass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """One published layout at a small size.

    Attributes:
        config: config of the transformer.
        causal: whether a token sees no later token.
        window: a token sees no token that lies `window` or more before it.
        start, end: token ids around a text.
        template: template of a query.
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
    for file, shard in shards.items():
        save_file({n: stored[n] for n in shard}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in shards.items() for name in shard}
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

    distance = (
        torch.arange(n)[:, None] - torch.arange(n)[None]
    )  # how far before its query a key lies
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
        k, v = (projected.repeat_interleave(heads // kv, 0) for projected in (rotate(k), v))
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
