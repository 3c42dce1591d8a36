"""A replica of "billing" at version 1 or 2 of its program. Run by tests/consumer/test_rolling_deploy.py.

    python -m tests.support.deployed_process URL PREFIX NAME VERSION

Its Redis list `{prefix}:log:NAME` has an entry for each message that it is given, "got ORDER NUMBER", and for each that its
listener has handled, "done ORDER NUMBER". Ends in good order on SIGTERM.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from silbo import AsyncEventDispatcher, Consumer, EventName, NotificationEvent
from silbo.brokers.redis import RedisStreams
from silbo.errors import Gap
from silbo.message import Batch, Delivery
from silbo.protocols import BatchReceiver, Receiver, Subscription
from tests.support.redis_at import redis_at

CLAIM_AFTER = 0.6


@dataclass
class PaidV1(NotificationEvent):
    order: str
    number: int


@dataclass
class PaidV2(NotificationEvent):
    order: str
    number: int
    currency: str


def add_currency(payload: dict[str, Any]) -> dict[str, Any]:
    return payload | {"currency": "EUR"}


ORDER_PAID: dict[int, EventName[Any]] = {
    1: EventName("order.paid", PaidV1, key="order"),
    2: EventName("order.paid", PaidV2, key="order", version=2, upcast={1: add_currency}),
}


class _Noting:
    """A subscription whose receiver notes what it gives to the consumer."""

    def __init__(self, subscription: Subscription, log: Callable[[list[str]], Any]) -> None:
        self._subscription = subscription
        self._log = log
        self.app, self.name = subscription.app, subscription.name

    async def open(self) -> Receiver:
        receiver = await self._subscription.open()
        assert isinstance(receiver, BatchReceiver)
        receive = receiver.receive_batches

        async def receive_and_note(limit: int) -> Sequence[Delivery | Batch | Gap]:
            items = await receive(limit)
            deliveries = [each for item in items for each in (item if isinstance(item, Batch) else (item,))]
            payloads = [each.message().payload for each in deliveries if isinstance(each, Delivery)]
            if payloads:
                await self._log([f"got {payload['order']} {payload['number']}" for payload in payloads])
            return items

        receiver.receive_batches = receive_and_note  # type: ignore[method-assign]
        return receiver


async def replicate(url: str, prefix: str, name: str, version: int, ready: Callable[[Consumer], object]) -> None:
    """Consume at this version of the program until the consumer that `ready` gets is stopped."""
    dispatcher = AsyncEventDispatcher()
    async with redis_at(url) as client, RedisStreams(client, app="billing", prefix=prefix) as streams:

        async def log(lines: list[str]) -> None:
            await client.rpush(f"{prefix}:log:{name}", *lines)

        @dispatcher.listen(ORDER_PAID[version])
        async def charge(event: Any) -> None:
            assert type(event) is ORDER_PAID[version].cls
            await log([f"done {event.order} {event.number}"])

        group = _Noting(streams.group("billing", start="oldest", claim_after=CLAIM_AFTER), log)
        async with Consumer(dispatcher, group, events=[ORDER_PAID[version]], concurrency=4) as consumer:
            ready(consumer)
            await consumer.run()


async def main(url: str, prefix: str, name: str, version: str) -> None:
    def ready(consumer: Consumer) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
        print("ready", flush=True)

    await replicate(url, prefix, name, int(version), ready)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5]))
