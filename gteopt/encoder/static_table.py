"""A table of token vectors that no transformer reads: what a StaticEmbedding model is.

Its text vector is the mean of its tokens' rows. Refuses to know: files, tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenVectors:
    """What a transformer gives out, by the same name; [N, T, D]."""

    last_hidden_state: Tensor


class StaticTable(nn.Module):
    """Token ids in, their rows of the table out, with the interface of a transformer."""

    def __init__(self, n_tokens: int, dims: int) -> None:
        """Make room for a table [n_tokens, dims]."""
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, dims)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenVectors:
        """Rows of token ids [N, T]; the mask is for the pooling."""
        del attention_mask
        return TokenVectors(self.embedding(input_ids))

    def get_input_embeddings(self) -> nn.Module:
        """The table."""
        return self.embedding

    def save_pretrained(self, folder: Path) -> None:
        """Write the table under the name that Sentence Transformers reads."""
        save_file(self.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
