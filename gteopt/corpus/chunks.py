"""Long texts cut into chunks of so many tokens.

Hides: how tokens map to characters. Refuses to know: models, files.

A chunk is a part of the text itself, so that whoever encodes `text[start:end]` gets its vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.encoder.tokenization import Role, Tokenization

Span = tuple[int, int]
_SPARE_TOKENS = 2
"""A part of a text, tokenized by itself, may take a token more at either end."""


def chunk_tokens(
    tokenization: Tokenization, role: Role, instruction: str | None, tokens: int, overlap: int
) -> tuple[int, int]:
    """Tokens and overlap of a chunk; 0 tokens is as many as the model takes.

    Raises:
        InputError: more than the model takes.
    """
    (around,) = tokenization.lengths([""], role=role, instruction=instruction)
    room = tokenization.max_tokens - around - _SPARE_TOKENS
    if tokens > room:
        raise InputError(
            f"--long chunk:{tokens}: {tokenization.name} takes {tokenization.max_tokens:,} tokens, "
            f"{around} of them prompt and special tokens; give at most {room:,}"
        )
    return tokens or room, overlap


def spans(
    tokenization: Tokenization, texts: Sequence[str], tokens: int, overlap: int
) -> list[list[Span]]:
    """First and last character + 1 of each chunk of each text; a short text is one chunk.

    Args:
        tokenization: whose tokens are counted.
        texts: without prompt.
        tokens: of a chunk.
        overlap: tokens that a chunk shares with the one before.
    """
    if not texts:
        return []
    found = tokenization.tokenizer(
        list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True
    )["offset_mapping"]
    return [
        _spans(len(text), offsets, tokens, overlap)
        for text, offsets in zip(texts, found, strict=True)
    ]


def _spans(length: int, offsets: Sequence[Span], tokens: int, overlap: int) -> list[Span]:
    if len(offsets) <= tokens:
        return [(0, length)]
    spans: list[Span] = []
    for first in range(0, len(offsets), tokens - overlap):
        last = min(first + tokens, len(offsets))
        start = 0 if first == 0 else offsets[first][0]
        end = length if last == len(offsets) else offsets[last - 1][1]
        if end > start:
            spans.append((start, end))
        if last == len(offsets):
            break
    return spans
