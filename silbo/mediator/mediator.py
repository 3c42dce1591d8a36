"""Commands and queries: one handler each, whose collected events go to the dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final, TypeVar

from silbo._checks import check_count
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import container_of
from silbo.mediator.maps import EventMap, RequestMap
from silbo.mediator.middleware import AnyMiddleware, check_middlewares, through
from silbo.mediator.requests import HandlesRequest, Request
from silbo.protocols import Container
from silbo.work.unit_of_work import FOLLOW_UPS, Unit, check_container, unit_of_work

__all__ = ["Mediator", "shared_container"]

Res = TypeVar("Res")


class Mediator:
    """Hands each request to its handler, and the events that come of it to the dispatcher.

    A request is one unit of work, with one scope of the container. Its events are dispatched when the handler has
    succeeded, in the order in which it collected them, inside of the middlewares; what their handlers collect follows behind.
    What a bridge sends of them leaves when everything has succeeded: a request that fails sends nothing.

    A request that is sent by a handler is a part of that one's unit of work.

    Args:
        request_map: The handlers.
        dispatcher: For the events. Its error policy is theirs; a bridge on it sends on what leaves.
        container: An adapter from ``silbo.containers``; by default the dispatcher's.
        event_map: Handlers of events, registered with the dispatcher.
        middlewares: Around every request, the first outermost.
        max_concurrent_event_handlers: Of the events of one request, so many are dispatched side by side; with 1 they are in
            their order. Where one fails the others are waited for.
        max_follow_ups: Most events that may come of the events of one request, those that it collected itself not counted.

    Raises:
        TypeError: there is no container, or one of these is something else.
        ValueError: the container is another than the dispatcher's, or a number is too low.
        AlreadyBound: another map has registered one of the handlers of events with the dispatcher.
        NameInvalid: another map has bound another class of events of the same name there.
    """

    def __init__(
        self,
        *,
        request_map: RequestMap,
        dispatcher: AsyncEventDispatcher,
        container: Container | None = None,
        event_map: EventMap | None = None,
        middlewares: Iterable[AnyMiddleware] = (),
        max_concurrent_event_handlers: int = 1,
        max_follow_ups: int = FOLLOW_UPS,
    ) -> None:
        for name, given, wanted in (("request_map", request_map, RequestMap), ("event_map", event_map, EventMap)):
            if not isinstance(given, wanted) and not (given is None and wanted is EventMap):
                raise TypeError(f"{name} has to be a silbo.{wanted.__name__}, not {given!r}")
        self.container: Final = shared_container(dispatcher, container)
        self.dispatcher: Final = dispatcher
        self._requests, self._events = request_map, event_map
        self._middlewares = check_middlewares(middlewares)
        self._at_once = check_count("max_concurrent_event_handlers", max_concurrent_event_handlers)
        self._max_follow_ups = check_count("max_follow_ups", max_follow_ups, zero=True)
        if event_map is not None:
            event_map.listen(dispatcher, self.container)

    def __repr__(self) -> str:
        maps = (repr(one) for one in (self._requests, self._events) if one is not None)
        return f"<Mediator: {', '.join(maps)}, {type(self.container).__name__}>"

    async def send(self, request: Request[Res]) -> Res:
        """Have a request handled.

        Returns:
            What its handler answered.

        Raises:
            TypeError: it is a class, not an object of it.
            RequestUnbound: it has no handler.
            Unresolvable: the container can't make one.
            HandlerShared: two units of work collected events in one object or list at the same time.
            Exception: what the handler raised, a middleware, or a listener of its events (as the dispatcher's ``on_error``
                has it): then nothing was sent. Or what the publisher raised at the end, when everything was done: of
                several errors of one class the first, with a note that counts them; else an ``ExceptionGroup``.
        """
        if isinstance(request, type):
            raise TypeError(f"{request.__qualname__} is a class; send an object of it: {request.__qualname__}(...)")
        handler = self._requests.handler_of(type(request))
        async with unit_of_work(self.container, command=True, max_follow_ups=self._max_follow_ups) as unit:
            answer: Res = await through(self._middlewares, unit, partial(self._handle, unit, handler))(request)
        return answer

    async def _handle(self, command: Unit, handler_type: type[HandlesRequest[Any, Any]], request: Any) -> Any:
        command.join()
        # A part of its own, for a middleware may try again: what a first try has collected is then gone.
        async with unit_of_work(self.container) as unit:
            handler = await unit.resolve(handler_type)
            with unit.handling(handler, self.dispatcher, attribute=True):
                response = await handler.handle(request)
            await unit.follow(at_once=self._at_once)
        return response


def shared_container(dispatcher: AsyncEventDispatcher, container: Container | None) -> Container:
    """The container that a mediator and its dispatcher have in common.

    Raises:
        TypeError: there is none, or the dispatcher is none of silbo's.
        ValueError: each has another one.
    """
    given: object = dispatcher
    if not isinstance(given, AsyncEventDispatcher):
        raise TypeError(
            f"a mediator's dispatcher is a silbo.AsyncEventDispatcher (also in Whistle's place), not {given!r}"
        )
    check_container(container)
    own = container_of(dispatcher)
    if container is not None and own is not None and own is not container:
        raise ValueError(
            "the dispatcher has a container of its own, and handlers of requests and of events have to share its "
            "scopes: leave out container="
        )
    found = own if container is None else container
    if found is None:
        raise TypeError(
            "a Mediator needs a container that makes its handlers: container=... with an adapter from "
            "silbo.containers, or a dispatcher that has one"
        )
    return found
