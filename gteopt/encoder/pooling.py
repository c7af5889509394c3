"""Turns token vectors into one vector a text.

Hides: the place of the last token with left or right padding, NV-Embed's latent attention. Refuses
to know: which model uses which pooling, where its tensors are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gteopt.model.families import Pooling

_CHUNK_TOKENS = 1024
"""Tokens whose queries exist at once; 8 heads of 4096 dimensions take 32,768 numbers a token."""


def pool_token_vectors(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, [N, D], from token vectors [N, T, D] and their mask [N, T]."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling in ("mean", "latent"):
        weights = mask.unsqueeze(-1).to(hidden.dtype)  # [N, T, 1]
        # A text without tokens gets the zero vector, as in Sentence Transformers.
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(dim=1)  # the last real token under either padding side
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class PoolingHead(nn.Module):
    """Turns token vectors [N, T, D] into embeddings [N, full_dims] float32.

    Attributes:
        pooling: how token vectors become one vector.
        latent: NV-Embed's attention before pooling; None for other models.
        pooling_modules: Sentence Transformers' modules that pool, if `pooling` is "modules".
        final_modules: the modules after the pooling, in their order.
    """

    def __init__(
        self,
        pooling: Pooling,
        final_modules: Sequence[nn.Module] = (),
        *,
        pooling_modules: Sequence[nn.Module] = (),
        latent: LatentAttention | None = None,
    ) -> None:
        """Join the modules; each takes and returns a dict of Sentence Transformers' features."""
        super().__init__()
        self.pooling = pooling
        self.latent = latent
        self.pooling_modules = nn.ModuleList(pooling_modules)
        self.final_modules = nn.ModuleList(final_modules)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of token vectors and their mask [N, T]; differentiable."""
        if self.latent is not None:
            hidden = self.latent(hidden)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling != "modules":
            return self.finish(pool_token_vectors(hidden, mask, self.pooling))
        features = {"token_embeddings": hidden, "attention_mask": mask}
        for module in self.pooling_modules:
            features = module(features)
        return self.finish(features["sentence_embedding"])

    def finish(self, pooled: Tensor) -> Tensor:
        """Embeddings of pooled vectors [N, D] of any float dtype."""
        kind = torch.promote_types(pooled.dtype, torch.float32)
        features = {"sentence_embedding": pooled.to(kind)}
        for module in self.final_modules:
            features = module(features)
        return features["sentence_embedding"]


class Normalized(nn.Module):
    """Scales embeddings to unit length, as Sentence Transformers' `Normalize` does."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features with `sentence_embedding` [N, D] of unit length."""
        vectors = nn.functional.normalize(features["sentence_embedding"], dim=-1)
        return {**features, "sentence_embedding": vectors}


class LatentAttention(nn.Module):
    """NV-Embed's latent attention, which changes each token vector before the mean.

    x + Attention(LayerNorm(x), LayerNorm(latents)), then x + MLP(LayerNorm(x)) with GEGLU. Each
    token is a query; the trained latents are keys and values (Lee et al. 2024, arXiv:2405.17428,
    section 3.1). Keys and values are the same for every text, so they are computed once, and the
    weights that make them are not kept. Tokens do not see each other here.

    Buffers: key and value [H, R, K] for R latents and heads of K dimensions.
    """

    key: Tensor
    value: Tensor

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors by their published names, without `latent_attention_model.`."""
        super().__init__()
        self.n_heads = int(config.get("num_cross_heads", 8))
        attend, mlp = "cross_attend_blocks.0.", "cross_attend_blocks.1."
        latents = _norm(tensors["latents"], tensors, f"{attend}norm_context.")
        keys_and_values = nn.functional.linear(latents, tensors[f"{attend}fn.to_kv.weight"])
        key, value = (
            half.view(len(half), self.n_heads, -1).transpose(0, 1).contiguous()
            for half in keys_and_values.chunk(2, dim=-1)
        )  # [H, R, K]
        self.register_buffer("key", key)
        self.register_buffer("value", value)
        kept = {
            "norm.weight": f"{attend}norm.weight",
            "norm.bias": f"{attend}norm.bias",
            "to_q": f"{attend}fn.to_q.weight",
            "to_out": f"{attend}fn.to_out.weight",
            "mlp_norm.weight": f"{mlp}norm.weight",
            "mlp_norm.bias": f"{mlp}norm.bias",
            "wide.weight": f"{mlp}fn.net.0.weight",
            "wide.bias": f"{mlp}fn.net.0.bias",
            "narrow.weight": f"{mlp}fn.net.2.weight",
            "narrow.bias": f"{mlp}fn.net.2.bias",
        }
        self._buffer_names = {short: short.replace(".", "_") for short in kept}
        for short, name in kept.items():
            self.register_buffer(self._buffer_names[short], tensors[name])

    def forward(self, hidden: Tensor) -> Tensor:
        """Token vectors [N, T, D] to [N, T, D], `_CHUNK_TOKENS` at a time."""
        flat = hidden.flatten(0, 1)
        return torch.cat([self._attend(part) for part in torch.split(flat, _CHUNK_TOKENS)]).view_as(
            hidden
        )

    def _attend(self, x: Tensor) -> Tensor:  # [n, D]
        parts = {short: getattr(self, name) for short, name in self._buffer_names.items()}
        query = nn.functional.linear(_norm(x, parts, "norm."), parts["to_q"])
        query = query.view(len(x), self.n_heads, -1).transpose(0, 1)  # [H, n, K]
        mixed = nn.functional.scaled_dot_product_attention(query, self.key, self.value)
        x = x + nn.functional.linear(mixed.transpose(0, 1).flatten(1), parts["to_out"])
        wide = nn.functional.linear(
            _norm(x, parts, "mlp_norm."), parts["wide.weight"], parts["wide.bias"]
        )
        value, gate = wide.chunk(2, dim=-1)
        gated = value * nn.functional.gelu(gate)
        return x + nn.functional.linear(gated, parts["narrow.weight"], parts["narrow.bias"])


def _norm(x: Tensor, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    """LayerNorm over the last axis."""
    weight, bias = tensors[f"{prefix}weight"], tensors[f"{prefix}bias"]
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias)
