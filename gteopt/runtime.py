"""The forward pass of an encoder without what an embedding does not need.

Texts are laid end to end, so that no linear layer computes padding; attention runs over texts of
one length at a time, without a mask; where pooling reads one token a text, the last block computes
its queries, output projection and MLP for that token alone. Layers that share an input share its
rounding to int8. On a CPU without instructions for bfloat16 activations are float32.
The layers are those of the module it is given, looked up in each call: what replaces one of them,
or hooks it, takes part.
Hides: the names of the parts of the architectures in `_FORWARDS`. Refuses to know: how a model is
loaded, tokenized or judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gteopt.families import Pooling
from gteopt.kernels.cpu import Int4LinearCpu, Int8LinearCpu, multiplies_bfloat16
from gteopt.kernels.reference import DequantLinear

PackedForward = Callable[[nn.Module, Sequence[Sequence[int]]], Tensor]


def packed_forward(
    config: Mapping[str, Any], pooling: Pooling, device: torch.device
) -> PackedForward | None:
    """(module, token lists of N texts) -> pooled vectors [N, D], in their order.

    None for an architecture, or a setting of one, that is not known here: the module's own forward
    pass is to be used.
    """
    kind = str(config.get("model_type"))
    if kind not in _FORWARDS or not has_known_settings(config):
        return None
    forward = _FORWARDS[kind]

    def run(module: nn.Module, tokens: Sequence[Sequence[int]]) -> Tensor:
        return forward(cast("Any", module), config, pooling, _Layout.of(tokens, device))

    return run


def has_known_settings(config: Mapping[str, Any]) -> bool:
    """Whether every setting that would change the computation is at what is written below."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    layers = set(config.get("layer_types") or ())
    return (
        rope.get("rope_type", "default") == "default"
        and layers <= {"full_attention"}
        and not config.get("use_sliding_window")
        and (config["model_type"] == "qwen2" or config.get("sliding_window") is None)
        and config.get("position_embedding_type", "absolute") == "absolute"
        and config.get("hidden_act") in _ACTIVATIONS
        and not config.get("is_decoder")
    )


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


@dataclass(frozen=True)
class _Layout:
    """Texts laid end to end.

    Attributes:
        ids: int64 [T], all texts.
        positions: int64 [T], each token's place in its text.
        lengths: of each text.
        runs: (number of texts, their length) of neighbours of equal length.
    """

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], device: torch.device) -> _Layout:
        lengths = tuple(len(ids) for ids in tokens)
        flat = torch.tensor([each for ids in tokens for each in ids], dtype=torch.int64)
        positions = torch.cat([torch.arange(length) for length in lengths])
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        return _Layout(flat.to(device), positions.to(device), lengths, runs)

    def ends(self, pooling: Pooling) -> Tensor:
        """int64 [N], where the token lies that first- or last-token pooling reads."""
        ends = torch.tensor(self.lengths, device=self.ids.device).cumsum(0)
        if pooling == "lasttoken":
            return ends - 1
        return torch.cat([ends.new_zeros(1), ends[:-1]])

    def mean(self, hidden: Tensor) -> Tensor:
        """[N, D] means over each text's tokens of [T, D]."""
        parts = _split(hidden, [n * length for n, length in self.runs])
        means = [
            part.view(n, length, -1).mean(1)
            for part, (n, length) in zip(parts, self.runs, strict=True)
        ]
        return _joined(means)


def _split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Parts of [T, ...], of some sizes along T."""
    return [x] if len(sizes) == 1 else torch.split_with_sizes(x, sizes)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """What `_split` made parts of; torch would copy where there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: _Layout, *, causal: bool, one: bool
) -> Tensor:
    """Attention within each text.

    Args:
        query: [T, H, d], or [N, H, d] where `one` query a text is wanted, which sees all its text.
        key: [T, H', d], H a multiple of H'.
        value: likewise.
        layout: where the texts lie.
        causal: whether a token sees only those before it.
        one: see `query`.

    Returns:
        [T or N, H * d].
    """
    n_heads, width = query.shape[1:]
    out = []
    sizes = [n * length for n, length in layout.runs]
    queries = _split(query, [n for n, _ in layout.runs] if one else sizes)
    keys, values = _split(key, sizes), _split(value, sizes)
    for (n, length), q, k, v in zip(layout.runs, queries, keys, values, strict=True):
        mixed = F.scaled_dot_product_attention(
            q.view(n, -1, n_heads, width).transpose(1, 2),
            k.view(n, length, -1, width).transpose(1, 2),
            v.view(n, length, -1, width).transpose(1, 2),
            is_causal=causal and not one,
            enable_gqa=n_heads != k.shape[1],
        )  # [n, H, length or 1, d]
        out.append(mixed.transpose(1, 2).reshape(-1, n_heads * width))
    return _joined(out)


