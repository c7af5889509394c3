"""Copies an encoder with a shorter limit or without normalization; some authors evaluate so.

Refuses to know: who evaluates, and why.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gteopt.encoder.description import EncoderDescription


_NORMALIZING = frozenset({"Normalized", "Normalize"})
"""Classes that scale vectors to unit length, in gteopt and in Sentence Transformers."""


def change_encoder(
    encoder: EncoderDescription, max_tokens: int, *, normalize: bool
) -> EncoderDescription:
    """A copy that shares the weights, but may cut texts earlier or not scale to unit length.

    Args:
        encoder: stays as it is.
        max_tokens: the new limit, if it is below the encoder's.
        normalize: False removes the modules that scale vectors to unit length.
    """
    from gteopt.encoder.encoder import Encoder
    from gteopt.encoder.pooling import PoolingHead

    changed = copy(encoder)
    changed.tokenization = copy(encoder.tokenization)
    changed.tokenization.max_tokens = min(max_tokens, encoder.tokenization.max_tokens)
    if isinstance(changed, Encoder) and not normalize:
        head = changed.head
        kept = [part for part in head.final_modules if type(part).__name__ not in _NORMALIZING]
        pooling_modules = list(head.pooling_modules)
        changed.head = PoolingHead(
            head.pooling, kept, pooling_modules=pooling_modules, latent=head.latent
        )
        changed.cuda_graphs = None  # recordings contain the unchanged head
    return changed
