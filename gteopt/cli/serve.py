"""The command that serves artifacts over HTTP."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gteopt.cli.names import check_model_name
from gteopt.cli.options import (
    LIMITS,
    LISTEN,
    WHERE,
    BackendOption,
    Device,
    HubDir,
    Kernels,
    check_finite_option,
    price_option,
)
from gteopt.cli.output import show_backend, stderr, stdout

if TYPE_CHECKING:
    from gteopt.server.service import Service


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(help="artifact folders or bases; NAME=ARTIFACT sets the model's name"),
    ],
    host: Annotated[
        str,
        typer.Option(
            help="address to listen on; 0.0.0.0 is every network",
            rich_help_panel=LISTEN,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="port; 0 takes any free port", rich_help_panel=LISTEN),
    ] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="file of API keys, one a line; requests need one",
            metavar="FILE",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    backend: BackendOption = "torch",
    kernels: Kernels = "deterministic",
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="dtype to compute in; auto is the dtype of the artifact's build, or bfloat16",
            rich_help_panel=WHERE,
        ),
    ] = "auto",
    hub_dir: HubDir = None,
    max_queue_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            callback=check_finite_option,
            help="seconds of work that may wait; further requests get an error to retry",
            rich_help_panel=LIMITS,
        ),
    ] = 30,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="tokens per batch; measured when left out", rich_help_panel=LIMITS
        ),
    ] = None,
    cache_mb: Annotated[
        int,
        typer.Option(
            min=0,
            help="MiB of memory to cache vectors of earlier texts",
            rich_help_panel=LIMITS,
        ),
    ] = 0,
    decode_tokens: Annotated[
        str | None,
        typer.Option(
            help="tokenizer of token ids, such as cl100k_base",
            metavar="NAME",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        price_option(LISTEN, "dollars per hour of the machine, for /metrics"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="origin of web pages whose scripts may send requests",
            metavar="ORIGIN",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option(help="log a line per request", rich_help_panel=LISTEN)
    ] = False,
) -> None:
    """Serve artifacts as an OpenAI-compatible embeddings API.

    Example: `gteopt serve artifacts/demo/variants/gptq-int4`
    """
    from gteopt.commands.serve import (
        ServerRuntime,
        check_server_installed,
        configure_server_logs,
        open_token_decoder,
        parse_served_sources,
    )
    from gteopt.commands.serve import serve as serve_until_stopped

    check_server_installed()
    for source in parse_served_sources(artifacts).values():
        check_model_name(source)
    # Passes have some hundred shapes; oneDNN caches compiled kernels for 1,024 by default.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    from gteopt.server.keys import read_api_keys
    from gteopt.server.settings import ServerSettings

    settings = ServerSettings(
        max_queue_s=max_queue_seconds,
        max_batch_tokens=max_batch_tokens,
        cache_bytes=cache_mb << 20,
        price_per_hour=price_per_hour,
        decoder=open_token_decoder(decode_tokens) if decode_tokens is not None else None,
        log_requests=log_requests,
        cors_origins=tuple(cors_origin or ()),
    )
    keys = read_api_keys(api_keys) if api_keys is not None else None
    if keys is None and host not in ("127.0.0.1", "::1", "localhost"):
        stderr.print(
            f"gteopt: anybody who can reach {host} may use this server; give --api-keys FILE",
            style="yellow",
            soft_wrap=True,
        )
    configure_server_logs(sys.stderr)
    runtime = ServerRuntime(
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        backend=backend,
        kernels=kernels,
        hub_dir=hub_dir,
    )
    stderr.print(f"loading {', '.join(artifacts)}", style="dim", markup=False, soft_wrap=True)
    code = serve_until_stopped(artifacts, runtime, settings, keys, on_ready=_show_served)
    raise typer.Exit(code)


def _show_served(url: str, service: Service) -> None:
    for name, served in service.models.items():
        runtime = served.encoder.runtime
        if runtime.backend_reason is not None:
            show_backend(name, runtime.backend, runtime.backend_reason)
        stdout.print(
            f"{name}: {served.encoder.name}, {served.encoder.dims} dimensions, up to "
            f"{served.tokenization.max_tokens:,} tokens a text, about {served.batch_tokens:,} "
            f"tokens a batch",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    stdout.print(f"Serving at {url} (Ctrl-C stops)", highlight=False, soft_wrap=True)
    sys.stdout.flush()
