"""What crosses the wire: an immutable :class:`Message`, and a :class:`Delivery` of one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple, Protocol
from uuid import uuid4

__all__ = ["Delivery", "Format", "Message", "Origin", "instance", "new_publication"]


class Origin(NamedTuple):
    """Where a message comes from: a program's name, and one process of it."""

    app: str
    instance: str


@dataclass(frozen=True, slots=True)
class Message:
    """The record that leaves: a snapshot, so that later changes to the event don't reach it.

    Attributes:
        message_type: ``notification_event`` or ``ecst_event``.
        message_name: The event name.
        message_id: The ``event_id``: it names the fact, however often it is sent. A UUID, as text: silbo's own consumers
            can't read another.
        payload: Plain JSON values; treat it as read-only.
        headers: ``publication`` names this one sending and is what duplicates are recognised by; ``version`` is the
            event's; ``app`` and ``instance`` are added by the broker; ``key`` is the routing key.
        to: The address that a route chose; None is the broker's default.
        class_name: The event's class, for formats that name it.
    """

    message_type: str
    message_name: str
    message_id: str
    payload: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    to: str | None = None
    class_name: str = ""

    @property
    def key(self) -> str | None:
        """The routing key; messages with the same one keep their order. None when the event has none."""
        return self.headers.get("key")

    @property
    def origin(self) -> Origin | None:
        """Who sent it; None before the broker sent it, and in formats without headers."""
        app = self.headers.get("app")
        return None if app is None else Origin(app, self.headers.get("instance", ""))


class Format(Protocol):
    """How a message looks as bytes."""

    @property
    def names(self) -> Literal["event", "class"]:
        """What ``message_name`` holds on the wire: the event name, or (Diator) the class name."""
        ...

    @property
    def content_type(self) -> str:
        """Its media type, for brokers that carry one beside a message."""
        ...

    def encode(self, message: Message, origin: Origin) -> bytes:
        """The bytes of a message that ``origin`` sends.

        Raises:
            MessageRefused: too large, or something in it can't be written.
        """
        ...

    def decode(self, raw: bytes) -> Message:
        """The message in these bytes.

        Raises:
            MessageInvalid: anything wrong with them; no other error comes out.
        """
        ...

    def channel(self, message: Message, prefix: str) -> str:
        """The Pub/Sub channel of a message: the address that a route chose, under the prefix, else the format's own."""
        ...

    def channels(self, pattern: str, prefix: str) -> Sequence[str]:
        r"""The Redis patterns that together cover an event name or pattern: a few too many match, never too few.

        For PSUBSCRIBE; one without ``*?[\\`` in it is a channel as it is. What a route sent to an address is not
        among them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Delivery:
    """One received message, as bytes: every attempt decodes them anew, so that no attempt sees another's changes.

    Attributes:
        raw: The message as it came.
        address: The channel or stream it came from.
        id: What the broker calls it; what is acknowledged. Empty where nothing can be.
        attempt: 1 at first. From 2 on it was given out before, and 2 are no attempt that is counted.
    """

    raw: bytes
    address: str
    format: Format
    id: str = ""
    attempt: int = 1

    def message(self) -> Message:
        """Decode it.

        Raises:
            MessageInvalid: the bytes are no message; names the field.
        """
        return self.format.decode(self.raw)


_instance = uuid4().hex
_publications = count(1)


def instance() -> str:
    """The id of this process, another one in each: 32 hexadecimal digits."""
    return _instance


def new_publication() -> str:
    """A name for one sending of a message, unique over all processes."""
    return f"{_instance}-{next(_publications)}"


def _renew() -> None:
    global _instance, _publications
    _instance, _publications = uuid4().hex, count(1)


os.register_at_fork(after_in_child=_renew)
