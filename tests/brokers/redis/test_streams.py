"""Consumer groups: nothing that the group was given is lost, whatever happens to connection, entry, group or stream."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.errors import AddressInvalid, BrokerUnavailable, Gap, MessageInvalid, StartInvalid
from silbo.message import Delivery, instance
from silbo.protocols import Publisher, Receiver, Subscription
from tests.support.redis_streams import TOLERANCE, eventually, has_connections, message, number, opened, receive
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis
KEY = "silbo:{events}"


async def pending(admin: Redis, group: str = "billing") -> int:
    return int((await admin.xpending(KEY, group))["pending"])


async def test_each_entry_goes_to_one_of_a_group_and_to_every_group(streams: RedisStreams) -> None:
    billing, audit = streams.group("billing", start="new"), streams.group("audit", start="new")
    async with opened(billing) as one, opened(billing) as other, opened(audit) as auditor:
        await streams.publish(*map(message, range(10)))
        first = await receive(one, 4)
        rest = await receive(other, 6)
        assert sorted(map(number, first + rest)) == list(range(10))
        assert [number(item) for item in await receive(auditor, 10)] == list(range(10))


async def test_delivery_says_where_it_is_from(admin: Redis, streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(sent := message(1))
        (delivery,) = await receive(receiver, 1)
        assert isinstance(delivery, Delivery)
        ((entry_id, fields),) = await admin.xrange(KEY)
        assert (delivery.id, delivery.address, delivery.attempt) == (entry_id.decode(), KEY, 1)
        assert delivery.raw == fields[b"message"]
        assert delivery.message().headers == {"app": "web", "instance": instance()} | dict(sent.headers)


async def test_start_is_where_the_group_begins(admin: Redis, streams: RedisStreams) -> None:
    """And only there: a group that exists goes on where it was."""
    await streams.publish(message(1))
    await streams.publish(message(2))
    first, _ = [entry_id.decode() for entry_id, _ in await admin.xrange(KEY)]
    for start, expected in (("oldest", [1, 2]), (first, [2]), ("new", [])):
        async with opened(streams.group(f"from-{start}", start=start)) as receiver:
            assert [number(item) for item in await receiver.receive(10)] == expected
    async with opened(streams.group("from-new", start="oldest")) as receiver:
        assert await receiver.receive(10) == []


async def test_receive_waits_up_to_half_a_second(streams: RedisStreams) -> None:
    loop = asyncio.get_running_loop()
    async with opened(streams.group("billing", start="new")) as receiver:
        begin = loop.time()
        assert await receiver.receive(10) == []
        assert 0.3 < loop.time() - begin < 0.5 + TOLERANCE
        waiting = asyncio.ensure_future(receiver.receive(10))
        await streams.publish(message(1))
        assert [number(item) for item in await waiting] == [1]


async def test_acknowledged_is_done(admin: Redis, streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="oldest", streams=["events", "orders"])) as receiver:
        await streams.publish(message(1), message(2, to="orders"), message(3))
        deliveries = [item for item in await receive(receiver, 3) if isinstance(item, Delivery)]
        assert await pending(admin) == 2
        await receiver.ack(*deliveries)
        assert await pending(admin) == 0
        await receiver.ack(*deliveries)  # safe to repeat
        await receiver.ack()
        assert {delivery.address for delivery in deliveries} == {KEY, "silbo:{orders}"}


async def test_limit_holds_over_several_streams(streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="oldest", streams=["events", "orders"])) as receiver:
        await streams.publish(*[message(n, to="orders" if n % 2 else None) for n in range(20)])
        got: list[int] = []
        while len(got) < 20:
            items = await receiver.receive(3)
            assert 1 <= len(items) <= 3
            got += map(number, items)
        assert sorted(got) == list(range(20))


async def test_own_pending_entries_come_first(streams: RedisStreams) -> None:
    """What a consumer of that name did not acknowledge comes again as another attempt, page by page, then what is new."""
    group = streams.group("billing", start="new", consumer="pod-1")
    async with opened(group) as receiver:
        await streams.publish(*map(message, range(5)))
        first, *_ = await receive(receiver, 5)
        assert isinstance(first, Delivery)
        await receiver.ack(first)
    await streams.publish(message(5))
    async with opened(group) as receiver:
        items = [*await receiver.receive(3), *await receiver.receive(3)]
        assert [(number(item), item.attempt) for item in items if isinstance(item, Delivery)] == [
            (1, 2),
            (2, 2),
            (3, 2),
            (4, 2),
        ]
        (new,) = await receiver.receive(3)
        assert (number(new), getattr(new, "attempt", None)) == (5, 1)


async def test_consumers_of_no_name_do_not_get_each_others_entries(streams: RedisStreams) -> None:
    group = streams.group("billing", start="new")
    async with opened(group) as one:
        await streams.publish(message(1))
        await receive(one, 1)
        async with opened(group) as other:
            assert await other.receive(10) == []


@pytest.mark.one_server
async def test_cancelled_receive_loses_nothing(admin: Redis, streams: RedisStreams) -> None:
    """What the server gave out while nobody listened any more comes with the next call."""
    async with opened(streams.group("billing", start="new")) as receiver:
        got: list[int] = []
        for n in range(40):
            waiting = asyncio.ensure_future(receiver.receive(10))
            await asyncio.sleep(0.001)
            publish = asyncio.ensure_future(streams.publish(message(n)))
            for _ in range(n % 8):
                await asyncio.sleep(0)
            waiting.cancel()
            result, _ = await asyncio.gather(waiting, publish, return_exceptions=True)
            if not isinstance(result, BaseException):
                got += map(number, result)
        while len(set(got)) < 40:
            got += map(number, await receiver.receive(10))
        assert set(got) == set(range(40))
        await has_connections(admin, "streams", 2)


async def test_answer_of_a_cancelled_receive_is_not_taken_for_anothers(admin: Redis, streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1))
        (delivery,) = await receive(receiver, 1)
        assert isinstance(delivery, Delivery)
        waiting = asyncio.ensure_future(receiver.receive(1))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        await receiver.ack(delivery)
        assert await pending(admin) == 0
        await streams.publish(message(2))
        assert [number(item) for item in await receive(receiver, 1)] == [2]
        assert await receiver.receive(1) == []


@pytest.mark.one_server
async def test_connection_cut_is_an_error_and_the_next_call_goes_on(admin: Redis, streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1), message(2))
        (first,) = await receiver.receive(1)
        waiting = asyncio.ensure_future(receiver.receive(1))
        assert [number(item) for item in await waiting] == [2]
        blocked = asyncio.ensure_future(receiver.receive(1))
        await asyncio.sleep(0.1)
        await admin.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(BrokerUnavailable, match="can't read from Redis at"):
            await blocked
        again = await receiver.receive(10)  # what is in hand comes again: the consumer knows it
        assert [(number(item), item.attempt) for item in again if isinstance(item, Delivery)] == [(1, 2), (2, 2)]
        assert isinstance(first, Delivery)
        await receiver.ack(first)


async def test_ack_reconnects_too(own_redis: RedisServer, admin: Redis, streams_client: Redis) -> None:
    async with (
        RedisStreams(streams_client, app="web", timeout=0.5) as streams,
        opened(streams.group("billing", start="new")) as receiver,
    ):
        await streams.publish(message(1))
        (delivery,) = await receive(receiver, 1)
        assert isinstance(delivery, Delivery)
        await admin.client_kill_filter(_type="normal", skipme=True)
        await receiver.ack(delivery)
        assert await pending(admin) == 0
        own_redis.pause()
        with pytest.raises(BrokerUnavailable, match="can't acknowledge at Redis at"):
            await receiver.ack(delivery)
        own_redis.resume()
        await receiver.ack(delivery)


async def test_killed_and_restarted_redis_gives_everything_again(
    own_redis: RedisServer, admin: Redis, streams: RedisStreams
) -> None:
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(*map(message, range(3)))
        await receive(receiver, 2)
        await asyncio.to_thread(own_redis.kill)
        for _ in range(3):
            with pytest.raises(BrokerUnavailable):
                await receiver.receive(10)
        await asyncio.to_thread(own_redis.restart)
        got: list[int] = []

        async def is_back() -> bool:
            got.extend(map(number, await receiver.receive(10)))
            return len(got) >= 3

        await eventually(is_back)
        assert got == [0, 1, 2]


async def test_frozen_redis_is_an_error_in_time(own_redis: RedisServer, streams_client: Redis) -> None:
    async with RedisStreams(streams_client, app="web", timeout=0.5) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(message(1))
            own_redis.pause()
            loop = asyncio.get_running_loop()
            begin = loop.time()
            with pytest.raises(BrokerUnavailable, match="no answer within"):
                await receiver.receive(1)
            assert loop.time() - begin < 1.5 + TOLERANCE
            with pytest.raises(BrokerUnavailable, match="no answer within"):
                await receiver.receive(1)
            own_redis.resume()
            got: list[int] = []

            async def is_back() -> bool:
                got.extend(map(number, await receiver.receive(1)))
                return bool(got)

            await eventually(is_back)  # a busy machine may miss the deadline once more
            assert got == [1]


# -- what disappears ----------------------------------------------------------------------------------------


async def test_pending_entry_that_was_deleted_is_a_gap(admin: Redis, streams: RedisStreams) -> None:
    """It can't be handled any more, so it is acknowledged, counted and told."""
    group = streams.group("billing", start="new", consumer="pod-1")
    async with opened(group) as receiver:
        await streams.publish(*map(message, range(4)))
        items = await receive(receiver, 4)
    await admin.xdel(KEY, *[item.id for item in items[1:3] if isinstance(item, Delivery)])
    async with opened(group) as receiver:
        gap, *rest = await receive(receiver, 3)
        assert isinstance(gap, Gap)
        assert (gap.address, gap.count) == (KEY, 2)
        assert [number(item) for item in rest] == [0, 3]
        assert await pending(admin) == 2


