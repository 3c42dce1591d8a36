"""The argument ``APP`` of the commands that look at a program or run it, and the option ``--app-dir``."""

from __future__ import annotations

import argparse
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from silbo.operations.app import App

__all__ = ["add_app_arguments", "open_app_of"]


def add_app_arguments(parser: argparse.ArgumentParser, what: str = "a dispatcher, or an app that holds one") -> None:
    """Add ``APP`` and ``--app-dir``.

    Args:
        parser: The command's parser.
        what: The objects that the command needs, for the help.
    """
    parser.add_argument(
        "app",
        metavar="APP",
        help=f"module:attribute, as shop.web:dispatcher: {what}; or a function or async context manager, called without "
        "arguments, that gives one",
    )
    parser.add_argument(
        "--app-dir", metavar="FOLDER", default=".", help="the folder to import APP from (the current one)"
    )


def open_app_of(options: argparse.Namespace, reference: str | None = None) -> AbstractAsyncContextManager[App]:
    """Open the app that the options name, or that ``reference`` names, from their ``--app-dir``.

    Raises:
        AppInvalid: On entering: there is no such module or attribute, or it has nothing of silbo's.
        AppFailed: On entering: the host's own code has failed.
    """
    from silbo.operations.app import open_app

    return open_app(options.app if reference is None else reference, app_dir=options.app_dir)
