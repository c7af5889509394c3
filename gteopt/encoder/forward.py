"""Computes the forward pass of an encoder, without the work that an embedding does not need.

- Texts are laid end to end, so that no linear layer computes padding.
- Attention runs over texts of one length at a time, without a mask. A GPU runs all texts at once.
- If pooling reads one token a text, the last block computes queries, output projection and MLP for
  that token only.
- Layers that share an input share its rounding to 8 bits.
- Activations are float32 on a CPU without instructions for bfloat16.

`padded_forward` computes one text in a buffer of fixed length, so that a GPU can replay the same
computation for shorter texts. The tokens of the text do not see the padding.
Layers are looked up in the module in each call, so replaced layers and hooks take part.
Hides: the names of the parts of the architectures in `_FORWARDS`. Refuses to know: how a model is
loaded, tokenized or judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from types import ModuleType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gteopt.kernels import gpu_kernels
from gteopt.kernels.cpu import multiplies_bfloat16
from gteopt.kernels.cpu_int4 import Int4LinearCpu
from gteopt.kernels.reference import DequantLinear
from gteopt.model.families import Pooling

BetweenBlocks = Callable[[], None]
"""Called before each block of a pass, so that the caller can do other work meanwhile."""


class UnpaddedForward(Protocol):
    """(module, token lists of N texts) -> pooled vectors [N, D]; see `unpadded_forward`."""

    def __call__(
        self,
        module: nn.Module,
        tokens: Sequence[Sequence[int]],
        between_blocks: BetweenBlocks | None = None,
    ) -> Tensor: ...


PaddedForward = Callable[[nn.Module, Tensor, Tensor], Tensor]


def unpadded_forward(
    config: Mapping[str, Any], pooling: Pooling, device: torch.device
) -> UnpaddedForward | None:
    """A function (module, token lists of N texts) -> pooled vectors [N, D], in the texts' order.

    None if the architecture or one of its settings is not implemented here. The module's own
    forward pass is needed then.
    """
    forward = _forward_of(config)
    if forward is None:
        return None

    def run(
        module: nn.Module,
        tokens: Sequence[Sequence[int]],
        between_blocks: BetweenBlocks | None = None,
    ) -> Tensor:
        n_texts = len(tokens)
        if device.type == "cpu":
            token = max(tokens, key=len)[0]
            added = pass_padding([len(ids) for ids in tokens])
            tokens = [*tokens, *([token] * length for length in added)]
        layout = replace(_Layout.of(tokens, pooling, device), between_blocks=between_blocks)
        return forward(cast("Any", module), config, pooling, layout)[:n_texts]

    return run


def pass_padding(lengths: Sequence[int]) -> list[int]:
    """Lengths of texts to add to a pass on a CPU, so that passes have few totals of tokens.

    oneDNN compiles kernels for each number of rows, and never frees some of them. Memory would grow
    with the number of different totals. The step between totals is a 32nd of the power of two below
    the total.

    Args:
        lengths: tokens of each text of the pass; no added text is longer than the longest.
    """
    longest, total = max(lengths, default=0), sum(lengths)
    if not longest:
        return []
    step = max(1, (1 << (total.bit_length() - 1)) >> 5)
    n_whole, rest = divmod(-total % step, longest)
    return [longest] * n_whole + ([rest] if rest else [])


def padded_forward(config: Mapping[str, Any], pooling: Pooling) -> PaddedForward | None:
    """A function (module, ids [T], n [1]) -> pooled vector [1, D] of the text `ids[:n]`.

    `ids` and `n` are int64 on the module's device; ids after the text may be any tokens. The host
    neither reads nor sends a number during the pass, and no shape depends on `n`. The computation
    can therefore be recorded once and replayed. None as for `unpadded_forward`.
    """
    forward = _forward_of(config)
    if forward is None:
        return None

    def run(module: nn.Module, ids: Tensor, n_tokens: Tensor) -> Tensor:
        layout = _Layout.padded(ids, n_tokens, pooling)
        return forward(cast("Any", module), config, pooling, layout)

    return run


def _forward_of(config: Mapping[str, Any]) -> _Forward | None:
    kind = str(config.get("model_type"))
    return _FORWARDS[kind] if kind in _FORWARDS and has_known_forward_settings(config) else None


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; a GPU copies it from pinned memory without blocking the host."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def reads_one_token(config: Mapping[str, Any], pooling: Pooling) -> bool:
    """Whether the last block needs the query of one token a text only, the token that is pooled.

    That query must see the whole text; under causal attention a first token does not.
    """
    causal = config["model_type"] != "bert" and config.get("is_causal") is not False
    return pooling == "lasttoken" or (pooling == "cls" and not causal)


def count_forward_operations(
    module: nn.Module, config: Mapping[str, Any], lengths: Sequence[int], *, one_token: bool
) -> float:
    """Floating-point operations of the blocks for texts of these lengths.

    Two for each token and weight of a linear layer. 4 T q d for each block and head, where q
    queries of d dimensions attend to T tokens.

    Args:
        module: with linear layers of any kind that have `in_features` and `out_features`.
        config: the module's config.json.
        lengths: tokens of each text.
        one_token: in the last block, all but keys and values is computed for one token a text.
    """
    heads = int(config.get("num_attention_heads", 0))
    blocks = int(config.get("num_hidden_layers", 0))
    width = int(config.get("head_dim") or int(config["hidden_size"]) // max(heads, 1))
    in_last = re.compile(rf"(layers|encoder\.layer)\.{blocks - 1}\.")
    per_token, per_text = 0, 0  # weights that multiply each token, or one token a text
    for name, layer in module.named_modules():
        if not hasattr(layer, "in_features") or name.startswith("pooler"):
            continue
        n_weights = int(layer.in_features) * int(layer.out_features)
        is_key_or_value = name.endswith(("k_proj", "v_proj", ".key", ".value"))
        if one_token and in_last.match(name) and not is_key_or_value:
            per_text += n_weights
        else:
            per_token += n_weights
    total = 0.0
    for length in lengths:
        queries = (blocks - one_token) * length + one_token
        total += 2 * (per_token * length + per_text) + 4 * heads * width * length * queries
    return total


def has_known_forward_settings(config: Mapping[str, Any]) -> bool:
    """Whether every setting that would change the computation has the value implemented here."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    layers = set(config.get("layer_types") or ())
    return (
        rope.get("rope_type", "default") == "default"
        and layers <= {"full_attention"}
        and not config.get("use_sliding_window")
        # Qwen uses its sliding window only if `use_sliding_window` is true.
        and (config["model_type"] in ("qwen2", "qwen3") or config.get("sliding_window") is None)
        and config.get("position_embedding_type", "absolute") == "absolute"
        and config.get("hidden_act") in _ACTIVATIONS
        and not config.get("is_decoder")
    )


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


