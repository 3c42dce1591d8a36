"""The base of the adapters: a container has one dispatcher, the same under every type that a component may ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import DispatcherConflict
from silbo.protocols import Scope

__all__ = ["NOTHING", "UNKNOWN", "Adapter", "dispatcher_types"]

NOTHING: Final = object()
"""The container has nothing for a class."""
UNKNOWN: Final = object()
"""The container has something for a class, and only resolving the class shows which object."""


def dispatcher_types(dispatcher: object, *, or_class: bool = False) -> list[Any]:
    """Return the types under which a component may ask for the dispatcher, the dispatcher's own class first.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all its bases down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        dispatcher: An object, or with ``or_class`` also a class of dispatchers.
        or_class: Accept a class.

    Raises:
        TypeError: it is not a silbo dispatcher.
    """
    cls = dispatcher if or_class and isinstance(dispatcher, type) else type(dispatcher)
    if not issubclass(cls, AsyncEventDispatcher):
        raise TypeError(f"a dispatcher is an object of silbo.AsyncEventDispatcher, not {dispatcher!r}")
    return [*(base for base in cls.__mro__ if issubclass(base, WhistleDispatcher)), IAsyncEventDispatcher]


class Adapter(ABC):
    """Registers a dispatcher and a mediator in a container, and checks that the container has no other dispatcher."""

    _unchecked: tuple[AsyncEventDispatcher, Sequence[type[Any]]] | None = None

    @abstractmethod
    def scope(self) -> AbstractAsyncContextManager[Scope]:
        """See :class:`silbo.protocols.Container`."""

    @abstractmethod
    def find(self, cls: type[Any]) -> object:
        """Return the object that the container has for a class, without making it; else NOTHING or UNKNOWN."""

    @abstractmethod
    def register(self, registered: object, types: Sequence[type[Any]]) -> None:
        """Make the container give an object to who asks for one of the types; nothing if the container takes no objects."""

    def check_dispatcher(self, dispatcher: AsyncEventDispatcher, *, ask: bool = False) -> list[type[Any]]:
        """Check that the container has no other dispatcher. Changes nothing in the container.

        Args:
            dispatcher: The one that the container may have.
            ask: If only resolving shows what the container has, resolve it when the first scope is entered. Without it,
                that is a DispatcherConflict.

        Returns:
            The types under which the container has no dispatcher yet.

        Raises:
            TypeError: it is not a silbo dispatcher.
            DispatcherConflict: the container has another dispatcher.
        """
        found = {cls: self.find(cls) for cls in dispatcher_types(dispatcher)}
        unknown = [cls for cls, has in found.items() if has is UNKNOWN]
        if any(has not in (dispatcher, NOTHING, UNKNOWN) for has in found.values()) or (unknown and not ask):
            raise DispatcherConflict(self)
        self._unchecked = (dispatcher, unknown) if unknown else None
        return [cls for cls, has in found.items() if has is NOTHING]

    def register_dispatcher(
        self, dispatcher: AsyncEventDispatcher | None = None, *, ask: bool = False
    ) -> AsyncEventDispatcher:
        """Register a dispatcher under every type that a component may ask for.

        Args:
            dispatcher: The one to register; None makes a new one, whose listener classes this container makes.
            ask: As for :meth:`check_dispatcher`.

        Returns:
            The dispatcher.

        Raises:
            TypeError: it is not a silbo dispatcher.
            DispatcherConflict: the container has another dispatcher; nothing was registered.
        """
        registered = AsyncEventDispatcher(container=self) if dispatcher is None else dispatcher
        if types := self.check_dispatcher(registered, ask=ask):
            self.register(registered, types)
        return registered

    def register_if_missing(self, registered: object) -> None:
        """Register an object under its class, if the container has nothing for this class."""
        cls = type(registered)
        if self.find(cls) is NOTHING:
            self.register(registered, [cls])

    async def check_scope(self, scope: Scope) -> None:
        """Resolve the dispatcher in the first scope, if the container could not tell before which one it has.

        Raises:
            DispatcherConflict: the container has another dispatcher.
        """
        if self._unchecked is not None:
            dispatcher, types = self._unchecked
            for cls in types:
                if await scope.resolve(cls) is not dispatcher:
                    raise DispatcherConflict(self)
            self._unchecked = None
