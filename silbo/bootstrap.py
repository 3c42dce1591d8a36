"""A mediator with all that belongs to it, in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from silbo._checks import check_count, check_list
from silbo.bridge import Bridge, find_bridges
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import container_of
from silbo.dispatch.options import is_async
from silbo.mediator.maps import EventMap, RequestMap
from silbo.mediator.mediator import Mediator, shared_container
from silbo.mediator.middleware import AnyMiddleware, check_middlewares
from silbo.protocols import Container, Publisher
from silbo.work.unit_of_work import check_container

__all__ = ["bootstrap"]

ADAPTERS: Final = {
    "rodi": "RodiContainer",
    "di": "DIContainer",
    "dependency_injector": "DependencyInjectorContainer",
    "dishka": "DishkaContainer",
}
"""The libraries whose containers are recognised. Their adapters are imported by name, when a container of theirs is given:
the core knows of none."""


class OfRodi(Protocol):
    """What a type checker knows a ``rodi.Container`` by."""

    @property
    def build_provider(self) -> object: ...


class OfDi(Protocol):
    """What a type checker knows a ``di.Container`` by."""

    @property
    def solve(self) -> object: ...


class OfDependencyInjector(Protocol):
    """What a type checker knows a ``dependency_injector.containers.Container`` by."""

    @property
    def wire(self) -> object: ...


class OfDishka(Protocol):
    """What a type checker knows a ``dishka.AsyncContainer`` by."""

    @property
    def parent_container(self) -> object: ...


AnyContainer: TypeAlias = OfRodi | OfDi | OfDependencyInjector | OfDishka | Container


@runtime_checkable
class Registers(Protocol):
    """An adapter that can make the dispatcher and the mediator what its container gives."""

    def missing(self, dispatcher: AsyncEventDispatcher, *, ask: bool = ...) -> object:
        """Raise where the container has another one; nothing is registered."""
        ...

    def take_dispatcher(self, dispatcher: AsyncEventDispatcher, *, ask: bool = ...) -> None:
        """Make it the container's."""
        ...

    def take(self, given: object) -> None:
        """Give it to who asks for its class."""
        ...


def bootstrap(
    di_container: AnyContainer,
    *,
    commands_mapper: Callable[[RequestMap], object] | None = None,
    queries_mapper: Callable[[RequestMap], object] | None = None,
    domain_events_mapper: Callable[[EventMap], object] | None = None,
    message_broker: Publisher | None = None,
    middlewares: Iterable[AnyMiddleware] = (),
    on_startup: Iterable[Callable[[], object]] = (),
    max_concurrent_event_handlers: int = 1,
    dispatcher: AsyncEventDispatcher | None = None,
) -> Mediator:
    """Make a mediator: with maps, container, dispatcher, bridge and middlewares.

    Args:
        di_container: Of rodi, di, dependency_injector or dishka, as it is; or an adapter.
        commands_mapper: Binds the commands: ``mapper.bind(JoinMeeting, JoinMeetingHandler)``.
        queries_mapper: Binds the queries.
        domain_events_mapper: Binds handlers of events, of whatever kind.
        message_broker: Gets what leaves, over a bridge: a broker, or an outbox in front of one. Whoever opened it closes it.
        middlewares: As for :class:`~silbo.mediator.mediator.Mediator`.
        on_startup: Called in this order, when all arguments have been checked, and before anything is registered; not async.
        max_concurrent_event_handlers: As for :class:`~silbo.mediator.mediator.Mediator`.
        dispatcher: The one that the container has, or is to have. By default a new one. Listener classes can be added to one
            of yours where it has the container, too: ``AsyncEventDispatcher(container=RodiContainer(container))``.

    The dispatcher becomes what the container gives to those who ask for an ``AsyncEventDispatcher``, and the mediator what it
    gives for a ``Mediator``, unless it gives something else for that; but not for dishka, whose containers take nothing more.
    Where anything fails, the container has neither, and the next call with it may succeed.

    Returns:
        The mediator; its ``dispatcher`` takes more listeners.

    Raises:
        TypeError: an argument is not of its sort, or a mapper or a function for the start is async.
        ValueError: the dispatcher has a bridge already, so that a second one would send everything twice.
        DispatcherConflict: the container has another dispatcher. Where only asking it would tell, it is raised when the first
            scope is entered.
    """
    adapter = _adapter(di_container, dispatcher)
    requests, events, starting = RequestMap(), EventMap(), check_list("on_startup", on_startup)
    mappers = (
        ("commands_mapper", commands_mapper, requests),
        ("queries_mapper", queries_mapper, requests),
        ("domain_events_mapper", domain_events_mapper, events),
    )
    for name, mapper, _ in mappers:
        _check_function(name, mapper)
    for start in starting:
        _check_function("on_startup", start)
    middlewares = check_middlewares(middlewares)
    check_count("max_concurrent_event_handlers", max_concurrent_event_handlers)
    bridge = None if message_broker is None else Bridge(message_broker)
    new = dispatcher is None
    dispatcher = AsyncEventDispatcher(container=adapter) if dispatcher is None else dispatcher
    shared_container(dispatcher, adapter)
    if bridge is not None and any(find_bridges(dispatcher)):
        raise ValueError("the dispatcher has a bridge already, and two send everything twice: leave out message_broker")
    registers = adapter if isinstance(adapter, Registers) else None
    if registers is not None:
        registers.missing(dispatcher, ask=not new)
    for name, mapper, its_map in mappers:
        _call(name, mapper, its_map)
    for start in starting:
        _call("on_startup", start)
    mediator = Mediator(
        request_map=requests,
        dispatcher=dispatcher,
        container=adapter,
        event_map=events,
        middlewares=middlewares,
        max_concurrent_event_handlers=max_concurrent_event_handlers,
    )
    if registers is not None:
        registers.take_dispatcher(dispatcher, ask=not new)
        registers.take(mediator)
    if bridge is not None:
        dispatcher.add_subscriber(bridge)
    return mediator


def _adapter(container: Any, dispatcher: AsyncEventDispatcher | None) -> Container:
    """The dispatcher's own where it is one of this container, else a new one."""
    own = container_of(dispatcher)
    if own is not None and getattr(own, "container", own) is container:
        return own
    packages = (cls.__module__.partition(".")[0] for cls in type(container).__mro__)
    library = next((package for package in packages if package in ADAPTERS), None)
    if library is not None:
        adapter: Container = getattr(import_module(f"silbo.containers.{library}"), ADAPTERS[library])(container)
        return adapter
    if container is None:
        raise TypeError(f"di_container is a container of {', '.join(ADAPTERS)}, or an adapter from silbo.containers")
    check_container(container)
    given: Container = container
    return given


def _check_function(name: str, function: object) -> None:
    if function is not None and not callable(function):
        raise TypeError(f"{name} is a function, not {function!r}")
    if is_async(function):
        raise TypeError(f"{name} is called here and now, and {function!r} is async: await it before")


def _call(name: str, function: Callable[..., object] | None, *arguments: object) -> None:
    if function is not None and inspect.iscoroutine(answer := function(*arguments)):
        answer.close()
        raise TypeError(
            f"{name} is called here and now, and the answer of {function!r} is a coroutine: await it before"
        )
