"""Events as messages: payloads of plain JSON values, and the limits of size and depth for both directions."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from math import isfinite
from typing import Any, Final, Literal
from uuid import UUID

import msgspec

from silbo.errors import MessageRefused
from silbo.event import ENVELOPE, ECSTEvent, NotificationEvent, new_id
from silbo.message import Message, make_message, new_publication
from silbo.wire.fields import EventFields, event_fields, is_root_model, model_values, nested_values

__all__ = [
    "EVENT_CLASSES",
    "JSON_SCALARS",
    "MAX_DEPTH",
    "MAX_SIZE",
    "Unwritable",
    "format_time",
    "to_json_value",
    "to_message",
]

MAX_SIZE: Final = 1024 * 1024
"""The largest encoded message, in bytes."""
MAX_DEPTH: Final = 64
"""The most levels of objects and arrays in a payload; the payload itself is the first."""
JSON_SCALARS: Final = frozenset({str, int, bool, type(None)})
"""The types whose values msgspec writes as JSON without a check of ours."""
EVENT_CLASSES: Final[dict[str, type[NotificationEvent | ECSTEvent]]] = {
    "notification_event": NotificationEvent,
    "ecst_event": ECSTEvent,
}
"""The classes of events that arrive without a class of their own, by ``message_type``."""

_to_builtins: Final[Callable[[object], Any]] = msgspec.to_builtins


class Unwritable(Exception):
    """A value can't be written as JSON.

    Attributes:
        path: The place of the value in the payload, as ``items[3].price``.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = ""

    def under(self, step: str) -> Unwritable:
        """Put one step in front of the path, and return this error."""
        self.path = f"{step}{self.path}" if self.path.startswith("[") or not self.path else f"{step}.{self.path}"
        return self


# -- events as messages -------------------------------------------------------------------------------------


def to_message(
    event: Any,
    *,
    name: Hashable,
    kind: Literal["notification", "ecst"],
    key: str | None = None,
    to: str | None = None,
    version: int = 1,
) -> Message:
    """Return a message with a snapshot of an event: its declared fields, or the public attributes of a plain class.

    Id and time are the event's ``event_id`` and ``event_timestamp``; a naive time is read as UTC. For an event without them
    each call makes new ones.

    Args:
        event: Any object.
        name: The name of its dispatch; must be a string.
        kind: The kind as which it leaves.
        key: The routing key.
        to: The address that a route chose.
        version: The version of the payload.

    Raises:
        MessageRefused: the event can't be written as JSON; the error names the field.
    """
    if not isinstance(name, str):
        raise MessageRefused(name, "only events with a string as name can leave the process")
    try:
        event_id, payload = _write_payload(event, event_fields(type(event)))
    except Unwritable as error:
        raise MessageRefused(name, error.problem, field=error.path or None) from None
    except Exception as error:  # the host's properties and serializers
        raise MessageRefused(name, str(error) or repr(error)) from error
    headers = {"publication": new_publication(), "version": "1" if version == 1 else str(version)}
    if key is not None:
        headers["key"] = key
    return make_message(  # positional, for speed: keywords would cost 8 % of this function
        f"{kind}_event",
        name if type(name) is str else str.__str__(name),
        event_id,
        payload,
        headers,
        to,
        type(event).__name__,
    )


def _write_payload(event: Any, fields: EventFields) -> tuple[str, dict[str, Any]]:
    event_id = fields.make_id(event) if fields.make_id is not None else None
    if event_id is None:
        event_id = _write_id(getattr(event, fields.id_field, None))
    when = fields.write_time(event) if fields.write_time is not None else None
    if when is None:
        when = _write_time(getattr(event, fields.time_field, None))
    payload: dict[str, Any] = {"event_id": event_id, "event_timestamp": when}
    library = fields.library
    if library == "plain" or library == "pydantic":
        for wire, value in _public_values(event) if library == "plain" else _model_values(event, fields):
            _write_field(payload, wire, value)
        return event_id, payload
    for attribute, wire in fields.payload:
        value = getattr(event, attribute, msgspec.UNSET)
        # The most common values are their own JSON; without this line a small event takes a fifth longer.
        if (type(value) is int and -(2**63) <= value < 2**64) or (type(value) is str and value.isascii()):
            payload[wire] = value
        else:
            _write_field(payload, wire, value)
    return event_id, payload


def _write_field(payload: dict[str, Any], wire: str, value: Any) -> None:
    try:
        if value is not msgspec.UNSET:
            payload[wire] = to_json_value(value)
    except Unwritable as error:
        raise error.under(wire) from None


