"""Verify an embedding folder: its bytes, its counts, and a sample of vectors embedded again.

Hides: what is compared with what. Refuses to know: how a job is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from gteopt.corpus.chunks import chunk_tokens, find_chunk_spans
from gteopt.corpus.jobs import EmbedJob
from gteopt.corpus.rows import RowReader
from gteopt.corpus.shard_encoder import stored_transform
from gteopt.corpus.shard_files import (
    DEAD,
    ShardContent,
    read_done_footers,
    read_shard,
    read_shard_vectors,
)
from gteopt.errors import IntegrityError, join_problems
from gteopt.frozen import Frozen
from gteopt.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from gteopt.encoder.encoder import Encoder

N_AGAIN = 64
_MIN_COSINE = {"float32": 0.99, "float16": 0.99, "int8": 0.98}
_MIN_COSINE_OF_FEW_BITS = 0.9
"""Least cosine of a vector with the vector of the same text from another batch. It is below 1
because bfloat16 rounds differently in another batch."""


class VerifiedCounts(Frozen):
    """Counts of a folder without a problem.

    Attributes:
        n_bad: dead letters.
        n_again: rows whose text was embedded again.
        min_cosine: least cosine of these new vectors with the stored ones; None without rows.
    """

    n_shards: int
    n_rows: int
    n_vectors: int
    n_bad: int
    n_again: int
    min_cosine: float | None


def verify_shards(
    job: EmbedJob, encoder: Encoder, *, seed: int = 0, progress: Progress = ignore_progress
) -> VerifiedCounts:
    """Read every shard, count the rows of every file, and embed 64 random rows again.

    Raises:
        IntegrityError: lists every missing or damaged shard, every file whose rows do not add up,
            and every row whose new vector differs from the stored one.
    """
    done = read_done_footers(job.folder, job.plan.expected())
    problems = [f"{name} is missing or incomplete" for name in job.plan.shards if name not in done]
    rows: dict[int, int] = {}
    n_vectors = n_bad = 0
    for number, (name, record) in enumerate(done.items()):
        try:
            counts = _counted(job, name, record.sha256)
        except IntegrityError as error:
            problems.append(str(error))
            continue
        shard = job.plan.shards[name]
        if (counts["embedded"], counts["vectors"], counts["bad"]) != (
            record.n_embedded,
            record.n_vectors,
            record.n_bad,
        ):
            problems.append(f"{name} holds other counts than its footer says")
        rows[shard.file] = rows.get(shard.file, 0) + counts["embedded"] + counts["bad"]
        n_vectors, n_bad = n_vectors + counts["vectors"], n_bad + counts["bad"]
        progress("reading shards", number + 1, len(done))
    for number, count in enumerate(job.record.files):
        if rows.get(number, 0) != count.n_rows and not problems:
            problems.append(
                f"{count.file.name} has {count.n_rows:,} rows, but only {rows.get(number, 0):,} of "
                f"them have a vector or a dead letter"
            )
    cosines = {} if problems else _cosines_again(job, encoder, seed)
    least = _MIN_COSINE.get(job.record.decode.code, _MIN_COSINE_OF_FEW_BITS)
    problems += [
        f"{row} was embedded again: its cosine with the stored vector is {cosine:.4f}, and must be "
        f"at least {least}"
        for row, cosine in cosines.items()
        if not cosine >= least
    ]
    if problems:
        raise IntegrityError(join_problems(f"{job.folder} fails verification", problems))
    return VerifiedCounts(
        n_shards=len(done),
        n_rows=sum(rows.values()),
        n_vectors=n_vectors,
        n_bad=n_bad,
        n_again=len(cosines),
        min_cosine=min(cosines.values(), default=None),
    )


def _counted(job: EmbedJob, name: str, sha256: str) -> Mapping[str, int]:
    table = read_shard(job.folder, name)
    vectors = read_shard_vectors(table, job.record.decode)
    rows = table["row"].to_numpy()
    content = ShardContent("", rows, table["id"].to_pylist(), None, vectors, table)
    if content.sha256() != sha256:
        raise IntegrityError(f"{name} holds other vectors than its footer says")
    n_bad = 0
    if job.folder.read(f"{DEAD}/{name}") is not None:
        with job.folder.open(f"{DEAD}/{name}") as source:
            n_bad = pq.read_table(source).num_rows
    return {"embedded": len(np.unique(rows)), "vectors": len(rows), "bad": n_bad}


def _cosines_again(job: EmbedJob, encoder: Encoder, seed: int) -> dict[str, float]:
    """Embed random rows again; gives the cosine of each new vector with the stored one."""
    task, options = job.task, job.task.options
    random = np.random.default_rng(seed)
    names = [name for name, shard in job.plan.shards.items() if shard.file in task.files]
    drawn = random.choice(names, N_AGAIN).tolist() if names else []
    wanted: dict[str, int] = {}
    for name in map(str, drawn):
        wanted[name] = wanted.get(name, 0) + 1
    reader = RowReader(task.files, task.columns)
    transform = stored_transform(encoder.vectors, task.stored)
    cosines: dict[str, float] = {}
    for name in (name for name in names if name in wanted):
        table, shard = read_shard(job.folder, name), job.plan.shards[name]
        if not table.num_rows:
            continue
        picked = random.choice(table.num_rows, min(wanted[name], table.num_rows), replace=False)
        texts = reader.read(shard).texts
        rows = table["row"].to_numpy()[picked]
        documents = [texts[row - shard.first] or "" for row in rows]
        parts = _parts(job, encoder, documents)
        if "start" in table.column_names:
            starts, ends = (table[column].to_numpy()[picked] for column in ("start", "end"))
            parts = [[text[a:b]] for text, a, b in zip(documents, starts, ends, strict=True)]
        flat = [chunk for chunks in parts for chunk in chunks]
        vectors = encoder.embed(
            flat, role=options.role, instruction=options.instruction, batch_size=options.batch_size
        )
        ends_of = np.cumsum([len(chunks) for chunks in parts])
        pooled = np.stack(
            [vectors[b - len(p) : b].mean(axis=0) for p, b in zip(parts, ends_of, strict=True)]
        )
        now = transform.dequantize(transform.quantize(transform.project(pooled)))
        stored = read_shard_vectors(table, job.record.decode)[picked]
        if job.record.decode.code == "float16":
            stored = stored.astype(np.float32)
        then = transform.dequantize(np.ascontiguousarray(stored))
        file = task.files[shard.file][0].name
        for row, a, b in zip(rows.tolist(), now, then, strict=True):
            norm = float(np.linalg.norm(a) * np.linalg.norm(b))
            cosines[f"{file} row {row}"] = float(a @ b) / norm if norm else float(not a.any())
    reader.close()
    return cosines


def _parts(job: EmbedJob, encoder: Encoder, texts: list[str]) -> list[list[str]]:
    """The chunks of each text whose vectors are pooled; without pooling, the whole text."""
    options = job.task.options
    if options.pool == "none":
        return [[text] for text in texts]
    sizes = chunk_tokens(
        encoder.tokenization,
        options.role,
        options.instruction,
        options.long.tokens,
        options.long.overlap,
    )
    chunks = find_chunk_spans(encoder.tokenization, texts, *sizes)
    return [[text[a:b] for a, b in parts] for text, parts in zip(texts, chunks, strict=True)]
