"""``silbo names``: its arguments, and showing the event names of an app."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from silbo.cli.app_arguments import add_app_arguments, open_app_of
from silbo.cli.arguments import Commands, add_command, add_json_option
from silbo.cli.output import print_json, print_line, print_note
from silbo.cli.rich_output import print_table
from silbo.operations.formatting import format_place

if TYPE_CHECKING:
    from silbo.operations.names import FieldInfo, NameInfo

__all__ = ["add_to"]

COLUMNS: Final = ("name", "class", "kind", "key", "version", "fields", "heard by", "description")

EPILOG = """\
Shows the names that the app's dispatcher declares (names=), those that its consumers rebuild (events=), and
those that it has listeners for. "heard by" are the listeners meant for the name; a listener for all names
('**') counts for none. A name that a bridge alone hears "leaves": other programs hear it; "may leave" if the
name has no class, and so each event's own class decides. A field with a ? may be left out.

Exit code 1 with a NAME that the app does not have, and with --unheard if it lists any.

examples:
  silbo names shop.web:dispatcher
  silbo names shop.web:dispatcher order.paid
  silbo names shop.web:dispatcher --unheard
  silbo names shop.web:dispatcher --json | jq -r 'select(.deprecated != "") | .name'
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo names``."""
    parser = add_command(
        commands, "names", "the event names of a program, and who hears each", epilog=EPILOG, run=show_names
    )
    add_app_arguments(parser)
    parser.add_argument("name", metavar="NAME", nargs="?", help="all about this name; all names by default")
    parser.add_argument("--unheard", action="store_true", help="only the names that nobody hears, and that don't leave")
    add_json_option(parser, "one JSON object for each name")


async def show_names(options: argparse.Namespace) -> int:
    """Print the names of an app."""
    from silbo._checks import suggest_name
    from silbo.operations.names import list_names

    async with open_app_of(options) as app:
        known = list_names(app)
        declares = bool(app.dispatcher.names)
    found = [name for name in known if name.reaches_nobody or not options.unheard]
    if options.name is not None:
        found = [name for name in found if name.name == options.name]
    if options.json:
        for name in found:
            print_json(asdict(name) | {"is_heard": name.is_heard, "reaches_nobody": name.reaches_nobody})
    elif options.name is not None:
        for name in found:
            _print_name(name, declares=declares)
    elif found:
        print_table(COLUMNS, [_to_cells(name) for name in found], numbers=["version"])
    if options.name is not None and not found:
        if any(name.name == options.name for name in known):  # --unheard
            print_note(f"{options.name} is heard, or leaves")
            return 0
        print_note(f"silbo: the app has no name {options.name!r}{suggest_name(options.name, [n.name for n in known])}")
        return 1
    if not known:
        print_note("no names")
    elif not found:
        print_note("each name is heard, or leaves")
    if not declares and known:
        print_note("the app declares no names: give its dispatcher names=[...], and a misspelt one is noticed")
    elif options.name is None and (undeclared := [name for name in found if not name.is_declared]):
        for name in undeclared:
            hint = f"; did you mean {name.similar}?" if name.similar else ""
            print_note(f"not declared: {name.name}{hint}")
    for name in found if options.name is None else ():
        if not name.is_heard and name.similar and (name.is_declared or not declares):
            nobody = "nobody" if name.reaches_nobody else "nobody here"
            print_note(f"{nobody} hears {name.name}; {name.similar} has listeners: is that misspelt?")
    return 1 if options.unheard and found else 0


def _to_cells(name: NameInfo) -> tuple[object, ...]:
    described = "; ".join(filter(None, (name.description, name.deprecated and f"deprecated: {name.deprecated}")))
    return (
        name.name,
        name.cls.rpartition(".")[2],
        name.kind,
        name.key,
        name.version,
        ", ".join(map(_format_field, name.fields)),
        _format_listeners(name),
        described,
    )


def _format_field(field: FieldInfo) -> str:
    return f"{field.name}{'' if field.is_required else '?'}"


def _format_listeners(name: NameInfo) -> str:
    if name.is_heard:
        return ", ".join(dict.fromkeys(listener.listener for listener in name.listeners))
    if name.reaches_nobody:
        return "nobody"
    return "leaves" if name.leaves else "may leave"


def _print_name(name: NameInfo, *, declares: bool) -> None:
    lines = [
        ("name", name.name),
        ("declared", "yes" if name.is_declared else "no"),
        ("consumed", "yes, by a consumer of this app" if name.is_consumed else ""),
        ("class", name.cls),
        ("kind", name.kind),
        ("key", name.key),
        ("version", str(name.version)),
        ("upcast", ", ".join(map(str, name.upcasts))),
        ("about", name.description),
        ("deprecated", name.deprecated),
        *(("field", f"{_format_field(field)}: {field.type}".rstrip(": ")) for field in name.fields),
        (
            "leaves",
            {True: "yes, by a bridge", None: "by a bridge, if its event's class has a kind", False: ""}[name.leaves],
        ),
        *(("listener", f"{listener.listener}  {format_place(listener.place)}") for listener in name.listeners),
    ]
    if not name.is_heard:
        hint = (
            f"; {name.similar} has listeners: is that misspelt?"
            if name.similar and (name.is_declared or not declares)
            else ""
        )
        lines.append(("listener", f"nobody{hint}"))
    for title, text in lines:
        if text:
            print_line(f"{title:10} {text}")
