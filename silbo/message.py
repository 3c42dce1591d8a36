"""The immutable :class:`Message` that crosses the wire, a :class:`Delivery` of it, and the :class:`Format` of its bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, Self
from uuid import uuid4

from silbo._causes import CAUSATION, CORRELATION
from silbo.errors import HeaderInvalid, MessageInvalid

__all__ = [
    "Batch",
    "Delivery",
    "Format",
    "Headed",
    "LedPublication",
    "Message",
    "Origin",
    "check_header",
    "instance",
    "make_message",
    "new_publication",
    "own_origin",
]


VERSION_DIGITS: Final = 18
"""The most digits of a version."""
RESERVED_HEADERS: Final = ("app", "instance", "key", "publication", "version")
"""The headers that only silbo sets."""


class _Sender(NamedTuple):
    app: str
    instance: str


class Origin(_Sender):
    """The sender of a message: the name of a program, and the id of one process of it. A pair of the two.

    Attributes:
        app: The name of the program.
        instance: The id of the process.
        version: The version of the payload that it sent, before any ``upcast``. Not a part of the pair.
        epoch: The epoch in which this process leads the shard that the message came from; None if it came from no shard. Not a
            part of the pair. A later leader has a greater one: a store that remembers the greatest epoch that it has seen of
            a key can refuse what a process writes that was frozen meanwhile.
    """

    version: int = 1
    epoch: int | None = None
    _message: Headed | None = None

    def __new__(cls, app: str, instance: str, version: int = 1) -> Self:
        """Make the pair."""
        self = tuple.__new__(cls, (app, instance))
        if version != 1:
            self.version = version
        return self

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the message, as they came, with the correlation id also of a first message."""
        message = self._message
        return {} if message is None else {CORRELATION: message.message_id, **message.headers}


class Headed:
    """A message's key, version and origin, as its headers say."""

    __slots__ = ()

    if TYPE_CHECKING:
        message_id: str
        headers: Mapping[str, str]

    @property
    def key(self) -> str | None:
        """The routing key, or None: messages with the same key keep their order."""
        return self.headers.get("key")

    @property
    def version(self) -> int:
        """The version of the payload; 1 if the message does not tell.

        Raises:
            MessageInvalid: the header is not a whole number, 1 or more.
        """
        text = self.headers.get("version", "1")
        if text == "1":
            return 1
        if text.isascii() and text.isdigit() and len(text) <= VERSION_DIGITS and (version := int(text)):
            return version
        raise MessageInvalid(f"{text!r:.40} is not a version: 1, 2, 3 and so on", field="headers.version")

    @property
    def origin(self) -> Origin | None:
        """The sender; None before a broker has sent the message, and in formats without headers.

        Raises:
            MessageInvalid: the version is none.
        """
        headers = self.headers
        app = headers.get("app")
        if app is None:
            return None
        if headers.get("version", "1") == "1":
            origin = tuple.__new__(Origin, (app, headers.get("instance", "")))  # for speed
        else:
            origin = Origin(app, headers.get("instance", ""), self.version)
        origin._message = self  # noqa: SLF001  # most listeners don't read the headers, so they are made at the read
        return origin

    def follow(self) -> dict[str, str]:
        """Return the headers of a message that this one has caused: its correlation id and its causation id."""
        return {CORRELATION: self.headers.get(CORRELATION, self.message_id), CAUSATION: self.message_id}


def check_header(name: object, value: object) -> None:
    """Refuse a header that a host can't set.

    Raises:
        HeaderInvalid: the name is one that silbo sets, or the name or the value is no text.
    """
    if not isinstance(name, str) or not name:
        raise HeaderInvalid(name, "its name is a text, as 'tenant'")
    if name in RESERVED_HEADERS:
        raise HeaderInvalid(name, f"silbo sets {', '.join(RESERVED_HEADERS)} itself, so choose another name")
    if not isinstance(value, str):
        raise HeaderInvalid(name, f"its value is a text, not {type(value).__qualname__}; write str(...)")


