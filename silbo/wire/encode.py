"""Payloads: plain JSON values made from Python's, and the limits that both directions keep to."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Hashable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from math import isfinite
from typing import Any, Final, Literal
from uuid import UUID, uuid4

import msgspec

from silbo.errors import MessageInvalid, MessageRefused
from silbo.event import ENVELOPE, ECSTEvent, NotificationEvent
from silbo.message import Message, new_publication
from silbo.wire.fields import Shape, contents, shape_of

__all__ = [
    "to_message",
    "KINDS",
    "MAX_DEPTH",
    "MAX_SIZE",
    "UNCHANGED",
    "UNREADABLE",
    "Unwritable",
    "invalid",
    "is_too_deep",
    "plain",
    "timestamp",
    "uuid_text",
]

MAX_SIZE: Final = 1024 * 1024
"""The most bytes of one encoded message."""
MAX_DEPTH: Final = 64
"""The most levels of objects and arrays in a payload, itself included."""

UNREADABLE: Final = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
"""What comes out of msgspec for input that is wrong."""
UNCHANGED: Final = frozenset({str, int, bool, type(None)})
"""The types that are JSON as they are."""


_builtins: Callable[[object], Any] = msgspec.to_builtins


class Unwritable(Exception):
    """A value that JSON can't carry; ``path`` is where in the payload, as ``items[3].price``."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem, self.path = problem, ""

    def under(self, step: str) -> Unwritable:
        """The same, seen from one level above."""
        self.path = f"{step}{self.path}" if self.path.startswith("[") or not self.path else f"{step}.{self.path}"
        return self


def plain(value: Any, depth: int = 2) -> Any:
    """A value as JSON values that share nothing mutable with it.

    Naive datetimes stay naive, aware ones keep their offset; bytes become base64, sets and tuples arrays.

    Args:
        value: Anything an event may hold.
        depth: The level it is at, when the payload itself is 1.

    Raises:
        Unwritable: JSON can't carry it; says where.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else _text(value)
    if kind is bool or value is None:
        return value
    if kind is int:
        return value if -(2**64) < value < 2**64 else _integer(value)
    if kind is not list and kind is not dict:
        if isinstance(value, Enum):
            return plain(value.value, depth)
        if (write := _LEAVES.get(kind) or _by_base(value)) is not None:
            return write(value)
    if depth > MAX_DEPTH:
        raise Unwritable(f"nested more than {MAX_DEPTH} levels deep, or contains itself")
    if isinstance(value, list | tuple | AbstractSet):
        return _array(value, depth)
    if isinstance(value, Mapping):
        return _object(value, depth)
    inside = contents(value)
    if inside is None:
        raise Unwritable(f"{kind.__qualname__} objects can't be written as JSON")
    return _array(inside, depth) if isinstance(inside, list) else _object(inside, depth)


def _by_base(value: Any) -> Callable[[Any], Any] | None:
    """For subclasses: asyncpg's UUID, pendulum's datetime, numpy's float64, an EventName."""
    return next((write for base, write in _LEAVES.items() if isinstance(value, base)), None)


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unwritable("has a lone surrogate, so it is no text") from None
    return str.__str__(value)


def _integer(value: int) -> int:
    try:
        str(int(value))
    except ValueError:  # beyond sys.get_int_max_str_digits()
        raise Unwritable("an integer with too many digits") from None
    return int(value)


def _float(value: float) -> float:
    if isfinite(value):
        return float(value)
    raise Unwritable(f"{float(value)} is no JSON number")


def _decimal(value: Decimal) -> str:
    if value.is_finite():
        return str(value)
    raise Unwritable(f"{value} is no number")


def _base64(value: bytes | bytearray | memoryview) -> str:
    return b64encode(value).decode("ascii")


def _datetime(value: datetime) -> str:
    if value.tzinfo is not UTC:
        offset = value.utcoffset()
        if offset is None or (offset and not offset % timedelta(minutes=1)):  # an RFC 3339 offset has no seconds
            return value.isoformat()
    try:
        return timestamp(value)
    except ValueError as error:
        raise Unwritable(str(error)) from None


