"""Print a table that drops its least important columns until it fits the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text


class FittedTable(Table):
    """A table that leaves out whole columns if they do not fit, and cuts no figure or name.

    A line below the table names the missing columns. The caption is as wide as the terminal.

    Args:
        names: first cells of the rows.
        heading: heading of the first column.
        marked: whether a column of marks comes first.
        stacked: whether columns that do not fit go into a further table below.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        heading: str = "variant",
        marked: bool = False,
        stacked: bool = False,
    ) -> None:
        super().__init__(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, caption_justify="left")
        if marked:
            self.add_column("")
        # Only this column may wrap.
        longest = max(map(len, names), default=0)
        self.add_column(heading, overflow="fold", min_width=min(16, longest))
        self._n_fixed = len(self.columns)
        self._stacked = stacked
        self._figures: list[tuple[int, str]] = []

    def add_figures(
        self, heading: str | Text, title: str, *, importance: int = 0, left: bool = False
    ) -> None:
        """Add a column of figures.

        Args:
            heading: heading in the table.
            title: name of the column in the note on missing columns.
            importance: rank, 0 for the most important; columns of the highest rank are left out
                first, and of equal ranks the last column.
            left: whether to align to the left.
        """
        self.add_column(heading, justify="left" if left else "right", no_wrap=True)
        self._figures.append((importance, title))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print the columns that fit, then the caption."""
        figures = range(self._n_fixed, len(self.columns))
        hidden: list[int] = []
        if self._stacked:
            block: list[int] = []
            for column in figures:
                if block and not self._fits([*block, column], console, options):
                    yield self._part(block)
                    block = []
                block.append(column)
            yield self._part(block)
        else:
            ranked = sorted(figures, key=lambda i: (self._figures[i - self._n_fixed][0], i))
            shown = list(figures)
            while len(shown) > 1 and not self._fits(shown, console, options):
                hidden.append(ranked.pop())
                shown.remove(hidden[-1])
            yield self._part(shown)
        if hidden:
            titles = ", ".join(self._figures[i - self._n_fixed][1] for i in sorted(hidden))
            yield Text(f"columns that do not fit: {titles} (use a wider terminal, or --json)")
        if self.caption:
            yield self.caption

    def _fits(self, figures: Sequence[int], console: Console, options: ConsoleOptions) -> bool:
        part = self._part(figures)
        return Measurement.get(console, options.update(width=10_000), part).minimum <= (
            options.max_width
        )

    def _part(self, figures: Sequence[int]) -> Table:
        part = Table(box=self.box, pad_edge=False, padding=0)
        part.columns = [*self.columns[: self._n_fixed], *(_whole(self.columns[i]) for i in figures)]
        part.rows = self.rows
        return part


def _whole(column: Column) -> Column:
    """A copy of a column that is at least as wide as its widest line."""
    whole = copy(column)
    lines = [line for cell in [column.header, *column.cells] for line in str(cell).split("\n")]
    whole.min_width = max(map(cell_len, lines), default=0)
    return whole
