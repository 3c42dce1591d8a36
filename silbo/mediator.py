"""Commands and queries: one handler each, whose collected events go to the dispatcher."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final, TypeVar

from silbo._whistle import IAsyncEventDispatcher
from silbo.listeners import container_of
from silbo.maps import EventMap, RequestMap
from silbo.middleware import AnyMiddleware, check_middlewares, through
from silbo.protocols import Container
from silbo.requests import HandlesRequest, Request
from silbo.scopes import check_container
from silbo.unit import FOLLOW_UPS, Unit, unit_of_work

__all__ = ["Mediator"]

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
        TypeError: there is no container, or a middleware is none.
        ValueError: the container is another than the dispatcher's.
    """

    def __init__(
        self,
        *,
        request_map: RequestMap,
        dispatcher: IAsyncEventDispatcher,
        container: Container | None = None,
        event_map: EventMap | None = None,
        middlewares: Iterable[AnyMiddleware] = (),
        max_concurrent_event_handlers: int = 1,
        max_follow_ups: int = FOLLOW_UPS,
    ) -> None:
        check_container(container)
        own = container_of(dispatcher)
        if container is not None and own is not None and own is not container:
            raise ValueError(
                "the dispatcher has a container of its own, and handlers of requests and of events have to share its "
                "scopes: leave out container="
            )
        container = own if container is None else container
        if container is None:
            raise TypeError(
                "a Mediator needs a container that makes its handlers: container=... with an adapter from "
                "silbo.containers, or a dispatcher that has one"
            )
        if max_concurrent_event_handlers < 1:
            raise ValueError(f"max_concurrent_event_handlers is 1 or more, not {max_concurrent_event_handlers!r}")
        self.dispatcher: Final = dispatcher
        self.container: Final = container
        self._requests, self._middlewares = request_map, tuple(middlewares)
        check_middlewares(self._middlewares)
        self._at_once, self._max_follow_ups = max_concurrent_event_handlers, max_follow_ups
        if event_map is not None:
            event_map.listen(dispatcher, container)

    async def send(self, request: Request[Res]) -> Res:
        """Have a request handled.

        Returns:
            What its handler answered.

        Raises:
            TypeError: it is a class, not an object of it.
            RequestUnbound: it has no handler.
            Unresolvable: the container can't make one.
            Exception: what the handler raised, a middleware, or a listener of its events (as the dispatcher's ``on_error``
                has it): then nothing was sent. Or what the publisher raised at the end, when everything was done.
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
            with unit.handling(handler, self.dispatcher):
                response = await handler.handle(request)
            await unit.follow(at_once=self._at_once)
        return response
