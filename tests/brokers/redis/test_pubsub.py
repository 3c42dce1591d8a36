"""Hearing Pub/Sub: ready when confirmed, back by itself, what was meant and each message once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisPubSub
from silbo.brokers.redis.connection import Connection
from silbo.brokers.redis.pubsub import _ChannelFilter
from silbo.errors import AddressInvalid, BrokerUnavailable, Gap, NameInvalid
from silbo.message import Delivery
from silbo.protocols import Publisher, Receiver, Subscription
from silbo.wire.formats import DIATOR
from tests.support.redis_streams import TOLERANCE, eventually, has_connections, message, number, opened, receive
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis

BOTH_WAYS = pytest.mark.usefixtures("way_of_reading")
NAMES = ["user", "user.joined", "user.left", "user.plan.changed", "order.placed", "users.joined"]


@pytest.fixture(params=["all at once", "one by one"])
def way_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read replies with silbo's own parser; or through redis-py, as if it did not give its transport any more."""
    if request.param == "one by one":
        monkeypatch.setattr(Connection, "_current_transport", lambda connection: None)


async def heard(broker: RedisPubSub, receiver: Receiver, names: Sequence[str] = NAMES) -> list[str]:
    """The names that a receiver hears, when each is sent once and then the last one that everybody hears."""
    await broker.publish(*[message(n, name) for n, name in enumerate(names)], message(-1, "the.end"))
    got: list[str] = []
    while "the.end" not in got:
        got += [item.message().message_name for item in await receiver.receive(100) if isinstance(item, Delivery)]
    return got[:-1]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], NAMES),
        (["**"], NAMES),
        (["user.*"], ["user.joined", "user.left"]),
        (["user.**"], ["user", "user.joined", "user.left", "user.plan.changed"]),
        (["user.joined"], ["user.joined"]),
        (["*.joined"], ["user.joined", "users.joined"]),
        (["user.joined", "user.*", "*.joined", "**.joined"], ["user.joined", "user.left", "users.joined"]),
        (["user.joined", "order.placed"], ["user.joined", "order.placed"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("user", ["pubsub", "default"])
async def test_patterns_mean_what_they_mean_in_add_listener(
    patterns: list[str], expected: list[str], user: str, admin: Redis, pubsub_client: Redis
) -> None:
    """Redis's ``*`` crosses dots, silbo's does not; and a message comes once, however many patterns it matches.

    The restricted user may not subscribe to narrow patterns: then the filter is here alone.
    """
    async with RedisPubSub(pubsub_client if user == "pubsub" else admin, app="web") as broker:
        async with opened(broker.subscribe(*patterns, *["the.end"] * bool(patterns))) as receiver:
            assert await heard(broker, receiver) == expected


def test_long_channels_of_others_are_remembered_by_a_digest(pubsub: RedisPubSub) -> None:
    """Anybody may publish to a channel of megabytes: 10,000 of them must not stay in memory. Copies are still told apart."""
    channels = _ChannelFilter(pubsub.subscribe("user.*", "*.joined"))
    for user in range(3):
        long = f"{channels._prefix}ecst_event:user.{user}{'x' * 100_000}".encode()
        for _ in range(2):
            assert channels.accepts(long, b"user") and not channels.accepts(long, b"joined")
    assert len(channels._accepted_via) == 3 and sum(map(len, channels._accepted_via)) < 1000


async def test_both_kinds_are_heard(admin: Redis, pubsub: RedisPubSub) -> None:
    async with opened(pubsub.subscribe("user.joined")) as receiver:
        raw = b'{"message_type":"ecst_event","message_name":"user.joined","message_id":"x","payload":{"n":1}}'
        await admin.publish("silbo:ecst_event:user.joined", raw)
        (delivery,) = await receive(receiver, 1)
        assert delivery == Delivery(raw, "silbo:ecst_event:user.joined", getattr(delivery, "format", None))


async def test_names_with_characters_that_redis_takes_for_patterns(pubsub: RedisPubSub) -> None:
    async with opened(pubsub.subscribe("what[is]this?", "the.end")) as receiver:
        assert await heard(pubsub, receiver, ["what[is]this?", "whatithis!"]) == ["what[is]this?"]


async def test_channels_that_routes_chose(pubsub: RedisPubSub) -> None:
    """By the address, whatever their names; without patterns nothing else."""
    sent = [message(1, "order.placed", to="orders"), message(2, "user.joined"), message(3, "any", to="others")]
    async with opened(pubsub.subscribe(channels=("orders",))) as only, opened(pubsub.subscribe()) as names:
        async with opened(pubsub.subscribe("user.*", channels=("orders", "others"))) as both:
            await pubsub.publish(*sent, message(4, "a", to="orders"))
            assert [number(item) for item in await receive(only, 2)] == [1, 4]
            assert [number(item) for item in await receive(both, 4)] == [1, 2, 3, 4]
            assert [number(item) for item in await receive(names, 1)] == [2]
            assert await names.receive(10) == []


async def test_diator_channels_name_no_event(admin: Redis) -> None:
    """So all of them are heard, each once; which event it is, the class name tells."""
    async with RedisPubSub(admin, app="web", format=DIATOR) as broker:
        async with opened(broker.subscribe("user.joined", "user.*")) as receiver:
            await broker.publish(message(1), message(2))
            assert [number(item) for item in await receive(receiver, 2)] == [1, 2]


async def test_forbidden_channels_are_told(pubsub_client: Redis) -> None:
    async with RedisPubSub(pubsub_client, app="web", format=DIATOR) as broker:
        with pytest.raises(BrokerUnavailable, match="NOPERM"):
            await broker.subscribe().open()


@pytest.mark.one_server
async def test_open_returns_when_redis_has_confirmed(admin: Redis, pubsub: RedisPubSub) -> None:
    """All of it: what is published right after is heard on the last of many channels too."""
    names = [f"name-{n}" for n in range(300)]
    for _ in range(5):
        async with opened(pubsub.subscribe(*names)) as receiver:
            assert (await admin.pubsub_numsub("silbo:ecst_event:name-299"))[0][1] == 1
            await pubsub.publish(message(1, "name-299"))
            assert [number(item) for item in await receive(receiver, 1)] == [1]


@pytest.mark.one_server
@BOTH_WAYS
async def test_messages_during_the_confirmation_are_not_taken_for_one(admin: Redis) -> None:
    """Between the patterns and the exact channels; from its opening on the receiver hears every message."""
    async with RedisPubSub(admin, app="web") as pubsub:

        async def publish() -> None:
            for n in range(300):
                await pubsub.publish(message(n, "user.joined"))

        publishing = asyncio.ensure_future(publish())
        async with opened(pubsub.subscribe("user.*", *[f"name-{n}" for n in range(1000)])) as receiver:
            assert (await admin.pubsub_numsub("silbo:ecst_event:name-999"))[0][1] == 1
            await publishing
            got = [number(item) for item in await receiver.receive(300)]
            while got[-1] != 299:
                got += map(number, await receiver.receive(300))
            assert got == list(range(got[0], 300))


@BOTH_WAYS
async def test_limit_and_wait(pubsub: RedisPubSub) -> None:
    loop = asyncio.get_running_loop()
    async with opened(pubsub.subscribe()) as receiver:
        begin = loop.time()
        assert await receiver.receive(10) == []
        assert 0.4 < loop.time() - begin < 0.5 + TOLERANCE
        await pubsub.publish(*map(message, range(25)))
        got: list[int] = []
        while len(got) < 25:
            items = await receiver.receive(10)
            assert len(items) <= 10
            got += map(number, items)
        assert got == list(range(25))
        await receiver.ack()


@BOTH_WAYS
async def test_cancelled_receive_loses_nothing(pubsub: RedisPubSub) -> None:
    """The connection stays: there is no gap either."""
    async with opened(pubsub.subscribe()) as receiver:
        got: list[int] = []
        for n in range(100):
            waiting = asyncio.ensure_future(receiver.receive(10))
            publish = asyncio.ensure_future(pubsub.publish(message(n)))
            for _ in range(n % 10):
                await asyncio.sleep(0)
            waiting.cancel()
            result, _ = await asyncio.gather(waiting, publish, return_exceptions=True)
            if not isinstance(result, BaseException):
                got += map(number, result)
        while len(got) < 100:
            got += map(number, await receiver.receive(10))
        assert got == list(range(100))


# -- the connection is lost ---------------------------------------------------------------------------------


async def back(receiver: Receiver) -> tuple[float, list[Delivery | Gap]]:
    """Seconds until the receiver works again, and what it received."""
    items: list[Delivery | Gap] = []

    async def is_back() -> bool:
        items.extend(await receiver.receive(100))
        return bool(items)

    return await eventually(is_back), items


async def test_back_within_two_seconds_of_a_restart(own_redis: RedisServer, pubsub: RedisPubSub) -> None:
    """With a gap, for what was published meanwhile is gone."""
    async with opened(pubsub.subscribe("user.*")) as receiver:
        await pubsub.publish(message(1))
        assert [number(item) for item in await receive(receiver, 1)] == [1]
        await asyncio.to_thread(own_redis.kill)
        for _ in range(5):
            with pytest.raises(BrokerUnavailable):
                await receiver.receive(10)
        await asyncio.to_thread(own_redis.restart)
        seconds, (gap,) = await back(receiver)
        assert seconds < 2
        assert isinstance(gap, Gap)
        assert "silbo:notification_event:user.*" in gap.address
        assert "is back" in str(gap)
        await pubsub.publish(message(2))
        assert [number(item) for item in await receive(receiver, 1)] == [2]


@pytest.mark.one_server
@BOTH_WAYS
async def test_back_after_its_connection_was_cut(admin: Redis, pubsub: RedisPubSub) -> None:
    async with opened(pubsub.subscribe()) as receiver:
        await admin.client_kill_filter(_type="pubsub")
        with pytest.raises(BrokerUnavailable, match="lost the subscription"):
            await receiver.receive(10)
        seconds, (gap,) = await back(receiver)
        assert isinstance(gap, Gap)
        assert seconds < 2
        await has_connections(admin, "pubsub", 1)


@pytest.mark.one_server
@BOTH_WAYS
async def test_slow_subscriber_that_redis_cut_off_hears_of_it(admin: Redis, pubsub: RedisPubSub) -> None:
    """What had come before is handed out first."""
    await admin.config_set("client-output-buffer-limit", "pubsub 200kb 0 0")
    async with opened(pubsub.subscribe()) as receiver:
        blob = "x" * 10_000
        for n in range(5):
            await pubsub.publish(message(n))
        await pubsub.publish(*[message(n, blob=blob) for n in range(5, 2000)])
        got: list[int] = []
        with pytest.raises(BrokerUnavailable):
            while True:
                got += map(number, await receiver.receive(50))
        assert got == list(range(len(got)))
        assert 5 <= len(got) < 2000
        _, (gap,) = await back(receiver)
        assert isinstance(gap, Gap)


@pytest.mark.long
@BOTH_WAYS
async def test_silent_connection_is_noticed(own_redis: RedisServer, pubsub_client: Redis) -> None:
    """One whose other side is gone without a word looks like one on which nothing is published."""
    async with RedisPubSub(pubsub_client, app="web", timeout=0.6) as pubsub:
        async with opened(pubsub.subscribe()) as receiver:
            for _ in range(6):
                assert await receiver.receive(10) == []  # a Redis that answers PINGs is no such thing
            own_redis.pause()
            with pytest.raises(BrokerUnavailable, match="no answer to a PING"):
                for _ in range(8):
                    await receiver.receive(10)
            with pytest.raises(BrokerUnavailable, match="no answer within"):
                await receiver.receive(10)
            own_redis.resume()
            seconds, (gap,) = await back(receiver)
            assert seconds < 2
            assert isinstance(gap, Gap)


async def test_unreachable_redis_is_told_when_opening(own_redis: RedisServer, pubsub: RedisPubSub) -> None:
    own_redis.kill()
    with pytest.raises(BrokerUnavailable, match="can't subscribe at Redis at"):
        await pubsub.subscribe().open()


async def test_cancelled_open_leaves_no_connection(own_redis: RedisServer, admin: Redis, pubsub: RedisPubSub) -> None:
    own_redis.pause()
    opening = asyncio.ensure_future(pubsub.subscribe().open())
    await asyncio.sleep(0.1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    own_redis.resume()
    await has_connections(admin, "pubsub", 0)


async def test_closed_receiver_says_so(admin: Redis, pubsub: RedisPubSub) -> None:
    async with opened(pubsub.subscribe()) as receiver:
        pass
    await receiver.aclose()
    await has_connections(admin, "pubsub", 0)
    with pytest.raises(BrokerUnavailable, match="closed"):
        await receiver.receive(1)


# -- the description ----------------------------------------------------------------------------------------


def test_patterns_and_channels_are_checked_when_described() -> None:
    broker = RedisPubSub(Redis(), app="web")
    with pytest.raises(NameInvalid):
        broker.subscribe("user.jo*")
    with pytest.raises(AddressInvalid):
        broker.subscribe(channels=("silbo:orders",))


async def test_everything_fits_its_protocol(pubsub: RedisPubSub) -> None:
    publisher: Publisher = pubsub
    subscription: Subscription = pubsub.subscribe()
    assert isinstance(publisher, Publisher)
    assert subscription.app == "web"
    async with opened(subscription) as receiver:
        assert receiver.skips_own_instance
