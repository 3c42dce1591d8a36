"""Cancels publishes, consumers and stops at points that chance chooses; the Redis is this process's own, so that whatever
is left on it, and in this process, is a leak."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from chaos.events import APP, COUNTED, STREAM, Counted
from chaos.worker import ready, serve
from silbo import AsyncEventDispatcher, Consumer, Message, Outbox, Publisher
from silbo.brokers.redis import RedisStreams
from silbo.errors import MessageRefused
from silbo.stores.sqlite import SQLiteStore

TOGETHER = 20
"""Publishes at a time."""
CONSUMERS = 20
"""At a time."""
SESSION = 200
"""Cancellations after which a publisher is closed and another one is made."""


@dataclass(frozen=True)
class Settings:
    """Where to; `direct` is the way past the proxy, for looking."""

    url: str
    direct: str
    folder: str
    seed: int
    many: int


class Cancelling:
    """What is counted over all of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.random = settings, Random(settings.seed)
        self.cancelled: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest = 0.0
        self._typical: dict[str, float] = {}

    async def close(self, what: str, closing: Awaitable[object]) -> None:
        """A shutdown, timed."""
        began = time.monotonic()
        await closing
        self.took(time.monotonic() - began)

    def took(self, seconds: float) -> None:
        self.slowest = max(self.slowest, seconds)

    def somewhere(self, what: str) -> float:
        """A moment within what it usually takes, or a bit later."""
        return self.random.random() * 1.2 * self._typical.get(what, 0.005)

    def usual(self, what: str, seconds: float) -> None:
        """Learn how long it takes."""
        self._typical[what] = 0.9 * self._typical.get(what, seconds) + 0.1 * seconds

    # -- publishes ------------------------------------------------------------------------------------------

    async def publishes(self, what: str, make: Callable[[Redis], Publisher]) -> None:
        """Publishes of which half are cancelled, among those that must succeed and those that must be refused."""
        sent: dict[str, bool] = {}  # publication -> whether it has to be there
        async with Redis.from_url(self.settings.url) as client:
            while self.cancelled[what] < self.settings.many:
                publisher = make(client)
                if isinstance(publisher, Outbox):
                    await publisher.__aenter__()
                until = min(self.settings.many, self.cancelled[what] + SESSION)
                while self.cancelled[what] < until:
                    await asyncio.gather(*(self._publish(what, publisher, sent) for _ in range(TOGETHER)))
                await self.close(what, publisher.aclose())
        await self._look(what, sent)

    async def _publish(self, what: str, publisher: Publisher, sent: dict[str, bool]) -> None:
        refused = self.random.random() < 0.2
        publication = uuid4().hex
        payload = {"value": object()} if refused else {"value": 1}
        message = Message("ecst_event", what, publication, payload, {"publication": publication})
        task = asyncio.create_task(publisher.publish(message))
        cancel = self.random.random() < 0.5
        began = time.monotonic()
        if cancel:
            asyncio.get_running_loop().call_later(self.somewhere(what), task.cancel)
        try:
            await asyncio.wait([task])
            task.result()
        except asyncio.CancelledError:
            self.cancelled[what] += 1
            sent[publication] = False
            if not cancel:
                self.wrong.append(f"{what}: cancelled by nobody")
        except MessageRefused:
            if not refused:
                self.wrong.append(f"{what}: a good one was refused")
        except Exception as error:  # noqa: BLE001  # each is a wrong answer: Redis is there all the time
            self.wrong.append(f"{what}: {error!r}")
        else:
            self.usual(what, time.monotonic() - began)
            sent[publication] = True
            if refused:
                self.wrong.append(f"{what}: a bad one was taken")

    async def _look(self, what: str, sent: dict[str, bool]) -> None:
        """What was answered is there once; what was cancelled is there once or not at all."""
        async with Redis.from_url(self.settings.direct) as client:
            there, missing = Counter[str](), list(sent)
            for _ in range(600):
                page: Any = await client.xrange(STREAM)
                there = Counter(_publication(fields[b"message"]) for _, fields in page)
                missing = [one for one, answered in sent.items() if answered and one not in there]
                if not missing:
                    break
                await asyncio.sleep(0.1)
            self.wrong += [f"{what}: answered, and not there"] * len(missing)
            self.wrong += [f"{what}: there {many} times" for many in there.values() if many > 1]
            await client.flushall()

    # -- consumers ------------------------------------------------------------------------------------------

    async def consumers(self, what: str, end: Callable[[asyncio.Task[None], Consumer], object]) -> None:
        """Consumers that are ended at any point of their life; what they had in hand is handled by the next."""
        heard: Counter[tuple[str, int]] = Counter()
        dispatcher, given = AsyncEventDispatcher(), 0

        async def hear(event: Counted) -> None:
            await asyncio.sleep(0)
            heard[event.lane, event.number] += 1

        async with Redis.from_url(self.settings.url) as client, RedisStreams(client, app=APP) as streams:
            dispatcher.add_listener(COUNTED, hear)

            async def one(number: int) -> None:
                nonlocal given
                reader = RedisStreams(client, app=f"{APP}-reader")
                while self.cancelled[what] < self.settings.many:
                    for _ in range(5):
                        given += 1
                        await streams.publish(_message(given))
                    await self._consume(
                        what, dispatcher, reader.group("all", start="oldest", consumer=f"c{number}"), end
                    )
                    self.cancelled[what] += 1

            await asyncio.gather(*(one(number) for number in range(CONSUMERS)))
            await asyncio.gather(*(self._finish(client, dispatcher, f"c{number}") for number in range(CONSUMERS)))
            if missing := given - len(heard):
                self.wrong.append(f"{what}: {missing} were never handled")
        async with Redis.from_url(self.settings.direct) as client:
            pending = (await client.xpending(STREAM, "all"))["pending"]
            if pending:
                self.wrong.append(f"{what}: {pending} are pending")
            await client.flushall()

    async def _consume(
        self,
        what: str,
        dispatcher: AsyncEventDispatcher,
        group: Any,
        end: Callable[[asyncio.Task[None], Consumer], object],
    ) -> None:
        consumer = Consumer(dispatcher, group, events=[COUNTED], concurrency=4)
        ended = 0.0

        def strike() -> None:
            nonlocal ended
            ended = time.monotonic()
            end(task, consumer)

        async def live() -> None:
            async with consumer:
                await consumer.run()

        task = asyncio.create_task(live())
        asyncio.get_running_loop().call_later(self.random.random() * 0.02, strike)
        await asyncio.wait([task])
        self.took(time.monotonic() - ended)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.wrong.append(f"{what}: {error!r}")

    async def _finish(self, client: Redis, dispatcher: AsyncEventDispatcher, name: str) -> None:
        """What a consumer of this name was given and did not acknowledge."""
        group = RedisStreams(client, app=f"{APP}-reader").group("all", start="oldest", consumer=name)
        async with Consumer(dispatcher, group, events=[COUNTED]) as consumer:
            running = asyncio.create_task(consumer.run())
            await self._settled(client, name)
            began = time.monotonic()
            consumer.stop()
            await running
        self.took(time.monotonic() - began)

    async def _settled(self, client: Redis, consumer: str) -> None:
        for _ in range(3_000):
            waiting = (await client.xpending(STREAM, "all"))["consumers"]
            group = (await client.xinfo_groups(STREAM))[0]
            stream = await client.xinfo_stream(STREAM)
            if group["last-delivered-id"] == stream["last-generated-id"] and consumer not in {
                one["name"].decode() for one in waiting
            }:
                return
            await asyncio.sleep(0.02)


