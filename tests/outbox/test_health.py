"""The health of a relay and of an outbox says if broker and store answer, and what waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from silbo import Outbox, Quota, Relay
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, LeadLost, StoreUnavailable
from silbo.stores.memory import MemoryStore
from tests.support.relay import FailingBroker, message, wait_until


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[Relay]:
    async with relay:
        task = asyncio.create_task(relay.run())
        yield relay
        relay.stop()
        await task


@pytest.mark.parametrize("hooked", [False, True])
async def test_relay_tells_an_outage_of_the_broker(hooked: bool) -> None:
    """With an error hook as without: a hook takes the place of the log alone."""
    errors: list[Any] = []
    hook = (lambda error, about: errors.append(error)) if hooked else None
    broker = FailingBroker("web")
    store = MemoryStore()
    relay = Relay(store, broker, on_error=hook)
    assert (relay.health().part, relay.health().name, relay.health().is_ready) == ("relay", "web", False)
    before = datetime.now(UTC)
    async with running(relay):
        await wait_until(lambda: relay.health().is_ready)
        broker.away = BrokerUnavailable("it is away")
        async with Outbox(store, MemoryBroker("web"), relay=False) as outbox:
            await outbox.publish(message(1))
            await wait_until(lambda: not relay.health().is_connected)
            away = relay.health()
            assert away.away_since is not None and away.away_since >= before
            assert away.last_error is not None and away.last_error.text == "it is away"
            broker.away = None
            await wait_until(lambda: relay.stats.sent == 1)
            await wait_until(lambda: relay.health().is_ready)
            assert relay.health().received_at is not None
    assert not relay.health().is_ready
    assert bool(errors) is hooked


async def test_relay_that_drains_is_stopping_and_so_is_its_outbox() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Held(MemoryBroker):
        async def publish_sequenced(self, *arguments: Any) -> Any:
            begun.set()
            await go_on.wait()
            return await super().publish_sequenced(*arguments)

    async with Outbox(MemoryStore(), Held("web")) as outbox:
        await outbox.publish(message(1))
        await wait_until(begun.is_set)
        closing = asyncio.create_task(outbox.aclose())
        await wait_until(lambda: outbox.health().explain() == "stopping")
        go_on.set()
        await closing
    assert outbox.health().explain() == "not running"


class TakenStore(MemoryStore):
    """A store in memory whose lead another relay has if it is told so."""

    is_taken = False

    async def lead(self, *arguments: Any, **options: Any) -> Any:
        return None if self.is_taken else await super().lead(*arguments, **options)

    async def take(self, lead: Any, *arguments: Any, **options: Any) -> Any:
        if self.is_taken:
            raise LeadLost(lead.partition, lead.epoch)
        return await super().take(lead, *arguments, **options)


async def test_standby_is_ready_though_the_broker_failed_while_it_led() -> None:
    """It asks the broker no more, so it would never hear that the broker is back."""
    broker = FailingBroker("web")
    store = TakenStore()
    async with running(Relay(store, broker)) as relay:
        await wait_until(lambda: relay.health().is_ready)
        broker.away = BrokerUnavailable("it is away")
        async with Outbox(store, MemoryBroker("web"), relay=False) as outbox:
            await outbox.publish(message(1))
            await wait_until(lambda: not relay.health().is_connected)
            store.is_taken = True
            await wait_until(lambda: relay.health().is_ready)


async def test_relay_and_outbox_tell_what_waits() -> None:
    store = MemoryStore()
    async with Outbox(store, MemoryBroker("web"), relay=False, quota=Quota(rows=3)) as outbox:
        relay = Relay(store, MemoryBroker("web"))
        await outbox.publish(message(1), message(2))
        for part in (outbox, relay):
            assert (part.health().lag, part.health().oldest_at, part.outbox_status) == (None, None, None)
            await part.refresh_health()
            assert part.health().lag == 2 and part.health().oldest_at is not None and part.outbox_status is not None
        assert outbox.health().is_ready
        await outbox.publish(message(3))
        await outbox.refresh_health()
        assert (outbox.health().has_room, outbox.health().explain()) == (False, "no room")
    assert outbox.health().explain() == "not running"


async def test_figures_stay_while_they_are_read_anew() -> None:
    """A full outbox is not ready for a moment, as often as somebody looks; and no exporter finds a gap."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    class Slow(MemoryStore):
        async def status(self) -> Any:
            asked.set()
            await go_on.wait()
            return await super().status()

    store = Slow()
    async with Outbox(store, MemoryBroker("web"), relay=False, quota=Quota(rows=1)) as outbox:
        await outbox.publish(message(1))
        for part in (outbox, Relay(store, MemoryBroker("web"))):
            go_on.set()
            await part.refresh_health()
            go_on.clear()
            asked.clear()
            reading = asyncio.create_task(part.refresh_health())
            await asked.wait()
            assert part.health().lag == 1 and part.outbox_status is not None
            assert not outbox.health().has_room
            go_on.set()
            await reading


class FailingStore(MemoryStore):
    """A store in memory that is away if it is told to be."""

    is_away = False

    async def add(self, *arguments: Any) -> None:
        if self.is_away:
            raise StoreUnavailable("the disk is full")
        await super().add(*arguments)

    async def status(self) -> Any:
        if self.is_away:
            raise StoreUnavailable("the disk is full")
        return await super().status()


async def test_outbox_tells_that_its_store_is_away() -> None:
    store = FailingStore()
    async with Outbox(store, MemoryBroker("web"), relay=False) as outbox:
        await outbox.publish(message(1))
        await outbox.refresh_health()
        store.is_away = True
        with pytest.raises(StoreUnavailable):
            await outbox.publish(message(2))
        await outbox.refresh_health()
        away = outbox.health()
        assert not away.is_connected and away.away_since is not None and away.lag is None
        assert away.last_error is not None and away.last_error.text == "the disk is full"
        store.is_away = False
        await outbox.publish(message(2))
        assert outbox.health().is_ready


async def test_outbox_has_the_health_of_its_relay() -> None:
    broker = FailingBroker("web")
    async with Outbox(MemoryStore(), broker) as outbox:
        await wait_until(lambda: outbox.health().is_ready)
        broker.away = BrokerUnavailable("it is away")
        await outbox.publish(message(1))
        await wait_until(lambda: not outbox.health().is_connected)
        assert outbox.health().away_since is not None and outbox.health().last_error is not None
        broker.away = None
        await wait_until(lambda: outbox.health().is_ready)
