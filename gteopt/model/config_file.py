"""Reads and checks the `config.json` of a transformer before anything is built.

Hides: the names that architectures give to a size, a limit or an attention direction. Refuses to
know: torch, weights, the table of families.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gteopt.errors import InputError, UnsupportedError, join_problems, shorten_value
from gteopt.model.families import Attention

_NESTED_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
}
"""Defaults of NV-Embed's classes, which its config.json may leave out."""
DECODERS = frozenset(
    {
        *("qwen2", "qwen3", "mistral", "llama", "gemma", "gemma2", "phi", "phi3"),
        *("gemma3_text", "ministral3", "olmo2", "granite", "smollm3", "qwen3_moe", "qwen2_moe"),
        *("mixtral", "gpt_neox", "opt", "gpt2", "stablelm", "starcoder2", "cohere", "glm"),
        *("olmo", "olmo3", "falcon", "bloom", "ministral", "phimoe", "gpt_oss", "deepseek_v3"),
    }
)
"""Architectures that attend causally unless config.json says otherwise."""
_WIDTHS = ("hidden_size", "dim", "d_model", "n_embd")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
_OFFSET_POSITIONS = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"),
        *("data2vec-text", "xmod", "roberta-prelayernorm", "luke", "ibert", "markuplm", "esm"),
        *("layoutlmv3", "lilt", "mluke", "jina_embeddings_v3"),
    }
)
"""Architectures whose first token has position padding_idx + 1 in a learned table."""
_ROTARY_INSTEAD = frozenset({"jina_embeddings_v3", "esm"})
"""Architectures among `_OFFSET_POSITIONS` without a table if config.json sets rotary positions."""
STATIC_TABLE = "static_embedding"
"""The architecture name of a model that is a table of token vectors."""
_MOST_SIZE = 1 << 24
_MOST_ROWS = 1 << 27


def check_config(config: Mapping[str, Any], path: Path, n_tensors: int) -> None:
    """Refuse numbers that no model has, because they would take endless memory or time.

    Args:
        config: the transformer's config.
        path: the file, for errors.
        n_tensors: number of tensors in the weight files; a layer has at least one.

    Raises:
        InputError: all wrong fields at once.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InputError(f"{path} names no model_type; it is not the config of a transformer")
    problems = []
    for name, value in config.items():
        is_count = name.startswith(("num_", "n_", "max_")) or name.endswith(("_size", "_dim"))
        if not (is_count or name in _WIDTHS or name == "head_dim") or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            if name in (*_WIDTHS, *_LIMITS, "vocab_size") or name in _DEPTHS:
                problems.append(f"{name} should be a whole number, found {shorten_value(value)}")
            continue
        most = _MOST_ROWS if "vocab" in name or name in _LIMITS else _MOST_SIZE
        if name in _DEPTHS and n_tensors:
            most = min(most, n_tensors)
        least = 1 if name in (*_WIDTHS, *_LIMITS, "vocab_size") else -1
        if not least <= value <= most:
            shown = shorten_value(value) if abs(value) < 1 << 64 else "a number beyond 64 bits"
            problems.append(f"{name} should be between {least} and {most:,}, found {shown}")
    if problems:
        raise InputError(join_problems(f"{path} is wrong", problems[:10]))


def unnest_config(
    config: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """The configs of transformer and pooling inside NV-Embed's config; else `config` and None.

    The transformer is a Mistral under the name `bidir_mistral`. Its attention sees every token, so
    a sliding window in the config does not apply.

    Raises:
        InputError: NV-Embed's config has no transformer's config inside.
        UnsupportedError: the transformer is not a Mistral, or the mean includes the instruction.
    """
    if "latent_attention_config" not in config and config.get("model_type") != "nvembed":
        return config, None
    inner = config.get("text_config")
    latent = config.get("latent_attention_config") or {}
    if not isinstance(inner, dict) or not isinstance(latent, dict):
        raise InputError(f"{folder}/config.json names no text_config for its latent attention")
    kind = inner.get("model_type", "bidir_mistral")
    if kind not in ("bidir_mistral", "mistral"):
        raise UnsupportedError(
            f"{folder}: latent attention over a {shorten_value(kind)} model is not supported; "
            f"gteopt supports NV-Embed's, over a Mistral"
        )
    if config.get("is_mask_instruction", True) is not True:
        raise UnsupportedError(
            f"{folder}: is_mask_instruction is {config['is_mask_instruction']!r} in config.json; "
            f"gteopt leaves the instruction out of the mean, as NV-Embed was published"
        )
    kept = {k: v for k, v in inner.items() if k not in ("auto_map", "_name_or_path")}
    flat = {**_NESTED_DEFAULTS, **kept, "model_type": "mistral", "sliding_window": None}
    return flat, latent


def hidden_dims(config: Mapping[str, Any]) -> int:
    """Dimensions of a token vector.

    Raises:
        UnsupportedError: the config states no dimensions.
    """
    for name in _WIDTHS:
        if isinstance(size := config.get(name), int):
            return size
    raise UnsupportedError("config.json names no hidden_size; this architecture is unknown")


def position_limit(config: Mapping[str, Any]) -> int | None:
    """The longest text in tokens that the positions allow; None if the config states no limit."""
    stated = next((config[n] for n in _LIMITS if isinstance(config.get(n), int)), None)
    kind = str(config["model_type"])
    if stated is None or kind not in _OFFSET_POSITIONS:
        return stated
    if kind in _ROTARY_INSTEAD and config.get("position_embedding_type") != "absolute":
        return int(stated)
    padding = config.get("pad_token_id", 1)
    return int(stated) - (padding if isinstance(padding, int) and padding >= 0 else 1) - 1


def attention_of(config: Mapping[str, Any]) -> Attention:
    """The attention direction of the architecture under this config."""
    stated = config.get("is_causal")
    if stated is False or config.get("use_bidirectional_attention"):
        return "bidirectional"
    is_decoder = config["model_type"] in DECODERS or config.get("is_decoder")
    return "causal" if is_decoder else "bidirectional"


def config_of_table(place: Path, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A config for a table of token vectors, with the keys of a transformer's config.json.

    Raises:
        UnsupportedError: the table has another name or shape.
    """
    shape = tensors.get("embedding.weight", ())
    if len(shape) != 2:
        raise UnsupportedError(
            f"{place} holds no table embedding.weight of two axes, as sentence-transformers writes "
            f"it; open the model with sentence-transformers and save it anew"
        )
    return {"model_type": STATIC_TABLE, "vocab_size": shape[0], "hidden_size": shape[1]}