def _write_id(value: Any) -> str:
    if value is None:
        return new_id()
    try:
        return _write_uuid(value if isinstance(value, UUID) else UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise Unwritable(f"an event's id is a UUID, not {type(value).__qualname__} {value!r}").under(
            "event_id"
        ) from None


def _write_time(value: Any) -> str:
    if value is None:
        return format_time(datetime.now(UTC))
    try:
        return format_time(value if isinstance(value, datetime) else datetime.fromisoformat(value))
    except (ValueError, TypeError):
        problem = f"an event's time is a datetime, not {type(value).__qualname__} {value!r}"
        raise Unwritable(problem).under("event_timestamp") from None


def _public_values(event: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public attributes of an object of a plain class, also those in slots, without its id and time."""
    values: dict[str, Any] = dict(getattr(event, "__dict__", {}))
    for cls in type(event).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for attribute in (slots,) if isinstance(slots, str) else slots:
            values.setdefault(attribute, getattr(event, attribute, msgspec.UNSET))
    if type(event) in EVENT_CLASSES.values() and isinstance(values.get("payload"), dict):
        values = values["payload"]  # an event that arrived without a class of its own leaves as it came
    for attribute, value in values.items():
        if not (attribute.startswith("_") or attribute in ENVELOPE or attribute in ("event_id", "event_timestamp")):
            yield attribute, value


def _model_values(event: Any, fields: EventFields) -> Iterable[tuple[str, Any]]:
    """Return the fields of a pydantic model as its own serializers write them."""
    values = model_values(event, dict(fields.payload), with_extras=False)
    return (("root", values),) if is_root_model(type(event)) else values.items()


# -- values as JSON -----------------------------------------------------------------------------------------


def to_json_value(value: Any, depth: int = 2) -> Any:
    """Return a value as plain JSON values that share nothing mutable with it.

    Naive datetimes stay naive, aware datetimes keep their offset; bytes become base64, sets and tuples become arrays.

    Args:
        value: Any value of an event.
        depth: The level of the value; the payload itself is level 1.

    Raises:
        Unwritable: JSON can't carry the value; the error has its path.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else _write_text(value)
    if kind is bool or value is None:
        return value
    if kind is int:
        return value if -(2**64) < value < 2**64 else _write_integer(value)
    if kind is not list and kind is not dict:
        if isinstance(value, Enum):
            return to_json_value(value.value, depth)
        if (write := _WRITERS.get(kind) or _find_writer(value)) is not None:
            return write(value)
    if depth > MAX_DEPTH:
        raise Unwritable(f"nested more than {MAX_DEPTH} levels deep, or contains itself")
    if isinstance(value, list | tuple | AbstractSet):
        return _write_array(value, depth)
    if isinstance(value, Mapping):
        return _write_object(value, depth)
    inside = nested_values(value)
    if inside is None:
        raise Unwritable(f"{kind.__qualname__} objects can't be written as JSON")
    return to_json_value(inside, depth)


def _find_writer(value: Any) -> Callable[[Any], Any] | None:
    """Find the writer for a subclass, as asyncpg's UUID, pendulum's datetime, numpy's float64 or an EventName."""
    return next((write for base, write in _WRITERS.items() if isinstance(value, base)), None)


def _write_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unwritable("has a lone surrogate, so it is no text") from None
    return str.__str__(value)


def _write_integer(value: int) -> int:
    try:
        str(int(value))
    except ValueError:  # beyond sys.get_int_max_str_digits()
        raise Unwritable("an integer with too many digits") from None
    return int(value)


def _write_float(value: float) -> float:
    if isfinite(value):
        return float(value)
    raise Unwritable(f"{float(value)} is no JSON number")


def _write_decimal(value: Decimal) -> str:
    if value.is_finite():
        return str(value)
    raise Unwritable(f"{value} is no number")


def _write_base64(value: bytes | bytearray | memoryview) -> str:
    return b64encode(value).decode("ascii")


def _write_datetime(value: datetime) -> str:
    if value.tzinfo is not UTC:
        offset = value.utcoffset()
        if offset is None or (offset and not offset % timedelta(minutes=1)):  # an RFC 3339 offset has no seconds
            return value.isoformat()
    try:
        return format_time(value)
    except ValueError as error:
        raise Unwritable(str(error)) from None


def _write_clock(value: time) -> Any:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise Unwritable(f"a time without a date has no offset in {value.tzinfo}")
    return _to_builtins(value)


def _write_uuid(value: UUID) -> str:
    return _to_builtins(value) if type(value) is UUID else str(value)  # in a fifth of the time of str()


_WRITERS: Final[dict[type, Callable[[Any], Any]]] = {
    UUID: _write_uuid,
    datetime: _write_datetime,  # before date, its base
    float: _write_float,
    Decimal: _write_decimal,
    date: date.isoformat,
    time: _write_clock,
    timedelta: _to_builtins,
    bytes: _write_base64,
    bytearray: _write_base64,
    memoryview: _write_base64,
    str: _write_text,
    int: _write_integer,
}


def format_time(value: datetime) -> str:
    """Return a datetime as ISO 8601 text in UTC, with ``Z``; a naive datetime is read as UTC.

    Raises:
        ValueError: in UTC it is before the year 1 or after the year 9999.
    """
    if value.tzinfo is not UTC:
        try:
            value = value.replace(tzinfo=UTC) if value.utcoffset() is None else value.astimezone(UTC)
        except OverflowError:
            raise ValueError(f"{value} is out of range in UTC") from None
    if type(value) is datetime:
        return _to_builtins(value)  # type: ignore[no-any-return]  # in a tenth of the time of isoformat()
    return f"{value.isoformat()[:-6]}Z"


def _write_array(value: Any, depth: int) -> list[Any]:
    result: list[Any] = []
    for item in value:
        try:
            result.append(item if type(item) is int else to_json_value(item, depth + 1))
        except Unwritable as error:
            raise error.under(f"[{len(result)}]") from None
    return result


def _write_object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        try:
            name = key if type(key) is str and key.isascii() else _write_key(key)
            result[name] = to_json_value(item, depth + 1)
        except Unwritable as error:
            raise error.under(str(key)) from None
    if len(result) != len(value):
        raise Unwritable("two of its keys are the same as text")
    return result


def _write_key(key: Any) -> str:
    if isinstance(key, bool) or not isinstance(text := to_json_value(key, MAX_DEPTH + 1), str | int | float):
        raise Unwritable(f"a key of type {type(key).__qualname__}")
    return text if isinstance(text, str) else str(text)
