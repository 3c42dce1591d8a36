"""Dependency-injection containers: one module for each, imported by who uses it.

Each has an adapter to give to ``AsyncEventDispatcher(container=...)``, and what makes the dispatcher the container's own.
"""

from __future__ import annotations

from typing import Any

from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.dispatcher import AsyncEventDispatcher

__all__ = ["dispatcher_types"]


def dispatcher_types(cls: type) -> list[Any]:
    """The types that a component may ask for when it wants the dispatcher: for the adapters.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all it derives from, down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Raises:
        TypeError: it is no class of silbo dispatchers.
    """
    if not issubclass(cls, AsyncEventDispatcher):
        raise TypeError(f"the dispatcher is a silbo.AsyncEventDispatcher, not one of {cls!r}")
    return [*(base for base in cls.__mro__ if issubclass(base, WhistleDispatcher)), IAsyncEventDispatcher]
