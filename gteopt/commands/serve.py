"""`gteopt serve`: load artifacts, listen, answer until told to stop.

Hides: sockets, signals, uvicorn's settings, which extra is needed. Refuses to know: routes, how
vectors come to be.
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

from gteopt.errors import InputError, UnsupportedError, suggest

if TYPE_CHECKING:
    import uvicorn

    from gteopt.encoder import Encoder
    from gteopt.server.keys import Keys
    from gteopt.server.service import Service
    from gteopt.server.settings import Decoder, Settings

_DRAIN_S = 25
_SWITCH_S = 0.5e-3
"""Between threads; Python's own 5 ms are as long as a whole pass over a short query."""
_DEVICE_DIED = 70
"""Exit code by which a supervisor knows that a new process is all that helps (EX_SOFTWARE)."""
log = logging.getLogger("gteopt.server")


@dataclass(frozen=True)
class ServerRuntime:
    """Where a server listens, and how artifacts get onto the device.

    Attributes:
        host: an address of this machine.
        port: 0 is any free one.
        device: see `gteopt.load`, as for the others.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"
    backend: Literal["torch", "openvino"] = "torch"
    kernels: str = "deterministic"
    hub_dir: Path | None = None


@dataclass
class _State:
    exit_code: int = 0
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


def serve(
    sources: Sequence[str],
    runtime: ServerRuntime,
    settings: Settings,
    keys: Keys | None = None,
    *,
    on_ready: Callable[[str, Service], None] = lambda url, service: None,
) -> int:
    """Serve artifacts until SIGTERM or Ctrl-C; what is at work then is finished.

    SIGHUP loads all artifacts anew and swaps them in.

    Args:
        sources: artifacts or bases, each as SOURCE or NAME=SOURCE.
        runtime: see there.
        settings: what is allowed and kept.
        keys: who may ask; None is everybody.
        on_ready: told the URL when everything is loaded.

    Returns:
        The exit code: 0, or 70 where the device died.

    Raises:
        GteoptError: a source, the port or the installation is wrong; before anything is loaded
            where that can be known.
    """
    check_installed()
    named = parse_sources(sources)
    _raise_file_limit()
    # Requests are told of texts that are too long; a warning would be for nobody.
    warnings.filterwarnings("ignore", message=".*were cut there")
    with _listening(runtime) as listener, _quick_switches():
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        service = _open_service(named, runtime, settings, keys)
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
            os._exit(code)  # a thread that hangs in a driver lets no process end in order
    return code


def _open_service(
    named: dict[str, str], runtime: ServerRuntime, settings: Settings, keys: Keys | None
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

    return Service(named, open_encoder, settings, keys)


def configure(service: Service) -> uvicorn.Config:
    """How uvicorn serves it."""
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
        """uvicorn without its own signals, which would end the process with their number."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    server = Server(configure(service))
    loop = asyncio.get_running_loop()

    def drain() -> None:
        log.info("draining", extra={"facts": {"waiting": service.engine.n_waiting}})
        server.force_exit = service.is_draining  # asked twice
        service.is_draining = True
        server.should_exit = True

    def died() -> None:
        state.exit_code = _DEVICE_DIED
        server.should_exit = server.force_exit = True

    def spawn(task: Any) -> None:
        own = loop.create_task(task)
        state.tasks.add(own)
        own.add_done_callback(state.tasks.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
    loop.add_signal_handler(signal.SIGHUP, lambda: spawn(_reload(service)))
    spawn(watch_device(service, died))
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
    except ImportError:  # it does not exist for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def check_installed() -> None:
    """Refuse early where the extra is missing.

    Raises:
        UnsupportedError: with the line that installs it.
    """
    try:
        import httptools  # noqa: F401
        import orjson  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"gteopt serve needs {error.name}, which is not installed: pip install 'gteopt[serve]'"
        ) from error


def parse_sources(sources: Sequence[str]) -> dict[str, str]:
    """What is served by name: NAME=SOURCE, or SOURCE, whose last part is its name.

    Raises:
        InputError: none, an empty name, or two of one name.
    """
    named: dict[str, str] = {}
    for each in sources:
        name, equals, source = each.partition("=")
        if not equals or Path(each).exists():
            name, source = Path(each).name, each
        if not name or not source:
            raise InputError(f"'{each}': write NAME=ARTIFACT, or an artifact's folder")
        if name in named:
            raise InputError(
                f"two artifacts are called '{name}' ({named[name]}, {source}); write "
                f"OTHERNAME={source}"
            )
        named[name] = source
    if not named:
        raise InputError("name an artifact to serve: gteopt serve artifacts/demo/gptq-int4")
    return named


def open_decoder(name: str) -> Decoder:
    """What reads token ids of OpenAI's tokenizers, `cl100k_base` for one.

    Raises:
        InputError: there is no such tokenizer, or its vocabulary is not here.
        UnsupportedError: tiktoken is missing.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise UnsupportedError("--decode-tokens needs tiktoken: pip install tiktoken") from error
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise InputError(f"--decode-tokens {name}: unknown; {suggest(name, known)}")
    try:
        found: Decoder = tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken fetches it, with whatever may go wrong
        raise InputError(
            f"--decode-tokens {name}: tiktoken cannot fetch its vocabulary "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from error
    return found


@contextmanager
def _listening(runtime: ServerRuntime) -> Iterator[socket.socket]:
    """The socket, bound before the slow part; nobody is let in before everything is loaded."""
    try:
        found = socket.getaddrinfo(runtime.host, runtime.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
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
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _raise_file_limit() -> None:
    """A connection is a file; the soft limit is often 1,024."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


def log_to(stream: Any) -> None:
    """Write the server's log, and what uvicorn has to say, as JSON lines."""
    from gteopt.server.app import JsonLines

    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    levels = {"gteopt.server": logging.INFO, "uvicorn.error": logging.WARNING}
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
