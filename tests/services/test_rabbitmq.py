"""RabbitMQ, on a real server: what it is sent, what it refuses, and what happens when it goes away."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aio_pika
import pytest
from aio_pika.abc import AbstractQueue, AbstractRobustConnection

from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent
from silbo.brokers.rabbitmq import RabbitMQ
from silbo.errors import AddressInvalid, BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.message import Message, instance
from silbo.protocols import Publisher
from silbo.testing.conformance import ADDRESS, CHECKS, Check, message
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON
from tests.support.broker_rigs import killed, paused
from tests.support.snippets import execute, shown, without_pause
from tools.rabbitmq import RabbitMQServer

# One server, one test at a time: they kill and freeze it.
pytestmark = [pytest.mark.rabbitmq, pytest.mark.xdist_group("rabbitmq")]

TIMEOUT = 2.0
DOCS = Path(__file__).resolve().parents[2] / "docs/howto"


@pytest.fixture(scope="module")
def server() -> Iterator[RabbitMQServer]:
    with RabbitMQServer() as server:
        yield server


@pytest.fixture
async def connection(server: RabbitMQServer) -> AsyncIterator[AbstractRobustConnection]:
    """The host's."""
    async with await aio_pika.connect_robust(server.url, reconnect_interval=0.1) as connection:
        yield connection


@dataclass
class Bound:
    """A durable topic exchange, and a queue that gets all that is sent there."""

    exchange: str
    queue: AbstractQueue
    got: list[aio_pika.abc.AbstractIncomingMessage] = field(default_factory=list)

    async def arrived(self) -> list[aio_pika.abc.AbstractIncomingMessage]:
        """Everything up to now."""
        with suppress(aio_pika.exceptions.AMQPError, ConnectionError, RuntimeError):  # it connects again
            while (incoming := await self.queue.get(no_ack=True, fail=False)) is not None:
                self.got.append(incoming)
        return self.got

    async def wait_for(self, many: int) -> list[aio_pika.abc.AbstractIncomingMessage]:
        async with asyncio.timeout(20):
            while len(await self.arrived()) < many:
                await asyncio.sleep(0.02)
        return self.got


@asynccontextmanager
async def bound(
    connection: AbstractRobustConnection, exchange: str | None = None, key: str = "#", **arguments: Any
) -> AsyncIterator[Bound]:
    channel = await connection.channel()
    declared = await channel.declare_exchange(exchange or f"events-{uuid.uuid4().hex}", "topic", durable=True)
    queue = await channel.declare_queue(f"{declared.name}-queue", durable=True, arguments=arguments)
    await queue.bind(declared, key)
    try:
        yield Bound(declared.name, queue)
    finally:
        await queue.delete(if_unused=False, if_empty=False)
        await declared.delete()
        await channel.close()


@pytest.fixture
async def events(connection: AbstractRobustConnection) -> AsyncIterator[Bound]:
    async with bound(connection) as events:
        yield events


@pytest.fixture
async def broker(connection: AbstractRobustConnection, events: Bound) -> AsyncIterator[RabbitMQ]:
    async with RabbitMQ(connection, events.exchange, app="web", timeout=TIMEOUT) as broker:
        yield broker


# -- the public suite ---------------------------------------------------------------------------------------


@dataclass
class Rig:
    publisher: Publisher
    server: RabbitMQServer
    bounds: dict[str | None, Bound]

    async def arrived(self, to: str | None = None) -> Sequence[Message]:
        return [JSON.decode(incoming.body) for incoming in await self.bounds[to].arrived()]

    def outage(self) -> AbstractAsyncContextManager[object]:
        return killed(self.server)

    def freeze(self) -> AbstractAsyncContextManager[object]:
        return paused(self.server)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conforms(
    check: Check, server: RabbitMQServer, connection: AbstractRobustConnection, events: Bound, broker: RabbitMQ
) -> None:
    async with bound(connection, ADDRESS) as orders:
        await check(Rig(broker, server, {None: events, ADDRESS: orders}))