@dataclass(frozen=True, slots=True)
class Message(Headed):
    """The record of an event that leaves the process: a snapshot, which later changes to the event don't reach.

    Attributes:
        message_type: ``notification_event`` or ``ecst_event``.
        message_name: The event name.
        message_id: The ``event_id``, a UUID as text; silbo's consumers refuse any other text. It names the fact: the same
            event sent twice has it twice.
        payload: Plain JSON values; treat it as read-only.
        headers: ``publication`` names this one sending: duplicates are recognised by it. ``version`` is the version of the
            payload, ``key`` the routing key. The broker adds ``app`` and ``instance``.
        to: The address that a route chose; None for the broker's default.
        class_name: The name of the event's class, for formats that send it.
        shards: The number of shards if ``to`` is one of them, as ``orders.3``; else 0.
    """

    message_type: str
    message_name: str
    message_id: str
    payload: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    to: str | None = None
    class_name: str = ""
    shards: int = 0


class _Draft(Headed):
    """A message that is being made. It has the slots of a Message, so that it can become one."""

    __slots__ = ("class_name", "headers", "message_id", "message_name", "message_type", "payload", "shards", "to")

    def __init__(
        self,
        message_type: str,
        message_name: str,
        message_id: str,
        payload: Mapping[str, Any],
        headers: Mapping[str, str],
        to: str | None,
        class_name: str,
        shards: int,
    ) -> None:
        self.message_type = message_type
        self.message_name = message_name
        self.message_id = message_id
        self.payload = payload
        self.headers = headers
        self.to = to
        self.class_name = class_name
        self.shards = shards


def make_message(
    message_type: str,
    message_name: str,
    message_id: str,
    payload: Mapping[str, Any],
    headers: Mapping[str, str],
    to: str | None = None,
    class_name: str = "",
    shards: int = 0,
) -> Message:
    """Return a Message, in a third of the time of ``Message(...)``.

    The ``__init__`` of a frozen dataclass calls ``object.__setattr__`` for each field: a sixth of the bridge's time.
    """
    draft: Any = _Draft(message_type, message_name, message_id, payload, headers, to, class_name, shards)
    draft.__class__ = Message
    message: Message = draft
    return message


class Format(Protocol):
    """An encoding of messages as bytes, and the Pub/Sub channels that go with it.

    It may also have a method ``check_header(name, value)``, which raises :class:`~silbo.errors.HeaderInvalid` for a header that it
    can't carry: a bridge calls it for the headers of its routes, when it is made.
    """

    @property
    def names(self) -> Literal["event", "class"]:
        """The meaning of ``message_name`` on the wire: the event name, or (Diator) the name of the event's class."""
        ...

    @property
    def content_type(self) -> str:
        """The media type of the bytes, for brokers that send it beside a message."""
        ...

    def encode(self, message: Message, origin: Origin) -> bytes:
        """Return the bytes of a message that ``origin`` sends.

        Raises:
            MessageRefused: the message is too large, or something in it can't be written.
        """
        ...

    def decode(self, raw: bytes) -> Message:
        """Return the message in these bytes.

        Raises:
            MessageInvalid: the bytes are not a valid message; no other error is raised.
        """
        ...

    def channel(self, message: Message, prefix: str) -> str:
        """Return the Pub/Sub channel of a message: the address that a route chose, under the prefix, else the format's own."""
        ...

    def channels(self, pattern: str, prefix: str) -> Sequence[str]:
        r"""Return the Redis patterns for PSUBSCRIBE that cover an event name or pattern.

        They may match too many channels, never too few. A pattern without ``*?[\\`` is itself a channel. Addresses that a
        route chose are not covered.
        """
        ...


