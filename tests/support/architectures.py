"""Tiny random models of many architectures, in Sentence Transformers' folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gteopt.paths import ASSETS

TEXTS = ["A man plays the guitar on stage.", "How do plants turn light into energy?", "ok"]
_WIDTH, _VOCABULARY = 64, 20_480
_ENCODER: Mapping[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": _WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
_DECODER: Mapping[str, Any] = {
    **_ENCODER,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DISENTANGLED: Mapping[str, Any] = {
    "relative_attention": True,
    "position_buckets": 64,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bert": ("bert", _ENCODER),
    "roberta": ("roberta", {**_ENCODER, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {**_ENCODER, "type_vocab_size": 1}),
    "camembert": ("camembert", {**_ENCODER, "type_vocab_size": 1}),
    "mpnet": ("mpnet", _ENCODER),
    "deberta-v2": ("deberta-v2", {**_ENCODER, **_DISENTANGLED}),
    "distilbert": (
        "distilbert",
        {
            "vocab_size": _VOCABULARY,
            "dim": _WIDTH,
            "hidden_dim": 128,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
        },
    ),
    "electra": ("electra", {**_ENCODER, "embedding_size": _WIDTH}),
    "albert": ("albert", {**_ENCODER, "embedding_size": 32}),
    "ernie": ("ernie", _ENCODER),
    "modernbert": (
        "modernbert",
        {**_ENCODER, "local_attention": 16, "global_attn_every_n_layers": 2},
    ),
    "nomic_bert": ("nomic_bert", _ENCODER),
    "jina_embeddings_v3": ("jina_embeddings_v3", _ENCODER),
    "eurobert": ("eurobert", {**_DECODER, "num_key_value_heads": 2}),
    "t5": (
        "t5",
        {
            "vocab_size": _VOCABULARY,
            "d_model": _WIDTH,
            "d_ff": 128,
            "d_kv": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "qwen2": ("qwen2", _DECODER),
    "qwen3": ("qwen3", _DECODER),
    "qwen3 bidirectional": ("qwen3", {**_DECODER, "is_causal": False}),
    "mistral": ("mistral", {**_DECODER, "sliding_window": None}),
    "ministral3": ("ministral3", {**_DECODER, "is_causal": False}),
    "llama": ("llama", _DECODER),
    "llama bidirectional": ("llama", {**_DECODER, "is_causal": False}),
    "gemma": ("gemma", _DECODER),
    "gemma2": ("gemma2", {**_DECODER, "sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3_text": ("gemma3_text", {**_DECODER, "sliding_window": 16}),
    "gemma3_text bidirectional": (
        "gemma3_text",
        {**_DECODER, "sliding_window": 16, "use_bidirectional_attention": True},
    ),
    "phi3": ("phi3", {**_DECODER, "sliding_window": None}),
    "olmo2": ("olmo2", _DECODER),
    "granite": ("granite", _DECODER),
    "smollm3": ("smollm3", _DECODER),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "gpt_neox": ("gpt_neox", _ENCODER),
    "opt": ("opt", {**_ENCODER, "ffn_dim": 128, "word_embed_proj_dim": _WIDTH}),
}
"""Name in docs/models.md -> model_type and config."""
SCHEMES = {
    "4 bits": ("rtn", "{bits: 4, group_size: 32, symmetric: false}"),
    "8 bits": ("rtn", "{bits: 8, group_size: per_channel, symmetric: true, activation_bits: 8}"),
    "GPTQ": ("gptq", "{bits: 4, group_size: 32, symmetric: false}"),
}
"""Name of a build in docs/models.md -> method and scheme of its recipe."""
REFUSED = {
    ("albert", "4 bits"): "no list of transformer blocks",
    ("albert", "8 bits"): "no list of transformer blocks",
    ("albert", "GPTQ"): "no list of transformer blocks",
    ("t5", "GPTQ"): "its blocks hand on more than hidden states",
}
"""Architecture and scheme -> message of the refusal."""


def make(name: str, folder: Path) -> Path:
    """Write a random model of one architecture with nano's tokenizer and mean pooling."""
    import transformers

    kind, fields = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **fields)
    # T5's decoder is no part of an embedding, and transformers' AutoModel would add one.
    model: Any = (
        transformers.T5EncoderModel(config)
        if kind == "t5"
        else transformers.AutoModel.from_config(config)
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:  # a norm of 1 or a bias of 0 would hide its loss
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "nano" / file, folder)
    rows = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{row}"}
        for i, (row, path) in enumerate(rows)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"embedding_dimension": _WIDTH, "pooling_mode": "mean"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    return folder


def sentence_transformer(folder: Path) -> Any:
    """The folder as Sentence Transformers opens it, on the CPU in float32."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        str(folder),
        device="cpu",
        local_files_only=True,
        model_kwargs={"dtype": torch.float32},
    )
