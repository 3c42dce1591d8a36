"""Listener classes made by dependency_injector, and one dispatcher (``pip install 'silbo[dependency-injector]'``).

class Services(containers.DeclarativeContainer):
    dispatcher = providers.Dependency()
    invoices = providers.Factory(Invoices, dispatcher)

services = Services()
dispatcher = register_dispatcher(services)
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from typing import Any, TypeVar, get_type_hints, overload

from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.containers import ASK, NOTHING, Adapter
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import MissingExtra, Unresolvable

try:
    from dependency_injector import containers, errors, providers
except ModuleNotFoundError as error:
    if error.name != "dependency_injector":
        raise
    raise MissingExtra("silbo.containers.dependency_injector", extra="dependency-injector") from error

__all__ = ["DependencyInjectorContainer", "register_dispatcher"]

T = TypeVar("T")
D = TypeVar("D", bound=AsyncEventDispatcher)


class DependencyInjectorContainer(Adapter):
    """Makes the objects of listener classes with a dependency_injector container.

    A class is looked up among the container's providers, those of nested containers included: the one that provides it,
    else the only one that provides a subclass of it.

    Each unit of work has a context of its own, begun without what ``ContextLocalSingleton`` and ``ContextLocalResource``
    hold elsewhere: those are made once in it, and the resources are shut down at the end. The library does not tell them
    of an error.
    """

    def __init__(self, container: containers.Container) -> None:
        _check(container)
        self.container = container

    @asynccontextmanager
    async def scope(self) -> AsyncGenerator[_Scope]:
        """See :class:`silbo.protocols.Container`."""
        context = copy_context()
        resource: Any  # its stubs lack reset_state
        for resource in self.container.traverse([providers.ContextLocalResource]):
            context.run(resource.reset_state)  # forgets it in this context; whoever opened it has it still
        for singleton in self.container.traverse([providers.ContextLocalSingleton]):
            context.run(singleton.reset)
        try:
            scope = _Scope(self, context)
            await self.check(scope)
            yield scope
        finally:
            await _shut_down(self.container, context)

    def provider(self, cls: type) -> providers.Provider[Any]:
        """The provider that gives objects of a class.

        Raises:
            Unresolvable: there is none, or more than one.
        """
        found = self._providers(cls)
        if len(found) != 1:
            problem = f"{len(found)} providers give it: {found}" if found else "no provider of the container gives it"
            raise Unresolvable(cls, self, problem)
        return found[0]

    def _providers(self, cls: type) -> list[providers.Provider[Any]]:
        wanted: type = WhistleDispatcher if cls is IAsyncEventDispatcher else cls
        given = [(provider, gives) for provider in _flat(self.container) if (gives := _gives(provider)) is not None]
        exact = [provider for provider, gives in given if gives is wanted]
        return exact or [provider for provider, gives in given if wanted in gives.__mro__]

    def lookup(self, cls: type[Any]) -> object:
        """See :class:`silbo.containers.Adapter`."""
        found = [provider for provider in self._providers(cls) if not _open(provider)]
        given = found[0] if len(found) == 1 else None
        while isinstance(given, providers.Dependency):
            given = given.last_overriding
        return NOTHING if not found else given() if isinstance(given, providers.Object) else ASK

    def give(self, given: object, types: Sequence[type[Any]], *, name: str = "") -> None:
        """See :class:`silbo.containers.Adapter`: the provider of a name, found under every class that the object is of.

        Raises:
            dependency_injector.errors.Error: the dispatcher's name is taken. That of something else may be.
        """
        of_dispatcher = isinstance(given, AsyncEventDispatcher)
        name = name or ("dispatcher" if of_dispatcher else type(given).__name__.lower())
        declared = self.container.providers.get(name)
        if declared is None:
            self.container.set_provider(name, providers.Object(given))
        elif _open(declared):
            declared.override(providers.Object(given))
        elif of_dispatcher:
            raise errors.Error(
                f"the container has a provider {name!r} already: {declared}. Choose another name, "
                "register_dispatcher(container, name=...)"
            )


class _Scope:
    def __init__(self, adapter: DependencyInjectorContainer, context: Context) -> None:
        self._adapter, self._context = adapter, context

    async def resolve(self, cls: type[T], /) -> T:
        provider = self._adapter.provider(cls)
        try:
            made: Any = self._context.run(provider)
            return await made if inspect.isawaitable(made) else made  # type: ignore[no-any-return]
        except errors.Error as error:
            raise Unresolvable(cls, self._adapter, str(error)) from error
        except TypeError as error:
            problem = _missing_argument(provider)
            if problem is None:  # raised inside of a constructor
                raise
            raise Unresolvable(cls, self._adapter, problem) from error


@overload
def register_dispatcher(container: containers.Container, *, name: str = ...) -> AsyncEventDispatcher: ...
@overload
def register_dispatcher(container: containers.Container, dispatcher: D, *, name: str = ...) -> D: ...
def register_dispatcher(
    container: containers.Container, dispatcher: AsyncEventDispatcher | None = None, *, name: str = "dispatcher"
) -> AsyncEventDispatcher:
    """Make one dispatcher the container's: the provider of a name, and found under every type that one may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all it derives from, down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        container: The object, not its class. Where the class declares ``dispatcher = providers.Dependency()``, to inject
            it into others, that is what is provided.
        dispatcher: A dispatcher of yours, of a class of yours if you like; by default a new one, whose listener classes are
            made by this container.
        name: The provider's.

    Returns:
        The dispatcher, also what the container gives from now on. Closing it stays with you.

    Raises:
        TypeError: it is no silbo dispatcher, or no container.
        DispatcherConflict: the container has another dispatcher; nothing was registered.
        dependency_injector.errors.Error: the container provides something else under this name.
    """
    adapter = DependencyInjectorContainer(container)
    found = AsyncEventDispatcher(container=adapter) if dispatcher is None else dispatcher
    if types := adapter.missing(found):
        adapter.give(found, types, name=name)
    return found


def _check(container: object) -> None:
    if not isinstance(container, containers.Container):
        raise TypeError(f"an object of a dependency_injector container is needed, as Services(), not {container!r}")


def _flat(container: Any) -> Iterator[providers.Provider[Any]]:
    for provider in container.providers.values():
        if isinstance(provider, providers.Container):
            yield from _flat(provider)
        else:
            yield provider


def _open(provider: Any) -> bool:
    """Whether it is declared only: something is still to be given to it."""
    return isinstance(provider, providers.Dependency) and not provider.is_defined


def _gives(provider: Any) -> type | None:
    """The class of what a provider gives, where it can be known without asking it."""
    if isinstance(provider, providers.Dependency):
        return _gives(provider.last_overriding) if provider.last_overriding else provider.instance_of
    source = getattr(provider, "provides", None)
    if isinstance(provider, providers.Object):
        return None if source is None else type(source)
    if inspect.isfunction(source):
        try:
            source = get_type_hints(source).get("return")
        except NameError:  # an annotation that only type checkers can read
            return None
    return source if isinstance(source, type) else None


def _missing_argument(provider: providers.Provider[Any]) -> str | None:
    one: Any
    for one in (provider, *provider.traverse()):
        source = getattr(one, "provides", None)
        if callable(source) and hasattr(one, "kwargs"):
            try:
                inspect.signature(source).bind(*getattr(one, "args", ()), **one.kwargs)
            except TypeError as error:
                return f"{getattr(source, '__qualname__', source)}: {error}"
    return None


async def _shut_down(container: containers.Container, context: Context) -> None:
    """Shut down the resources of a context, each before those it was made of; where one fails, the others too.

    Not by ``shutdown_resources``: where one fails there, others are left open.
    """
    resources: Iterator[Any] = container.traverse([providers.ContextLocalResource])
    left = [resource for resource in resources if context.run(getattr, resource, "initialized")]
    failures: list[Exception] = []
    while left:
        resource = next(one for one in left if not any(one in other.traverse() for other in left))
        left.remove(resource)
        try:
            closing = context.run(resource.shutdown)
            if closing is not None:
                await closing
        except Exception as failure:  # noqa: BLE001  # raised below
            failures.append(failure)
    if len(failures) > 1:
        raise ExceptionGroup(f"{len(failures)} resources failed to shut down", failures)
    if failures:
        raise failures[0]