@dataclass(frozen=True, slots=True)
class Delivery:
    """A received message as bytes: every attempt decodes them anew, so that no attempt sees the changes of another.

    Attributes:
        raw: The bytes of the message.
        address: The channel or stream that it came from.
        format: The format of the bytes.
        id: The broker's id, by which it is acknowledged; empty if the broker acknowledges nothing.
        attempt: 1 on first delivery. On redelivery, 2 plus the attempts counted so far.
        epoch: The epoch in which this consumer leads the shard that it came from; None if it came from no shard.
    """

    raw: bytes
    address: str
    format: Format
    id: str = ""
    attempt: int = 1
    epoch: int | None = None

    def message(self) -> Message:
        """Decode the bytes as a message.

        Raises:
            MessageInvalid: the bytes are not a valid message; the error names the field.
        """
        return self.format.decode(self.raw)


class LedPublication(str):
    """The publication of a delivery that came from a shard: a text that knows the shard and the epoch of its leader.

    Attributes:
        address: The shard.
        epoch: The epoch.
    """

    __slots__ = ("address", "epoch")

    address: str
    epoch: int

    def __new__(cls, publication: str, address: str, epoch: int) -> Self:
        """Make the text."""
        self = super().__new__(cls, publication)
        self.address = address
        self.epoch = epoch
        return self


class Batch:
    """Deliveries of one address that were never given out before, in their order: of each only its bytes and its id.

    A :class:`Delivery` is made of those that are asked for. Most are done without that, in a third of the time.

    Args:
        address: The channel or stream that they came from.
        format: The format of the bytes.
        raws: The bytes of each message.
        ids: The broker's id of each; empty if the broker acknowledges nothing.
        deliveries: The deliveries, if they are made already.
        epoch: The epoch in which this consumer leads the shard that they came from; None if they came from no shard.
    """

    __slots__ = ("address", "deliveries", "epoch", "format", "ids", "raws")

    def __init__(
        self,
        address: str,
        format: Format,  # noqa: A002  # the word of every broker
        raws: Sequence[bytes],
        ids: Sequence[str] = (),
        deliveries: Sequence[Delivery] = (),
        epoch: int | None = None,
    ) -> None:
        self.address = address
        self.epoch = epoch
        self.format = format
        self.raws = raws
        self.ids = ids
        self.deliveries = deliveries

    @classmethod
    def of(cls, deliveries: Sequence[Delivery]) -> Self:
        """Make a batch of deliveries; those that are not acknowledged don't mix with others."""
        first = deliveries[0]
        ids = [delivery.id for delivery in deliveries] if first.id else ()
        raws = [delivery.raw for delivery in deliveries]
        return cls(first.address, first.format, raws, ids, deliveries, first.epoch)

    def __len__(self) -> int:
        return len(self.raws)

    def __getitem__(self, index: int) -> Delivery:
        if self.deliveries:
            return self.deliveries[index]
        entry_id = self.ids[index] if self.ids else ""
        return Delivery(self.raws[index], self.address, self.format, entry_id, epoch=self.epoch)

    def __iter__(self) -> Iterator[Delivery]:
        return map(self.__getitem__, range(len(self.raws)))

    def cut(self, first: int, end: int) -> Batch:
        """Return the deliveries from the place ``first`` to the one before ``end``."""
        part = slice(first, end)
        return Batch(self.address, self.format, self.raws[part], self.ids[part], self.deliveries[part], self.epoch)


_instance = uuid4().hex
_publications = count(1)


def instance() -> str:
    """Return the id of this process: 32 hexadecimal digits, different in each process."""
    return _instance


@lru_cache(maxsize=256)
def own_origin(app: str) -> Origin:
    """Return the origin of what this process sends under the name of a program."""
    return Origin(app, _instance)


def new_publication() -> str:
    """Return a new name for one sending of a message, unique over all processes."""
    return f"{_instance}-{next(_publications)}"


def _renew() -> None:
    """Give a forked child process an id of its own."""
    global _instance, _publications
    _instance = uuid4().hex
    _publications = count(1)
    own_origin.cache_clear()


os.register_at_fork(after_in_child=_renew)
