"""The adapter of dishka: makes listener classes, and gives one dispatcher to all components.

Install it with ``pip install 'silbo[dishka]'``.

container = make_async_container(YourProvider(), dispatcher_provider())
dispatcher = await container.get(AsyncEventDispatcher)

class Invoices:
    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None: ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from silbo._checks import require_extra
from silbo.containers._adapter import NOTHING, UNKNOWN, Adapter, dispatcher_types
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import Unresolvable

with require_extra("silbo.containers.dishka", extra="dishka", libraries=("dishka",)):
    import dishka
    from dishka.entities.key import DependencyKey
    from dishka.entities.scope import BaseScope
    from dishka.exception_base import DishkaError

__all__ = ["DishkaContainer", "dispatcher_provider"]

T = TypeVar("T")


class DishkaContainer(Adapter):
    """Makes the objects of listener classes with a dishka container.

    Each unit of work enters a scope: an object of that scope is made once in it. Generators are closed at the end; dishka
    sends them the error of a failed dispatch (``error = yield session``).

    Args:
        container: From ``make_async_container``.
        scope: The scope to enter; by default the next one, ``Scope.REQUEST`` for a container of the application.
    """

    def __init__(self, container: dishka.AsyncContainer, *, scope: BaseScope | None = None) -> None:
        if not isinstance(container, dishka.AsyncContainer):
            raise TypeError(f"a dishka.AsyncContainer is needed, from make_async_container, not {container!r}")
        self.container = container
        self._scope = scope

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[_Scope]:
        """See :class:`silbo.protocols.Container`."""
        async with self.container(scope=self._scope) as opened:
            scope = _Scope(self, opened)
            await self.check_scope(scope)
            yield scope

    def find(self, cls: type[Any]) -> object:
        """See :class:`silbo.containers._adapter.Adapter`."""
        key = DependencyKey(cls, dishka.DEFAULT_COMPONENT)
        return UNKNOWN if any(key in registry.factories for registry in _registries(self.container)) else NOTHING

    def register(self, registered: object, types: Sequence[type[Any]]) -> None:
        """See :class:`silbo.containers._adapter.Adapter`; does nothing, because a finished dishka container takes no objects."""


class _Scope:
    def __init__(self, adapter: DishkaContainer, opened: dishka.AsyncContainer) -> None:
        self._adapter = adapter
        self._opened = opened

    async def resolve(self, cls: type[T], /) -> T:
        try:
            return await self._opened.get(cls)
        except DishkaError as error:
            raise Unresolvable(cls, self._adapter, str(error)) from error


def _registries(container: dishka.AsyncContainer) -> Iterator[Any]:
    """Yield the registries of a container: of its own scope, of the scopes around it and of those inside of it."""
    around: Any = container
    while around is not None:
        yield around.registry
        around = around.parent_container
    yield from getattr(container, "child_registries", ())  # dishka 1.6; in later versions each registry has the next
    inside: Any = container.registry
    while (inside := getattr(inside, "child_registry", None)) is not None:
        yield inside


def dispatcher_provider(
    dispatcher: AsyncEventDispatcher | type[AsyncEventDispatcher] = AsyncEventDispatcher,
) -> dishka.Provider:
    """Return a provider that gives the container one dispatcher, under every type that a component may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all its bases down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        dispatcher: Your own dispatcher; or a class of dispatchers, of which one is made, with this container for its
            listener classes.

    Returns:
        The provider, for ``make_async_container``. You close the dispatcher yourself.

    Raises:
        TypeError: it is not a silbo dispatcher.
    """
    own, *others = dispatcher_types(dispatcher, or_class=True)

    def make(container: dishka.AsyncContainer) -> AsyncEventDispatcher:
        return dispatcher(container=DishkaContainer(container)) if isinstance(dispatcher, type) else dispatcher

    provider = dishka.Provider(scope=dishka.Scope.APP)
    provider.provide(make, provides=own)
    for other in others:
        provider.alias(source=own, provides=other)
    return provider
