"""Every subscription shows what the public suite asks of it, on real servers; and the suite notices broken promises."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import Publisher, Subscription
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.errors import Gap
from silbo.message import Delivery
from silbo.protocols import Receiver
from silbo.testing import FaultyBroker, rig, subscription_conformance
from silbo.testing.subscription_conformance import SUBSCRIPTION_CHECKS, SubscriptionCheck, SubscriptionRig
from tests.support.broker_rigs import killed
from tools.redis_server import RedisServer

CLAIM_AFTER = 1.0
"""Seconds; a receiver looks for what others offer every quarter of it."""


@dataclass
class Rig:
    publisher: Publisher
    subscribe: Callable[[str], Subscription]
    away: Callable[[], AbstractAsyncContextManager[object]] | None = None

    def outage(self) -> AbstractAsyncContextManager[object] | None:
        return None if self.away is None else self.away()


def memory() -> Rig:
    broker = MemoryBroker("web")
    return Rig(broker, lambda group: broker.group(group, start="new"))


def faulty() -> Rig:
    broker = FaultyBroker("web")

    @asynccontextmanager
    async def away() -> AsyncIterator[None]:
        with broker.away():
            yield

    return Rig(broker, lambda group: broker.group(group, start="new"), away)


def streams(client: Redis, prefix: str = "silbo", server: RedisServer | None = None) -> Rig:
    broker = RedisStreams(client, app="web", timeout=1.0, prefix=prefix)
    away = None if server is None else lambda: killed(server)
    return Rig(broker, lambda group: broker.group(group, start="new", claim_after=CLAIM_AFTER), away)


def pubsub(client: Redis, prefix: str = "silbo", server: RedisServer | None = None) -> Rig:
    broker = RedisPubSub(client, app="web", timeout=1.0, prefix=prefix)
    return Rig(broker, lambda group: broker.subscribe(), None if server is None else lambda: killed(server))


each_check = pytest.mark.parametrize("check", SUBSCRIPTION_CHECKS, ids=lambda check: check.__name__)


@each_check
@pytest.mark.parametrize("make", [memory, faulty])
async def test_memory_conforms(make: Callable[[], SubscriptionRig], check: SubscriptionCheck) -> None:
    await check(make())


@each_check
@pytest.mark.parametrize("make", [streams, pubsub])
async def test_redis_conforms(make: Callable[..., Rig], check: SubscriptionCheck, redis: Redis, prefix: str) -> None:
    opened = make(redis, prefix)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(opened.publisher.aclose)
        await check(opened)


@pytest.mark.parametrize("make", [streams, pubsub])
async def test_redis_conforms_in_an_outage(make: Callable[..., Rig], own_redis: RedisServer) -> None:
    async with Redis.from_url(own_redis.url) as client, AsyncExitStack() as stack:
        opened = make(client, server=own_redis)
        stack.push_async_callback(opened.publisher.aclose)
        await subscription_conformance.check_outage(opened)


class Faulty:
    """A good receiver that breaks a promise."""

    def __init__(self, good: Receiver, how: str) -> None:
        self.good, self.how = good, how
        self.closed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.good, name)

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        if self.how == "raises what it likes":
            raise ConnectionError("reset by peer")
        if self.how == "waits for ever":
            while not (found := await self.good.receive(limit)):
                pass
            return found
        items = list(await self.good.receive(1000 if self.how == "ignores the limit" else limit))
        if self.how == "reverses":
            items.reverse()
        if self.how == "loses one":
            items = [one for one in items if isinstance(one, Delivery) and one.message().payload["n"] != 3]
        if self.how == "counts no attempts":
            items = [replace(one, attempt=1) for one in items if isinstance(one, Delivery)]
        return items

    async def ack(self, *deliveries: Delivery) -> None:
        if self.how != "does not acknowledge":
            await self.good.ack(*deliveries)

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        return 1 if self.how == "counts to one" else await self.good.count(delivery)

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        if self.how == "buries nothing":
            return True
        return await self.good.bury(delivery, error=error, attempts=attempts) or self.how == "buries all"

    async def keep(self, *deliveries: Delivery) -> Any:
        if self.how == "keeps nothing":
            return deliveries
        lost = await self.good.keep(*deliveries)
        return [] if self.how == "keeps all" else lost

    async def offer(self, *deliveries: Delivery) -> Any:
        return [0.0] * len(deliveries) if self.how == "offers nothing" else await self.good.offer(*deliveries)

    async def aclose(self) -> None:
        self.closed += 1
        if self.how == "closes once" and self.closed > 1:
            raise RuntimeError("closed already")
        if self.how != "keeps what it has":
            await self.good.aclose()


class Late(Faulty):
    """It subscribes when it first receives."""

    def __init__(self, subscription: Subscription) -> None:
        self.subscription, self.how, self.closed = subscription, "", 0

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        if "good" not in vars(self):
            self.good = await self.subscription.open()
        return await super().receive(limit)

    async def ack(self, *deliveries: Delivery) -> None:
        if deliveries:
            await super().ack(*deliveries)

    async def keep(self, *deliveries: Delivery) -> Any:
        return await super().keep(*deliveries) if deliveries else []

    async def aclose(self) -> None:
        if "good" in vars(self):
            await super().aclose()

    skips_own_instance, keep_every = False, None


@dataclass
class Described:
    """A subscription of a good broker, whose receivers break a promise."""

    broker: MemoryBroker
    name: str
    how: str
    app: str = "web"

    async def open(self) -> Any:
        name = f"{self.name}-{uuid.uuid4().hex}" if self.how == "shares nothing" else self.name
        good = self.broker.group(name, start="new")
        return Late(good) if self.how == "opens too late" else Faulty(await good.open(), self.how)


@pytest.mark.parametrize(
    ("how", "caught"),
    [
        ("raises what it likes", {"content", "opening", "waiting"}),
        ("waits for ever", {"waiting"}),
        ("ignores the limit", {"order_and_limit"}),
        ("reverses", {"order_and_limit", "redelivery"}),
        ("loses one", {"order_and_limit", "redelivery", "opening"}),
        ("counts no attempts", {"redelivery", "counting", "offering"}),
        ("does not acknowledge", {"redelivery"}),
        ("counts to one", {"counting"}),
        ("buries nothing", {"burying"}),
        ("buries all", {"burying", "offering"}),
        ("keeps nothing", {"keeping"}),
        ("keeps all", {"offering"}),
        ("offers nothing", {"offering"}),
        ("closes once", {"closing"}),
        ("keeps what it has", {"redelivery", "counting", "burying"}),
        ("opens too late", {"opening", "content"}),
        ("shares nothing", {"groups", "redelivery"}),
        ("does all well", set()),
    ],
)
async def test_suite_notices_a_broken_promise(how: str, caught: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that every subscription passes would prove nothing."""
    if caught:
        for module in (rig, subscription_conformance):
            monkeypatch.setattr(module, "PATIENCE", 0.2)
    monkeypatch.setattr("silbo.brokers.memory.RECEIVE_WAIT", 0.01)
    noticed = set[str]()
    for check in SUBSCRIPTION_CHECKS:
        if caught and caught <= noticed:
            break
        broker = MemoryBroker("web")
        subscribe = partial(Described, broker, how=how)
        try:
            await check(Rig(broker, subscribe))
        except AssertionError:
            noticed.add(check.__name__.removeprefix("check_"))
    assert caught <= noticed
    assert bool(caught) == bool(noticed)


async def test_suite_notices_a_wrong_error_in_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = faulty()
    is_away = False

    class Raising(Faulty):
        async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
            if is_away:
                raise ConnectionError("reset by peer")
            return await super().receive(limit)

    @asynccontextmanager
    async def away() -> AsyncIterator[None]:
        nonlocal is_away
        is_away = True
        yield
        is_away = False

    class Subscribed:
        app, name = "web", "checks"

        async def open(self) -> Any:
            return Raising(await opened.subscribe("checks").open(), "")

    with pytest.raises(AssertionError, match="ConnectionError"):
        await subscription_conformance.check_outage(Rig(opened.publisher, lambda _: Subscribed(), away))
    assert not is_away
