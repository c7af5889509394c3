"""The HTTP side: routes, keys, error answers, the log.

Hides: starlette. Refuses to know: how vectors come to be.
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

from gteopt.server.answers import dump
from gteopt.server.connections import hung_up, read_body
from gteopt.server.engine import DeviceDied
from gteopt.server.keys import ANYBODY, Key
from gteopt.server.metrics import CONTENT_TYPE
from gteopt.server.pipeline import Call, Gone
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
from gteopt.server.tracing import span
from gteopt.version import __version__

log = logging.getLogger("gteopt.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOPBACK = ("127.0.0.1", "::1")
_HUNG_UP = 499
"""What logs and metrics say of a client that did not wait; nginx' number for it."""
Handler = Callable[[Request, Call], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """The ASGI application of a service that has been started, or will be."""
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
    """One method a route."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = (Path(__file__).parent / "page.html").read_bytes()

    async def answer(
        self, path: str, handler: Handler, is_open: bool, request: Request
    ) -> Response:
        """Any route: key, handler, errors, counts, log."""
        began = time.perf_counter()
        call = Call()
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        try:
            if not is_open:
                call.key = self._key(request)
                if self._service.is_draining:
                    raise ApiError(503, "the server is stopping", retry_after_s=1)
            with span(f"{request.method} {path}", request.headers, call.facts):
                response = await handler(request, call)
        except ApiError as error:
            response = _error_response(error)
            call.facts["error"] = error.message
        except (Gone, ClientDisconnect):
            response = Response(status_code=_HUNG_UP)
        except Exception:
            log.exception("a request failed", extra={"facts": {"id": request_id, "route": path}})
            response = _error_response(
                ApiError(500, f"the server failed; its log has request {request_id}")
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

    def _key(self, request: Request) -> Key:
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
        found = keys.find(secret.strip())
        if found is None:
            self._service.metrics.rejected.labels("wrong_key").inc()
            raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        return found

    async def _body(self, request: Request, call: Call) -> bytes:
        settings = self._service.settings
        body = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
        call.gone = asyncio.ensure_future(hung_up(request.receive))
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
        return _json(dump({"object": "list", "data": data}))

    async def model(self, request: Request, call: Call) -> Response:
        del call
        name = request.path_params["model"]
        self._service.find(name)
        return _json(dump(self._model(name)))

    def _model(self, name: str) -> dict[str, Any]:
        created = self._service.models[name].loaded_at
        return {"id": name, "object": "model", "created": created, "owned_by": "gteopt"}

    async def info(self, request: Request, call: Call) -> Response:
        del request, call
        service, settings = self._service, self._service.settings
        return _json(
            dump(
                {
                    "version": __version__,
                    "models": [each.about for each in service.models.values()],
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
        """Only an admin key may, or without keys this machine; a web page never."""
        if self._service.keys is not None:
            if not call.key.admin:
                raise ApiError(403, f"key '{call.key.name}' lacks admin=1", code="not_admin")
        elif (
            request.client is None
            or request.client.host not in _LOOPBACK
            or "origin" in request.headers
        ):
            raise ApiError(403, "without API keys only this machine may reload; SIGHUP does it too")
        body = await read_body(request, self._service.settings.max_body_bytes)
        wanted = parse_body(body or b"{}", ReloadRequest)
        return _json(dump(await self._service.reload(wanted.model)))

    async def livez(self, request: Request, call: Call) -> Response:
        del request, call
        alive = self._service.engine.is_alive
        return _json(dump({"alive": alive}), 200 if alive else 503)

    async def readyz(self, request: Request, call: Call) -> Response:
        del request, call
        problem = await self._service.not_ready()
        if problem is None:
            return _json(dump({"ready": True}))
        return _json(dump({"ready": False, "reason": problem}), 503)

    async def metrics(self, request: Request, call: Call) -> Response:
        del request, call
        return Response(self._service.metrics.page(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request, call: Call) -> Response:
        del request, call
        return _json(dump(openapi(__version__, with_keys=self._service.keys is not None)))

    async def page(self, request: Request, call: Call) -> Response:
        del request, call
        return Response(
            self._page,
            media_type="text/html; charset=utf-8",
            headers={"content-security-policy": "default-src 'self' 'unsafe-inline' data:"},
        )

    async def unrouted(self, request: Request, error: Exception) -> Response:
        """A path or a method that is not there."""
        assert isinstance(error, HTTPException)
        said = f"Invalid URL ({request.method} {request.url.path})"
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            said = f"Not allowed to {request.method} on {request.url.path}; send {allowed}"
        response = _error_response(ApiError(error.status_code, said, code="unknown_url"))
        response.headers.update(error.headers or {})
        return response


def _json(content: bytes, status: int = 200) -> Response:
    return Response(content, status_code=status, media_type="application/json")


def _error_response(error: ApiError) -> Response:
    response = _json(dump(error.body), error.status)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, round(error.retry_after_s + 0.5)))
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, message and facts."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
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
    """Call `died` when the device thread ends or hangs, after everybody who waits was told."""
    while service.engine.is_alive:
        await asyncio.sleep(every_s)
    log.critical(
        "the device failed",
        extra={"facts": {"reason": repr(service.engine.death or "a pass that does not end")}},
    )
    service.engine.fail_all(DeviceDied("the device failed"))
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0.2)  # for the answers
    died()
