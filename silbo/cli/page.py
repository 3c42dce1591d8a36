"""``silbo page``: its arguments, and writing the page of a program."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from silbo.cli.app_arguments import add_app_arguments, open_app_of
from silbo.cli.arguments import (
    FORMATS,
    Commands,
    UsageError,
    add_command,
    add_format_option,
    add_redis_options,
    add_store_option,
)
from silbo.cli.connect import make_redis, open_store, refuse_node
from silbo.cli.groups import add_silent_option
from silbo.cli.output import print_as_it_is, print_note

__all__ = ["add_to"]

EPILOG = """\
Writes one HTML file that stands alone: names and their listeners, plugins; with --redis the streams, groups
and dead letters; with --store the outbox. It has no script and loads nothing, and shows no payloads without
--payloads. Errors are shown with their text.

The last dispatches are those of this process, so there are none. A running host shows its own, with
silbo.web.PageApp.

Exit code 1 if Redis or the store could not be read: the page is written all the same, and says why. With any
other error FILE stays as it was; the shell's > would leave it empty.

examples:
  silbo page shop.web:dispatcher --output page.html
  silbo page shop.web:app --lifespan --redis redis://localhost --store outbox.db --output page.html
"""


def add_to(commands: Commands) -> None:
    """Add ``silbo page``."""
    parser = add_command(
        commands,
        "page",
        "one page, to read in a browser, about a program and what it has in Redis",
        epilog=EPILOG,
        run=write_page,
    )
    add_app_arguments(parser)
    add_redis_options(parser)
    add_store_option(parser)
    add_format_option(parser)
    add_silent_option(parser)
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="write the page into this file, once it is whole (stdout)"
    )
    parser.add_argument("--payloads", action="store_true", help="show the payloads of dead letters and dead rows")


async def write_page(options: argparse.Namespace) -> int:
    """Print the page of an app."""
    from silbo.operations.overview import read_overview
    from silbo.operations.page import render_page

    if options.output is None and sys.stdout.isatty():
        raise UsageError("a page is for a browser: write it into a file, silbo page APP --output page.html")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(make_redis(options)) if options.redis else None
        if client is not None:
            await refuse_node(client)
        store = await stack.enter_async_context(open_store(options.store)) if options.store else None
        app = await stack.enter_async_context(open_app_of(options))
        overview = await read_overview(
            app,
            client=client,
            prefix=options.prefix,
            store=store,
            payloads=options.payloads,
            format=FORMATS[options.format],
            silent_after=options.silent_after,
        )
    page = render_page(overview)
    if options.output is None:
        print_as_it_is(page.rstrip())
    else:
        _write_whole(options.output, page)
    for problem in overview.problems:
        print_note(f"silbo: {problem}")
    return 1 if overview.problems else 0


def _write_whole(file: Path, text: str) -> None:
    """Write a file; as it was, or not there, if that fails."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
