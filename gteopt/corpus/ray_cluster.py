"""Join and leave a Ray cluster, and count the workers that it has room for.

Hides: Ray's time limits, its nodes and their resources. Refuses to know: what workers do.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gteopt.errors import InputError, UnsupportedError, install_command


@dataclass(frozen=True)
class RayCluster:
    """A running cluster that this process belongs to.

    Attributes:
        kind: the kind of device that its workers have, "cuda" or "cpu".
        n_places: how many workers it has room for.
        is_ours: whether `join_cluster` joined it, so that `leave` has to leave it.
    """

    kind: str
    n_places: int
    is_ours: bool

    def leave(self) -> None:
        """Leave the cluster if `join_cluster` joined it."""
        if self.is_ours:
            import ray

            ray.shutdown()


def join_cluster(address: str, *, device: str, n_threads: int) -> RayCluster:
    """Join a cluster, unless this process belongs to one already, and count its places.

    Args:
        address: "auto" for the cluster that this machine belongs to, HOST:PORT, or "local" for a
            new cluster on this machine alone.
        device: "cuda", "cpu", or "auto", which means GPUs if the cluster has any.
        n_threads: cores that a worker without a GPU takes.

    Raises:
        UnsupportedError: Ray is not installed, or the cluster has no room for a worker.
        InputError: there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(f"--ray needs Ray: {install_command('ray')}") from error

    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            with _asking_once():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise InputError(
                f"--ray {address}: no Ray cluster answers there; start one with `ray start "
                f"--head`, and `ray start --address=HOST:6379` on every other machine; or give "
                f"--ray local, which starts one on this machine alone"
            ) from error
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    n_gpus = sum(int(node.get("GPU", 0)) for node in resources)
    kind = device.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if n_gpus else "cpu"
    n_on_cpus = sum(int(node.get("CPU", 0)) // n_threads for node in resources)
    cluster = RayCluster(kind, n_gpus if kind == "cuda" else n_on_cpus, is_ours)
    if cluster.n_places == 0:
        cluster.leave()
        wanted = "a GPU" if kind == "cuda" else f"{n_threads} free cores (OMP_NUM_THREADS)"
        raise UnsupportedError(f"--ray {address}: no node of the cluster has {wanted}")
    return cluster


@contextmanager
def _asking_once() -> Iterator[None]:
    """Let Ray ask an address once instead of 20 times, 40 s each.

    Otherwise a mistyped address, or a file that names a dead cluster, would cost minutes.
    """
    name = "RAY_gcs_server_port_wait_time_s"
    if name in os.environ:  # the user has set a time
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]  # a cluster that this process starts later needs longer
