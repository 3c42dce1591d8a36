"""The dispatcher in a rodi container."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import rodi
import whistle

import silbo
from silbo import AsyncEventDispatcher
from silbo.containers.rodi import RodiContainer, register_dispatcher
from silbo.errors import DispatcherConflict, Unresolvable
from silbo.protocols import Container
from tests.support import container_conformance as conformance
from tests.support.container_conformance import Conformance, Journal, Library


class Rodi:
    @asynccontextmanager
    async def adapter(self, journal: Journal, session: Callable[..., Any]) -> AsyncIterator[Container]:
        container = rodi.Container()
        container.add_instance(journal)
        container.add_singleton(conformance.Api)
        container.add_scoped_by_factory(journal.open, conformance.Session)
        for cls in (conformance.Welcome, conformance.Audit, conformance.Explosive):
            container.register(cls)
        yield RodiContainer(container)

    def incomplete(self) -> Container:
        return RodiContainer(rodi.Container().register(conformance.Incomplete))

    async def register(
        self, dispatcher: AsyncEventDispatcher | None
    ) -> tuple[AsyncEventDispatcher, Callable[[type[Any]], Awaitable[Any]]]:
        container = rodi.Container()
        registered = (
            register_dispatcher(container) if dispatcher is None else register_dispatcher(container, dispatcher)
        )
        for cls in (conformance.Emitter, conformance.Plugin, conformance.Old):
            container.register(cls)

        async def resolve(cls: type[Any]) -> Any:
            return container.resolve(cls)

        return registered, resolve


class TestRodi(Conformance):
    """rodi closes nothing."""

    @pytest.fixture
    def library(self) -> Library:
        return Rodi()

    @pytest.fixture
    def session(self) -> None:
        """rodi knows no generators."""


class HostDispatcher(silbo.AsyncEventDispatcher):
    pass


class Emitter:
    def __init__(self, dispatcher: whistle.IAsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher


class Plugin:
    def __init__(self, dispatcher: silbo.AsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher


class Untyped:
    def __init__(self, async_event_dispatcher) -> None:  # type: ignore[no-untyped-def]
        self.dispatcher = async_event_dispatcher


@pytest.fixture(params=[False, True], ids=["aliases", "strict"])
def container(request: pytest.FixtureRequest) -> rodi.Container:
    return rodi.Container(strict=request.param)


@pytest.mark.parametrize(
    "asked", [silbo.AsyncEventDispatcher, silbo.IAsyncEventDispatcher, whistle.AsyncEventDispatcher]
)
def test_every_type_gives_the_same_dispatcher_again_and_again(container: rodi.Container, asked: type) -> None:
    """Whatever a component is typed against, there is one dispatcher."""
    dispatcher = register_dispatcher(container)
    assert container.resolve(asked) is container.resolve(asked) is dispatcher


async def test_components_hear_each_other_whatever_they_are_typed_against(container: rodi.Container) -> None:
    """A plugin that asks for silbo's class hears what a component typed against Whistle dispatches."""
    register_dispatcher(container)
    container.register(Emitter)
    container.register(Plugin)
    heard: list[silbo.Event] = []

    async def listener(event: silbo.Event) -> None:
        heard.append(event)

    container.resolve(Plugin).dispatcher.add_listener("my.event", listener)
    event = await container.resolve(Emitter).dispatcher.adispatch("my.event", silbo.Event())
    assert heard == [event]


def test_a_hosts_own_dispatcher_is_found_under_its_class_too(container: rodi.Container) -> None:
    mine = HostDispatcher(on_error="collect")
    assert register_dispatcher(container, mine) is mine
    for asked in (HostDispatcher, silbo.AsyncEventDispatcher, whistle.IAsyncEventDispatcher):
        assert container.resolve(asked) is mine


def test_a_parameter_without_annotation_is_found_by_its_name() -> None:
    """As it is where Whistle's dispatcher alone is registered."""
    container = rodi.Container()
    dispatcher = register_dispatcher(container)
    container.register(Untyped)
    assert container.resolve(Untyped).dispatcher is dispatcher


@pytest.mark.parametrize(
    "taken", [whistle.IAsyncEventDispatcher, whistle.AsyncEventDispatcher, silbo.AsyncEventDispatcher]
)
def test_a_container_that_has_a_dispatcher_is_left_as_it_was(container: rodi.Container, taken: type) -> None:
    """Two dispatchers would not hear each other; half a registration would be just that."""
    container.add_instance(silbo.AsyncEventDispatcher(), taken)
    with pytest.raises(DispatcherConflict, match="^RodiContainer: the container has another dispatcher already"):
        register_dispatcher(container)
    assert [cls for cls, _ in container] == [taken]


@pytest.mark.parametrize("wrong", [whistle.AsyncEventDispatcher(), silbo.AsyncEventDispatcher])
def test_only_an_instance_of_silbos_dispatcher_is_accepted(container: rodi.Container, wrong: object) -> None:
    with pytest.raises(TypeError, match=r"an object of silbo\.AsyncEventDispatcher, not "):
        register_dispatcher(container, wrong)  # type: ignore[type-var]
    assert not list(container)


async def test_a_class_nobody_registered_is_named() -> None:
    d = AsyncEventDispatcher(container=RodiContainer(rodi.Container()))
    d.add_listener("x", conformance.Plugin)
    with pytest.raises(Unresolvable, match="^RodiContainer can't make Plugin: ") as caught:
        await d.adispatch("x")
    assert isinstance(caught.value.__cause__, rodi.DIException)
