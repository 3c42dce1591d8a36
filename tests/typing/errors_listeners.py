"""Wrong listeners, options and events are errors. Read by mypy and pyright, never run; see errors_typos.py."""

from __future__ import annotations

from silbo import AsyncEventDispatcher, DomainEvent, EventName, in_thread, on


class UserJoined(DomainEvent): ...


class UserLeft(DomainEvent): ...


USER_JOINED = EventName("user.joined", UserJoined)
USER_LEFT = EventName("user.left", UserLeft)


async def on_joined(event: UserJoined) -> None: ...


async def on_left(event: UserLeft) -> None: ...


async def too_many(event: UserJoined, more: int) -> None: ...


async def too_few() -> None: ...


def sync(event: UserJoined) -> None: ...


def sync_left(event: UserLeft) -> None: ...


class HandlesLeft:
    async def handle(self, event: UserLeft) -> None: ...


class HandlesSync:
    def handle(self, event: UserJoined) -> None: ...


class HandlesNothing: ...


async def registered(d: AsyncEventDispatcher) -> None:
    d.add_listener("x", sync)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener("x", too_many)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener("x", too_few)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener("x", on_joined, onse=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    d.add_listener("x", on_joined, priority="high")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener("x", on_joined, on_error="drop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener(USER_JOINED, on_left)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener(USER_JOINED, sync)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener(USER_JOINED, in_thread(sync_left))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.portal().dispatch(USER_JOINED, UserLeft())  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    d.add_listener(USER_JOINED, HandlesLeft)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener(USER_JOINED, HandlesSync)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener("x", HandlesSync)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d.add_listener("x", HandlesNothing)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def contained() -> None:
    AsyncEventDispatcher(container=HandlesNothing())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def decorated(d: AsyncEventDispatcher) -> None:
    d.listen("x")(sync)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    d.listen(USER_JOINED)(on_left)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    d.listen(USER_JOINED)(HandlesSync)  # type: ignore[type-var]  # pyright: ignore[reportCallIssue, reportArgumentType]
    d.listen("x")(HandlesNothing)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    d.listen("x", onse=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    on("x", onse=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


class Subscriber:
    @on(USER_JOINED)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    async def another_class(self, event: UserLeft) -> None: ...

    @on(USER_JOINED)
    @on(USER_LEFT)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    async def one_of_two(self, event: UserJoined) -> None: ...

    @on(USER_JOINED)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    def sync(self, event: UserJoined) -> None: ...

    @on(USER_JOINED)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]
    async def too_few(self) -> None: ...


async def dispatched(d: AsyncEventDispatcher) -> None:
    await d.adispatch(USER_JOINED, UserLeft())  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    joined = await d.adispatch(USER_JOINED, UserJoined())
    joined.typo  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue]
    await d.wait_for(USER_JOINED, where=on_left)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    text: str = USER_JOINED  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
