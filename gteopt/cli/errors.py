"""One handler for errors and interruptions: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Any

from typer.core import TyperGroup

from gteopt.cli.output import stderr
from gteopt.errors import GteoptError
from gteopt.interruption import raise_on_interrupt, was_interrupted


class Interrupted(GteoptError):
    """Ctrl-C."""


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
"""What a user meant by an option that does not exist where it was typed."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Group(TyperGroup):
    """Says what an unknown option should have been, and what Ctrl-C leaves behind."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        raise_on_interrupt()
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or was_interrupted():
                kept = what_is_kept(ctx.invoked_subcommand)
                raise Interrupted(f"interrupted{kept}") from error
            name = getattr(error, "option_name", None)
            if (hint := OPTION_HINTS.get(str(name))) is not None and hasattr(error, "message"):
                error.message = f"{error.message}. {hint[0].upper()}{hint[1:]}."
                error.possibilities = []  # type: ignore[attr-defined]
            raise


def what_is_kept(command: str | None) -> str:
    """What a command that was stopped in the middle has kept, as the end of a sentence."""
    goes_on = "; what is finished is kept, and the same command goes on from there"
    if command in ("optimize", "run", "quantize", "embed", "pull", "publish"):
        return goes_on
    if command in ("bench", "evaluate"):
        if not any(each.split("=")[0] == "--out" for each in sys.argv):
            return "; nothing is kept, as no --out was given"
        if command == "evaluate":
            return goes_on
        if "--dummy-weights" in sys.argv:
            return "; nothing is kept"
        return "; variants that were measured are kept: name the others to add them"
    return ""


def typed_command() -> str | None:
    return next((each for each in sys.argv[1:] if not each.startswith("-")), None)


def show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    """A warning as a sentence; where in the code it came from helps no user."""
    stderr.print(
        f"gteopt: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True
    )


def fail(message: str, code: int = 1) -> None:
    stderr.print(f"gteopt: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
