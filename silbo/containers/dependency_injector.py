"""The adapter of dependency_injector: makes listener classes, and gives one dispatcher to all components.

Install it with ``pip install 'silbo[dependency-injector]'``.

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

from silbo._checks import require_extra
from silbo._whistle import IAsyncEventDispatcher, WhistleDispatcher
from silbo.containers._adapter import NOTHING, UNKNOWN, Adapter
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import Unresolvable

with require_extra(
    "silbo.containers.dependency_injector", extra="dependency-injector", libraries=("dependency_injector",)
):
    from dependency_injector import containers, errors, providers

__all__ = ["DependencyInjectorContainer", "register_dispatcher"]

T = TypeVar("T")
D = TypeVar("D", bound=AsyncEventDispatcher)


class DependencyInjectorContainer(Adapter):
    """Makes the objects of listener classes with a dependency_injector container.

    A class is looked up among the container's providers, including those of nested containers: the provider of the class
    itself, else the only provider of a subclass.

    Each unit of work has a context of its own, which begins without the objects that ``ContextLocalSingleton`` and
    ``ContextLocalResource`` have elsewhere: they are made once in it, and resources are shut down at the end. The library
    does not pass an error of the dispatch to them.
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
            context.run(resource.reset_state)  # forgotten in this context only: other contexts still have it
        for singleton in self.container.traverse([providers.ContextLocalSingleton]):
            context.run(singleton.reset)
        try:
            scope = _Scope(self, context)
            await self.check_scope(scope)
            yield scope
        finally:
            await _shut_down(self.container, context)

    def provider(self, cls: type) -> providers.Provider[Any]:
        """Return the provider of a class.

        Raises:
            Unresolvable: no provider gives the class, or more than one does.
        """
        found = self._providers(cls)
        if len(found) != 1:
            problem = f"{len(found)} providers give it: {found}" if found else "no provider of the container gives it"
            raise Unresolvable(cls, self, problem)
        return found[0]

    def _providers(self, cls: type) -> list[providers.Provider[Any]]:
        wanted: type = WhistleDispatcher if cls is IAsyncEventDispatcher else cls
        given = [
            (provider, gives) for provider in _providers_of(self.container) if (gives := _gives(provider)) is not None
        ]
        exact = [provider for provider, gives in given if gives is wanted]
        return exact or [provider for provider, gives in given if wanted in gives.__mro__]

    def find(self, cls: type[Any]) -> object:
        """See :class:`silbo.containers._adapter.Adapter`."""
        found = [provider for provider in self._providers(cls) if not _is_undefined(provider)]
        if not found:
            return NOTHING
        provider = found[0] if len(found) == 1 else None
        while isinstance(provider, providers.Dependency):
            provider = provider.last_overriding
        return provider() if isinstance(provider, providers.Object) else UNKNOWN

    def register(self, registered: object, types: Sequence[type[Any]], *, name: str = "") -> None:
        """See :class:`silbo.containers._adapter.Adapter`. The types are not needed: a provider is found by the classes of its object.

        Args:
            registered: The object.
            types: Not used.
            name: Of the provider; by default "dispatcher" for a dispatcher, else the class's name in lower case.

        Raises:
            dependency_injector.errors.Error: it is a dispatcher, and its name is taken. If the name of another object is
                taken, nothing is registered.
        """
        is_dispatcher = isinstance(registered, AsyncEventDispatcher)
        name = name or ("dispatcher" if is_dispatcher else type(registered).__name__.lower())
        declared = self.container.providers.get(name)
        if declared is None:
            self.container.set_provider(name, providers.Object(registered))
        elif _is_undefined(declared):
            declared.override(providers.Object(registered))
        elif is_dispatcher:
            raise errors.Error(
                f"the container has a provider {name!r} already: {declared}. Choose another name, "
                "register_dispatcher(container, name=...)"
            )


