"""A host with one broker and one outbox, whose threads use them, too, each in event loops of its own.

Its ledger has what its own loop, or a thread's, has published: `lane number event_id`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from chaos.events import APP, COUNTED, Counted
from chaos.ledger import Ledger
from chaos.worker import ready, serve
from silbo import AsyncEventDispatcher, Bridge, Outbox
from silbo.brokers.redis import RedisStreams
from silbo.errors import LoopConflict, PublishError
from silbo.stores.sqlite import SQLiteStore

TIMEOUT: Final = 5.0
HANGS: Final = 60.0
"""Seconds after which a call has hung, however busy the machine is."""
PING: Final = "chaos.ping"


@dataclass(frozen=True)
class Settings:
    """The work of the threads.

    Attributes:
        threads: Beside the main one.
        each: Sessions of each thread: loops that it runs, one after the other.
        calls: Of each kind, in a session.
    """

    url: str
    store: str
    ledger: str
    threads: int
    each: int
    calls: int


class Host:
    """The objects that the threads share."""

    def __init__(self, settings: Settings, streams: RedisStreams, outbox: Outbox) -> None:
        self.settings = settings
        self.dispatcher = AsyncEventDispatcher()
        self.ways: dict[str, AsyncEventDispatcher] = {}
        for name, publisher in (("broker", streams), ("outbox", outbox)):
            self.ways[name] = AsyncEventDispatcher()
            self.ways[name].add_subscriber(Bridge(publisher))
        self.outbox = outbox
        self.ended = 0
        self.main = asyncio.get_running_loop()
        self.figures: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.slowest = {"here": 0.0, "elsewhere": 0.0}
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        with self._lock:
            self.figures[name] += 1

    async def call(self, where: str, call: Callable[[], Awaitable[object]]) -> bool:
        """Make a call and say how it went: True if it did what it was to do."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(HANGS):
                await call()
        except LoopConflict as error:
            told = {error.loop, error.other} == {asyncio.get_running_loop(), self.main}
            self.count(f"refused {where}" if told else "refused without the loops")
        except (PublishError, RuntimeError, TimeoutError) as error:
            with self._lock:
                self.wrong.append(f"{where}: {error!r}")
        else:
            self.count(f"done {where}")
            return True
        finally:
            with self._lock:
                self.slowest[where] = max(self.slowest[where], time.monotonic() - began)
        return False


async def go_on(host: Host, ledger: Ledger, lane: str) -> None:
    """Publish in the loop to which broker and outbox belong, until the threads have ended, and some more."""
    number, last = 0, None
    while (last is None or number < last) and not host.wrong:
        for name, dispatcher in host.ways.items():
            event = Counted(f"{lane}-{name}", number)
            if await host.call("here", lambda d=dispatcher, e=event: d.adispatch(COUNTED, e)):  # type: ignore[misc]
                await ledger.write(f"{event.lane} {number} {event.event_id}")
        number += 1
        if last is None and host.ended == host.settings.threads:
            last = number + 10
        await asyncio.sleep(0.001)


async def session(host: Host, name: str) -> None:
    """Run a thread's work in one of its loops."""
    ledger = Ledger(Path(f"{host.settings.ledger}-{name}"))
    for number in range(host.settings.calls):
        for way, dispatcher in host.ways.items():
            event = Counted(f"{name}-{way}", number)
            if await host.call("elsewhere", lambda d=dispatcher, e=event: d.adispatch(COUNTED, e)):  # type: ignore[misc]
                await ledger.write(f"{event.lane} {number} {event.event_id}")
        await host.call("elsewhere", host.outbox.status)
        await host.dispatcher.adispatch(PING)  # wakes who waits in the main loop
        if host.wrong:
            break
    else:
        await woken(host)
    await ledger.close()


async def woken(host: Host) -> None:
    """Dispatch until somebody in the main loop has been woken."""
    try:
        async with asyncio.timeout(HANGS):
            while not host.figures["waits woken"]:
                await host.dispatcher.adispatch(PING)
                await asyncio.sleep(0.01)
    except TimeoutError:
        host.wrong.append("nobody was woken by a dispatch in another loop")


def thread(host: Host, name: str) -> None:
    try:
        for number in range(host.settings.each):
            asyncio.run(session(host, f"{name}-{number}"))
    except BaseException as error:  # noqa: BLE001  # the thread would end without a word
        host.wrong.append(f"{name}: {error!r}")
    finally:
        with host._lock:
            host.ended += 1


async def wait(host: Host) -> None:
    """Be woken by the threads' dispatches, again and again."""
    while host.ended < host.settings.threads:
        waiting = asyncio.ensure_future(host.dispatcher.wait_for(PING))
        while not waiting.done() and host.ended < host.settings.threads:
            await asyncio.wait([waiting], timeout=0.05)
        if waiting.done():
            waiting.result()
            host.count("waits woken")
        else:
            waiting.cancel()
            await asyncio.wait([waiting])


async def main(settings: Settings, stopping: asyncio.Event) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Redis.from_url(settings.url))
        streams = await stack.enter_async_context(RedisStreams(client, app=APP, timeout=TIMEOUT))
        relayed = RedisStreams(client, app=APP, timeout=TIMEOUT)
        outbox = await stack.enter_async_context(Outbox(SQLiteStore(settings.store), relayed))
        host, ledger = Host(settings, streams, outbox), Ledger(Path(settings.ledger))
        await host.dispatcher.adispatch(PING)
        for dispatcher in host.ways.values():  # the first use says whose they are
            first = Counted("first", 0)
            await dispatcher.adispatch(COUNTED, first)
            await ledger.write(f"first 0 {first.event_id}")
        ready()
        threads = [
            threading.Thread(target=thread, args=(host, f"t{number}"), daemon=True)
            for number in range(settings.threads)
        ]
        waiting = asyncio.create_task(wait(host))
        for one in threads:
            one.start()
        await asyncio.gather(*(go_on(host, ledger, f"main-{number}") for number in range(10)))
        await waiting
        await ledger.close()
    return {**host.figures, "wrong": host.wrong[:20], "slowest": host.slowest}


if __name__ == "__main__":
    serve(Settings, main)
