"""From token vectors to one vector a text.

Hides: where the last token is under either padding, and NV-Embed's latent attention. Refuses to
know: which model pools how, where its tensors lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gteopt.model.families import Pooling

_CHUNK_TOKENS = 1024
"""Tokens whose queries exist at once: 8 heads of 4096 dimensions make 32,768 numbers of each."""


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector a text, [N, D], of token vectors [N, T, D] and their mask [N, T]."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling in ("mean", "latent"):
        weights = mask.unsqueeze(-1).to(hidden.dtype)  # [N, T, 1]
        # A table gives a text without tokens the vector zero, as Sentence Transformers has it.
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(dim=1)  # the last real token under either padding side
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class Head(nn.Module):
    """From token vectors [N, T, D] to embeddings [N, full_dims] float32.

    Attributes:
        pooling: how token vectors become one vector.
        latent: NV-Embed's attention before pooling; None for other models.
        around: Sentence Transformers' modules up to the pooling where only they know the way.
        behind: those that follow the pooling, in their order.
    """

    def __init__(
        self,
        pooling: Pooling,
        behind: Sequence[nn.Module] = (),
        *,
        around: Sequence[nn.Module] = (),
        latent: LatentAttention | None = None,
    ) -> None:
        """Put the modules together; those of Sentence Transformers take and return features."""
        super().__init__()
        self.pooling = pooling
        self.latent = latent
        self.around = nn.ModuleList(around)
        self.behind = nn.ModuleList(behind)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings of token vectors and their mask [N, T]; differentiable."""
        if self.latent is not None:
            hidden = self.latent(hidden)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling != "modules":
            return self.finish(pool(hidden, mask, self.pooling))
        features = {"token_embeddings": hidden, "attention_mask": mask}
        for module in self.around:
            features = module(features)
        return self.finish(features["sentence_embedding"])

    def finish(self, pooled: Tensor) -> Tensor:
        """Embeddings of pooled vectors [N, D] of any float dtype."""
        kind = torch.promote_types(pooled.dtype, torch.float32)
        features = {"sentence_embedding": pooled.to(kind)}
        for module in self.behind:
            features = module(features)
        return features["sentence_embedding"]


class Normalized(nn.Module):
    """Scales embeddings to unit length, as Sentence Transformers' `Normalize` does."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The features with `sentence_embedding` [N, D] of unit length."""
        vectors = nn.functional.normalize(features["sentence_embedding"], dim=-1)
        return {**features, "sentence_embedding": vectors}


class LatentAttention(nn.Module):
    """What NV-Embed does to each token vector before the mean.

    x + Attention(LayerNorm(x), LayerNorm(latents)), then x + MLP(LayerNorm(x)) with GEGLU: each
    token is a query, the trained latents are keys and values (Lee et al. 2024, arXiv:2405.17428,
    section 3.1). Keys and values are the same for every text, so they are worked out once and the
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
        both = nn.functional.linear(latents, tensors[f"{attend}fn.to_kv.weight"])
        key, value = (
            each.view(len(each), self.n_heads, -1).transpose(0, 1).contiguous()
            for each in both.chunk(2, dim=-1)
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
        self._of = {short: short.replace(".", "_") for short in kept}
        for short, name in kept.items():
            self.register_buffer(self._of[short], tensors[name])

    def forward(self, hidden: Tensor) -> Tensor:
        """Token vectors [N, T, D] to [N, T, D], a thousand tokens at a time."""
        flat = hidden.flatten(0, 1)
        return torch.cat([self._attend(part) for part in torch.split(flat, _CHUNK_TOKENS)]).view_as(
            hidden
        )

    def _attend(self, x: Tensor) -> Tensor:  # [n, D]
        parts = {short: getattr(self, name) for short, name in self._of.items()}
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
