"""Messages as events: rebuilt from the payload by the annotations of the event's class, through its constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from silbo._reports import describe_error
from silbo.errors import ClassUnreadable, MessageInvalid
from silbo.event import ENVELOPE
from silbo.message import Message
from silbo.names import Upcast
from silbo.wire.encode import EVENT_CLASSES, format_time
from silbo.wire.faults import MSGSPEC_ERRORS, explain_refusal, to_message_invalid
from silbo.wire.fields import EventFields, event_fields, is_root_model, once_per_class
from silbo.wire.hints import find_hints, find_init_hints
from silbo.wire.readers import Constructor, FieldReader, Reader, model_steps, object_fields, place_error

__all__ = ["check_class", "to_event"]


def to_event(message: Message, cls: type | None, steps: Sequence[tuple[int, Upcast]] = ()) -> Any:
    """Return a new event made of a message; they share no mutable value.

    Args:
        message: A decoded message.
        cls: The class of the event, rebuilt from its annotations through its constructor. None gives a
            :class:`~silbo.NotificationEvent` or :class:`~silbo.ECSTEvent` with the ``payload`` as a dict.
        steps: Upcast functions, each with the version that it takes, in the order in which they are called.

    Returns:
        The event, with the message's id and time as ``event_id`` and ``event_timestamp``.

    Raises:
        MessageInvalid: the payload doesn't fit the class, and the error names the field; or a step failed, and the error names
            its version and function.
    """
    try:
        payload: dict[str, Any] = msgspec.to_builtins(dict(message.payload))
    except (TypeError, *MSGSPEC_ERRORS) as error:
        raise to_message_invalid(error, under="payload") from None
    identity = _read_identity(message, payload)
    if steps:
        payload = _upcast(payload, steps)
    if cls is not None:
        return _rebuild(cls, payload, identity)
    kind = EVENT_CLASSES.get(message.message_type)
    if kind is None:
        known = " or ".join(EVENT_CLASSES)
        raise MessageInvalid(f"{message.message_type!r:.100} is not {known}", field="message_type")
    event = kind()
    event.__dict__.update(identity, payload=payload)
    return event


def _read_identity(message: Message, payload: dict[str, Any]) -> dict[str, Any]:
    """Return the event's id and, if the message has one, its time; write both into the payload in their usual form."""
    payload.setdefault("event_id", message.message_id)
    try:
        identity: dict[str, Any] = {"event_id": UUID(payload["event_id"])}
    except (ValueError, AttributeError, TypeError):
        raise MessageInvalid(f"{payload['event_id']!r:.100} is no UUID", field="payload.event_id") from None
    if "event_timestamp" in payload:
        try:
            when = msgspec.convert(payload["event_timestamp"], datetime)
            payload["event_timestamp"] = format_time(when)
        except MSGSPEC_ERRORS as error:
            raise to_message_invalid(error, under="payload.event_timestamp") from None
        identity["event_timestamp"] = msgspec.convert(payload["event_timestamp"], datetime)
    return identity


def _upcast(payload: dict[str, Any], steps: Sequence[tuple[int, Upcast]]) -> dict[str, Any]:
    """Return the payload that the steps make. The event's id and time stay as they were sent."""
    kept = {name: payload[name] for name in _IDENTITY_TYPES if name in payload}
    for version, step in steps:
        name = getattr(step, "__qualname__", None) or repr(step)
        try:
            result: object = step(payload)
        except Exception as error:  # the host's function
            problem = f"upcast from version {version}: {name} raised {describe_error(error)}"
            raise MessageInvalid(problem, field="payload") from error
        if not isinstance(result, dict):
            problem = f"upcast from version {version}: {name} returned {type(result).__qualname__}, not a dict"
            raise MessageInvalid(problem, field="payload")
        payload = result
    return payload | kept


# -- objects of a class -------------------------------------------------------------------------------------

_IDENTITY_TYPES: Final = {"event_id": UUID, "event_timestamp": datetime}
"""The types of an event's id and time, for plain classes that don't annotate them."""


