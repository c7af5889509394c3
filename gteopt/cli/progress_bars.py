"""Show the progress of long steps on a terminal or in a log.

Hides: rich's bars. Refuses to know: what a step is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

_LINE_EVERY_S = 60.0


@contextmanager
def show_steps(console: Console) -> Iterator[ProgressSteps]:
    """Steps that show their progress on a console; see `ProgressSteps`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        _Left(),
    )
    steps = ProgressSteps(Progress(*columns, console=console, transient=True))
    try:
        yield steps
        steps.close()
    finally:
        steps.stop()


class _Rate(ProgressColumn):
    """Units of the step (texts, blocks) per second."""

    def render(self, task: Task) -> Text:
        """The speed of the last half minute."""
        return Text("" if task.speed is None else f"{_rate(task.speed)}/s")


class _Left(ProgressColumn):
    """The remaining time of the step."""

    def render(self, task: Task) -> Text:
        """The remaining time; empty where it is not known, or where the step is finished."""
        left = task.time_remaining
        return Text("" if not left else format_time_left(left))


def format_time_left(seconds: float) -> str:
    """A remaining time, rounded: "about 22 s left", "about 3 min left".

    Example:
        >>> format_time_left(142)
        'about 2 min left'
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit} left"
    return f"about {max(1, round(seconds))} s left"


class ProgressSteps:
    """A bar for the current step; a finished step leaves one line with its units and its time.

    Without a terminal (a batch job, nohup, CI), a line per minute replaces the bar.
    """

    def __init__(self, bars: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._bars = bars
        self._clock = clock
        self._last_line = 0.0
        self._what: str | None = None
        self._task: TaskID | None = None
        self._since = 0.0
        self._total = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of the step `what` are finished."""
        if what != self._what:
            self.close()
            if self._bars.console.is_terminal:
                self._bars.start()  # not earlier: an error before any step would leave an empty bar
            self._what, self._since = what, self._clock()
            self._last_line = self._since
            self._task = self._bars.add_task(what, total=total)
        assert self._task is not None
        self._total = total
        self._bars.update(self._task, completed=done, total=total)
        now = self._clock()
        if not self._bars.console.is_terminal and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            rate = done / (now - self._since)
            is_known = rate > 0 and done < total
            left = f", {format_time_left((total - done) / rate)}" if is_known else ""
            self._line(f"{what}  {done:,}/{total:,} at {_rate(rate)}/s{left}")

    def close(self) -> None:
        """End the current step."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            seconds = self._clock() - self._since
            speed = _rate(self._total / seconds)
            rate = f"{self._total:,} at {speed}/s, " if self._total > 1 else ""
            self._line(f"{self._what}  {rate}{seconds:.1f} s")
            self._what = self._task = None

    def _line(self, text: str) -> None:
        self._bars.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the bar, also when the current step failed."""
        if self._bars.live.is_started:
            self._bars.stop()


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"
