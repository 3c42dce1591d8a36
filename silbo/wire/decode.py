"""Messages as events: rebuilt from the payload by the annotations of the event's class, through its constructor."""

from __future__ import annotations

import inspect
import re
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
from silbo.wire.encode import EVENT_CLASSES, MAX_DEPTH, Unwritable, format_time, to_json_value
from silbo.wire.fields import event_fields, once_per_class, wire_names

__all__ = ["MSGSPEC_ERRORS", "is_too_deep", "to_event", "to_message_invalid"]


MSGSPEC_ERRORS: Final = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
"""The exceptions that msgspec raises for wrong input."""


def to_event(message: Message, cls: type | None) -> Any:
    """Return a new event made of a message; they share no mutable value.

    Args:
        message: A decoded message.
        cls: The class of the event, rebuilt from its annotations through its constructor. None gives a
            :class:`~silbo.NotificationEvent` or :class:`~silbo.ECSTEvent` with the ``payload`` as a dict.

    Returns:
        The event, with the message's id and time as ``event_id`` and ``event_timestamp``.

    Raises:
        MessageInvalid: the payload doesn't fit the class; the error names the field.
    """
    try:
        payload: dict[str, Any] = msgspec.to_builtins(dict(message.payload))
    except (TypeError, *MSGSPEC_ERRORS) as error:
        raise to_message_invalid(error, under="payload") from None
    identity = _read_identity(message, payload)
    if cls is not None:
        return _rebuild(cls, payload, identity)
    kind = EVENT_CLASSES.get(message.message_type)
    if kind is None:
        known = " or ".join(EVENT_CLASSES)
        raise MessageInvalid(f"{message.message_type!r} is not {known}", field="message_type")
    event = kind()
    event.__dict__.update(identity, payload=payload)
    return event


def _read_identity(message: Message, payload: dict[str, Any]) -> dict[str, Any]:
    """Return the event's id and, if the message has one, its time; write both into the payload in their usual form."""
    payload.setdefault("event_id", message.message_id)
    try:
        identity: dict[str, Any] = {"event_id": UUID(payload["event_id"])}
    except (ValueError, AttributeError, TypeError):
        raise MessageInvalid(f"{payload['event_id']!r} is no UUID", field="payload.event_id") from None
    if "event_timestamp" in payload:
        try:
            when = msgspec.convert(payload["event_timestamp"], datetime)
            payload["event_timestamp"] = format_time(when)
        except MSGSPEC_ERRORS as error:
            raise to_message_invalid(error, under="payload.event_timestamp") from None
        identity["event_timestamp"] = msgspec.convert(payload["event_timestamp"], datetime)
    return identity


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
    reader = _make_reader(cls)
    values = reader.read(payload)
    try:
        event = reader.build(values)
    except Exception as error:  # noqa: BLE001  # the host's own constructor and validators
        refused = _explain_refusal(cls, error)
        raise refused from (None if refused is error else error)
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
    read: Callable[[dict[str, Any]], dict[str, Any]]
    build: Callable[[dict[str, Any]], Any]


@once_per_class
def _make_reader(cls: type) -> _ClassReader:
    try:
        fields = event_fields(cls)
    except TypeError as error:
        raise MessageInvalid(str(error)) from None
    if fields.library == "pydantic":
        return _ClassReader(fields.names, partial(_read_model, cls), cls.model_validate)  # type: ignore[attr-defined]
    hints = _find_hints(cls)
    if fields.library == "plain":
        known = _IDENTITY_TYPES | {name: hint for name, hint in hints.items() if _is_public(name)}
        reader = _FieldReader({name: (name, hint) for name, hint in known.items()})
        return _ClassReader({}, partial(_read_plain, cls, reader), _Constructor(cls, {}))
    reader = _FieldReader({name: (wire, hints.get(name, Any)) for name, wire in fields.names.items()})
    return _ClassReader(fields.names, reader.read, _Constructor(cls, fields.names))


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name not in ENVELOPE


