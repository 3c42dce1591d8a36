"""Kills the programs and their Redis in the middle of the requests: a `kill -9` for each, once."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis

from examples.meetings.programs import Program
from examples.meetings.traffic import Gate
from silbo.stores.sqlite import SQLiteStore
from tools.redis_server import ExternalRedis, RedisServer

HANDFUL = 10


@dataclass(frozen=True)
class Misfortunes:
    """The kills of one run. Each happens after a share of the answers, while requests go on. The user's own Redis is not killed."""

    requests: int
    gate: Gate
    server: RedisServer | ExternalRedis
    client: Redis
    stream: str
    host: Program
    billing: Program
    outbox: Path
    tell: Callable[[str], object]

    async def happen(self) -> int:
        """Kill each in turn, then let the last requests pass. Returns how many events billing had in hand when killed."""
        await self._answered(1, 4)
        in_hand = await self._kill_billing()
        await self.gate.open(self.requests * 3 // 4)
        await self._answered(17, 32)
        if isinstance(self.server, RedisServer):
            self.server.kill()
            self.tell("kill -9 Redis; the host goes on to answer")
        await self._answered(11, 16)
        await self._kill_host()
        await self._answered(3, 4)
        if isinstance(self.server, RedisServer):
            self.server.restart()
            self.tell("Redis is back; the host's relay brings it what waits")
        await self.gate.open(self.requests)
        return in_hand

    async def _kill_billing(self) -> int:
        for _ in range(100):  # until billing has events in hand
            if await self._in_hand() >= HANDFUL:
                break
            await asyncio.sleep(0.005)
        self.billing.kill()
        in_hand = await self._in_hand()
        self.tell(f"kill -9 billing, with {in_hand} events in hand that it had not acknowledged")
        await self.billing.start_again()
        self.tell("billing is back, and gets these first")
        return in_hand

    async def _in_hand(self) -> int:
        """Count the events that Redis has given to billing, and that billing has not acknowledged."""
        return int((await self.client.xpending(self.stream, "billing"))["pending"])

    async def _kill_host(self) -> None:
        self.host.kill()
        self.tell(f"kill -9 host, with {await unsent(self.outbox)} events in its outbox that Redis does not have")
        await self.host.start_again()
        self.tell("host is back, with the same outbox")

    async def _answered(self, part: int, of: int) -> None:
        await self.gate.answered(self.requests * part // of)


async def unsent(path: Path) -> int:
    """Count the events that wait in an outbox. Any process of the machine may read the file."""
    async with aclosing(SQLiteStore(path, create=False)) as store:
        await store.open()
        counts = (await store.status()).counts
    return counts["pending"] + counts["sending"]
