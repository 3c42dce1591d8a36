"""From the arguments of a process to its exit code."""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import sys
from collections.abc import Sequence

import silbo
from silbo.cli import dead_letters, outbox, relay
from silbo.cli.arguments import UsageError, command
from silbo.cli.output import ReaderGone, printable, say
from silbo.errors import SilboError

__all__ = ["main", "parser"]

EPILOG = """\
examples:
  silbo relay --store outbox.db --redis redis://localhost
  silbo outbox status --store outbox.db
  silbo dead list --redis redis://localhost --json | jq -r .id

SILBO_STORE and SILBO_REDIS_URL in the environment stand for --store and --redis.

exit codes: 0 it is done; 1 it failed, or was not done; 2 the command is wrong;
130 it was interrupted
"""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    whole = argparse.ArgumentParser(
        prog="silbo",
        description="Run and look after an outbox, and the dead letters of consumers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"silbo {silbo.__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    relay.add_to(commands)
    outbox.add_to(command(commands, "outbox", "look at an outbox and mend it"))
    dead_letters.add_to(command(commands, "dead", "look at dead letters, retry and delete them"))
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors that can be expected are one line on stderr."""
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal can't show is no failure
    try:
        return int(asyncio.run(options.run(options)))
    except UsageError as error:
        return _fail(error, 2)
    except ReaderGone:  # as `| head` does when it has enough
        _give_up_stdout()
        return 0
    except (SilboError, OSError) as error:
        _give_up_stdout()
        return _fail(error, 1)
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def _give_up_stdout() -> None:
    """Where it can't be written: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _fail(error: Exception, code: int) -> int:
    say(f"silbo: {printable(str(error))}")
    return code
