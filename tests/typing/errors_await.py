"""A forgotten ``await`` is an error. Read by mypy and pyright, never run; see errors_typos.py."""

# mypy: disable-error-code="unused-awaitable"
# The errors have to be those that both checkers report without any setting.

from __future__ import annotations

from typing import Any, assert_type

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    Consumer,
    DomainEvent,
    EventName,
    IAsyncEventDispatcher,
    Mediator,
    Outbox,
    Publisher,
    Request,
    receive,
)
from silbo.message import Message


class UserJoined(DomainEvent): ...


class Join(Request[int]): ...


USER_JOINED = EventName("user.joined", UserJoined)


class Host(AsyncEventDispatcher):
    """Overrides other methods alone."""


class Overriding(AsyncEventDispatcher):
    """With Whistle's signature."""

    async def adispatch(self, event_id: str, event: Any = None, /) -> Any:
        super().adispatch(event_id, event)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
        return event

    async def _adispatch(self, listeners: Any, event: Any) -> None:
        super()._adispatch(listeners, event)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]


class Sync(AsyncEventDispatcher):
    """An override that is not async."""

    def adispatch(self, name: Any, event: Any = None, /) -> int:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        return 1


async def dispatched(d: AsyncEventDispatcher, whistles: IAsyncEventDispatcher, host: Host, own: Overriding) -> None:
    d.adispatch(USER_JOINED, UserJoined())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    d.adispatch("user.joined", UserJoined())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    d.adispatch("app.started")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    whistles.adispatch("app.started")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    host.adispatch(USER_JOINED)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    own.adispatch("user.joined")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    d.wait_for(USER_JOINED)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    d.drain()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    d.aclose()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    task = d.spawn(USER_JOINED)
    assert_type(await task, UserJoined)


async def sent(mediator: Mediator, publisher: Publisher, outbox: Outbox, bridge: Bridge, message: Message) -> None:
    mediator.send(Join())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    publisher.publish(message)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    publisher.aclose()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    outbox.publish(message)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    outbox.aclose()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    bridge.forward(UserJoined())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    bridge.aclose()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]


async def consumed(d: AsyncEventDispatcher, consumer: Consumer) -> None:
    consumer.run()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    receive(d, b"")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
