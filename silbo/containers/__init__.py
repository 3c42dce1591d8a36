"""Dependency-injection containers: one module for each, imported by who uses it.

Each has an adapter to give to ``AsyncEventDispatcher(container=...)``, and what makes the dispatcher the container's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import DispatcherConflict
from silbo.protocols import Scope

__all__ = ["ASK", "NOTHING", "Adapter", "dispatcher_types"]

NOTHING: Final = object()
"""A container gives nothing of a class."""
ASK: Final = object()
"""It gives something of a class, and tells what only when it is asked for it."""


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


class Adapter(ABC):
    """What the adapters share: that a container has one dispatcher, which is that of the mediator, too."""

    _to_ask: tuple[AsyncEventDispatcher, Sequence[type[Any]]] | None = None

    @abstractmethod
    def lookup(self, cls: type[Any]) -> object:
        """What the container gives of a class, without making it: the object, or :data:`NOTHING`, or :data:`ASK`."""

    @abstractmethod
    def give(self, given: object, types: Sequence[type[Any]]) -> None:
        """Make an object what the container gives under these types, where it takes anything."""

    def missing(self, dispatcher: AsyncEventDispatcher, *, ask: bool = False) -> list[type[Any]]:
        """The types under which the container does not give the dispatcher yet.

        Args:
            dispatcher: The only one that it may give.
            ask: Where the container does not tell, ask it when the first scope is entered.

        Raises:
            TypeError: it is no silbo dispatcher.
            DispatcherConflict: the container gives another one, or does not tell.
        """
        found = {cls: self.lookup(cls) for cls in dispatcher_types(dispatcher)}
        if any(one not in (dispatcher, NOTHING, *([ASK] if ask else [])) for one in found.values()):
            raise DispatcherConflict(self)
        self._to_ask = (dispatcher, asked) if (asked := [cls for cls, one in found.items() if one is ASK]) else None
        return [cls for cls, one in found.items() if one is NOTHING]

    def take_dispatcher(self, dispatcher: AsyncEventDispatcher, *, ask: bool = False) -> None:
        """Make a dispatcher the container's, under every type that a component may ask for.

        Raises:
            DispatcherConflict: the container has another one; nothing was registered.
        """
        if types := self.missing(dispatcher, ask=ask):
            self.give(dispatcher, types)

    def take(self, given: object) -> None:
        """Give an object to who asks for its class, unless the container gives something of this class already."""
        if self.lookup(type(given)) is NOTHING:
            self.give(given, [type(given)])

    async def check(self, scope: Scope) -> None:
        """In the first scope: ask the container what it would not tell before.

        Raises:
            DispatcherConflict: it gives another dispatcher.
        """
        if self._to_ask is not None:
            dispatcher, types = self._to_ask
            for cls in types:
                if await scope.resolve(cls) is not dispatcher:
                    raise DispatcherConflict(self)
            self._to_ask = None
