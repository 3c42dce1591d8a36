"""Groups of an address with shards: each shard has one reader at a time, and one that was taken over from settles nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from silbo import AsyncEventDispatcher, Consumer, ECSTEvent, EventName
from silbo._retry import Backoff
from silbo.brokers.redis import RedisInbox, RedisStreams, sharded_group
from silbo.brokers.redis.calls import CallConnection
from silbo.brokers.redis.group import StreamGroup
from silbo.brokers.redis.leases import Lease, build_lease_key, make_take_call
from silbo.brokers.redis.shard_receiver import ShardReceiver
from silbo.brokers.redis.sharded_group import Leadership, ShardedReceiver
from silbo.brokers.redis.side_by_side import SideBySide
from silbo.consumer.consumer import LISTENER_RETRY
from silbo.errors import BrokerRefused, BrokerUnavailable, Gap, ShardAddressed, ShardLost, ShardsMismatch
from silbo.message import Delivery, LedPublication, Message, new_publication
from silbo.operations.groups import read_groups
from silbo.operations.shards import Undrained, change_shards
from silbo.protocols import Receiver
from silbo.shards import spread
from tests.support.redis_streams import eventually, number, opened
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis
SHARD = "silbo:{events.0}"
LONG = 60.0
"""Seconds of a lease that can't be over while a test runs."""


@dataclass
class Paid(ECSTEvent):
    order: str
    n: int = 0


PAID = EventName("order.paid", Paid, key="order")


def keyed(key: str, number: int = 0, to: str | None = None) -> Message:
    headers = {"publication": new_publication(), "version": "1", "key": key}
    payload = {
        "event_id": "9f62e977-73f7-462b-92cb-8ea658d3bcb5",
        "event_timestamp": "2026-03-07T09:26:02.588855Z",
        "order": key,
        "n": number,
    }
    return Message("ecst_event", "order.paid", "9f62e977-73f7-462b-92cb-8ea658d3bcb5", payload, headers, to)


def find_key(shard: int, shards: int = 2) -> str:
    return next(key for key in map(str, range(1000)) if spread(key, shards) == shard)


@pytest.fixture
async def sharded(streams_client: Redis) -> AsyncIterator[RedisStreams]:
    async with RedisStreams(streams_client, app="web", shards=2) as broker:
        yield broker


# -- one shard ----------------------------------------------------------------------------------------------


class Leaders:
    """Leaders of the first shard, one after another, in this process."""

    def __init__(self, client: Redis, group: StreamGroup, stack: AsyncExitStack) -> None:
        self._connection = CallConnection(client, 5.0)
        self.group = group
        self._stack = stack
        self.fenced: list[str] = []
        self.is_led = True  # as far as the leader knows

    async def take(self, member: str) -> ShardReceiver:
        """Take the lease, though it runs: as if it were over."""
        key = SHARD.encode()
        lease_key = build_lease_key(key, b"billing")
        await self._connection.run_command(b"HSET", lease_key, b"until", b"0")
        is_taken, epoch = await self._connection.run(make_take_call(key, b"billing", member.encode(), LONG))
        assert is_taken
        lease = Lease(lease_key, member.encode(), epoch)
        receiver = ShardReceiver(
            replace(self.group, keys=(SHARD,), claim_after=LONG),
            lease,
            is_led=lambda: self.is_led,
            on_fenced=lambda: self.fenced.append(member),
        )
        self._stack.push_async_callback(receiver.aclose)
        return receiver

    async def aclose(self) -> None:
        await self._connection.aclose()


@pytest.fixture
async def leaders(streams_client: Redis, sharded: RedisStreams) -> AsyncIterator[Leaders]:
    async with AsyncExitStack() as stack:
        found = Leaders(streams_client, sharded.group("billing", start="oldest"), stack)
        stack.push_async_callback(found.aclose)
        yield found


