"""Listeners that take too long: told in the log, counted, and with a limit a failed attempt."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import silbo
from silbo import AsyncEventDispatcher
from silbo.brokers.memory import MemoryBroker
from silbo.errors import ListenerTimeout
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Heard,
    Running,
    Scripted,
    delivery,
    handle_one,
    joined,
)


def ignore(error: Exception, event: object, listener: object) -> None:
    """A policy that says nothing."""


async def hang(event: Any) -> None:
    await asyncio.Event().wait()


class Hanging:
    async def __call__(self, event: Any) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    "options",
    [{}, {"concurrent": True}, {"once": True}, {"on_error": ignore}, {"on_error": "collect"}],
    ids=["none", "concurrent", "once", "isolated", "collected"],
)
@pytest.mark.parametrize("observers", [(), (silbo.Trace(),)], ids=["plain", "observed"])
async def test_listener_timeout_limits_each_listener(options: dict[str, Any], observers: Any) -> None:
    """Whatever its other options, and whether observers see it or not; the listeners of other dispatches have no limit."""
    d = AsyncEventDispatcher(observers=observers)
    d.add_listener("user.joined", hang, **options)
    consumer, _, errors = await handle_one(d, listener_timeout=0.01, max_attempts=1)
    assert (consumer.stats.failed, consumer.stats.dead) == (1, 1)
    error = errors[0].exceptions[0] if isinstance(errors[0], ExceptionGroup) else errors[0]
    assert isinstance(error, ListenerTimeout)
    assert (error.listener, error.timeout) == (hang, 0.01)


async def test_listener_timeout_holds_for_a_name_that_was_dispatched_before(d: AsyncEventDispatcher) -> None:
    """The dispatcher may call the listeners of such a name without a look at their options."""
    is_hanging = False

    async def listener(event: Any) -> None:
        if is_hanging:
            await hang(event)

    d.add_listener("user.joined", listener)
    await handle_one(d)
    await handle_one(d)
    is_hanging = True
    _, _, errors = await handle_one(d, listener_timeout=0.01, max_attempts=1)
    assert isinstance(errors[0], ListenerTimeout)


async def test_listener_s_own_timeout_counts(d: AsyncEventDispatcher, heard: Heard) -> None:
    """Longer or shorter than the consumer's; and a listener that is quick enough has not failed."""

    async def wait(event: Any) -> None:
        await asyncio.sleep(0.05)

    d.add_listener("user.joined", wait, timeout=30)
    consumer, _, errors = await handle_one(d, listener_timeout=0.01)
    assert (consumer.stats.handled, errors, heard.ids) == (1, [], [1])
    d.add_listener("user.joined", hang, timeout=0.02)
    _, _, errors = await handle_one(d, listener_timeout=30, max_attempts=1)
    assert errors[0].timeout == 0.02


async def test_once_listener_under_a_limit_runs_once(d: AsyncEventDispatcher) -> None:
    """Also where two deliveries are under way that both began before it ran."""
    ran: list[int] = []
    both = asyncio.Barrier(2)

    async def meet(event: Any) -> None:
        await both.wait()

    async def listener(event: Any) -> None:
        ran.append(event.user_id)

    d.add_listener("user.joined", meet, priority=-1)
    d.add_listener("user.joined", listener, once=True)
    subscription = Scripted([delivery(1, key="a"), delivery(2, key="b")])
    async with Running(Consumer(d, subscription, events=[USER_JOINED], listener_timeout=30, concurrency=2)):
        await subscription.until_acked(2)
    assert len(ran) == 1


async def test_listener_timeout_without_a_group_goes_to_the_hook(d: AsyncEventDispatcher) -> None:
    """As every failure of what nobody keeps: told once."""
    d.add_listener("user.joined", hang)
    told = asyncio.Event()
    errors: list[Any] = []

    def hook(error: Exception, what: Any) -> None:
        errors.append(error)
        told.set()

    consumer = Consumer(
        d, Scripted([delivery(1, kept=False)]), events=[USER_JOINED], listener_timeout=0.01, on_error=hook
    )
    async with Running(consumer):
        await asyncio.wait_for(told.wait(), 30)
    assert [type(error) for error in errors] == [ListenerTimeout]


@pytest.mark.parametrize("hanging", ["listener", "hook"])
async def test_listener_that_never_returns_is_told_and_counted(
    hanging: str, broker: MemoryBroker, d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names the listener, the message and the line; the figures show it too."""
    goes_on = asyncio.Event()

    async def listener(event: Any) -> None:
        if hanging == "hook":
            raise ValueError("told to the hook")
        await goes_on.wait()

    async def hook(error: Exception, about: object) -> None:
        await goes_on.wait()

    d.add_listener("user.joined", listener)
    consumer = Consumer(
        d, broker.group("billing", start="new"), events=[USER_JOINED], slow_after=0.05, on_error=hook, max_attempts=1
    )
    async with Running(consumer):
        await broker.publish(joined(1))
        async with asyncio.timeout(30):
            while not consumer.stats.slow:
                await asyncio.sleep(0.01)
        code = (listener if hanging == "listener" else hook).__code__
        assert f"{code.co_qualname} ({__file__}:{code.co_firstlineno}), now in line" in caplog.text
        assert ("user.joined 1 in group billing: a listener still runs" in caplog.text) is (hanging == "listener")
        assert consumer.stats.slow == 1
        goes_on.set()
        async with asyncio.timeout(30):
            while consumer.stats.slow:
                await asyncio.sleep(0.01)
