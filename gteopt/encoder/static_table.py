"""The module of a StaticEmbedding model: a table of token vectors without a transformer.

The vector of a text is the mean of its tokens' rows. Refuses to know: reading files, tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenVectors:
    """The output [N, T, D] under the attribute name that transformers use."""

    last_hidden_state: Tensor


class StaticTable(nn.Module):
    """A table with the interface of a transformer: token ids in, their rows out."""

    def __init__(self, n_tokens: int, dims: int) -> None:
        """Allocate a table [n_tokens, dims]."""
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, dims)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenVectors:
        """Rows of token ids [N, T]; only pooling needs the mask."""
        del attention_mask
        return TokenVectors(self.embedding(input_ids))

    def get_input_embeddings(self) -> nn.Module:
        """The table."""
        return self.embedding

    def save_pretrained(self, folder: Path) -> None:
        """Write the table under the name that Sentence Transformers reads."""
        save_file(self.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
