"""An inbox in Redis: what was handled is not handled again, and it stays small."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from redis.asyncio import Redis

from chaos.proxy import Link, Proxy, Rule
from silbo import AsyncEventDispatcher, Consumer
from silbo.brokers.redis import RedisInbox, RedisStreams
from silbo.brokers.redis import inbox as module
from silbo.errors import AddressInvalid, BrokerUnavailable
from silbo.protocols import Inbox
from tests.support.redis_streams import TOLERANCE, eventually, has_connections, message
from tools.redis_server import RedisServer

BILLING = "silbo:inbox:billing"
STREAM = "silbo:{events}"


@pytest.fixture
async def inbox(streams_client: Redis) -> AsyncIterator[RedisInbox]:
    async with RedisInbox(streams_client) as opened:
        yield opened


async def handle(inbox: Inbox, publication: str, group: str = "billing") -> bool:
    async with inbox.handling(group, publication) as is_new:
        return is_new


@pytest.mark.every_redis
async def test_what_was_handled_is_known_to_its_group_alone(inbox: RedisInbox) -> None:
    assert await handle(inbox, "p-1")
    assert not await handle(inbox, "p-1")
    assert not await handle(inbox, "p-1")
    assert await handle(inbox, "p-2")
    assert await handle(inbox, "p-1", "mail")


@pytest.mark.every_redis
async def test_many_are_asked_about_and_remembered_at_once(admin: Redis, inbox: RedisInbox) -> None:
    """More than Redis takes in one command of a script. A publication may be in it twice, and be remembered again."""
    many = [f"p-{n}" for n in range(10_000)]
    assert await inbox.find_handled("billing", many) == []
    await inbox.remember("billing", [*many[::2], many[0]])
    await inbox.remember("billing", many[:3:2])
    assert await inbox.find_handled("billing", many) == many[::2]
    assert await inbox.find_handled("billing", ["p-1", "p-2", "p-2"]) == ["p-2", "p-2"]
    assert await inbox.find_handled("mail", many) == []
    assert await admin.zcard(BILLING) == 5_000
    assert 0 < await admin.pttl(BILLING) <= 86_400_000


async def test_many_at_once_are_bounded_too(admin: Redis, streams_client: Redis) -> None:
    async with RedisInbox(streams_client, limit=10) as inbox:
        await inbox.remember("billing", [f"p-{n}" for n in range(250)])
        assert await admin.zcard(BILLING) == 10


async def test_no_publications_are_no_error(inbox: RedisInbox) -> None:
    await inbox.remember("billing", [])
    assert await inbox.find_handled("billing", []) == []


async def test_what_failed_is_not_remembered(inbox: RedisInbox) -> None:
    """Nor what was cancelled: it comes again, and is to be handled then."""
    with pytest.raises(ZeroDivisionError):
        async with inbox.handling("billing", "p-1"):
            raise ZeroDivisionError
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), inbox.handling("billing", "p-1"):
            await asyncio.sleep(5)
    assert await handle(inbox, "p-1")


async def test_other_processes_know_it_too(admin: Redis, inbox: RedisInbox) -> None:
    assert await handle(inbox, "p-1")
    async with RedisInbox(admin) as other, RedisInbox(admin, prefix="shop") as shop:
        assert not await handle(other, "p-1")
        assert await handle(shop, "p-1")


@pytest.mark.every_redis
async def test_it_is_bounded_in_number(admin: Redis, streams_client: Redis) -> None:
    """The oldest are forgotten, one group's not for another's."""
    async with RedisInbox(streams_client, limit=10) as inbox:
        await handle(inbox, "mail's", "mail")
        for n in range(25):
            await handle(inbox, f"p-{n}")
            await asyncio.sleep(0.002)  # by the millisecond
        assert await admin.zcard(BILLING) == 10
        assert not any([await handle(inbox, f"p-{n}") for n in range(15, 25)])
        assert await handle(inbox, "p-14")
        assert not await handle(inbox, "mail's", "mail")


@pytest.mark.every_redis
async def test_it_is_bounded_in_time(admin: Redis, streams_client: Redis) -> None:
    """Old publications go as others come, and all of them where nothing comes any more."""
    async with RedisInbox(streams_client, keep=0.5) as inbox:
        handled = 0
        while await admin.zcard(BILLING) == handled:  # none has gone yet
            await handle(inbox, f"p-{handled}")
            handled += 1
            await asyncio.sleep(0.02)
        assert not await handle(inbox, f"p-{handled - 1}"), "the newest is still known"

        async def is_gone() -> bool:
            return not await admin.exists(BILLING)

        await eventually(is_gone)


async def test_a_publication_takes_the_documented_memory(admin: Redis, inbox: RedisInbox) -> None:
    """A long name takes no more than a short one."""
    for n in range(1000):
        await handle(inbox, f"{n}" * 1000)
    assert await admin.memory_usage(BILLING, samples=0) < 130 * 1000


@pytest.mark.every_redis
async def test_redis_that_can_not_be_asked_is_an_error_before_the_work(
    own_redis: RedisServer, streams_client: Redis
) -> None:
    async with RedisInbox(streams_client, timeout=0.3) as inbox:
        assert await handle(inbox, "p-1")
        for fault, mend in ((own_redis.pause, own_redis.resume), (own_redis.kill, own_redis.restart)):
            await asyncio.to_thread(fault)
            with pytest.raises(BrokerUnavailable, match="Redis at "):
                async with inbox.handling("billing", "p-2"):
                    pytest.fail("nobody knows whether it is new")
            await asyncio.to_thread(mend)
        assert not await handle(inbox, "p-1")


async def test_what_is_no_inbox_is_told(admin: Redis, inbox: RedisInbox) -> None:
    await admin.set(BILLING, "a string")
    with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
        await handle(inbox, "p-1")


@pytest.mark.every_redis
async def test_redis_that_is_away_for_a_moment_is_told_afterwards(
    own_redis: RedisServer, streams_client: Redis
) -> None:
    """While the listeners ran: what they did is remembered when it is back."""
    async with RedisInbox(streams_client) as inbox:
        async with inbox.handling("billing", "p-1") as is_new:
            assert is_new
            await asyncio.to_thread(own_redis.kill)
            restarting = asyncio.ensure_future(asyncio.to_thread(own_redis.restart))
        await restarting
        assert not await handle(inbox, "p-1")


class CutOnce(Rule):
    """The answer to the first script that remembers does not arrive."""

    def __init__(self) -> None:
        self.cuts = 0

    async def request(self, data: bytes, link: Link) -> None:
        link.armed = b"EVAL\r\n" in data[:32] and b"ZADD" in data

    async def reply(self, data: bytes, link: Link) -> None:
        if link.armed and not self.cuts:
            self.cuts += 1
            link.cut()


async def test_lost_answer_is_asked_for_again(admin: Redis, own_redis: RedisServer) -> None:
    """To remember twice is to remember."""
    rule = CutOnce()
    async with Proxy(own_redis.url, rule) as proxy, Redis.from_url(proxy.url) as client:
        async with RedisInbox(client) as inbox:
            assert await handle(inbox, "p-1")
            assert rule.cuts == 1
            assert not await handle(inbox, "p-1")
    assert await admin.zcard(BILLING) == 1


@pytest.mark.parametrize("fault", ["frozen", "full"])
async def test_what_can_not_be_remembered_is_logged_and_no_error(
    fault: str,
    admin: Redis,
    own_redis: RedisServer,
    streams_client: Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The effect is there: an error would make the consumer repeat it. At most a line a second."""
    async with RedisInbox(streams_client, timeout=0.3 if fault == "frozen" else 5) as inbox:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        with caplog.at_level(logging.WARNING, module.__name__):
            for n in range(1 if fault == "frozen" else 3):
                async with inbox.handling("billing", f"p-{n}") as is_new:
                    assert is_new
                    if fault == "frozen":
                        own_redis.pause()
                    else:
                        await admin.config_set("maxmemory", 1)
        assert loop.time() - begin < 0.3 + TOLERANCE
        own_redis.resume()
        await admin.config_set("maxmemory", 0)
        assert len(caplog.records) == 1
        assert caplog.records[0].message.startswith(
            "handled in group billing, but not remembered in the inbox: Redis at "
        )
        assert caplog.records[0].__dict__["group"] == "billing"


