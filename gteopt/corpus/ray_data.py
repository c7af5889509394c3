"""Embed a corpus on a Ray cluster: Ray Data hands out shards, and actors write them.

Hides: Ray Data. Refuses to know: jobs, what a shard holds. The rows of the Ray data set are shard
descriptors, and only small records come back: vectors never pass through Ray's object store. When
an actor or a node is lost, Ray Data gives its unfinished shards to another actor.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from gteopt.corpus.jobs import RunShards
from gteopt.corpus.ray_cluster import join_cluster
from gteopt.corpus.rows import RowRange
from gteopt.corpus.shard_encoder import EmbedTask, ShardDone, ShardEncoder
from gteopt.corpus.shard_files import ShardRecord, read_done_footer, shard_name
from gteopt.corpus.storage import StorageFolder
from gteopt.errors import RESUMES, GteoptError, InputError, UnsupportedError, install_command
from gteopt.own_thread import call_in_own_thread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHARDS_PER_CALL = 4
"""Several shards in a call, because an actor reads and writes some while it computes another."""
_MOST_BLOCKS = 10_000
"""Ray Data keeps state for each block in the driver, so more blocks would cost memory there."""


def embed_on_ray(
    address: str,
    *,
    device: str = "auto",
    actors: tuple[int, int] | None = None,
    cpus: int = 1,
) -> RunShards:
    """Embed on actors of a Ray cluster: one for each GPU, or for every `cpus` cores.

    Args:
        address: "auto" for the cluster that this machine belongs to, HOST:PORT, or "local" for a
            new cluster on this machine alone.
        device: "cuda", "cpu", or "auto", which means GPUs if the cluster has any.
        actors: fewest and most actors, as nodes come and go; None means as many as have room now.
        cpus: cores that an actor without a GPU claims, and torch's threads there.

    Raises:
        UnsupportedError: Ray is not installed, or the cluster has nothing to encode on.
        InputError: there is no such cluster.
    """

    def embed(task: EmbedTask, shards: Sequence[RowRange]) -> Iterator[ShardDone]:
        ray = _import_ray()
        joined = join_cluster(address, device=device, n_threads=cpus)
        ray.data.DataContext.get_current().enable_progress_bars = False
        if joined.is_ours:
            _print_errors_only_()
        kind = joined.kind
        claim = {"num_gpus": 1} if kind == "cuda" else {"num_cpus": cpus}
        least, most = actors or (joined.n_places, joined.n_places)
        # Fewer shards in a call if there are few, so that every actor gets some.
        per_call = max(1, min(_SHARDS_PER_CALL, len(shards) // most))
        per_call = max(per_call, -(-len(shards) // _MOST_BLOCKS))
        items = [{"shard": shard.model_dump_json()} for shard in shards]
        dataset = ray.data.from_items(items, override_num_blocks=-(-len(shards) // per_call))
        dataset = dataset.map_batches(
            EmbedShards,
            fn_constructor_args=[task, kind],
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            **claim,
        )
        names = set()
        try:
            for row in dataset.iter_rows():
                if row["error"]:
                    raise UnsupportedError(row["error"])
                # Ray repeats a call whose answer was lost; its shards are then reported twice.
                if row["name"] not in names:
                    names.add(row["name"])
                    record = ShardRecord.model_validate_json(row["record"])
                    yield ShardDone(row["name"], record, row["operations"], row["worker"])
        except ray.exceptions.RayError as error:
            raise UnsupportedError(
                f"the Ray cluster failed ({_last_line(error)}); {RESUMES}"
            ) from error
        finally:
            joined.leave()

    return embed


def _import_ray() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise UnsupportedError(f"--ray needs Ray Data: {install_command('ray')}") from error
    return ray


def _print_errors_only_() -> None:
    """Keep Ray Data's plans off the terminal; its log file still gets them."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


@contextmanager
def open_ray_cluster(address: str, device: str = "auto") -> Iterator[Literal["cuda", "cpu"]]:
    """Join a cluster for the duration of a `with` block; gives the kind of its devices.

    Args:
        address: see `embed_on_ray`.
        device: see `embed_on_ray`.

    Raises:
        UnsupportedError: see `embed_on_ray`.
        InputError: see `embed_on_ray`.
    """
    _import_ray()
    joined = join_cluster(address, device=device, n_threads=1)
    if joined.is_ours:
        _print_errors_only_()
    try:
        yield "cuda" if joined.kind == "cuda" else "cpu"
    finally:
        joined.leave()


