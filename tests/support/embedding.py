"""Small corpora, and embedding jobs over them with a model that is loaded already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gteopt.commands.embed import parse_embed_options
from gteopt.corpus.jobs import (
    EmbedReport,
    JobRequest,
    RunShards,
    embed_in_process,
    lock_job,
    prepare_job,
    run_job,
)
from gteopt.encoder.description import EncoderDescription
from gteopt.encoder.encoder import Encoder

TEXTS = [f"entry {i}: " + "wings and air, " * (i % 5 + 1) for i in range(40)]
"""Texts of different lengths, no two alike."""


def write_jsonl(path: Path, texts: Sequence[object] = TEXTS, column: str = "text") -> Path:
    """A .jsonl file with an id `d0`, `d1`, ... a row."""
    rows = [{"id": f"d{i}", column: text, "n": i} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def embed_with(
    encoder: EncoderDescription,
    inputs: Path | Sequence[str],
    out: Path | str,
    *,
    runner: RunShards | None = None,
    **options: Any,
) -> EmbedReport:
    """A run of a job, in this process unless a runner is given."""
    named = [str(inputs)] if isinstance(inputs, Path) else list(inputs)
    settings, _, wishes = parse_embed_options({"shard_rows": 16, **options})
    with lock_job(out):
        job = prepare_job(JobRequest(tuple(named), "nano", out, settings), encoder, wishes=wishes)
        return run_job(job, runner or embed_in_process(_loaded(encoder)), wishes=wishes)


def _loaded(encoder: EncoderDescription) -> Encoder:
    assert isinstance(encoder, Encoder), "a described model needs a runner"
    return encoder


def stored(out: Path) -> pa.Table:
    """All rows of a folder, in the order of its files' names."""
    paths = sorted((out / "data").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in paths])


def vectors(table: pa.Table) -> npt.NDArray[Any]:
    """The vectors [N, width] of a table."""
    return np.array(table["vector"].to_pylist())


def dead(out: Path) -> list[dict[str, Any]]:
    """Dead letters of a folder, in the order of the input."""
    return [row for path in sorted((out / "dead").glob("*")) for row in _rows(path)]


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def folder_bytes(out: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
