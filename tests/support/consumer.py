"""Tools of the consumer's tests: a consumer with quick retries, events, and deliveries by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

import silbo
from silbo import (
    ECSTEvent,
    EventName,
    NotificationEvent,
    on,
)
from silbo._retry import Backoff
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Delivery, Message, Origin
from silbo.protocols import Receiver
from silbo.wire.encode import to_message
from silbo.wire.formats import JSON

QUICK = Backoff(initial=0.01, cap=0.05)


class Consumer(silbo.Consumer):
    """With quick retries."""

    def __init__(self, *arguments: Any, backoff: Backoff = QUICK, **more: Any) -> None:
        super().__init__(*arguments, backoff=backoff, **more)


@dataclass
class UserJoined(ECSTEvent):
    user_id: int
    plan: str = "free"


@dataclass
class UserLeft(NotificationEvent):
    user_id: int


USER_JOINED = EventName("user.joined", UserJoined, key="user_id")
USER_LEFT = EventName("user.left", UserLeft)


def joined(number: int, *, key: str | None = None) -> Message:
    return to_message(UserJoined(number), name="user.joined", kind="ecst", key=key)


class Heard:
    """A subscriber that notes what it hears; `until` waits for a number of them."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._changed = asyncio.Event()

    @property
    def ids(self) -> list[int]:
        return [event.user_id for event in self.events]

    @on("**")
    async def hear(self, event: Any) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, many: int) -> Self:
        async with asyncio.timeout(20):
            while len(self.events) < many:
                self._changed.clear()
                await self._changed.wait()
        return self


class Running:
    """A consumer that runs beside the test's body."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer

    async def __aenter__(self) -> Consumer:
        await self.consumer.__aenter__()
        self.task = asyncio.create_task(self.consumer.run())
        return self.consumer

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self.task.cancel()  # the test has failed: don't wait for its listeners
        await self.consumer.__aexit__(kind, *error)  # type: ignore[arg-type]
        await asyncio.wait([self.task])
        if kind is None:
            self.task.result()


async def left_over(broker: MemoryBroker, group: str = "billing") -> list[Delivery]:
    """What the group has not acknowledged, once nobody has it in hand."""
    receiver = await broker.group(group, start="new").open()
    await broker.publish(joined(-1))
    found: list[Any] = []
    while not found or found[-1].message().payload["user_id"] != -1:
        found += await receiver.receive(1000)
    await receiver.ack(*found)
    await receiver.aclose()
    return found[:-1]


async def begin(broker: MemoryBroker, group: str = "billing") -> None:
    """Make the group, so that what is published next waits for it."""
    await (await broker.group(group, start="new").open()).aclose()


class Scripted:
    """A subscription and its receiver in one: hands out what a test prepared."""

    app = "other"
    name = "billing"
    keep_every: float | None = None

    def __init__(self, *batches: Sequence[Delivery | Gap] | Exception, own_instance: bool = False) -> None:
        self.batches = list(batches)
        self.attempts: Counter[str] = Counter()
        self.buried: list[tuple[str, str, int]] = []
        self.skips_own_instance = own_instance
        self.acked: list[str] = []
        self.refuse_acks = 0
        self.closed = 0
        self.empty = asyncio.Event()
        self.changed = asyncio.Event()

    async def open(self) -> Receiver:
        return self

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        await asyncio.sleep(0)
        if not self.batches:
            self.empty.set()
            await asyncio.sleep(0.05)
            return []
        batch = self.batches.pop(0)
        if isinstance(batch, Exception):
            raise batch
        if len(batch) > limit:
            self.batches.insert(0, batch[limit:])
        return batch[:limit]

    async def ack(self, *deliveries: Delivery) -> None:
        await asyncio.sleep(0)
        if self.refuse_acks:
            self.refuse_acks -= 1
            raise BrokerUnavailable("no")
        self.acked += [delivery.id for delivery in deliveries]
        self.changed.set()

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        return ()

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        return [None] * len(deliveries)

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        self.attempts[delivery.id] += 1
        return self.attempts[delivery.id]

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        self.buried.append((delivery.id, error, attempts))
        await self.ack(delivery)
        return True

    async def until_acked(self, many: int) -> None:
        async with asyncio.timeout(20):
            while len(self.acked) < many:
                self.changed.clear()
                await self.changed.wait()

    async def aclose(self) -> None:
        self.closed += 1


OWN_KEY = "that of its own"


def delivery(
    number: int, *, raw: bytes | None = None, key: str | None = OWN_KEY, kept: bool = True, attempt: int = 1
) -> Delivery:
    encoded = JSON.encode(joined(number, key=str(number) if key is OWN_KEY else key), Origin("other", "elsewhere"))
    return Delivery(encoded if raw is None else raw, "events", JSON, str(number) if kept else "", attempt)


async def handle_one(dispatcher: Any, **options: Any) -> tuple[Consumer, Scripted, list[Any]]:
    """Let a consumer handle one delivery to its end."""
    subscription = Scripted([delivery(1)])
    errors: list[Any] = []
    options = {"max_attempts": 3, **options}
    consumer = Consumer(
        dispatcher, subscription, events=[USER_JOINED], on_error=lambda error, what: errors.append(error), **options
    )
    async with Running(consumer):
        await subscription.until_acked(1)
    return consumer, subscription, errors
