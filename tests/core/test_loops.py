"""Objects that belong to one event loop, used in two: an error at once that names both, or it works; never a hang."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from silbo import AsyncEventDispatcher, Bridge, Consumer, Message, NotificationEvent, Outbox
from silbo._loops import LoopBinding, describe_lookup
from silbo.brokers._library_broker import LibraryBroker
from silbo.brokers._sender import OutgoingMessage
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import DeadLetters, RedisInbox, RedisPubSub, RedisStreams
from silbo.errors import BrokerUnavailable, LoopConflict
from silbo.message import Delivery
from silbo.outbox.relay import Relay
from silbo.outbox.rows import Quota
from silbo.stores.memory import MemoryStore
from silbo.stores.sqlalchemy import SQLAlchemyInbox, SQLAlchemyStore
from silbo.stores.sqlite import SQLiteStore
from silbo.wire.formats import JSON
from tests.support.memory_broker import message
from tests.support.store_conformance import packed

Use: TypeAlias = "Callable[[], Coroutine[Any, Any, Any]]"
PATIENCE = 60.0


@dataclass(frozen=True)
class Where:
    """A Redis, a prefix and a folder of the test's own."""

    url: str
    prefix: str
    folder: Path


@pytest.fixture
def where(redis_url: str, prefix: str, tmp_path: Path) -> Where:
    return Where(redis_url, prefix, tmp_path)


async def in_another_loop(use: Use) -> Any:
    """Run a use in a thread of its own, with its own loop, while this loop goes on."""
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, lambda: asyncio.run(limited(use())))


