"""Tables and progress bars, by rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from silbo.cli.output import printable, write
from silbo.errors import MissingExtra

try:
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    if error.name != "rich":
        raise
    raise MissingExtra("a table (--json is none)", extra="cli") from error

__all__ = ["bar", "table"]

NO_END: Final = 1 << 15
"""Columns where nobody looks at a screen."""
FREE: Final = "error"
"""The one column that may be broken into lines."""
FREE_WIDTH: Final = 20


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """See :func:`silbo.cli.output.table`; nothing is cut off, and what is data can't steer a terminal."""
    cells = [[printable("" if value is None else str(value)) for value in row] for row in rows]
    shown = Table(box=SIMPLE_HEAD, show_edge=False, header_style="bold")
    for at, title in enumerate(columns):
        side: Literal["left", "right"] = "right" if title in numbers else "left"
        least = FREE_WIDTH if title == FREE else max(cell_len(text) for text in [title, *(row[at] for row in cells)])
        shown.add_column(title, justify=side, overflow="fold", min_width=least)
    for row in cells:
        shown.add_row(*map(Text, row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else NO_END)
    wanted = Measurement.get(console, console.options.update(width=NO_END), shown).minimum
    console.width = max(console.width, wanted)  # a terminal breaks lines; rich would break ids, or cut them off
    with console.capture() as captured:
        console.print(shown)
    write("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def bar(what: str, total: int | None) -> Generator[Callable[[int], None]]:
    """A progress bar on stderr; gives what to tell it how much is done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)