async def test_pending_entries_that_were_all_trimmed_are_a_gap(admin: Redis, streams: RedisStreams) -> None:
    group = streams.group("billing", start="new", consumer="pod-1")
    async with opened(group) as receiver:
        await streams.publish(*map(message, range(4)))
        await receive(receiver, 4)
    await admin.xtrim(KEY, maxlen=0, approximate=False)
    async with opened(group) as receiver:
        (gap,) = await receive(receiver, 1)
        assert isinstance(gap, Gap)
        assert gap.count == 4
        assert await pending(admin) == 0
        await streams.publish(message(9))
        assert [number(item) for item in await receive(receiver, 1)] == [9]


@pytest.mark.parametrize("blocked", [False, True], ids=["between-reads", "during-a-read"])
@pytest.mark.parametrize("how", ["flushall", "del"])
async def test_flushed_stream_is_read_from_its_beginning(
    how: str, blocked: bool, admin: Redis, streams: RedisStreams
) -> None:
    """Nothing added since is skipped, and the gap is told."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1))
        await receive(receiver, 1)
        waiting = asyncio.ensure_future(receiver.receive(10)) if blocked else None
        await asyncio.sleep(0.1)
        await (admin.flushall() if how == "flushall" else admin.delete(KEY))
        await streams.publish(message(2), message(3))
        items = [*(await waiting if waiting else [])]
        items += await receive(receiver, 3 - len(items))
        gap = items.pop(0)
        assert isinstance(gap, Gap)
        assert "the stream or its group was deleted" in str(gap)
        assert [number(item) for item in items] == [2, 3]


async def test_destroyed_group_goes_on_where_it_was(admin: Redis, streams: RedisStreams) -> None:
    """Of a week's history, what was handled does not come again."""
    await streams.publish(message(1))
    async with opened(streams.group("billing", start="new")) as receiver:
        await admin.xgroup_destroy(KEY, "billing")
        await streams.publish(message(2))
        gap, two = await receive(receiver, 2)
        assert isinstance(gap, Gap)
        assert number(two) == 2
        await asyncio.sleep(1)  # groups are made again once a second at most
        await admin.xgroup_destroy(KEY, "billing")
        await streams.publish(message(3))
        gap, three = await receive(receiver, 2)
        assert isinstance(gap, Gap)
        assert number(three) == 3


