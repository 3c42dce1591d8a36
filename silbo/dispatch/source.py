"""The source of a listener: the module, file and line that define it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

from silbo.dispatch.class_listeners import handling_method

__all__ = ["Source", "describe_listener", "find_source"]


class Source(NamedTuple):
    """The source of a listener.

    Attributes:
        module: The module that defines it; empty if none does.
        place: ``file:line`` of its code; empty if it has none.
        name: Its qualified name.
    """

    module: str
    place: str
    name: str


def find_source(listener: Any) -> Source:
    """Return the source of a listener: a callable or a class."""
    source = listener
    while isinstance(source, partial):
        source = source.func
    if isinstance(source, type):
        code = inspect.unwrap(getattr(source, handling_method(source)))
    else:
        source = code = inspect.unwrap(source)
        if not hasattr(code, "__code__"):
            source = code = inspect.unwrap(getattr(type(code), "__call__", code))  # noqa: B004
    where = getattr(code, "__code__", None)
    return Source(
        module=getattr(source, "__module__", None) or "",
        place=f"{where.co_filename}:{where.co_firstlineno}" if where is not None else "",
        name=getattr(source, "__qualname__", None) or type(source).__qualname__,
    )


def describe_listener(listener: Any) -> str:
    """Return the name of a listener, with its file and line."""
    source = find_source(listener)
    return f"{source.name} ({source.place})" if source.place else source.name
