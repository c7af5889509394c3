"""The command line's commands and its `main`. Heavy imports happen inside commands."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from gteopt.cli import build, corpus, decide, lists, measure, optimize, serve, share
from gteopt.cli.errors import (
    DISK_FULL,
    CommandInterrupted,
    HintGroup,
    exit_with_error,
    read_typed_command,
    resume_hint,
    show_warning,
)
from gteopt.cores import n_threads
from gteopt.errors import GteoptError, is_out_of_memory

app = typer.Typer(
    name="gteopt",
    cls=HintGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn a text-embedding model into the cheapest variant that still ranks like it.\n\n"
    "Start with `gteopt optimize MODEL --data pairs.csv`, or `gteopt run demo`.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from gteopt.version import __version__

        typer.echo(f"gteopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="show the traceback of an error")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="show the version and stop", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    del debug, version  # main reads --debug from sys.argv, because it needs it before parsing


for _command_function in (
    *(
        optimize.optimize,
        measure.run,
        build.quantize,
        build.truncate,
        measure.bench,
        measure.evaluate,
    ),
    *(decide.choose, decide.report, build.export, build.verify),
    *(corpus.embed, corpus.search),
    *(share.publish, share.pull, build.inspect, decide.compare, serve.serve),
    *(lists.recipes, lists.suites, lists.policies, lists.plans, lists.init),
):
    app.command()(_command_function)


def main() -> None:
    """Run the console script.

    Errors that the user can fix print one line and exit with code 1. Usage errors exit with 2, and
    Ctrl-C exits with 130, the code that shells use for it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends usage reports by default
    warnings.filterwarnings("ignore", module=r"(?!gteopt)")
    warnings.showwarning = show_warning
    _limit_threads()
    try:
        app()
    except GteoptError as error:
        if "--debug" in sys.argv:
            raise
        exit_with_error(str(error), 130 if isinstance(error, CommandInterrupted) else 1)
    except ValueError as error:
        from pydantic import ValidationError

        if "--debug" in sys.argv or not isinstance(error, ValidationError):
            raise
        from gteopt.config.yaml_files import explain_validation_error

        exit_with_error(str(explain_validation_error(f"the request ({error.title})", error)))
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        where = f" ({error.filename})" if error.filename else ""
        # safetensors raises errors without a number when the disk is full.
        is_full = error.errno in DISK_FULL or error.errno is None
        kept = resume_hint(read_typed_command())
        advice = kept if is_full else "; give a folder that exists and is writable"
        exit_with_error(f"{error.strerror or error}{where}{advice}")
    except (RuntimeError, MemoryError) as error:
        if "--debug" in sys.argv or not is_out_of_memory(error):
            raise
        first_line, kept = str(error).partition("\n")[0], resume_hint(read_typed_command())
        exit_with_error(
            f"out of memory ({first_line}); use smaller batches or another --device{kept}"
        )


def _limit_threads() -> None:
    """Set the number of threads for torch, before its import, and for child processes.

    With --ray, a given OMP_NUM_THREADS stays, because the machines of actors may have more cores.
    """
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted is not None and any(argument.startswith("--ray") for argument in sys.argv):
        return
    n = str(n_threads(wanted))
    if wanted is not None and wanted.isdigit() and int(wanted) > int(n):
        warnings.warn(
            f"OMP_NUM_THREADS={wanted} is above the number of cores that this process may use; "
            f"gteopt uses {n}",
            stacklevel=1,
        )
    os.environ["OMP_NUM_THREADS"] = n


if __name__ == "__main__":
    main()
