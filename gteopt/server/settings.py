"""What the user of a server decides. Imports nothing heavy, so that mistakes are said at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Decoder(Protocol):
    """Token ids of another tokenizer back to text."""

    name: str

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; an error of any kind where some are unknown."""
        ...


@dataclass(frozen=True)
class Settings:
    """What the user decides.

    Attributes:
        max_queue_s: seconds of work that may wait.
        max_body_bytes: of a request.
        max_request_tokens: of all inputs of a request together.
        max_batch_tokens: of a pass; measured when None.
        body_timeout_s: until a body is there.
        cache_bytes: of vectors that are kept; 0 keeps none.
        price_per_hour: of the machine in dollars, for the cost in the metrics.
        decoder: reads token ids as another tokenizer's.
        log_requests: a line a request.
        cors_origins: web pages that may ask from a browser; none.
    """

    max_queue_s: float = 30.0
    max_body_bytes: int = 8 << 20
    max_request_tokens: int = 300_000
    max_batch_tokens: int | None = None
    body_timeout_s: float = 60.0
    cache_bytes: int = 0
    price_per_hour: float | None = None
    decoder: Decoder | None = None
    log_requests: bool = False
    cors_origins: tuple[str, ...] = ()
