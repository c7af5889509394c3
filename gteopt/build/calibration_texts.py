"""Read, draw and tokenize calibration texts.

Hides: file formats and the seeded draw. Refuses to know: what is done with the texts.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from gteopt.config.recipe import Calibration, GptqWeights, Recipe
from gteopt.config.text_files import is_unicode, read_text_lines, read_text_rows
from gteopt.encoder.tokenization import Role, Tokenization, Tokens
from gteopt.errors import InputError, join_problems
from gteopt.local_data import describe_local_data
from gteopt.paths import ASSETS
from gteopt.records.manifest import CalibrationRecord

BUILTIN = "builtin"
TOKENS_AN_INPUT = 4
"""Calibration tokens that a layer needs for each input feature: with fewer, its Hessian is a poor
estimate."""
SHORT_TEXT = 48
"""Average tokens of a calibration text, below which documents were hardly seen: sentences have 20,
and the built-in texts 75."""

_PARTS = 4
_RANDOM_TEXTS, _RANDOM_TOKENS = 48, 50
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


@dataclass(frozen=True)
class CalibrationText:
    """One text with its role.

    Attributes:
        kind: name of the texts that are like it, such as a language; "" if unknown.
    """

    text: str
    role: Role = "document"
    instruction: str | None = None
    kind: str = field(default="", compare=False)


def draw_calibration_texts(
    spec: Calibration, *, hub_dir: Path | None = None
) -> tuple[CalibrationText, ...]:
    """Read the recipe's texts, remove duplicates, and draw with the recipe's seed.

    In the built-in set, short texts that were written by hand come first, because they are the most
    varied. A small draw from all texts would hardly contain single words.

    Raises:
        InputError: the source is missing, malformed, or has no usable text.
    """
    texts: list[CalibrationText] = []
    for group in _read_builtin() if spec.texts == BUILTIN else [_read_texts(spec, hub_dir)]:
        drawn = list(dict.fromkeys(group))
        random.Random(spec.seed).shuffle(drawn)
        texts += drawn
    if not texts:
        raise InputError(f"calibration texts '{spec.texts}' hold no text")
    return tuple(texts[: spec.n_texts])


def count_random_texts(recipe: Recipe) -> int:
    """Number of texts of random tokens that a build of the recipe adds."""
    if recipe.calibration.random_texts is not None:
        return recipe.calibration.random_texts
    return _RANDOM_TEXTS if isinstance(recipe.weights, GptqWeights) else 0


def draw_random_texts(recipe: Recipe, tokenization: Tokenization) -> tuple[CalibrationText, ...]:
    """Texts of tokens that are drawn at random from the whole vocabulary; they are a kind.

    A text in another script or language moves a layer's inputs far outside the ranges of the
    calibration texts. Random tokens show such inputs without a text in that language. Many
    tokenizers turn an unknown script into their unknown token, so its share rises from 0 in the
    first text to almost 1 in the last.
    """
    tokenizer = tokenization.tokenizer
    special, unknown = set(tokenizer.all_special_ids), tokenizer.unk_token_id
    vocabulary = [i for i in range(len(tokenizer)) if i not in special]
    draw = random.Random(recipe.calibration.seed)
    n_texts = count_random_texts(recipe)
    texts = []
    for position in range(n_texts):
        ids = draw.choices(vocabulary, k=_RANDOM_TOKENS)
        if unknown is not None:
            ids = [unknown if draw.random() < position / n_texts else i for i in ids]
        texts.append(CalibrationText(tokenizer.decode(ids), kind="random tokens"))
    return tuple(texts)


def tokenize_calibration(
    tokenization: Tokenization, texts: Sequence[CalibrationText], max_tokens: int
) -> list[Tokens]:
    """Token ids of the texts with their prompts; an instruction is used if the model takes one."""
    # Texts with equal prompts are tokenized together, so that one warning counts all cut texts.
    prompts: dict[tuple[Role, str | None], list[int]] = {}
    for i, text in enumerate(texts):
        instruction = text.instruction if tokenization.takes_instructions else None
        prompts.setdefault((text.role, instruction), []).append(i)
    ids_by_position: dict[int, Tokens] = {}
    for (role, instruction), positions in prompts.items():
        ids = tokenization.tokenize(
            [texts[i].text for i in positions],
            role=role,
            instruction=instruction,
            max_tokens=max_tokens,
        )
        ids_by_position |= zip(positions, ids, strict=True)
    return [ids_by_position[i] for i in range(len(texts))]


def number_text_kinds(texts: Sequence[CalibrationText]) -> list[int]:
    """A number for each text's kind, so that one kind can be held out at a time.

    If all texts are of one kind, they are cut into four parts. A part that is held out is then new,
    but it is like the others.
    """
    names = list(dict.fromkeys(text.kind for text in texts))
    if len(names) > 1:
        return [names.index(text.kind) for text in texts]
    return [i % _PARTS for i in range(len(texts))]


def record_calibration(
    spec: Calibration,
    texts: Sequence[CalibrationText],
    tokens: Sequence[Tokens],
    *,
    longest: int,
    n_random: int = 0,
) -> CalibrationRecord:
    """The manifest's record of the texts.

    Args:
        spec: the recipe's calibration settings.
        texts: the drawn texts, then the texts of random tokens.
        tokens: token ids of each text.
        longest: the most tokens that the model takes; the recipe may allow more.
        n_random: number of the texts of random tokens.
    """
    rows = [[text.role, text.instruction, text.text] for text in texts]
    content = json.dumps(rows, ensure_ascii=False).encode()
    name = spec.texts if spec.texts == BUILTIN else Path(spec.texts).name
    return CalibrationRecord(
        source=name,
        n_texts=len(texts) - n_random,
        n_random=n_random,
        n_tokens=sum(len(ids) for ids in tokens),
        max_tokens=min(spec.max_tokens, longest),
        n_cut=sum(ids.is_cut for ids in tokens),
        seed=spec.seed,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def check_calibration_tokens(n_tokens: int, in_features: int) -> str | None:
    """A warning for a layer that has too few calibration tokens; None if they suffice."""
    if n_tokens >= TOKENS_AN_INPUT * in_features:
        return None
    return (
        f"{n_tokens:,} calibration tokens for {in_features:,} input features, fewer than "
        f"{TOKENS_AN_INPUT} each; give more texts (calibration.n_texts, calibration.max_tokens)"
    )


def check_calibration_lengths(calibration: CalibrationRecord) -> str | None:
    """A warning for own texts that are all short; None for others and for the built-in texts.

    The table of calibration texts in docs/results-quality.md has what sentences alone cost.
    """
    length = calibration.n_tokens / (calibration.n_texts + calibration.n_random)
    if calibration.source == BUILTIN or length >= SHORT_TEXT:
        return None
    return (
        f"your calibration texts have only {length:.0f} tokens on average; a variant that is "
        "calibrated on sentences alone can be twice as far from its base on documents and code. "
        "Add longer texts, or use gteopt optimize MODEL --texts FILE, which adds built-in texts"
    )


def add_document_sentences(texts: Sequence[CalibrationText]) -> list[CalibrationText]:
    """The texts, and the sentences of each document that has several.

    Sentences are further samples, because fitting a projection needs several times more vectors
    than dimensions.
    """
    out = list(texts)
    for text in texts:
        if text.role == "document":
            parts = [part.strip() for part in _SENTENCE_END.split(text.text) if part.strip()]
            if len(parts) > 1:
                out += [CalibrationText(part) for part in parts]
    return list(dict.fromkeys(out))


def _read_builtin() -> tuple[list[CalibrationText], list[CalibrationText]]:
    """The built-in set: the short texts that were written by hand, and all other texts."""
    first: list[CalibrationText] = []
    others: list[CalibrationText] = []
    for line in (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        is_first = row["source"] == "written for gteopt" and row["kind"] != "long"
        text = CalibrationText(row["text"], row["role"], row["instruction"], row["language"])
        (first if is_first else others).append(text)
    return first, others


def _read_texts(spec: Calibration, hub_dir: Path | None) -> Iterator[CalibrationText]:
    path = Path(spec.texts)
    if path.suffix in (".jsonl", ".csv", ".txt"):
        if not path.is_file():
            raise InputError(f"calibration file {path} does not exist")
        yield from _read_file(path, spec.column)
        return
    yield from _read_dataset(spec, hub_dir)


def _read_file(path: Path, column: str) -> list[CalibrationText]:
    """Lines of a .txt, or rows with `column` and optionally `role`, `instruction` and `kind`.

    Raises:
        InputError: lists all bad lines.
    """
    problems: list[str] = []
    texts: list[CalibrationText] = []
    if path.suffix == ".txt":
        texts = [CalibrationText(line.strip()) for _, line in read_text_lines(path, problems)]
    else:
        for number, row in read_text_rows(path, problems):
            text, role = row.get(column), row.get("role") or "document"
            instruction, kind = row.get("instruction") or None, row.get("kind") or ""
            if column not in row:
                shown = ", ".join(str(name)[:40] for name in list(row)[:10])
                problems.append(
                    f"{path}:{number}: no field '{column}' (found: {shown}); set calibration.column"
                )
            elif not isinstance(text, str) or not is_unicode(text):
                problems.append(f"{path}:{number}: '{column}' must be a text in Unicode")
            elif role not in ("query", "document"):
                problems.append(f"{path}:{number}: role must be query or document")
            elif not isinstance(instruction, str | None):
                problems.append(f"{path}:{number}: instruction must be a text")
            elif not isinstance(kind, str):
                problems.append(f"{path}:{number}: kind must be a text")
            elif text.strip():
                texts.append(CalibrationText(text, cast(Role, role), instruction, kind))
    if problems:
        shown_problems = problems[:20]
        if len(problems) > 20:
            shown_problems.append(f"and {len(problems) - 20} more")
        raise InputError(join_problems(f"{path} has {len(problems)} bad line(s)", shown_problems))
    return texts


def _read_dataset(spec: Calibration, hub_dir: Path | None) -> Iterator[CalibrationText]:
    source = spec.texts
    reading: AbstractContextManager[None] = nullcontext()
    if hub_dir is not None:
        if not (hub_dir / source).is_dir():
            raise InputError(
                f"calibration texts '{source}': {hub_dir / source} does not exist; to add it: "
                f"hf download --repo-type dataset {source} --local-dir {hub_dir / source}"
            )
        reading = describe_local_data(hub_dir / source).reading()
        source = str(hub_dir / source)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise InputError(
            f"calibration texts '{source}' are neither '{BUILTIN}', nor a .jsonl, .csv or .txt "
            f"file, nor a data set <org>/<name>"
        )
    from datasets import load_dataset

    try:
        with reading:
            rows = load_dataset(source, split=spec.split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"calibration data set {spec.texts} (split {spec.split}) cannot be read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if spec.column not in rows.column_names:
        raise InputError(
            f"calibration data set {spec.texts} has no column '{spec.column}' "
            f"(columns: {', '.join(rows.column_names)}); set calibration.column"
        )
    for text in rows[spec.column]:
        if isinstance(text, str) and text.strip():
            yield CalibrationText(text)
