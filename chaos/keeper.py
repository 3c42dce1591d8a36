"""A ledger of effects that is fenced by epoch, in the process of the battery; listeners in other processes ask it over a socket.

It is what a host does that looks at `event.origin.epoch`: it remembers the greatest epoch that it has seen of each shard, and refuses
effects of an older one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from chaos.events import Counted

__all__ = ["Effect", "EffectRefused", "Keeper", "KeeperClient"]


class EffectRefused(Exception):
    """Another process leads the shard by now."""


class Effect(NamedTuple):
    """One that was accepted."""

    at: float  # by the wall clock, as the next one
    dispatched_at: float
    shard: int
    epoch: int
    member: str
    lane: str
    number: int
    event: str


class Keeper:
    """Takes effects on a unix socket.

    Attributes:
        effects: Those that were accepted, in this order.
        refused: How many were not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.effects: list[Effect] = []
        self.refused = 0
        self._epochs: dict[int, int] = {}
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                if not line.endswith(b"\n"):  # torn by a kill
                    break
                writer.write(b"1" if self._take(line.decode().split()) else b"0")
        except OSError:
            pass  # killed
        finally:
            writer.close()

    def _take(self, words: list[str]) -> bool:
        dispatched_at, shard, epoch, member, lane, number, event = words
        if int(epoch) < self._epochs.get(int(shard), 0):
            self.refused += 1
            return False
        self._epochs[int(shard)] = int(epoch)
        effect = Effect(time.time(), float(dispatched_at), int(shard), int(epoch), member, lane, int(number), event)
        self.effects.append(effect)
        return True


class KeeperClient:
    """A listener's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._asked: deque[asyncio.Future[bool]] = deque()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, path: str) -> KeeperClient:
        return cls(*await asyncio.open_unix_connection(path))

    async def _read(self) -> None:
        while answers := await self._reader.read(4096):
            for answer in answers:
                asked = self._asked.popleft()
                if not asked.done():
                    asked.set_result(answer == ord("1"))

    async def have(self, event: Counted, shard: int, epoch: int, member: str) -> None:
        """Have an effect.

        Raises:
            EffectRefused: the epoch is an old one.
        """
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._asked.append(answered)
        words = event.event_timestamp.timestamp(), shard, epoch, member, event.lane, event.number, event.event_id
        self._writer.write(f"{' '.join(map(str, words))}\n".encode())
        if not await answered:
            raise EffectRefused(f"epoch {epoch} of shard {shard}")

    async def aclose(self) -> None:
        self._writer.close()
        self._reading.cancel()
        await asyncio.wait([self._reading])
