"""Listener classes, and the dispatcher, in a dependency_injector container."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from dependency_injector import containers, providers

from silbo import AsyncEventDispatcher, Event
from silbo.containers.dependency_injector import DependencyInjectorContainer, register_dispatcher
from silbo.errors import DispatcherConflict, Unresolvable
from silbo.protocols import Container
from tests.support.container_conformance import (
    Api,
    Audit,
    Closing,
    Emitter,
    Explosive,
    Incomplete,
    Journal,
    Library,
    Missing,
    Old,
    Plugin,
    Session,
    Welcome,
)


class DependencyInjector:
    @asynccontextmanager
    async def adapter(self, journal: Journal, session: Callable[..., Any]) -> AsyncIterator[Container]:
        class Services(containers.DeclarativeContainer):
            journal: providers.Dependency[Journal] = providers.Dependency()  # an argument would be copied
            api = providers.Singleton(Api, journal)
            scoped = providers.ContextLocalResource(session, journal)
            welcome = providers.Factory(Welcome, scoped, api)
            audit = providers.Factory(Audit, scoped, api)
            explosive = providers.Factory(Explosive, api)

        yield DependencyInjectorContainer(Services(journal=journal))

    def incomplete(self) -> Container:
        class Services(containers.DeclarativeContainer):
            missing: providers.Dependency[Missing] = providers.Dependency(instance_of=Missing)
            incomplete = providers.Factory(Incomplete, missing)

        return DependencyInjectorContainer(Services())

    async def register(
        self, dispatcher: AsyncEventDispatcher | None
    ) -> tuple[AsyncEventDispatcher, Callable[[type[Any]], Awaitable[Any]]]:
        class Services(containers.DeclarativeContainer):
            dispatcher: providers.Dependency[AsyncEventDispatcher] = providers.Dependency()
            emitter = providers.Factory(Emitter, dispatcher)
            plugin = providers.Factory(Plugin, dispatcher=dispatcher)
            old = providers.Factory(Old, dispatcher)

        services = Services()
        registered = register_dispatcher(services) if dispatcher is None else register_dispatcher(services, dispatcher)

        async def resolve(cls: type[Any]) -> Any:
            async with DependencyInjectorContainer(services).scope() as scope:
                return await scope.resolve(cls)

        return registered, resolve


class TestDependencyInjector(Closing):
    @pytest.fixture
    def library(self) -> Library:
        return DependencyInjector()


def adapter(**given: providers.Provider[Any]) -> DependencyInjectorContainer:
    container = containers.DynamicContainer()
    container.set_providers(**given)
    return DependencyInjectorContainer(container)


async def resolved(container: DependencyInjectorContainer, cls: type[Any]) -> Any:
    async with container.scope() as scope:
        return await scope.resolve(cls)


class Base:
    pass


class Derived(Base):
    pass


def make_derived() -> Derived:
    return Derived()


class Inner(containers.DeclarativeContainer):
    inner = providers.Factory(Derived)


class Needs:
    def __init__(self, url: str) -> None: ...


# -- which provider --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "provider",
    [
        providers.Factory(Derived),
        providers.Singleton(Derived),
        providers.Object(Derived()),
        providers.Callable(make_derived),
        providers.Container(Inner),
    ],
    ids=["factory", "singleton", "object", "annotated function", "nested container"],
)
@pytest.mark.parametrize("asked", [Derived, Base])
async def test_a_class_is_found_by_what_a_provider_gives(provider: providers.Provider[Any], asked: type) -> None:
    """Also where it is asked for by a class that it derives from."""
    assert type(await resolved(adapter(one=provider, other=providers.Factory(Session)), asked)) is Derived


async def test_the_class_itself_goes_before_its_subclasses() -> None:
    container = adapter(one=providers.Factory(Derived), other=providers.Factory(Base))
    assert type(await resolved(container, Base)) is Base


@pytest.mark.parametrize(
    ("given", "asked", "problem"),
    [
        ({}, Base, "no provider of the container gives it"),
        ({"a": providers.Factory(Base), "b": providers.Factory(Base)}, Base, "2 providers give it: "),
        ({"a": providers.Factory(Derived), "b": providers.Factory(Derived)}, Base, "2 providers give it: "),
        ({"a": providers.Factory(Needs)}, Needs, "Needs: missing a required argument: 'url'"),
        ({"a": providers.Factory(Session, providers.Factory(Needs))}, Session, "Session: too many positional arg"),
        ({"a": providers.Factory(Emitter, providers.Factory(Needs))}, Emitter, "Needs: missing a required argument"),
    ],
    ids=["none", "two", "two subclasses", "argument", "too many", "argument of a dependency"],
)
async def test_what_is_missing_is_named(given: Any, asked: type, problem: str) -> None:
    with pytest.raises(Unresolvable, match=f"^DependencyInjectorContainer can't make {asked.__name__}: {problem}"):
        await resolved(adapter(**given), asked)


async def test_what_overrides_a_provider_counts() -> None:
    """As a test replaces a part of a program."""
    given = providers.Factory(Base)
    container = adapter(one=given)
    with given.override(providers.Factory(Derived)):
        assert type(await resolved(container, Base)) is Derived
    assert type(await resolved(container, Base)) is Base


# -- scopes ----------------------------------------------------------------------------------------------------


async def test_a_scope_begins_without_what_its_surroundings_hold_and_leaves_that_alone() -> None:
    """A web request's own session is not a dispatch's, and is not closed by one."""
    ends: list[Session] = []

    def session() -> Iterator[Session]:
        mine = Session()
        yield mine
        ends.append(mine)

    resource = providers.ContextLocalResource(session)
    singleton = providers.ContextLocalSingleton(Base)
    container = adapter(resource=resource, singleton=singleton, handler=providers.Factory(Both, resource, singleton))
    outer, around = resource(), singleton()
    d = AsyncEventDispatcher(container=container)
    d.add_listener("x", Both)
    d.add_listener("x", Both)
    event = Collects()
    await d.adispatch("x", event)
    (first, base), (second, other) = event.seen
    assert first is second and base is other and first is not outer and base is not around
    assert ends == [first]
    assert resource() is outer and singleton() is around
    resource.shutdown()


class Collects(Event):
    def __init__(self) -> None:
        self.seen: list[tuple[Session, Base]] = []


class Both:
    def __init__(self, session: Session, base: Base) -> None:
        self.both = session, base

    async def handle(self, event: Collects) -> None:
        event.seen.append(self.both)


class Holds:
    def __init__(self, *resources: str) -> None: ...

    async def handle(self, event: Event) -> None: ...


@pytest.mark.parametrize("failing", [[], ["first"], ["second"], ["second", "first"]], ids=str)
async def test_resources_are_closed_in_their_order_also_where_one_fails(failing: list[str]) -> None:
    """Each before the one it was made of; nothing stays open."""
    ends: list[str] = []

    def end(name: str) -> None:
        ends.append(name)
        if name in failing:
            raise OSError(name)

    def sync(name: str, *made_of: str) -> Iterator[str]:
        yield name
        end(name)

    async def asynchronous(name: str, *made_of: str) -> AsyncIterator[str]:
        yield name
        end(name)

    first = providers.ContextLocalResource(sync, "first")
    second = providers.ContextLocalResource(asynchronous, "second", providers.List(first))
    third = providers.ContextLocalResource(sync, "third", second)
    unused = providers.ContextLocalResource(sync, "unused")
    d = AsyncEventDispatcher(container=adapter(holds=providers.Factory(Holds, first, third), unused=unused))
    d.add_listener("x", Holds)
    error: Exception | None = None
    try:
        await d.adispatch("x")
    except (OSError, ExceptionGroup) as raised:
        error = raised
    assert ends == ["third", "second", "first"]
    errors = error.exceptions if isinstance(error, ExceptionGroup) else [error] if error else []
    assert [str(one) for one in errors] == failing


async def test_a_resource_of_the_application_stays_open() -> None:
    ends: list[str] = []

    def once() -> Iterator[str]:
        yield "open"
        ends.append("closed")

    resource = providers.Resource(once)
    d = AsyncEventDispatcher(container=adapter(x=providers.Factory(Both, resource, providers.Factory(Base))))
    d.add_listener("x", Both)
    await d.adispatch("x", Collects())
    assert ends == [] and resource.initialized
    resource.shutdown()


# -- the dispatcher --------------------------------------------------------------------------------------------


async def test_the_dispatcher_is_provided_where_nothing_was_declared() -> None:
    container = containers.DynamicContainer()
    dispatcher = register_dispatcher(container, name="events")
    assert container.events() is dispatcher
    assert await resolved(DependencyInjectorContainer(container), AsyncEventDispatcher) is dispatcher


def test_a_container_that_has_a_dispatcher_is_left_as_it_was() -> None:
    """Two dispatchers would not hear each other."""
    container = containers.DynamicContainer()
    first = register_dispatcher(container)
    with pytest.raises(DispatcherConflict, match="has another dispatcher already"):
        register_dispatcher(container, name="events")
    assert container.dispatcher() is first


def test_the_class_of_a_container_is_refused() -> None:
    """Each object of it has providers of its own."""
    cls: Any = containers.DeclarativeContainer
    with pytest.raises(TypeError, match="an object of a dependency_injector container"):
        DependencyInjectorContainer(cls)
    with pytest.raises(TypeError, match="an object of a dependency_injector container"):
        register_dispatcher(cls, AsyncEventDispatcher())
