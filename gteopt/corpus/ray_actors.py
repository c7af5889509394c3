"""Encode shards on actors of a Ray cluster.

Hides: Ray's actors. Refuses to know: tasks, caches, scores.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from gteopt.corpus.ray_cluster import join_cluster
from gteopt.corpus.shards import Shard
from gteopt.corpus.workers import EncodedShard, ScoreWorkers, WorkerJob, WorkerLost, _encode


def start_ray_workers(address: str, *, device: str = "auto", n_threads: int) -> ScoreWorkers:
    """One actor for each GPU of a running Ray cluster, or for every `n_threads` cores of a node.

    Args:
        address: "auto" for the cluster that this machine belongs to, or HOST:PORT.
        device: "cuda", "cpu", or "auto", which means GPUs if the cluster has any.
        n_threads: cores that an actor without a GPU claims.

    Raises:
        UnsupportedError: Ray is not installed, or the cluster has nothing to encode on.
        InputError: there is no such cluster.
    """
    cluster = join_cluster(address, device=device, n_threads=n_threads)
    kind, n_workers = cluster.kind, cluster.n_places
    claim = {"num_gpus": 1, "num_cpus": 1} if kind == "cuda" else {"num_cpus": n_threads}
    openers = [lambda number=number: _Actor(str(number), claim) for number in range(n_workers)]
    return ScoreWorkers(
        openers,
        device=kind,
        where=f"{n_workers} Ray actors ({kind})",
        leave=cluster.leave,
    )


class _Actor:
    """An actor of a Ray cluster; it runs on any node that has the resources it claims."""

    def __init__(self, name: str, claim: dict[str, int]) -> None:
        import ray

        self.name = name
        self._ray = ray
        kind: Any = ray.remote(RayEncoder)
        # `ScoreWorkers` restarts and retries, because it knows which other worker is free. Ray
        # would wait for room on the remaining nodes.
        self._actor = kind.options(
            **claim, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        ).remote()
        self._get(self._actor.ready.remote())  # waits until a node has room for it

    def encode(self, job: WorkerJob, shard: Shard) -> EncodedShard:
        encoded: EncodedShard = self._get(self._actor.encode.remote(job, shard))
        return encoded

    def _get(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except (self._ray.exceptions.RayError, SystemExit) as error:
            # `RayEncoder` returns gteopt's own errors, so these come from the cluster. Ray raises
            # SystemExit in a waiting thread after this process has left the cluster.
            with suppress(self._ray.exceptions.RayError):
                self.close()
            raise WorkerLost(str(error).strip().split("\n", 1)[0]) from error

    def close(self) -> None:
        # After the cluster is left, any call to Ray would quietly join it again.
        if self._ray.is_initialized():
            self._ray.kill(self._actor)


class RayEncoder:
    """The class that runs inside an actor. Ray shows it only the GPU that it claimed."""

    def encode(self, job: WorkerJob, shard: Shard) -> EncodedShard:
        """Encode one shard."""
        return _encode(job, job.device, shard)

    def ready(self) -> bool:
        """Return once the actor runs on a node."""
        return True
