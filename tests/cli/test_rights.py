"""The commands that look, run with the rights that the documentation gives: to programs, and to an operator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from silbo import Message
from silbo.brokers.redis import RedisStreams
from silbo.event import new_id
from tests.support.command_line import silbo
from tests.support.redis_streams import ACL, opened, receive
from tools.redis_server import RedisServer

EVENT = new_id()


@pytest.fixture
async def where(own_redis: RedisServer, request: pytest.FixtureRequest) -> AsyncIterator[tuple[str, ...]]:
    """A stream with a group, and the URL of a user."""
    user: str = request.param
    async with Redis.from_url(own_redis.url) as admin, RedisStreams(admin, app="shop") as streams:
        await admin.execute_command("ACL", "SETUSER", user, *ACL[user].split())
        async with opened(streams.group("billing", start="new", consumer="billing-0")) as receiver:
            await streams.publish(Message("notification_event", "order.paid", EVENT, {}))
            await receive(receiver, 1)
            yield "--redis", own_redis.url.replace("unix://", f"unix://{user}:password@")


@pytest.mark.every_redis
@pytest.mark.parametrize("where", ["streams", "operator"], indirect=True)
async def test_groups_and_why_need_the_rights_of_a_program(where: tuple[str, ...]) -> None:
    """An operator with the URL of a program sees what there is; without SCAN, of the default stream."""
    groups, why, doctor = await asyncio.gather(
        silbo("groups", *where, "--json"), silbo("why", EVENT, *where, "--json"), silbo("doctor", *where, "--json")
    )
    assert (groups.code, why.code) == (0, 0), (groups.err, why.err)
    (consumer,) = groups.object["consumers"]
    assert groups.object["in_hand"] == 1 and consumer["pid"] is not None
    assert why.object["entries"][0]["groups"][0]["state"] == "in hand"
    levels = {found["check"]: found["level"] for found in doctor.objects}
    assert levels["silbo:{events}"] == levels["silbo:{events} billing"] == "ok", doctor.out


@pytest.mark.every_redis
@pytest.mark.parametrize("where", ["operator"], indirect=True)
async def test_operator_may_look_at_everything(where: tuple[str, ...]) -> None:
    """And write nothing: the doctor says that a program with these rights could not publish."""
    tail, top, doctor = await asyncio.gather(
        silbo("tail", *where, "--since", "1h", "--limit", 1, "--json"),
        silbo("top", *where, "--limit", 1, "--json"),
        silbo("doctor", *where, "--json"),
    )
    assert (tail.code, top.code) == (0, 0), (tail.err, top.err)
    found = {each["check"]: each for each in doctor.objects}
    assert found["persistence"]["level"] == found["eviction"]["level"] == "ok"
    assert "XADD" in found["rights"]["text"] or "can't be asked" in found["rights"]["text"]
