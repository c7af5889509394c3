"""The forward pass of an encoder without what an embedding does not need.

Texts are laid end to end, so that no linear layer computes padding; attention runs over texts of
one length at a time, without a mask, or on a GPU over all of them at once; where pooling reads one
token a text, the last block computes its queries, output projection and MLP for that token alone.
Layers that share an input share its rounding to 8 bits. On a CPU without instructions for bfloat16
activations are float32.
One text may also lie in more places than it has tokens (`padded_forward`), so that a GPU can replay
the same computation for every shorter text; its own tokens see none of the padding.
The layers are those of the module it is given, looked up in each call: what replaces one of them,
or hooks it, takes part.
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
from gteopt.kernels.cpu import Int4LinearCpu, multiplies_bfloat16
from gteopt.kernels.reference import DequantLinear
from gteopt.model.families import Pooling

BetweenBlocks = Callable[[], None]
"""Called before each block of a pass: who computes may do something else meanwhile."""


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
    """(module, token lists of N texts) -> pooled vectors [N, D], in their order.

    None for an architecture, or a setting of one, that is not known here: the module's own forward
    pass is to be used.
    """
    forward = _forward_of(config)
    if forward is None:
        return None

    def run(
        module: nn.Module,
        tokens: Sequence[Sequence[int]],
        between_blocks: BetweenBlocks | None = None,
    ) -> Tensor:
        layout = replace(_Layout.of(tokens, pooling, device), between_blocks=between_blocks)
        return forward(cast("Any", module), config, pooling, layout)

    return run


def padded_forward(config: Mapping[str, Any], pooling: Pooling) -> PaddedForward | None:
    """(module, ids [T], n [1]) -> pooled vector [1, D] of one text, the first n of ids.

    Ids and n are int64 and lie where the module does; ids behind the text are any tokens. The host
    neither reads nor sends a number on the way, and no shape depends on one, so that the
    computation can be recorded once and replayed. None as for `unpadded_forward`.
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
    return _FORWARDS[kind] if kind in _FORWARDS and has_known_settings(config) else None


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on a device; a GPU fetches it from pinned memory without a wait."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def reads_one_token(config: Mapping[str, Any], pooling: Pooling) -> bool:
    """Whether all that the last block needs to compute behind keys and values is one token a text.

    Its one query sees the whole text, which a first token does not where attention is causal.
    """
    causal = config["model_type"] != "bert" and config.get("is_causal") is not False
    return pooling == "lasttoken" or (pooling == "cls" and not causal)


