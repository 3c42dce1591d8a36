"""The host of examples/meetings with faults in it (the variable FAULTS names them): the demo must notice them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from typing import Any

from examples.meetings import host, house_rules
from examples.meetings.process import Settings, serve
from silbo import Message
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.protocols import Sequenced
from silbo.stores.memory import MemoryStore
from silbo.stores.sqlite import SQLiteStore

FAULTS = os.environ["FAULTS"].split(", ")


class FaultyStreams(RedisStreams):
    """Says that it added everything, as the real one does; every tenth is lost or added twice."""

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        hit = [message for sequence, message in messages if sequence % 10 == 0]
        if "double Streams" in FAULTS:
            await self.publish(*hit)
            return await super().publish_sequenced(source, epoch, messages)
        return await super().publish_sequenced(source, epoch, [one for one in messages if one[1] not in hit])


class FaultyPubSub(RedisPubSub):
    """The same for Pub/Sub."""

    count = 0

    async def publish(self, *messages: Message) -> None:
        self.count += 1
        for _ in range(2 * ("double Pub/Sub" in FAULTS) if self.count % 10 == 0 else 1):
            await super().publish(*messages)


class Forgetful(MemoryStore):
    """Takes the file's place, and its events go with the process."""

    def __init__(self, path: str | PathLike[str]) -> None:
        super().__init__()
        self._file = SQLiteStore(path)

    async def open(self, partitions: int | None = None, *, lease: float = 10.0) -> None:
        await self._file.open(partitions)  # the demo looks into it
        await self._file.aclose()
        await super().open(partitions)


async def _nothing(event: Any) -> None:
    return


if __name__ == "__main__":
    if {"lose Streams", "double Streams"} & {*FAULTS}:
        host.RedisStreams = FaultyStreams  # type: ignore[misc]
    if {"lose Pub/Sub", "double Pub/Sub"} & {*FAULTS}:
        host.RedisPubSub = FaultyPubSub  # type: ignore[misc]
    if "forget" in FAULTS:
        host.SQLiteStore = Forgetful  # type: ignore[assignment,misc]
    if "enrich-not" in FAULTS:
        house_rules.add_cost_centre = _nothing
    if "refuse-not" in FAULTS:
        house_rules.refuse_banned = _nothing
    if "start-not" in FAULTS:
        raise SystemExit(3)
    serve(host.application(Settings.from_environment()))
