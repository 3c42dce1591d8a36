"""The call that makes a mediator together with its maps, container, dispatcher, bridge and middlewares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

from silbo._checks import check_count, check_list
from silbo.bridge import Bridge, find_bridges
from silbo.containers._adapter import Adapter
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import container_of
from silbo.dispatch.options import is_async
from silbo.mediator.maps import EventMap, RequestMap
from silbo.mediator.mediator import Mediator, shared_container
from silbo.mediator.middleware import AnyMiddleware, check_middlewares
from silbo.protocols import Container, Publisher
from silbo.work.unit_of_work import check_container

__all__ = ["bootstrap"]


class RodiLike(Protocol):
    """The type of a ``rodi.Container`` to a type checker, which need not have rodi."""

    @property
    def build_provider(self) -> object: ...


class DiLike(Protocol):
    """The type of a ``di.Container`` to a type checker, which need not have di."""

    @property
    def solve(self) -> object: ...


class DependencyInjectorLike(Protocol):
    """The type of a ``dependency_injector.containers.Container`` to a type checker, which need not have the library."""

    @property
    def wire(self) -> object: ...


class DishkaLike(Protocol):
    """The type of a ``dishka.AsyncContainer`` to a type checker, which need not have dishka."""

    @property
    def parent_container(self) -> object: ...


AnyContainer: TypeAlias = RodiLike | DiLike | DependencyInjectorLike | DishkaLike | Container
"""The containers that ``bootstrap`` takes: of the four libraries, or an adapter."""


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
    """Make a mediator, with its maps, container, dispatcher, bridge and middlewares.

    Args:
        di_container: A container of rodi, di, dependency_injector or dishka, or an adapter of it.
        commands_mapper: A function that binds the commands: ``mapper.bind(JoinMeeting, JoinMeetingHandler)``; not async.
        queries_mapper: A function that binds the queries; not async.
        domain_events_mapper: A function that binds the handlers of events of any kind; not async.
        message_broker: A broker, or an outbox in front of one, to which a new bridge sends. The host closes it.
        middlewares: As for :class:`~silbo.mediator.mediator.Mediator`.
        on_startup: Functions, not async, called in this order when all arguments have been checked, and before the container
            and the dispatcher are changed.
        max_concurrent_event_handlers: As for :class:`~silbo.mediator.mediator.Mediator`.
        dispatcher: The dispatcher that the container has, or gets; by default a new one. To add listener classes to a
            dispatcher of yours, give it the container: ``AsyncEventDispatcher(container=RodiContainer(container))``.

    The container gets the dispatcher under every type of dispatcher, and the mediator under ``Mediator`` unless it has another
    mediator. A dishka container accepts no more objects, so it gets neither. If the call fails, the container gets neither, and
    the next call with it may succeed.

    Returns:
        The mediator; its ``dispatcher`` takes more listeners.

    Raises:
        TypeError: an argument is of the wrong type, or one of the functions is async.
        ValueError: the dispatcher has a bridge already, so a second bridge would send everything twice.
        DispatcherConflict: the container has another dispatcher. If the container can only tell by making it, the error is
            raised when the first scope is entered.
    """
    adapter = _adapt(di_container, dispatcher)
    requests = RequestMap()
    events = EventMap()
    starting = check_list("on_startup", on_startup)
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
    is_given = dispatcher is not None
    dispatcher = AsyncEventDispatcher(container=adapter) if dispatcher is None else dispatcher
    shared_container(dispatcher, adapter)
    if bridge is not None and any(find_bridges(dispatcher)):
        raise ValueError("the dispatcher has a bridge already, and two send everything twice: leave out message_broker")
    if isinstance(adapter, Adapter):
        adapter.check_dispatcher(dispatcher, ask=is_given)
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
    if isinstance(adapter, Adapter):
        adapter.register_dispatcher(dispatcher, ask=is_given)
        adapter.register_if_missing(mediator)
    if bridge is not None:
        dispatcher.add_subscriber(bridge)
    return mediator


def _adapt(container: Any, dispatcher: AsyncEventDispatcher | None) -> Container:
    """Return the dispatcher's adapter if it is one of this container, else a new adapter, or the given one."""
    own = container_of(dispatcher)
    if own is not None and getattr(own, "container", own) is container:
        return own
    libraries = {cls.__module__.partition(".")[0] for cls in type(container).__mro__}
    # Imported when a container of the library is given: the library is an extra.
    if "rodi" in libraries:
        from silbo.containers.rodi import RodiContainer

        return RodiContainer(container)
    if "di" in libraries:
        from silbo.containers.di import DIContainer

        return DIContainer(container)
    if "dependency_injector" in libraries:
        from silbo.containers.dependency_injector import DependencyInjectorContainer

        return DependencyInjectorContainer(container)
    if "dishka" in libraries:
        from silbo.containers.dishka import DishkaContainer

        return DishkaContainer(container)
    if container is None:
        raise TypeError(
            "di_container is a container of rodi, di, dependency_injector, dishka, or an adapter from silbo.containers"
        )
    check_container(container)
    given: Container = container
    return given


def _check_function(name: str, function: object) -> None:
    if function is not None and not callable(function):
        raise TypeError(f"{name} is a function, not {function!r}")
    if is_async(function):
        raise TypeError(f"{name} takes a plain function, and {function!r} is async: await it before bootstrap(...)")


def _call(name: str, function: Callable[..., object] | None, *arguments: object) -> None:
    if function is not None and inspect.iscoroutine(answer := function(*arguments)):
        answer.close()
        raise TypeError(
            f"{name} takes a plain function, and {function!r} returned a coroutine: await it before bootstrap(...)"
        )