# -- what is sent -------------------------------------------------------------------------------------------


async def test_message_can_be_routed_and_filtered_without_being_decoded(broker: RabbitMQ, events: Bound) -> None:
    one = message(1)
    await broker.publish(one)
    (incoming,) = await events.wait_for(1)
    assert incoming.routing_key == incoming.type == "conformance.checked"
    assert incoming.headers == {
        "message_type": "notification_event",
        "message_name": "conformance.checked",
        "message_id": one.message_id,
        "app": "web",
        "instance": instance(),
        "publication": one.headers["publication"],
        "version": "1",
        "key": "k1",
    }
    assert incoming.message_id == one.headers["publication"]
    assert (incoming.app_id, incoming.content_type) == ("web", "application/json")
    assert incoming.delivery_mode == aio_pika.DeliveryMode.PERSISTENT


async def test_event_name_is_what_queues_are_bound_by(connection: AbstractRobustConnection) -> None:
    """A queue bound by user.* gets what a listener on user.* would."""
    name = EventName("user.joined", NotificationEvent)
    async with bound(connection, key="user.*") as users:
        dispatcher = AsyncEventDispatcher()
        async with RabbitMQ(connection, users.exchange, app="web", mandatory=False) as broker:
            dispatcher.add_subscriber(Bridge(broker))
            await dispatcher.adispatch("order.paid", NotificationEvent())
            await dispatcher.adispatch(name, NotificationEvent())
        assert [incoming.routing_key for incoming in await users.wait_for(1)] == ["user.joined"]


@pytest.mark.parametrize(
    ("format_", "media"), [(DIATOR, "application/json"), (CLOUDEVENTS, "application/cloudevents+json")]
)
async def test_other_formats(connection: AbstractRobustConnection, events: Bound, format_: Any, media: str) -> None:
    async with RabbitMQ(connection, events.exchange, app="web", format=format_) as broker:
        await broker.publish(message(1))
    (incoming,) = await events.wait_for(1)
    assert incoming.content_type == media
    assert format_.decode(incoming.body).payload["n"] == 1
    assert ("headers" in json.loads(incoming.body)) is False


# -- what is refused ----------------------------------------------------------------------------------------


async def test_message_that_no_queue_is_bound_for_is_refused(connection: AbstractRobustConnection) -> None:
    """RabbitMQ would drop it and say nothing: a message lost without an error."""
    async with bound(connection, key="conformance.*") as some, RabbitMQ(connection, some.exchange, app="web") as broker:
        other = Message("notification_event", "nobody.listens", "x", {}, {"publication": "p"})
        with pytest.raises(MessageRefused, match=r"nobody\.listens.*no queue is bound.*mandatory=False"):
            await broker.publish(message(1), other, message(2))
        assert [json.loads(incoming.body)["payload"]["n"] for incoming in await some.wait_for(2)] == [1, 2]


async def test_message_that_no_queue_is_bound_for_is_dropped_on_request(connection: AbstractRobustConnection) -> None:
    async with bound(connection, key="other") as some:
        async with RabbitMQ(connection, some.exchange, app="web", mandatory=False) as broker:
            await broker.publish(message(1))
        assert await some.arrived() == []


async def test_exchange_that_is_missing_is_named_and_harms_nobody_else(
    connection: AbstractRobustConnection, broker: RabbitMQ, events: Bound
) -> None:
    missing = f"missing-{uuid.uuid4().hex}"
    with pytest.raises(BrokerUnavailable, match=f"no exchange '{missing}'.*not sent"):
        await broker.publish(message(1, to=missing))
    await broker.publish(message(2))
    await events.wait_for(1)
    async with bound(connection, missing) as found:  # from now on
        await broker.publish(message(3, to=missing))
        await found.wait_for(1)


