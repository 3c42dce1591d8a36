"""A dead letter, as it lies in Redis and as it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from silbo.message import Message
from silbo.protocols import Format
from silbo.wire.formats import JSON

__all__ = ["EPOCH", "DeadLetter", "read"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a group has given up.

    Attributes:
        id: Its own.
        group: Which has given up; other groups are not affected.
        stream: The key of the stream that it came from.
        entry: What its id was there, and is, as long as the stream keeps it.
        error: Why the last attempt failed.
        attempts: How many there were; 0 where it was malformed.
        app: The program whose consumer gave up.
        consumer: Which one.
        time: When, by Redis's clock: aware, UTC.
        raw: The message as it came.
    """

    id: str
    group: str
    stream: str
    entry: str
    error: str
    attempts: int
    app: str
    consumer: str
    time: datetime
    raw: bytes
    format: Format = field(default=JSON, repr=False, compare=False)

    def message(self) -> Message:
        """Decode it.

        Raises:
            MessageInvalid: the bytes are no message; it may be dead for that.
        """
        return self.format.decode(self.raw)


def read(row: Any, format: Format) -> DeadLetter:  # noqa: A002  # the word of every broker
    """An entry of the stream, as Redis answers with it; what somebody else wrote there has empty fields."""
    letter_id, flat = row[0].decode(), row[1]
    fields: dict[bytes, bytes] = dict(zip(flat[::2], flat[1::2], strict=True))

    def text(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="replace")

    def number(name: bytes, default: int) -> int:
        return int(fields[name]) if fields.get(name, b"").isdigit() else default

    died = number(b"time", int(letter_id.partition("-")[0]))
    return DeadLetter(
        id=letter_id,
        group=text(b"group"),
        stream=text(b"stream"),
        entry=text(b"id"),
        error=text(b"error"),
        attempts=number(b"attempts", 0),
        app=text(b"app"),
        consumer=text(b"consumer"),
        time=EPOCH + timedelta(milliseconds=died),
        raw=fields.get(b"message", b""),
        format=format,
    )
