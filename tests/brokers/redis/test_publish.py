"""What a publish does while all is well, and which messages it refuses."""

from __future__ import annotations

import asyncio
import gc
from contextvars import ContextVar

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.credentials import CredentialProvider

from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.errors import AddressInvalid, BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.message import Message, instance
from silbo.wire.encode import MAX_SIZE
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON, JsonFormat
from tests.support.redis_streams import has_connections, message, number, opened, receive, stored
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis


@pytest.mark.one_server
async def test_a_thousand_publishes_at_once_use_one_connection(
    admin: Redis, streams_client: Redis, streams: RedisStreams
) -> None:
    """A default client's pool of 100 would fail 900 of them."""
    made = (await admin.info("stats"))["total_connections_received"]
    await asyncio.gather(*[streams.publish(message(n)) for n in range(1000)])
    assert sorted(await stored(admin)) == list(range(1000))
    assert (await admin.info("stats"))["total_connections_received"] == made + 1
    await has_connections(admin, "streams", 1)


@pytest.mark.one_server
async def test_a_thousand_pubsub_publishes_at_once_all_arrive(admin: Redis, pubsub: RedisPubSub) -> None:
    async with opened(pubsub.subscribe()) as receiver:
        await asyncio.gather(*[pubsub.publish(message(n)) for n in range(1000)])
        assert sorted(map(number, await receive(receiver, 1000))) == list(range(1000))
        await has_connections(admin, "pubsub", 2)  # the broker's, and the receiver's


async def test_xrange_shows_the_documented_bytes(admin: Redis, streams: RedisStreams) -> None:
    sent = message(7)
    await streams.publish(sent)
    ((_, fields),) = await admin.xrange("silbo:{events}")
    assert list(fields) == [b"message"]
    assert (
        fields[b"message"]
        == (
            '{"message_type":"notification_event","message_name":"user.joined",'
            '"message_id":"9f62e977-73f7-462b-92cb-8ea658d3bcb5","payload":{"n":7},'
            f'"headers":{{"app":"web","instance":"{instance()}",'
            f'"publication":"{sent.headers["publication"]}","version":"1"}}}}'
        ).encode()
    )


async def test_a_bare_subscriber_hears_the_documented_channel(admin: Redis, pubsub: RedisPubSub) -> None:
    async with admin.pubsub() as bare:
        await bare.psubscribe("silbo:notification_event:*")
        await bare.get_message(timeout=5)
        await pubsub.publish(message(1, "user.joined"))
        heard = await bare.get_message(timeout=5)
    assert heard is not None
    assert heard["channel"] == b"silbo:notification_event:user.joined"
    assert JSON.decode(heard["data"]).payload == {"n": 1}


async def test_diator_and_cloudevents_formats_name_their_channels(admin: Redis) -> None:
    async with admin.pubsub() as bare:
        await bare.psubscribe("*")
        await bare.get_message(timeout=5)
        for format_, channel in (
            (DIATOR, b"python_diator_channel:notification_event:9f62e977-73f7-462b-92cb-8ea658d3bcb5"),
            (CLOUDEVENTS, b"silbo:notification_event:user.joined"),
        ):
            async with RedisPubSub(admin, app="web", format=format_) as broker:
                await broker.publish(message())
            heard = await bare.get_message(timeout=5)
            assert heard is not None
            assert heard["channel"] == channel
            assert format_.decode(heard["data"]).payload["n"] == 0


async def test_messages_of_a_call_keep_their_order_over_several_flushes(admin: Redis, streams: RedisStreams) -> None:
    await asyncio.gather(streams.publish(*map(message, range(1200))), streams.publish(*map(message, range(1200, 1300))))
    assert await stored(admin) == list(range(1300))


async def test_refused_message_is_private_to_it(admin: Redis, streams: RedisStreams) -> None:
    """The others of its call, and other calls, are sent."""
    too_large = message(2, blob="x" * MAX_SIZE)
    call = streams.publish(message(1), too_large, message(3), message(4, to="not an address"))
    outcomes = await asyncio.gather(call, streams.publish(message(5)), return_exceptions=True)
    assert isinstance(outcomes[0], MessageRefused)
    assert "not an address" in outcomes[0].__notes__[0]
    assert outcomes[1] is None
    assert await stored(admin) == [1, 3, 5]


async def test_a_call_of_refused_messages_only_sends_nothing(admin: Redis, streams: RedisStreams) -> None:
    with pytest.raises(MessageRefused):
        await streams.publish(message(1, blob="x" * MAX_SIZE))
    assert await stored(admin) == []
    await streams.publish()  # nor does an empty one
    await has_connections(admin, "streams", 0)


async def test_messages_of_a_megabyte_arrive(admin: Redis, streams: RedisStreams) -> None:
    """Each goes alone, and those around them keep their places."""
    large = "x" * (MAX_SIZE - 400)
    await streams.publish(
        message(0), message(1, blob=large), message(2), message(3, blob=large), message(4, blob=large)
    )
    assert await stored(admin) == [0, 1, 2, 3, 4]