async def test_stream_that_began_again_at_lower_ids_is_read_whole(admin: Redis, streams: RedisStreams) -> None:
    """As when a server with an earlier clock has taken over."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1))
        await receive(receiver, 1)
        await admin.delete(KEY)
        await admin.xadd(KEY, {"message": "earlier"}, id="5-0")
        _, delivery = await receive(receiver, 2)
        assert isinstance(delivery, Delivery)
        assert delivery.id == "5-0"


async def test_group_deleted_again_and_again_is_made_once_a_second(admin: Redis, streams: RedisStreams) -> None:
    loop = asyncio.get_running_loop()
    async with opened(streams.group("billing", start="new")) as receiver:
        gaps: list[object] = []
        begin = loop.time()
        while loop.time() - begin < 1.5:
            await admin.delete(KEY)
            gaps += await receiver.receive(10)
        assert len(gaps) == 2


async def test_somebody_elses_entry_is_a_malformed_message(admin: Redis, streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="new")) as receiver:
        await admin.xadd(KEY, {"something": "else"})
        (delivery,) = await receive(receiver, 1)
        assert isinstance(delivery, Delivery)
        with pytest.raises(MessageInvalid):
            delivery.message()


async def test_stream_of_another_type_is_unavailable(admin: Redis, streams: RedisStreams) -> None:
    await admin.set(KEY, "a string")
    with pytest.raises(BrokerUnavailable, match="WRONGTYPE"):
        await streams.group("billing", start="new").open()
    await has_connections(admin, "streams", 0)


# -- the description ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "hint"),
    [("$", 'write "new"'), ("0", 'write "oldest"'), (">", 'write "new"'), ("", "is not"), ("latest", "is not")],
)
def test_start_is_checked_when_described(start: str, hint: str) -> None:
    with pytest.raises(StartInvalid, match=hint):
        RedisStreams(Redis(), app="web").group("billing", start=start)


def test_names_are_checked_when_described() -> None:
    streams = RedisStreams(Redis(), app="web")
    for wrong in ({"name": "a b"}, {"name": "a", "consumer": ""}, {"name": "a", "streams": ["silbo:{events}"]}):
        with pytest.raises(AddressInvalid):
            streams.group(**{"start": "new"} | wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        streams.group("a", start="new", streams=[])


@pytest.mark.one_server
async def test_closed_receiver_says_so(admin: Redis, streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="new")) as receiver:
        await has_connections(admin, "streams", 1)
    await receiver.aclose()
    await has_connections(admin, "streams", 0)
    with pytest.raises(BrokerUnavailable, match="closed"):
        await receiver.receive(1)


async def test_everything_fits_its_protocol(streams: RedisStreams) -> None:
    publisher: Publisher = streams
    subscription: Subscription = streams.group("billing", start="new")
    assert isinstance(publisher, Publisher)
    assert subscription.app == "web"
    async with opened(subscription) as receiver:
        fits: Receiver = receiver
        assert not fits.skips_own_instance  # an entry goes to one of the group: to skip it would be to lose it
