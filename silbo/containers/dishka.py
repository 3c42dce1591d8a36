"""Listener classes made by dishka, and one dispatcher for everybody who asks for one (``pip install 'silbo[dishka]'``).

container = make_async_container(YourProvider(), dispatcher_provider())
dispatcher = await container.get(AsyncEventDispatcher)

class Invoices:
    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None: ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from silbo.containers import ASK, NOTHING, Adapter, dispatcher_types
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import MissingExtra, Unresolvable

try:
    import dishka
    from dishka.entities.key import DependencyKey
    from dishka.entities.scope import BaseScope
    from dishka.exception_base import DishkaError
except ModuleNotFoundError as error:
    if error.name != "dishka":
        raise
    raise MissingExtra("silbo.containers.dishka", extra="dishka") from error

__all__ = ["DishkaContainer", "dispatcher_provider"]

T = TypeVar("T")


class DishkaContainer(Adapter):
    """Makes the objects of listener classes with a dishka container.

    Each unit of work enters a scope: what is provided there is made once in it, and its generators are closed at the end,
    told of an error of the dispatch as dishka does it (``error = yield session``).

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
            await self.check(scope)
            yield scope

    def lookup(self, cls: type[Any]) -> object:
        """See :class:`silbo.containers.Adapter`."""
        key = DependencyKey(cls, dishka.DEFAULT_COMPONENT)
        return ASK if any(key in registry.factories for registry in _registries(self.container)) else NOTHING

    def give(self, given: object, types: Sequence[type[Any]]) -> None:
        """See :class:`silbo.containers.Adapter`: a dishka container takes nothing more."""


class _Scope:
    def __init__(self, adapter: DishkaContainer, opened: dishka.AsyncContainer) -> None:
        self._adapter, self._opened = adapter, opened

    async def resolve(self, cls: type[T], /) -> T:
        try:
            return await self._opened.get(cls)
        except DishkaError as error:
            raise Unresolvable(cls, self._adapter, str(error)) from error


def _registries(container: dishka.AsyncContainer) -> Iterator[Any]:
    """What a container may be asked for, in its own scope, those around it and those inside of it."""
    around: Any = container
    while around is not None:
        yield around.registry
        around = around.parent_container
    yield from getattr(container, "child_registries", ())  # dishka 1.6; later each has the next
    inside: Any = container.registry
    while (inside := getattr(inside, "child_registry", None)) is not None:
        yield inside


def dispatcher_provider(
    dispatcher: AsyncEventDispatcher | type[AsyncEventDispatcher] = AsyncEventDispatcher,
) -> dishka.Provider:
    """A provider that makes one dispatcher the container's, under every type that a component may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all it derives from, down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        dispatcher: A dispatcher of yours; or the class of which one is made, with this container for its listener classes.

    Returns:
        For ``make_async_container``. Closing the dispatcher stays with you.

    Raises:
        TypeError: it is no silbo dispatcher.
    """
    own, *others = dispatcher_types(dispatcher, or_class=True)

    def make(container: dishka.AsyncContainer) -> AsyncEventDispatcher:
        return dispatcher(container=DishkaContainer(container)) if isinstance(dispatcher, type) else dispatcher

    provider = dishka.Provider(scope=dishka.Scope.APP)
    provider.provide(make, provides=own)
    for other in others:
        provider.alias(source=own, provides=other)
    return provider
