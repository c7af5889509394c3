"""Make texts of an exact length in tokens, and batches of mixed lengths.

Hides: how words are joined until the tokenizer gives the wanted count. Refuses to know: clocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from gteopt.config.plan import Workload
from gteopt.encoder.description import EncoderDescription
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError, UnsupportedError


def exact_texts(encoder: EncoderDescription, n_texts: int, n_tokens: int, seed: int) -> list[str]:
    """Seeded texts of English words with exactly `n_tokens` tokens of this encoder's tokenizer.

    Raises:
        InputError: the model's special tokens alone are `n_tokens` or more.
        UnsupportedError: no text with exactly this number of tokens was found.
    """
    source = random.Random(seed)
    return [_exact_text(encoder, n_tokens, source) for _ in range(n_texts)]


def _exact_text(encoder: EncoderDescription, n_tokens: int, source: random.Random) -> str:
    def count(words: list[str]) -> int:
        return encoder.tokenization.lengths([" ".join(words)])[0]

    if (n_special := count([])) >= n_tokens:
        raise InputError(
            f"{n_tokens} tokens are too few to measure {encoder.name} with: it adds {n_special} of "
            f"its own to each text; give at least {n_special + 1}"
        )
    words = source.choices(_PROSE.split(), k=n_tokens)  # a word is at least one token
    fits, too_long = 0, n_tokens + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count(words[:middle]) <= n_tokens:
            fits = middle
        else:
            too_long = middle
    words = words[:fits]
    while (n_now := count(words)) < n_tokens:
        words.append("a")  # one token in nearly every vocabulary
    if n_now != n_tokens:
        raise UnsupportedError(
            f"no text of exactly {n_tokens} tokens was found for the tokenizer of {encoder.name}; "
            f"give another length"
        )
    return " ".join(words)


def text_lengths(workload: Workload) -> list[int]:
    """Tokens of each text of a workload; the same in each call."""
    if workload.lengths == "equal":
        return [workload.tokens] * workload.batch_size
    source = random.Random(0)
    least = max(workload.tokens // 8, 4)
    drawn = [workload.tokens * source.lognormvariate(0, 0.8) for _ in range(workload.batch_size)]
    return [min(max(round(length), least), workload.longest) for length in drawn]


def workload_call(encoder: Encoder, workload: Workload) -> Callable[[], object]:
    """A call that computes the vectors of one workload, whose texts are tokenized beforehand."""
    source = random.Random(1)
    texts = [_exact_text(encoder, length, source) for length in text_lengths(workload)]
    tokens = encoder.tokenization.tokenize(texts)
    if workload.lengths == "equal":
        return lambda: encoder.embed_tokens(tokens)
    return lambda: [
        encoder.embed_tokens(batch) for _, batch in encoder.tokenization.batches(tokens, _MIXED)
    ]


_MIXED = 32
"""Batch size for texts of mixed lengths."""

# Plain prose, because tokenizers are made for it. The time of a model does not depend on the words.
_PROSE = """
every morning the ferry crosses from the old harbour to the island and brings bread letters
newspapers and a few visitors who want to walk along the cliffs before noon while fishermen repair
their nets near the lighthouse and children count the boats that return with mackerel later the
wind turns clouds gather over the hills and people close their shutters because rain is near but
nobody hurries for the evening train leaves only when the last passenger has found a seat and the
conductor has checked his watch twice against the clock of the station
"""
