"""Arguments that several commands have: adding a command, common options, and parsing of values."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias

from silbo._checks import LONGEST, check_address
from silbo.errors import AddressInvalid
from silbo.message import Format
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON

__all__ = [
    "FORMATS",
    "Commands",
    "Time",
    "UsageError",
    "add_command",
    "add_command_group",
    "add_figures_option",
    "add_format_option",
    "add_json_option",
    "add_redis_options",
    "add_store_option",
    "add_stream_option",
    "find_moment",
    "make_count_parser",
    "parse_address",
    "parse_file",
    "parse_positive_seconds",
    "parse_retention",
    "parse_seconds",
    "parse_size",
    "parse_time",
]

Time: TypeAlias = datetime | timedelta
"""A moment, or the time before now."""
Commands: TypeAlias = Any
"""The type of the value of ``add_subparsers``; argparse has no public name for it."""

FORMATS: Final[dict[str, Format]] = {"json": JSON, "cloudevents": CLOUDEVENTS, "diator": DIATOR}
"""The formats by their names on the command line."""
UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
"""Seconds of each unit of a duration."""
SIZES: Final = {"": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}
"""Bytes of each unit of a size."""
_is_size = re.compile(r"([1-9]\d*)(kb|mb|gb)?", re.ASCII).fullmatch
_is_duration = re.compile(r"(\d+(?:\.\d+)?)([smhd])", re.ASCII).fullmatch


class UsageError(Exception):
    """The command can't be carried out with the arguments that were given."""


def add_command(
    commands: Commands, name: str, what: str, *, run: Callable[[argparse.Namespace], Awaitable[int]], epilog: str
) -> argparse.ArgumentParser:
    """Add a command; return its parser.

    Args:
        commands: The group to which the command belongs.
        name: Of the command.
        what: The command's purpose in a few words, for the help; begins with a small letter.
        run: Carries out the command with the parsed options; returns the exit code.
        epilog: The end of the command's help, with examples.
    """
    parser = _add_parser(commands, name, what, epilog)
    parser.set_defaults(run=run)
    return parser


def add_command_group(commands: Commands, name: str, what: str, *, epilog: str) -> Commands:
    """Add a command that has commands of its own; return what those are added to."""
    return _add_parser(commands, name, what, epilog).add_subparsers(title="commands", required=True, metavar="COMMAND")


def _add_parser(commands: Commands, name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--store``, the outbox's path or URL."""
    parser.add_argument(
        "--store",
        metavar="URL",
        default=os.environ.get("SILBO_STORE"),
        help="the outbox: a path or sqlite:///path for a file, postgresql+asyncpg://... or sqlite+aiosqlite://... for a "
        "database through SQLAlchemy; or in SILBO_STORE",
    )


def add_redis_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--redis``, the server's URL, and how to reach it, and ``--prefix``, the first part of its keys."""
    parser.add_argument(
        "--redis",
        metavar="URL",
        default=os.environ.get("SILBO_REDIS_URL"),
        help="redis://, rediss:// or unix:// ...; or in SILBO_REDIS_URL",
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        default=os.environ.get("SILBO_CLUSTER", "0") not in ("", "0"),
        help="the server of --redis is a node of a Redis Cluster; or SILBO_CLUSTER=1",
    )
    parser.add_argument(
        "--cacert",
        type=parse_file,
        metavar="FILE",
        help="with rediss://, the certificates of the authorities that are trusted (the system's)",
    )
    parser.add_argument(
        "--cert",
        type=parse_file,
        metavar="FILE",
        help="with rediss://, this client's certificate, and behind it its key (none)",
    )
    parser.add_argument(
        "--prefix",
        type=parse_address,
        default=os.environ.get("SILBO_PREFIX") or "silbo",
        help="the first part of every key, as the program's broker has it; or in SILBO_PREFIX (silbo)",
    )


def add_stream_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--stream`` to a command that otherwise takes all streams."""
    parser.add_argument(
        "--stream", type=parse_address, help="only this stream, by its address, as orders (all under the prefix)"
    )


def add_figures_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--figures``, the interval for the log."""
    parser.add_argument(
        "--figures",
        metavar="TIME",
        type=parse_positive_seconds,
        help="log the figures at this interval, if they changed (never)",
    )


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--format``, which has to be the format of the program's broker."""
    parser.add_argument("--format", choices=FORMATS, default="json", help="how messages look on the stream (json)")


def add_json_option(parser: argparse.ArgumentParser, what: str = "one JSON object") -> None:
    """Add ``--json``: the answer is for a program."""
    parser.add_argument("--json", action="store_true", help=f"{what}, for programs, in place of text for people")


# -- values -------------------------------------------------------------------------------------------------


def parse_seconds(text: str) -> float:
    """Return the seconds of a duration: ``90``, ``90s``, ``15m``, ``1.5h`` or ``7d``."""
    if found := _is_duration(text if text[-1:] in UNITS else f"{text}s"):
        seconds = float(found[1]) * UNITS[found[2]]
        if seconds > LONGEST:
            raise argparse.ArgumentTypeError(f"{text!r} is more than fifty years")
        return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 90s, 15m, 1h or 7d")


def parse_positive_seconds(text: str) -> float:
    """Return the seconds of a duration that is more than 0."""
    if seconds := parse_seconds(text):
        return seconds
    raise argparse.ArgumentTypeError(f"{text!r} must be more than 0: write 90s, 15m, 1h or 7d")


def parse_retention(text: str) -> float | None:
    """Return the seconds of a duration that is more than 0; None for ``forever``."""
    return None if text == "forever" else parse_positive_seconds(text)


def parse_size(text: str) -> int:
    """Return the bytes of a size: ``500mb``, ``2gb`` or ``1048576``; a kb is 1,024 bytes, as for Redis."""
    if found := _is_size(text.lower()):
        return int(found[1]) * SIZES[found[2] or ""]
    raise argparse.ArgumentTypeError(f"{text!r} is no size: write 500mb, 2gb or a number of bytes")


def parse_time(text: str) -> Time:
    """Return the time that an ISO 8601 text means, or the duration before now; ``now`` is none at all. No zone is UTC."""
    if text == "now":
        return timedelta()
    try:
        if _is_duration(text):
            return timedelta(seconds=parse_seconds(text))
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (argparse.ArgumentTypeError, ValueError, OverflowError) as error:
        problem = f"{text!r} is no time: write 2026-03-07T09:26Z; or 15m, 1h or 7d for a time before now; or now"
        raise argparse.ArgumentTypeError(problem) from error


def find_moment(time: Time, now: datetime) -> datetime:
    """Return the moment that a time means, by a clock that shows ``now``: the clock of the store, or of Redis."""
    return now - time if isinstance(time, timedelta) else time


def parse_file(text: str) -> str:
    """Return the path of a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return text


def parse_address(text: str) -> str:
    """Return a prefix, app, group or stream if its characters are allowed."""
    try:
        return check_address(text)
    except AddressInvalid as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_count_parser(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that are not less than ``least``."""

    def parse_count(text: str) -> int:
        if text.isascii() and text.isdigit() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")

    return parse_count
