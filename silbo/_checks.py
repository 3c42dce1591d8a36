"""Checks of arguments: a wrong value is refused at the call that gives it, not at its first use."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from datetime import datetime
from difflib import get_close_matches
from typing import Any, Final, TypeVar, cast

from silbo.errors import AddressInvalid, MissingExtra

__all__ = [
    "LONGEST",
    "check_address",
    "check_count",
    "check_hook",
    "check_list",
    "check_moment",
    "check_seconds",
    "describe_object",
    "require_extra",
    "suggest_name",
]

T = TypeVar("T")

LONGEST: Final = 18_262 * 86_400.0
"""Fifty years, in seconds: Redis knows no time before 1970, and so nothing that is idle for longer than since then."""


@contextmanager
def require_extra(module: str, *, extra: str, libraries: Collection[str]) -> Generator[None]:
    """Raise MissingExtra if the imports in the ``with`` block find a library missing.

    Args:
        module: Needs the library; for the text of the error.
        extra: Brings the library.
        libraries: Names of the library's top packages. Any other missing module is a broken installation, and its error
            is raised as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in libraries:
            raise
        raise MissingExtra(module, extra=extra) from error


def check_seconds(name: str, value: Any, *, zero: bool = False) -> float:
    """Return a duration in seconds: a number above 0, or with ``zero`` also 0, and at most fifty years.

    Raises:
        TypeError: the value is not a number: a text, a timedelta.
        ValueError: the number is too small or too large.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a number of seconds, not {value!r}")
    if not (value >= 0 if zero else value > 0):
        raise ValueError(f"{name} is seconds, {'0 or more' if zero else 'more than 0'}, not {value!r}")
    if value > LONGEST:
        raise ValueError(f"{name} is seconds, at most {LONGEST:g} (fifty years), not {value!r}")
    return value


def check_count(name: str, value: Any, *, zero: bool = False) -> int:
    """Return a count: a whole number, 1 or more, or with ``zero`` also 0.

    Raises:
        TypeError: the value is not a whole number.
        ValueError: the number is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if value < (0 if zero else 1):
        raise ValueError(f"{name} is {0 if zero else 1} or more, not {value!r}")
    return value


def check_moment(name: str, value: Any) -> datetime:
    """Return an aware datetime.

    Raises:
        TypeError: the value is not a datetime.
        ValueError: it has no time zone.
    """
    if not isinstance(value, datetime):
        raise TypeError(f"{name} is a datetime, not {value!r}")
    if value.utcoffset() is None:
        raise ValueError(f"{name} needs its time zone, as datetime.now(UTC), or {value!r}.astimezone() for local time")
    return value


_ADDRESS = re.compile(r"[A-Za-z0-9._-]+")


def check_address(address: object, what: str = "an address") -> str:
    """Return an address: a text of ASCII letters, digits and ``. _ -``, not empty.

    Raises:
        AddressInvalid: the value is something else; the error's text says that it is not ``what``.
    """
    if isinstance(address, str) and _ADDRESS.fullmatch(address):
        return address
    raise AddressInvalid(address, what)


def check_hook(name: str, value: Any) -> Any:
    """Return a callable or None.

    Raises:
        TypeError: the value is neither.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} is a function, sync or async, or None for the log, not {value!r}")
    return value


def check_list(name: str, values: Iterable[T]) -> tuple[T, ...]:
    """Return the items of an iterable as a tuple.

    Raises:
        TypeError: the value is not an iterable, or is a text.
    """
    if isinstance(values, str) or not isinstance(cast("object", values), Iterable):
        raise TypeError(f"{name} is a list, not {describe_object(values)}")
    return tuple(values)


def describe_object(thing: object) -> str:
    """Return a short text for an error: a builtin value or a class as its repr, another object as its type.

    The repr of a client of the host is long, and may contain secrets.
    """
    cls = thing if isinstance(thing, type) else type(thing)
    return repr(thing) if thing is cls or cls.__module__ == "builtins" else f"a {cls.__module__}.{cls.__qualname__}"


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the known name that is most like it, else all known names."""
    names = list(known)
    if near := get_close_matches(name, names, n=1):
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(map(repr, names))}" if names else ""
