"""A real server on loopback, in a thread."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn

from gteopt.commands.serve import configure_uvicorn
from gteopt.encoder import Encoder
from gteopt.encoder.loading import load
from gteopt.server.keys import ApiKeys
from gteopt.server.service import Service
from gteopt.server.settings import ServerSettings


@dataclass
class Running:
    """A running server.

    Attributes:
        url: address on which the server listens.
        service: the service that computes its answers.
        client: sends requests to the server.
    """

    url: str
    service: Service
    client: httpx.Client

    def embed(self, **fields: object) -> httpx.Response:
        return self.client.post("/v1/embeddings", json={"model": "nano", **fields})


@contextmanager
def running(
    sources: dict[str, str], settings: ServerSettings | None = None, keys: ApiKeys | None = None
) -> Iterator[Running]:
    """Serve in a thread, as `gteopt serve` does in the main one."""
    settings = settings or ServerSettings()

    def open_encoder(source: str) -> Encoder:
        return load(source, dtype="float32")

    service = Service(sources, open_encoder, settings, keys)
    service.start()
    server = uvicorn.Server(configure_uvicorn(service))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.listen()
        # Only the main thread can handle signals.
        thread = threading.Thread(target=lambda: asyncio.run(server._serve([listener])))
        thread.start()
        try:
            with httpx.Client(base_url=url, timeout=300) as client:
                yield Running(url, service, client)
        finally:
            server.should_exit = True
            thread.join()
            service.stop()
