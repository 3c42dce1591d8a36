"""Listeners and hooks that wait for the end of the consumer that runs them: an error that names the circle, never a hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, _host_code
from silbo.brokers.memory import MemoryBroker
from silbo.errors import CircularWait, StopIncomplete
from tests.support.consumer import Consumer, begin, joined, left_over

Wait = Callable[[Consumer, asyncio.Task[None]], Awaitable[object]]


async def end_in_circle(broker: MemoryBroker, wait: Wait, *, drain: float = 0.05) -> tuple[Any, list[Any], list[Any]]:
    """Run a consumer whose listener waits for its end: what run() raised, what the listener got, and what the hook was told."""
    d = AsyncEventDispatcher()
    got: list[Any] = []
    told: list[Any] = []

    @d.listen("**")
    async def listener(event: Any) -> None:
        try:
            await wait(consumer, running)
        except BaseException as error:
            got.append(error)
            raise

    await begin(broker)
    await broker.publish(joined(1))
    group = broker.group("billing", start="new")
    consumer = Consumer(d, group, drain=drain, on_error=lambda error, what: told.append(error))
    running = asyncio.create_task(consumer.run())
    await asyncio.wait([running], timeout=30)
    assert running.done()
    if left_behind := asyncio.all_tasks() - {asyncio.current_task()}:  # type: ignore[arg-type]
        await asyncio.wait(left_behind, timeout=30)
    return None if running.cancelled() else running.exception(), got, told


async def stop_and_wait(consumer: Consumer, running: asyncio.Task[None]) -> None:
    consumer.stop()
    await running


async def leave(consumer: Consumer, running: asyncio.Task[None]) -> None:
    await consumer.__aexit__(None, None, None)


@pytest.mark.parametrize(("wait", "call"), [(stop_and_wait, "run()"), (leave, "the end of the `async with`")])
async def test_listener_that_waits_for_its_own_end_gets_an_error(wait: Wait, call: str, broker: MemoryBroker) -> None:
    """At once, and a failed attempt as others: the delivery goes to the group's other consumers."""
    error, got, told = await end_in_circle(broker, wait, drain=30)
    assert error is None
    assert [type(one) for one in got] == [CircularWait]
    assert f"{call} of that consumer" in str(got[0])
    assert told == got
    assert len(await left_over(broker)) == 1


async def gather(consumer: Consumer, running: asyncio.Task[None]) -> None:
    consumer.stop()
    await asyncio.gather(running)


async def await_in_another_task(consumer: Consumer, running: asyncio.Task[None]) -> None:
    consumer.stop()

    async def inner() -> None:
        await running

    await asyncio.create_task(inner())


@pytest.mark.parametrize("wait", [gather, await_in_another_task])
async def test_circle_that_can_t_be_seen_ends_soon_after_drain(
    wait: Wait, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation of the listener goes round; the run ends without it, and names it."""
    monkeypatch.setattr(_host_code, "ENDS_WITHIN", 0.1)
    error, _, _ = await end_in_circle(broker, wait)
    assert isinstance(error, StopIncomplete)
    assert "end_in_circle.<locals>.listener" in str(error)
    assert f"{__file__}:" in str(error)
    assert len(await left_over(broker)) == 1


async def wait_for(consumer: Consumer, running: asyncio.Task[None]) -> None:
    consumer.stop()
    await asyncio.wait_for(running, 3600)


async def wait_for_tasks(consumer: Consumer, running: asyncio.Task[None]) -> None:
    consumer.stop()
    await asyncio.wait([running])


async def shield(consumer: Consumer, running: asyncio.Task[None]) -> None:
    consumer.stop()
    await asyncio.shield(running)


@pytest.mark.parametrize("wait", [wait_for, wait_for_tasks, shield])
async def test_other_waits_for_the_run_end_with_it(
    wait: Wait, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host_code, "ENDS_WITHIN", 0.1)
    _, got, _ = await end_in_circle(broker, wait)
    assert len(got) == 1
    assert len(await left_over(broker)) == 1


async def test_listener_may_start_a_task_that_waits_for_the_end(broker: MemoryBroker) -> None:
    """An event "shut down": the task waits, and the listener does not."""
    ended = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def close(consumer: Consumer, running: asyncio.Task[None]) -> None:
        await consumer.__aexit__(None, None, None)
        await running
        ended.set()

    async def start(consumer: Consumer, running: asyncio.Task[None]) -> None:
        tasks.append(asyncio.create_task(close(consumer, running)))

    error, got, told = await end_in_circle(broker, start, drain=30)
    assert (error, got, told) == (None, [], [])
    assert ended.is_set()
    assert await left_over(broker) == []


async def test_listener_may_close_its_dispatcher(broker: MemoryBroker) -> None:
    """A listener that waits for spawned dispatches only is in no circle."""

    async def close(consumer: Consumer, running: asyncio.Task[None]) -> None:
        dispatcher: Any = consumer._options.dispatcher
        await dispatcher.drain()
        await dispatcher.aclose()
        consumer.stop()

    error, got, told = await end_in_circle(broker, close, drain=30)
    assert (error, got, told) == (None, [], [])
