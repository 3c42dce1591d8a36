"""What the codec knows about a class: which attributes leave, and what they are called on the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from silbo.event import ENVELOPE, declared_fields

__all__ = ["Shape", "contents", "shape_of"]

_CACHE: Final = "__silbo_shape__"  # on the class itself, so that it goes when the class goes


class Shape(NamedTuple):
    """What is known about a class, found out once.

    Attributes:
        cls: The class this is about: a subclass inherits the attribute, not the knowledge.
        library: Which one declares the fields; ``plain`` where none does.
        fields: Pairs of attribute and wire name, in declared order, without the event's id and time.
        id_field: The attribute that holds the event's id.
        time_field: The attribute that holds the event's time.
    """

    cls: type
    library: str
    fields: tuple[tuple[str, str], ...]
    id_field: str = "event_id"
    time_field: str = "event_timestamp"


def shape_of(cls: type) -> Shape:
    """The shape of an event class.

    Raises:
        TypeError: two of its fields have one name on the wire.
    """
    found: Shape | None = cls.__dict__.get(_CACHE)
    if found is None or found.cls is not cls:
        found = _shape(cls)
        try:
            type.__setattr__(cls, _CACHE, found)
        except TypeError:
            pass  # a class written in C: found out anew each time
    return found


def _shape(cls: type) -> Shape:
    library, names = wire_names(cls)
    wires: dict[str, str] = {}
    for attribute, wire in names.items():
        if attribute in ENVELOPE or (attribute.startswith("_") and wire == attribute):
            continue
        if wire in wires:
            raise TypeError(f"{cls.__qualname__}: {wires[wire]!r} and {attribute!r} are both {wire!r} on the wire")
        wires[wire] = attribute
    id_field = wires.pop("event_id", "event_id")
    time_field = wires.pop("event_timestamp", "event_timestamp")
    fields = tuple((attribute, wire) for wire, attribute in wires.items())
    return Shape(cls, library, fields, id_field, time_field)


def wire_names(cls: type) -> tuple[str, dict[str, str]]:
    """The library that declares a class's fields, and each attribute with its name on the wire."""
    declared = declared_fields(cls)
    if declared is None:
        return "plain", {}
    if (encoded := getattr(cls, "__struct_encode_fields__", None)) is not None:
        return "struct", dict(zip(declared, encoded, strict=True))
    if (pydantic := getattr(cls, "__pydantic_fields__", None)) is not None:
        return "pydantic", {
            name: field.serialization_alias or name for name, field in pydantic.items() if not field.exclude
        }
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
        result: dict[str, Any] = value.model_dump(by_alias=True, round_trip=True)
        return result
    if library == "struct":
        return _struct_contents(value, names)
    return {name: getattr(value, name) for name in names}


def _struct_contents(value: Any, names: Mapping[str, str]) -> Mapping[str, Any] | list[Any]:
    config = value.__struct_config__
    tag = {} if config.tag is None else {config.tag_field: config.tag}
    inside = tag | {wire: getattr(value, name) for name, wire in names.items()}
    return list(inside.values()) if config.array_like else inside
