"""Hooks of a relay that leave a cancellation behind, or wait for the relay's end: it goes on, or ends with an error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar

import pytest

from silbo import Outbox
from silbo.errors import BrokerUnavailable, CircularWait
from silbo.outbox import relay as relaying
from silbo.outbox.relay import Relay
from silbo.outbox.rows import OutboxStore, Quota, pack
from silbo.stores.memory import MemoryStore
from tests.support.relay import FailingBroker, GroupReader, message, wait_until, wait_until_sent

pytestmark = pytest.mark.usefixtures("quick_relay")


async def store_of(*numbers: int) -> OutboxStore:
    store = MemoryStore()
    await store.open(1)
    await store.add([pack(message(number), 1) for number in numbers], Quota())
    return store


async def cancel_and_catch() -> None:
    cancel_and_return()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(30)


def cancel_and_return() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def raise_cancelled() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("leave", [cancel_and_catch, cancel_and_return, raise_cancelled])
async def test_relay_goes_on_after_a_hook_that_leaves_a_cancellation(
    leave: Callable[[], Awaitable[None] | None], broker: FailingBroker, heard: GroupReader
) -> None:
    """Nothing else empties the outbox: a partition must not end without a word."""
    told = 0

    def hook(error: Exception, about: object) -> Awaitable[None] | None:
        nonlocal told
        told += 1
        return leave()

    broker.away = BrokerUnavailable("away")
    store = await store_of(1, 2)
    relay = Relay(store, broker, on_error=hook)
    running = asyncio.create_task(relay.run())
    await wait_until(lambda: told >= 3)
    broker.away = None
    assert await heard.until(2) == [1, 2]
    await wait_until_sent(store)
    relay.stop()
    await asyncio.wait_for(running, 30)


async def test_hook_of_a_relay_runs_in_a_context_of_its_own(broker: FailingBroker) -> None:
    seen: list[str] = []
    variable: ContextVar[str] = ContextVar("seen", default="clean")

    async def hook(error: Exception, about: object) -> None:
        seen.append(variable.get())
        variable.set("dirty")

    broker.away = BrokerUnavailable("away")
    relay = Relay(await store_of(1), broker, on_error=hook)
    running = asyncio.create_task(relay.run())
    await wait_until(lambda: len(seen) >= 3)
    relay.stop()
    await asyncio.wait_for(running, 30)
    assert set(seen) == {"clean"}


class Exit(BaseException):
    pass


async def test_relay_whose_partition_ends_before_the_stop_ends_with_its_error(broker: FailingBroker) -> None:
    def hook(error: Exception, about: object) -> None:
        raise Exit

    broker.away = BrokerUnavailable("away")
    relay = Relay(await store_of(1), broker, on_error=hook)
    with pytest.raises(Exit):
        await asyncio.wait_for(relay.run(), 30)


async def test_outbox_tells_when_its_relay_has_ended(broker: FailingBroker, caplog: pytest.LogCaptureFixture) -> None:
    """It only fills from then on."""

    def hook(error: Exception, about: object) -> None:
        raise Exit

    broker.away = BrokerUnavailable("away")
    async with Outbox(MemoryStore(), broker, on_error=hook) as outbox:
        await outbox.publish(message(1))
        await wait_until(lambda: "relay ended" in caplog.text)
    (record,) = (record for record in caplog.records if "relay ended" in record.message)
    assert record.levelno == logging.ERROR


@pytest.mark.parametrize("of_outbox", [True, False])
async def test_hook_that_closes_its_own_relay_gets_an_error(of_outbox: bool, broker: FailingBroker) -> None:
    """Each would wait for the other; the relay stops, and whoever owns it closes it."""
    errors: list[Exception] = []

    async def hook(error: Exception, about: object) -> None:
        try:
            await closed.aclose()
        except Exception as circle:
            errors.append(circle)
            raise

    broker.away = BrokerUnavailable("away")
    store = MemoryStore()
    closed: Outbox | Relay
    if of_outbox:
        async with Outbox(store, broker, on_error=hook, drain=0) as closed:
            await wait_until(lambda: errors)
            assert broker.closed == 0
    else:
        async with Relay(store, broker, on_error=hook, drain=0) as closed:
            await asyncio.wait_for(closed.run(), 30)
            assert broker.closed == 0
    assert broker.closed == 1
    assert {type(error) for error in errors} == {CircularWait}
    assert "aclose() of that relay" in str(errors[0])


async def test_hook_that_waits_for_its_own_run_gets_an_error(broker: FailingBroker) -> None:
    errors: list[Exception] = []

    async def hook(error: Exception, about: object) -> None:
        relay.stop()
        try:
            await running
        except Exception as circle:
            errors.append(circle)

    broker.away = BrokerUnavailable("away")
    relay = Relay(await store_of(1), broker, on_error=hook)
    running = asyncio.create_task(relay.run())
    await asyncio.wait([running], timeout=30)
    assert running.done()
    assert {type(error) for error in errors} == {CircularWait}


async def test_hook_that_never_returns_is_told_and_counted(
    broker: FailingBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its partition waits for it, and sends nothing."""
    monkeypatch.setattr(relaying, "SLOW_AFTER", 0.02)

    async def alarm(error: Exception, about: object) -> None:
        await asyncio.Event().wait()

    broker.away = BrokerUnavailable("away")
    relay = Relay(await store_of(1), broker, on_error=alarm, drain=0)
    running = asyncio.create_task(relay.run())
    await wait_until(lambda: relay.stats.slow)
    assert "alarm" in caplog.text
    assert f"{__file__}:{alarm.__code__.co_firstlineno}" in caplog.text
    relay.stop()
    await asyncio.wait_for(running, 30)
    assert relay.stats.slow == 0
