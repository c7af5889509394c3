"""Options and arguments that several commands share, each with its help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
HubDir = Annotated[
    Path | None,
    typer.Option(
        help="read models and data sets from DIR/ORG/NAME; the network is never touched",
        envvar="GTEOPT_HUB_DIR",
        metavar="DIR",
    ),
]
BackendOption = Annotated[
    Literal["torch", "openvino"],
    typer.Option(
        help="what computes the variants (the baseline is torch's): openvino is the faster one on "
        "a CPU with VNNI or AMX"
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(help="score with one process a device: cuda:0,cuda:1, or cpu,cpu", metavar="LIST"),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="score on a Ray cluster: auto (the one that this machine is in), or HOST:PORT",
        metavar="auto|ADDRESS",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print the record as JSON on stdout")]
Family = Annotated[
    str | None,
    typer.Option(
        help="family of the base, where neither its files nor its name tell: gte-qwen, "
        "qwen3-embedding, e5-mistral, nv-embed"
    ),
]
EffortOption = Annotated[
    Literal["fast", "standard", "best"] | None,
    typer.Option(
        help="of GPTQ recipes: the solver alone, or its result tuned against the base's "
        "vectors for 400 or 1600 steps (beyond 2 billion weights scales, norms and biases of "
        "each block against the base's, for 100 or 400); mixed-nf4 of all-MiniLM-L6-v2 takes "
        "4, 15 and 60 minutes of one core; the recipe's own when left out"
    ),
]
EmbedInt8 = Annotated[
    bool, typer.Option("--embed-int8", help="keep the token embedding table in int8 too")
]
FormatOption = Annotated[
    Literal["auto", "gptq", "compressed-tensors", "bitsandbytes", "gteopt"] | None,
    typer.Option(
        help="how quantized weights lie on disk: whose checkpoint format, or gteopt's own; the "
        "recipe's own when left out"
    ),
]
KeptDtype = Annotated[str, typer.Option(help="of what stays unquantized")]


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be counted with")
    return value


ActivationGb = Annotated[
    float,
    typer.Option(
        min=0,
        callback=_finite,
        help="memory for the calibration texts' hidden states; the others lie on disk beside "
        "the artifact while it is built",
    ),
]
Out = Annotated[Path, typer.Option(help="folder of the new artifact; must not exist yet")]
Base = Annotated[str, typer.Argument(help="'nano', a folder, or ORG/NAME")]
Repo = Annotated[str, typer.Option(help="ORG/NAME on the model hub", metavar="ORG/NAME")]
Artifacts = Annotated[list[str], typer.Argument(help="artifact folders, or bases")]