async def test_a_route_sends_to_another_stream_in_the_same_call(admin: Redis, streams: RedisStreams) -> None:
    await streams.publish(message(1), message(2, to="orders"), message(3), message(4, to="orders"))
    assert await stored(admin) == [1, 3]
    assert await stored(admin, "silbo:{orders}") == [2, 4]


async def test_script_flush_in_mid_run_is_not_noticed(admin: Redis, streams: RedisStreams, pubsub: RedisPubSub) -> None:
    async with opened(pubsub.subscribe()) as receiver:
        for round_ in range(20):
            numbers = range(round_ * 20, round_ * 20 + 20)
            await asyncio.gather(
                *[streams.publish(message(n)) for n in numbers],
                *[pubsub.publish(message(n)) for n in numbers],
                admin.script_flush(),
            )
        assert sorted(map(number, await receive(receiver, 400))) == list(range(400))
    assert sorted(await stored(admin)) == list(range(400))


async def test_one_unusable_stream_does_not_harm_the_others(admin: Redis, streams: RedisStreams) -> None:
    """A key of another type is refused with Redis's text, and nothing of it was sent."""
    await admin.set("silbo:{orders}", "a string")
    outcomes = await asyncio.gather(
        streams.publish(message(1)), streams.publish(message(2, to="orders")), return_exceptions=True
    )
    assert outcomes[0] is None
    assert isinstance(outcomes[1], BrokerUnavailable)
    assert "WRONGTYPE" in str(outcomes[1])
    with pytest.raises(DeliveryUnknown, match="1 of 2 messages were sent, the others were not: .*WRONGTYPE"):
        await streams.publish(message(3), message(4, to="orders"))
    assert await stored(admin) == [1, 3]


@pytest.mark.one_server
async def test_rest_of_a_call_does_not_overtake_what_failed(admin: Redis, streams: RedisStreams) -> None:
    """Of a call of several batches; other calls go on."""
    await admin.set("silbo:{orders}", "a string")
    call = streams.publish(message(0, to="orders"), *map(message, range(1, 700)))
    outcomes = await asyncio.gather(call, streams.publish(message(700)), return_exceptions=True)
    assert isinstance(outcomes[0], DeliveryUnknown)
    assert "WRONGTYPE" in str(outcomes[0])
    sent = await stored(admin)
    assert outcomes[1] is None and sent.pop() == 700
    assert sent == list(range(1, 1 + len(sent))) and len(sent) < 500


async def test_one_forbidden_channel_does_not_harm_the_others(pubsub_client: Redis, pubsub: RedisPubSub) -> None:
    async with opened(pubsub.subscribe()) as receiver, RedisPubSub(pubsub_client, app="web", prefix="other") as other:
        with pytest.raises(BrokerUnavailable, match="channel"):
            await other.publish(message(1))
        await pubsub.publish(message(2))
        assert [number(item) for item in await receive(receiver, 1)] == [2]


class SomeForbidden(JsonFormat):
    """A format of a host's own, some of whose channels the user may not publish to."""

    def channel(self, message: Message, prefix: str) -> str:
        return "forbidden" if message.message_name == "forbidden" else super().channel(message, prefix)


async def test_forbidden_channel_among_others_of_a_batch(pubsub_client: Redis) -> None:
    """One script call carries them all, and each caller gets the outcome of his own."""
    async with RedisPubSub(pubsub_client, app="web", format=SomeForbidden()) as broker:
        async with opened(broker.subscribe()) as receiver:
            names = ["a", "forbidden", "a", "a", "forbidden"]
            outcomes = await asyncio.gather(
                *[broker.publish(message(n, name)) for n, name in enumerate(names)],
                broker.publish(message(5, "forbidden"), message(6, "a")),
                return_exceptions=True,
            )
            assert [type(outcome) for outcome in outcomes] == [
                type(None),
                BrokerUnavailable,
                type(None),
                type(None),
                BrokerUnavailable,
                DeliveryUnknown,
            ]
            assert "1 of 2 messages were sent, the others were not" in str(outcomes[5])
            assert [number(item) for item in await receive(receiver, 4)] == [0, 2, 3, 6]


async def test_retention_is_by_time(admin: Redis, streams_client: Redis) -> None:
    """Redis's clock tells the age; entries younger than that stay, however many there are."""
    seconds, microseconds = await admin.time()
    now = seconds * 1000 + microseconds // 1000
    for age in (70_000, 61_000, 40_000, 10_000):
        await admin.xadd("silbo:{events}", {"message": JSON_OF % age}, id=f"{now - age}-0")
    async with RedisStreams(streams_client, app="web", retain=60) as streams:
        await streams.publish(message(0))
    assert await stored(admin) == [40_000, 10_000, 0]


async def test_without_retention_everything_stays(admin: Redis, streams_client: Redis) -> None:
    await admin.xadd("silbo:{events}", {"message": JSON_OF % 1}, id="1-0")
    async with RedisStreams(streams_client, app="web", retain=None) as streams:
        await streams.publish(message(2))
    assert await stored(admin) == [1, 2]


