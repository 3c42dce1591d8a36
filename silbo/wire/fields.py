"""What the codec knows about a class: which attributes leave, and what they are called on the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from msgspec import UNSET

from silbo.event import ENVELOPE, check_fields, declared_fields, find_id_maker

__all__ = ["Shape", "contents", "once_per_class", "shape_of", "wire_names"]

_T = TypeVar("_T")


def once_per_class(find: Callable[[type], _T]) -> Callable[[type], _T]:
    """Find something out about a class once, and keep it on the class itself: it goes when the class goes."""
    attribute = f"__silbo_{find.__name__}__"

    @wraps(find)
    def found(cls: type) -> _T:
        kept: tuple[type, _T] | None = cls.__dict__.get(attribute)
        if kept is not None and kept[0] is cls:  # a copy of the class (attrs and dataclass slots) starts anew
            return kept[1]
        result = find(cls)
        try:
            type.__setattr__(cls, attribute, (cls, result))
        except TypeError:
            pass  # a class written in C keeps nothing
        return result

    return found


class Shape(NamedTuple):
    """Which attributes of a class leave.

    Attributes:
        library: Which one declares the fields; ``plain`` where none does.
        names: Attribute -> wire name, in declared order.
        fields: The same in pairs, without the event's id and time.
        id_field: The attribute that holds the event's id.
        time_field: The attribute that holds the event's time.
        unread_id: Gives the id as text, where silbo makes it.
    """

    library: str
    names: dict[str, str]
    fields: tuple[tuple[str, str], ...]
    id_field: str = "event_id"
    time_field: str = "event_timestamp"
    unread_id: Callable[[Any], str | None] | None = None


@once_per_class
def shape_of(cls: type) -> Shape:
    """The shape of an event class.

    Raises:
        EnvelopeConflict: one of its fields has a name that belongs to the envelope.
        TypeError: two of its fields have one name on the wire.
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
    fields = tuple((attribute, wire) for wire, attribute in wires.items())
    return Shape(library, names, fields, id_field, time_field, find_id_maker(cls) if id_field == "event_id" else None)


def wire_names(cls: type) -> tuple[str, dict[str, str]]:
    """The library that declares a class's fields, and each attribute with its name on the wire."""
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


def contents(value: Any) -> Mapping[str, Any] | list[Any] | None:
    """What is inside an object that an event holds, under the names its own library reads; None for a plain class.

    A ``wire`` name counts in an event's own fields alone: msgspec, which rebuilds what is nested, knows none.
    """
    cls = type(value)
    library, names = wire_names(cls)
    if library == "plain":
        return None
    if library == "pydantic":
        result: dict[str, Any] = value.model_dump(by_alias=True, round_trip=True, warnings=False)
        return result
    if library == "struct":
        return _struct_contents(value, names)
    return {name: inside for name in names if (inside := getattr(value, name, UNSET)) is not UNSET}


def _struct_contents(value: Any, names: Mapping[str, str]) -> Mapping[str, Any] | list[Any]:
    config = value.__struct_config__
    tag = {} if config.tag is None else {config.tag_field: config.tag}
    inside = tag | {wire: getattr(value, name) for name, wire in names.items()}
    return list(inside.values()) if config.array_like else {k: v for k, v in inside.items() if v is not UNSET}