async def test_exchange_that_is_deleted_under_way(connection: AbstractRobustConnection) -> None:
    """RabbitMQ closes the channel; whoever declares it again finds the broker at work."""
    async with bound(connection) as first, RabbitMQ(connection, first.exchange, app="web", timeout=TIMEOUT) as broker:
        await broker.publish(message(1))
        channel = await connection.channel()
        await channel.exchange_delete(first.exchange)
        with pytest.raises(DeliveryUnknown, match="no exchange"):
            await broker.publish(message(2))
        with pytest.raises(BrokerUnavailable, match="no exchange"):
            await broker.publish(message(3))
        again = await channel.declare_exchange(first.exchange, "topic", durable=True)
        await first.queue.bind(again, "#")
        await broker.publish(message(4))
        assert [json.loads(incoming.body)["payload"]["n"] for incoming in await first.wait_for(2)] == [1, 4]
        await channel.close()


async def test_queue_that_is_full_leaves_it_unknown(connection: AbstractRobustConnection) -> None:
    """It may be one of several queues: the others have it."""
    limit = {"x-max-length": 1, "x-overflow": "reject-publish"}
    async with bound(connection, **limit) as full, RabbitMQ(connection, full.exchange, app="web") as broker:
        await broker.publish(message(1))
        with pytest.raises(DeliveryUnknown, match="did not confirm it"):
            await broker.publish(message(2))


async def test_exchange_may_have_any_name_that_rabbitmq_takes(connection: AbstractRobustConnection) -> None:
    """It is the host's, and may be older than silbo."""
    name = f"shop:events/{uuid.uuid4().hex}"
    async with bound(connection, name) as some, RabbitMQ(connection, name, app="web") as broker:
        await broker.publish(message(1))
        await some.wait_for(1)
    with pytest.raises(AddressInvalid, match="an exchange"):
        RabbitMQ(connection, "", app="web")


async def test_name_that_is_too_long_for_a_routing_key_is_refused(broker: RabbitMQ) -> None:
    with pytest.raises(MessageRefused, match="255"):
        await broker.publish(Message("notification_event", "é" * 128, "x", {}))


# -- what goes away -----------------------------------------------------------------------------------------


async def test_connection_that_breaks_is_connected_again(
    connection: AbstractRobustConnection, broker: RabbitMQ, events: Bound
) -> None:
    """A publish waits for it within its deadline; what was confirmed before is there."""
    await broker.publish(message(1))
    assert connection.transport is not None
    await connection.transport.connection.close(ConnectionError("cut by the test"))
    await broker.publish(message(2))
    assert [json.loads(incoming.body)["payload"]["n"] for incoming in await events.wait_for(2)] == [1, 2]


async def test_server_that_does_not_answer_holds_up_nobody_for_long(
    server: RabbitMQServer, broker: RabbitMQ, events: Bound
) -> None:
    await broker.publish(message(1))
    loop = asyncio.get_running_loop()
    server.pause()
    try:
        begin = loop.time()
        with pytest.raises(DeliveryUnknown, match="has not answered"):
            await broker.publish(message(2))
        assert TIMEOUT * 0.9 < loop.time() - begin < TIMEOUT + 10
        begin = loop.time()
        ends = await asyncio.gather(*(broker.publish(message(n)) for n in range(10, 20)), return_exceptions=True)
        assert [type(end) for end in ends[1:]] == [BrokerUnavailable] * 9
        assert loop.time() - begin < 1.5 + 10  # the first of them has tried
    finally:
        server.resume()
    async with asyncio.timeout(20):
        while True:
            with suppress(BrokerUnavailable, DeliveryUnknown):
                await broker.publish(message(100))
                break
    numbers = [json.loads(incoming.body)["payload"]["n"] for incoming in await events.wait_for(2)]
    assert numbers[0] == 1
    assert not set(numbers) & set(range(11, 20))


async def test_connection_that_the_host_has_closed(server: RabbitMQServer, events: Bound) -> None:
    connection = await aio_pika.connect_robust(server.url)
    broker = RabbitMQ(connection, events.exchange, app="web")
    await broker.publish(message(1))
    await connection.close()
    with pytest.raises(BrokerUnavailable, match="the connection is closed; not sent"):
        await broker.publish(message(2))
    await broker.aclose()


