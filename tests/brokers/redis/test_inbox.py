"""An inbox in Redis: what was handled is not handled again, and it stays small."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisInbox

pytestmark = pytest.mark.every_redis


@pytest.fixture
async def inbox(streams_client: Redis) -> AsyncIterator[RedisInbox]:
    async with RedisInbox(streams_client) as opened:
        yield opened


async def handle(inbox: RedisInbox, publication: str, group: str = "billing") -> bool:
    async with inbox.handling(group, publication) as is_new:
        return is_new


async def test_what_was_handled_is_known_to_its_group_alone(inbox: RedisInbox) -> None:
    assert await handle(inbox, "p-1")
    assert not await handle(inbox, "p-1")
    assert await handle(inbox, "p-2")
    assert await handle(inbox, "p-1", "mail")


async def test_what_failed_is_not_remembered(inbox: RedisInbox) -> None:
    with pytest.raises(ZeroDivisionError):
        async with inbox.handling("billing", "p-1"):
            raise ZeroDivisionError
    assert await handle(inbox, "p-1")
