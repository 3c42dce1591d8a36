"""The mediator: it hands a command or query to its handler, and the events of the handler to the dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final, TypeVar

from silbo._checks import check_count
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import container_of
from silbo.mediator.maps import EventMap, RequestMap
from silbo.mediator.middleware import AnyMiddleware, check_middlewares, wrap_handle
from silbo.mediator.requests import HandlesRequest, Request
from silbo.protocols import Container
from silbo.work.unit_of_work import MAX_FOLLOW_UPS, Unit, check_container, unit_of_work

__all__ = ["Mediator", "shared_container"]

Res = TypeVar("Res")


class Mediator:
    """Hands each request to its handler, and the events that the handler collects to the dispatcher.

    A request is one unit of work, with one scope of the container. Its events are dispatched when the handler has
    succeeded, in the order in which it collected them, inside of the middlewares; events that their handlers collect follow
    behind. Messages that a bridge makes of the events leave when everything has succeeded: a request that fails sends none.

    A request that is sent by a handler is a part of the handler's unit of work.

    Args:
        request_map: The handler of each class of requests.
        dispatcher: Gets the events. Its error policy applies to them; a bridge on it sends the events that leave.
        container: An adapter from ``silbo.containers``; by default the dispatcher's.
        event_map: Handlers of events, registered with the dispatcher.
        middlewares: Called around every request, the first outermost.
        max_concurrent_event_handlers: Most events of one request that are dispatched side by side; with 1 they are dispatched
            one by one in their order. If an event fails, the others are waited for.
        max_follow_ups: Most events that may come of the events of one request; events of the request itself don't count.

    Raises:
        TypeError: There is no container, or an argument is of another type.
        ValueError: The container is not the dispatcher's, or a number is too low.
        AlreadyBound: Another map has registered one of the handlers of events with the dispatcher.
        NameInvalid: Another map has bound another class of events of the same name there.
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
        max_follow_ups: int = MAX_FOLLOW_UPS,
    ) -> None:
        for name, given, wanted in (("request_map", request_map, RequestMap), ("event_map", event_map, EventMap)):
            if not isinstance(given, wanted) and not (given is None and wanted is EventMap):
                raise TypeError(f"{name} has to be a silbo.{wanted.__name__}, not {given!r}")
        self.container: Final = shared_container(dispatcher, container)
        self.dispatcher: Final = dispatcher
        self._requests = request_map
        self._events = event_map
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
            The answer of its handler.

        Raises:
            TypeError: The request is a class, not an object; or ``events`` of a handler is not a list or tuple of events.
            RequestUnbound: The request has no handler.
            Unresolvable: The container can't make the handler.
            HandlerShared: A handler or its list of events was in use twice at the same time.
            Exception: An error of the handler, of a middleware, or of a listener of the events (if the dispatcher's
                ``on_error`` raises it): nothing was sent. Or an error of the publisher at the end, when the request has
                taken effect, so don't repeat it: several errors of one class are raised as the first of them with a note
                that counts them, errors of several classes as an ``ExceptionGroup``.
        """
        if isinstance(request, type):
            raise TypeError(f"{request.__qualname__} is a class; send an object of it: {request.__qualname__}(...)")
        handler = self._requests.handler_of(type(request))
        async with unit_of_work(self.container, command=True, max_follow_ups=self._max_follow_ups) as unit:
            handle = wrap_handle(partial(self._handle, unit, handler), self._middlewares, unit)
            answer: Res = await handle(request)
        return answer

    async def _handle(self, command: Unit, handler_type: type[HandlesRequest[Any, Any]], request: Any) -> Any:
        command.add_current_task()
        # A part of its own: a middleware may try again, and then the events of the first try are gone.
        async with unit_of_work(self.container) as unit:
            handler = await unit.resolve(handler_type)
            with unit.collecting(handler, self.dispatcher, attribute=True):
                response = await handler.handle(request)
            await unit.dispatch_collected(at_once=self._at_once)
        return response


def shared_container(dispatcher: AsyncEventDispatcher, container: Container | None) -> Container:
    """Return the container that a mediator shares with its dispatcher.

    Raises:
        TypeError: There is none, or the dispatcher is not one of silbo's.
        ValueError: The dispatcher has another one.
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
