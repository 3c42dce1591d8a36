"""The fields of event classes: the attributes that leave, and their names on the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from msgspec import UNSET

from silbo.event import ENVELOPE, check_fields, declared_fields, find_id_maker

__all__ = ["EventFields", "event_fields", "nested_values", "once_per_class", "wire_names"]

_T = TypeVar("_T")


def once_per_class(function: Callable[[type], _T]) -> Callable[[type], _T]:
    """Cache a function of a class: its result is stored on the class itself, and freed with the class."""
    attribute = f"__silbo_{function.__name__}__"

    @wraps(function)
    def cached(cls: type) -> _T:
        kept: tuple[type, _T] | None = cls.__dict__.get(attribute)
        if (
            kept is not None and kept[0] is cls
        ):  # a copy of the class (attrs and dataclasses with slots) has the original's
            return kept[1]
        result = function(cls)
        try:
            type.__setattr__(cls, attribute, (cls, result))
        except TypeError:
            pass  # a class written in C accepts no attribute
        return result

    return cached


class EventFields(NamedTuple):
    """The fields of an event class that leave.

    Attributes:
        library: The library that declares the fields, ``dataclass``, ``attrs``, ``struct`` or ``pydantic``; ``plain`` for a
            class without declared fields.
        names: The wire name of each attribute, in declared order.
        payload: Pairs of attribute and wire name, without the event's id and time.
        id_field: The attribute that holds the event's id.
        time_field: The attribute that holds the event's time.
        make_id: Gives the id of an event as text, or None if it has been read or set; None if the class declares its own.
    """

    library: str
    names: dict[str, str]
    payload: tuple[tuple[str, str], ...]
    id_field: str
    time_field: str
    make_id: Callable[[Any], str | None] | None


@once_per_class
def event_fields(cls: type) -> EventFields:
    """Return the fields of an event class.

    Raises:
        EnvelopeConflict: one of its fields has a name that belongs to the envelope.
        TypeError: two of its fields have the same name on the wire.
    """
    check_fields(cls)
    library, declared = wire_names(cls)
    wires: dict[str, str] = {}
    for attribute, wire in declared.items():
        if attribute in ENVELOPE or (attribute.startswith("_") and wire == attribute):
            continue
        if wire in wires:
            raise TypeError(f"{cls.__qualname__}: {wires[wire]!r} and {attribute!r} are both {wire!r} on the wire")
        wires[wire] = attribute
    names = {attribute: wire for wire, attribute in wires.items()}
    id_field = wires.pop("event_id", "event_id")
    time_field = wires.pop("event_timestamp", "event_timestamp")
    return EventFields(
        library=library,
        names=names,
        payload=tuple((attribute, wire) for wire, attribute in wires.items()),
        id_field=id_field,
        time_field=time_field,
        make_id=find_id_maker(cls) if id_field == "event_id" else None,
    )


def wire_names(cls: type) -> tuple[str, dict[str, str]]:
    """Return the library that declares the fields of a class, and the wire name of each attribute."""
    declared = declared_fields(cls)
    if declared is None:
        return "plain", {}
    if (encoded := getattr(cls, "__struct_encode_fields__", None)) is not None:
        return "struct", dict(zip(declared, encoded, strict=True))
    if hasattr(cls, "__pydantic_fields__") and hasattr(cls, "model_validate"):
        models = cls.__pydantic_fields__.items()
        return "pydantic", {name: field.serialization_alias or name for name, field in models if not field.exclude}
    if (attributes := getattr(cls, "__attrs_attrs__", None)) is not None:
        return "attrs", {field.name: field.metadata.get("wire", field.name) for field in attributes}
    return "dataclass", {field.name: field.metadata.get("wire", field.name) for field in dataclasses.fields(cls)}


def nested_values(value: Any) -> Mapping[str, Any] | list[Any] | None:
    """Return the fields of an object inside a payload, under the names that its library reads; None for a plain class.

    Metadata ``wire`` counts only in the event's own fields: msgspec, which rebuilds nested objects, does not know it. A
    Struct with ``array_like`` gives a list.
    """
    cls = type(value)
    library, names = wire_names(cls)
    if library == "plain":
        return None
    if library == "pydantic":
        result: dict[str, Any] = value.model_dump(by_alias=True, round_trip=True, warnings=False)
        return result
    if library == "struct":
        return _struct_values(value, names)
    return {name: inside for name in names if (inside := getattr(value, name, UNSET)) is not UNSET}


def _struct_values(value: Any, names: Mapping[str, str]) -> Mapping[str, Any] | list[Any]:
    config = value.__struct_config__
    tag = {} if config.tag is None else {config.tag_field: config.tag}
    inside = tag | {wire: getattr(value, name) for name, wire in names.items()}
    return list(inside.values()) if config.array_like else {k: v for k, v in inside.items() if v is not UNSET}
