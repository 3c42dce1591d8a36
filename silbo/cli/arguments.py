"""What the commands have in common in their arguments."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from silbo._checks import check_address
from silbo.errors import AddressInvalid
from silbo.message import Format
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON

__all__ = [
    "FORMATS",
    "Commands",
    "UsageError",
    "address",
    "command",
    "count",
    "format_option",
    "json_option",
    "moment",
    "redis_options",
    "seconds",
    "some_seconds",
    "store_option",
    "yes_option",
]

Commands: TypeAlias = Any
"""What ``add_subparsers`` returns; argparse has no public name for it."""

FORMATS: Final[dict[str, Format]] = {"json": JSON, "cloudevents": CLOUDEVENTS, "diator": DIATOR}
UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_is_duration = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII).fullmatch


class UsageError(Exception):
    """The command can't be carried out as it was given."""


def command(commands: Commands, name: str, what: str, *, epilog: str = "", run: object = None) -> Any:
    """A parser for one command; for a group of commands where there is nothing to run."""
    new = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if run is None:
        return new.add_subparsers(title="commands", required=True, metavar="COMMAND")
    new.set_defaults(run=run)
    return new


def store_option(parser: argparse.ArgumentParser) -> None:
    """Where the outbox is."""
    parser.add_argument(
        "--store",
        metavar="URL",
        default=os.environ.get("SILBO_STORE"),
        help="the outbox: a path or sqlite:///path for a file, postgresql+asyncpg://... or sqlite+aiosqlite://... for a "
        "database through SQLAlchemy; or in SILBO_STORE",
    )


def redis_options(parser: argparse.ArgumentParser) -> None:
    """Where Redis is, and which keys in it are meant."""
    parser.add_argument(
        "--redis",
        metavar="URL",
        default=os.environ.get("SILBO_REDIS_URL"),
        help="redis://, rediss:// or unix:// ...; or in SILBO_REDIS_URL",
    )
    parser.add_argument("--prefix", type=address, default="silbo", help="the first part of every key (silbo)")


def format_option(parser: argparse.ArgumentParser) -> None:
    """As the brokers of the program have it."""
    parser.add_argument("--format", choices=FORMATS, default="json", help="how messages look on the stream (json)")


def json_option(parser: argparse.ArgumentParser, what: str = "one JSON object") -> None:
    """Whether a program reads the answer."""
    parser.add_argument("--json", action="store_true", help=f"{what} for programs, in place of text for people")


def yes_option(parser: argparse.ArgumentParser) -> None:
    """For what deletes, or sends many again."""
    parser.add_argument("--yes", action="store_true", help="don't ask; needed where there is no terminal to ask on")


# -- values -------------------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    """``90``, ``90s``, ``15m``, ``1.5h`` or ``7d``."""
    if found := _is_duration(text if text[-1:] in UNITS else f"{text}s"):
        return float(found[1]) * UNITS[found[2]]
    raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 90s, 15m, 1h or 7d")


def some_seconds(text: str) -> float:
    """The same, more than 0."""
    if number := seconds(text):
        return number
    raise argparse.ArgumentTypeError(f"{text!r} is no time at all: write 90s, 15m, 1h or 7d")


def moment(text: str) -> datetime:
    """A time, or how long ago; without a zone it is UTC, as all that silbo prints."""
    if text == "now":
        return datetime.now(UTC)
    try:
        if _is_duration(text):
            return datetime.now(UTC) - timedelta(seconds=seconds(text))
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        problem = f"{text!r} is no time: write 2026-03-07T09:26Z, or how long ago as 15m, 1h or 7d, or now"
        raise argparse.ArgumentTypeError(problem) from error


def address(text: str) -> str:
    """A prefix, app or stream."""
    try:
        return check_address(text)
    except AddressInvalid as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(least: int) -> Callable[[str], int]:
    """A whole number that is not less."""

    def number(text: str) -> int:
        if text.isascii() and text.isdigit() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")

    return number
