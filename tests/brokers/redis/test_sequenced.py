"""What an outbox sends is added once, in order, and never by an old leader."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.errors import Fenced
from silbo.message import Message
from silbo.payload import MAX_SIZE
from silbo.protocols import SequencedPublisher
from tests.brokers.redis.support import message, stored

pytestmark = pytest.mark.every_redis


def numbered(*numbers: int, to: str | None = None) -> list[tuple[int, Message]]:
    return [(n, message(n, to=to)) for n in numbers]


async def test_what_was_added_is_not_added_again(admin: Redis, streams: RedisStreams) -> None:
    first = await streams.publish_sequenced("box/0", 1, numbered(1, 2, 3))
    assert (list(first.known), first.refused, first.last) == ([], {}, 0)
    second = await streams.publish_sequenced("box/0", 1, numbered(2, 3, 4, 7))
    assert (list(second.known), second.last) == ([2, 3], 3)
    third = await streams.publish_sequenced("box/0", 1, numbered(5, 7))
    assert (list(third.known), third.last) == ([5, 7], 7)
    assert await stored(admin) == [1, 2, 3, 4, 7]
    assert await admin.hgetall("silbo:{events}:outbox") == {b"box/0": b"1:7"}
