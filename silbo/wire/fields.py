"""The fields of event classes: the attributes that leave, and their names on the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple, TypeVar, get_args

from msgspec import UNSET

from silbo.event import ENVELOPE, check_fields, declared_fields, find_id_maker, find_time_writer

__all__ = [
    "EventFields",
    "encoded_fields",
    "event_fields",
    "has_serializer",
    "is_root_model",
    "model_values",
    "nested_values",
    "once_per_class",
    "wire_names",
]

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
        write_time: Gives the time of an event as text, in the same way.
    """

    library: str
    names: dict[str, str]
    payload: tuple[tuple[str, str], ...]
    id_field: str
    time_field: str
    make_id: Callable[[Any], str | None] | None
    write_time: Callable[[Any], str | None] | None


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
        write_time=find_time_writer(cls) if time_field == "event_timestamp" else None,
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


@once_per_class
def _instance_fields(cls: type) -> tuple[str, dict[str, str]]:
    """Return :func:`wire_names` of a class that has an instance, so its fields are complete."""
    return wire_names(cls)


def nested_values(value: Any) -> Any:
    """Return the fields of an object inside a payload, under their wire names; None for a plain class.

    A Struct with ``array_like`` gives a list, a root model its root, a model with a serializer what that writes.
    """
    cls = type(value)
    library, names = _instance_fields(cls)
    if library == "plain":
        return None
    if library == "pydantic":
        return model_values(value, names, with_extras=True)
    if library == "struct":
        return _struct_values(value, names)
    return {wire: inside for name, wire in names.items() if (inside := getattr(value, name, UNSET)) is not UNSET}


def _struct_values(value: Any, names: Mapping[str, str]) -> Mapping[str, Any] | list[Any]:
    config = value.__struct_config__
    tag = {} if config.tag is None else {config.tag_field: config.tag}
    inside = tag | {wire: getattr(value, name) for name, wire in names.items()}
    return list(inside.values()) if config.array_like else {k: v for k, v in inside.items() if v is not UNSET}


# -- pydantic models ----------------------------------------------------------------------------------------


def is_root_model(cls: Any) -> bool:
    """Return True if a pydantic model is a ``RootModel``."""
    return bool(getattr(cls, "__pydantic_root_model__", False))


def model_values(model: Any, names: Mapping[str, str], *, with_extras: bool) -> Any:
    """Return the fields of a pydantic model under their wire names; the root of a root model.

    Serializers of the model and its fields are used; nested models are left to be written in the same way.
    """
    cls = type(model)
    if cls.__pydantic_decorators__.model_serializers:
        return model.model_dump(by_alias=True, round_trip=True, warnings=False)
    serialized = _serialized_fields(cls)
    encoded = encoded_fields(cls)
    values = {
        wire: inside
        for name, wire in names.items()
        if name not in serialized and (inside := getattr(model, name, UNSET)) is not UNSET
    }
    if serialized:
        if is_root_model(cls):
            return model.model_dump(
                mode="json" if encoded else "python", by_alias=True, round_trip=True, warnings=False
            )
        dumped = model.model_dump(include=serialized - encoded, by_alias=True, round_trip=True, warnings=False)
        if encoded:
            dumped |= model.model_dump(mode="json", include=encoded, by_alias=True, round_trip=True, warnings=False)
        values = {wire: values.get(wire, dumped.get(wire, UNSET)) for wire in names.values()}
        values = {wire: inside for wire, inside in values.items() if inside is not UNSET}
    if is_root_model(cls):
        return model.root
    return values | (model.__pydantic_extra__ or {}) if with_extras else values


def has_serializer(cls: Any, name: str) -> bool:
    """Return True if a field of a pydantic model is written by a serializer of the host's."""
    return name in _serialized_fields(cls)


@once_per_class
def _serialized_fields(cls: Any) -> frozenset[str]:
    decorated = [decorator.info.fields for decorator in cls.__pydantic_decorators__.field_serializers.values()]
    return frozenset(
        name
        for name, field in cls.__pydantic_fields__.items()
        if any({name, "*"} & {*fields} for fields in decorated)
        or any(map(_is_serializer, field.metadata))
        or _mentions(_is_serializer, field.annotation)
    ) | encoded_fields(cls)


@once_per_class
def encoded_fields(cls: Any) -> frozenset[str]:
    """Return the fields of a pydantic model whose type has a text of its own: ``Base64Bytes`` and its like, and ``Json``.

    pydantic reads that text only, and makes another value of the decoded one.
    """
    return frozenset(
        name
        for name, field in cls.__pydantic_fields__.items()
        if any(map(_is_encoding, field.metadata)) or _mentions(_is_encoding, field.annotation)
    )


def _mentions(is_meant: Callable[[object], bool], hint: Any) -> bool:
    marks = (hint, *getattr(hint, "__metadata__", ()))
    return any(map(is_meant, marks)) or any(_mentions(is_meant, inner) for inner in get_args(hint))


def _is_serializer(item: object) -> bool:
    return type(item).__name__ in ("PlainSerializer", "WrapSerializer")


def _is_encoding(item: object) -> bool:
    marker = item if isinstance(item, type) else type(item)
    return marker.__module__ == "pydantic.types" and marker.__name__ in ("EncodedBytes", "EncodedStr", "Json")
