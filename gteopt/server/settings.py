"""The settings of a server.

This module imports nothing heavy, so that wrong options are reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Decoder(Protocol):
    """Turns token ids of another tokenizer back into text."""

    name: str

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; raises an error of any type if some ids are unknown."""
        ...


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server.

    Attributes:
        max_queue_s: seconds of work that may wait.
        max_body_bytes: largest body of a request.
        max_request_tokens: most tokens of a request, over all its inputs.
        max_batch_tokens: most tokens of a pass; measured when None.
        body_timeout_s: time in which the body of a request must arrive.
        cache_bytes: size of the vector cache; 0 turns it off.
        price_per_hour: price of the machine in dollars, for the cost in the metrics.
        decoder: turns token ids of another tokenizer into text; None refuses such ids.
        log_requests: write a log line for each request.
        cors_origins: origins of web pages that may send requests from a browser.
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
