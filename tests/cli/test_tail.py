"""`silbo tail` beside real publishers: what it shows, of which messages, from when on, and how it ends."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from chaos.faketime import wound
from silbo import Message
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.errors import BrokerUnavailable
from silbo.event import new_id
from silbo.operations.tail import follow_streams, has_values
from tests.support.command_line import SILBO, silbo, terminal
from tests.support.faketime import require_faketime
from tests.support.redis_streams import eventually
from tools.redis_server import RedisServer


def told(name: str, to: str | None = None, **payload: Any) -> Message:
    return Message("notification_event", name, new_id(), payload, {"key": "7"}, to)


@pytest.mark.every_redis
async def test_what_came_is_shown_and_chosen(redis: Redis, redis_url: str, prefix: str) -> None:
    """By pattern, by values of the payload, from a time or an entry on; of all streams, or one."""
    where = ("--redis", redis_url, "--prefix", prefix, "--since", "1h")
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(
            told("order.paid", order={"id": 7, "state": "new"}),
            told("order.paid", order={"id": 8, "state": "new"}),
            told("order.sent", items=[{"sku": "a"}]),
            told("user.joined", to="users", who="Ada"),
        )
    await redis.xadd(f"{prefix}:{{events}}", {"message": b"not \x1b[31m"})
    every, paid, chosen, listed, users, text = await asyncio.gather(
        silbo("tail", *where, "--limit", 5, "--json"),
        silbo("tail", "*.paid", *where, "--limit", 2, "--json"),
        silbo("tail", *where, "--where", "order.id=8", "--where", "order.state=new", "--limit", 1, "--json"),
        silbo("tail", *where, "--where", "items.0.sku=a", "--limit", 1, "--json"),
        silbo("tail", *where, "--stream", "users", "--limit", 1, "--json"),
        silbo("tail", *where, "--limit", 5),
    )
    assert {done.code for done in (every, paid, chosen, listed, users, text)} == {0}
    names = [seen["message"] and seen["message"]["message_name"] for seen in every.objects]
    assert sorted(map(str, names)) == ["None", "order.paid", "order.paid", "order.sent", "user.joined"]
    assert [seen["message"]["payload"]["order"]["id"] for seen in paid.objects] == [7, 8]
    assert chosen.object["message"]["payload"]["order"]["id"] == 8
    assert listed.object["message"]["message_name"] == "order.sent"
    assert users.object["address"] == f"{prefix}:{{users}}"
    assert 'user.joined {"who": "Ada"} id=' in text.out and "(no message) not \\x1b[31m" in text.out
    first = paid.objects[0]
    after = await silbo(
        "tail",
        "order.paid",
        "--redis",
        redis_url,
        "--prefix",
        prefix,
        "--since",
        first["entry"],
        "--limit",
        1,
        "--json",
    )
    assert after.object["entry"] == paid.objects[1]["entry"]


async def test_duration_counts_back_from_the_clock_of_redis(redis: Redis, redis_url: str, prefix: str) -> None:
    """This machine's clock may differ."""
    require_faketime()
    event = told("order.paid", n=1)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(event)
    where = ("--redis", redis_url, "--prefix", prefix, "--since", "30m", "--json")
    tail, why = await asyncio.gather(
        silbo("tail", *where, "--limit", 1, env=wound("+1h"), command=SILBO),
        silbo("why", event.message_id, *where, env=wound("+1h"), command=SILBO),
    )
    assert event.message_id in tail.out and why.code == 0


async def test_outage_is_an_error_where_no_hook_is_given(own_redis: RedisServer) -> None:
    async with Redis.from_url(own_redis.url) as client:
        async with RedisStreams(client, app="shop") as streams:
            await streams.publish(told("order.paid"))
        seen = follow_streams(client, since=datetime(2026, 1, 1, tzinfo=UTC))
        async with asyncio.timeout(30):
            await anext(seen)
            own_redis.kill()
            with pytest.raises(BrokerUnavailable):
                await anext(seen)


