"""``silbo page``: its arguments, and writing the page of a program."""

from __future__ import annotations

import argparse
import sys
from contextlib import AsyncExitStack

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
from silbo.cli.connect import make_redis, open_store
from silbo.cli.groups import add_silent_option
from silbo.cli.output import print_line, print_note
from silbo.operations.formatting import escape_controls

__all__ = ["add_to"]

EPILOG = """\
Writes one HTML file that stands alone: names and their listeners, plugins; with --redis the streams, groups
and dead letters; with --store the outbox. It has no script and loads nothing, and shows no payloads without
--payloads. Errors are shown with their text.

The last dispatches are those of this process, so there are none. A running host shows its own, with
silbo.web.PageApp.

Exit code 1 if Redis or the store could not be read: the page is written all the same, and says why.

examples:
  silbo page shop.web:dispatcher > page.html
  silbo page shop.web:open_plugins --redis redis://localhost --store outbox.db > page.html
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
    parser.add_argument("--payloads", action="store_true", help="show the payloads of dead letters and dead rows")


async def write_page(options: argparse.Namespace) -> int:
    """Print the page of an app."""
    from silbo.operations.overview import read_overview
    from silbo.operations.page import render_page

    if sys.stdout.isatty():
        raise UsageError("a page is for a browser: write it into a file, silbo page APP > page.html")
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(make_redis(options.redis)) if options.redis else None
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
    print_line(render_page(overview).rstrip())
    for problem in overview.problems:
        print_note(f"silbo: {escape_controls(problem)}")
    return 1 if overview.problems else 0