@pytest.mark.one_server
async def test_groups_handle_side_by_side(admin: Redis, inbox: RedisInbox) -> None:
    """Over one connection, and each gets its own answer."""

    async def lane(number: int) -> list[bool]:
        return [await handle(inbox, f"p-{number}-{n // 2}") for n in range(40)]

    for answers in await asyncio.gather(*map(lane, range(10))):
        assert answers == [True, False] * 20
    await has_connections(admin, "streams", 1)


async def test_it_is_closed(admin: Redis, streams_client: Redis) -> None:
    async with RedisInbox(streams_client) as inbox:
        await handle(inbox, "p-1")
    await inbox.aclose()
    await has_connections(admin, "streams", 0)
    with pytest.raises(BrokerUnavailable, match="after aclose"):
        await handle(inbox, "p-1")


async def test_mistakes_are_told(streams_client: Redis, inbox: RedisInbox) -> None:
    for wrong in ({"keep": 0.0}, {"limit": 0}, {"timeout": 0}):
        with pytest.raises(ValueError, match="more"):
            RedisInbox(streams_client, **wrong)  # type: ignore[arg-type]
    with pytest.raises(AddressInvalid):
        await handle(inbox, "p-1", "a group:")
    with pytest.raises(TypeError, match="client is"):
        RedisInbox("redis://localhost")  # type: ignore[arg-type]


class Unanswered(RedisInbox):
    """Its consumer does not hear any more that the last of 300 is remembered."""

    told = 0

    async def remember(self, group: str, publications: Sequence[str]) -> None:
        await super().remember(group, publications)
        self.told += len(publications)
        if self.told >= 300:
            await asyncio.Event().wait()


@pytest.mark.long
async def test_consumer_that_died_before_it_acknowledged_has_no_second_effect(
    admin: Redis, streams: RedisStreams, streams_client: Redis
) -> None:
    """The handled messages come again, all of them once more with a replay, and are known."""
    heard: list[int] = []
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen("user.joined")
    async def hear(event: Any) -> None:
        heard.append(event.payload["n"])

    async def are_remembered() -> bool:
        return await admin.zcard(BILLING) == 300

    async def are_acknowledged() -> bool:
        return consumer.stats.duplicates == 300 + left and not (await admin.xpending(STREAM, "billing"))["pending"]

    group = streams.group("billing", start="oldest", consumer="pod-1")
    await streams.publish(*map(message, range(300)))
    async with Unanswered(streams_client) as inbox:
        dying = asyncio.create_task(Consumer(dispatcher, group, inbox=inbox).run())
        await eventually(are_remembered)
        dying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dying
    left = (await admin.xpending(STREAM, "billing"))["pending"]
    assert left, "handled, and not acknowledged"
    for _, fields in await admin.xrange(STREAM):
        await admin.xadd(STREAM, fields)
    async with RedisInbox(streams_client) as inbox, Consumer(dispatcher, group, inbox=inbox) as consumer:
        running = asyncio.create_task(consumer.run())
        await eventually(are_acknowledged)
        consumer.stop()
        await running
    assert heard == list(range(300))
