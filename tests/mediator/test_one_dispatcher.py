"""A container, its components and the mediator have one dispatcher, with the real libraries; and one mediator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import di
import dishka
import pytest
import rodi
import whistle
from dependency_injector import containers, errors, providers
from di.dependent import Dependent

from silbo import AsyncEventDispatcher, Bridge, IAsyncEventDispatcher, Mediator, Request, RequestMap, bootstrap
from silbo.containers import dependency_injector as of_di
from silbo.containers.di import DIContainer
from silbo.containers.di import register_dispatcher as register_in_di
from silbo.containers.dishka import dispatcher_provider
from silbo.containers.rodi import RodiContainer, register_dispatcher
from silbo.errors import DispatcherConflict, Unresolvable
from tests.support.mediator import Leaves, Recorder


class Ask(Request[AsyncEventDispatcher]): ...


class Tells:
    def __init__(self, dispatcher: AsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher

    async def handle(self, request: Ask) -> AsyncEventDispatcher:
        return self.dispatcher


@dataclass
class Outer(Request[object]):
    event: Leaves


@dataclass
class Inner(Request[Mediator]):
    event: Leaves


class OuterHandler:
    def __init__(self, mediator: Mediator) -> None:
        self.mediator = mediator

    async def handle(self, request: Outer) -> object:
        return self.mediator, await self.mediator.send(Inner(request.event))


class InnerHandler:
    def __init__(self, mediator: Mediator) -> None:
        self.mediator, self.events = mediator, list[object]()

    async def handle(self, request: Inner) -> Mediator:
        await self.mediator.dispatcher.adispatch("inner", request.event)
        return self.mediator


def commands(mapper: RequestMap) -> None:
    mapper.bind(Ask, Tells)
    mapper.bind(Outer, OuterHandler)
    mapper.bind(Inner, InnerHandler)


HANDLERS = (Tells, OuterHandler, InnerHandler)
Make = Callable[[], Any]


def in_rodi(make: Make | None = None) -> rodi.Container:
    container = rodi.Container()
    for cls in HANDLERS:
        container.register(cls)
    if make is not None:
        container.add_singleton_by_factory(make, AsyncEventDispatcher)
    return container


def in_di(make: Make | None = None) -> di.Container:
    container = di.Container()
    if make is not None:
        container.bind(di.bind_by_type(Dependent(make, scope="request"), AsyncEventDispatcher))
    return container


def in_dependency_injector(make: Make | None = None) -> containers.Container:
    def typed() -> AsyncEventDispatcher:
        assert make is not None
        return make()  # type: ignore[no-any-return]

    class Services(containers.DeclarativeContainer):
        dispatcher: Any = providers.Dependency() if make is None else providers.Callable(typed)
        mediator: Any = providers.Dependency()
        tells = providers.Factory(Tells, dispatcher)
        outer = providers.Factory(OuterHandler, mediator)
        inner = providers.Factory(InnerHandler, mediator)

    return Services()


def in_dishka(make: Make | None = None) -> dishka.AsyncContainer:
    provider = dishka.Provider(scope=dishka.Scope.REQUEST)
    provider.provide(Tells)
    if make is None:
        return dishka.make_async_container(provider, dispatcher_provider())
    provider.provide(make, provides=AsyncEventDispatcher, scope=dishka.Scope.APP)
    return dishka.make_async_container(provider)


TAKING = pytest.mark.parametrize("library", [in_rodi, in_di, in_dependency_injector])
ALL = pytest.mark.parametrize("library", [in_rodi, in_di, in_dependency_injector, in_dishka])


@TAKING
async def test_a_given_dispatcher_is_what_components_get(library: Callable[[], Any]) -> None:
    """Or listeners and bridge would hang on another one than handlers dispatch with."""
    mine = AsyncEventDispatcher()
    mediator = bootstrap(library(), commands_mapper=commands, dispatcher=mine)
    assert await mediator.send(Ask()) is mine is mediator.dispatcher


@TAKING
async def test_so_it_is_where_an_adapter_is_given(library: Callable[[], Any]) -> None:
    container = library()
    adapter = {rodi.Container: RodiContainer, di.Container: DIContainer}.get(
        type(container), of_di.DependencyInjectorContainer
    )(container)
    mediator = bootstrap(adapter, commands_mapper=commands)
    assert await mediator.send(Ask()) is mediator.dispatcher and mediator.container is adapter


@ALL
async def test_a_second_mediator_is_to_have_the_same_dispatcher(library: Callable[[], Any]) -> None:
    """One error for all libraries, which says so; nothing has changed then."""
    container = library()
    if library is in_dishka:
        dispatcher = await container.get(AsyncEventDispatcher)
    else:
        dispatcher = bootstrap(container).dispatcher
    with pytest.raises(DispatcherConflict, match=r"has another dispatcher already.*bootstrap\(dispatcher=\.\.\.\)"):
        bootstrap(container)
    mediator = bootstrap(container, commands_mapper=commands, dispatcher=dispatcher)
    assert await mediator.send(Ask()) is dispatcher


@ALL
async def test_another_one_that_the_container_makes_is_an_error_in_its_first_scope(
    library: Callable[[Make], Any],
) -> None:
    """Before that nobody can know."""
    container = library(lambda: AsyncEventDispatcher())  # rodi takes no class here
    with pytest.raises(DispatcherConflict):
        bootstrap(container)  # a new one is none that the container makes
    mediator = bootstrap(container, commands_mapper=commands, dispatcher=AsyncEventDispatcher())
    for _ in range(2):
        with pytest.raises(DispatcherConflict):
            await mediator.send(Ask())


@pytest.mark.parametrize("scope", [dishka.Scope.APP, dishka.Scope.REQUEST])
@pytest.mark.parametrize("inside", [False, True])
async def test_a_dishka_container_has_what_any_of_its_scopes_has(scope: dishka.Scope, inside: bool) -> None:
    """Also where it is one of a scope itself."""
    provider = dishka.Provider(scope=scope)
    provider.provide(lambda: AsyncEventDispatcher(), provides=AsyncEventDispatcher)
    container = dishka.make_async_container(provider)
    async with container() as request:
        with pytest.raises(DispatcherConflict):
            bootstrap(request if inside else container)


@ALL
async def test_the_same_one_that_the_container_makes_is_fine(library: Callable[[Make], Any]) -> None:
    made: list[int] = []
    mine = AsyncEventDispatcher()

    def make() -> AsyncEventDispatcher:
        made.append(1)
        return mine

    mediator = bootstrap(library(make), commands_mapper=commands, dispatcher=mine)
    assert made == []  # wiring makes nothing
    for _ in range(2):
        assert await mediator.send(Ask()) is mine


def test_another_one_that_the_container_has_is_an_error_at_once() -> None:
    with_rodi, with_di = rodi.Container(), di.Container()
    register_dispatcher(with_rodi)
    register_in_di(with_di)
    with_objects = containers.DynamicContainer()
    with_objects.set_provider("events", providers.Object(AsyncEventDispatcher()))
    for container in (with_rodi, with_di, with_objects):
        with pytest.raises(DispatcherConflict):
            bootstrap(container, dispatcher=AsyncEventDispatcher())


async def test_one_that_is_registered_under_whistles_type_is_registered_under_the_others() -> None:
    """As a host does that was written against Whistle."""
    container, mine = in_rodi(), AsyncEventDispatcher()
    container.add_instance(mine, IAsyncEventDispatcher)
    mediator = bootstrap(container, commands_mapper=commands, dispatcher=mine)
    assert await mediator.send(Ask()) is mine
    with pytest.raises(TypeError, match="mediator's dispatcher is a silbo.AsyncEventDispatcher"):
        bootstrap(container, dispatcher=whistle.AsyncEventDispatcher())  # type: ignore[arg-type]


async def test_to_register_the_same_one_again_is_no_matter() -> None:
    container = in_di()
    dispatcher = register_in_di(container)
    assert register_in_di(container, dispatcher) is dispatcher
    with pytest.raises(DispatcherConflict):
        register_in_di(container)


@TAKING
async def test_a_handler_may_ask_for_the_mediator(library: Callable[[], Any]) -> None:
    """To send another request: which is a part of its own."""
    broker = Recorder()
    mediator = bootstrap(library(), commands_mapper=commands, message_broker=broker)
    assert await mediator.send(Outer(Leaves(1))) == (mediator, mediator)
    assert broker.got == [1]


async def test_a_dishka_container_makes_the_mediator_itself() -> None:
    """The recipe of the page."""

    class Application(dishka.Provider):
        handlers = dishka.provide_all(Tells, OuterHandler, InnerHandler, scope=dishka.Scope.REQUEST)

        @dishka.provide(scope=dishka.Scope.APP)
        def mediator(self, container: dishka.AsyncContainer, dispatcher: AsyncEventDispatcher) -> Mediator:
            return bootstrap(container, commands_mapper=commands, dispatcher=dispatcher)

    container = dishka.make_async_container(Application(), dispatcher_provider())
    mediator = await container.get(Mediator)
    broker = Recorder()
    mediator.dispatcher.add_subscriber(Bridge(broker))
    assert await mediator.send(Outer(Leaves(1))) == (mediator, mediator)
    assert broker.got == [1] and await mediator.send(Ask()) is mediator.dispatcher
    assert await container.get(AsyncEventDispatcher) is mediator.dispatcher


async def test_a_mediator_that_the_host_has_registered_stays() -> None:
    container = in_rodi()
    container.add_singleton_by_factory(lambda: mediator, Mediator)
    mediator = bootstrap(container, commands_mapper=commands)
    other = bootstrap(container, commands_mapper=commands, dispatcher=mediator.dispatcher)
    assert await other.send(Outer(Leaves(1))) == (mediator, mediator)


def test_what_rodi_has_built_before_is_kept() -> None:
    """To register something makes rodi build anew: a second object of each singleton."""
    container = rodi.Container()
    container.add_singleton(Recorder)
    dispatcher = register_dispatcher(container)
    first = container.resolve(Recorder)
    mediator = bootstrap(container, dispatcher=dispatcher)
    assert container.resolve(Recorder) is first and container.resolve(Mediator) is mediator
    container.register(InnerHandler)  # builds anew
    assert container.resolve(InnerHandler).mediator is mediator


def test_a_declared_dependency_of_the_type_is_filled() -> None:
    """It gives nothing yet, whatever it is declared for."""

    class Services(containers.DeclarativeContainer):
        dispatcher: Any = providers.Dependency(instance_of=AsyncEventDispatcher)
        mediator: Any = providers.Dependency(instance_of=Mediator)

    services = Services()
    mediator = bootstrap(services)
    assert services.mediator() is mediator and services.dispatcher() is mediator.dispatcher


def test_a_name_that_is_taken_in_dependency_injector() -> None:
    """The dispatcher's is an error, for others are injected under it; the mediator's is not needed."""
    container = containers.DynamicContainer()
    container.set_provider("dispatcher", providers.Object("of phone calls"))
    with pytest.raises(errors.Error, match="a provider 'dispatcher' already.*name="):
        bootstrap(container)
    container = containers.DynamicContainer()
    container.set_provider("mediator", providers.Object("between neighbours"))
    bootstrap(container)
    assert container.mediator() == "between neighbours"


# -- what di would make in passing ----------------------------------------------------------------------------------


class InAnnotated:
    def __init__(self, dispatcher: Annotated[AsyncEventDispatcher, "ours"]) -> None: ...


class OfOneOfThem:
    def __init__(self, tells: Tells) -> None: ...


class OfWhistles:
    def __init__(self, dispatcher: whistle.AsyncEventDispatcher, interface: IAsyncEventDispatcher) -> None: ...


class Host(AsyncEventDispatcher):
    pass


async def resolve(container: di.Container, cls: type[Any]) -> Any:
    async with DIContainer(container).scope() as scope:
        return await scope.resolve(cls)


@pytest.mark.parametrize("cls", [Tells, InAnnotated, OfOneOfThem, OfWhistles, AsyncEventDispatcher, Host])
async def test_di_makes_no_dispatcher_in_passing(cls: type[Any]) -> None:
    """It would be another one than that which has the listeners and the bridge, and nobody would know."""
    with pytest.raises(Unresolvable, match=r"is bound to nothing.*register_dispatcher\(container, dispatcher\)"):
        await resolve(di.Container(), cls)


async def test_nor_a_mediator() -> None:
    container = di.Container()
    register_in_di(container)
    with pytest.raises(Unresolvable, match="Mediator is bound to nothing.*bind one that you made by hand"):
        await resolve(container, OuterHandler)


async def test_but_it_makes_the_class_that_is_bound() -> None:
    def mine() -> Iterator[Host]:
        yield Host()

    container = di.Container()
    container.bind(di.bind_by_type(Dependent(AsyncEventDispatcher, scope="request"), AsyncEventDispatcher))
    assert type((await resolve(container, Tells)).dispatcher) is AsyncEventDispatcher
    for call in (Host, mine):
        container = di.Container()
        container.bind(di.bind_by_type(Dependent(call, scope="request"), AsyncEventDispatcher))
        assert type((await resolve(container, Tells)).dispatcher) is Host
