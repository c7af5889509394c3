"""What the HTTP server does with slow and with large requests.

Hides: uvicorn's protocol class. Refuses to know: routes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gteopt.server.schema import ApiError

HEAD_TIMEOUT_S = 15.0
BODY_TIMEOUT_S = 60.0


class ImpatientProtocol(HttpToolsProtocol):
    """Closes connections whose request head does not arrive in time (slowloris).

    uvicorn waits for it for ever.
    """

    head_timeout_s = HEAD_TIMEOUT_S
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the head."""
        super().connection_made(transport)
        self._wait_for_head()

    def on_message_begin(self) -> None:
        """The first byte of a further request on the connection is there."""
        super().on_message_begin()
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


async def read_body(request: Request, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """The whole body of a request.

    Raises:
        ApiError: it is too large, or not there in time.
        ClientDisconnect: the client has hung up.
    """
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    n_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
    except TimeoutError as error:
        raise ApiError(
            408,
            f"the body did not arrive within {timeout_s:g} s ({n_bytes:,} bytes did); send it anew",
            code="body_timeout",
        ) from error
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {max_bytes:,} bytes, the most that this server takes; send fewer "
        f"inputs a request",
        code="request_too_large",
    )


async def hung_up(receive: Any) -> None:
    """Return when the client has closed the connection; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


__all__ = ["ClientDisconnect", "ImpatientProtocol", "hung_up", "read_body"]
