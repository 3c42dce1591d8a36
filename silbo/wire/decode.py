"""Messages as events: rebuilt from a payload by their class's annotations, through its constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from functools import partial
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec

from silbo.errors import MessageInvalid
from silbo.event import ENVELOPE
from silbo.message import Message
from silbo.wire.encode import KINDS, UNREADABLE, Unwritable, invalid, plain, timestamp
from silbo.wire.fields import once_per_class, shape_of, wire_names

__all__ = ["to_event", "Fields", "convert", "hints_of", "read_model", "rebuild", "refusal"]


def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a class; of a plain one those of its ``__init__`` too.

    Raises:
        MessageInvalid: one of them can't be resolved.
    """
    try:
        hints = get_type_hints(cls, include_extras=True)
        if wire_names(cls)[0] == "plain" and hasattr(cls.__init__, "__annotations__"):  # type: ignore[misc]  # asked, not run
            hints = get_type_hints(cls.__init__, include_extras=True) | hints  # type: ignore[misc]
    except Exception as error:  # noqa: BLE001  # annotations are any code of the host's
        raise MessageInvalid(
            f"the annotations of {cls.__qualname__} can't be resolved ({error}); define the classes that they name at the "
            "top of its module, neither inside of a function nor under TYPE_CHECKING"
        ) from None
    hints.pop("return", None)
    return {name: hint for name, hint in hints.items() if hint is not ClassVar and get_origin(hint) is not ClassVar}


