"""The JSON that the values of an annotation are written as, to find members of a union that JSON can't tell apart."""

from __future__ import annotations

import typing
from collections import abc
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import combinations
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin
from uuid import UUID

from msgspec import UnsetType

from silbo.wire.encode import to_json_value
from silbo.wire.fields import wire_names
from silbo.wire.hints import find_hints, is_alias, required_keys, resolve_alias, resolve_variable

__all__ = ["find_overlap"]

_MAX_DEPTH: Final = 6
"""The levels of objects that are compared; deeper ones count as alike."""
_FORMATS: Final = (UUID, datetime, date, time, timedelta, Decimal)
"""Types whose texts have a form that no other of them has. A datetime is a date, so it comes first."""


def find_overlap(members: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """Return two members of a union that have values with the same JSON, and read them differently; None if there are none.

    A text in the very form of a UUID or a time is taken for one, so ``UUID | str`` is no overlap.
    """
    for one, other in combinations(members, 2):
        if not (_is_json(one) and _is_json(other)) and _overlap(one, other, 0):
            return one, other
    return None


def _is_json(hint: Any, aliases: frozenset[Any] = frozenset()) -> bool:
    """Return True if the values of an annotation are JSON values themselves, so that reading changes nothing."""
    if hint in aliases:
        return True
    if is_alias(hint):
        return _is_json(resolve_alias(hint), aliases | {hint})
    hint = resolve_alias(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, object, None, NoneType, str, int, float, bool, list, dict):
        return True
    if origin is Literal:
        return all(type(value) in (str, int, bool, NoneType) for value in arguments)
    if origin is Annotated:
        return _is_json(arguments[0], aliases)
    if origin is dict:
        return arguments[0] is str and _is_json(arguments[1], aliases)
    return origin in (list, Union, UnionType) and all(_is_json(argument, aliases) for argument in arguments)


def _overlap(one: Any, other: Any, depth: int) -> bool:
    return depth > _MAX_DEPTH or any(
        _is_alike(mine, theirs, depth) for mine in _shapes(one) for theirs in _shapes(other)
    )


def _shapes(hint: Any) -> list[tuple[str, Any]]:
    """Return pairs of a JSON type and what is known about its values; ``any`` if nothing is known."""
    hint = resolve_alias(hint)
    if isinstance(hint, TypeVar):
        hint = resolve_variable(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _shapes(arguments[0])
    if origin in (Union, UnionType):
        return [shape for member in arguments for shape in _shapes(member)]
    if origin is Literal:
        return [_shape_of(to_json_value(value)) for value in arguments]
    if hint is None or hint is NoneType:
        return [("null", None)]
    if hint is UnsetType:
        return []
    kind = origin or hint
    if not isinstance(kind, type) or kind in (Any, object):
        return [("any", None)]
    if typing.is_typeddict(kind) or wire_names(kind)[0] != "plain":
        return [_object_shape(hint, kind, arguments)]
    if issubclass(kind, Enum):
        return [_shape_of(to_json_value(member.value)) for member in kind]
    for base in _FORMATS:
        if issubclass(kind, base):
            return [("str", base)]
    if issubclass(kind, str | bytes | bytearray | memoryview):
        return [("str", str if kind is str else None)]
    for number in (bool, int, float):
        if issubclass(kind, number):
            return [(number.__name__, None)]
    if issubclass(kind, abc.Mapping):
        return [("object", None)]
    return [("array", None)] if issubclass(kind, abc.Collection) else [("any", None)]


def _shape_of(json: Any) -> tuple[str, Any]:
    names = {NoneType: "null", dict: "object", list: "array"}
    return names.get(type(json), type(json).__name__), {json} if isinstance(json, str | int | float) else None


def _object_shape(hint: Any, kind: Any, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    library, names = wire_names(kind)
    if typing.is_typeddict(kind):
        hints = find_hints(kind, arguments)
        return "object", ({name: hints[name] for name in hints}, required_keys(kind, hints), False)
    if library == "pydantic":
        if kind.__pydantic_root_model__:
            return _shapes(kind.__pydantic_fields__["root"].annotation)[0]
        hints = {name: kind.__pydantic_fields__[name].annotation for name in names}
        is_open = kind.model_config.get("extra") == "allow" or bool(kind.__pydantic_decorators__.model_serializers)
        return "object", ({wire: hints[name] for name, wire in names.items()}, set(names.values()), is_open)
    hints = find_hints(kind, arguments)
    known = {wire: hints.get(name, Any) for name, wire in names.items()}
    required = {wire for wire, inner in known.items() if "UnsetType" not in str(inner)}
    if library == "struct":
        config = kind.__struct_config__
        if config.array_like:
            return "array", None
        if config.tag is not None:
            known[config.tag_field] = Literal[config.tag]
            required.add(config.tag_field)
    return "object", (known, required, False)


def _is_alike(one: tuple[str, Any], other: tuple[str, Any], depth: int) -> bool:
    (kind, mine), (their_kind, theirs) = one, other
    if "any" in (kind, their_kind):
        return True
    if kind != their_kind:
        return False
    if isinstance(mine, set) and isinstance(theirs, set):
        return bool(mine & theirs)
    if kind == "str":
        formats = {*mine} if isinstance(mine, set) else mine, {*theirs} if isinstance(theirs, set) else theirs
        if all(isinstance(known, type) for known in formats):
            strict = [known for known in formats if known is not str]
            return mine is theirs if len(strict) == 2 else Decimal in strict or not strict
        return True
    if kind != "object" or mine is None or theirs is None:
        return True
    (known, required, is_open), (their_known, their_required, their_open) = mine, theirs
    if (not their_open and required - their_known.keys()) or (not is_open and their_required - known.keys()):
        return False
    return all(_overlap(known[wire], their_known[wire], depth + 1) for wire in known.keys() & their_known.keys())