def uuid_text(value: UUID) -> str:
    """A UUID as text."""
    return _builtins(value) if type(value) is UUID else str(value)  # a fifth of what str() takes


_LEAVES: Final[dict[type, Callable[[Any], Any]]] = {
    UUID: uuid_text,
    datetime: _datetime,  # before date, its base
    float: _float,
    Decimal: _decimal,
    date: date.isoformat,
    time: _builtins,
    timedelta: _builtins,
    bytes: _base64,
    bytearray: _base64,
    memoryview: _base64,
    str: _text,
    int: _integer,
}


def timestamp(value: datetime) -> str:
    """An instant in UTC, with ``Z``; a naive one is read as UTC.

    Raises:
        ValueError: in UTC it is before the year 1 or after 9999.
    """
    if value.tzinfo is not UTC:
        try:
            value = value.replace(tzinfo=UTC) if value.utcoffset() is None else value.astimezone(UTC)
        except OverflowError:
            raise ValueError(f"{value} is out of range in UTC") from None
    if type(value) is datetime:
        return _builtins(value)  # type: ignore[no-any-return]  # a tenth of what isoformat() takes
    return f"{value.isoformat()[:-6]}Z"


def _array(value: Any, depth: int) -> list[Any]:
    result: list[Any] = []
    for item in value:
        try:
            result.append(item if type(item) is int else plain(item, depth + 1))
        except Unwritable as error:
            raise error.under(f"[{len(result)}]") from None
    return result


def _object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        try:
            name = key if type(key) is str and key.isascii() else _key(key)
            result[name] = plain(item, depth + 1)
        except Unwritable as error:
            raise error.under(str(key)) from None
    if len(result) != len(value):
        raise Unwritable("two of its keys are the same as text")
    return result


def _key(key: Any) -> str:
    if isinstance(key, bool) or not isinstance(text := plain(key, MAX_DEPTH + 1), str | int | float):
        raise Unwritable(f"a key of type {type(key).__qualname__}")
    return text if isinstance(text, str) else str(text)


def is_too_deep(payload: dict[str, Any]) -> bool:
    """Whether decoded JSON has more levels than MAX_DEPTH."""
    level: list[Any] = [payload]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return False
    return True


# -- an event as a message --------------------------------------------------------------------------------


KINDS: dict[str, type[NotificationEvent | ECSTEvent]] = {
    "notification_event": NotificationEvent,
    "ecst_event": ECSTEvent,
}


def to_message(
    event: Any,
    *,
    name: Hashable,
    kind: Literal["notification", "ecst"],
    key: str | None = None,
    to: str | None = None,
    version: int = 1,
) -> Message:
    """A snapshot of an event as it is now: its declared fields, for a plain class its public attributes.

    Id and time are the event's own ``event_id`` and ``event_timestamp`` (a naive time is read as UTC); an event that has
    none gets new ones, each time.

    Args:
        event: Any object.
        name: The event name it is dispatched under; a string.
        kind: As what it leaves.
        key: Its routing key.
        to: The address that a route chose.
        version: Of its payload.

    Raises:
        MessageRefused: it can't be written as JSON; names the field.
    """
    if not isinstance(name, str):
        raise MessageRefused(name, "only events with a string as name can leave the process")
    try:
        shape = shape_of(type(event))
        event_id, payload = _snapshot(event, shape)
    except Unwritable as error:
        raise MessageRefused(name, error.problem, field=error.path or None) from None
    except Exception as error:  # the host's properties and serializers
        raise MessageRefused(name, str(error) or repr(error)) from error
    headers = {"publication": new_publication(), "version": str(version)}
    if key is not None:
        headers["key"] = key
    return Message(
        f"{kind}_event",
        name if type(name) is str else str.__str__(name),
        event_id,
        payload,
        headers,
        to,
        type(event).__name__,
    )