class EmbedShards:
    """The actor: takes shard descriptors, writes shards, returns small records."""

    def __init__(self, task: EmbedTask, device: str) -> None:
        """Load the model on the device that Ray shows."""
        self._task = task
        self._folder = StorageFolder(task.out)
        self._failed: str | None = None
        self._name = f"{socket.gethostname()}, process {os.getpid()}"
        try:
            encoder = call_in_own_thread(lambda: task.load(device))
            self._worker = ShardEncoder(task, encoder, self._name)
        except GteoptError as error:
            # If it were raised here, Ray would start the actor again and again.
            self._failed = str(error)

    def __call__(self, batch: Mapping[str, NDArray[np.object_]]) -> dict[str, list[Any]]:
        """Embed the shards of a batch that are not done yet."""
        shards = [RowRange.model_validate_json(str(shard)) for shard in batch["shard"]]
        if self._failed is not None:
            return _rows([_failure(self._failed)])
        started: list[tuple[str, ShardRecord | Future[ShardDone]]] = []
        for shard in shards:
            identity = self._task.files[shard.file][0].identity
            name = shard_name(self._task.fingerprint, identity, shard)
            expected = (self._task.fingerprint, identity, shard)
            record = None if self._task.again else read_done_footer(self._folder, name, expected)
            started.append((name, record or self._worker.submit(shard)))
        rows: list[dict[str, Any]] = []
        for name, result in started:
            try:
                done = (
                    result.result()
                    if isinstance(result, Future)
                    else ShardDone(name, result, 0.0, self._name)
                )
            except GteoptError as error:
                rows.append(_failure(str(error)))
                continue
            rows.append(
                {
                    "name": done.name,
                    "record": done.record.model_dump_json(by_alias=True),
                    "operations": done.operations,
                    "worker": done.worker,
                    "error": "",
                }
            )
        return _rows(rows)


class Embedder:
    """A callable class for `ray.data.Dataset.map_batches` in your own Ray Data pipeline.

    It adds a column of vectors, which pass through Ray's object store. `gteopt embed --ray` keeps
    vectors out of the object store.

    Example:
        ```
        ds = ray.data.read_parquet("corpus/").map_batches(
            gteopt.ray.Embedder, fn_constructor_args=["artifacts/gptq-int4"],
            fn_constructor_kwargs={"text": "body"}, num_gpus=1, batch_size=256,
        )
        ```
    """

    def __init__(
        self,
        model: str,
        *,
        text: str = "text",
        vector: str = "vector",
        role: Literal["query", "document"] = "document",
        instruction: str | None = None,
        batch_size: int = 32,
    ) -> None:
        """Load the model on the device that Ray shows.

        Args:
            model: a folder or a name that `gteopt.load` takes; every node must be able to read it.
            text: column of texts.
            vector: column to add; it holds the vectors in the artifact's code, ready for an index.
            role: decides which prompt the texts get.
            instruction: instruction for queries; None means the model's default.
            batch_size: texts computed together.

        Raises:
            GteoptError: see `gteopt.load`.
        """
        from gteopt.encoder.loading import load

        self._encoder = load(model)
        self._text, self._vector = text, vector
        self._role: Literal["query", "document"] = role
        self._instruction = instruction
        self._batch_size = batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its vectors [N, D].

        Raises:
            InputError: the column is missing, or holds values that are not texts.
        """
        if self._text not in batch:
            raise InputError(f"the batch has no column {self._text}; it has {', '.join(batch)}")
        texts = [text.item() if hasattr(text, "item") else text for text in batch[self._text]]
        vectors = self._encoder.encode(
            texts, role=self._role, instruction=self._instruction, batch_size=self._batch_size
        )
        return {**batch, self._vector: self._encoder.vectors.quantize(vectors)}


def _failure(message: str) -> dict[str, Any]:
    return {"name": "", "record": "", "operations": 0.0, "worker": "", "error": message}


def _rows(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    columns = ("name", "record", "operations", "worker", "error")
    return {column: [row[column] for row in rows] for column in columns}


def _last_line(error: BaseException) -> str:
    """The last line of an error's text: Ray puts a whole traceback before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
