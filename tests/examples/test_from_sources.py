"""The documents' own examples, on silbo: what they promise is what comes out."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from examples.from_sources import diator_azure, diator_redis
from examples.from_sources.diator_meetings import JoinMeetingCommand, build
from silbo.brokers.redis import RedisPubSub
from silbo.wire.formats import DIATOR, DiatorFormat
from tests.support import fake_service_bus
from tools.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]

HARP = """\
heard system.ready
my_listener has {'foo': 'bar'}
the caller has {'foo': 'changed'}
MyEventListener has {'foo': 'bar'}
Audit has {'foo': 'bar'}
"""

JOINS = """\
User 1 joined meeting 1
Handle user 1 joined meeting 1 event
User 2 joined meeting 1
Handle user 2 joined meeting 1 event
User 3 joined meeting 1
Handle user 3 joined meeting 1 event
User 4 joined meeting 1
Handle user 4 joined meeting 1 event
There are 4 users in the room
4 events was handled
"""

FLOW = """\
3 items, at most 1 at once:
pear ordered, fig ordered, plum ordered, pear reserved, fig reserved, plum reserved
3 items, at most 2 at once:
pear ordered, fig ordered, plum ordered, pear reserved, fig reserved, plum reserved
"""
UNHANDLED = "WARNING nobody handles OrderEmpty: no listener is registered for it, and no bridge sends it\n"

ORDERS = ["order.placed o-1", "order.placed o-2"]


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", f"examples.from_sources.{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "SILBO_REDIS_URL": "", "SILBO_AZURE_CONNECTION": ""},
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.mark.parametrize(
    ("name", "said", "logged"),
    [
        ("harp", HARP, ""),
        ("cqrs_joins", JOINS, ""),
        ("cqrs_flow", FLOW, UNHANDLED),
    ],
    ids=["harp", "cqrs_joins", "cqrs_flow"],
)
def test_program_does_what_its_document_promises(name: str, said: str, logged: str) -> None:
    """HARP: names, envelopes, listeners, a container-wide dispatcher. python-cqrs: four events handled, each once, in the
    document's own words; its flow, with one warning for what nobody handles."""
    done = program(name)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, logged)


@pytest.mark.long
def test_notification_events_on_kafka_are_heard_again() -> None:
    """Kafka orders within a partition, and the two orders may have different ones."""
    done = program("cqrs_kafka")
    assert (done.returncode, sorted(done.stdout.splitlines()), done.stderr) == (0, ORDERS, "")


# -- Diator on Redis ----------------------------------------------------------------------------------------

MEETING = """\
before JoinMeetingCommand
meeting 1: New user joined!
meeting 1: 1 in the room
after, with None
before ReadMeetingQuery
after, with ReadMeetingQueryResult(meeting_id=1, link='https://meet.example/1')
the link is https://meet.example/1
before RenameUserCommand
after, with None
"""


@pytest.mark.parametrize("given", [False, True])
def test_diators_application_runs_with_a_redis_of_its_own_or_with_one_that_is_given(
    given: bool, own_redis: RedisServer
) -> None:
    """Commands, a query and its result, an event with two handlers in order, and middlewares of both styles."""
    done = program("diator_redis", *(("--redis", own_redis.url) if given else ()))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(MEETING)
    shown = re.findall(r"^python_diator_channel:\w+", done.stdout, re.MULTILINE)
    assert shown == ["python_diator_channel:notification_event", "python_diator_channel:ecst_event"]