class _Scope:
    def __init__(self, adapter: DependencyInjectorContainer, context: Context) -> None:
        self._adapter = adapter
        self._context = context

    async def resolve(self, cls: type[T], /) -> T:
        provider = self._adapter.provider(cls)
        try:
            made: Any = self._context.run(provider)
            return await made if inspect.isawaitable(made) else made  # type: ignore[no-any-return]
        except errors.Error as error:
            raise Unresolvable(cls, self._adapter, str(error)) from error
        except TypeError as error:
            problem = _missing_argument(provider)
            if problem is None:  # raised inside a constructor
                raise
            raise Unresolvable(cls, self._adapter, problem) from error


@overload
def register_dispatcher(container: containers.Container, *, name: str = ...) -> AsyncEventDispatcher: ...
@overload
def register_dispatcher(container: containers.Container, dispatcher: D, *, name: str = ...) -> D: ...
def register_dispatcher(
    container: containers.Container, dispatcher: AsyncEventDispatcher | None = None, *, name: str = "dispatcher"
) -> AsyncEventDispatcher:
    """Register one dispatcher in the container: as the provider of a name, found under every type that a component may ask for.

    Those are ``whistle.IAsyncEventDispatcher`` (which is ``silbo.IAsyncEventDispatcher``), and the dispatcher's own class
    with all its bases down to ``silbo.AsyncEventDispatcher`` and ``whistle.AsyncEventDispatcher``.

    Args:
        container: An object of the container's class. If the class declares ``dispatcher = providers.Dependency()``, to
            inject it into others, this provider gives the dispatcher.
        dispatcher: Your own dispatcher, perhaps of a class of yours; by default a new one, whose listener classes are made by
            this container.
        name: Of the provider.

    Returns:
        The dispatcher, which the container gives from now on. You close it yourself.

    Raises:
        TypeError: ``dispatcher`` is not a silbo dispatcher, or ``container`` is not a container.
        DispatcherConflict: the container has another dispatcher; nothing was registered.
        dependency_injector.errors.Error: the container provides something else under this name.
    """
    adapter = DependencyInjectorContainer(container)
    registered = AsyncEventDispatcher(container=adapter) if dispatcher is None else dispatcher
    if types := adapter.check_dispatcher(registered):
        adapter.register(registered, types, name=name)
    return registered


def _check(container: object) -> None:
    if not isinstance(container, containers.Container):
        raise TypeError(f"an object of a dependency_injector container is needed, as Services(), not {container!r}")


def _providers_of(container: Any) -> Iterator[providers.Provider[Any]]:
    """Yield the providers of a container and of its nested containers."""
    for provider in container.providers.values():
        if isinstance(provider, providers.Container):
            yield from _providers_of(provider)
        else:
            yield provider


def _is_undefined(provider: Any) -> bool:
    """Return True if the provider is a declared Dependency for which no other provider was given yet."""
    return isinstance(provider, providers.Dependency) and not provider.is_defined


def _gives(provider: Any) -> type | None:
    """Return the class of the objects that a provider gives; None if only a call of the provider would show it."""
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
    """Return the text of the error of a provider that lacks an argument for its class, looking at its dependencies too."""
    each: Any
    for each in (provider, *provider.traverse()):
        source = getattr(each, "provides", None)
        if callable(source) and hasattr(each, "kwargs"):
            try:
                inspect.signature(source).bind(*getattr(each, "args", ()), **each.kwargs)
            except TypeError as error:
                return f"{getattr(source, '__qualname__', source)}: {error}"
    return None


async def _shut_down(container: containers.Container, context: Context) -> None:
    """Shut down the resources of a context, each before its own dependencies, and all of them even if some fail.

    The library's ``shutdown_resources`` leaves others open if one fails.

    Raises:
        Exception: the error of the one resource that failed; an ExceptionGroup if several did.
    """
    resources: Iterator[Any] = container.traverse([providers.ContextLocalResource])
    left = [resource for resource in resources if context.run(getattr, resource, "initialized")]
    failures: list[Exception] = []
    while left:
        resource = next(each for each in left if not any(each in other.traverse() for other in left))
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
