"""One handler for errors and interruptions: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Any

from typer.core import TyperGroup

from gteopt.cli.output import stderr
from gteopt.errors import GteoptError


class Interrupted(GteoptError):
    """Ctrl-C."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Group(TyperGroup):
    """Says what Ctrl-C leaves behind, whichever command it stops."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(f"interrupted{what_is_kept(ctx.invoked_subcommand)}") from interrupt


def what_is_kept(command: str | None) -> str:
    """What a command that was stopped in the middle has kept, as the end of a sentence."""
    goes_on = "; what is finished is kept, and the same command goes on from there"
    if command in ("optimize", "run", "quantize", "pull", "publish"):
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
