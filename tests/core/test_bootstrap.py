"""``bootstrap``: everything in one call, with the real containers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import di
import dishka
import pytest
import rodi
from dependency_injector import containers, providers

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    EventHandler,
    EventMap,
    IAsyncEventDispatcher,
    LoggingMiddleware,
    RequestHandler,
    RequestMap,
    bootstrap,
)
from silbo.containers.dishka import dispatcher_provider
from silbo.containers.rodi import RodiContainer, register_dispatcher
from silbo.errors import AlreadyBound, ContainerMissing, DispatcherConflict
from tests.support.mediator import Also, Collects, Do, DoHandler, Leaves, Local, Recorder
from tests.support.simple_container import SimpleContainer

HEARD: list[object] = []
AT_WORK = [0]


class Hears(Collects, EventHandler[Local]):
    async def handle(self, event: Local) -> None:
        HEARD.append(event.label)
        AT_WORK.append(AT_WORK[-1] + 1)
        await asyncio.sleep(0)
        AT_WORK.append(AT_WORK[-1] - 1)
        self._events.extend(event.follow)


class Asks(RequestHandler[Also, str]):
    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher

    async def handle(self, request: Also) -> str:
        return f"asked {type(self.dispatcher).__name__}"


def commands(mapper: RequestMap) -> None:
    mapper.bind(Do, DoHandler)


def queries(mapper: RequestMap) -> None:
    mapper.bind(Also, Asks)


def events(mapper: EventMap) -> None:
    mapper.bind(Local, Hears)


def of_rodi() -> rodi.Container:
    container = rodi.Container()
    for cls in (DoHandler, Hears, Asks):
        container.register(cls)
    return container


class Services(containers.DeclarativeContainer):
    dispatcher: Any = providers.Dependency()
    do = providers.Factory(DoHandler)
    hears = providers.Factory(Hears)
    asks = providers.Factory(Asks, dispatcher)


def of_dishka() -> dishka.AsyncContainer:
    provider = dishka.Provider(scope=dishka.Scope.REQUEST)
    for cls in (DoHandler, Hears, Asks):
        provider.provide(cls)
    return dishka.make_async_container(provider, dispatcher_provider())


@pytest.mark.parametrize("library", [of_rodi, di.Container, Services, of_dishka], ids=lambda make: make.__module__)
async def test_a_container_as_it_is_and_mappers_make_a_mediator(library: Any) -> None:
    """Of every library; the dispatcher is also what its components get."""
    HEARD.clear()
    container, broker = library(), Recorder()
    dispatcher = await container.get(AsyncEventDispatcher) if library is of_dishka else None
    started: list[str] = []
    mediator = bootstrap(
        di_container=container,
        commands_mapper=commands,
        queries_mapper=queries,
        domain_events_mapper=events,
        message_broker=broker,
        on_startup=[lambda: started.append("first"), lambda: started.append("second")],
        dispatcher=dispatcher,
    )
    assert started == ["first", "second"]
    assert await mediator.send(Do(events=[Local(1, [Leaves(3)]), Leaves(2)])) == "done"
    assert HEARD == [1] and broker.got == [2, 3]
    assert await mediator.send(Also()) == "asked AsyncEventDispatcher"


@pytest.mark.parametrize("library", [of_rodi, di.Container, Services], ids=lambda make: make.__module__)
async def test_events_side_by_side_have_handlers_of_their_own(library: Any) -> None:
    """Which collect events: di would share one in a scope."""
    HEARD.clear()
    AT_WORK[:] = [0]
    broker = Recorder()
    mediator = bootstrap(
        library(),
        commands_mapper=commands,
        domain_events_mapper=events,
        message_broker=broker,
        max_concurrent_event_handlers=3,
    )
    await mediator.send(Do(events=[Local(n, [Leaves(n)]) for n in range(5)]))
    assert HEARD == [0, 1, 2, 3, 4] and broker.got == [0, 1, 2, 3, 4] and max(AT_WORK) == 3


async def test_an_adapter_will_do_and_middlewares_are_around() -> None:
    async def shout(request: Do, handle: Any) -> Any:
        return (await handle(request)).upper()

    container = SimpleContainer()
    mediator = bootstrap(container, commands_mapper=commands, middlewares=[shout])
    assert await mediator.send(Do()) == "DONE"
    assert mediator.container is container and isinstance(
        bootstrap(RodiContainer(rodi.Container())).container, RodiContainer
    )


async def test_a_dispatcher_that_is_there_already_is_used_with_its_container() -> None:
    HEARD.clear()
    container = of_rodi()
    dispatcher = register_dispatcher(container)
    mediator = bootstrap(container, commands_mapper=commands, domain_events_mapper=events, dispatcher=dispatcher)
    await mediator.send(Do(events=[Local(1)]))
    assert mediator.dispatcher is dispatcher and HEARD == [1]
    container, plain = of_rodi(), AsyncEventDispatcher()
    mediator = bootstrap(container, commands_mapper=commands, domain_events_mapper=events, dispatcher=plain)
    await mediator.send(Do(events=[Local(2)]))
    assert mediator.dispatcher is plain and HEARD == [1, 2]
    with pytest.raises(ContainerMissing):
        plain.add_listener("Local", Hears)
    container = of_rodi()
    mine = AsyncEventDispatcher(on_error="collect", container=RodiContainer(container))
    mediator = bootstrap(container, commands_mapper=commands, dispatcher=mine)
    mine.add_listener("Local", Hears)
    await mediator.send(Do(events=[Local(3)]))
    assert HEARD == [1, 2, 3]


def test_another_containers_dispatcher_is_refused() -> None:
    with pytest.raises(ValueError, match="container of its own"):
        bootstrap(rodi.Container(), dispatcher=register_dispatcher(rodi.Container()))


def test_a_second_bridge_is_refused() -> None:
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(Recorder()))
    with pytest.raises(ValueError, match="send everything twice: leave out message_broker"):
        bootstrap(SimpleContainer(), dispatcher=dispatcher, message_broker=Recorder())


@pytest.mark.parametrize("wrong", [None, object(), "container", rodi, dict])
def test_what_is_no_container_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"adapter from silbo\.containers"):
        bootstrap(wrong)


WHERE = ["commands_mapper", "queries_mapper", "domain_events_mapper", "on_startup"]


@pytest.mark.parametrize("where", WHERE)
def test_functions_that_nobody_would_await_are_refused(where: str) -> None:
    """Neither async ones, nor those that only give a coroutine; an async mapper would bind nothing."""

    async def asynchronous(*_: object) -> None: ...

    def given(function: Any) -> Any:
        return {where: [function] if where == "on_startup" else function}

    with pytest.raises(TypeError, match=f"{where} takes a plain function, and .* is async: await it before"):
        bootstrap(SimpleContainer(), **given(asynchronous))
    with pytest.raises(TypeError, match=f"{where} takes a plain function, and .* returned a coroutine: await"):
        bootstrap(SimpleContainer(), **given(lambda *_: asynchronous()))
    with pytest.raises(TypeError, match=f"{where} is a function, not <RequestMap: empty>"):
        bootstrap(SimpleContainer(), **given(RequestMap()))


@pytest.mark.parametrize("where", ["middlewares", "on_startup"])
@pytest.mark.parametrize("one", [None, LoggingMiddleware(), print, "log"])
def test_one_alone_is_no_list(where: str, one: Any) -> None:
    """The error has the name of the argument."""
    wrong: Any = {where: one}
    with pytest.raises(TypeError, match=f"^{where} is a list, not "):
        bootstrap(SimpleContainer(), **wrong)


def fail(*_: object) -> None:
    raise LookupError("no such room")


def twice(mapper: RequestMap) -> None:
    commands(mapper)
    commands(mapper)


FAILURES: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"middlewares": [print]}, TypeError),
    ({"middlewares": None}, TypeError),
    ({"on_startup": fail}, TypeError),
    ({"message_broker": object()}, TypeError),
    ({"max_concurrent_event_handlers": 0}, ValueError),
    ({"commands_mapper": twice}, AlreadyBound),
    ({"domain_events_mapper": fail}, LookupError),
    ({"on_startup": [fail]}, LookupError),
]


@pytest.mark.parametrize(("wrong", "error"), FAILURES, ids=lambda part: ",".join(part) if type(part) is dict else "")
@pytest.mark.parametrize("library", [of_rodi, di.Container, Services], ids=lambda make: make.__module__)
@pytest.mark.parametrize("given", [False, True])
async def test_one_that_failed_leaves_nothing_behind(
    library: Any, wrong: dict[str, Any], error: type[Exception], given: bool
) -> None:
    """Neither in the container nor on a dispatcher that was given: mended, it works, with another dispatcher as well."""
    container, broker = library(), Recorder()
    options: dict[str, Any] = {"commands_mapper": commands, "queries_mapper": queries, "domain_events_mapper": events}
    options["message_broker"] = broker
    dispatchers = [AsyncEventDispatcher(), AsyncEventDispatcher()] if given else [None, None]
    for dispatcher in (dispatchers[0], *dispatchers):
        with pytest.raises(error):
            bootstrap(container, dispatcher=dispatcher, **options | wrong)
    assert not any(dispatcher.has_listeners() for dispatcher in dispatchers if dispatcher is not None)
    mediator = bootstrap(container, dispatcher=dispatchers[0], **options)
    assert await mediator.send(Do(events=[Local(1), Leaves(2)])) == "done" and broker.got == [2]
    assert await mediator.send(Also()) == "asked AsyncEventDispatcher"


def test_a_mistake_is_found_before_anything_is_called() -> None:
    """No hook has run by then."""
    container, called = of_rodi(), list[object]()
    bootstrap(container)
    with pytest.raises(DispatcherConflict):
        bootstrap(container, commands_mapper=called.append, on_startup=[lambda: called.append("started")])
    wrong: Any
    for wrong in ({"middlewares": [print]}, {"max_concurrent_event_handlers": 0}, {"message_broker": object()}):
        with pytest.raises((TypeError, ValueError)):
            bootstrap(of_rodi(), commands_mapper=called.append, on_startup=[fail], **wrong)
    assert called == []


def test_only_the_containers_own_library_is_imported() -> None:
    code = (
        "import sys, rodi, silbo; silbo.bootstrap(rodi.Container()); "
        "print(*{'di', 'dishka', 'dependency_injector'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
