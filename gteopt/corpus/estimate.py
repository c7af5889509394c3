"""Estimate a job's time, cost and size from a sample, before anything is embedded.

Hides: the sample and its interval. Refuses to know: currencies, other machines.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from gteopt.corpus.jobs import EmbedJob
from gteopt.corpus.rows import RowReader
from gteopt.frozen import Frozen
from gteopt.progress import Progress, ignore_progress

if TYPE_CHECKING:
    from gteopt.encoder.encoder import Encoder

_SAMPLE_ROWS = 2000
_MEASURE_S = 8.0
_BATCHES_OF_A_WINDOW = 8
_Z = 1.96
"""Half of a 95 % interval, in standard errors."""


class EmbedEstimate(Frozen):
    """The estimated time, cost and size of a job.

    Attributes:
        n_sampled: rows whose tokens were counted.
        n_tokens: estimated tokens of all rows.
        n_tokens_error: half of the 95 % interval of `n_tokens`.
        n_cut: estimated rows that are longer than the model takes.
        tokens_per_s: measured on one device of this machine, with texts of the sample.
        hours: on all devices that share the work, each as fast as the measured one.
        dollars: cost of these hours; None without a price.
        n_bytes: bytes of the vectors.
    """

    n_rows: int
    n_shards: int
    n_sampled: int
    n_tokens: int
    n_tokens_error: int
    n_cut: int
    tokens_per_s: float
    hours: float
    dollars: float | None
    n_bytes: int


def estimate_embedding(
    job: EmbedJob,
    encoder: Encoder,
    *,
    price_per_hour: float | None = None,
    n_devices: int = 1,
    progress: Progress = ignore_progress,
) -> EmbedEstimate:
    """Count the tokens of random rows, and embed some of the rows to measure the speed.

    Args:
        job: see `prepare_job`.
        encoder: the loaded model.
        price_per_hour: dollars for all devices together.
        n_devices: devices that will share the work.
        progress: called with the shards that were sampled, then with the seconds measured.
    """
    texts = _sample(job, progress)
    options = job.task.options
    tokens = encoder.tokenization.tokenize(
        texts, role=options.role, instruction=options.instruction
    )
    lengths = np.array([len(token_ids) for token_ids in tokens], np.float64)
    n_rows = job.plan.n_rows
    mean = float(lengths.mean()) if len(lengths) else 0.0
    unseen = max(0.0, 1 - len(lengths) / max(1, n_rows))  # correction for a finite population
    spread = float(lengths.std(ddof=1)) if len(lengths) > 1 else 0.0
    error = _Z * spread * (unseen / max(1, len(lengths))) ** 0.5
    window = options.batch_size * _BATCHES_OF_A_WINDOW
    n_done, began, seconds = 0, time.monotonic(), 0.0
    # The first window is a warm-up: it is not counted.
    for start in range(0, len(tokens), window):
        part = tokens[start : start + window]
        for _, batch in encoder.tokenization.batches(part, options.batch_size):
            encoder.embed_tokens(batch)
        if start == 0 and len(tokens) > window:
            began = time.monotonic()
            continue
        n_done += sum(map(len, part))
        seconds = time.monotonic() - began
        progress(
            "measuring the speed (seconds)", min(int(seconds), int(_MEASURE_S)), int(_MEASURE_S)
        )
        if seconds >= _MEASURE_S:
            break
    rate = n_done / seconds if seconds else 0.0
    hours = n_rows * mean / rate / 3600 / n_devices if rate else 0.0
    n_cut = sum(token_ids.is_cut for token_ids in tokens)
    return EmbedEstimate(
        n_rows=n_rows,
        n_shards=len(job.plan.shards),
        n_sampled=len(tokens),
        n_tokens=round(n_rows * mean),
        n_tokens_error=round(n_rows * error),
        n_cut=round(n_rows * n_cut / max(1, len(tokens))),
        tokens_per_s=rate,
        hours=hours,
        dollars=None if price_per_hour is None else price_per_hour * hours,
        n_bytes=n_rows * job.record.decode.bytes_per_vector,
    )


def _sample(job: EmbedJob, progress: Progress) -> list[str]:
    """Texts of random rows from a few random shards; reading all shards would take too long."""
    random = np.random.default_rng(0)
    shards = list(job.plan.shards.values())
    n_shards = min(len(shards), 32)
    drawn = sorted(random.choice(len(shards), n_shards, replace=False).tolist())
    reader = RowReader(job.task.files, job.task.columns)
    sample: list[str] = []
    for number, index in enumerate(drawn):
        texts = [text for text in reader.read(shards[index]).texts if text is not None]
        n = min(len(texts), -(-_SAMPLE_ROWS // n_shards))
        sample += [texts[i] for i in random.choice(len(texts), n, replace=False)]
        progress("sampling shards", number + 1, n_shards)
    reader.close()
    random.shuffle(sample)
    return sample
