"""Limit the time and the size of requests.

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
    """Closes connections whose request head does not arrive in time (slowloris attack).

    uvicorn itself has no timeout for the head.
    """

    head_timeout_s = HEAD_TIMEOUT_S
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def on_message_begin(self) -> None:
        """Start the timer at the first byte of a further request on the connection."""
        super().on_message_begin()
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        """Stop the timer: the head has arrived."""
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer: the connection is closed."""
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
    """Read the whole body of a request.

    Raises:
        ApiError: the body is too large, or does not arrive in time.
        ClientDisconnect: the client has closed the connection.
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
            f"only {n_bytes:,} bytes of the body arrived within {timeout_s:g} s; send it again",
            code="body_timeout",
        ) from error
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body has more than {max_bytes:,} bytes, the limit of this server; send fewer inputs "
        f"per request",
        code="request_too_large",
    )


async def wait_for_hangup(receive: Any) -> None:
    """Return when the client has closed the connection. Call it after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


__all__ = ["ClientDisconnect", "ImpatientProtocol", "read_body", "wait_for_hangup"]