async def test_what_leaves_is_what_diators_pages_show(
    own_redis: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Channel and JSON letter for letter, but for the ids and times; and the domain event is not among them."""
    async with Redis.from_url(own_redis.url) as client, client.pubsub() as everything:
        await everything.psubscribe("*")
        await everything.get_message(timeout=5)  # Redis has confirmed it
        await diator_redis.run(client)
        found = [await diator_redis.next_message(everything) for _ in range(2)]
        await client.publish("last", "")
        assert await diator_redis.next_message(everything) == ("last", b"")
    assert capsys.readouterr().out.startswith(MEETING)
    assert_as_documented(*found[0], "notification_event", "UserJoinedNotificationEvent", '"user_id":123')
    assert_as_documented(*found[1], "ecst_event", "UserChangedECSTEvent", '"user_id":123,"new_username":"kend"')


def assert_as_documented(channel: str | None, data: bytes, kind: str, name: str, fields: str) -> None:
    record = json.loads(data)
    its_id, when = record["message_id"], record["payload"]["event_timestamp"]
    if channel is not None:
        assert channel == f"python_diator_channel:{kind}:{its_id}"
    assert datetime.fromisoformat(when).tzinfo is None
    assert data.decode() == (
        f'{{"message_type":"{kind}","message_name":"{name}","message_id":"{its_id}",'
        f'"payload":{{"event_id":"{its_id}","event_timestamp":"{when}",{fields}}}}}'
    )


async def test_the_prefix_of_the_channels_can_be_another(own_redis: RedisServer) -> None:
    """As `channel_prefix` does on Diator."""
    async with Redis.from_url(own_redis.url) as client, client.pubsub() as outsider:
        await outsider.psubscribe("ours:notification_event:*")
        await outsider.get_message(timeout=5)
        async with RedisPubSub(client, app="meetings", format=DiatorFormat(prefix="ours")) as broker:
            await build(broker).send(JoinMeetingCommand(meeting_id=1, user_id=123))
        channel, data = await diator_redis.next_message(outsider)
    assert channel == f"ours:notification_event:{json.loads(data)['message_id']}"


async def test_messages_open_no_connections_and_subscribe_to_nothing(
    own_redis: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Diator opens one for each message and subscribes on it to the message's own channel; at once, half of 100 fail."""
    async with Redis.from_url(own_redis.url) as client, RedisPubSub(client, app="meetings", format=DIATOR) as broker:
        mediator = build(broker)
        join = JoinMeetingCommand(meeting_id=1, user_id=1)
        await mediator.send(join)
        before: Any = await client.info("stats")
        for _ in range(100):
            await mediator.send(join)
        await asyncio.gather(*(mediator.send(join) for _ in range(100)))
        after: Any = await client.info("stats")
        commands: Any = await client.info("commandstats")
    assert after["total_connections_received"] == before["total_connections_received"]
    assert commands["cmdstat_publish"]["calls"] == 201 and "cmdstat_subscribe" not in commands
    assert capsys.readouterr().out.count("New user joined!") == 201


# -- Diator on Azure Service Bus ----------------------------------------------------------------------------


async def test_diators_application_on_azure_service_bus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the topic, within the timeout; and the client stays open, which Diator closes after each message."""
    timeouts: list[float] = []
    closed: list[object] = []
    send, close = fake_service_bus.Link.send_message_async, fake_service_bus.Client.close

    async def noted(self: fake_service_bus.Link, message: Any, timeout: float) -> None:
        timeouts.append(timeout)
        await send(self, message, timeout)

    async def noted_close(self: fake_service_bus.Client) -> None:
        closed.append(self)
        await close(self)

    monkeypatch.setattr(fake_service_bus.Link, "send_message_async", noted)
    monkeypatch.setattr(fake_service_bus.Client, "close", noted_close)
    service = fake_service_bus.ServiceBus()
    async with service.client() as client:
        await diator_azure.run(client, "meetings")
        assert [sender.is_closed for sender in service.senders] == [True]  # one, for both messages
        await diator_azure.run(client, "meetings")
        assert closed == []
    assert list(service.topics) == ["meetings"]
    joined, renamed, *_ = (b"".join(message.body) for message in service.topics["meetings"])
    assert_as_documented(None, joined, "notification_event", "UserJoinedNotificationEvent", '"user_id":123')
    assert_as_documented(None, renamed, "ecst_event", "UserChangedECSTEvent", '"user_id":123,"new_username":"kend"')
    assert len(service.topics["meetings"]) == len(timeouts) == 4
    assert all(14 < timeout <= 15 for timeout in timeouts)


def test_on_azure_it_says_what_it_needs() -> None:
    done = program("diator_azure")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Set SILBO_AZURE_CONNECTION to")
