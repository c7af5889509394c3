"""`gteopt serve`: load artifacts, and answer requests until a signal stops the server.

Hides: sockets, signals, uvicorn's settings, which extra is needed. Refuses to know: routes, how
vectors are computed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gteopt.errors import InputError, UnsupportedError, install_command, suggest_names

if TYPE_CHECKING:
    import uvicorn

    from gteopt.encoder import Encoder
    from gteopt.server.keys import ApiKeys
    from gteopt.server.service import Service
    from gteopt.server.settings import Decoder, ServerSettings

_DRAIN_S = 25
_SWITCH_S = 0.5e-3
"""Interval of thread switches; Python's default of 5 ms is as long as encoding a short query."""
_DEVICE_DIED = 70
"""Exit code (EX_SOFTWARE) that tells a supervisor to start a new process."""
log = logging.getLogger("gteopt.server")


@dataclass(frozen=True)
class ServerRuntime:
    """Where a server listens, and how it loads artifacts.

    Attributes:
        host: an address of this machine.
        port: the port; 0 takes any free port.
        device: see `gteopt.load`, as for the other fields.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"
    backend: Literal["auto", "torch", "openvino"] = "torch"
    kernels: str = "deterministic"
    hub_dir: Path | None = None


@dataclass
class _State:
    exit_code: int = 0
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


def serve(
    sources: Sequence[str],
    runtime: ServerRuntime,
    settings: ServerSettings,
    keys: ApiKeys | None = None,
    *,
    on_ready: Callable[[str, Service], None] = lambda url, service: None,
) -> int:
    """Serve artifacts until SIGTERM or Ctrl-C; requests that already run are finished.

    SIGHUP loads all artifacts again and replaces the old ones.

    Args:
        sources: artifacts or bases, each as SOURCE or NAME=SOURCE.
        runtime: address and device.
        settings: limits, caches and logging.
        keys: API keys; None accepts everybody.
        on_ready: called with the URL when everything is loaded.

    Returns:
        The exit code: 0, or 70 where the device failed.

    Raises:
        GteoptError: a source, the port or the installation is wrong, if possible before anything is
            loaded.
    """
    check_server_installed()
    by_name = parse_served_sources(sources)
    _raise_file_limit()
    # Responses report texts that are too long; nobody would see a warning.
    warnings.filterwarnings("ignore", message=".*were cut there")
    with _listening(runtime) as listener, _quick_switches():
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        service = _open_service(by_name, runtime, settings, keys)
        try:
            service.start()
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                code = runner.run(_run(service, listener, lambda: on_ready(url, service)))
        finally:
            if service.engine.is_alive:
                service.stop()
        if code == _DEVICE_DIED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # a thread that hangs in a driver would block a normal exit
    return code


def _open_service(
    sources: dict[str, str], runtime: ServerRuntime, settings: ServerSettings, keys: ApiKeys | None
) -> Service:
    from gteopt.encoder.loading import load
    from gteopt.server.service import Service

    def open_encoder(source: str) -> Encoder:
        return load(
            source,
            device=runtime.device,
            dtype=runtime.dtype,
            backend=runtime.backend,
            kernels=runtime.kernels,
            hub_dir=runtime.hub_dir,
        )

    return Service(sources, open_encoder, settings, keys)


def configure_uvicorn(service: Service) -> uvicorn.Config:
    """The settings with which uvicorn runs a service."""
    import uvicorn

    from gteopt.server.app import make_app
    from gteopt.server.connections import ImpatientProtocol

    return uvicorn.Config(
        make_app(service),
        http=ImpatientProtocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_DRAIN_S,
        backlog=4096,
        ws="none",
    )


async def _run(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> int:
    import uvicorn

    from gteopt.server.app import watch_device

    state = _State()

    class Server(uvicorn.Server):
        """uvicorn without its signal handlers, which would set the exit code."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    server = Server(configure_uvicorn(service))
    loop = asyncio.get_running_loop()

    def drain() -> None:
        log.info("draining", extra={"facts": {"waiting": service.engine.n_waiting}})
        server.force_exit = service.is_draining  # a second signal stops at once
        service.is_draining = True
        server.should_exit = True

    def stop_now() -> None:
        state.exit_code = _DEVICE_DIED
        server.should_exit = server.force_exit = True

    def spawn(coroutine: Any) -> None:
        task = loop.create_task(coroutine)
        state.tasks.add(task)
        task.add_done_callback(state.tasks.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
    loop.add_signal_handler(signal.SIGHUP, lambda: spawn(_reload(service)))
    spawn(watch_device(service, stop_now))
    await server.serve(sockets=[listener])
    for task in list(state.tasks):
        task.cancel()
    return state.exit_code


async def _reload(service: Service) -> None:
    from gteopt.server.schema import ApiError

    try:
        log.info("reloaded", extra={"facts": await service.reload()})
    except ApiError as error:
        log.error(error.message)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # uvloop does not exist for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def check_server_installed() -> None:
    """Refuse early where the extra is not installed.

    Raises:
        UnsupportedError: the message holds the line that installs it.
    """
    try:
        import httptools  # noqa: F401
        import orjson  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"gteopt serve needs {error.name}, which is not installed: {install_command('serve')}"
        ) from error


def parse_served_sources(sources: Sequence[str]) -> dict[str, str]:
    """Sources by name, from NAME=SOURCE, or from SOURCE, whose last part is the name.

    Raises:
        InputError: no source, an empty name, or two sources of one name.
    """
    by_name: dict[str, str] = {}
    for text in sources:
        name, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            name, source = Path(text).name, text
        if not name or not source:
            raise InputError(f"'{text}': write NAME=ARTIFACT, or an artifact's folder")
        if name in by_name:
            raise InputError(
                f"two artifacts are named '{name}' ({by_name[name]}, {source}); write "
                f"OTHERNAME={source}"
            )
        by_name[name] = source
    if not by_name:
        raise InputError(
            "name an artifact to serve: gteopt serve artifacts/demo/variants/gptq-int4"
        )
    return by_name


def open_token_decoder(name: str) -> Decoder:
    """A decoder of token ids of an OpenAI tokenizer, such as `cl100k_base`.

    Raises:
        InputError: there is no such tokenizer, or its vocabulary cannot be fetched.
        UnsupportedError: tiktoken is not installed.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UnsupportedError("--decode-tokens needs tiktoken: pip install tiktoken") from error
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise InputError(f"--decode-tokens {name}: unknown; {suggest_names(name, known)}")
    try:
        decoder: Decoder = tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken downloads the vocabulary, which may fail in many ways
        raise InputError(
            f"--decode-tokens {name}: tiktoken cannot fetch its vocabulary "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from error
    return decoder


@contextmanager
def _listening(runtime: ServerRuntime) -> Iterator[socket.socket]:
    """The socket, bound before artifacts are loaded; it accepts connections only afterwards."""
    try:
        addresses = socket.getaddrinfo(runtime.host, runtime.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {runtime.host}: {error.strerror or error}") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise InputError(
                f"--port {runtime.port} of {runtime.host}: {error.strerror or error}; "
                "give another port"
            ) from error
        yield listener


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Switch threads more often, so that short requests need not wait."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _raise_file_limit() -> None:
    """Raise the soft limit of open files, often 1,024, because each connection needs one."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


def configure_server_logs(stream: Any) -> None:
    """Write the logs of the server and of uvicorn as JSON lines."""
    from gteopt.server.app import JsonLines

    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    levels = {"gteopt.server": logging.INFO, "uvicorn.error": logging.WARNING}
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
