"""Random histories of consumers: they fail, crash, are killed by the broker; streams and groups are deleted under them.

Whatever happens, every message is handled or becomes a dead letter, one key's in order within a process, and nothing is
left pending. ``SILBO_MACHINE_EXAMPLES`` sets how many histories are tried.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, Protocol, TypeVar
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from silbo import AsyncEventDispatcher, Consumer, ECSTEvent, EventName
from silbo._retry import Backoff
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import DeadLetters, RedisStreams
from silbo.brokers.redis.group import StreamReceiver
from silbo.message import Batch, Delivery, Message
from silbo.protocols import Receiver, Subscription
from silbo.wire.encode import to_message
from tests.support.redis_at import redis_at

EXAMPLES = int(os.environ.get("SILBO_MACHINE_EXAMPLES", "6"))
CLAIM_AFTER = 0.1
GROUP = "billing"

_T = TypeVar("_T")


@dataclass
class Task(ECSTEvent):
    number: int
    key: str
    fails: int  # so often


TASK = EventName("task", Task, key="key")


class Broker(Protocol):
    """A broker and what can be done to it."""

    has_streams: bool

    async def publish(self, *messages: Message) -> None: ...
    def group(self) -> Subscription: ...
    async def dead(self) -> list[Message]: ...
    async def pending(self) -> int: ...
    async def delete(self, what: Literal["stream", "group", "entry", "scripts", "connections"], which: int) -> None: ...
    async def aclose(self) -> None: ...


class Memory:
    has_streams = False

    def __init__(self) -> None:
        self._broker = MemoryBroker()

    async def publish(self, *messages: Message) -> None:
        await self._broker.publish(*messages)

    def group(self) -> Subscription:
        return self._broker.group(GROUP, start="oldest")

    async def dead(self) -> list[Message]:
        return [letter.delivery.message() for letter in self._broker.dead]

    async def pending(self) -> int:
        return sum(len(backlog) for backlog in self._broker._backlogs.values())

    async def delete(self, what: str, which: int) -> None:
        raise NotImplementedError

    async def aclose(self) -> None: ...


class Streams:
    has_streams = True

    def __init__(self, url: str) -> None:
        self._prefix = f"machine-{uuid4().hex[:8]}"
        self._redis = redis_at(url)
        self._streams = RedisStreams(self._redis, app="app", prefix=self._prefix)
        self._letters = DeadLetters(self._redis, prefix=self._prefix)
        self._key = f"{self._prefix}:{{events}}"

    async def publish(self, *messages: Message) -> None:
        await self._streams.publish(*messages)

    def group(self) -> Subscription:
        return self._streams.group(GROUP, start="oldest", claim_after=CLAIM_AFTER)

    async def dead(self) -> list[Message]:
        return [letter.message() for letter in await self._letters.list(limit=1000)]

    async def pending(self) -> int:
        (group,) = await self._redis.xinfo_groups(self._key)
        waiting = await self._redis.xrange(self._key, f"({group['last-delivered-id'].decode()}")
        return int(group["pending"]) + len(waiting)

    async def delete(self, what: str, which: int) -> None:
        if what == "stream":
            await self._redis.delete(self._key)
        elif what == "group" and await self._redis.exists(self._key):
            await self._redis.xgroup_destroy(self._key, GROUP)
        elif what == "entry" and (entries := await self._redis.xrange(self._key)):
            await self._redis.xdel(self._key, entries[which % len(entries)][0])
        elif what == "scripts":
            await self._redis.script_flush()
        elif what == "connections":
            await self._redis.client_kill_filter(_type="normal", skipme=True)

    async def aclose(self) -> None:
        async for key in self._redis.scan_iter(match=f"{self._prefix}*"):
            await self._redis.delete(key)
        await self._letters.aclose()
        await self._streams.aclose()
        await self._redis.aclose()


class Crashing:
    """A subscription whose receivers go without a word when their process crashes."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self.app, self.name = subscription.app, subscription.name
        self.crashes = False

    async def open(self) -> Receiver:
        receiver = await self._subscription.open()
        if isinstance(receiver, StreamReceiver):
            in_hand: Any = receiver._in_hand

            async def leave(*keys: Any, **unnamed: Any) -> None:
                if not self.crashes:
                    await real(*keys, **unnamed)

            real, in_hand.leave = in_hand.leave, leave
        return receiver


