"""Version 2 of a program is deployed over version 1, replica by replica, while messages of both versions come."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import Process
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Bridge, Consumer
from silbo.brokers.redis import DeadLetters, RedisStreams
from tests.support.deployed_process import ORDER_PAID, replicate

ROOT = Path(__file__).resolve().parents[2]
REPLICAS = 4
PATIENCE = 120
"""Seconds after which a wait is a hang."""


class Replica(Protocol):
    """One running replica."""

    async def stop(self) -> None: ...


class TaskReplica:
    """A replica in this process, with a dispatcher, a consumer and connections of its own."""

    def __init__(self, task: asyncio.Task[None], consumer: Consumer) -> None:
        self._task, self._consumer = task, consumer

    @classmethod
    async def start(cls, url: str, prefix: str, name: str, version: int) -> Replica:
        ready: asyncio.Future[Consumer] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(replicate(url, prefix, name, version, ready.set_result))
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return cls(task, ready.result())

    async def stop(self) -> None:
        self._consumer.stop()
        await self._task


class ProcessReplica:
    """A replica in a process of its own, ended by SIGTERM."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, url: str, prefix: str, name: str, version: int) -> Replica:
        arguments = ["-m", "tests.support.deployed_process", url, prefix, name, str(version)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        return cls(process)

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        assert await self._process.wait() == 0


class Producers:
    """Two programs that send about orders of their own, without a pause but a short one; each at one version."""

    def __init__(self, redis: Redis, prefix: str, orders: int) -> None:
        self._redis, self._prefix, self._orders = redis, prefix, orders
        self.versions = [1, 1]
        self.sent: dict[str, int] = defaultdict(int)  # by order
        self._stopping = False

    async def run(self) -> None:
        await asyncio.gather(*(self._produce(which) for which in range(2)))

    async def _produce(self, which: int) -> None:
        async with RedisStreams(self._redis, app="shop", prefix=self._prefix) as streams:
            dispatcher = AsyncEventDispatcher()
            dispatcher.add_subscriber(Bridge(streams))
            while not self._stopping:
                version = self.versions[which]
                more: tuple[Any, ...] = ("USD",) if version == 2 else ()
                for order in (f"{which}-{number}" for number in range(self._orders)):
                    self.sent[order] += 1
                    name = ORDER_PAID[version]
                    assert name.cls is not None
                    await dispatcher.adispatch(name, name.cls(order, self.sent[order], *more))
                await asyncio.sleep(0.02)

    def stop(self) -> None:
        self._stopping = True

    @property
    def total(self) -> int:
        return sum(self.sent.values())


class Deploy:
    """Four replicas, their producers, and what became of the messages."""

    def __init__(self, redis: Redis, url: str, prefix: str, start: Any, *, orders: int, step: int) -> None:
        self._redis, self._url, self._prefix, self._start, self._step = redis, url, prefix, start, step
        self.producers = Producers(redis, prefix, orders)
        self._replicas: list[Replica] = []
        self._names: list[str] = []

    async def begin(self, version: int) -> Replica:
        name = f"r{len(self._names)}-v{version}"
        self._names.append(name)
        replica: Replica = await self._start(self._url, self._prefix, name, version)
        self._replicas.append(replica)
        return replica

    async def end(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        await replica.stop()

    async def end_all(self) -> None:
        for replica in list(self._replicas):
            await self.end(replica)

    async def replace_each(self) -> None:
        """The new one is ready before the old one ends, as in a rolling deploy; messages come all the while."""
        for old in list(self._replicas):
            await self.begin(2)
            await self.more_sent()
            await self.end(old)
            await self.more_sent()

    async def switch_producers(self) -> None:
        for which in range(2):
            self.producers.versions[which] = 2
            await self.more_sent()

    async def more_sent(self) -> None:
        goal = self.producers.total + self._step
        await self._until(lambda: _true_now(self.producers.total >= goal))

    async def until_nothing_is_pending(self) -> None:
        stream = f"{self._prefix}:{{events}}"

        async def nothing() -> bool:
            (group,) = await self._redis.xinfo_groups(stream)
            last = (await self._redis.xinfo_stream(stream))["last-generated-id"]
            return bool(group["pending"] == 0 and group["last-delivered-id"] == last)

        await self._until(nothing)

    async def _until(self, check: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not await check():
                await asyncio.sleep(0.02)

    async def check(self) -> None:
        """Nothing dead, nothing lost, and in each replica the order of each key as the replica was given it."""
        async with DeadLetters(self._redis, prefix=self._prefix) as dead:
            assert await dead.list() == []
        handled: dict[str, set[int]] = defaultdict(set)
        by_version: dict[str, int] = defaultdict(int)
        for name in self._names:
            got: dict[str, list[int]] = defaultdict(list)
            done: dict[str, list[int]] = defaultdict(list)
            for line in await self._redis.lrange(f"{self._prefix}:log:{name}", 0, -1):
                what, order, number = line.decode().split()
                (got if what == "got" else done)[order].append(int(number))
            for order, numbers in done.items():
                given = iter(got[order])
                assert all(number in given for number in numbers), f"{name} handled {order} in another order"
                handled[order].update(numbers)
                by_version[name[-2:]] += len(numbers)
        assert {order: max(numbers) for order, numbers in handled.items()} == self.producers.sent
        assert all(len(numbers) == max(numbers) for numbers in handled.values())
        assert by_version["v1"] and by_version["v2"]


async def _true_now(value: bool) -> bool:
    return value


async def deploy(redis: Redis, url: str, prefix: str, start: Any, first: str, *, orders: int, step: int) -> None:
    deploy = Deploy(redis, url, prefix, start, orders=orders, step=step)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(deploy.end_all)
        for _ in range(REPLICAS):
            await deploy.begin(1)
        producing = asyncio.create_task(deploy.producers.run())
        stack.callback(producing.cancel)
        await deploy.more_sent()
        if first == "consumers":
            await deploy.replace_each()
            await deploy.switch_producers()
        else:
            await deploy.switch_producers()
            await deploy.replace_each()
        deploy.producers.stop()
        await producing
        await deploy.until_nothing_is_pending()
    await deploy.check()


@pytest.mark.long
@pytest.mark.parametrize("first", ["consumers", "producers"])
async def test_rolling_deploy_loses_nothing_and_kills_nothing(
    redis: Redis, redis_url: str, prefix: str, first: str
) -> None:
    """Whichever side is deployed first: older messages are upcast, newer ones wait for a replica that knows them."""
    await deploy(redis, redis_url, prefix, TaskReplica.start, first, orders=5, step=30)


@pytest.mark.long
@pytest.mark.every_redis
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", ["consumers", "producers"])
async def test_rolling_deploy_of_processes_under_load(redis: Redis, redis_url: str, prefix: str, first: str) -> None:
    """The same with processes that end on SIGTERM, and many more messages."""
    await deploy(redis, redis_url, prefix, ProcessReplica.start, first, orders=30, step=600)
