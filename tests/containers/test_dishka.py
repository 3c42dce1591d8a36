"""Listener classes, and the dispatcher, in a dishka container."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import dishka
import pytest
from dishka.exception_base import DishkaError

from silbo import AsyncEventDispatcher, Event
from silbo.containers.dishka import DishkaContainer, dispatcher_provider
from silbo.errors import Unresolvable
from silbo.protocols import Container
from tests.support.container_conformance import (
    Api,
    Audit,
    Emitter,
    Explosive,
    HostDispatcher,
    Incomplete,
    Journal,
    Library,
    Old,
    Plugin,
    Session,
    Telling,
    Welcome,
)


class Dishka:
    @asynccontextmanager
    async def adapter(self, journal: Journal, session: Callable[..., Any]) -> AsyncIterator[Container]:
        provider = dishka.Provider()
        provider.provide(lambda: journal, provides=Journal, scope=dishka.Scope.APP)
        provider.provide(Api, scope=dishka.Scope.APP)
        provider.provide(session, provides=dishka.AnyOf[Session], scope=dishka.Scope.REQUEST)
        for cls in (Welcome, Audit, Explosive):
            provider.provide(cls, scope=dishka.Scope.REQUEST)
        container = dishka.make_async_container(provider)
        yield DishkaContainer(container)
        await container.close()

    def incomplete(self) -> Container:
        provider = dishka.Provider(scope=dishka.Scope.REQUEST)
        provider.provide(Incomplete)
        return DishkaContainer(dishka.make_async_container(provider, skip_validation=True))

    async def register(
        self, dispatcher: AsyncEventDispatcher | None
    ) -> tuple[AsyncEventDispatcher, Callable[[type[Any]], Awaitable[Any]]]:
        provider = dishka.Provider(scope=dishka.Scope.APP)
        for cls in (Emitter, Plugin, Old):
            provider.provide(cls)
        container = dishka.make_async_container(
            provider, dispatcher_provider() if dispatcher is None else dispatcher_provider(dispatcher)
        )
        return await container.get(AsyncEventDispatcher), container.get


class TestDishka(Telling):
    @pytest.fixture
    def library(self) -> Library:
        return Dishka()


async def test_a_dispatcher_of_the_hosts_class_can_be_made_with_the_container() -> None:
    """Its listener classes come from there."""
    provider = dishka.Provider(scope=dishka.Scope.REQUEST)
    provider.provide(Plugin)
    container = dishka.make_async_container(provider, dispatcher_provider(HostDispatcher))
    d = await container.get(HostDispatcher)
    assert d is await container.get(AsyncEventDispatcher)
    d.add_listener("x", Plugin)
    event: Any = await d.adispatch("x", Event())
    assert event.heard_by is d


async def test_a_class_nobody_provides_is_named() -> None:
    d = AsyncEventDispatcher(container=DishkaContainer(dishka.make_async_container()))
    d.add_listener("x", Plugin)
    with pytest.raises(Unresolvable, match="^DishkaContainer can't make Plugin: ") as caught:
        await d.adispatch("x")
    assert isinstance(caught.value.__cause__, DishkaError)


async def test_another_scope_can_be_chosen() -> None:
    """A program whose units of work are deeper."""
    provider = dishka.Provider(scope=dishka.Scope.ACTION)
    provider.provide(Session)
    container = dishka.make_async_container(provider)
    async with container() as request:
        async with DishkaContainer(container, scope=dishka.Scope.ACTION).scope() as scope:
            assert isinstance(await scope.resolve(Session), Session)
        async with DishkaContainer(request).scope() as scope:
            assert isinstance(await scope.resolve(Session), Session)


def test_a_container_for_sync_programs_is_refused() -> None:
    sync: Any = dishka.make_container()
    with pytest.raises(TypeError, match="make_async_container"):
        DishkaContainer(sync)