class Process:
    """A consumer with its dispatcher, as a process has them; checks the order of each key."""

    def __init__(self, machine: ConsumerMachine, concurrency: int) -> None:
        self._machine = machine
        self._arrived: dict[int, int] = {}  # number: place in the order of arrival
        self._begun: dict[str, int] = {}  # key: the last place that has begun
        dispatcher = AsyncEventDispatcher()
        dispatcher.add_listener(TASK, self._work)
        self._subscription = Crashing(machine.broker.group())
        self.consumer = Consumer(
            dispatcher,
            self._subscription,
            events=[TASK],
            own="handle",
            concurrency=concurrency,
            max_attempts=3,
            backoff=Backoff(initial=0.001, cap=0.002),
            drain=0.5,
            on_error=self._note_error,
        )

    def _note_error(self, error: Exception, about: object) -> None:
        if isinstance(error, AssertionError | KeyError):
            self._machine.wrong.append(error)

    async def start(self) -> None:
        await self.consumer.__aenter__()
        queue: Any = self.consumer._queue
        put, put_batch, places = queue.put, queue.put_batch, count(1)

        def arrive(delivery: Delivery, *how: Any) -> None:
            self._arrived[delivery.message().payload["number"]] = next(places)
            put(delivery, *how)

        def arrive_together(batch: Batch) -> None:
            for index in range(len(batch)):
                self._arrived[batch[index].message().payload["number"]] = next(places)
            put_batch(batch)

        queue.put, queue.put_batch = arrive, arrive_together
        self.running = asyncio.create_task(self.consumer.run())

    async def _work(self, task: Task) -> None:
        place = self._arrived[task.number]
        assert place >= self._begun.get(task.key, 0), f"{task.number} was overtaken within its key"
        self._begun[task.key] = place
        for _ in range(task.number % 4):
            await asyncio.sleep(0)
        await self._machine.attempt(task)

    async def crash(self) -> None:
        self._subscription.crashes = True
        self.running.cancel()
        await asyncio.wait([self.running])
        await self.consumer.__aexit__(None, None, None)

    async def stop(self) -> None:
        self.consumer.stop()
        await self.running
        await self.consumer.__aexit__(None, None, None)


class ConsumerMachine(RuleBasedStateMachine):
    def __init__(self, make: Callable[[], Broker]) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._failures: dict[int, int] = {}
        self._keys: list[str] = []
        self._done: set[int] = set()
        self._perhaps_gone: set[int] = set()
        self._processes: list[Process] = []
        self.wrong: list[Exception] = []
        self.broker = self._run(self._make(make))

    async def _make(self, make: Callable[[], Broker]) -> Broker:
        return make()

    def _run(self, doing: Coroutine[Any, Any, _T]) -> _T:
        return self._runner.run(doing)

    async def attempt(self, task: Task) -> None:
        if self._failures[task.number] > 0:
            self._failures[task.number] -= 1
            raise ValueError("as told")
        self._done.add(task.number)

    # -- what happens ---------------------------------------------------------------------------------------

    @rule(tasks=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0, 0, 0, 1, 99])), min_size=1, max_size=8))
    def publish(self, tasks: Sequence[tuple[str, int]]) -> None:
        messages = []
        for key, fails in tasks:
            number = len(self._failures)
            self._failures[number] = fails
            messages.append(to_message(Task(number, key, fails), name=TASK, kind="ecst", key=key))
        self._run(self.broker.publish(*messages))

    @precondition(lambda self: len(self._processes) < 3)
    @rule(concurrency=st.sampled_from([1, 3]))
    def start(self, concurrency: int) -> None:
        process = Process(self, concurrency)
        self._run(process.start())
        self._processes.append(process)

    @rule(milliseconds=st.integers(0, 30))
    def wait(self, milliseconds: int) -> None:
        self._run(asyncio.sleep(milliseconds / 1000))
        for process in self._processes:
            assert not process.running.done(), process.running

    @precondition(lambda self: self._processes)
    @rule(which=st.integers(0, 2), how=st.sampled_from(["crash", "stop"]))
    def end(self, which: int, how: str) -> None:
        process = self._processes.pop(which % len(self._processes))
        self._run(process.crash() if how == "crash" else process.stop())

    @precondition(lambda self: self.broker.has_streams and self._failures)
    @rule(
        what=st.sampled_from(["stream", "group", "entry", "scripts", "connections", "connections"]),
        which=st.integers(0, 50),
    )
    def delete(self, what: Any, which: int) -> None:
        if what in ("stream", "entry", "group"):  # a crashed consumer's are not pending any more without their group
            self._perhaps_gone |= set(self._failures)
        self._run(self.broker.delete(what, which))

    # -- what must be ---------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self._run(self._finish())
        finally:
            self._runner.close()

    async def _finish(self) -> None:
        try:
            last = Process(self, 1)
            await last.start()
            self._processes.append(last)
            await self._all_done()
            for process in self._processes[:-1]:
                await process.stop()
            # What one of them had in hand when its group was deleted, it may have taken back since, and now left.
            await self._all_done()
            await last.stop()
            assert not await self._is_pending()
            assert not self.wrong
        finally:
            for process in self._processes:
                process.running.cancel()
            await asyncio.gather(*[process.running for process in self._processes], return_exceptions=True)
            await self.broker.aclose()

    async def _all_done(self) -> None:
        async with asyncio.timeout(15):
            while await self._missing() or await self._is_pending():
                await asyncio.sleep(0.005)

    async def _missing(self) -> Collection[int]:
        dead = {message.payload["number"] for message in await self.broker.dead()}
        return set(self._failures) - self._done - dead - self._perhaps_gone

    async def _is_pending(self) -> bool:
        return await self.broker.pending() > 0


def play(make: Callable[[], Broker]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: ConsumerMachine(make),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(60 + EXAMPLES * 5)
def test_memory() -> None:
    play(Memory)


@pytest.mark.long
@pytest.mark.every_redis
@pytest.mark.timeout(60 + EXAMPLES * 5)
def test_streams(redis_url: str) -> None:
    play(lambda: Streams(redis_url))