async def limited(work: Awaitable[Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        return await work


# -- the objects, each with a use that can be repeated -------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """An object that needs no opening."""

    use: Use
    aclose: Use


async def do_nothing() -> None: ...


def streams(where: Where) -> Made:
    broker = RedisStreams(Redis.from_url(where.url), app="web", prefix=where.prefix)
    return Made(lambda: broker.publish(message(1)), broker.aclose)


def sequenced(where: Where) -> Made:
    broker = RedisStreams(Redis.from_url(where.url), app="web", prefix=where.prefix)
    return Made(lambda: broker.publish_sequenced("outbox", 1, []), broker.aclose)


def pubsub(where: Where) -> Made:
    broker = RedisPubSub(Redis.from_url(where.url), app="web", prefix=where.prefix)
    return Made(lambda: broker.publish(message(1)), broker.aclose)


def ask(inbox: Any) -> Use:
    async def use() -> None:
        async with inbox.handling("g", "1"):
            pass

    return use


def redis_inbox(where: Where) -> Made:
    inbox = RedisInbox(Redis.from_url(where.url), prefix=where.prefix)
    return Made(ask(inbox), inbox.aclose)


def dead_letters(where: Where) -> Made:
    dead = DeadLetters(Redis.from_url(where.url), prefix=where.prefix)
    return Made(dead.count, dead.aclose)


class OtherBroker(LibraryBroker):
    """As Kafka's, RabbitMQ's and Service Bus's."""

    kind = "Other topic"

    async def _send(self, address: str, messages: Sequence[OutgoingMessage]) -> None:
        for outgoing in messages:
            outgoing.mark_sent()


def library(where: Where) -> Made:
    broker = OtherBroker("events", app="web", timeout=5, format=JSON)
    return Made(lambda: broker.publish(message(1)), broker.aclose)


def memory(where: Where) -> Made:
    broker = MemoryBroker()
    return Made(lambda: broker.publish(message(1)), do_nothing)


def memory_open(where: Where) -> Made:
    return Made(MemoryBroker().group("g", start="oldest").open, do_nothing)


def memory_store(where: Where) -> Made:
    store = MemoryStore()
    return Made(lambda: store.add(packed(1), Quota()), do_nothing)


def bridged(where: Where) -> Made:
    """The error reaches the code that dispatches."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(MemoryBroker()))
    return Made(lambda: dispatcher.adispatch("x", NotificationEvent()), do_nothing)


def bridge_queue(where: Where) -> Made:
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(bridge := Bridge(MemoryBroker(), wait=False))
    return Made(lambda: dispatcher.adispatch("x", NotificationEvent()), bridge.aclose)


@asynccontextmanager
async def redis_group(where: Where) -> AsyncGenerator[Use]:
    broker = RedisStreams(Redis.from_url(where.url), app="web", prefix=where.prefix)
    receiver = await broker.group("g", start="new").open()
    yield lambda: receiver.receive(1)
    await receiver.aclose()


@asynccontextmanager
async def redis_acknowledgements(where: Where) -> AsyncGenerator[Use]:
    broker = RedisStreams(Redis.from_url(where.url), app="web", prefix=where.prefix)
    await broker.publish(message(1))
    receiver = await broker.group("g", start="oldest").open()
    items = await receiver.receive(1)
    (delivery,) = [item for item in items if isinstance(item, Delivery)]
    yield lambda: receiver.count(delivery)
    await receiver.aclose()
    await broker.aclose()


@asynccontextmanager
async def redis_subscription(where: Where) -> AsyncGenerator[Use]:
    receiver = await RedisPubSub(Redis.from_url(where.url), app="web", prefix=where.prefix).subscribe().open()
    yield lambda: receiver.receive(1)
    await receiver.aclose()


@asynccontextmanager
async def memory_group(where: Where) -> AsyncGenerator[Use]:
    broker = MemoryBroker()
    receiver = await broker.group("g", start="oldest").open()
    yield receiver.ack


@asynccontextmanager
async def sqlite(where: Where) -> AsyncGenerator[Use]:
    store = SQLiteStore(where.folder / "outbox.db")
    await store.open()
    yield lambda: store.add(packed(1), Quota())
    await store.aclose()


@asynccontextmanager
async def sqlite_status(where: Where) -> AsyncGenerator[Use]:
    store = SQLiteStore(where.folder / "outbox.db")
    await store.open()
    yield store.status
    await store.aclose()


@asynccontextmanager
async def sqlalchemy(where: Where) -> AsyncGenerator[Use]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{where.folder / 'host.db'}")
    store = SQLAlchemyStore(engine)
    await store.create()
    await store.open()
    yield lambda: store.add(packed(1), Quota())
    await store.aclose()
    await engine.dispose()


@asynccontextmanager
async def sqlalchemy_inbox(where: Where) -> AsyncGenerator[Use]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{where.folder / 'host.db'}")
    inbox = SQLAlchemyInbox(engine)
    await inbox.create()
    yield ask(inbox)
    await engine.dispose()


@asynccontextmanager
async def outbox(where: Where) -> AsyncGenerator[Use]:
    async with Outbox(MemoryStore(), MemoryBroker()) as publisher:
        yield lambda: publisher.publish(message(1))


@asynccontextmanager
async def outbox_status(where: Where) -> AsyncGenerator[Use]:
    async with Outbox(MemoryStore(), MemoryBroker()) as publisher:
        yield publisher.status


NEED_NO_OPENING = [
    streams,
    sequenced,
    pubsub,
    redis_inbox,
    dead_letters,
    library,
    memory,
    memory_open,
    memory_store,
    bridged,
    bridge_queue,
]
ARE_OPENED = [
    redis_group,
    redis_acknowledgements,
    redis_subscription,
    memory_group,
    sqlite,
    sqlite_status,
    sqlalchemy,
    sqlalchemy_inbox,
    outbox,
    outbox_status,
]


@asynccontextmanager
async def opened(make: Any, where: Where) -> AsyncGenerator[Use]:
    made = make(where)
    if isinstance(made, Made):
        try:
            yield made.use
        finally:
            await made.aclose()
    else:
        async with made as use:
            yield use


@pytest.mark.parametrize("make", [*NEED_NO_OPENING, *ARE_OPENED])
async def test_a_second_running_loop_gets_an_error_at_once(make: Any, where: Where) -> None:
    """It names both loops, and the first loop goes on."""
    async with opened(make, where) as use:
        await limited(use())
        with pytest.raises(LoopConflict, match=r"was called in <.*Loop at .*>, and needs .* <.*Loop at .*>") as caught:
            await in_another_loop(use)
        assert caught.value.other is asyncio.get_running_loop() is not caught.value.loop
        await limited(use())


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the connection of the loop before
@pytest.mark.parametrize("make", NEED_NO_OPENING)
def test_loops_may_follow_one_another(make: Callable[[Where], Made], where: Where) -> None:
    """A broker that needs no opening works in the next loop when the one before is closed."""
    made = make(where)
    asyncio.run(limited(made.use()))

    async def use_and_close() -> None:
        await limited(made.use())
        await limited(made.aclose())

    asyncio.run(use_and_close())
    gc.collect()  # here, where the warning is expected


@pytest.mark.parametrize("seed", range(3))
async def test_of_two_loops_that_begin_at_the_same_moment_one_gets_the_error(seed: int, where: Where) -> None:
    broker = RedisStreams(Redis.from_url(where.url), app="web", prefix=where.prefix)
    begin, end = threading.Barrier(2, timeout=PATIENCE), threading.Barrier(2, timeout=PATIENCE)

    async def publish() -> str:
        begin.wait()
        try:
            await limited(asyncio.gather(*(broker.publish(message(number)) for number in range(20))))
            outcome = "sent"
            await broker.aclose()
        except LoopConflict:
            outcome = "refused"
        end.wait()  # both loops run until both have an answer
        return outcome

    with ThreadPoolExecutor(2) as threads:
        outcomes = [threads.submit(asyncio.run, publish()) for _ in range(2)]
        found = [await asyncio.wrap_future(outcome) for outcome in outcomes]
    assert sorted(found) == ["refused", "sent"]


@pytest.mark.parametrize("make", [streams, sequenced, pubsub, redis_inbox, dead_letters, library])
async def test_closing_in_another_loop_is_refused_and_closes_nothing(
    make: Callable[[Where], Made], where: Where
) -> None:
    """The publishes that wait in the first loop would be lost."""
    made = make(where)
    await limited(made.use())
    with pytest.raises(LoopConflict, match=r"aclose\(\) was called in"):
        await in_another_loop(made.aclose)
    if make is not sequenced:  # the rest of that broker belonged to no loop before
        await limited(made.use())
    await limited(made.aclose())


@pytest.mark.parametrize("kind", [Outbox, Relay])
async def test_an_outbox_is_not_closed_in_another_loop(kind: Any) -> None:
    """Its relay goes on."""
    async with kind(MemoryStore(), broker := MemoryBroker()) as opened:
        running = asyncio.create_task(opened.run()) if kind is Relay else None
        await asyncio.sleep(0)
        with pytest.raises(LoopConflict, match=r"aclose\(\) was called in"):
            await in_another_loop(opened.aclose)
        if running is None:
            receiver = await broker.group("g", start="new").open()
            await opened.publish(message(7))
            async with asyncio.timeout(PATIENCE):
                while not (items := await receiver.receive(1)):
                    pass
            assert len(items) == 1
            await receiver.aclose()
        else:
            assert not running.done()


async def test_an_outbox_that_another_loop_has_entered_can_still_be_closed_when_that_has_ended(tmp_path: Path) -> None:
    """As after a start that failed half-way."""
    outbox = Outbox(SQLiteStore(tmp_path / "outbox.db"), MemoryBroker())
    await in_another_loop(outbox.__aenter__)
    with pytest.raises(LoopConflict, match=r"Outbox.publish\(\) .* which is closed: make another"):
        await outbox.publish(message(1))
    await limited(outbox.aclose())


@pytest.mark.parametrize("call", ["run", "ready"])
async def test_a_consumer_runs_in_the_loop_in_which_it_was_entered(call: str) -> None:
    async with Consumer(AsyncEventDispatcher(), MemoryBroker().group("g", start="new")) as consumer:
        with pytest.raises(LoopConflict, match=rf"Consumer.{call}\(\) was called in"):
            await in_another_loop(getattr(consumer, call))
        running = asyncio.create_task(consumer.run())
        await consumer.ready()
        consumer.stop()
        await limited(running)


async def test_a_consumer_ends_with_the_error_of_an_inbox_that_another_loop_uses(where: Where) -> None:
    """An attempt that failed would make each message a dead letter, and an outage would be waited for without an end."""
    broker = MemoryBroker()
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen("counted")
    async def listen(event: Any) -> None: ...

    async with RedisInbox(Redis.from_url(where.url), prefix=where.prefix) as inbox:

        async def consume() -> None:
            async with Consumer(dispatcher, group, inbox=inbox) as consumer:
                await consumer.run()

        await limited(ask(inbox)())
        group = broker.group("g", start="oldest")
        with ThreadPoolExecutor(1) as thread:

            def run() -> None:
                asyncio.run(broker.publish(message(1)))
                asyncio.run(limited(consume()))

            with pytest.raises(LoopConflict, match="RedisInbox was called in"):
                await asyncio.get_running_loop().run_in_executor(thread, run)
    receiver = await group.open()
    assert not broker.dead and len(await receiver.receive(1)) == 1


async def test_the_hook_of_a_bridge_gets_the_error_of_its_queue() -> None:
    """As it gets every error of a message that the bridge does not send."""
    errors: list[tuple[Exception, Message | None]] = []
    dispatcher = AsyncEventDispatcher()
    async with Bridge(MemoryBroker(), wait=False, on_error=lambda *error: errors.append(error)) as bridge:
        dispatcher.add_subscriber(bridge)
        await dispatcher.adispatch("x", NotificationEvent())
        await in_another_loop(lambda: dispatcher.adispatch("y", NotificationEvent()))
    ((error, lost),) = errors
    assert isinstance(error, LoopConflict) and lost is not None and lost.message_name == "y"


# -- the binding ---------------------------------------------------------------------------------------------


@pytest.fixture
def loops() -> Iterator[tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop]]:
    """Two loops that stand still between two runs."""
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    yield first, second
    first.close()
    second.close()


async def enter(binding: LoopBinding) -> object:
    return binding.enter("use")


def test_a_loop_that_stands_still_keeps_an_object_while_work_is_under_way(loops: Any) -> None:
    first, second = loops
    busy = True
    forgotten: list[bool] = []
    binding = LoopBinding("Thing", is_busy=lambda: busy, forget=lambda: forgotten.append(busy))
    assert first.run_until_complete(enter(binding)) is first
    with pytest.raises(LoopConflict, match=r"Thing.use\(\) was called in .* which stands still with work under way"):
        second.run_until_complete(enter(binding))
    busy = False
    assert second.run_until_complete(enter(binding)) is second
    assert forgotten == [False]


async def test_a_forked_process_takes_an_object_over() -> None:
    """Its copy of the parent's loop looks as if it ran."""
    binding = LoopBinding("Thing")
    binding.enter("use")
    child = os.fork()
    if not child:
        asyncio.events._set_running_loop(None)
        try:
            asyncio.new_event_loop().run_until_complete(enter(binding))
        except BaseException:  # the child must not go on as pytest
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


async def test_the_error_survives_a_pickle() -> None:
    """With the names of the loops, which can't be pickled themselves."""
    error = LoopConflict("drain()", asyncio.get_running_loop(), asyncio.get_running_loop())
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and "runs in another thread: let that loop make the call" in str(again)


# -- the thread pool -----------------------------------------------------------------------------------------


def to_publish(client: Redis) -> Use:
    async def use() -> None:
        async with RedisStreams(client, app="web", timeout=0.2) as broker:  # closing ends the probe
            await broker.publish(message(1))

    return use


def to_publish_sequenced(client: Redis) -> Use:
    return lambda: RedisStreams(client, app="web", timeout=0.2).publish_sequenced("outbox", 1, [])


def to_open_a_group(client: Redis) -> Use:
    return RedisStreams(client, app="web", timeout=0.2).group("g", start="new").open


def to_subscribe(client: Redis) -> Use:
    return RedisPubSub(client, app="web", timeout=0.2).subscribe().open


def to_count_dead_letters(client: Redis) -> Use:
    return DeadLetters(client, timeout=0.2).count


CALLS = [to_publish, to_publish_sequenced, to_open_a_group, to_subscribe, to_count_dead_letters]
BUSY = "the address of 'localhost' can't be looked up: all 2 threads of the event loop's thread pool are busy"


@pytest.mark.parametrize("call", CALLS)
async def test_a_busy_thread_pool_is_named_where_it_keeps_redis_away(
    call: Callable[[Redis], Use], busy_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not Redis, which does nothing wrong. A host name needs a thread to be looked up."""
    monkeypatch.setattr("silbo.brokers.redis.group.BLOCK", 0.1)
    async with Redis(host="localhost", port=1) as client:
        with pytest.raises(BrokerUnavailable, match=BUSY):
            await limited(call(client)())


@pytest.mark.parametrize("call", CALLS)
async def test_a_busy_thread_pool_is_not_blamed_for_an_address_without_a_name(
    call: Callable[[Redis], Use], busy_pool: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silbo.brokers.redis.group.BLOCK", 0.1)
    async with Redis(host="127.0.0.1", port=1) as client:
        with pytest.raises(BrokerUnavailable) as caught:
            await limited(call(client)())
    assert "thread" not in str(caught.value)


async def test_a_pool_with_a_free_thread_is_not_blamed() -> None:
    await asyncio.to_thread(int)
    assert describe_lookup("localhost") == ""
