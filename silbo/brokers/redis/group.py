"""Consumer groups of Redis Streams: the description that a consumer opens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from redis.asyncio import Redis

from silbo.brokers.redis.claiming import order
from silbo.brokers.redis.group_reader import GroupReader
from silbo.errors import StartInvalid
from silbo.protocols import Format

__all__ = ["StreamGroup", "check_start"]

_is_id = re.compile(r"\d+(-\d+)?").fullmatch


def check_start(start: str) -> str:
    """The same start, once it is known to be one.

    Raises:
        StartInvalid: it is none.
    """
    if start in ("new", "oldest") or (_is_id(start) and order(start) != (0, 0)):
        return start
    raise StartInvalid(start)


@dataclass(frozen=True, slots=True)
class StreamGroup:
    """A place in a consumer group; a consumer opens it."""

    client: Redis
    app: str
    format: Format
    timeout: float
    name: str
    start: str
    consumer: str | None
    keys: tuple[str, ...]
    claim_after: float
    retain: float | None

    async def open(self) -> GroupReader:
        """Connect, and make the group where it does not exist.

        Raises:
            BrokerUnavailable: Redis can't be reached, or refuses.
        """
        reader = GroupReader(self)
        await reader.open()
        return reader
