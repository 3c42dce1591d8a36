"""Tables and progress bars, by rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Final

from silbo.cli.output import printable, write
from silbo.errors import MissingExtra

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    if error.name != "rich":
        raise
    raise MissingExtra("a table (--json is none)", extra="cli") from error

__all__ = ["bar", "table"]

NO_END: Final = 1 << 15
"""Columns where nobody looks at a screen: an id is not broken in two."""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()) -> None:
    """See :func:`silbo.cli.output.table`; nothing is cut off, and what is data can't steer a terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title in columns:
        shown.add_column(title, justify="right" if title in numbers else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text("" if value is None else printable(str(value))) for value in row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else NO_END)
    with console.capture() as captured:
        console.print(shown)
    write("\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines()))


@contextmanager
def bar(what: str, total: int | None) -> Generator[Callable[[int], None]]:
    """A progress bar on stderr; gives what to tell it how much is done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)