class Fields:
    """The annotated fields of a class, converted in one go.

    Args:
        fields: Attribute -> wire name and annotation.
    """

    def __init__(self, fields: Mapping[str, tuple[str, Any]]) -> None:
        self._apart: dict[str, tuple[str, Any]] = {}  # what msgspec knows no way for
        self._together: list[str] = []
        self._hints: dict[str, Any] = {}
        columns: list[tuple[str, Any, Any]] = []
        for attribute, (wire, hint) in fields.items():
            if _is_supported(hint):
                columns.append((f"f{len(columns)}", hint, msgspec.field(name=wire, default=msgspec.UNSET)))
                self._together.append(attribute)
                self._hints[wire] = hint
            else:
                self._apart[attribute] = (wire, hint)
        self._struct = msgspec.defstruct("Fields", columns)

    def read(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the attributes that the payload has.

        Raises:
            MessageInvalid: one does not fit; names it.
        """
        try:
            found = msgspec.convert(payload, self._struct, dec_hook=_custom, str_keys=True)
        except UNREADABLE as error:
            for wire, hint in self._hints.items():  # the one that does not fit, each on its own
                if wire in payload:
                    _at(wire, payload[wire], hint)
            raise invalid(error, under="payload") from None
        pairs = zip(self._together, msgspec.structs.astuple(found), strict=True)
        values = {attribute: value for attribute, value in pairs if value is not msgspec.UNSET}
        for attribute, (wire, hint) in self._apart.items():
            if wire in payload:
                values[attribute] = _at(wire, payload[wire], hint)
        return values


def _at(wire: str, value: Any, hint: Any) -> Any:
    try:
        return convert(value, hint)
    except (TypeError, *UNREADABLE) as error:
        raise invalid(error, under=f"payload.{wire}") from None


def _is_supported(hint: Any) -> bool:
    try:
        msgspec.json.Decoder(hint)
    except (TypeError, NameError, AttributeError):
        return False
    return True


def convert(value: Any, hint: Any) -> Any:
    """One value as its annotation asks.

    Beyond what msgspec can: enums of mixed values and any union, also in lists, sets and dicts. Of a union the first member
    counts that is written as the same JSON again, else the first that takes it.

    Raises:
        ValueError: it does not fit.
        TypeError: the annotation can't be read from JSON.
    """
    if _is_supported(hint):
        return msgspec.convert(value, hint, dec_hook=_custom, str_keys=True)
    origin = get_origin(hint)
    if origin is Annotated:
        return convert(value, get_args(hint)[0])
    if origin in (Union, UnionType):
        return _one_of(value, get_args(hint))
    if origin in (list, set, frozenset) and isinstance(value, list):
        return origin(convert(item, get_args(hint)[0]) for item in value)
    if origin is dict and get_args(hint)[0] is str and isinstance(value, dict):
        return {key: convert(item, get_args(hint)[1]) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        for member in hint:
            if plain(member.value) == value and type(plain(member.value)) is type(value):
                return member
        raise ValueError(f"Invalid enum value {value!r}")
    raise TypeError(f"its annotation {hint!r} can't be read from JSON")


def _one_of(value: Any, members: tuple[Any, ...]) -> Any:
    taken: list[Any] = []
    errors: list[str] = []
    for member in members:
        try:
            candidate = convert(value, member)
            if plain(candidate) == value:
                return candidate
            taken.append(candidate)
        except (TypeError, Unwritable, *UNREADABLE) as error:
            errors.append(str(error))
    if taken:
        return taken[0]
    raise ValueError(f"fits none of {len(members)} types: {'; '.join(errors)}")


# -- classes that msgspec does not know ---------------------------------------------------------------------

_OWN_SUBCLASSES: Final[tuple[tuple[type, type], ...]] = (
    # what a host's own class derives from, and what JSON has for it
    (str, str),
    (int, int),
    (float, float),
    (UUID, str),
    (Decimal, str),
    (date, str),
)


def _custom(kind: Any, value: Any) -> Any:
    if kind is object:
        return value
    if hasattr(kind, "model_validate"):
        try:
            return kind.model_validate(read_model(kind, value))
        except Exception as error:  # the host's validators
            raise ValueError(str(refusal(kind, error, under=""))) from error
    for base, json in _OWN_SUBCLASSES:
        if isinstance(kind, type) and issubclass(kind, base) and type(value) is json:
            make: Any = kind
            return getattr(make, "fromisoformat", make)(value)
    raise TypeError(f"{getattr(kind, '__qualname__', kind)} can't be read from JSON")


@once_per_class
def _model_fields(cls: type) -> dict[str, tuple[str, Any, bool]]:
    """Wire name -> the key that the model's validation wants, the annotation, whether it may hold bytes."""
    result: dict[str, tuple[str, Any, bool]] = {}
    for name, wire in wire_names(cls)[1].items():
        field = cls.__pydantic_fields__[name]  # type: ignore[attr-defined]  # a pydantic model
        choices = getattr(field.validation_alias, "choices", (field.validation_alias,))
        key = next((choice for choice in choices if isinstance(choice, str)), name)
        result[wire] = (key, field.annotation, _holds_bytes(field.annotation, {cls}))
    return result


def _holds_bytes(hint: Any, seen: set[type]) -> bool:
    if isinstance(hint, type) and not get_args(hint) and hint not in seen:
        if issubclass(hint, bytes | bytearray | memoryview):
            return True
        seen.add(hint)
        return wire_names(hint)[0] != "plain" and any(_holds_bytes(inner, seen) for inner in hints_of(hint).values())
    return any(_holds_bytes(inner, seen) for inner in get_args(hint))


def read_model(cls: type, payload: Any) -> dict[str, Any]:
    """What a pydantic model is validated from: bytes and the like made of JSON first, the rest as it is for pydantic.

    Raises:
        MessageInvalid: bytes that are no base64; names the field.
    """
    if not isinstance(payload, dict):
        raise MessageInvalid(f"not a JSON object but {type(payload).__name__}")
    values: dict[str, Any] = {}
    for wire, (key, hint, holds_bytes) in _model_fields(cls).items():
        if wire in payload:
            try:
                values[key] = _at(wire, payload[wire], hint)
            except MessageInvalid:
                if holds_bytes:
                    raise
                values[key] = payload[wire]  # for pydantic's own conversions, and its own words
    return values


def refusal(cls: type, error: Exception, *, under: str = "payload") -> MessageInvalid:
    """What a host's constructor or validator said, with the field that pydantic names."""
    if isinstance(error, MessageInvalid):
        return error
    details: Callable[[], list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if callable(details) and (found := details()):
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in found[0]["loc"])
        return MessageInvalid(found[0]["msg"], field=f"{under}{place}".lstrip(".") or None)
    return MessageInvalid(f"{cls.__qualname__} refuses it: {type(error).__name__}: {error}", field=under or None)


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
    kind = KINDS.get(message.message_type)
    if kind is None:
        known = " or ".join(KINDS)
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
