"""Dependency-injection containers: one module for each, imported by who uses it.

Each has an adapter to give to ``AsyncEventDispatcher(container=...)``, and what makes the dispatcher the container's own.
"""

from __future__ import annotations

from typing import Any

from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.dispatcher import AsyncEventDispatcher

__all__ = ["dispatcher_types"]


def dispatcher_types(dispatcher: object, *, or_class: bool = False) -> list[Any]:
    """For the adapters: the types that a component may ask for when it wants the dispatcher, its own class first.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all it derives from, down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Raises:
        TypeError: it is no silbo dispatcher.
    """
    cls = dispatcher if or_class and isinstance(dispatcher, type) else type(dispatcher)
    if not issubclass(cls, AsyncEventDispatcher):
        raise TypeError(f"a dispatcher is an object of silbo.AsyncEventDispatcher, not {dispatcher!r}")
    return [*(base for base in cls.__mro__ if issubclass(base, WhistleDispatcher)), IAsyncEventDispatcher]
