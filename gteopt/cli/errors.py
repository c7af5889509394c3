"""One handler for errors and interruptions: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
from typing import Any

from typer.core import TyperGroup

from gteopt.cli.output import _err
from gteopt.errors import GteoptError


class _Interrupted(GteoptError):
    """Ctrl-C."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Group(TyperGroup):
    """Says what Ctrl-C leaves behind, whichever command it stops."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise _Interrupted(f"interrupted{_left_behind(ctx.invoked_subcommand)}") from interrupt


def _left_behind(command: str | None) -> str:
    """What a command that was stopped in the middle has kept, as the end of a sentence."""
    goes_on = "; what is finished is kept, and the same command goes on from there"
    if command in ("run", "quantize", "pull", "publish"):
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


def _command() -> str | None:
    return next((each for each in sys.argv[1:] if not each.startswith("-")), None)


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    """A warning as a sentence; where in the code it came from helps no user."""
    _err.print(f"gteopt: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _fail(message: str, code: int = 1) -> None:
    _err.print(f"gteopt: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