async def test_closing_leaves_the_connection_open(connection: AbstractRobustConnection, events: Bound) -> None:
    assert connection.transport is not None
    before = len(connection.transport.connection.channels)
    broker = RabbitMQ(connection, events.exchange, app="web")
    await broker.publish(message(1))
    assert len(connection.transport.connection.channels) == before + 1
    await broker.aclose()
    await broker.aclose()
    assert len(connection.transport.connection.channels) == before
    await events.wait_for(1)


async def test_closing_ends_although_the_server_does_not_answer(
    server: RabbitMQServer, connection: AbstractRobustConnection, events: Bound
) -> None:
    broker = RabbitMQ(connection, events.exchange, app="web", timeout=0.5)
    await broker.publish(message(1))
    server.pause()
    try:
        async with asyncio.timeout(5):
            await broker.aclose()
    finally:
        server.resume()


async def test_page_sends_as_it_says(
    server: RabbitMQServer, connection: AbstractRobustConnection, capsys: pytest.CaptureFixture[str]
) -> None:
    sending = shown(DOCS / "brokers.md", "aio_pika").replace("amqp://guest:guest@localhost/", server.url)
    await execute(sending, {})
    assert capsys.readouterr().out == "user.joined\n"
    async with connection.channel() as channel:
        await channel.queue_delete("users")
        await channel.exchange_delete("events")


async def test_loop_of_the_page_parks_junk_and_goes_on_when_a_listener_fails(
    server: RabbitMQServer, connection: AbstractRobustConnection
) -> None:
    """Junk is parked at once; what fails comes again, and is parked at the limit; the others are heard once."""
    page: dict[str, Any] = {"__name__": __name__, "asyncio": asyncio, "aio_pika": aio_pika}
    await execute("from silbo.errors import MessageInvalid\n" + shown(DOCS / "receive.md", "async def invoice"), page)
    page["dispatcher"] = AsyncEventDispatcher()
    heard: Counter[int] = Counter()

    @page["dispatcher"].listen("user.joined")
    async def fail_twice_or_for_ever(event: Any) -> None:
        heard[event.user_id] += 1
        if event.user_id == 8 or (event.user_id == 7 and heard[7] <= 2):
            raise OSError("not now")

    channel = await connection.channel()
    exchange = await channel.declare_exchange("events", "topic", durable=True)
    loop = without_pause(shown(DOCS / "receive.md", "queue.iterator")).replace(
        "amqp://guest:guest@localhost/", server.url
    )
    consuming = asyncio.create_task(execute(loop, page))
    parked: dict[object, str] = {}
    try:
        async with asyncio.timeout(30), RabbitMQ(connection, "events", app="web") as broker:
            web = AsyncEventDispatcher()
            web.add_subscriber(Bridge(broker))
            for user_id in (7, 8, 9):
                while True:
                    with suppress(MessageRefused):  # the queue is not bound yet
                        await web.adispatch(page["USER_JOINED"], page["UserJoined"](user_id))
                        break
            await exchange.publish(aio_pika.Message(b"junk"), "user.joined")
            queue = await channel.get_queue("billing.parked")
            while len(parked) < 2 or heard[7] < 3:
                assert not consuming.done(), consuming
                if (incoming := await queue.get(no_ack=True, fail=False)) is not None:
                    (death,) = cast("list[dict[str, Any]]", incoming.headers["x-death"])
                    user = json.loads(incoming.body)["payload"]["user_id"] if incoming.body != b"junk" else "junk"
                    parked[user] = death["reason"]
                await asyncio.sleep(0.02)
    finally:
        consuming.cancel()
        await asyncio.wait([consuming])
        for name in ("billing", "billing.parked"):
            await channel.queue_delete(name)
        await exchange.delete()
        await channel.close()
    assert parked == {"junk": "rejected", 8: "delivery_limit"}
    assert heard == {7: 3, 8: 6, 9: 1}  # once, and five times more
