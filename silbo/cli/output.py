"""What goes to stdout, for people and for programs, and to stderr."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from silbo.cli.arguments import UsageError
from silbo.message import Message

__all__ = [
    "ReaderGone",
    "ago",
    "confirmed",
    "many",
    "message_fields",
    "not_there",
    "object_line",
    "printable",
    "say",
    "size",
    "time",
    "write",
]


class ReaderGone(Exception):
    """Whoever read stdout has closed it."""


def write(text: str) -> None:
    """Print a line, now.

    Raises:
        ReaderGone: nobody reads it.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise ReaderGone from error


def say(text: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def object_line(fields: Mapping[str, Any]) -> None:
    """Print an object for a program; times in ISO 8601, UTC."""
    write(json.dumps(fields, default=_plain))


def confirmed(question: str, *, yes: bool) -> bool:
    """Whether to go on: ``--yes`` was given, or somebody at a terminal says so.

    Raises:
        UsageError: there is nobody to ask.
    """
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question} There is no terminal to ask on: say --yes")
    # The loop answers a Ctrl-C when it comes to run again, which is not before the line is read.
    loops = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.stderr.write(f"{question} [y/N] ")
        sys.stderr.flush()
        answer = sys.stdin.readline().strip().lower()
    finally:
        signal.signal(signal.SIGINT, loops)
    if answer in ("y", "yes"):
        return True
    say("nothing was done")
    return False


# -- values -------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """With control characters written out."""
    return "".join(
        character if character.isprintable() or character == " " else repr(character)[1:-1] for character in text
    )


def time(moment: datetime | None) -> str | None:
    """To the second, in UTC."""
    return None if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def ago(moment: datetime) -> str:
    """``12 s``, ``3 min``, ``5 h`` or ``4 days``, from then to now or from now to then."""
    seconds = abs((datetime.now(UTC) - moment).total_seconds())
    for unit, length, least in (("days", 86400, 2), ("h", 3600, 2), ("min", 60, 2)):
        if seconds >= length * least:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def message_fields(message: Message) -> dict[str, Any]:
    """Everything of it, for a program."""
    return {
        "message_type": message.message_type,
        "message_name": message.message_name,
        "message_id": message.message_id,
        "payload": message.payload,
        "headers": message.headers,
        "to": message.to,
    }


def many(number: int, what: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def not_there(ids: Sequence[object], done: int, what: str) -> str:
    """Why fewer were done than were named, at least one."""
    named = list(dict.fromkeys(ids))
    if len(named) == 1:
        return f"there is no {what} {named[0]}"
    return f"{len(named) - done} of the {len(named)} are no {what}s"


def size(number: float) -> str:
    """In bytes, KiB, MiB or GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} has no place in JSON")
