"""An encoder that cuts earlier or keeps its vectors' lengths, as some authors evaluate theirs.

Refuses to know: who evaluates, and why.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gteopt.encoder.description import Description


_NORMALIZING = frozenset({"Normalized", "Normalize"})
"""Modules that scale to unit length: gteopt's own, and that of Sentence Transformers."""


def changed_encoder(encoder: Description, max_tokens: int, *, normalize: bool) -> Description:
    """The same weights, with texts cut earlier or with vectors as long as the model makes them."""
    from gteopt.encoder.encoder import Encoder
    from gteopt.encoder.pooling import Head

    changed = copy(encoder)
    changed.tokenization = copy(encoder.tokenization)
    changed.tokenization.max_tokens = min(max_tokens, encoder.tokenization.max_tokens)
    if isinstance(changed, Encoder) and not normalize:
        head = changed.head
        behind = [each for each in head.behind if type(each).__name__ not in _NORMALIZING]
        changed.head = Head(head.pooling, behind, around=list(head.around), latent=head.latent)
        changed.cuda_graphs = None  # recordings end with the unchanged head
    return changed
