"""A host written for Whistle, with Whistle's signatures, type-checks on silbo. Read by mypy and pyright, never run."""

# pyright: reportMissingParameterType=false

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Optional

from whistle import IDispatchedEvent, IEvent, IListener

from silbo import AsyncEventDispatcher, IAsyncEventDispatcher

logger = logging.getLogger(__name__)


class Host(AsyncEventDispatcher):
    """Per-listener logging, as hosts do it."""

    def add_listener(self, event_id: str, listener: IListener, /, *, priority: int = 0) -> None:
        logger.debug("listener added")
        super().add_listener(event_id, listener, priority=priority)

    def get_listeners(self, event_id: Optional[str] = None, /):  # type: ignore[no-untyped-def]  # noqa: UP045
        return super().get_listeners(event_id)

    async def adispatch(
        self,
        event_id: str,
        event: Optional[IEvent] = None,  # noqa: UP045
        /,
    ) -> IDispatchedEvent:
        answer: Any = await super().adispatch(event_id, event)
        return answer

    async def _adispatch(self, listeners: tuple[IListener, ...], event: IEvent) -> None:
        for listener in listeners:
            logger.debug("listener runs")
            await listener(event)
            if event.propagation_stopped:
                break


class Untyped(AsyncEventDispatcher):
    """The same without a single annotation."""

    def add_listener(self, event_id, listener, /, *, priority=0):  # type: ignore[no-untyped-def]
        return super().add_listener(event_id, listener, priority=priority)

    async def _adispatch(self, listeners, event):  # type: ignore[no-untyped-def]
        await super()._adispatch(listeners, event)


class Component:
    """Asks its container for Whistle's interface."""

    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None:
        self.dispatcher = dispatcher
        self.dispatcher.add_listener("x", self.handle)

    async def handle(self, event: IEvent) -> None: ...


factory: Callable[[], Any] = Host
components = [Component(Host()), Component(Untyped()), Component(AsyncEventDispatcher())]
