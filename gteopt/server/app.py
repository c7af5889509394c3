"""Serve HTTP: routes, keys, error answers, the log.

Hides: starlette. Refuses to know: how vectors are computed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gteopt.server.answers import encode_json
from gteopt.server.connections import read_body, wait_for_hangup
from gteopt.server.engine import DeviceDied
from gteopt.server.keys import ANYBODY, ApiKey
from gteopt.server.metrics import CONTENT_TYPE
from gteopt.server.pipeline import Call, ClientGone
from gteopt.server.schema import (
    ApiError,
    EmbeddingRequest,
    ReloadRequest,
    SimilarityRequest,
    TeiRequest,
    TokenizeRequest,
    openapi,
    parse_body,
)
from gteopt.server.service import Service
from gteopt.server.tracing import record_span
from gteopt.version import __version__

log = logging.getLogger("gteopt.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOPBACK = ("127.0.0.1", "::1")
_HUNG_UP = 499
"""Status in logs and metrics when the client closed the connection, as in nginx."""
Handler = Callable[[Request, Call], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """Create the ASGI application of a service, which may be started later."""
    routes = _Routes(service)
    middleware = []
    if service.settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(service.settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
            )
        )

    def route(path: str, handler: Handler, method: str = "GET", *, is_open: bool = False) -> Route:
        endpoint = partial(routes.answer, path, handler, is_open)
        return Route(path, endpoint, methods=[method])

    return Starlette(
        routes=[
            route("/v1/embeddings", routes.embeddings, "POST"),
            route("/embeddings", routes.embeddings, "POST"),
            route("/v1/models", routes.models),
            route("/v1/models/{model:path}", routes.model),
            route("/tokenize", routes.tokenize, "POST"),
            route("/similarity", routes.similarity, "POST"),
            route("/embed", routes.tei, "POST"),
            route("/info", routes.info),
            route("/admin/reload", routes.reload, "POST"),
            route("/livez", routes.livez, is_open=True),
            route("/readyz", routes.readyz, is_open=True),
            route("/metrics", routes.metrics, is_open=True),
            route("/openapi.json", routes.openapi, is_open=True),
            route("/", routes.page, is_open=True),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: routes.unrouted},
    )


class _Routes:
    """One method per route."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = (Path(__file__).parent / "page.html").read_bytes()

    async def answer(
        self, path: str, handler: Handler, is_open: bool, request: Request
    ) -> Response:
        """Answer a request of any route: check the key, call the handler, count and log.

        Args:
            path: the route, for metrics and logs.
            handler: answers the route.
            is_open: whether the route needs no key and works while the server is draining.
            request: the HTTP request.
        """
        began = time.perf_counter()
        call = Call()
        client_id = request.headers.get("x-request-id", "")
        request_id = client_id if _REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex
        try:
            if not is_open:
                call.key = self._key(request)
                if self._service.is_draining:
                    raise ApiError(503, "the server is stopping", retry_after_s=1)
            with record_span(f"{request.method} {path}", request.headers, call.facts):
                response = await handler(request, call)
        except ApiError as error:
            response = _error_response(error)
            call.facts["error"] = error.message
        except (ClientGone, ClientDisconnect):
            response = Response(status_code=_HUNG_UP)
        except Exception:
            log.exception("a request failed", extra={"facts": {"id": request_id, "route": path}})
            response = _error_response(
                ApiError(500, f"the server failed; see request {request_id} in its log")
            )
        finally:
            if call.gone is not None:
                call.gone.cancel()
        took = time.perf_counter() - began
        response.headers["x-request-id"] = request_id
        if self._service.is_draining:
            response.headers["connection"] = "close"
        self._service.metrics.requests.labels(path, str(response.status_code)).inc()
        self._service.metrics.request_seconds.labels(path).observe(took)
        if self._service.settings.log_requests:
            facts = {
                "id": request_id,
                "route": path,
                "status": response.status_code,
                "ms": round(1000 * took, 1),
                "key": call.key.name,
                **call.facts,
            }
            log.info("request", extra={"facts": facts})
        return response

    def _key(self, request: Request) -> ApiKey:
        keys = self._service.keys
        if keys is None:
            return ANYBODY
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise ApiError(
                401,
                "You didn't provide an API key. Send it in an Authorization header: Bearer KEY",
                code="invalid_api_key",
            )
        key = keys.find(secret.strip())
        if key is None:
            self._service.metrics.rejected.labels("wrong_key").inc()
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        return key

    async def _body(self, request: Request, call: Call) -> bytes:
        settings = self._service.settings
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
        call.gone = asyncio.ensure_future(wait_for_hangup(request.receive))
        return body

    async def embeddings(self, request: Request, call: Call) -> Response:
        body = parse_body(await self._body(request, call), EmbeddingRequest)
        return _json(await self._service.embeddings(body, call))

    async def tokenize(self, request: Request, call: Call) -> Response:
        body = parse_body(await self._body(request, call), TokenizeRequest)
        return _json(await self._service.tokenize(body, call))

    async def similarity(self, request: Request, call: Call) -> Response:
        body = parse_body(await self._body(request, call), SimilarityRequest)
        return _json(await self._service.similarity(body, call))

    async def tei(self, request: Request, call: Call) -> Response:
        body = parse_body(await self._body(request, call), TeiRequest)
        return _json(await self._service.tei(body, call))

    async def models(self, request: Request, call: Call) -> Response:
        del request, call
        data = [self._model(name) for name in self._service.models]
        return _json(encode_json({"object": "list", "data": data}))

    async def model(self, request: Request, call: Call) -> Response:
        del call
        name = request.path_params["model"]
        self._service.find(name)
        return _json(encode_json(self._model(name)))

    def _model(self, name: str) -> dict[str, Any]:
        created = self._service.models[name].loaded_at
        return {"id": name, "object": "model", "created": created, "owned_by": "gteopt"}

    async def info(self, request: Request, call: Call) -> Response:
        del request, call
        service, settings = self._service, self._service.settings
        return _json(
            encode_json(
                {
                    "version": __version__,
                    "models": [served.about for served in service.models.values()],
                    "limits": {
                        "max_inputs": 2048,
                        "max_request_tokens": settings.max_request_tokens,
                        "max_body_bytes": settings.max_body_bytes,
                        "max_queue_seconds": settings.max_queue_s,
                    },
                    "queued_seconds": round(service.engine.queued_s, 3),
                    "waiting_requests": service.engine.n_waiting,
                }
            )
        )

    async def reload(self, request: Request, call: Call) -> Response:
        """Reload artifacts. With keys, it needs an admin key.

        Without keys, only clients on this machine may reload, and no web pages.
        """
        if self._service.keys is not None:
            if not call.key.admin:
                raise ApiError(
                    403, f"key '{call.key.name}' may not reload; it needs admin=1", code="not_admin"
                )
        elif (
            request.client is None
            or request.client.host not in _LOOPBACK
            or "origin" in request.headers
        ):
            raise ApiError(
                403,
                "without API keys, only clients on the server's machine may reload; send the "
                "request from there, or SIGHUP to the process",
            )
        body = await read_body(request, self._service.settings.max_body_bytes)
        reload_request = parse_body(body or b"{}", ReloadRequest)
        return _json(encode_json(await self._service.reload(reload_request.model)))

    async def livez(self, request: Request, call: Call) -> Response:
        del request, call
        alive = self._service.engine.is_alive
        return _json(encode_json({"alive": alive}), 200 if alive else 503)

    async def readyz(self, request: Request, call: Call) -> Response:
        del request, call
        problem = await self._service.not_ready()
        if problem is None:
            return _json(encode_json({"ready": True}))
        return _json(encode_json({"ready": False, "reason": problem}), 503)

    async def metrics(self, request: Request, call: Call) -> Response:
        del request, call
        return Response(self._service.metrics.page(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request, call: Call) -> Response:
        del request, call
        return _json(encode_json(openapi(__version__, with_keys=self._service.keys is not None)))

    async def page(self, request: Request, call: Call) -> Response:
        del request, call
        return Response(
            self._page,
            media_type="text/html; charset=utf-8",
            headers={"content-security-policy": "default-src 'self' 'unsafe-inline' data:"},
        )

    async def unrouted(self, request: Request, error: Exception) -> Response:
        """Answer a path or a method that does not exist."""
        assert isinstance(error, HTTPException)
        message = f"Invalid URL ({request.method} {request.url.path})"
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{request.url.path} does not support {request.method}; send {allowed}"
        response = _error_response(ApiError(error.status_code, message, code="unknown_url"))
        response.headers.update(error.headers or {})
        return response


def _json(content: bytes, status: int = 200) -> Response:
    return Response(content, status_code=status, media_type="application/json")


def _error_response(error: ApiError) -> Response:
    response = _json(encode_json(error.body), error.status)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, round(error.retry_after_s + 0.5)))
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON: time, level, message and facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


async def watch_device(service: Service, died: Callable[[], None], every_s: float = 1.0) -> None:
    """Call `died` when the device thread ends or hangs, after all waiting requests have failed."""
    while service.engine.is_alive:
        await asyncio.sleep(every_s)
    log.critical(
        "the device failed",
        extra={"facts": {"reason": repr(service.engine.death or "a pass does not end")}},
    )
    service.engine.fail_all(DeviceDied("the device failed"))
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0.2)  # time to send the answers
    died()
