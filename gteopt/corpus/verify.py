"""Whether an embedding folder holds what it says: bytes, counts, and vectors made again.

Hides: what is compared with what. Refuses to know: how a job is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from gteopt.corpus.chunks import chunk_tokens, spans
from gteopt.corpus.jobs import Job
from gteopt.corpus.rows import RowReader
from gteopt.corpus.shard_encoder import stored_transform
from gteopt.corpus.shard_files import DEAD, ShardContent, finished, read_shard, vectors_of
from gteopt.errors import IntegrityError, join_problems
from gteopt.frozen import Frozen
from gteopt.progress import Progress, quiet

if TYPE_CHECKING:
    from gteopt.encoder.encoder import Encoder

N_AGAIN = 64
_MIN_COSINE = {"float32": 0.99, "float16": 0.99, "int8": 0.98}
_MIN_COSINE_OF_FEW_BITS = 0.9
"""Of a vector with that of the same text in another batch, where bfloat16 rounds differently."""


class Verified(Frozen):
    """What was checked.

    Attributes:
        n_again: rows whose text was embedded again.
        min_cosine: least cosine of those with what is stored.
    """

    n_shards: int
    n_rows: int
    n_vectors: int
    n_bad: int
    n_again: int
    min_cosine: float | None


def verify(job: Job, encoder: Encoder, *, seed: int = 0, progress: Progress = quiet) -> Verified:
    """Read every shard, count the rows of every file, and embed 64 random rows again.

    Raises:
        IntegrityError: lists every shard that is missing or damaged, every file whose rows do not
            add up, and every row whose vector is another one.
    """
    done = finished(job.folder, job.plan.expected())
    problems = [f"{name} is missing or not whole" for name in job.plan.shards if name not in done]
    rows: dict[int, int] = {}
    n_vectors = n_bad = 0
    for number, (name, record) in enumerate(done.items()):
        try:
            found = _counted(job, name, record.sha256)
        except IntegrityError as error:
            problems.append(str(error))
            continue
        shard = job.plan.shards[name]
        if (found["embedded"], found["vectors"], found["bad"]) != (
            record.n_embedded,
            record.n_vectors,
            record.n_bad,
        ):
            problems.append(f"{name} holds other counts than its footer says")
        rows[shard.file] = rows.get(shard.file, 0) + found["embedded"] + found["bad"]
        n_vectors, n_bad = n_vectors + found["vectors"], n_bad + found["bad"]
        progress("reading shards", number + 1, len(done))
    for number, count in enumerate(job.record.files):
        if rows.get(number, 0) != count.n_rows and not problems:
            problems.append(
                f"{count.file.name} has {count.n_rows:,} rows, and {rows.get(number, 0):,} of "
                f"them have a vector or a dead letter"
            )
    again = {} if problems else _again(job, encoder, seed)
    least = _MIN_COSINE.get(job.record.decode.code, _MIN_COSINE_OF_FEW_BITS)
    problems += [
        f"{where} was embedded again: cosine {cosine:.4f} with what is stored"
        for where, cosine in again.items()
        if not cosine >= least
    ]
    if problems:
        raise IntegrityError(join_problems(f"{job.folder} is not as it should be", problems))
    return Verified(
        n_shards=len(done),
        n_rows=sum(rows.values()),
        n_vectors=n_vectors,
        n_bad=n_bad,
        n_again=len(again),
        min_cosine=min(again.values(), default=None),
    )


def _counted(job: Job, name: str, sha256: str) -> Mapping[str, int]:
    table = read_shard(job.folder, name)
    vectors = vectors_of(table, job.record.decode)
    rows = table["row"].to_numpy()
    content = ShardContent("", rows, table["id"].to_pylist(), None, vectors, table)
    if content.sha256() != sha256:
        raise IntegrityError(f"{name} holds other vectors than its footer says")
    n_bad = 0
    if job.folder.read(f"{DEAD}/{name}") is not None:
        with job.folder.open(f"{DEAD}/{name}") as source:
            n_bad = pq.read_table(source).num_rows
    return {"embedded": len(np.unique(rows)), "vectors": len(rows), "bad": n_bad}


def _again(job: Job, encoder: Encoder, seed: int) -> dict[str, float]:
    """Cosines of random rows' stored vectors with those of their texts, embedded now."""
    task, options = job.task, job.task.options
    random = np.random.default_rng(seed)
    names = [name for name, shard in job.plan.shards.items() if shard.file in task.files]
    drawn = random.choice(names, N_AGAIN).tolist() if names else []
    wanted: dict[str, int] = {}
    for name in map(str, drawn):
        wanted[name] = wanted.get(name, 0) + 1
    reader = RowReader(task.files, task.columns)
    transform = stored_transform(encoder.vectors, task.stored)
    found: dict[str, float] = {}
    for name in (each for each in names if each in wanted):
        table, shard = read_shard(job.folder, name), job.plan.shards[name]
        if not table.num_rows:
            continue
        picked = random.choice(table.num_rows, min(wanted[name], table.num_rows), replace=False)
        texts = reader.read(shard).texts
        rows = table["row"].to_numpy()[picked]
        whole = [texts[row - shard.first] or "" for row in rows]
        parts = _parts(job, encoder, whole)
        if "start" in table.column_names:
            starts, ends = (table[each].to_numpy()[picked] for each in ("start", "end"))
            parts = [[text[a:b]] for text, a, b in zip(whole, starts, ends, strict=True)]
        flat = [text for each in parts for text in each]
        vectors = encoder.embed(
            flat, role=options.role, instruction=options.instruction, batch_size=options.batch_size
        )
        ends_of = np.cumsum([len(each) for each in parts])
        pooled = np.stack(
            [vectors[b - len(p) : b].mean(axis=0) for p, b in zip(parts, ends_of, strict=True)]
        )
        now = transform.dequantize(transform.quantize(transform.project(pooled)))
        stored = vectors_of(table, job.record.decode)[picked]
        if job.record.decode.code == "float16":
            stored = stored.astype(np.float32)
        then = transform.dequantize(np.ascontiguousarray(stored))
        file = task.files[shard.file][0].name
        for row, a, b in zip(rows.tolist(), now, then, strict=True):
            norm = float(np.linalg.norm(a) * np.linalg.norm(b))
            found[f"{file} row {row}"] = float(a @ b) / norm if norm else float(not a.any())
    reader.close()
    return found


def _parts(job: Job, encoder: Encoder, texts: list[str]) -> list[list[str]]:
    """The chunks whose vectors are pooled; whole texts where none are."""
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
    cut = spans(encoder.tokenization, texts, *sizes)
    return [[text[a:b] for a, b in each] for text, each in zip(texts, cut, strict=True)]