async def test_what_comes_is_shown_until_ctrl_c(redis: Redis, redis_url: str, prefix: str) -> None:
    """In colours at a terminal; it begins with what comes next, and takes nothing from a group."""
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(told("before"))
        await redis.xgroup_create(f"{prefix}:{{events}}", "billing", "0")
        async with terminal("tail", "--redis", redis_url, "--prefix", prefix) as screen:

            async def publish() -> bool:
                await streams.publish(told("order.paid", order=7))
                return "order.paid" in screen.shown

            watching = asyncio.create_task(screen.until("order.paid"))
            await eventually(publish)
            await watching
            screen.type("\x03")
            assert await screen.end() == 130
    assert "\x1b[" in screen.shown and "before" not in screen.shown and "interrupted" in screen.shown
    (group,) = await redis.xinfo_groups(f"{prefix}:{{events}}")
    assert group["pending"] == 0 and group["last-delivered-id"] == b"0-0"


async def test_messages_of_pubsub(redis: Redis, redis_url: str, prefix: str) -> None:
    async with RedisPubSub(redis, app="shop", prefix=prefix) as pubsub:
        tail = asyncio.create_task(
            silbo("tail", "order.*", "--pubsub", "--redis", redis_url, "--prefix", prefix, "--limit", 1, "--json")
        )

        async def publish() -> bool:
            await pubsub.publish(told("user.joined"), told("order.paid", order=7))
            return tail.done()

        await eventually(publish)
        done = await tail
    assert done.code == 0 and done.object["message"]["message_name"] == "order.paid" and done.object["entry"] is None


async def test_goes_on_after_an_outage_where_it_was(own_redis: RedisServer, prefix: str) -> None:
    outages: list[Exception] = []
    async with Redis.from_url(own_redis.url) as client, RedisStreams(client, app="shop", prefix=prefix) as streams:
        await streams.publish(told("first"))
        following = follow_streams(
            client, prefix=prefix, since=datetime.now(UTC) - timedelta(hours=1), on_outage=outages.append
        )
        async with asyncio.timeout(60):
            first = await anext(following)
            await asyncio.to_thread(own_redis.kill)
            waiting = asyncio.ensure_future(anext(following))
            await eventually(lambda: _is_true(outages))
            await asyncio.to_thread(own_redis.restart)
            await client.xadd(f"{prefix}:{{events}}", {"message": b"{}"})
            second = await waiting
            await following.aclose()
    assert first.message is not None and first.message.message_name == "first"
    assert second.entry is not None and first.entry is not None and second.entry > first.entry


async def _is_true(value: object) -> bool:
    return bool(value)


def test_values_are_compared_as_they_are_in_json() -> None:
    message = told("x", n=7, text="7", yes=True, nothing=None, deep={"a": [1, {"b": "c"}]})
    for path, text, is_equal in (
        ("n", "7", True),
        ("n", "7.0", False),
        ("text", "7", True),
        ("yes", "true", True),
        ("yes", "1", False),
        ("nothing", "null", True),
        ("deep.a.1.b", "c", True),
        ("deep.a.5", "c", False),
        ("deep.a.b", "c", False),
        ("absent", "null", False),
    ):
        assert has_values(message, {tuple(path.split(".")): text}) is is_equal, path
    assert not has_values(None, {("n",): "7"})


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["order.pa*"], "a '*' stands for a whole segment"),
        (["--where", "order"], "is no condition"),
        (["--since", "yesterday"], "is no time"),
        (["--pubsub", "--since", "1h"], "Pub/Sub keeps nothing"),
    ],
)
async def test_wrong_arguments(arguments: list[str], hint: str, redis_url: str) -> None:
    done = await silbo("tail", "--redis", redis_url, *arguments)
    assert done.code == 2 and hint in done.err, done.err


async def test_stream_that_is_missing_is_an_error(redis_url: str, prefix: str) -> None:
    """A wrong prefix must not look like a stream where nothing happens."""
    done = await silbo("tail", "--redis", redis_url, "--prefix", prefix)
    assert done.code == 1 and "there is no stream" in done.err
