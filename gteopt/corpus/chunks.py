"""Cut long texts into chunks of a given number of tokens.

Hides: how tokens map to characters. Refuses to know: models, files.

A chunk is a substring of the text: encoding `text[start:end]` gives the chunk's vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.encoder.tokenization import Role, Tokenization

Span = tuple[int, int]
_SPARE_TOKENS = 2
"""A chunk that is tokenized by itself may need one more token at either end."""


def chunk_tokens(
    tokenization: Tokenization, role: Role, instruction: str | None, tokens: int, overlap: int
) -> tuple[int, int]:
    """Tokens and overlap of a chunk; `tokens` 0 means the most that the model takes.

    Raises:
        InputError: `tokens` is more than the model takes.
    """
    (n_added,) = tokenization.lengths([""], role=role, instruction=instruction)
    most = tokenization.max_tokens - n_added - _SPARE_TOKENS
    if tokens > most:
        raise InputError(
            f"--long chunk:{tokens}: {tokenization.name} takes {tokenization.max_tokens:,} tokens, "
            f"{n_added} of them prompt and special tokens; give at most {most:,}"
        )
    return tokens or most, overlap


def find_chunk_spans(
    tokenization: Tokenization, texts: Sequence[str], tokens: int, overlap: int
) -> list[list[Span]]:
    """First and last character + 1 of each chunk of each text; a short text is one chunk.

    Args:
        tokenization: its tokenizer counts the tokens.
        texts: without prompt.
        tokens: tokens of a chunk.
        overlap: tokens that a chunk shares with the chunk before it.
    """
    if not texts:
        return []
    offsets_of_texts = tokenization.tokenizer(
        list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True
    )["offset_mapping"]
    return [
        _spans(len(text), offsets, tokens, overlap)
        for text, offsets in zip(texts, offsets_of_texts, strict=True)
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
