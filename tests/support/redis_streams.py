"""Tools of the Redis brokers' tests: messages, reading, waiting, and the documented ACL users."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

import silbo.brokers.redis
from silbo.errors import Gap
from silbo.message import Delivery, Message, new_publication
from silbo.protocols import Receiver
from silbo.wire.formats import JSON

ACL = {
    user: re.sub(r"\s+", " ", rules).strip()
    for user, rules in re.findall(r"ACL SETUSER (\w+) (.*?)\n\n", silbo.brokers.redis.__doc__ or "", re.DOTALL)
}
"""The rules of the documented users, by name."""


def message(number: int = 0, name: str = "user.joined", to: str | None = None, **payload: Any) -> Message:
    headers = {"publication": new_publication(), "version": "1"}
    return Message(
        "notification_event", name, "9f62e977-73f7-462b-92cb-8ea658d3bcb5", {"n": number} | payload, headers, to
    )


def number(delivery: Delivery | Gap) -> int:
    """The number that a message was made with."""
    assert isinstance(delivery, Delivery), delivery
    return int(delivery.message().payload["n"])


async def receive(receiver: Receiver, many: int) -> list[Delivery | Gap]:
    """So many items; fails after 10 s."""
    items: list[Delivery | Gap] = []
    async with asyncio.timeout(10):
        while len(items) < many:
            items.extend(await receiver.receive(many - len(items)))
    return items


@asynccontextmanager
async def opened(subscription: Any) -> AsyncIterator[Receiver]:
    receiver = await subscription.open()
    try:
        yield receiver
    finally:
        await receiver.aclose()


TOLERANCE = 10.0
"""Seconds that a busy machine may add to a deadline. What hangs does so for longer."""


async def eventually(check: Callable[[], Awaitable[object]], seconds: float = 30.0) -> float:
    """Wait until the check is true; an exception of its counts as false until the time is over. Return the seconds that it took."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    while True:
        try:
            if await check():
                return loop.time() - begin
        except Exception:
            if loop.time() - begin > seconds:
                raise
        assert loop.time() - begin < seconds, "it did not come true"
        await asyncio.sleep(0.01)


async def stored(admin: Redis, key: str = "silbo:{events}") -> list[int]:
    """The numbers of the messages in a stream, in order."""
    return [JSON.decode(fields[b"message"]).payload["n"] for _, fields in await admin.xrange(key)]


async def has_connections(admin: Redis, user: str, many: int) -> None:
    """Whether a user has so many connections; Redis takes a moment to see that one was closed."""

    async def has() -> bool:
        return sum(client["user"] == user for client in await admin.client_list()) == many

    await eventually(has)