JSON_OF = '{"message_type":"ecst_event","message_name":"a","message_id":"x","payload":{"n":%d}}'


# -- the client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"decode_responses": True, "protocol": 3}, {"protocol": 2, "db": 3}])
@pytest.mark.parametrize("port", [False, True], ids=["unix", "tcp"])
async def test_any_client_settings_will_do(settings: dict[str, object], port: bool) -> None:
    """The connections are made from the client's settings, in bytes and RESP2; the client stays as it is."""
    with RedisServer(port=port) as server:
        settings = settings if port or "db" not in settings else settings | {"db": 0}
        async with Redis.from_url(server.url, client_name="mine", **settings) as client:
            async with RedisStreams(client, app="web") as streams, RedisPubSub(client, app="web") as pubsub:
                async with opened(streams.group("g", start="oldest")) as reader, opened(pubsub.subscribe()) as listener:
                    await asyncio.gather(streams.publish(message(1)), pubsub.publish(message(2)))
                    assert [number(item) for item in await receive(reader, 1)] == [1]
                    assert [number(item) for item in await receive(listener, 1)] == [2]
                    assert sum(row["name"] == "mine" for row in await client.client_list()) == 5
            assert await client.ping()


async def test_credentials_are_the_providers_and_no_publishers_context_is_in_it(own_redis: RedisServer) -> None:
    """The sender works for all publishers, so it has the context of none, as of a request's trace."""
    request: ContextVar[str] = ContextVar("request")
    seen: list[str | None] = []

    class Provider(CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            seen.append(request.get(None))
            return "streams", "password"

    request.set("one")
    async with Redis.from_url(own_redis.url, credential_provider=Provider()) as client:
        async with RedisStreams(client, app="web") as streams:
            await streams.publish(message(1))
    assert set(seen) == {None}


async def test_nothing_is_connected_before_the_first_publish(admin: Redis, streams: RedisStreams) -> None:
    streams.group("g", start="new")
    await has_connections(admin, "streams", 0)


def test_a_client_that_does_not_fit_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"redis.asyncio.RedisCluster, not redis.client.Redis"):
        RedisStreams(SyncRedis(), app="web")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"app": "my app"}, {"app": "web", "prefix": "a:b"}, {"app": "web", "prefix": ""}, {"app": "{web}"}]
)
def test_app_and_prefix_are_addresses(settings: dict[str, str]) -> None:
    for broker in (RedisStreams, RedisPubSub):
        with pytest.raises(AddressInvalid):
            broker(Redis(), **settings)


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"timeout": float("nan")}, {"retain": 0}, {"retain": -1}])
def test_durations_are_more_than_nothing(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="seconds, more than 0"):
        RedisStreams(Redis(), app="web", **settings)  # type: ignore[arg-type]


# -- lifecycle ----------------------------------------------------------------------------------------------


async def test_aclose_sends_what_waits_and_closes_its_connection(admin: Redis, streams_client: Redis) -> None:
    streams = RedisStreams(streams_client, app="web")
    publishes = [asyncio.ensure_future(streams.publish(message(n))) for n in range(700)]
    await asyncio.sleep(0)  # they are in line
    await streams.aclose()
    await streams.aclose()
    assert [publish.exception() for publish in publishes] == [None] * 700
    assert sorted(await stored(admin)) == list(range(700))
    await has_connections(admin, "streams", 0)
    with pytest.raises(BrokerUnavailable, match="closed"):
        await streams.publish(message())


async def test_a_user_without_rights_is_told_so_at_once(own_redis: RedisServer) -> None:
    async with Redis.from_url(own_redis.url, username="pubsub", password="password") as client:
        async with RedisStreams(client, app="web") as streams:
            with pytest.raises(BrokerUnavailable, match="permission"):
                await streams.publish(message())
    async with Redis.from_url(own_redis.url, username="streams", password="wrong") as client:
        async with RedisStreams(client, app="web", timeout=20) as streams:
            with pytest.raises(BrokerUnavailable, match="WRONGPASS"):
                await streams.publish(message())
            with pytest.raises(BrokerUnavailable, match="WRONGPASS"):
                await streams.group("g", start="new").open()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the first loop's connection can't be closed any more
def test_one_broker_serves_loops_one_after_another() -> None:
    with RedisServer() as server:
        streams = RedisStreams(Redis.from_url(server.url), app="web")

        async def use(first: int) -> list[int]:
            await asyncio.gather(*[streams.publish(message(n)) for n in range(first, first + 100)])
            async with Redis.from_url(server.url) as admin:
                return await stored(admin)

        asyncio.run(use(0))
        assert sorted(asyncio.run(use(100))) == list(range(200))

        async def close() -> None:
            await streams.publish(message())
            await streams.aclose()

        asyncio.run(close())
        with pytest.raises(BrokerUnavailable, match="closed"):
            asyncio.run(streams.publish(message()))
        gc.collect()  # here, where the warning is expected
