"""Plain JSON values -> what an annotation asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from decimal import Decimal
from enum import Enum
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec

from silbo.errors import MessageInvalid
from silbo.wire.encode import UNREADABLE, Unwritable, invalid, plain
from silbo.wire.fields import once_per_class, wire_names

__all__ = ["Fields", "convert", "hints_of", "read_model", "refusal"]


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
        columns: list[tuple[str, Any, Any]] = []
        for attribute, (wire, hint) in fields.items():
            if _is_supported(hint):
                columns.append((f"f{len(columns)}", hint, msgspec.field(name=wire, default=msgspec.UNSET)))
                self._together.append(attribute)
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
    raise ValueError("; ".join(errors))


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
        raise MessageInvalid(f"Expected `object`, got `{type(payload).__name__}`")
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
