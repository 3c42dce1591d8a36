"""The direct way from a payload's bytes to an event: decoded straight into the arguments of its class's constructor.

The long way, :func:`silbo.wire.decode.to_event`, makes a dict of the bytes, copies that, and converts the copy: it takes five times
as long. The direct way refuses nothing. It leaves every class that it can't serve to the long way, and every payload that is not
just what the class declares. So the long way alone knows what is wrong with a message, and what is to be done about it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import UTC, datetime
from inspect import getattr_static
from typing import Any, Final
from uuid import UUID

import msgspec

from silbo.errors import MessageInvalid
from silbo.wire.encode import MAX_DEPTH, format_time
from silbo.wire.faults import explain_refusal
from silbo.wire.fields import EventFields, event_fields, once_per_class
from silbo.wire.readers import Constructor, FieldReader, convert_custom, object_fields, place_error

__all__ = ["find_reader", "read_directly"]

_IDENTITY: Final = ("event_id", "event_timestamp")


def read_directly(payload: msgspec.Raw, cls: type) -> Any:
    """Return a new event made of a payload's bytes; None if the long way has to read them.

    Args:
        payload: The bytes.
        cls: The class of the event, one that :func:`~silbo.wire.decode.check_class` has let pass.

    Raises:
        MessageInvalid: the class's constructor refuses the values.
    """
    read = find_reader(cls)
    return None if read is None else read(bytes(payload))


@once_per_class
def find_reader(cls: type) -> Callable[[bytes], Any] | None:
    """Return the direct reader of a class; None if its events are for the long way.

    The reader makes an event of a payload's bytes; None if the long way has to read them.
    """
    fields = event_fields(cls)
    keywords = Constructor(cls, fields.names).find_keywords()
    if keywords is None or fields.library == "pydantic" or not _takes_identity(cls, fields):
        return None
    declared = object_fields(cls, fields.names)
    if not FieldReader(declared, {}).is_native:
        return None
    columns: list[tuple[str, Any] | tuple[str, Any, Any]] = [("event_id", UUID), ("event_timestamp", datetime)]
    for keyword, attribute in keywords.items():
        wire, hint = declared[attribute]
        columns.append((keyword, hint, msgspec.field(name=wire)))
    # A key that the class does not have may hold anything: only the long way looks into it.
    arguments = msgspec.defstruct("Arguments", columns, forbid_unknown_fields=True)
    if _has_decimals(msgspec.inspect.type_info(arguments), set()):
        return None
    make = _call_by_position(cls) if _takes_positions(cls, [*keywords]) else _call_by_keyword(cls, [*keywords])
    return _make_reader(cls, make, msgspec.json.Decoder(arguments, dec_hook=convert_custom))


def _takes_positions(cls: Any, keywords: list[str]) -> bool:
    """Return True if a call with the values by position does the same as one with these keywords."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (ValueError, TypeError):
        return False
    return all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters) and keywords == [
        parameter.name for parameter in parameters
    ]


def _call_by_position(cls: Any) -> Callable[[list[Any]], Any]:
    return lambda values: cls(*values)  # saves a tenth of the consumer's instructions


def _call_by_keyword(cls: Any, keywords: list[str]) -> Callable[[list[Any]], Any]:
    return lambda values: cls(**dict(zip(keywords, values, strict=True)))


def _make_reader(
    cls: Any, make: Callable[[list[Any]], Any], decoder: msgspec.json.Decoder[Any]
) -> Callable[[bytes], Any]:
    # To write into __dict__ would make every later read of an attribute slower; a Struct accepts nothing else.
    by_dict = issubclass(cls, msgspec.Struct)
    by_assignment = cls.__setattr__ is object.__setattr__

    def read(payload: bytes) -> Any:
        if payload.count(b"{") + payload.count(b"[") > MAX_DEPTH:  # perhaps it is nested too deep
            return None
        try:
            event_id, when, *values = msgspec.structs.astuple(decoder.decode(payload))
            if when.tzinfo is not UTC:
                when = msgspec.convert(format_time(when), datetime)
        except Exception:  # noqa: BLE001  # also the constructors of classes inside of the event
            return None
        try:
            event = make(values)
        except MessageInvalid as error:
            raise place_error(error, "payload") from None
        except Exception as error:  # the host's own constructor and validators
            raise explain_refusal(cls, error) from error
        if by_assignment:
            event.event_id = event_id
            event.event_timestamp = when
        elif by_dict:
            event.__dict__.update(event_id=event_id, event_timestamp=when)
        else:
            object.__setattr__(event, "event_id", event_id)
            object.__setattr__(event, "event_timestamp", when)
        return event

    return read


def _takes_identity(cls: type, fields: EventFields) -> bool:
    """Return True if events of a class have a ``__dict__``, and an id and a time in it that are no fields of its own."""
    declared = {*fields.names, *fields.names.values()}
    return cls.__dictoffset__ != 0 and not any(
        name in declared or hasattr(type(getattr_static(cls, name, None)), "__set__") for name in _IDENTITY
    )


def _has_decimals(found: Any, seen: set[int]) -> bool:
    """Return True if a type holds decimals: of a JSON number, bytes and dict give different ones."""
    if isinstance(found, msgspec.inspect.DecimalType):
        return True
    if id(found) in seen:
        return False
    seen.add(id(found))
    if isinstance(found, tuple):
        return any(_has_decimals(item, seen) for item in found)
    if isinstance(found, msgspec.inspect.Type | msgspec.inspect.Field):
        return any(_has_decimals(getattr(found, name), seen) for name in found.__struct_fields__)
    return False
