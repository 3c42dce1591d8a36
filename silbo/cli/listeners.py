"""``silbo listeners``: its arguments, and showing what runs for a name."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from silbo.cli.app_arguments import add_app_arguments, open_app_of
from silbo.cli.arguments import Commands, add_command, add_json_option
from silbo.cli.output import print_json, print_note
from silbo.cli.rich_output import print_table
from silbo.names import is_pattern
from silbo.operations.formatting import format_count, format_number, format_options, format_place

if TYPE_CHECKING:
    from silbo.operations.listeners import ListenerInfo

__all__ = ["add_to"]

COLUMNS: Final = ("priority", "registered for", "listener", "plugin", "options", "defined at")

EPILOG = """\
With a NAME: the listeners that a dispatch of it runs, in their order, those of patterns included.
With a pattern ('order.*'), or without a NAME: the listeners by the name they are registered for.
The lowest priority runs first; "plugin" is the plugin that has added a listener, or the module
that defines it.

Exit code 1 if the NAME is misspelt, as far as can be told: the app declares names, but not this one;
or it declares none, and no listener is meant for this one. A bridge, and a listener for all names
('**'), hear every name, so they are meant for none.

examples:
  silbo listeners shop.web:dispatcher order.paid
  silbo listeners shop.web:dispatcher 'order.*'
  silbo listeners shop.web:make_app --app-dir src --json | jq -r .place
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo listeners``."""
    parser = add_command(
        commands,
        "listeners",
        "the listeners of a program: what runs for a name, in order",
        epilog=EPILOG,
        run=show_listeners,
    )
    add_app_arguments(parser)
    parser.add_argument("name", metavar="NAME", nargs="?", help="an event name, or a pattern of names; all by default")
    add_json_option(parser, "one JSON object for each listener")


async def show_listeners(options: argparse.Namespace) -> int:
    """Print the listeners of a name, of a pattern, or all."""
    from silbo.operations.listeners import find_listeners, list_listeners

    name: str | None = options.name
    async with open_app_of(options) as app:
        if name is None or is_pattern(name):
            rows = list_listeners(app.dispatcher, name)
            _print_listeners(rows, as_json=options.json)
            if not rows:
                print_note("no listeners" if name is None else f"no listeners for names like {name}")
            return 0
        found = find_listeners(app.dispatcher, name)
        _print_listeners(found.listeners, as_json=options.json)
        is_unknown = not found.is_declared and (bool(app.dispatcher.names) or not found.is_heard)
    off = [listener for listener in found.listeners if listener.is_meant and listener.off]
    notes = ["the app does not declare it"] if is_unknown and app.dispatcher.names else []
    if not found.is_heard:
        if off:
            notes.append(f"{format_count(len(off), 'listener')} for it, of a plugin that is switched off")
        else:
            notes.append("no listener is meant for it" + (", those above hear all names" if found.listeners else ""))
    if notes:
        hint = ""
        if found.similar:
            question = f"did you mean {found.similar}?"
            hint = f"; {found.similar} has listeners: is that misspelt?" if found.is_declared else f"; {question}"
        print_note(f"{name}: {'; '.join(notes)}{hint}")
    return 1 if is_unknown and not off else 0


def _print_listeners(rows: Iterable[ListenerInfo], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            print_json(asdict(row))
    elif cells := [_to_cells(row) for row in rows]:
        print_table(COLUMNS, cells, numbers=["priority"])


def _to_cells(row: ListenerInfo) -> tuple[object, ...]:
    options = format_options(row.options) + (f" (off: {row.off})" if row.off else "")
    return format_number(row.priority), row.name, row.listener, row.plugin, options, format_place(row.place)
