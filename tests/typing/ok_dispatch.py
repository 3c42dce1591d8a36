"""Programs with plain strings and with event names type-check. Read by mypy and pyright, never run."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Any, assert_type

from silbo import (
    FIRST,
    AsyncEventDispatcher,
    DomainEvent,
    Event,
    EventName,
    IAsyncEventDispatcher,
    Observer,
    Portal,
    Trace,
    in_thread,
    on,
    run_sync,
)


class UserJoined(DomainEvent):
    """An event of the user's own."""

    def __init__(self, user_id: int) -> None:
        self.user_id = user_id


class UserLeft(DomainEvent): ...


class Names(Enum):
    JOINED = 1


USER_JOINED = EventName("user.joined", UserJoined, key="user_id")
USER_LEFT = EventName("user.left", UserLeft)
APP_STARTED = EventName("app.started")


async def enrich(event: UserJoined) -> None:
    event.user_id += 1
    event.stop_propagation()


async def hears_all(event: Event) -> None: ...


async def returns_something(event: Any) -> int:
    return 1


class Listens:
    async def __call__(self, event: UserJoined) -> None: ...

    @on(USER_JOINED, priority=-1, once=True)
    async def method(self, event: UserJoined) -> None: ...

    @on(USER_JOINED)
    @on(APP_STARTED)
    @on("x.*")
    async def several(self, event: Event) -> int:
        return 1

    @on(USER_JOINED)
    @on(USER_LEFT)
    async def either(self, event: UserJoined | UserLeft) -> None: ...

    @on(USER_JOINED)
    @classmethod
    async def of_the_class(cls, event: UserJoined) -> None: ...

    @on(USER_JOINED)
    @staticmethod
    async def of_nothing(event: UserJoined) -> None: ...


async def plain(dispatcher: AsyncEventDispatcher) -> None:
    dispatcher.add_listener("user.joined", enrich, priority=-10)
    dispatcher.add_listener("user.*", hears_all, priority=FIRST, timeout=1.5, on_error="collect")
    dispatcher.add_listener("x", returns_something, on_error=lambda error, event, listener: None)
    dispatcher.add_listener(("any", "hashable"), Listens()).remove()
    dispatcher.remove_listener("user.joined", enrich)
    dispatcher.add_subscriber(Listens())
    assert_type(await Listens().several(UserJoined(1)), int)
    joined = await dispatcher.adispatch("user.joined", UserJoined(1))
    joined.user_id += 1
    (await dispatcher.adispatch(Names.JOINED)).stop_propagation()
    for row in dispatcher.describe():
        print(row.priority, row.defined_at)


def declared() -> None:
    dispatcher = AsyncEventDispatcher(names=[USER_JOINED, APP_STARTED, sys.modules[__name__]], unknown="error")
    AsyncEventDispatcher(names=sys.modules[__name__])
    print([name.description for name in dispatcher.names])


async def named(dispatcher: AsyncEventDispatcher) -> None:
    dispatcher.add_listener(USER_JOINED, enrich)
    dispatcher.add_listener(USER_JOINED, hears_all, once=True)
    dispatcher.add_listener(USER_JOINED, Listens())
    dispatcher.add_listener(APP_STARTED, hears_all)
    joined = await dispatcher.adispatch(USER_JOINED, UserJoined(1))
    joined.user_id += 1
    assert_type(await dispatcher.spawn(USER_JOINED, UserJoined(1)), UserJoined)
    assert_type(await dispatcher.wait_for(USER_JOINED, where=lambda event: event.user_id == 1, timeout=5), UserJoined)

    @dispatcher.listen(USER_JOINED, priority=3)
    async def first(event: UserJoined) -> int:
        return event.user_id

    @dispatcher.listen("user.joined")
    async def second(event: UserJoined) -> int:
        return event.user_id

    assert_type(await second(UserJoined(1)), int)


def write_row(event: UserJoined) -> int:
    return event.user_id


class Rows:
    @on(USER_JOINED, priority=-1)
    @in_thread
    def write(self, event: UserJoined) -> None: ...

    @on(USER_JOINED)
    @in_thread(max_threads=2)
    def write_again(self, event: UserJoined) -> None: ...


async def in_threads(dispatcher: AsyncEventDispatcher) -> None:
    dispatcher.add_listener(USER_JOINED, in_thread(write_row, max_threads=2))
    dispatcher.add_listener("user.joined", in_thread(write_row))
    dispatcher.remove_listener(USER_JOINED, in_thread(write_row))
    dispatcher.add_subscriber(Rows())

    @dispatcher.listen(USER_JOINED)
    @in_thread
    def first(event: UserJoined) -> None: ...

    @dispatcher.listen("user.joined", priority=2)
    @in_thread(max_threads=1)
    def second(event: UserJoined) -> None: ...


def from_sync_code(dispatcher: AsyncEventDispatcher, portal: Portal) -> None:
    assert_type(portal.dispatch(USER_JOINED, UserJoined(1), timeout=2), UserJoined)
    assert_type(run_sync(dispatcher, USER_JOINED, UserJoined(1)), UserJoined)
    portal.dispatch("user.joined", UserJoined(1)).user_id += 1
    run_sync(dispatcher, "user.joined").stop_propagation()


async def makes_portal(dispatcher: AsyncEventDispatcher) -> Portal:
    return dispatcher.portal()


def typed_against_whistle() -> IAsyncEventDispatcher:
    dispatcher = AsyncEventDispatcher(on_error="collect", observers=[Trace()])
    observer: Observer = Trace()
    print(observer)
    return dispatcher
