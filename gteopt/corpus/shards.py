"""Cut texts into shards, and encode shards in this process or elsewhere.

Hides: the protocol between the vector cache and an encoder. Refuses to know: disks, processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gteopt.errors import UnsupportedError, is_out_of_memory
from gteopt.progress import Progress

if TYPE_CHECKING:
    from gteopt.encoder.description import EncoderDescription
    from gteopt.encoder.tokenization import Role

Floats = npt.NDArray[np.float32]

SHARD_TEXTS = 256


@dataclass(frozen=True)
class Shard:
    """Texts that are encoded and stored together."""

    role: Role
    instruction: str | None
    texts: tuple[str, ...]


@dataclass(frozen=True)
class ShardEncodings:
    """Counts of the texts whose vectors were asked for.

    Attributes:
        n_asked: texts asked for.
        n_encoded: texts that were encoded; the others were cached.
        n_cut: texts that are longer than the model takes, cached or not.
    """

    n_asked: int = 0
    n_encoded: int = 0
    n_cut: int = 0

    def __add__(self, other: ShardEncodings) -> ShardEncodings:
        return ShardEncodings(
            self.n_asked + other.n_asked,
            self.n_encoded + other.n_encoded,
            self.n_cut + other.n_cut,
        )

    def __sub__(self, other: ShardEncodings) -> ShardEncodings:
        return self + ShardEncodings(-other.n_asked, -other.n_encoded, -other.n_cut)


class EncodeShards(Protocol):
    """Encodes shards in this process or elsewhere, and gives them back in any order."""

    def __call__(
        self, shards: Sequence[Shard], progress: Progress
    ) -> Iterator[tuple[Shard, Floats]]:
        """Each shard and its vectors [N, full_dims]; `progress` counts the texts of all shards."""

    def changed(self, max_tokens: int, *, normalize: bool) -> EncodeShards:
        """The same weights with another token limit or normalization; see `change_encoder`."""


@runtime_checkable
class EncodeAhead(Protocol):
    """Encodes shards, and may start before they are asked for."""

    def __call__(
        self, shards: Sequence[Shard], progress: Progress
    ) -> Iterator[tuple[Shard, Floats]]:
        """See `EncodeShards`."""

    def changed(self, max_tokens: int, *, normalize: bool) -> EncodeShards:
        """See `EncodeShards`; the result may do nothing until shards are asked for."""

    def expect(self, shards: Sequence[Shard]) -> None:
        """Announce shards that will be asked for, in this order."""

    def forget(self, shards: Sequence[Shard]) -> None:
        """Withdraw announced shards, except those that were asked for already."""

    def when_all_started(self, start_next: Callable[[], None]) -> None:
        """Call `start_next` once, when all announced shards are being encoded."""


class LocalEncoding:
    """Encodes shards one after the other in this process.

    If a batch does not fit the memory, the batch size is halved, also for later batches.

    Args:
        encoder: the encoder to use.
        batch_size: the most texts computed together.
        say: called with a message when the batch size was halved.
    """

    def __init__(
        self,
        encoder: EncoderDescription,
        batch_size: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        from gteopt.encoder.encoder import Encoder

        assert isinstance(encoder, Encoder), "only an encoder encodes; workers take a description"
        self._encoder = encoder
        self._batch_size = batch_size
        # Published scores come from Sentence Transformers in float32. The order of its sums decides
        # their sixth digit, because some pairs nearly tie.
        self._as_published = _sums_as_published(encoder)
        self._say = say

    def __call__(
        self, shards: Sequence[Shard], progress: Progress
    ) -> Iterator[tuple[Shard, Floats]]:
        """See `EncodeShards`."""
        n_texts, before = sum(len(shard.texts) for shard in shards), 0

        def count(stage: str, done: int, total: int) -> None:
            progress(stage, before + done, n_texts)

        for shard in shards:
            yield shard, self._encode(shard, count)
            before += len(shard.texts)

    def changed(self, max_tokens: int, *, normalize: bool) -> LocalEncoding:
        """See `EncodeShards`."""
        from gteopt.encoder.changed_encoder import change_encoder

        encoder = change_encoder(self._encoder, max_tokens, normalize=normalize)
        return LocalEncoding(encoder, self._batch_size, self._say)

    def _encode(self, shard: Shard, progress: Progress) -> Floats:
        asked = self._batch_size
        while True:
            try:
                vectors = self._encoder.embed(
                    shard.texts,
                    role=shard.role,
                    instruction=shard.instruction,
                    batch_size=self._batch_size,
                    unpadded=not self._as_published,
                    progress=progress,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._batch_size == 1:
                    raise UnsupportedError(
                        f"{self._encoder.name}: a single text does not fit the memory of "
                        f"{self._encoder.device} ({str(error).splitlines()[0]}); use a device "
                        f"with more memory"
                    ) from error
            else:
                if self._batch_size < asked:
                    self._say(
                        f"{self._encoder.name}: batches of {asked} texts do not fit the memory of "
                        f"{self._encoder.device}; continued with batches of {self._batch_size}"
                    )
                return vectors
            # Outside of the exception handler: its traceback would keep the failed batch in memory.
            self._batch_size //= 2
            _free_device_memory()


def cut_shards(texts: Iterable[str], role: Role, instruction: str | None) -> list[Shard]:
    """Cut texts into shards of at most `SHARD_TEXTS`, longest texts first.

    This order needs little padding, and memory peaks at the beginning.
    """
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return [
        Shard(role, instruction, tuple(ordered[start : start + SHARD_TEXTS]))
        for start in range(0, len(ordered), SHARD_TEXTS)
    ]


def _sums_as_published(encoder: EncoderDescription) -> bool:
    return str(encoder.dtype) == "torch.float32" and not encoder.checkpoint.is_quantized


def _free_device_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