async def receive(receiver: Receiver, many: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(30):
        while len(found) < many:
            found += [item for item in await receiver.receive(many) if isinstance(item, Delivery)]
    return found


async def test_next_leader_finds_what_the_last_had_in_hand(
    admin: Redis, sharded: RedisStreams, leaders: Leaders
) -> None:
    """At once and in order, in front of what is new."""
    key = find_key(0)
    await sharded.publish(*(keyed(key, n) for n in range(3)))
    old = await leaders.take("old")
    await receive(old, 3)
    await sharded.publish(keyed(key, 3))
    new = await leaders.take("new")
    found = await receive(new, 4)
    assert [number(each) for each in found] == [0, 1, 2, 3]
    assert [each.attempt for each in found] == [2, 2, 2, 1]
    assert new.epoch > old.epoch
    assert {each.epoch for each in found} == {new.epoch}


async def _ack(receiver: Receiver, delivery: Delivery) -> None:
    await receiver.ack(delivery)


async def _count(receiver: Receiver, delivery: Delivery) -> None:
    with pytest.raises(BrokerRefused, match="another process leads"):
        await receiver.count(delivery, error="ValueError: as told")


async def _bury(receiver: Receiver, delivery: Delivery) -> None:
    assert not await receiver.bury(delivery, error="ValueError: as told", attempts=5)


async def _offer(receiver: Receiver, delivery: Delivery) -> None:
    assert await receiver.offer(delivery) == [None]


async def _keep(receiver: Receiver, delivery: Delivery) -> None:
    assert list(await receiver.keep(delivery)) == [delivery]


async def _read(receiver: Receiver, delivery: Delivery) -> None:
    assert await receiver.receive(10) == []


@pytest.mark.parametrize("settle", [_ack, _count, _bury, _offer, _keep, _read])
async def test_former_leader_changes_nothing(
    admin: Redis, sharded: RedisStreams, leaders: Leaders, settle: Callable[[Receiver, Delivery], Awaitable[None]]
) -> None:
    """It was frozen, and knows nothing of the new one: each of its calls is refused by the script itself."""
    key = find_key(0)
    await sharded.publish(keyed(key, 0))
    old = await leaders.take("old")
    (delivery,) = await receive(old, 1)
    await leaders.take("new")
    await sharded.publish(keyed(key, 1))
    before = await _dump(admin)
    await settle(old, delivery)
    assert await _dump(admin) == before
    assert leaders.fenced == ["old"]


async def test_epoch_of_another_member_is_another_one(admin: Redis, sharded: RedisStreams, leaders: Leaders) -> None:
    """A fail-over may have lost a take-over, and two members have one number."""
    await sharded.publish(keyed(find_key(0)))
    old = await leaders.take("old")
    (delivery,) = await receive(old, 1)
    await leaders.take("new")
    await admin.hset(f"{SHARD}:lease:billing", "epoch", old.epoch)
    await old.ack(delivery)
    assert (await admin.xpending(SHARD, "billing"))["pending"] == 1
    assert leaders.fenced == ["old"]


async def _dump(admin: Redis) -> Any:
    """Everything that a call can change."""
    (group,) = await admin.xinfo_groups(SHARD)
    pending = await admin.xpending_range(SHARD, "billing", "-", "+", 10)
    for row in pending:
        del row["time_since_delivered"]
    lease = await admin.hgetall(f"{SHARD}:lease:billing")
    return sorted(await admin.keys()), group["last-delivered-id"], pending, lease


async def test_read_that_is_carried_out_late_does_not_overtake(
    admin: Redis, sharded: RedisStreams, leaders: Leaders
) -> None:
    """A read whose reply was lost may reach Redis after its reader has connected anew: what it gave is read first."""
    key = find_key(0)
    receiver = await leaders.take("one")
    await sharded.publish(keyed(key, 0))
    await receive(receiver, 1)
    await sharded.publish(keyed(key, 1))
    await admin.xreadgroup("billing", "leader", {SHARD: ">"})  # the late one
    await sharded.publish(keyed(key, 2))
    found = [number(each) for each in await receive(receiver, 3)]
    assert found == [0, 1, 2]  # the first is in hand, and a consumer knows that


async def test_entries_of_other_consumers_are_taken_over_at_once(
    admin: Redis, sharded: RedisStreams, leaders: Leaders
) -> None:
    """Dead letters that are tried again, and what a consumer had that read the shard by its own name: nobody else would."""
    await sharded.publish(keyed(find_key(0), 0))
    await admin.xgroup_create(SHARD, "billing", "0")
    await admin.xreadgroup("billing", "by hand", {SHARD: ">"})
    receiver = await leaders.take("one")
    (delivery,) = await receive(receiver, 1)
    await receiver.ack(delivery)
    assert (await admin.xpending(SHARD, "billing"))["pending"] == 0


async def test_keeping_that_fails_gives_up_all_or_nothing(
    sharded: RedisStreams, leaders: Leaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery that was given up alone would stay in the leader's hand, read by nobody, while later entries of its key go on."""
    await sharded.publish(*[keyed(find_key(0), n) for n in range(2)])
    receiver = await leaders.take("one")
    side_by_side = SideBySide([receiver], group="billing", keep_every=0.01, ack_delay=0.0)
    found = await receive(side_by_side, 2)

    async def fail(*_: object) -> bool:
        raise BrokerUnavailable("as told")

    monkeypatch.setattr(receiver._in_hand, "keep_by", fail)
    await asyncio.sleep(0.05)  # longer than a delivery is certain without a lease
    assert list(await side_by_side.keep(*found)) == []
    assert leaders.fenced == []
    leaders.is_led = False
    assert list(await side_by_side.keep(*found)) == found
    assert leaders.fenced == ["one"]
    await side_by_side.aclose()


async def test_epoch_grows_also_after_redis_has_lost_its_data(admin: Redis, leaders: Leaders) -> None:
    first = (await leaders.take("one")).epoch
    second = (await leaders.take("one")).epoch
    await admin.flushall()
    third = (await leaders.take("two")).epoch
    assert first < second < third


async def test_lease_that_runs_is_not_taken(streams_client: Redis, sharded: RedisStreams, leaders: Leaders) -> None:
    await leaders.take("one")
    connection = CallConnection(streams_client, 5.0)
    is_taken, wait = await connection.run(make_take_call(SHARD.encode(), b"billing", b"two", 5.0))
    assert not is_taken
    assert 0 < wait <= 5000  # one that was given by a clock that was ahead does not last longer than a new one
    await connection.aclose()


async def test_late_renewal_does_not_keep_a_released_shard(
    streams_client: Redis, leaders: Leaders, sharded: RedisStreams
) -> None:
    """Renewals and releases go over two connections; the next leader would have to wait for a whole lease."""
    old = await leaders.take("old")
    key = SHARD.encode()
    connection = CallConnection(streams_client, 5.0)
    lease = Lease(build_lease_key(key, b"billing"), b"old", old.epoch)
    assert await connection.run(lease.make_release_call())
    await old.keep()
    is_taken, _ = await connection.run(make_take_call(key, b"billing", b"new", LONG))
    assert is_taken
    await connection.aclose()


# -- many members -------------------------------------------------------------------------------------------


@dataclass
class Member:
    consumer: Consumer
    got: list[tuple[str, int, int | None]]

    @property
    def leads(self) -> int:
        return len(self.consumer.health().leads or ())


@asynccontextmanager
async def member(
    broker: RedisStreams,
    work: Callable[[Paid], Awaitable[object]] | None = None,
    inbox: RedisInbox | None = None,
    backoff: Backoff = LISTENER_RETRY,
    newer_version_wait: float = 300.0,
    start: str = "oldest",
    **options: Any,
) -> AsyncGenerator[Member]:
    dispatcher = AsyncEventDispatcher()
    got: list[tuple[str, int, int | None]] = []

    @dispatcher.listen(PAID)
    async def listener(event: Paid) -> None:
        origin: Any = event.origin
        got.append((event.order, event.n, origin.epoch))
        if work is not None:
            await work(event)

    group = broker.group("billing", start=start, **options)
    consumer = Consumer(
        dispatcher,
        group,
        events=[PAID],
        concurrency=4,
        inbox=inbox,
        backoff=backoff,
        newer_version_wait=newer_version_wait,
    )
    async with consumer, asyncio.TaskGroup() as tasks:
        tasks.create_task(consumer.run())
        try:
            yield Member(consumer, got)
        finally:
            consumer.stop()


async def test_members_share_the_shards_and_keep_the_order(streams_client: Redis) -> None:
    """While one comes and goes, each key's messages are handled in order, all of them."""
    handled: list[tuple[str, int]] = []

    async def note(event: Paid) -> None:
        handled.append((event.order, event.n))

    def numbers(key: str) -> list[int]:
        return list(dict.fromkeys(n for of, n in handled if of == key))

    async with RedisStreams(streams_client, app="web", shards=16) as broker, member(broker, note) as one:
        await eventually(lambda: _is(one.leads == 16))
        sent = 0

        async def publish(rounds: int) -> None:
            nonlocal sent
            for _ in range(rounds):
                await broker.publish(*[keyed(str(key), sent) for key in range(20)])
                sent += 1

        async with member(broker, note) as two:
            publishing = asyncio.create_task(publish(100))
            await eventually(lambda: _is((one.leads, two.leads) == (8, 8)))
            await publishing
            await publish(50)
            await eventually(lambda: _is(bool(two.got)))
        await publish(50)
        await eventually(lambda: _is(one.leads == 16))
        await eventually(lambda: _is(all(len(numbers(str(key))) == sent for key in range(20))))
    assert all(numbers(str(key)) == list(range(sent)) for key in range(20))


async def _is(condition: bool) -> bool:
    return condition


async def test_consumer_that_leaves_gives_its_shards_away_at_once(sharded: RedisStreams) -> None:
    """As soon as nothing of a shard is in hand, and not after the lease; the other's listener may run on."""
    go = asyncio.Event()
    begun: list[str] = []

    async def work(event: Paid) -> None:
        begun.append(event.order)
        if event.order == find_key(0):
            await go.wait()

    async with member(sharded, claim_after=LONG, work=work) as one:
        await eventually(lambda: _is(one.leads == 2))
        await sharded.publish(keyed(find_key(0)))
        await eventually(lambda: _is(bool(begun)))
        async with member(sharded, claim_after=LONG) as two:
            one.consumer.stop()
            await eventually(lambda: _is(two.leads == 1))
            await sharded.publish(keyed(find_key(1), 1))
            await eventually(lambda: _is(bool(two.got)))
            assert [order for order, _, _ in two.got] == [find_key(1)]
            go.set()
            await eventually(lambda: _is(two.leads == 2))
            assert len(two.got) == 1


async def test_shard_is_released_though_the_end_comes_while_it_is_given_away(
    admin: Redis, sharded: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next leader would wait for a whole lease."""
    closing = 0

    async def never(_: ShardReceiver) -> None:
        nonlocal closing
        closing += 1
        await asyncio.Event().wait()

    async with opened(sharded.group("billing", start="oldest", claim_after=LONG)) as receiver:
        assert isinstance(receiver, ShardedReceiver)
        await receiver.receive(1)
        await eventually(lambda: _is(len(receiver.leads) == 2))
        with monkeypatch.context() as patch:
            patch.setattr(ShardReceiver, "aclose", never)
            receiver.leave()
            await eventually(lambda: _is(closing == 2))
        await receiver.aclose()
        leases = [build_lease_key(b"silbo:{events.%d}" % shard, b"billing") for shard in range(2)]
        assert [await admin.hget(lease, "until") for lease in leases] == [b"0", b"0"]


async def test_consumer_that_does_not_run_keeps_no_shard(sharded: RedisStreams) -> None:
    """It is entered and waits for the rest of its program, or its run was cancelled and it is not left yet: the others read all."""
    idle = Consumer(AsyncEventDispatcher(), sharded.group("billing", start="oldest"), events=[PAID])
    async with idle, member(sharded) as one:
        await sharded.publish(*[keyed(find_key(shard)) for shard in range(2)])
        await eventually(lambda: _is(len(one.got) == 2))
        running = asyncio.create_task(idle.run())
        await eventually(lambda: _is(one.leads == len(idle.health().leads or ()) == 1))
        running.cancel()
        await asyncio.wait([running])
        await eventually(lambda: _is(one.leads == 2))


@pytest.mark.long
async def test_shard_is_not_kept_by_a_delivery_that_waits_for_its_next_attempt(
    admin: Redis, sharded: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor by those of its key behind it: the next leader attempts them, and the attempts are counted on."""
    monkeypatch.setattr(sharded_group, "DRAIN", 600.0)

    async def fail(event: Paid) -> None:
        raise ValueError("as told")

    async with member(sharded, fail, claim_after=LONG, backoff=Backoff(initial=600.0, cap=600.0)) as one:
        await eventually(lambda: _is(one.leads == 2))
        keys = [find_key(0), find_key(1)]
        await sharded.publish(*[keyed(key, n) for key in keys for n in range(2)])
        await eventually(lambda: _is(one.consumer.stats.failed == 2))
        async with member(sharded, claim_after=LONG) as two:
            await eventually(lambda: _is(len(two.got) == 2))
            assert [n for _, n, _ in two.got] == [0, 1]
            assert (one.leads, two.leads) == (1, 1)
            one.consumer.stop()
            await eventually(lambda: _is(len(two.got) == 4))


async def test_newer_message_waits_for_another_reader_of_its_shard_then_is_a_dead_letter(
    admin: Redis, sharded: RedisStreams
) -> None:
    """It is offered, as at a stream without shards, but nobody else reads the shard; other keys go on."""
    newer = keyed(find_key(0))
    async with member(sharded, newer_version_wait=0.3) as one:
        await sharded.publish(replace(newer, headers={**newer.headers, "version": "2"}), keyed(find_key(1)))
        await eventually(lambda: _is(one.consumer.stats.dead == 1))
        assert [order for order, _, _ in one.got] == [find_key(1)]
        assert await admin.xlen(f"{SHARD}:dead") == 1


@pytest.mark.parametrize("is_read_first", [True, False])
async def test_what_a_former_epoch_has_done_is_not_acknowledged_in_the_next(
    admin: Redis, sharded: RedisStreams, is_read_first: bool
) -> None:
    """A process that lost its shard and has it again: its database may have refused the first run, without an error."""
    go = asyncio.Event()

    async def work(event: Paid) -> None:
        if len(one.got) == 1:
            await go.wait()

    async with member(sharded, work) as one:
        await eventually(lambda: _is(one.leads == 2))
        await sharded.publish(keyed(find_key(0)))
        await eventually(lambda: _is(len(one.got) == 1))
        lease = f"{SHARD}:lease:billing"
        await admin.hset(lease, mapping={"owner": "another", "until": 0})
        await eventually(lambda: _is(one.consumer.stats.lost == 1))
        if is_read_first:
            await eventually(lambda: _is(one.consumer.in_hand == 2))  # it was read again, and waits behind itself
        go.set()
        await eventually(lambda: _is(len(one.got) == 2))
        assert (one.got[0][2] or 0) < (one.got[1][2] or 0)

        async def is_acknowledged() -> bool:
            return bool((await admin.xpending(SHARD, "billing"))["pending"] == 0)

        await eventually(is_acknowledged)


async def test_addresses_with_and_without_shards(sharded: RedisStreams) -> None:
    async with member(sharded, streams=["events", "audit"]) as one:
        await sharded.publish(keyed("a"), keyed("b", to="audit"))
        await eventually(lambda: _is(len(one.got) == 2))
        assert {order: epoch is not None for order, _, epoch in one.got} == {"a": True, "b": False}
        subscription: Any = one.consumer.subscription
        assert await subscription.read_lag() == 0


async def test_group_that_is_open_misses_nothing_of_an_address_without_shards(sharded: RedisStreams) -> None:
    """Its group is made when the subscription is opened, as that of each shard, and not by the first read."""
    await sharded.publish(keyed("a"))
    async with opened(sharded.group("billing", start="new", streams=["events", "audit"])) as receiver:
        await sharded.publish(keyed("a", 1), keyed("a", 2, to="audit"))
        assert {number(each) for each in await receive(receiver, 2)} == {1, 2}


async def test_group_learns_the_number_from_redis(streams: RedisStreams, sharded: RedisStreams) -> None:
    await sharded.publish(keyed("a"))
    async with member(streams) as one:
        await eventually(lambda: _is(len(one.got) == 1))
        assert one.leads == 2


async def test_shard_is_no_address_of_a_group(streams: RedisStreams, sharded: RedisStreams) -> None:
    """It would take the number beside the shard for that of its own shards, and read nothing."""
    await sharded.publish(keyed("a"))
    with pytest.raises(
        ShardAddressed, match=r"'events.1' is one of the 2 shards of 'events': write streams=\['events'\]"
    ):
        await streams.group("audit", start="oldest", streams=["events.1"]).open()
    async with opened(streams.group("audit", start="oldest", streams=["events.2", "events.01"])):
        """Addresses like any other."""


async def test_group_that_is_first_says_the_number(streams: RedisStreams, sharded: RedisStreams) -> None:
    async with member(streams, shards=2) as one:
        await sharded.publish(keyed("a"))
        await eventually(lambda: _is(len(one.got) == 1))
    with pytest.raises(ShardsMismatch):
        await streams.group("billing", start="new", shards=4).open()


async def test_group_that_was_there_before_any_publisher_gives_way(
    admin: Redis, streams: RedisStreams, sharded: RedisStreams
) -> None:
    """Its stream, to which nothing was ever added, does not keep the address from having shards; it says that it has to be started again.

    Then it misses nothing of what was published since it was opened.
    """
    async with opened(streams.group("billing", start="new")) as receiver:
        await receiver.receive(1)
        await sharded.publish(keyed("a"))
        with pytest.raises(BrokerUnavailable, match="has 2 shards by now, .* start the consumer again"):
            async with asyncio.timeout(30):
                while True:
                    await receiver.receive(1)
    async with member(streams, start="new") as one:
        await eventually(lambda: _is(len(one.got) == 1))
        assert one.leads == 2


async def test_new_group_misses_nothing_of_a_shard_that_nobody_leads_yet(admin: Redis, sharded: RedisStreams) -> None:
    """It begins when it is opened, at all shards, and not when one of them is led."""
    async with opened(sharded.group("billing", start="new")):
        for shard in range(2):
            assert [row["name"] for row in await admin.xinfo_groups(f"silbo:{{events.{shard}}}")] == [b"billing"]


async def test_groups_show_who_leads_each_shard(admin: Redis, sharded: RedisStreams) -> None:
    """And not the name under which all leaders read; nobody is shown once the lease was released and nothing is in hand."""
    async with member(sharded) as one:
        await sharded.publish(keyed(find_key(0)), keyed(find_key(1)))
        await eventually(lambda: _is(len(one.got) == 2))
        groups = await read_groups(admin, stream="events")
        assert [group.stream for group in groups] == [SHARD, "silbo:{events.1}"]
        for group in groups:
            (leader,) = group.consumers
            assert leader.process is not None
            assert (leader.process.pid, leader.is_silent) == (os.getpid(), False)
            assert leader.epoch in {epoch for _, _, epoch in one.got}
        assert one.consumer.health().leads == (SHARD, "silbo:{events.1}")
    assert all(group.is_deserted and not group.consumers for group in await read_groups(admin, stream="events"))


@pytest.mark.long
async def test_number_is_changed_while_all_goes_on(admin: Redis, streams_client: Redis) -> None:
    """Publishers of the old number wait outside, what is there is handled, then consumers and new publishers go on with the new number."""
    gate = asyncio.Event()

    async def work(event: Paid) -> None:
        if event.n == 0:
            await gate.wait()

    waited: list[Undrained] = []
    async with (
        RedisStreams(streams_client, app="web", shards=2) as before,
        RedisStreams(streams_client, app="web", shards=4) as after,
        member(before, work) as one,
    ):
        await before.publish(*[keyed(str(key)) for key in range(20)])
        await eventually(lambda: _is(bool(one.got)))
        changing = asyncio.create_task(change_shards(admin, "events", 4, on_wait=waited.extend))
        await eventually(lambda: _is(bool(waited)))
        for broker in (before, after):
            with pytest.raises(BrokerUnavailable, match="is being changed"):
                await broker.publish(keyed("late"))
        assert not changing.done()
        gate.set()
        await changing
        await after.publish(*[keyed(str(key), 1) for key in range(20)])
        with pytest.raises(ShardsMismatch, match="4 shards"):
            await before.publish(keyed("late"))
        await eventually(lambda: _is(one.leads == 4 and len(one.got) == 40))
        assert [n for _, n, _ in one.got] == [0] * 20 + [1] * 20
        await change_shards(admin, "events", 2)
        await before.publish(*[keyed(str(key), 2) for key in range(20)])
        await eventually(lambda: _is(one.leads == 2 and len(one.got) == 60))


async def test_number_is_changed_and_no_new_group_misses_anything(
    admin: Redis, streams: RedisStreams, streams_client: Redis
) -> None:
    """What is published before its consumers know the number, or while there are none, is before the end of a new stream."""
    async with (
        RedisStreams(streams_client, app="web", shards=2) as before,
        RedisStreams(streams_client, app="web", shards=4) as after,
    ):
        await before.publish(keyed("a"))
        async with member(streams, start="new") as one:
            await eventually(lambda: _is(one.leads == 2))
        await change_shards(admin, "events", 4)
        await after.publish(*[keyed(str(key)) for key in range(20)])
        async with member(streams, start="new") as two:
            await eventually(lambda: _is(len(two.got) == 20))


async def test_later_change_of_the_number_ends_the_one_before(admin: Redis, streams_client: Redis) -> None:
    """Else that one would change the number once more, while messages wait on shards that its number does not have.

    A consumer that says the number of before, and opens meanwhile, handles what is waited for.
    """
    waited: list[Undrained] = []
    async with RedisStreams(streams_client, app="web", shards=4) as before:
        async with opened(before.group("billing", start="oldest")):
            await before.publish(keyed("a"))
        first = asyncio.create_task(change_shards(admin, "events", 2, on_wait=waited.extend))
        await eventually(lambda: _is(bool(waited)))
        async with member(before):
            await change_shards(admin, "events", 8)
            with pytest.raises(ShardsMismatch, match="'events' (has 8 shards|is being changed)"):
                await first
        assert await admin.hget("silbo:{events}:shards", "shards") == b"8"


async def test_consumer_that_opens_while_the_number_is_changed(
    admin: Redis, streams: RedisStreams, streams_client: Redis
) -> None:
    """It takes part in the old shards, then in the new ones; a stream without shards is read by nobody."""
    async with (
        RedisStreams(streams_client, app="web", shards=2) as before,
        RedisStreams(streams_client, app="web", shards=4) as after,
    ):
        async with opened(before.group("billing", start="oldest")):
            await before.publish(keyed("a"))
        changing = asyncio.create_task(change_shards(admin, "events", 4))
        await eventually(lambda: _is_changing(admin))
        async with member(streams) as one:
            await changing
            assert [order for order, _, _ in one.got] == ["a"]
            await after.publish(*[keyed(str(key)) for key in range(20)])
            await eventually(lambda: _is(one.leads == 4 and len(one.got) == 21))
        assert not await admin.exists("silbo:{events}")


async def _is_changing(admin: Redis) -> bool:
    return await admin.hget("silbo:{events}:shards", "shards") == b"0"


async def test_member_that_leaves_while_the_number_is_changed_takes_nothing(
    admin: Redis, sharded: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has given away the old shards, and makes the groups of the new ones at that moment."""
    made, may_go_on = asyncio.Event(), asyncio.Event()
    create = Leadership._create_groups

    async def create_slowly(self: Leadership) -> None:
        await create(self)
        made.set()
        await may_go_on.wait()

    async with opened(sharded.group("billing", start="oldest")) as receiver:
        assert isinstance(receiver, ShardedReceiver)
        (leadership,) = receiver._leaderships
        await receiver.receive(1)
        await eventually(lambda: _is(len(receiver.leads) == 2))
        monkeypatch.setattr(Leadership, "_create_groups", create_slowly)
        await admin.hset("silbo:{events}:shards", "shards", 4)
        await made.wait()
        receiver.leave()
        may_go_on.set()
        assert leadership._task is not None
        async with asyncio.timeout(30):
            await leadership._task
        assert receiver.leads == ()


# -- the inbox ----------------------------------------------------------------------------------------------


async def test_inbox_answers_no_former_leader(streams_client: Redis) -> None:
    """From the first call of the new one on; and what the former one has handled since is not remembered. Others are not concerned."""
    async with RedisInbox(streams_client) as inbox:
        old, new = LedPublication("a", SHARD, 7), LedPublication("a", SHARD, 8)
        assert await inbox.find_handled("billing", [old]) == []
        assert await inbox.find_handled("billing", [new]) == []
        with pytest.raises(ShardLost) as caught:
            await inbox.find_handled("billing", [old])
        assert (caught.value.address, caught.value.epoch) == (SHARD, 7)
        await inbox.remember("billing", [old, LedPublication("b", "silbo:{events.1}", 7), "c"])
        assert await inbox.find_handled("billing", ["a", "b", "c"]) == ["b", "c"]
        await inbox.remember("billing", [new])
        assert await inbox.find_handled("billing", [new]) == ["a"]


@pytest.mark.long
async def test_leader_that_an_inbox_does_not_answer_takes_its_shard_anew(
    admin: Redis, sharded: RedisStreams, streams_client: Redis
) -> None:
    """A fail-over has lost the last take-over, and the inbox is on another node: else that shard would stand still for ever."""
    async with RedisInbox(streams_client) as inbox, member(sharded, inbox=inbox) as one:
        await eventually(lambda: _is(one.leads == 2))
        seconds, microseconds = await admin.time()
        later = seconds * 1000 + microseconds // 1000 + 300
        await admin.zadd("silbo:inbox:billing", {f"epoch:{SHARD}": 2**52 + later})
        await sharded.publish(keyed(find_key(0)), keyed(find_key(1)))
        await eventually(lambda: _is(one.consumer.stats.handled == 2))
        assert {order: (epoch or 0) > later for order, _, epoch in one.got} == {find_key(0): True, find_key(1): False}
        assert one.consumer.stats.failed == 0


async def test_all_is_given_back_after_redis_was_flushed(admin: Redis, sharded: RedisStreams) -> None:
    async with member(sharded) as one:
        await eventually(lambda: _is(one.leads == 2))
        await admin.flushall()

        async def arrives() -> bool:
            try:
                await sharded.publish(keyed("a"))
            except BrokerUnavailable:
                return False
            return bool(one.got)

        await eventually(arrives)


@pytest.mark.parametrize("lost", ["FLUSHALL", "DEL"])
async def test_group_that_began_with_what_is_new_misses_nothing_of_a_shard_that_was_deleted(
    admin: Redis, leaders: Leaders, sharded: RedisStreams, lost: str
) -> None:
    """The next leader finds no group: one that it made at the end of the stream would skip what came since. It tells of the loss."""
    await sharded.publish(keyed(find_key(0)))
    group = sharded.group("billing", start="new")
    async with opened(group):
        pass
    await admin.execute_command(*([lost, SHARD] if lost == "DEL" else [lost]))
    async with RedisStreams(sharded._client, app="web", shards=2) as another:
        await another.publish(keyed(find_key(0), 1))
    leaders.group = group
    items = await _receive_all(await leaders.take("new"), 2)
    assert isinstance(items[0], Gap)
    assert number(items[1]) == 1


async def _receive_all(receiver: Receiver, many: int) -> list[Delivery | Gap]:
    items: list[Delivery | Gap] = []
    async with asyncio.timeout(30):
        while len(items) < many:
            items += await receiver.receive(many)
    return items


# -- a cluster ----------------------------------------------------------------------------------------------


@pytest.mark.cluster
async def test_shards_lie_on_the_nodes_of_a_cluster(cluster_client: RedisCluster, prefix: str) -> None:
    """Publishing, leases, reading, settling, the inbox and the change of their number: each call names keys of one slot."""
    async with (
        RedisStreams(cluster_client, app="web", prefix=prefix, shards=8) as broker,
        RedisInbox(cluster_client, prefix=prefix) as inbox,
        member(broker, inbox=inbox, claim_after=3.0) as one,
    ):
        for n in range(3):
            await broker.publish(*[keyed(str(key), n) for key in range(40)])
        await broker.publish_sequenced("box/0", 1, [(1, keyed("0", 3)), (2, keyed("1", 3))])
        async with member(broker, inbox=inbox, claim_after=3.0) as two:
            await eventually(lambda: _is((one.leads, two.leads) == (4, 4)))
            await broker.publish(*[keyed(str(key), 4) for key in range(40)])
            await eventually(lambda: _is(len(one.got) + len(two.got) == 162))
        await change_shards(cluster_client, "events", 4, prefix=prefix)
        await eventually(lambda: _is(one.leads == 4))
        for key in range(40):
            numbers = [n for of, n, _ in one.got + two.got if of == str(key)]
            assert numbers == sorted(numbers)
        assert one.consumer.stats.failed == one.consumer.stats.duplicates == 0


@pytest.mark.long
async def test_nothing_in_hand_is_forgotten_while_redis_is_silent(
    own_redis: RedisServer, streams_client: Redis
) -> None:
    """Redis is silent for shorter than a lease: then no member has lost anything, and all is handled, in the order of its key."""
    keys = [find_key(0), find_key(1)]
    async with RedisStreams(streams_client, app="web", shards=2) as sharded:
        go = asyncio.Event()

        async def wait(event: Any) -> None:
            await go.wait()

        async with member(sharded, wait) as one:
            await sharded.publish(*[keyed(key, number) for number in range(10) for key in keys])
            await eventually(lambda: asyncio.sleep(0, len(one.got) == 2))
            await asyncio.sleep(1.5)  # what the silence meets is kept, and read ahead
            own_redis.pause()
            await asyncio.sleep(2.6)
            own_redis.resume()
            go.set()
            await eventually(lambda: asyncio.sleep(0, len({(key, number) for key, number, _ in one.got}) == 20), 30.0)
            for wanted in keys:
                numbers = [number for key, number, _ in dict.fromkeys(one.got) if key == wanted]
                assert numbers == sorted(numbers)


async def test_trouble_with_one_shard_is_logged_once(
    admin: Redis, sharded: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """The other shards' leases are renewed meanwhile, and do not end it; no class of silbo's own is named."""

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if "group billing at" in record.getMessage()]

    caplog.set_level("WARNING", "silbo.brokers.redis.sharded_group")
    broken, sound = [build_lease_key(b"silbo:{events.%d}" % shard, b"billing") for shard in range(2)]
    await admin.set(broken, "none of silbo's")
    async with member(sharded, claim_after=0.6) as one:
        await eventually(lambda: _is(one.leads == 1 and bool(told())))
        renewed: set[Any] = set()
        while len(renewed) < 4:  # each in a pass of its own
            renewed.add(await admin.hget(sound, "until"))
        (began,) = told()
        assert "can't renew all leases" in began
        assert "trying again: WRONGTYPE" in began, began
        await admin.delete(broken)
        await eventually(lambda: _is(one.leads == 2 and len(told()) == 2))
        assert "back after" in told()[1]