def _read_plain(cls: type, annotated: _FieldReader, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public attributes that the payload has, without those that would hide a method or property of the class."""
    values = {name: value for name, value in payload.items() if _is_public(name) and _is_free(cls, name)}
    return values | annotated.read(payload)


def _is_free(cls: type, name: str) -> bool:
    static = inspect.getattr_static(cls, name, None)
    return name in _IDENTITY_TYPES or inspect.ismemberdescriptor(static) or not hasattr(type(static), "__get__")


class _Parameter(NamedTuple):
    name: str
    attribute: str
    by_position: bool
    required: bool


class _Constructor:
    """A callable that makes an object of a class: ``__init__`` gets the values that it takes, the others are set after it.

    If ``__init__`` requires an argument that no message has (a service, an ``InitVar``), it is not called, as in pickle.
    """

    def __init__(self, cls: Any, names: Mapping[str, str]) -> None:
        self._cls = cls
        self._names = names
        self._parameters = _find_parameters(cls)

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
        return _set_attributes(self._cls(*args, **options), left)

    def _without_init(self, values: Mapping[str, Any]) -> Any:
        return _set_attributes(self._cls.__new__(self._cls), values)


def _find_parameters(cls: type) -> list[_Parameter] | None:
    """Return the parameters of a class's constructor; None if they can't be known."""
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


def _set_attributes(event: Any, values: Mapping[str, Any]) -> Any:
    for attribute, value in values.items():
        object.__setattr__(event, attribute, value)  # also on a frozen object
    return event


def _find_hints(cls: type) -> dict[str, Any]:
    """Return the annotations of a class; for a plain class also those of its ``__init__``.

    Raises:
        MessageInvalid: an annotation can't be resolved.
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


# -- values as their annotations ask ------------------------------------------------------------------------


class _FieldReader:
    """Converts a payload to the annotated types of a class: in one call what msgspec supports, the other fields one by one.

    Args:
        fields: The wire name and annotation of each attribute.
    """

    def __init__(self, fields: Mapping[str, tuple[str, Any]]) -> None:
        self._apart: dict[str, tuple[str, Any]] = {}  # fields whose annotation msgspec does not support
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
        """Return the values of the attributes that the payload has.

        Raises:
            MessageInvalid: a value does not fit its annotation; the error names the field.
        """
        try:
            found = msgspec.convert(payload, self._struct, dec_hook=_convert_custom, str_keys=True)
        except MSGSPEC_ERRORS as error:
            for wire, hint in self._hints.items():  # each on its own, to name the field at fault
                if wire in payload:
                    _convert_field(wire, payload[wire], hint)
            raise to_message_invalid(error, under="payload") from None
        pairs = zip(self._together, msgspec.structs.astuple(found), strict=True)
        values = {attribute: value for attribute, value in pairs if value is not msgspec.UNSET}
        for attribute, (wire, hint) in self._apart.items():
            if wire in payload:
                values[attribute] = _convert_field(wire, payload[wire], hint)
        return values


def _convert_field(wire: str, value: Any, hint: Any) -> Any:
    try:
        return _convert(value, hint)
    except (TypeError, *MSGSPEC_ERRORS) as error:
        raise to_message_invalid(error, under=f"payload.{wire}") from None


def _is_supported(hint: Any) -> bool:
    try:
        msgspec.json.Decoder(hint)
    except (TypeError, NameError, AttributeError):
        return False
    return True


def _convert(value: Any, hint: Any) -> Any:
    """Convert a JSON value to the type of its annotation.

    Supports more than msgspec: enums of mixed values and any union, also in lists, sets and dicts. A union gives its first
    member that is written as the same JSON again, else the first member that accepts the value.

    Raises:
        ValueError: the value does not fit.
        TypeError: the annotation can't be read from JSON.
    """
    if _is_supported(hint):
        return msgspec.convert(value, hint, dec_hook=_convert_custom, str_keys=True)
    origin = get_origin(hint)
    if origin is Annotated:
        return _convert(value, get_args(hint)[0])
    if origin in (Union, UnionType):
        return _convert_union(value, get_args(hint))
    if origin in (list, set, frozenset) and isinstance(value, list):
        return origin(_convert(item, get_args(hint)[0]) for item in value)
    if origin is dict and get_args(hint)[0] is str and isinstance(value, dict):
        return {key: _convert(item, get_args(hint)[1]) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        for member in hint:
            if to_json_value(member.value) == value and type(to_json_value(member.value)) is type(value):
                return member
        raise ValueError(f"Invalid enum value {value!r}")
    raise TypeError(f"its annotation {hint!r} can't be read from JSON")


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    taken: list[Any] = []
    errors: list[str] = []
    for member in members:
        try:
            candidate = _convert(value, member)
            if to_json_value(candidate) == value:
                return candidate
            taken.append(candidate)
        except (TypeError, Unwritable, *MSGSPEC_ERRORS) as error:
            errors.append(str(error))
    if taken:
        return taken[0]
    raise ValueError(f"fits none of {len(members)} types: {'; '.join(errors)}")


_JSON_TYPES: Final[tuple[tuple[type, type], ...]] = (
    (str, str),
    (int, int),
    (float, float),
    (UUID, str),
    (Decimal, str),
    (date, str),
)
"""The base of a host's own class of values, and the type of its JSON."""


def _convert_custom(kind: Any, value: Any) -> Any:
    if kind is object:
        return value
    if hasattr(kind, "model_validate"):
        try:
            return kind.model_validate(_read_model(kind, value))
        except Exception as error:  # the host's validators
            raise ValueError(str(_explain_refusal(kind, error, under=""))) from error
    for base, json in _JSON_TYPES:
        if isinstance(kind, type) and issubclass(kind, base) and type(value) is json:
            make: Any = kind
            return getattr(make, "fromisoformat", make)(value)
    raise TypeError(f"{getattr(kind, '__qualname__', kind)} can't be read from JSON")


# -- pydantic models ----------------------------------------------------------------------------------------


def _read_model(cls: type, payload: Any) -> dict[str, Any]:
    """Return the input for the validation of a pydantic model.

    Values are converted as their annotations ask, bytes from base64. A value that does not fit is left to pydantic's own
    conversions and error texts, unless it holds bytes.

    Raises:
        MessageInvalid: bytes are not base64; the error names the field.
    """
    if not isinstance(payload, dict):
        raise MessageInvalid(f"not a JSON object but {type(payload).__name__}")
    values: dict[str, Any] = {}
    for wire, (key, hint, holds_bytes) in _model_fields(cls).items():
        if wire in payload:
            try:
                values[key] = _convert_field(wire, payload[wire], hint)
            except MessageInvalid:
                if holds_bytes:
                    raise
                values[key] = payload[wire]
    return values


@once_per_class
def _model_fields(cls: type) -> dict[str, tuple[str, Any, bool]]:
    """Return, by wire name: the key that the model's validation reads, the annotation, and True if it may hold bytes."""
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
        return wire_names(hint)[0] != "plain" and any(_holds_bytes(inner, seen) for inner in _find_hints(hint).values())
    return any(_holds_bytes(inner, seen) for inner in get_args(hint))


# -- faults -------------------------------------------------------------------------------------------------


def is_too_deep(payload: dict[str, Any]) -> bool:
    """Return True if decoded JSON has more levels than MAX_DEPTH."""
    level: list[Any] = [payload]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return False
    return True


def _explain_refusal(cls: type, error: Exception, *, under: str = "payload") -> MessageInvalid:
    """Return the error of a host's constructor or validator as ours, with the field if pydantic names it."""
    if isinstance(error, MessageInvalid):
        return error
    details: Callable[[], list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if callable(details) and (found := details()):
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in found[0]["loc"])
        return MessageInvalid(found[0]["msg"], field=f"{under}{place}".lstrip(".") or None)
    return MessageInvalid(f"{cls.__qualname__} refuses it: {type(error).__name__}: {error}", field=under or None)


# msgspec names the place inside a value only in its text. If a release words it differently, the error names the whole
# value, with all of msgspec's text.
_WHERE: Final = re.compile(r"(?P<problem>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*?)`)?", re.DOTALL).fullmatch
_MISSING: Final = re.compile(r"Object missing required field `(.*)`", re.DOTALL).fullmatch


def to_message_invalid(error: Exception, *, under: str = "") -> MessageInvalid:
    """Return an error that msgspec raised as ours, with the field if msgspec names it.

    The fault is recognised by the class of the error and told in our words: msgspec's texts change between releases.

    Args:
        error: One of :data:`MSGSPEC_ERRORS`, or another that msgspec lets through (UnicodeError).
        under: The part of the message that was read, as ``payload``.
    """
    if isinstance(error, UnicodeError):
        return MessageInvalid("not UTF-8", field=under or None)
    if isinstance(error, RecursionError):
        return MessageInvalid(f"nested more than {MAX_DEPTH} levels deep", field=under or None)
    if isinstance(error, msgspec.DecodeError) and not isinstance(error, msgspec.ValidationError):
        return MessageInvalid(f"not JSON: {error}", field=under or None)
    match = _WHERE(str(error))
    problem, path = (match["problem"], match["path"]) if match else (str(error), None)
    if missing := _MISSING(problem):
        problem, path = "missing", f"{path}.{missing[1]}" if path else missing[1]
    field = f"{under}{'' if path.startswith('[') or not under else '.'}{path}" if path else under
    return MessageInvalid(problem, field=field or None)
