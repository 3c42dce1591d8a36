"""Payloads: plain JSON values made from Python's, and the limits that both directions keep to."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from math import isfinite
from typing import Any, Final
from uuid import UUID

import msgspec

from silbo.errors import MessageInvalid
from silbo.shapes import contents

__all__ = ["MAX_DEPTH", "MAX_SIZE", "UNCHANGED", "Unwritable", "invalid", "is_too_deep", "plain", "timestamp"]

MAX_SIZE: Final = 1024 * 1024
"""The most bytes of one encoded message."""
MAX_DEPTH: Final = 64
"""The most levels of objects and arrays in a payload, itself included."""

UNCHANGED: Final = frozenset({str, int, bool, type(None)})
"""The types that are JSON as they are."""


class Unwritable(Exception):
    """A value that JSON can't carry; ``path`` is where in the payload, as ``items[3].price``."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem, self.path = problem, ""

    def under(self, step: str) -> Unwritable:
        """The same, seen from one level above."""
        self.path = f"{step}{self.path}" if self.path.startswith("[") or not self.path else f"{step}.{self.path}"
        return self


def plain(value: Any, depth: int = 2) -> Any:
    """A value as JSON values that share nothing mutable with it.

    Naive datetimes stay naive, aware ones keep their offset; bytes become base64, sets and tuples arrays.

    Args:
        value: Anything an event may hold.
        depth: The level it is at, when the payload itself is 1.

    Raises:
        Unwritable: JSON can't carry it; says where.
    """
    kind = type(value)
    if kind is str:
        return value if value.isascii() else _text(value)
    if kind is bool or value is None:
        return value
    if kind is int:
        return value if -(2**64) < value < 2**64 else _huge(value)
    if isinstance(value, Enum):
        return plain(value.value, depth)
    if (leaf := _leaf(value)) is not None:
        return leaf
    if depth > MAX_DEPTH:
        raise Unwritable(f"nested more than {MAX_DEPTH} levels deep, or contains itself")
    if isinstance(value, list | tuple | AbstractSet):
        return _array(value, depth)
    if isinstance(value, Mapping):
        return _object(value, depth)
    inside = contents(value)
    if inside is None:
        raise Unwritable(f"{type(value).__qualname__} objects can't be written as JSON")
    return _array(inside, depth) if isinstance(inside, list) else _object(inside, depth)


def _leaf(value: Any) -> Any:
    """A value without others inside, subclasses included (asyncpg's UUID, pendulum's datetime); None if it is not one."""
    if isinstance(value, str):
        return _text(str.__str__(value))
    if isinstance(value, int):
        return _huge(int(value))
    if isinstance(value, float):
        if not isfinite(value):
            raise Unwritable(f"{float(value)} is no JSON number")
        return float(value)
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return _moment(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise Unwritable(f"{value} is no number")
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return b64encode(value).decode("ascii")
    if isinstance(value, time | timedelta):
        return msgspec.to_builtins(value)
    return None


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unwritable("has a lone surrogate, so it is no text") from None
    return value


def _huge(value: int) -> int:
    try:
        str(value)
    except ValueError:  # beyond sys.get_int_max_str_digits()
        raise Unwritable("an integer with too many digits") from None
    return value


def _moment(value: datetime) -> str:
    offset = value.utcoffset()
    if offset is None:
        return value.isoformat()
    return timestamp(value) if offset % timedelta(minutes=1) or not offset else value.isoformat()


def timestamp(value: datetime) -> str:
    """An instant in UTC, with ``Z``; a naive one is read as UTC."""
    if value.tzinfo is not UTC:
        value = value.replace(tzinfo=UTC) if value.utcoffset() is None else value.astimezone(UTC)
    return f"{value.isoformat()[:-6]}Z"


def _array(value: Any, depth: int) -> list[Any]:
    result: list[Any] = []
    for item in value:
        try:
            result.append(item if type(item) is int else plain(item, depth + 1))
        except Unwritable as error:
            raise error.under(f"[{len(result)}]") from None
    return result


def _object(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        try:
            name = key if type(key) is str and key.isascii() else _key(key)
            result[name] = plain(item, depth + 1)
        except Unwritable as error:
            raise error.under(str(key)) from None
    if len(result) != len(value):
        raise Unwritable("two of its keys are the same as text")
    return result


def _key(key: Any) -> str:
    if isinstance(key, bool) or not isinstance(text := plain(key, MAX_DEPTH + 1), str | int | float):
        raise Unwritable(f"a key of type {type(key).__qualname__}")
    return text if isinstance(text, str) else str(text)


def is_too_deep(payload: dict[str, Any]) -> bool:
    """Whether decoded JSON has more levels than MAX_DEPTH."""
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


# -- what msgspec finds wrong ------------------------------------------------------------------------------

_WHERE: Final = re.compile(r"(?P<problem>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*?)`)?", re.DOTALL).fullmatch
_MISSING: Final = re.compile(r"Object missing required field `(.*)`", re.DOTALL).fullmatch


def invalid(error: Exception, *, under: str = "") -> MessageInvalid:
    """What msgspec found wrong, with the field's name where it gives one.

    Args:
        error: msgspec's, or what else comes out of it (UnicodeDecodeError, RecursionError).
        under: The part of the message that was read, as ``payload``.
    """
    if isinstance(error, UnicodeError):
        return MessageInvalid("not UTF-8", field=under or None)
    if isinstance(error, RecursionError):
        return MessageInvalid(f"nested more than {MAX_DEPTH} levels deep", field=under or None)
    match = _WHERE(str(error))
    problem, path = (match["problem"], match["path"]) if match else (str(error), None)
    if missing := _MISSING(problem):
        problem, path = "missing", f"{path}.{missing[1]}" if path else missing[1]
    field = f"{under}{'' if path.startswith('[') or not under else '.'}{path}" if path else under
    return MessageInvalid(problem, field=field or None)
