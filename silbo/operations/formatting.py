"""Values as text: times, ages, sizes and counts for people; a message's fields for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from silbo._process import find_process
from silbo.message import Message

__all__ = [
    "explain_missing",
    "format_age",
    "format_count",
    "format_number",
    "format_options",
    "format_place",
    "format_seconds",
    "format_size",
    "format_time",
    "message_to_fields",
    "process_to_fields",
]


def format_time(time: datetime | None) -> str | None:
    """Return a time to the second, in UTC; None for None."""
    return None if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def format_age(time: datetime, now: datetime) -> str:
    """Return the time between now and a time, before or after now: ``12 s``, ``3 min``, ``5 h`` or ``4 days``."""
    return format_seconds(abs((now - time).total_seconds()))


def format_seconds(seconds: float) -> str:
    """Return a duration as ``12 s``, ``3 min``, ``5 h`` or ``4 days``."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def format_size(size: float) -> str:
    """Return a number of bytes in bytes, KiB, MiB or GiB."""
    if size < 1024:
        return f"{size:.0f} bytes"
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} GiB"


def format_count(count: int, noun: str) -> str:
    """Return a number with its noun: ``1 row``, ``1,200 rows``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_number(value: object) -> str:
    """Return a number without a needless ``.0``; another value as its text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_options(options: Mapping[str, Any]) -> str:
    """Return the options of a listener as ``once, timeout=5``."""
    return ", ".join(
        option if value is True else f"{option}={format_number(value)}" for option, value in options.items()
    )


def format_place(place: str) -> str:
    """Return a ``file:line``, relative to the current folder if the file is in it."""
    here = f"{Path.cwd()}/"
    return place.removeprefix(here)


def explain_missing(ids: Sequence[object], done: int, noun: str) -> str:
    """Return the reason why fewer things were done than the user named, at least one."""
    named = list(dict.fromkeys(ids))
    if len(named) == 1:
        return f"there is no {noun} {named[0]}"
    return f"{len(named) - done} of the {len(named)} are no {noun}s"


def message_to_fields(message: Message) -> dict[str, Any]:
    """Return all fields of a message, for JSON."""
    return {
        "message_type": message.message_type,
        "message_name": message.message_name,
        "message_id": message.message_id,
        "payload": message.payload,
        "headers": message.headers,
        "to": message.to,
    }


def process_to_fields(name: str) -> dict[str, str | int | None]:
    """Return the host and the pid that the name of a consumer or a relay tells, for JSON; None where it tells none."""
    host, pid = find_process(name) or (None, None)
    return {"host": host, "pid": pid}
