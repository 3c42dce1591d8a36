"""The argument ``APP`` of the commands that look at a program or run it, and the option ``--app-dir``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from silbo.operations.app import App

__all__ = ["add_app_arguments", "open_app_of"]


def add_app_arguments(
    parser: argparse.ArgumentParser,
    what: str = "a dispatcher, or an app that holds one",
    *,
    example: str = "shop.web:dispatcher",
    lifespan: bool = True,
) -> None:
    """Add ``APP`` and ``--app-dir``.

    Args:
        parser: The command's parser.
        what: The objects that the command needs, for the help.
        example: An example of APP.
        lifespan: If true, ``--lifespan`` is added, too.
    """
    parser.add_argument(
        "app",
        metavar="APP",
        help=f"module:attribute, as {example}: {what}; or a function or async context manager that gives one, called without "
        "arguments",
    )
    if lifespan:
        parser.add_argument(
            "--lifespan",
            action="store_true",
            help="run the lifespan of a web application (Starlette, FastAPI) for as long as the command takes: what it makes is "
            "shown, and what it starts is started",
        )
    parser.add_argument(
        "--app-dir", metavar="FOLDER", default=".", help="the folder to import APP from (the current one)"
    )


@asynccontextmanager
async def open_app_of(options: argparse.Namespace, reference: str | None = None) -> AsyncGenerator[App]:
    """Open the app that the options name, or that ``reference`` names, from their ``--app-dir``.

    What the app prints when it is opened and closed goes to stderr: on stdout is the command's answer alone.

    Raises:
        AppInvalid: There is no such module or attribute, or it has nothing of silbo's.
        AppFailed: The host's own code has failed.
    """
    from silbo.operations.app import open_app

    async with AsyncExitStack() as stack:
        with redirect_stdout(sys.stderr):
            app = await stack.enter_async_context(
                open_app(
                    options.app if reference is None else reference,
                    app_dir=options.app_dir,
                    lifespan=getattr(options, "lifespan", False),
                )
            )
        yield app
        with redirect_stdout(sys.stderr):
            await stack.aclose()