def _snapshot(event: Any, shape: Shape) -> tuple[str, dict[str, Any]]:
    event_id = shape.unread_id(event) if shape.unread_id is not None else None
    if event_id is None:
        event_id = _id(getattr(event, shape.id_field, None))
    payload: dict[str, Any] = {
        "event_id": event_id,
        "event_timestamp": _time(getattr(event, shape.time_field, None)),
    }
    if shape.library == "plain":
        values = _public(event)
    elif shape.library == "pydantic":
        values = _dumped(event, shape)
    else:
        values = ((wire, getattr(event, attribute, msgspec.UNSET)) for attribute, wire in shape.fields)
    for wire, value in values:
        try:
            if value is not msgspec.UNSET:
                payload[wire] = plain(value)
        except Unwritable as error:
            raise error.under(wire) from None
    return event_id, payload


def _id(value: Any) -> str:
    if value is None:
        return str(uuid4())
    try:
        return uuid_text(value if isinstance(value, UUID) else UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise Unwritable(f"an event's id is a UUID, not {type(value).__qualname__} {value!r}").under(
            "event_id"
        ) from None


def _time(value: Any) -> str:
    if value is None:
        return timestamp(datetime.now(UTC))
    try:
        return timestamp(value if isinstance(value, datetime) else datetime.fromisoformat(value))
    except (ValueError, TypeError):
        problem = f"an event's time is a datetime, not {type(value).__qualname__} {value!r}"
        raise Unwritable(problem).under("event_timestamp") from None


def _public(event: Any) -> Iterator[tuple[str, Any]]:
    """The public attributes of a plain object, those in slots too."""
    values: dict[str, Any] = dict(getattr(event, "__dict__", {}))
    for cls in type(event).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for attribute in (slots,) if isinstance(slots, str) else slots:
            values.setdefault(attribute, getattr(event, attribute, msgspec.UNSET))
    if type(event) in KINDS.values() and isinstance(values.get("payload"), dict):
        values = values["payload"]  # one that arrived without a class leaves as it came
    for attribute, value in values.items():
        if not (attribute.startswith("_") or attribute in ENVELOPE or attribute in ("event_id", "event_timestamp")):
            yield attribute, value


def _dumped(event: Any, shape: Shape) -> Iterator[tuple[str, Any]]:
    """The fields of a pydantic model, through its own serializers."""
    attributes = {attribute for attribute, _ in shape.fields}
    dumped = event.model_dump(include=attributes, by_alias=True, round_trip=True, warnings=False)
    return ((wire, dumped[wire]) for _, wire in shape.fields)


# -- what msgspec finds wrong ------------------------------------------------------------------------------

# msgspec tells the place inside of a value in its text alone. Where a release words it differently, the place is the
# value's own, and the text is all of msgspec's.
_WHERE: Final = re.compile(r"(?P<problem>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*?)`)?", re.DOTALL).fullmatch
_MISSING: Final = re.compile(r"Object missing required field `(.*)`", re.DOTALL).fullmatch


def invalid(error: Exception, *, under: str = "") -> MessageInvalid:
    """What msgspec found wrong, with the field's name where it gives one.

    The kind of fault is told by the class of the error and said in our words: texts change between releases.

    Args:
        error: msgspec's, or what else comes out of it (UnicodeError, RecursionError).
        under: The part of the message that was read, as ``payload``.
    """
    if isinstance(error, UnicodeError):
        return MessageInvalid("not UTF-8", field=under or None)
    if isinstance(error, RecursionError):
        return MessageInvalid(f"nested more than {MAX_DEPTH} levels deep", field=under or None)
    if isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError):
        return MessageInvalid(f"not JSON: {error}", field=under or None)
    match = _WHERE(str(error))
    problem, path = (match["problem"], match["path"]) if match else (str(error), None)
    if missing := _MISSING(problem):
        problem, path = "missing", f"{path}.{missing[1]}" if path else missing[1]
    field = f"{under}{'' if path.startswith('[') or not under else '.'}{path}" if path else under
    return MessageInvalid(problem, field=field or None)
