"""What a user asks of an embedding job, checked before anything is opened.

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
"""Of stored vectors; other codes have to be fitted, which `gteopt truncate` does."""
VectorType = Literal["list", "fixed_size_list"]
LongText = Literal["error", "truncate", "chunk"]
SHARD_ROWS = 4096
"""About a minute of a 7-billion model on one GPU, which is what a lost worker costs."""


class Long(Frozen):
    """What happens to a text that is longer than the model takes.

    Attributes:
        mode: "error" makes it a dead letter, "truncate" cuts it, "chunk" cuts it into several.
        tokens: of a chunk, without prompt and special tokens; 0 is as many as the model takes.
        overlap: tokens that a chunk shares with the one before.
    """

    mode: LongText = "truncate"
    tokens: int = Field(default=0, ge=0)
    overlap: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _moves_on(self) -> Long:
        if self.overlap and self.overlap >= self.tokens:
            raise ValueError(f"overlap {self.overlap} must be below the chunk's {self.tokens}")
        return self

    def __str__(self) -> str:
        sizes = f":{self.tokens}:{self.overlap}" if self.tokens else ""
        return f"{self.mode}{sizes}"


def parse_long(said: str) -> Long:
    """The meaning of "error", "truncate", "chunk", "chunk:TOKENS" or "chunk:TOKENS:OVERLAP".

    Raises:
        InputError: none of these.
    """
    match = re.fullmatch(r"(error|truncate|chunk)|chunk:([1-9]\d*)(?::(\d+))?", said, re.ASCII)
    if match is None:
        raise InputError(
            f"--long {said}: write error, truncate, chunk, chunk:TOKENS or chunk:TOKENS:OVERLAP "
            f"(chunk:512:64)"
        )
    if match[1]:
        return Long(mode=match[1])  # type: ignore[arg-type]
    tokens, overlap = int(match[2]), int(match[3] or 0)
    if overlap >= tokens:
        raise InputError(f"--long {said}: the overlap must be smaller than the chunk")
    return Long(mode="chunk", tokens=tokens, overlap=overlap)


class EmbedOptions(Frozen):
    r"""Everything that decides which vectors a job makes and how they are stored.

    Attributes:
        text: a column, or a template of columns such as "{title}\n{body}"; None is the format's
            own ("text"; "{title} {text}" of a BEIR folder).
        id: column that is copied as the row's id; None is the format's own, or FILE:ROW.
        keep: columns that are copied beside the vector.
        role: which prompt texts get.
        instruction: of queries; None is the model's default.
        long: what happens to texts that are too long.
        pool: "mean" stores one vector a document, the mean of its chunks'.
        code: how a number is stored; "artifact" is as the artifact says.
        vector_type: Parquet type of the vector column.
        batch_size: texts computed together.
        shard_rows: rows of the input in one shard at most.
        dtype: that the model computes in; see `gteopt.load`.
        backend: see `gteopt.load`.
        kernels: see `gteopt.load`.
    """

    text: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    role: Literal["query", "document"] = "document"
    instruction: str | None = None
    long: Long = Long()
    pool: Literal["none", "mean"] = "none"
    code: Code = "artifact"
    vector_type: VectorType = "list"
    batch_size: int = Field(default=32, ge=1)
    shard_rows: int = Field(default=SHARD_ROWS, ge=1)
    dtype: str = "auto"
    backend: Literal["torch", "openvino"] = "torch"
    kernels: str = "deterministic"

    @field_validator("long", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        return parse_long(value) if isinstance(value, str) else value

    @field_validator("keep", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fit_together(self) -> EmbedOptions:
        if self.pool == "mean" and self.long.mode != "chunk":
            raise InputError("--pool mean pools the chunks of a document; give --long chunk")
        if self.instruction is not None and self.role == "document":
            raise InputError("--instruction goes on queries only; give --role query")
        reserved = sorted({*self.keep} & RESERVED)
        if reserved:
            raise InputError(
                f"--keep {','.join(reserved)}: the output has columns of its own with that name "
                f"({', '.join(sorted(RESERVED))}); rename the column in the input"
            )
        if self.text is not None:
            Template(self.text)  # a template that cannot be read is said before files are opened
        return self


RESERVED = frozenset({"id", "file", "row", "chunk", "start", "end", "vector"})
"""Columns that the output has by itself."""


class Template:
    """How the text of a row is made of its columns.

    Attributes:
        columns: that it reads.
    """

    def __init__(self, said: str) -> None:
        """Read a column's name, or a template with columns in braces.

        Raises:
            InputError: braces that do not match, or a conversion such as `{title!r}`.
        """
        self._said = said
        try:
            parts = list(Formatter().parse(said))
        except ValueError as error:
            raise InputError(f"--text {said!r}: {error}; write columns as {{title}}") from error
        fields = [field for _, field, _, _ in parts if field is not None]
        if any(form or conversion for _, _, form, conversion in parts) or "" in fields:
            raise InputError(f"--text {said!r}: braces hold the name of a column and nothing else")
        self._parts = [(literal, field) for literal, field, _, _ in parts]
        self.is_column = not fields
        self.columns: tuple[str, ...] = (said,) if self.is_column else tuple(dict.fromkeys(fields))

    def fill(self, row: Mapping[str, Any]) -> tuple[str | None, str]:
        """The text of a row, or None with what is wrong with it.

        A template takes numbers, too, and leaves out what a row lacks.
        """
        if self.is_column:
            value = row.get(self._said)
            if isinstance(value, str):
                return value, ""
            return None, _not_text(self._said, value)
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
    what = "null or missing" if value is None else type(value).__name__
    return f"column {column} is {what}"


def as_text(value: Any) -> str | None:
    """An id or a kept value of a row format as text: strings as they are, others as JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode("utf-8")


def lacking(wanted: Sequence[str], there: Sequence[str], where: str) -> InputError | None:
    """An error that lists the columns there are, where some that are wanted are not."""
    missing = [column for column in wanted if column not in there]
    if not missing:
        return None
    shown = ", ".join(list(there)[:40]) or "none"
    more = f" and {len(there) - 40} more" if len(there) > 40 else ""
    return InputError(
        f"{where} has no column {', '.join(missing)}; it has {shown}{more}. Name one with --text, "
        f"--id or --keep"
    )