def _rebuild(cls: type, payload: dict[str, Any], identity: Mapping[str, Any]) -> Any:
    """Return an object of a class, with the event's id and time.

    Args:
        cls: A dataclass, attrs class, Struct, pydantic model or plain class.
        payload: Plain JSON values under their wire names, the event's id and time among them.
        identity: ``event_id`` and, if there is one, ``event_timestamp``; written into the ``__dict__`` if the class does not
            declare them.

    Raises:
        MessageInvalid: the payload does not fit the class, or the class can't be rebuilt.
    """
    try:
        reader = _make_reader(cls)
    except ClassUnreadable as error:
        raise MessageInvalid(str(error)) from None
    try:
        values = reader.read(payload)
    except Exception as error:  # noqa: BLE001  # also the constructors of classes inside of the event
        raise place_error(error, "payload") from error.__cause__
    try:
        event = reader.build(values)
    except MessageInvalid as error:
        raise place_error(error, "payload") from None
    except Exception as error:  # the host's own constructor and validators
        raise explain_refusal(cls, error) from error
    if hasattr(event, "__dict__"):  # an event without a __dict__ can't be dispatched: the dispatcher raises NotAnEvent
        for attribute, value in identity.items():
            if attribute not in reader.names:
                event.__dict__[attribute] = value
    return event


class _ClassReader(NamedTuple):
    """The two steps that rebuild an object of a class, made once for each class.

    Attributes:
        names: The wire names of the declared attributes; empty for a plain class.
        read: Converts a payload to the values of the attributes.
        build: Makes the object from these values.
    """

    names: Mapping[str, str]
    read: Callable[[dict[str, Any]], Any]
    build: Callable[[Any], Any]


@once_per_class
def _make_reader(cls: type) -> _ClassReader:
    """Return the steps that rebuild a class.

    Raises:
        ClassUnreadable: it can't be rebuilt.
    """
    try:
        fields = event_fields(cls)
        if fields.library == "pydantic":
            return _ClassReader(fields.names, *_find_model_steps(cls, fields))
        if fields.library == "plain":
            return _ClassReader({}, _make_plain_reader(cls), Constructor(cls, {}))
        reader = FieldReader(object_fields(cls, fields.names), {})
    except TypeError as error:
        raise ClassUnreadable(cls, str(error)) from None
    except RecursionError:
        raise ClassUnreadable(cls, "an annotation contains itself in ever new forms") from None
    return _ClassReader(fields.names, reader.read, Constructor(cls, fields.names))


def check_class(cls: type) -> None:
    """Refuse a class whose events can't be rebuilt from their messages.

    Raises:
        ClassUnreadable: an annotation can't be resolved, or JSON can't give back the values of one.
    """
    _make_reader(cls)


def _find_model_steps(cls: type, fields: EventFields) -> tuple[Reader, Reader]:
    read, build = model_steps(cls, fields.names, {})
    undeclared = _IDENTITY_TYPES.keys() - {*fields.names.values()}
    is_root = is_root_model(cls)

    def read_payload(payload: dict[str, Any]) -> Any:
        own = {name: value for name, value in payload.items() if name not in undeclared}
        return read(own.get("root") if is_root else own)

    return read_payload, build


def _make_plain_reader(cls: type) -> Reader:
    hints = find_init_hints(cls) | find_hints(cls)
    known = _IDENTITY_TYPES | {name: hint for name, hint in hints.items() if _is_public(name)}
    return partial(_read_plain, cls, FieldReader({name: (name, hint) for name, hint in known.items()}, {}))


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name not in ENVELOPE


def _read_plain(cls: type, annotated: FieldReader, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public attributes that the payload has, without those that would hide a method or property of the class."""
    values = {name: value for name, value in payload.items() if _is_public(name) and _is_free(cls, name)}
    return values | annotated.read(payload)


def _is_free(cls: type, name: str) -> bool:
    static = inspect.getattr_static(cls, name, None)
    return name in _IDENTITY_TYPES or inspect.ismemberdescriptor(static) or not hasattr(type(static), "__get__")