def _apply(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Several linear layers of one input [T, I], which rounds it once where they round alike."""
    first = layers[0]
    if isinstance(first, Int8LinearCpu) and all(
        isinstance(each, Int8LinearCpu)
        and each.symmetric == first.symmetric
        and each.outliers == first.outliers
        and not each._forward_pre_hooks
        and not each._forward_hooks
        for each in layers
    ):
        codes = first.quantize(x)
        return [cast("Int8LinearCpu", each).multiply(codes, x.dtype) for each in layers]
    return [each(x) for each in layers]


def _by_blocks(
    function: Callable[[Tensor], Tensor], x: Tensor, layers: Sequence[nn.Module]
) -> Tensor:
    """A function of tokens [T, D], on a CPU so many at a time that what is inside stays cached.

    Not where one of its `layers` decodes its weight in each call: that takes longer than it saves.
    """
    decodes = any(isinstance(each, DequantLinear | Int4LinearCpu) for each in layers)
    if x.device.type != "cpu" or len(x) <= _TOKEN_BLOCK or decodes:
        return function(x)
    return torch.cat([function(part) for part in x.split(_TOKEN_BLOCK)])  # type: ignore[no-untyped-call]


_TOKEN_BLOCK = 256


def _start(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Token vectors [T, D] in the dtype of activations."""
    hidden: Tensor = embedding(ids)
    slow = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"
    return hidden.float() if slow and not multiplies_bfloat16() else hidden


def _decoder(module: Any, config: Mapping[str, Any], pooling: Pooling, layout: _Layout) -> Tensor:
    """Qwen2 and what is built like it: RMSNorm, rotary embedding, grouped queries, gated MLP."""
    causal = config.get("is_causal") is not False
    act = _ACTIVATIONS[str(config["hidden_act"])]
    x = _start(module.embed_tokens, layout.ids)  # [T, D]
    cos, sin = module.rotary_emb(x, layout.positions[None])
    cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)  # [T, 1, d]
    # The one query of the last block sees its whole text, which a causal first token must not.
    last = None if pooling == "mean" or (causal and pooling == "cls") else layout.ends(pooling)
    for i, block in enumerate(module.layers):
        attention = block.self_attn
        width = attention.head_dim
        one = last is not None and i == len(module.layers) - 1
        h = _rms_norm(block.input_layernorm, x)
        if one:
            assert last is not None
            (q,), x = _apply([attention.q_proj], h[last]), x[last]
            k, v = _apply([attention.k_proj, attention.v_proj], h)
            q = _rotate(q.view(len(q), -1, width), cos[last], sin[last])
        else:
            q, k, v = _apply([attention.q_proj, attention.k_proj, attention.v_proj], h)
            q = _rotate(q.view(len(q), -1, width), cos, sin)
        k, v = _rotate(k.view(len(k), -1, width), cos, sin), v.view(len(v), -1, width)
        x = x + attention.o_proj(_attend(q, k, v, layout, causal=causal, one=one))
        x = _by_blocks(partial(_gated_mlp, block, act), x, list(block.mlp.children()))
    x = _rms_norm(module.norm, x)
    if last is not None:
        return x
    return layout.mean(x) if pooling == "mean" else x[layout.ends(pooling)]


def _gated_mlp(block: Any, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    h = _rms_norm(block.post_attention_layernorm, x)
    gate, up = _apply([block.mlp.gate_proj, block.mlp.up_proj], h)
    found: Tensor = x + block.mlp.down_proj(act(gate).mul_(up))
    return found


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4; computed in float32."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], norm.weight.float(), norm.variance_epsilon)
    found: Tensor = norm(x)
    return found


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [T, H, d] by angles [T, 1, d], halves paired (RoFormer, eq. 34)."""
    half = x.shape[-1] // 2
    return (x * cos).add_(torch.cat([-x[..., half:], x[..., :half]], dim=-1).mul_(sin))


def _bert(module: Any, config: Mapping[str, Any], pooling: Pooling, layout: _Layout) -> Tensor:
    """BERT: learned positions, LayerNorm behind each residual."""
    act = _ACTIVATIONS[str(config["hidden_act"])]
    embeddings = module.embeddings
    x = _start(embeddings.word_embeddings, layout.ids)  # [T, D]
    x = x + embeddings.position_embeddings.weight[layout.positions]
    x = _layer_norm(embeddings.LayerNorm, x + embeddings.token_type_embeddings.weight[0])
    first = layout.ends(pooling) if pooling != "mean" else None
    blocks = module.encoder.layer
    for i, block in enumerate(blocks):
        attention, inner = block.attention, block.attention.self
        width = inner.attention_head_size
        one = first is not None and i == len(blocks) - 1
        if one:
            k, v = _apply([inner.key, inner.value], x)
            assert first is not None
            x = x[first]
            (q,) = _apply([inner.query], x)
        else:
            q, k, v = _apply([inner.query, inner.key, inner.value], x)
        q, k, v = (each.view(len(each), -1, width) for each in (q, k, v))
        mixed = attention.output.dense(_attend(q, k, v, layout, causal=False, one=one))
        x = _layer_norm(attention.output.LayerNorm, mixed.add_(x))
        layers = (block.intermediate.dense, block.output.dense)
        x = _by_blocks(partial(_bert_mlp, block, act), x, layers)
    return x if first is not None else layout.mean(x)


def _bert_mlp(block: Any, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    inside = block.output.dense(act(block.intermediate.dense(x)))
    return _layer_norm(block.output.LayerNorm, inside.add_(x))


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


_Forward = Callable[[Any, Mapping[str, Any], Pooling, _Layout], Tensor]
_FORWARDS: Mapping[str, _Forward] = {"qwen2": _decoder, "mistral": _decoder, "bert": _bert}
