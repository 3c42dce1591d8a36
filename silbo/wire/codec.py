"""The codec: an event as a Message, and back. :mod:`silbo.wire.formats` makes bytes of Messages."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID, uuid4

import msgspec

from silbo.errors import MessageInvalid, MessageRefused
from silbo.event import ENVELOPE, ECSTEvent, NotificationEvent
from silbo.message import Message, new_publication
from silbo.wire.decode import rebuild
from silbo.wire.encode import UNREADABLE, Unwritable, invalid, plain, timestamp, uuid_text
from silbo.wire.fields import Shape, shape_of

__all__ = ["to_event", "to_message"]

_KINDS: dict[str, type[NotificationEvent | ECSTEvent]] = {
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
    if type(event) in _KINDS.values() and isinstance(values.get("payload"), dict):
        values = values["payload"]  # one that arrived without a class leaves as it came
    for attribute, value in values.items():
        if not (attribute.startswith("_") or attribute in ENVELOPE or attribute in ("event_id", "event_timestamp")):
            yield attribute, value


def _dumped(event: Any, shape: Shape) -> Iterator[tuple[str, Any]]:
    """The fields of a pydantic model, through its own serializers."""
    attributes = {attribute for attribute, _ in shape.fields}
    dumped = event.model_dump(include=attributes, by_alias=True, round_trip=True, warnings=False)
    return ((wire, dumped[wire]) for _, wire in shape.fields)


def to_event(message: Message, cls: type | None) -> Any:
    """An event made of a message; it shares nothing with it.

    Args:
        message: As it came.
        cls: The class of its events, rebuilt from its annotations through its constructor. None gives a
            :class:`~silbo.NotificationEvent` or :class:`~silbo.ECSTEvent` with the ``payload`` as a dict.

    Returns:
        The event, with the message's id and time as ``event_id`` and ``event_timestamp``.

    Raises:
        MessageInvalid: the payload doesn't fit; names the field.
    """
    try:
        payload: dict[str, Any] = msgspec.to_builtins(dict(message.payload))
    except (TypeError, *UNREADABLE) as error:
        raise invalid(error, under="payload") from None
    identity = _identity(message, payload)
    if cls is not None:
        return rebuild(cls, payload, identity)
    kind = _KINDS.get(message.message_type)
    if kind is None:
        known = " or ".join(_KINDS)
        raise MessageInvalid(f"{message.message_type!r} is not {known}", field="message_type")
    event = kind()
    event.__dict__.update(identity, payload=payload)
    return event


def _identity(message: Message, payload: dict[str, Any]) -> dict[str, Any]:
    """The event's id and, where the message has one, its time; the payload gets them in their usual form."""
    payload.setdefault("event_id", message.message_id)
    try:
        identity: dict[str, Any] = {"event_id": UUID(payload["event_id"])}
    except (ValueError, AttributeError, TypeError):
        raise MessageInvalid(f"{payload['event_id']!r} is no UUID", field="payload.event_id") from None
    if "event_timestamp" in payload:
        try:
            when = msgspec.convert(payload["event_timestamp"], datetime)
            payload["event_timestamp"] = timestamp(when)
        except UNREADABLE as error:
            raise invalid(error, under="payload.event_timestamp") from None
        identity["event_timestamp"] = msgspec.convert(payload["event_timestamp"], datetime)
    return identity