def operations(
    module: nn.Module, config: Mapping[str, Any], lengths: Sequence[int], *, one_token: bool
) -> float:
    """Floating-point operations of the blocks for texts of these lengths: two a weight of a linear
    layer and token, 4 T q d a block and head for attention of q queries to T tokens.

    Args:
        module: with linear layers of any kind that have `in_features` and `out_features`.
        config: its config.json.
        lengths: tokens of each text.
        one_token: the last block computes keys and values alone for more than one token a text.
    """
    heads, blocks = (
        int(config.get(f"num_{each}", 0)) for each in ("attention_heads", "hidden_layers")
    )
    width = int(config.get("head_dim") or int(config["hidden_size"]) // max(heads, 1))
    in_last = re.compile(rf"(layers|encoder\.layer)\.{blocks - 1}\.")
    every, once = 0, 0  # weights that a token meets, a text
    for name, each in module.named_modules():
        if not hasattr(each, "in_features") or name.startswith("pooler"):
            continue
        n_weights = int(each.in_features) * int(each.out_features)
        wide = name.endswith(("k_proj", "v_proj", ".key", ".value"))
        if one_token and in_last.match(name) and not wide:
            once += n_weights
        else:
            every += n_weights
    found = 0.0
    for length in lengths:
        queries = (blocks - one_token) * length + one_token
        found += 2 * (every * length + once) + 4 * heads * width * length * queries
    return found


def has_known_settings(config: Mapping[str, Any]) -> bool:
    """Whether every setting that would change the computation is at what is written below."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    layers = set(config.get("layer_types") or ())
    return (
        rope.get("rope_type", "default") == "default"
        and layers <= {"full_attention"}
        and not config.get("use_sliding_window")
        # Qwen's windows slide only where `use_sliding_window` says so.
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
        ids: int64 [T], all texts.
        positions: int64 [T], each token's place in its text.
        ends: int64 [N], where the token lies that first- or last-token pooling reads.
        bounds: int32 [N + 1], where each text begins, and behind them where the last one ends.
        runs: (number of texts, their length) of neighbours of equal length.
        n_tokens: int64 [1], how many of `ids` are the text's; None where all are.
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
        """Blocks with their number, and what is to happen between them."""
        for i, block in enumerate(blocks):
            if self.between_blocks is not None:
                self.between_blocks()
            yield i, block

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], pooling: Pooling, device: torch.device) -> _Layout:
        lengths = [len(ids) for ids in tokens]
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        behind = torch.tensor(lengths).cumsum(0)
        ends = behind - 1 if pooling == "lasttoken" else behind - torch.tensor(lengths)
        flat = torch.tensor(list(chain.from_iterable(tokens)), dtype=torch.int64)
        positions = torch.cat([torch.arange(length) for length in lengths])
        # One transfer for all four.
        both = to_device(torch.cat([flat, positions, ends, behind]), device)
        sizes = [len(flat), len(flat), len(lengths), len(lengths)]
        ids, positions, ends, behind = both.split(sizes)  # type: ignore[no-untyped-call]
        return _Layout(ids, positions, ends, F.pad(behind, (1, 0)).int(), runs)

    @staticmethod
    def padded(ids: Tensor, n_tokens: Tensor, pooling: Pooling) -> _Layout:
        ends = n_tokens - 1 if pooling == "lasttoken" else torch.zeros_like(n_tokens)
        positions = torch.arange(len(ids), device=ids.device)
        bounds = F.pad(n_tokens, (1, 0)).int()
        return _Layout(ids, positions, ends, bounds, ((1, len(ids)),), n_tokens)

    def bias(self, dtype: torch.dtype, *, causal: bool) -> Tensor | None:
        """[T or 1, T], what is added to scores so that no query sees padding, nor one of a causal
        model what follows it; None without padding. The last row is that of the pooled token.
        """
        if self.n_tokens is None:
            return None
        seen = (self.positions < self.n_tokens)[None]
        if causal:
            seen = seen & (self.positions <= self.positions[:, None])
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return bias.masked_fill_(~seen, float("-inf"))

    def mean(self, hidden: Tensor) -> Tensor:
        """[N, D] means over each text's tokens of [T, D]."""
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
    """Parts of [T, ...], of some sizes along T."""
    return [x] if len(sizes) == 1 else torch.split_with_sizes(x, sizes)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """What `_split` made parts of; torch would copy where there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Sight(NamedTuple):
    """Which tokens of its text a query sees.

    Attributes:
        causal: whether a token sees only those before it.
        one: whether there is one query a text, which sees all its text.
        bias: of the layout; no mask, which is faster, where it is None.
    """

    causal: bool
    one: bool
    bias: Tensor | None


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: _Layout, sight: _Sight) -> Tensor:
    """Attention within each text.

    Args:
        query: [T, H, d], or [N, H, d] where `sight.one`.
        key: [T, H', d], H a multiple of H'.
        value: likewise.
        layout: where the texts lie.
        sight: which tokens a query sees.

    Returns:
        [T or N, H * d].
    """
    n_heads, width = query.shape[1:]
    causal, one, bias = sight.causal and not sight.one, sight.one, sight.bias
    if (layout.n_tokens is not None or len(layout.runs) > 1) and _has_varlen(query):
        keys = queries = _Bounds(layout.bounds, max(length for _, length in layout.runs))
        if one:
            n_bounds, device = len(layout.bounds), layout.bounds.device
            queries = _Bounds(torch.arange(n_bounds, dtype=torch.int32, device=device), 1)
        return _varlen(query, key, value, queries, keys, causal=causal).reshape(-1, n_heads * width)
    if bias is not None:
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            _repeated(key, n_heads).transpose(0, 1)[None],
            _repeated(value, n_heads).transpose(0, 1)[None],
            attn_mask=(bias[-1:] if one else bias).expand(1, n_heads, len(query), -1),
        )  # [1, H, T or 1, d]
        return mixed[0].transpose(0, 1).reshape(-1, n_heads * width)
    out = []
    sizes = [n * length for n, length in layout.runs]
    parts = zip(
        layout.runs,
        _split(query, [n for n, _ in layout.runs] if one else sizes),
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
    """Whether `_varlen` takes heads of this type, width and device."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and gpu_kernels(query.device) is not None
    )


class _Bounds(NamedTuple):
    """Where each text begins, and where the last one ends: int32 [N + 1]; and the longest text."""

    starts: Tensor
    longest: int


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, queries: _Bounds, keys: _Bounds, *, causal: bool
) -> Tensor:
    """Attention within each of several texts, or one with padding behind it, in one launch.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691) as torch has it inside
    `torch.nn.attention.varlen`, whose own function launches a kernel more. Grouped heads need no
    copies. What it gives for rows behind the last bound is undefined.
    """
    mixed: Tensor = torch.ops.aten._flash_attention_forward(
        *(query, key, value, queries.starts, keys.starts, queries.longest, keys.longest),
        *(0.0, causal, False),  # dropout, causal, debugging
    )[0]
    return mixed


