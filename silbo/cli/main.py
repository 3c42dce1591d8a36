"""The command line as a whole: its parser, and running a command to its exit code."""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from types import TracebackType
from typing import Any, Final, NoReturn

import silbo
from silbo._checks import suggest_name
from silbo.cli.arguments import UsageError
from silbo.cli.output import StdoutClosed, print_note
from silbo.errors import AppFailed, ClusterClientNeeded, SilboError

__all__ = ["main", "make_parser"]

COMMANDS: Final = {
    "consume": "silbo.cli.consume",
    "relay": "silbo.cli.relay",
    "send": "silbo.cli.send",
    "listeners": "silbo.cli.listeners",
    "names": "silbo.cli.names",
    "plugins": "silbo.cli.plugins",
    "groups": "silbo.cli.groups",
    "rewind": "silbo.cli.rewind",
    "retention": "silbo.cli.retention",
    "shards": "silbo.cli.shards",
    "why": "silbo.cli.why",
    "tail": "silbo.cli.tail",
    "top": "silbo.cli.top",
    "page": "silbo.cli.page",
    "doctor": "silbo.cli.doctor",
    "outbox": "silbo.cli.outbox",
    "dead": "silbo.cli.dead_letters",
}
"""The module of each command, in the order of the help; its function ``add_to`` adds the command. A command that is called
imports its own module alone, so that it starts quickly."""

EPILOG = """\
examples:
  silbo consume shop.billing:consumer
  silbo listeners shop.web:dispatcher order.paid
  silbo doctor --redis redis://localhost
  silbo groups --redis redis://localhost
  silbo why 01976c3e-5f0a-7c4e-8f14-46d3a8aa17b3 --store outbox.db --redis redis://localhost
  silbo relay --store outbox.db --redis redis://localhost
  silbo outbox status --store outbox.db
  silbo dead list --redis redis://localhost --json | jq -r .id

SILBO_STORE, SILBO_REDIS_URL, SILBO_CLUSTER and SILBO_PREFIX in the environment stand for
--store, --redis, --cluster and --prefix.

exit codes: 0 it is done; 1 it failed, or was not done; 2 the command is wrong;
130 it was interrupted
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors show no password of a URL in the wrong place, and the command that a misspelt one may mean."""

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # three overloads
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse as usual; but let the command whose argument is unknown say so, not ``silbo``, to which argparse returns it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = get_close_matches(unknown[0], self._option_string_actions, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            commands = re.findall(r"[\w-]+", found[2])
            message = f"there is no command {found[1]!r}{suggest_name(found[1], commands)}"
        message = re.sub(r":[^\s@]*@", ":***@", message)
        super().error(re.sub(r"(pass\w*=)[^\s&]*", r"\1***", message, flags=re.IGNORECASE))


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands and their options, or of ``only`` one command."""
    parser = _Parser(
        prog="silbo",
        description="Run consumers and relays, look at programs and at what is in Redis, and mend it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"silbo {silbo.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        if only in (None, name):
            import_module(module).add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. An expected error is one line on stderr."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = make_parser(words[0] if words and words[0] in COMMANDS else None).parse_args(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a character that the terminal can't show must not be an error
    try:
        return int(asyncio.run(options.run(options)))
    except UsageError as error:
        _print_error(error)
        return 2
    except ClusterClientNeeded as error:
        _discard_stdout()
        print_note(f"silbo: {error.server} is one of the nodes of a Redis Cluster: add --cluster")
        return 2
    except StdoutClosed:  # by `| head`, for one
        _discard_stdout()
        return 0
    except (SilboError, OSError) as error:
        _discard_stdout()
        _print_error(error)
        return 1
    except KeyboardInterrupt:
        print_note("interrupted")
        return 130


def _discard_stdout() -> None:
    """Discard what stdout still holds, if it can't be written: Python would try again at exit, and print an error."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _is_on_the_way(place: TracebackType) -> bool:
    """Return True for a line of silbo or of the import system, between the command and the host's code."""
    module = str(place.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] in ("silbo", "importlib", "contextlib") or "importlib" in module


def _print_error(error: Exception) -> None:
    """Print an error as one line; before it, the traceback of an error in the host's own code."""
    if isinstance(error, AppFailed):
        place = error.error.__traceback__
        while place is not None and place.tb_next is not None and _is_on_the_way(place):
            place = place.tb_next
        for line in "".join(traceback.format_exception(type(error.error), error.error, place)).rstrip("\n").split("\n"):
            print_note(line)
    print_note(f"silbo: {error}")
