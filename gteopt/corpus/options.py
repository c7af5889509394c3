"""Options of an embedding job, checked before any file is opened.

Hides: how `--text`, `--long` and templates are written. Refuses to know: files, models, vectors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gteopt.errors import InputError
from gteopt.frozen import Frozen

Code = Literal["artifact", "float32", "float16"]
"""Code of stored vectors; every other code has to be fitted by `gteopt truncate`."""
VectorType = Literal["list", "fixed_size_list"]
LongText = Literal["error", "truncate", "chunk"]
SHARD_ROWS = 4096
"""About a minute's work of a 7B model on one GPU: a lost worker loses that much."""


class LongTexts(Frozen):
    """What happens to a text that is longer than the model takes.

    Attributes:
        mode: "error" makes it a dead letter, "truncate" drops its end, "chunk" splits it.
        tokens: tokens of a chunk, without prompt and special tokens; 0 means the model's limit.
        overlap: tokens that a chunk shares with the chunk before it.
    """

    mode: LongText = "truncate"
    tokens: int = Field(default=0, ge=0)
    overlap: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _moves_on(self) -> LongTexts:
        if self.overlap and self.overlap >= self.tokens:
            raise ValueError(f"overlap {self.overlap} must be below the chunk's {self.tokens}")
        return self

    def __str__(self) -> str:
        sizes = f":{self.tokens}:{self.overlap}" if self.tokens else ""
        return f"{self.mode}{sizes}"


def parse_long_texts(text: str) -> LongTexts:
    """Parse "error", "truncate", "chunk", "chunk:TOKENS" or "chunk:TOKENS:OVERLAP".

    Raises:
        InputError: the text is none of these.
    """
    match = re.fullmatch(r"(error|truncate|chunk)|chunk:([1-9]\d*)(?::(\d+))?", text, re.ASCII)
    if match is None:
        raise InputError(
            f"--long {text}: write error, truncate, chunk, chunk:TOKENS or chunk:TOKENS:OVERLAP "
            f"(chunk:512:64)"
        )
    if match[1]:
        return LongTexts(mode=match[1])  # type: ignore[arg-type]
    tokens, overlap = int(match[2]), int(match[3] or 0)
    if overlap >= tokens:
        raise InputError(f"--long {text}: the overlap must be smaller than the chunk")
    return LongTexts(mode="chunk", tokens=tokens, overlap=overlap)


class EmbedOptions(Frozen):
    r"""Everything that decides which vectors a job makes and how they are stored.

    Attributes:
        text: a column, or a template of columns such as "{title}\n{body}"; None means "text", or
            "{title} {text}" for a BEIR folder.
        id: column that holds the ids; None means "_id" for a BEIR folder, else FILE:ROW.
        keep: columns that are copied beside the vector.
        role: decides which prompt the texts get.
        instruction: instruction for queries; None means the model's default.
        long: what happens to texts that are too long.
        pool: "mean" stores one vector a document, the mean of the vectors of its chunks.
        code: how a number is stored; "artifact" means as in the artifact.
        vector_type: Parquet type of the vector column.
        batch_size: texts computed together.
        shard_rows: the most rows of the input in one shard.
        dtype: dtype that the model computes in; see `gteopt.load`.
        backend: see `gteopt.load`. With "auto", a job that goes on keeps the backend that it began
            with.
        kernels: see `gteopt.load`.
    """

    text: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    role: Literal["query", "document"] = "document"
    instruction: str | None = None
    long: LongTexts = LongTexts()
    pool: Literal["none", "mean"] = "none"
    code: Code = "artifact"
    vector_type: VectorType = "list"
    batch_size: int = Field(default=32, ge=1)
    shard_rows: int = Field(default=SHARD_ROWS, ge=1)
    dtype: str = "auto"
    backend: Literal["auto", "torch", "openvino"] = "torch"
    kernels: str = "deterministic"

    @field_validator("long", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        return parse_long_texts(value) if isinstance(value, str) else value

    @field_validator("keep", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fit_together(self) -> EmbedOptions:
        if self.pool == "mean" and self.long.mode != "chunk":
            raise InputError("--pool mean pools the chunks of a document; add --long chunk")
        if self.instruction is not None and self.role == "document":
            raise InputError("--instruction is for queries only; add --role query")
        reserved = sorted({*self.keep} & RESERVED)
        if reserved:
            raise InputError(
                f"--keep {','.join(reserved)}: the output's own columns have these names "
                f"({', '.join(sorted(RESERVED))}); rename the column in the input"
            )
        if self.text is not None:
            TextTemplate(self.text)  # raises for a bad template, before files are opened
        return self


RESERVED = frozenset({"id", "file", "row", "chunk", "start", "end", "vector"})
"""Columns that every output has."""


class TextTemplate:
    """How the text of a row is made from its columns.

    Attributes:
        columns: the columns that the template reads.
    """

    def __init__(self, template: str) -> None:
        """Parse a column's name, or a template with columns in braces.

        Raises:
            InputError: braces do not match, or hold a conversion such as `{title!r}`.
        """
        self._template = template
        try:
            parts = list(Formatter().parse(template))
        except ValueError as error:
            raise InputError(f"--text {template!r}: {error}; write columns as {{title}}") from error
        fields = [field for _, field, _, _ in parts if field is not None]
        if any(form or conversion for _, _, form, conversion in parts) or "" in fields:
            raise InputError(
                f"--text {template!r}: braces must hold the name of a column and nothing else"
            )
        self._parts = [(literal, field) for literal, field, _, _ in parts]
        self.is_column = not fields
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(fields)) or (template,)

    def fill(self, row: Mapping[str, Any]) -> tuple[str | None, str]:
        """The text of a row, or None and the reason why the row has no text.

        A template also takes numbers, and skips columns that the row lacks.
        """
        if self.is_column:
            value = row.get(self._template)
            if isinstance(value, str):
                return value, ""
            return None, _not_text(self._template, value)
        texts: list[str] = []
        for literal, field in self._parts:
            texts.append(literal)
            if field is None:
                continue
            value = row.get(field)
            if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                texts.append(str(value))
            elif value is not None:
                return None, _not_text(field, value)
        if all(row.get(column) is None for column in self.columns):
            return None, f"none of the columns {', '.join(self.columns)}"
        return "".join(texts).strip(), ""


def _not_text(column: str, value: object) -> str:
    kind = "null or missing" if value is None else type(value).__name__
    return f"column {column} is {kind}"


def value_as_text(value: Any) -> str | None:
    """An id or a kept value as text: a string unchanged, any other value as JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8")


def check_wanted_columns(
    wanted: Sequence[str], present: Sequence[str], where: str
) -> InputError | None:
    """The error for wanted columns that are missing; None if all are present."""
    missing = [column for column in wanted if column not in present]
    if not missing:
        return None
    shown = ", ".join(list(present)[:40]) or "none"
    rest = f" and {len(present) - 40} more" if len(present) > 40 else ""
    return InputError(
        f"{where} has no column {', '.join(missing)}; it has {shown}{rest}. Name one with --text, "
        f"--id or --keep"
    )
