"""Count the progress of a run, in total and for each worker.

Hides: how rates follow from counts. Refuses to know: jobs, files, who works where.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from gteopt.corpus.shard_encoder import ShardDone
from gteopt.frozen import Frozen


class WorkerShare(Frozen):
    """What one worker did in a run.

    Attributes:
        name: number and device; on a cluster, machine and process.
        n_shards: shards that it wrote.
        n_texts: texts that it embedded.
        texts_per_s: its rate from the start of the run to its last shard.
        last_s: when it wrote its last shard, in seconds from the start of the run.
    """

    name: str
    n_shards: int = 0
    n_texts: int = 0
    texts_per_s: float = 0.0
    last_s: float = 0.0


@dataclass
class Tally:
    """Counts of a run's progress.

    Attributes:
        n_rows: rows of the whole job.
        n_done: rows whose shards are written, by this run or an earlier one.
        price_per_hour: dollars for all machines together.
        n_texts: texts that this run embedded.
        n_tokens: tokens that the model read in this run.
        operations: floating-point operations of this run.
        workers: what each worker did in this run, by its name.
        began: start of the run, by `time.monotonic`.
    """

    n_rows: int
    n_done: int
    price_per_hour: float | None
    n_texts: int = 0
    n_tokens: int = 0
    operations: float = 0.0
    workers: dict[str, WorkerShare] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def add(self, done: ShardDone) -> None:
        """Count a shard that is written."""
        self.n_done += done.record.n_rows
        self.n_texts += done.record.n_embedded
        self.n_tokens += done.record.n_tokens
        self.operations += done.operations
        before = self.workers.get(done.worker, WorkerShare(name=done.worker))
        n_texts, seconds = before.n_texts + done.record.n_embedded, self.seconds
        self.workers[done.worker] = WorkerShare(
            name=done.worker,
            n_shards=before.n_shards + 1,
            n_texts=n_texts,
            texts_per_s=round(n_texts / max(seconds, 1e-9), 2),
            last_s=round(seconds, 3),
        )

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self.began

    @property
    def dollars(self) -> float | None:
        """Cost of the run so far; None without a price."""
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600

    def facts(self) -> dict[str, Any]:
        """Rates, and the time that is left, for an event."""
        took = max(self.seconds, 1e-9)
        rate = self.n_texts / took
        seconds_left = (self.n_rows - self.n_done) / rate if rate else None
        return {
            "rows_done": self.n_done,
            "rows_total": self.n_rows,
            "texts_per_s": round(rate, 2),
            "tokens_per_s": round(self.n_tokens / took, 1),
            "seconds_left": None if seconds_left is None else round(seconds_left, 1),
            "dollars": None if self.dollars is None else round(self.dollars, 4),
        }
