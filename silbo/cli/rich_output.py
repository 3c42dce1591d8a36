"""Tables on stdout and progress bars on stderr, drawn by rich. rich is imported when the first of them is drawn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, Literal

from silbo._checks import require_extra
from silbo._control_characters import escape_controls
from silbo.cli.output import print_as_it_is
from silbo.errors import MissingExtra

__all__ = ["print_table", "show_progress"]

NO_END: Final = 1 << 15
"""Columns of a page that is not a terminal: so wide that no line is broken."""
FREE: Final = "error"
"""The title of the one column whose text may be broken into lines."""
FREE_WIDTH: Final = 20
"""Columns that the text of an error has at least."""


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table for people. No cell is cut off, and no cell can steer the terminal.

    Args:
        columns: Their titles.
        rows: A cell for each column; None prints as an empty cell.
        numbers: Titles of the columns that are aligned to the right.

    Raises:
        MissingExtra: rich is not installed.
    """
    with require_extra("a table (--json is none)", extra="cli", libraries=("rich",)):
        from rich.box import SIMPLE_HEAD
        from rich.cells import cell_len
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

    cells = [[escape_controls("" if value is None else str(value)) for value in row] for row in rows]
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold")
    for at, title in enumerate(columns):
        side: Literal["left", "right"] = "right" if title in numbers else "left"
        least = FREE_WIDTH if title == FREE else max(cell_len(text) for text in [title, *(row[at] for row in cells)])
        table.add_column(title, justify=side, overflow="fold", min_width=least)
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else NO_END)
    wanted = Measurement.get(console, console.options.update(width=NO_END), table).minimum
    console.width = max(console.width, wanted)  # a terminal breaks lines; rich would break ids, or cut them off
    with console.capture() as captured:
        console.print(table)
    print_as_it_is("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def show_progress(what: str, total: int | None = None) -> Generator[Callable[[int], None]]:
    """Show a progress bar on stderr while the block runs, if stderr is a terminal and rich is installed.

    Args:
        what: The text before the bar.
        total: The number at which the work is finished; None if it is unknown.

    Yields:
        A function to call with the number that is done so far.
    """
    with ExitStack() as stack:
        update: Callable[[int], None] = _ignore
        if sys.stderr.isatty():
            with suppress(MissingExtra):  # a command with --json works without rich
                update = stack.enter_context(_bar(what, total))
        yield update


@contextmanager
def _bar(what: str, total: int | None) -> Generator[Callable[[int], None]]:
    with require_extra("a table (--json is none)", extra="cli", libraries=("rich",)):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _ignore(done: int) -> None:
    """Do nothing with the number that is done: no bar is shown."""
