"""A mediator with all that belongs to it, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Final

from silbo.bridge import Bridge, bridges
from silbo.dispatcher import AsyncEventDispatcher
from silbo.guard import is_async
from silbo.listeners import container_of
from silbo.maps import EventMap, RequestMap
from silbo.mediator import Mediator
from silbo.middleware import AnyMiddleware
from silbo.protocols import Container, Publisher
from silbo.scopes import check_container

__all__ = ["bootstrap"]

ADAPTERS: Final = {
    "rodi": "RodiContainer",
    "di": "DIContainer",
    "dependency_injector": "DependencyInjectorContainer",
    "dishka": "DishkaContainer",
}
"""The libraries whose containers are recognised. Their adapters are imported by name, when a container of theirs is given:
the core knows of none."""


def bootstrap(
    di_container: object,
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
        middlewares: As for :class:`~silbo.mediator.Mediator`.
        on_startup: Called in the end, in this order; not async.
        max_concurrent_event_handlers: As for :class:`~silbo.mediator.Mediator`.
        dispatcher: One that is there already. By default a new one, which is then also what the container gives to those who
            ask for an ``AsyncEventDispatcher``; but for dishka, whose containers take nothing more: give it a
            ``dispatcher_provider()``, and here the dispatcher that the container has.

    Returns:
        The mediator; its ``dispatcher`` takes more listeners.

    Raises:
        TypeError: no such container, or a function for the start that is async.
        ValueError: the dispatcher has a bridge already, so that a second one would send everything twice.
    """
    starting = tuple(on_startup)
    for start in starting:
        if is_async(start):
            raise TypeError(f"on_startup is called here and now, and {start!r} is async: await it before")
    container = container_of(dispatcher)
    if container is None or getattr(container, "container", container) is not di_container:
        container = _adapted(di_container)
    if dispatcher is None:
        dispatcher = AsyncEventDispatcher(container=container)
        _register(di_container, dispatcher)
    requests, events = RequestMap(), EventMap()
    for mapper in (commands_mapper, queries_mapper):
        if mapper is not None:
            mapper(requests)
    if domain_events_mapper is not None:
        domain_events_mapper(events)
    if message_broker is not None:
        if any(bridges(dispatcher)):
            raise ValueError(
                "the dispatcher has a bridge already, and two send everything twice: leave out message_broker"
            )
        dispatcher.add_subscriber(Bridge(message_broker))
    mediator = Mediator(
        request_map=requests,
        dispatcher=dispatcher,
        container=container,
        event_map=events,
        middlewares=middlewares,
        max_concurrent_event_handlers=max_concurrent_event_handlers,
    )
    for start in starting:
        start()
    return mediator


def _library(container: object) -> str | None:
    packages = (cls.__module__.partition(".")[0] for cls in type(container).__mro__)
    return next((package for package in packages if package in ADAPTERS), None)


def _adapted(container: Any) -> Container:
    library = _library(container)
    if library is not None:
        adapter: Container = getattr(import_module(f"silbo.containers.{library}"), ADAPTERS[library])(container)
        return adapter
    if container is None:
        raise TypeError(f"di_container is a container of {', '.join(ADAPTERS)}, or an adapter from silbo.containers")
    check_container(container)
    own: Container = container
    return own


def _register(container: object, dispatcher: AsyncEventDispatcher) -> None:
    library = _library(container)
    register = library and getattr(import_module(f"silbo.containers.{library}"), "register_dispatcher", None)
    if register:
        try:
            register(container, dispatcher)
        except Exception as error:
            error.add_note("it has a dispatcher already: give that one to bootstrap(dispatcher=...)")
            raise