def _repeated(x: Tensor, n_heads: int) -> Tensor:
    """[T, H', d] to [T, H, d]: torch's fused attention with a mask wants as many as queries."""
    n_tokens, n_own, width = x.shape
    if n_own == n_heads:
        return x
    wide = x[:, :, None].expand(-1, -1, n_heads // n_own, -1)
    return wide.reshape(n_tokens, n_heads, width)


class _Rounding(Protocol):
    """A layer that rounds its input and multiplies what comes out: `multiply(quantize(x))`.

    Layers of the same kind round alike where `rounding` is equal.
    """

    rounding: Hashable

    def quantize(self, x: Tensor, before: Any = None) -> Any: ...

    def multiply(self, x: Any, dtype: torch.dtype) -> Tensor: ...


def _alike(layers: Sequence[nn.Module]) -> Sequence[_Rounding] | None:
    """Layers of one input that round it alike, and that nobody looks into; None otherwise."""
    rounding = getattr(layers[0], "rounding", None)
    if rounding is not None and all(
        type(each) is type(layers[0])
        and each.rounding == rounding
        and not each._forward_pre_hooks
        and not each._forward_hooks
        for each in layers
    ):
        return cast("Sequence[_Rounding]", layers)
    return None


def _apply(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Several linear layers of one input [T, I], which rounds it once where they round alike."""
    if (alike := _alike(layers)) is not None:
        codes = alike[0].quantize(x)
        return [each.multiply(codes, x.dtype) for each in alike]
    return [each(x) for each in layers]


def _apply_normed(norm: Any, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Several linear layers of RMSNorm(x), which a GPU rounds without writing it down."""
    alike, on_gpu = _alike(layers), _on_gpu(x)
    if alike is not None and on_gpu is not None:
        before = on_gpu.Before(norm=norm.weight, epsilon=norm.variance_epsilon)
        codes = alike[0].quantize(x, before)
        return [each.multiply(codes, x.dtype) for each in alike]
    return _apply(layers, _rms_norm(norm, x))


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
    """Qwen2 and what is built like it: RMSNorm, rotary embedding, grouped queries, gated MLP.

    Qwen3 has an RMSNorm for each head of queries and keys as well.
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
        one = last is not None and i == len(module.layers) - 1
        norm, inputs = block.input_layernorm, [attention.k_proj, attention.v_proj]
        if one:
            assert last is not None
            k, v = _apply_normed(norm, inputs, x)
            x = x[last]
            (q,) = _apply_normed(norm, [attention.q_proj], x)
        else:
            q, k, v = _apply_normed(norm, [attention.q_proj, *inputs], x)
        q, k, v = (each.view(len(each), -1, width) for each in (q, k, v))
        if hasattr(attention, "q_norm"):
            q, k = _rms_norm(attention.q_norm, q), _rms_norm(attention.k_norm, k)
        q = _rotate(q, cos[last], sin[last]) if one else _rotate(q, cos, sin)
        k = _rotate(k, cos, sin)
        mixed = _attend(q, k, v, layout, _Sight(causal, one, bias))
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
        found: Tensor = x + down(act(gate).mul_(up))
    elif _alike([down]) is not None:
        found = x + down.multiply(down.quantize(gate, on_gpu.Before(up=up)), x.dtype)
    else:
        found = x + down(on_gpu.gate_(gate, up))
    return found


def _on_gpu(x: Tensor) -> ModuleType | None:
    """The GPU's kernels where they can take x: they compute in float32."""
    return gpu_kernels(x.device) if x.dtype != torch.float64 else None


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4; computed in float32."""
    if x.is_cuda and norm.weight.dtype == x.dtype:
        # One kernel where the module has eight; it rounds once, behind the weight.
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], norm.weight.float(), norm.variance_epsilon)
    found: Tensor = norm(x)
    return found


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [T, H, d] by angles [T, 1, d], halves paired (RoFormer, eq. 34).

    In place of x on a GPU.
    """
    half = x.shape[-1] // 2
    if not half & (half - 1) and (on_gpu := _on_gpu(x)) is not None:
        found: Tensor = on_gpu.rotate_(x, cos, sin)
        return found
    return (x * cos).add_(torch.cat([-x[..., half:], x[..., :half]], dim=-1).mul_(sin))


def _bert(module: Any, config: Mapping[str, Any], pooling: Pooling, layout: _Layout) -> Tensor:
    """BERT: learned positions, LayerNorm behind each residual."""
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
        one = first is not None and i == len(blocks) - 1
        if one:
            k, v = _apply([inner.key, inner.value], x)
            assert first is not None
            x = x[first]
            (q,) = _apply([inner.query], x)
        else:
            q, k, v = _apply([inner.query, inner.key, inner.value], x)
        q, k, v = (each.view(len(each), -1, width) for each in (q, k, v))
        mixed = _attend(q, k, v, layout, _Sight(False, one, bias))
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
