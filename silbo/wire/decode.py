"""How an event is made again of a payload: by its class's annotations, through its constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple
from uuid import UUID

from silbo.errors import MessageInvalid
from silbo.event import ENVELOPE
from silbo.wire.convert import Fields, hints_of, read_model, refusal
from silbo.wire.fields import once_per_class, shape_of

__all__ = ["rebuild"]

_IDENTITY: Final = {"event_id": UUID, "event_timestamp": datetime}


def rebuild(cls: type, payload: dict[str, Any], identity: Mapping[str, Any]) -> Any:
    """An object of a class, with the event's id and time on it.

    Args:
        cls: A dataclass, attrs class, Struct, pydantic model or plain class.
        payload: Plain JSON values under their wire names, the event's id and time among them.
        identity: ``event_id`` and, where there is one, ``event_timestamp``; written into the ``__dict__`` where the class
            does not declare them.

    Raises:
        MessageInvalid: the payload does not fit the class, or the class can't be rebuilt.
    """
    reader = _reader(cls)
    values = reader.read(payload)
    try:
        event = reader.build(values)
    except Exception as error:  # noqa: BLE001  # the host's own constructor and validators
        refused = refusal(cls, error)
        raise refused from (None if refused is error else error)
    if hasattr(event, "__dict__"):  # else it can't be dispatched either, and the dispatcher says so
        for attribute, value in identity.items():
            if attribute not in reader.names:
                event.__dict__[attribute] = value
    return event


class _Reader(NamedTuple):
    """What is needed to rebuild a class.

    Attributes:
        names: The declared attributes; none for a plain class.
        read: The payload -> the attributes' values, converted.
        build: Those values -> the object.
    """

    names: Mapping[str, str]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    build: Callable[[dict[str, Any]], Any]


@once_per_class
def _reader(cls: type) -> _Reader:
    try:
        shape = shape_of(cls)
    except TypeError as error:
        raise MessageInvalid(str(error)) from None
    if shape.library == "pydantic":
        return _Reader(shape.names, partial(read_model, cls), cls.model_validate)  # type: ignore[attr-defined]
    hints = hints_of(cls)
    if shape.library == "plain":
        known = _IDENTITY | {name: hint for name, hint in hints.items() if _is_public(name)}
        fields = Fields({name: (name, hint) for name, hint in known.items()})
        return _Reader({}, partial(_read_plain, cls, fields), _Constructor(cls, {}))
    fields = Fields({name: (wire, hints.get(name, Any)) for name, wire in shape.names.items()})
    return _Reader(shape.names, fields.read, _Constructor(cls, shape.names))


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name not in ENVELOPE


def _read_plain(cls: type, fields: Fields, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Every public attribute that the payload has; none that would hide a method or property of the class."""
    values = {name: value for name, value in payload.items() if _is_public(name) and _is_free(cls, name)}
    return values | fields.read(payload)


def _is_free(cls: type, name: str) -> bool:
    static = inspect.getattr_static(cls, name, None)
    return name in _IDENTITY or inspect.ismemberdescriptor(static) or not hasattr(type(static), "__get__")


class _Parameter(NamedTuple):
    name: str
    attribute: str
    by_position: bool
    required: bool


class _Constructor:
    """Calls a class with what its ``__init__`` asks for, and sets what is left.

    Where ``__init__`` asks for what no message has (a service, an ``InitVar``), it is left out, as by pickle.
    """

    def __init__(self, cls: Any, names: Mapping[str, str]) -> None:
        self._cls, self._names = cls, names
        self._parameters = _parameters(cls)

    def __call__(self, values: dict[str, Any]) -> Any:
        left = dict(values)
        args: list[Any] = []
        options: dict[str, Any] = {}
        for name, attribute, by_position, required in self._parameters or ():
            if attribute in left:
                if by_position:
                    args.append(left.pop(attribute))
                else:
                    options[name] = left.pop(attribute)
            elif required and attribute in self._names:
                raise MessageInvalid("missing", field=f"payload.{self._names[attribute]}")
            elif required:
                return self._without_init(values)
        if self._parameters is None:
            return self._without_init(values)
        return _fill(self._cls(*args, **options), left)

    def _without_init(self, values: Mapping[str, Any]) -> Any:
        return _fill(self._cls.__new__(self._cls), values)


def _parameters(cls: type) -> list[_Parameter] | None:
    """What a class is called with; None where that can't be known."""
    try:
        signature = inspect.signature(cls)
    except (ValueError, TypeError):
        return None
    attributes = {field.alias: field.name for field in getattr(cls, "__attrs_attrs__", ())}
    return [
        _Parameter(
            name,
            attributes.get(name, name),
            by_position=parameter.kind is parameter.POSITIONAL_ONLY,
            required=parameter.default is parameter.empty,
        )
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _fill(event: Any, values: Mapping[str, Any]) -> Any:
    for attribute, value in values.items():
        object.__setattr__(event, attribute, value)  # past a freeze
    return event
