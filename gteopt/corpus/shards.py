"""Shards of texts: where a list is cut, and who encodes a shard.

Hides: the protocol between a cache and whoever encodes. Refuses to know: disks, processes.
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
    from gteopt.encoder.description import Description
    from gteopt.encoder.tokenization import Role

Floats = npt.NDArray[np.float32]

SHARD_TEXTS = 256


@dataclass(frozen=True)
class Shard:
    """Texts that are encoded, and then stored, together."""

    role: Role
    instruction: str | None
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Encodings:
    """Texts whose vectors were asked for.

    Attributes:
        n_encoded: of these, encoded; the others were cached.
        n_cut: of these, longer than the model takes, cached or not.
    """

    n_asked: int = 0
    n_encoded: int = 0
    n_cut: int = 0

    def __add__(self, other: Encodings) -> Encodings:
        return Encodings(
            self.n_asked + other.n_asked,
            self.n_encoded + other.n_encoded,
            self.n_cut + other.n_cut,
        )

    def __sub__(self, other: Encodings) -> Encodings:
        return self + Encodings(-other.n_asked, -other.n_encoded, -other.n_cut)


class EncodeShards(Protocol):
    """Encodes shards, here or elsewhere; the order in which they come back does not matter."""

    def __call__(
        self, shards: Sequence[Shard], progress: Progress
    ) -> Iterator[tuple[Shard, Floats]]:
        """Each shard with its vectors [N, full_dims]; `progress` counts texts of all of them."""

    def changed(self, max_tokens: int, *, normalize: bool) -> EncodeShards:
        """The same weights, with other vectors; see `changed_encoder`."""


@runtime_checkable
class EncodeAhead(Protocol):
    """Encodes shards, and may start before they are asked for."""

    def __call__(
        self, shards: Sequence[Shard], progress: Progress
    ) -> Iterator[tuple[Shard, Floats]]:
        """See `EncodeShards`."""

    def changed(self, max_tokens: int, *, normalize: bool) -> EncodeShards:
        """See `EncodeShards`; the result may wait until shards are asked for."""

    def expect(self, shards: Sequence[Shard]) -> None:
        """Expect these shards to be asked for, in this order."""

    def forget(self, shards: Sequence[Shard]) -> None:
        """Expect these shards no longer, unless they were asked for."""

    def when_all_started(self, start_next: Callable[[], None]) -> None:
        """Call `start_next` once, when all expected shards are being encoded."""


class LocalEncoding:
    """Encodes shards one after the other in this process.

    A batch that does not fit the memory is halved and tried again; later ones stay that small.

    Args:
        encoder: what encodes.
        batch_size: texts computed together at most.
        say: told once what was halved.
    """

    def __init__(
        self, encoder: Description, batch_size: int, say: Callable[[str], None] = lambda _: None
    ) -> None:
        from gteopt.encoder.encoder import Encoder

        assert isinstance(encoder, Encoder), "only an encoder encodes; workers take a description"
        self._encoder = encoder
        self._batch_size = batch_size
        # Scores are published from Sentence Transformers' float32. Among pairs that nearly tie the
        # order of its sums decides the sixth digit.
        self._as_published = _sums_as_published(encoder)
        self._say = say

    def __call__(
        self, shards: Sequence[Shard], progress: Progress
    ) -> Iterator[tuple[Shard, Floats]]:
        """See `EncodeShards`."""
        n_texts, before = sum(len(shard.texts) for shard in shards), 0

        def count(what: str, done: int, total: int) -> None:
            progress(what, before + done, n_texts)

        for shard in shards:
            yield shard, self._encode(shard, count)
            before += len(shard.texts)

    def changed(self, max_tokens: int, *, normalize: bool) -> LocalEncoding:
        """See `EncodeShards`."""
        from gteopt.encoder.changed_encoder import changed_encoder

        encoder = changed_encoder(self._encoder, max_tokens, normalize=normalize)
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
                        f"with more"
                    ) from error
            else:
                if self._batch_size < asked:
                    self._say(
                        f"{self._encoder.name}: batches of {asked} texts do not fit the memory of "
                        f"{self._encoder.device}; went on with {self._batch_size}"
                    )
                return vectors
            # Outside of the handler, whose traceback would keep the failed batch alive.
            self._batch_size //= 2
            _free_device_memory()


def cut(texts: Iterable[str], role: Role, instruction: str | None) -> list[Shard]:
    """Shards of at most `SHARD_TEXTS` texts, longest texts first, so that memory peaks early and
    little is padded.
    """
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return [
        Shard(role, instruction, tuple(ordered[start : start + SHARD_TEXTS]))
        for start in range(0, len(ordered), SHARD_TEXTS)
    ]


def _sums_as_published(encoder: Description) -> bool:
    return str(encoder.dtype) == "torch.float32" and not encoder.checkpoint.is_quantized


def _free_device_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
