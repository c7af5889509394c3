"""Options and arguments that several commands share, with their help texts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gteopt.cli.names import check_model_name, complete_shipped_names
from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.config.yaml_files import ShippedKind


JUDGES, LIMITS, WHERE = "What to judge on", "Limits", "Where to compute"
MEASURE, BUILD, OUTPUT = "What to measure", "What to build", "Output"
EMBED, JOB, FIND = "What to embed", "The job", "What to find"
LISTEN, PUBLISH = "The server", "What to publish"
"""Groups of options in a command's help."""


def check_device_option(context: typer.Context, value: str) -> str:
    """Refuse a device name that torch does not know, without importing torch."""
    if not context.resilient_parsing and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        hint = "; did you mean cuda?" if value == "gpu" else ""
        raise InputError(f"unknown device '{value}': use auto, cpu, cuda or cuda:N{hint}")
    return value


def check_model_option(
    context: typer.Context, value: str | list[str] | None
) -> str | list[str] | None:
    """Refuse a name that is neither a folder, "nano" nor a possible Hub id."""
    if not context.resilient_parsing:
        for name in [value] if isinstance(value, str) else value or []:
            check_model_name(name)
    return value


def check_artifact_option(context: typer.Context, value: Path) -> Path:
    """Refuse an artifact folder that does not exist."""
    if not context.resilient_parsing and not value.exists():
        raise InputError(f"there is no folder {value}; give the folder of an artifact")
    return value


def check_file_option(kind: ShippedKind) -> Callable[..., str | None]:
    """A callback that refuses a name that is neither shipped nor a YAML file."""

    def check(context: typer.Context, value: str | None) -> str | None:
        if value is not None and not context.resilient_parsing:
            from gteopt.config.yaml_files import find_yaml

            find_yaml(kind, value)
        return value

    return check


def check_finite_option(value: float | None) -> float | None:
    """Refuse infinity and NaN."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def shipped_option(kind: ShippedKind, panel: str, help: str) -> Any:
    """An option that takes a shipped name or a YAML file, checked before the command runs."""
    return typer.Option(
        help=help,
        callback=check_file_option(kind),
        autocompletion=complete_shipped_names(kind),
        rich_help_panel=panel,
    )


def price_option(panel: str, help: str) -> Any:
    """An option that takes a price per hour."""
    return typer.Option(min=0, callback=check_finite_option, help=help, rich_help_panel=panel)


Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:N", callback=check_device_option, rich_help_panel=WHERE
    ),
]
OwnData = Annotated[
    Path | None,
    typer.Option(
        help="your labelled data: BEIR folder, table of pairs or passages, or ORG/NAME on the Hub",
        metavar="FILE|FOLDER|NAME",
        rich_help_panel=JUDGES,
    ),
]
OwnTexts = Annotated[
    Path | None,
    typer.Option(
        help="your texts without labels, one per line; closeness to the baseline decides",
        metavar="FILE",
        rich_help_panel=JUDGES,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="column names by role: query=question,positive=answer",
        metavar="ROLE=NAME,...",
        rich_help_panel=JUDGES,
    ),
]
Languages = Annotated[
    str | None,
    typer.Option(
        help="score the suite only in these languages: en,fr",
        metavar="CODE,...",
        rich_help_panel=JUDGES,
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="score the tasks that fit this time and predict the suite's mean best: 30m",
        rich_help_panel=JUDGES,
    ),
]
RecipeName = Annotated[
    str, shipped_option("recipes", BUILD, "a shipped recipe (`gteopt recipes`), or a file")
]
RecipeChoice = Annotated[
    str | None,
    shipped_option(
        "recipes", BUILD, "a shipped recipe, or a file; all shipped recipes when left out"
    ),
]
SuiteName = Annotated[
    str | None,
    shipped_option("eval/suites", JUDGES, "a shipped suite (`gteopt suites`), or a file"),
]
PolicyName = Annotated[
    str,
    shipped_option("recipes/policies", LIMITS, "a shipped policy (`gteopt policies`), or a file"),
]
PlanName = Annotated[
    str,
    typer.Argument(
        help="a plan's YAML file, or a shipped plan (`gteopt plans`)",
        callback=check_file_option("recipes/plans"),
        autocompletion=complete_shipped_names("recipes/plans"),
    ),
]
HubDir = Annotated[
    Path | None,
    typer.Option(
        help="read models and data sets from DIR/ORG/NAME, and never use the network",
        envvar="GTEOPT_HUB_DIR",
        metavar="DIR",
        rich_help_panel=WHERE,
    ),
]
BackendOption = Annotated[
    Literal["auto", "torch", "openvino"],
    typer.Option(
        help="library that computes variants; auto measures once which is faster here",
        rich_help_panel=WHERE,
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        "--kernels",
        help="how a CPU multiplies: deterministic, measured, decoded, fbgemm, onednn or int_mm",
        rich_help_panel=WHERE,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="score with one process per device: cuda:0,cuda:1, or cpu,cpu",
        metavar="LIST",
        rich_help_panel=WHERE,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        help="score on a Ray cluster: auto (this machine's cluster), or HOST:PORT",
        metavar="auto|ADDRESS",
        rich_help_panel=WHERE,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="print the record as JSON on stdout", rich_help_panel=OUTPUT),
]
AsCsv = Annotated[
    bool, typer.Option("--csv", help="print the table as CSV", rich_help_panel=OUTPUT)
]
AsMarkdown = Annotated[
    bool, typer.Option("--markdown", help="print the table as Markdown", rich_help_panel=OUTPUT)
]
Family = Annotated[
    str | None,
    typer.Option(
        help="model family, if the base's files do not tell it: gte-qwen",
        rich_help_panel=BUILD,
    ),
]
EffortOption = Annotated[
    Literal["fast", "standard", "best"] | None,
    typer.Option(
        help="effort of GPTQ recipes: standard and best also tune, which takes longer",
        rich_help_panel=BUILD,
    ),
]
EmbedInt8 = Annotated[
    bool,
    typer.Option(
        "--embed-int8", help="store the token embedding table in int8 too", rich_help_panel=BUILD
    ),
]
FormatOption = Annotated[
    Literal["auto", "gptq", "compressed-tensors", "bitsandbytes", "gteopt"] | None,
    typer.Option(
        help="auto, gptq, compressed-tensors, bitsandbytes or gteopt; the recipe's when left out",
        metavar="FORMAT",
        rich_help_panel=BUILD,
    ),
]
KeptDtype = Annotated[
    str, typer.Option(help="dtype of the layers that are not quantized", rich_help_panel=BUILD)
]
Revision = Annotated[
    str | None, typer.Option(help="commit or tag on the Hub", rich_help_panel=BUILD)
]
ActivationGb = Annotated[
    float,
    typer.Option(
        min=0,
        callback=check_finite_option,
        help="GiB of memory for hidden states of calibration texts; the rest goes to disk",
        rich_help_panel=WHERE,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        help="folder for the new artifact, new or empty; if it already is this artifact, nothing "
        "changes",
        rich_help_panel=OUTPUT,
    ),
]
Base = Annotated[
    str, typer.Argument(help="'nano', a folder, or ORG/NAME", callback=check_model_option)
]
Artifact = Annotated[Path, typer.Argument(help="artifact folder", callback=check_artifact_option)]
Repo = Annotated[
    str, typer.Option(help="ORG/NAME on the Hub", metavar="ORG/NAME", rich_help_panel=PUBLISH)
]
Artifacts = Annotated[
    list[str], typer.Argument(help="artifact folders, or bases", callback=check_model_option)
]
