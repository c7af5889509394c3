"""Print errors and interruptions as one line on stderr, and hints for unknown options."""

from __future__ import annotations

import errno
import sys
from typing import Any

from typer.core import TyperGroup

from gteopt.cli.output import stderr
from gteopt.errors import RESUMES, GteoptError
from gteopt.interruption import raise_on_interrupt, was_interrupted


class CommandInterrupted(GteoptError):
    """The user pressed Ctrl-C."""


OPTION_HINTS = {
    "--bits": "the recipe decides the bits: --recipe gptq-int4, --recipe int8 (`gteopt recipes`)",
    "--method": "the recipe decides the method: --recipe gptq-int4 (`gteopt recipes`)",
    "--group-size": "the recipe decides the group size (`gteopt init recipe`)",
    "--base": "the model is an argument without a name: gteopt quantize MODEL",
    "--model": "the model is an argument without a name: gteopt quantize MODEL",
    "--dims": "shorten with `gteopt truncate ARTIFACT --dims N`, or with dims in a recipe",
    "--vectors": "code vectors with `gteopt truncate ARTIFACT --vectors int8`, or in a recipe",
    "-o": "the folder is given with --out",
    "--output": "the folder is given with --out",
    "--output-dir": "the folder is given with --out",
    "--layout": "the checkpoint format is given with --format",
    "--batch-size": "the batches of `gteopt bench` are given with --workload 8x128",
    "--task": "tasks are named by a suite: --suite mini (`gteopt init suite`)",
    "--tasks": "tasks are named by a suite: --suite mini (`gteopt init suite`)",
}
"""Hints by option, for options that a command does not have."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HintGroup(TyperGroup):
    """The group of commands: adds hints for unknown options, and what is kept after Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        raise_on_interrupt()
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or was_interrupted():
                kept = resume_hint(ctx.invoked_subcommand)
                raise CommandInterrupted(f"interrupted{kept}") from error
            name = getattr(error, "option_name", None)
            if (hint := OPTION_HINTS.get(str(name))) is not None and hasattr(error, "message"):
                error.message = f"{error.message}. {hint[0].upper()}{hint[1:]}."
                error.possibilities = []  # type: ignore[attr-defined]
            raise


def resume_hint(command: str | None) -> str:
    """What an interrupted command has kept, as the end of a sentence."""
    can_resume = f"; {RESUMES}"
    if command in ("optimize", "run", "quantize", "embed", "pull", "publish"):
        return can_resume
    if command in ("bench", "evaluate"):
        if not any(argument.split("=")[0] == "--out" for argument in sys.argv):
            return "; nothing is kept, because no --out was given"
        if command == "evaluate":
            return can_resume
        if "--dummy-weights" in sys.argv:
            return "; nothing is kept"
        return "; measured variants are kept: name the others to add them"
    return ""


def read_typed_command() -> str | None:
    """The command on the command line; None where there is none."""
    return next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)


def show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    """Print a warning without its place in the code, which does not help users."""
    stderr.print(
        f"gteopt: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True
    )


def exit_with_error(message: str, code: int = 1) -> None:
    """Print an error and exit with a code."""
    stderr.print(f"gteopt: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