def _message(number: int) -> Message:
    lane, key = f"l{number % 7}", uuid4().hex
    payload = {"lane": lane, "number": number, "event_id": key, "event_timestamp": "2026-01-01T00:00:00Z"}
    return Message("ecst_event", str(COUNTED), key, payload, {"publication": key, "key": lane})


def _publication(raw: bytes) -> str:
    start = raw.index(b'"publication":"') + 15
    return raw[start : raw.index(b'"', start)].decode()


def _descriptors() -> int:
    return len(os.listdir("/dev/fd"))


async def main(settings: Settings, stopping: asyncio.Event) -> dict[str, Any]:
    cancelling, folder = Cancelling(settings), Path(settings.folder)
    files = iter(range(1_000_000))
    ready()

    def streams(client: Redis) -> Publisher:
        return RedisStreams(client, app=APP)

    def outbox(client: Redis) -> Publisher:
        return Outbox(SQLiteStore(folder / f"{next(files)}.db"), RedisStreams(client, app=APP))

    async def warm() -> None:  # threads and their pipes, made once
        await asyncio.to_thread(int)

    await warm()
    before, tasks = _descriptors(), len(asyncio.all_tasks())
    await cancelling.publishes("publish", streams)
    await cancelling.publishes("outbox publish", outbox)
    await cancelling.consumers("consume", lambda task, consumer: task.cancel())
    await cancelling.consumers("stop", lambda task, consumer: consumer.stop())
    async with Redis.from_url(settings.direct) as client:
        connections = 0
        for _ in range(200):  # a proxy hears of an end a moment later
            connections = len(await client.client_list()) - 1
            if not connections:
                break
            await asyncio.sleep(0.05)
    return {
        "cancelled": cancelling.cancelled,
        "wrong": cancelling.wrong[:20],
        "wrong replies": len(cancelling.wrong),
        "leaked connections": max(connections, _descriptors() - before),
        "leaked tasks": len(asyncio.all_tasks()) - tasks,
        "slowest shutdown": cancelling.slowest,
    }


if __name__ == "__main__":
    serve(Settings, main)
