"""Asking before a command deletes something or sends much again, and the option ``--yes`` in place of an answer."""

from __future__ import annotations

import argparse
import select
import signal
import sys

from silbo.cli.arguments import UsageError
from silbo.cli.output import print_note

__all__ = ["add_yes_option", "confirm"]


def add_yes_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--yes``, for :func:`confirm`."""
    parser.add_argument("--yes", action="store_true", help="don't ask; needed where there is no terminal to ask on")


def confirm(question: str, *, yes: bool) -> bool:
    """Return True if ``--yes`` was given, or if the user at the terminal answers the question with yes.

    Raises:
        UsageError: there is no terminal to ask on.
    """
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question} There is no terminal to ask on: say --yes")
    # asyncio's handler acts on a Ctrl-C only when the loop runs again, which is not before the line is read.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        # A Ctrl-C just before the read begins would be noticed only after it; between two looks it is noticed at once.
        while not select.select([sys.stdin], [], [], 0.2)[0]:
            pass
        answer = sys.stdin.readline().strip().lower()
    finally:
        signal.signal(signal.SIGINT, handler)
    if answer in ("y", "yes"):
        return True
    print_note("nothing was done")
    return False