@dataclass(frozen=True)
class _Layout:
    """Texts laid end to end, or one text with padding behind it.

    Attributes:
        ids: int64 [T], the tokens of all texts.
        positions: int64 [T], each token's position in its text.
        ends: int64 [N], index of the token that first- or last-token pooling reads.
        bounds: int32 [N + 1], start of each text, then the end of the last one.
        runs: (number of texts, their length) for neighbours of equal length.
        n_tokens: int64 [1], how many of `ids` belong to the text; None if all do.
        between_blocks: called before each block.
    """

    ids: Tensor
    positions: Tensor
    ends: Tensor
    bounds: Tensor
    runs: tuple[tuple[int, int], ...]
    n_tokens: Tensor | None = None
    between_blocks: BetweenBlocks | None = None

    def blocks(self, blocks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Numbered blocks; calls `between_blocks` before each."""
        for i, block in enumerate(blocks):
            if self.between_blocks is not None:
                self.between_blocks()
            yield i, block

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], pooling: Pooling, device: torch.device) -> _Layout:
        lengths = [len(ids) for ids in tokens]
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        stops = torch.tensor(lengths).cumsum(0)
        ends = stops - 1 if pooling == "lasttoken" else stops - torch.tensor(lengths)
        flat = torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.int64)
        positions = torch.cat([torch.arange(length) for length in lengths])
        # One transfer for all four.
        joined = copy_to_device(torch.cat([flat, positions, ends, stops]), device)
        sizes = [len(flat), len(flat), len(lengths), len(lengths)]
        ids, positions, ends, stops = joined.split(sizes)  # type: ignore[no-untyped-call]
        return _Layout(ids, positions, ends, F.pad(stops, (1, 0)).int(), runs)

    @staticmethod
    def padded(ids: Tensor, n_tokens: Tensor, pooling: Pooling) -> _Layout:
        ends = n_tokens - 1 if pooling == "lasttoken" else torch.zeros_like(n_tokens)
        positions = torch.arange(len(ids), device=ids.device)
        bounds = F.pad(n_tokens, (1, 0)).int()
        return _Layout(ids, positions, ends, bounds, ((1, len(ids)),), n_tokens)

    def bias(self, dtype: torch.dtype, *, causal: bool) -> Tensor | None:
        """[T or 1, T], added to attention scores; None without padding.

        It hides padding, and in a causal model later tokens. The last row hides padding only.
        """
        if self.n_tokens is None:
            return None
        visible = (self.positions < self.n_tokens)[None]
        if causal:
            visible = visible & (self.positions <= self.positions[:, None])
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return bias.masked_fill_(~visible, float("-inf"))

    def mean(self, hidden: Tensor) -> Tensor:
        """[N, D], the mean of each text's token vectors in [T, D]."""
        if self.n_tokens is not None:
            padding = (self.positions >= self.n_tokens)[:, None]
            kind = torch.promote_types(hidden.dtype, torch.float32)
            total = hidden.masked_fill(padding, 0).sum(0, keepdim=True, dtype=kind)
            return total / self.n_tokens
        parts = _split(hidden, [n * length for n, length in self.runs])
        means = [
            part.view(n, length, -1).mean(1)
            for part, (n, length) in zip(parts, self.runs, strict=True)
        ]
        return _joined(means)


def _split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Parts of [T, ...] of the given sizes along T."""
    return [x] if len(sizes) == 1 else torch.split_with_sizes(x, sizes)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `_split`; torch.cat would copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Sight(NamedTuple):
    """Which tokens of its text a query sees.

    Attributes:
        causal: whether a token sees no later tokens.
        one_query: whether each text has one query, which sees the whole text.
        bias: from `_Layout.bias`; None needs no mask, which is faster.
    """

    causal: bool
    one_query: bool
    bias: Tensor | None


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: _Layout, sight: _Sight) -> Tensor:
    """Attention within each text.

    Args:
        query: [T, H, d], or [N, H, d] if `sight.one_query`.
        key: [T, H', d], H a multiple of H'.
        value: [T, H', d].
        layout: where each text begins and ends.
        sight: which tokens a query sees.

    Returns:
        [T or N, H * d].
    """
    n_heads, width = query.shape[1:]
    one_query, bias = sight.one_query, sight.bias
    causal = sight.causal and not one_query
    if (layout.n_tokens is not None or len(layout.runs) > 1) and _has_varlen(query):
        keys = queries = _Bounds(layout.bounds, max(length for _, length in layout.runs))
        if one_query:
            n_bounds, device = len(layout.bounds), layout.bounds.device
            queries = _Bounds(torch.arange(n_bounds, dtype=torch.int32, device=device), 1)
        return _varlen(query, key, value, queries, keys, causal=causal).reshape(-1, n_heads * width)
    if bias is not None:
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            _repeated(key, n_heads).transpose(0, 1)[None],
            _repeated(value, n_heads).transpose(0, 1)[None],
            attn_mask=(bias[-1:] if one_query else bias).expand(1, n_heads, len(query), -1),
        )  # [1, H, T or 1, d]
        return mixed[0].transpose(0, 1).reshape(-1, n_heads * width)
    out = []
    sizes = [n * length for n, length in layout.runs]
    parts = zip(
        layout.runs,
        _split(query, [n for n, _ in layout.runs] if one_query else sizes),
        _split(key, sizes),
        _split(value, sizes),
        strict=True,
    )
    for (n, length), q, k, v in parts:
        mixed = F.scaled_dot_product_attention(
            q.view(n, -1, n_heads, width).transpose(1, 2),
            k.view(n, length, -1, width).transpose(1, 2),
            v.view(n, length, -1, width).transpose(1, 2),
            is_causal=causal,
            enable_gqa=n_heads != k.shape[1],
        )  # [n, H, length or 1, d]
        out.append(mixed.transpose(1, 2).reshape(-1, n_heads * width))
    return _joined(out)


def _has_varlen(query: Tensor) -> bool:
    """Whether `_varlen` supports the dtype, head width and device of `query`."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and gpu_kernels(query.device) is not None
    )


class _Bounds(NamedTuple):
    """`starts`, int32 [N + 1]: start of each text, end of the last. `longest`: its most tokens."""

    starts: Tensor
    longest: int


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, queries: _Bounds, keys: _Bounds, *, causal: bool
) -> Tensor:
    """Attention within each of several texts, or in one padded text, in one launch.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691) by the operator inside
    `torch.nn.attention.varlen`; the public function launches one more kernel. Grouped heads need
    no copies. Rows after the last bound are undefined.
    """
    mixed: Tensor = torch.ops.aten._flash_attention_forward(
        *(query, key, value, queries.starts, keys.starts, queries.longest, keys.longest),
        *(0.0, causal, False),  # dropout, causal, debugging
    )[0]
    return mixed


def _repeated(x: Tensor, n_heads: int) -> Tensor:
    """[T, H', d] to [T, H, d]; fused attention with a mask needs as many heads as the queries."""
    n_tokens, n_shared, width = x.shape
    if n_shared == n_heads:
        return x
    wide = x[:, :, None].expand(-1, -1, n_heads // n_shared, -1)
    return wide.reshape(n_tokens, n_heads, width)


class _Rounding(Protocol):
    """A layer that rounds its input to codes and multiplies the codes: `multiply(quantize(x))`.

    Layers of one class with equal `rounding` make the same codes.
    """

    rounding: Hashable

    def quantize(self, x: Tensor, before: Any = None) -> Any: ...

    def multiply(self, x: Any, dtype: torch.dtype) -> Tensor: ...


def _alike(layers: Sequence[nn.Module]) -> Sequence[_Rounding] | None:
    """The layers, if they make the same codes of their common input and have no hooks."""
    rounding = getattr(layers[0], "rounding", None)
    if rounding is not None and all(
        type(layer) is type(layers[0])
        and layer.rounding == rounding
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        for layer in layers
    ):
        return cast("Sequence[_Rounding]", layers)
    return None


def _apply(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Outputs of several linear layers of one input [T, I], rounded once if they round alike."""
    if (alike := _alike(layers)) is not None:
        codes = alike[0].quantize(x)
        return [layer.multiply(codes, x.dtype) for layer in alike]
    return [layer(x) for layer in layers]


def _apply_normed(norm: Any, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Outputs of several linear layers of RMSNorm(x); a GPU norms and rounds in one kernel."""
    alike, on_gpu = _alike(layers), _on_gpu(x)
    if alike is not None and on_gpu is not None:
        before = on_gpu.FusedStep(norm=norm.weight, epsilon=norm.variance_epsilon)
        codes = alike[0].quantize(x, before)
        return [layer.multiply(codes, x.dtype) for layer in alike]
    return _apply(layers, _rms_norm(norm, x))


def _by_blocks(
    function: Callable[[Tensor], Tensor], x: Tensor, layers: Sequence[nn.Module]
) -> Tensor:
    """A function of tokens [T, D], computed on a CPU in parts whose activations fit the caches.

    If one of its `layers` decodes its weight in each call, there is one part: decoding again for
    each part would take longer than the cache saves.
    """
    decodes = any(
        isinstance(layer, DequantLinear) or (isinstance(layer, Int4LinearCpu) and layer.decodes)
        for layer in layers
    )
    size = _THREAD_TOKENS * torch.get_num_threads()  # each core has a cache of its own
    if x.device.type != "cpu" or len(x) <= size or decodes:
        return function(x)
    return torch.cat([function(part) for part in x.split(size)])  # type: ignore[no-untyped-call]


_THREAD_TOKENS = 256


def _start(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Token embeddings [T, D] in the dtype of activations."""
    hidden: Tensor = embedding(ids)
    slow = hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"
    return hidden.float() if slow and not multiplies_bfloat16() else hidden


def _decoder(module: Any, config: Mapping[str, Any], pooling: Pooling, layout: _Layout) -> Tensor:
    """Qwen2, Qwen3 and Mistral: RMSNorm, rotary embedding, grouped queries, gated MLP.

    Qwen3 also applies RMSNorm to each head of queries and keys.
    """
    causal = config.get("is_causal") is not False
    act = _ACTIVATIONS[str(config["hidden_act"])]
    last = layout.ends if reads_one_token(config, pooling) else None
    x = _start(module.embed_tokens, layout.ids)  # [T, D]
    cos, sin = module.rotary_emb(x, layout.positions[None])
    cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)  # [T, 1, d]
    bias = layout.bias(x.dtype, causal=causal)
    for i, block in layout.blocks(module.layers):
        attention = block.self_attn
        width = attention.head_dim
        one_query = last is not None and i == len(module.layers) - 1
        norm, inputs = block.input_layernorm, [attention.k_proj, attention.v_proj]
        if one_query:
            assert last is not None
            k, v = _apply_normed(norm, inputs, x)
            x = x[last]
            (q,) = _apply_normed(norm, [attention.q_proj], x)
        else:
            q, k, v = _apply_normed(norm, [attention.q_proj, *inputs], x)
        q, k, v = (projected.view(len(projected), -1, width) for projected in (q, k, v))
        if hasattr(attention, "q_norm"):
            q, k = _rms_norm(attention.q_norm, q), _rms_norm(attention.k_norm, k)
        q = _rotate(q, cos[last], sin[last]) if one_query else _rotate(q, cos, sin)
        k = _rotate(k, cos, sin)
        mixed = _attend(q, k, v, layout, _Sight(causal, one_query, bias))
        x = x + attention.o_proj(mixed)
        x = _by_blocks(partial(_gated_mlp, block, act), x, list(block.mlp.children()))
    x = _rms_norm(module.norm, x)
    if last is not None:
        return x
    return layout.mean(x) if pooling == "mean" else x[layout.ends]


def _gated_mlp(block: Any, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    down = block.mlp.down_proj
    halves = [block.mlp.gate_proj, block.mlp.up_proj]
    gate, up = _apply_normed(block.post_attention_layernorm, halves, x)
    on_gpu = _on_gpu(gate) if act is F.silu else None
    if on_gpu is None:
        y: Tensor = x + down(act(gate).mul_(up))
    elif _alike([down]) is not None:
        y = x + down.multiply(down.quantize(gate, on_gpu.FusedStep(up=up)), x.dtype)
    else:
        y = x + down(on_gpu.gate_(gate, up))
    return y


def _on_gpu(x: Tensor) -> ModuleType | None:
    """The GPU kernels if they support x; they compute in float32, so float64 is left out."""
    return gpu_kernels(x.device) if x.dtype != torch.float64 else None


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4; computed in float32."""
    if x.is_cuda and norm.weight.dtype == x.dtype:
        # One kernel instead of the module's eight; it rounds once, after the weight.
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], norm.weight.float(), norm.variance_epsilon)
    normed: Tensor = norm(x)
    return normed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [T, H, d] by angles [T, 1, d], halves paired (RoFormer, eq. 34).

    A GPU overwrites x.
    """
    half = x.shape[-1] // 2
    if not half & (half - 1) and (on_gpu := _on_gpu(x)) is not None:
        rotated: Tensor = on_gpu.rotate_(x, cos, sin)
        return rotated
    return (x * cos).add_(torch.cat([-x[..., half:], x[..., :half]], dim=-1).mul_(sin))


def _bert(module: Any, config: Mapping[str, Any], pooling: Pooling, layout: _Layout) -> Tensor:
    """BERT: learned positions, LayerNorm after each residual."""
    act = _ACTIVATIONS[str(config["hidden_act"])]
    embeddings = module.embeddings
    x = _start(embeddings.word_embeddings, layout.ids)  # [T, D]
    x = x + embeddings.position_embeddings.weight[layout.positions]
    x = _layer_norm(embeddings.LayerNorm, x + embeddings.token_type_embeddings.weight[0])
    first = layout.ends if reads_one_token(config, pooling) else None
    bias = layout.bias(x.dtype, causal=False)
    blocks = module.encoder.layer
    for i, block in layout.blocks(blocks):
        attention, inner = block.attention, block.attention.self
        width = inner.attention_head_size
        one_query = first is not None and i == len(blocks) - 1
        if one_query:
            k, v = _apply([inner.key, inner.value], x)
            assert first is not None
            x = x[first]
            (q,) = _apply([inner.query], x)
        else:
            q, k, v = _apply([inner.query, inner.key, inner.value], x)
        q, k, v = (projected.view(len(projected), -1, width) for projected in (q, k, v))
        mixed = _attend(q, k, v, layout, _Sight(False, one_query, bias))
        x = _layer_norm(attention.output.LayerNorm, attention.output.dense(mixed).add_(x))
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
_FORWARDS: Mapping[str, _Forward] = {
    "qwen2": _decoder,
    "qwen3": _decoder,
    "mistral": _decoder,
    "bert": _bert,
}
