"""The loop around a Kafka consumer group that how-to receive shows, on librdkafka's mock and on Tansu."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from confluent_kafka import Message

from examples.kafka_group import MOST_WAITING, KafkaGroup
from silbo import AsyncEventDispatcher, Backoff, EventName, NotificationEvent, receive
from silbo.brokers.kafka import Kafka
from silbo.errors import MessageInvalid
from silbo.message import Origin
from silbo.testing.conformance import message
from silbo.wire.formats import JSON
from tools.kafka import OFFSET_COMMIT, KafkaMock
from tools.tansu import TansuServer

DEADLINE = 45.0
SETTINGS = {"group.id": "billing", "session.timeout.ms": 6000, "heartbeat.interval.ms": 500, "log_level": 2}
CHECKED = EventName("conformance.checked", NotificationEvent)
UNKNOWN_SERVER_ERROR = -1

Publish = Callable[..., Awaitable[None]]


@pytest.fixture
def mock() -> Iterator[KafkaMock]:
    with KafkaMock() as mock:
        yield mock


@pytest.fixture(params=["mock", pytest.param("tansu", marks=pytest.mark.long)])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "mock":
        yield request.getfixturevalue("mock").url
    else:
        with TansuServer() as server:
            server.create_topic("events", partitions=4)
            yield server.url


@pytest.fixture
async def publish(url: str) -> AsyncIterator[Publish]:
    """Publish messages of these numbers; number modulo 5 is the key. Bytes are no message."""
    async with AIOKafkaProducer(bootstrap_servers=url, acks="all") as producer, Kafka(producer, app="web") as broker:

        async def publish(*sent: int | bytes, version: str = "1") -> None:
            for one in sent:
                if isinstance(one, bytes):
                    await producer.send_and_wait("events", one, key=b"k0")
                else:
                    made = message(one)
                    await broker.publish(replace(made, headers={**made.headers, "version": version}))

        yield publish


class Heard(NamedTuple):
    partition: int
    offset: int
    number: int


class Program:
    """A program with a group, whose listener does what the test says."""

    def __init__(self, url: str, *, attempts: int | None = None, knows_class: bool = False) -> None:
        self.heard: list[Heard] = []
        self.parked: list[tuple[bytes | None, Exception]] = []
        self.tries = 0
        self.listener: Callable[[int], Awaitable[None]] | None = None
        self.parking: Callable[[], Awaitable[None]] | None = None
        self._records: dict[str, Message] = {}
        self._dispatcher = AsyncEventDispatcher()
        self._dispatcher.add_listener("conformance.checked", self._listen)
        self._events = [CHECKED] if knows_class else []
        self._current: dict[asyncio.Task[Any] | None, Message] = {}
        settings = {"bootstrap.servers": url, **SETTINGS}
        backoff = Backoff(initial=0.01, cap=0.1, attempts=attempts)
        self.group = KafkaGroup(settings, ["events"], self._handle, self._park, backoff=backoff)

    async def _handle(self, record: Message) -> None:
        self.tries += 1
        self._current[asyncio.current_task()] = record
        await receive(self._dispatcher, record.value(), events=self._events)

    async def _listen(self, event: Any) -> None:
        record = self._current[asyncio.current_task()]
        number = event.payload["n"]
        self.heard.append(Heard(record.partition(), record.offset(), number))
        if self.listener is not None:
            await self.listener(number)

    async def _park(self, record: Message, error: Exception) -> None:
        if self.parking is not None:
            await self.parking()
        self.parked.append((record.value(), error))

    @property
    def numbers(self) -> list[int]:
        return [one.number for one in self.heard]

    @asynccontextmanager
    async def runs(self) -> AsyncIterator[asyncio.Task[None]]:
        """Run it, and stop it at the end."""
        running = asyncio.create_task(self.group.run())
        try:
            yield running
            self.group.stop()
            if not running.done():
                async with asyncio.timeout(DEADLINE):
                    await running
        finally:
            running.cancel()
            await asyncio.wait([running])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.01)


def assert_in_order(heard: list[Heard]) -> None:
    """Each partition's records were heard in their order, none was left out, and only the last one again."""
    for partition in {one.partition for one in heard}:
        offsets = [one.offset for one in heard if one.partition == partition]
        assert all(after - before in (0, 1) for before, after in pairwise(offsets)), offsets
        assert offsets[0] == 0


@pytest.mark.long
async def test_only_the_partition_of_a_failing_delivery_waits_and_it_is_paused(url: str, publish: Publish) -> None:
    """What is behind the failed record is neither handled nor fetched; other partitions go on. Then all comes in order."""
    program = Program(url)
    has_recovered = False

    async def fail(number: int) -> None:
        if number == 0 and not has_recovered:
            raise OSError("not now")

    program.listener = fail
    async with program.runs():
        await publish(0)
        await until(lambda: any(lane.is_paused for lane in program.group._lanes.values()))
        failing = program.heard[0].partition
        await publish(*range(1, 60))
        (lane,) = [lane for (_, partition), lane in program.group._lanes.items() if partition == failing]
        others = {
            number for number in range(60) if number % 5 >= 3
        }  # of four partitions k3 and k4 have another than k0
        await until(lambda: others <= set(program.numbers))
        assert {one.offset for one in program.heard if one.partition == failing} == {0}
        assert not lane.waiting
        has_recovered = True
        await until(lambda: set(program.numbers) == set(range(60)))
    assert_in_order(program.heard)


@pytest.mark.long
async def test_partition_pauses_while_many_of_its_records_wait(url: str, publish: Publish) -> None:
    """A slow listener does not fill the memory."""
    program = Program(url)
    gate = asyncio.Event()

    async def wait(number: int) -> None:
        await gate.wait()

    program.listener = wait
    numbers = range(0, 5 * (MOST_WAITING + 20), 5)
    async with program.runs():
        await publish(*numbers)
        await until(lambda: any(lane.is_paused for lane in program.group._lanes.values()))
        await publish(*numbers)
        gate.set()
        await until(lambda: len(program.heard) == 2 * len(numbers))
    assert program.numbers == [*numbers, *numbers]


async def test_stop_finishes_and_commits_what_is_in_hand(url: str, publish: Publish) -> None:
    """And begins nothing more: the next program goes on behind it."""
    program = Program(url)
    begun, gate = asyncio.Event(), asyncio.Event()

    async def wait(number: int) -> None:
        begun.set()
        await gate.wait()

    program.listener = wait
    await publish(0, 5, 10)
    async with program.runs() as running:
        await begun.wait()
        program.group.stop()
        done, _ = await asyncio.wait([running], timeout=0.3)
        assert not done
        gate.set()
    assert program.numbers == [0]
    assert await committed(url, program.heard[0].partition) == 1


async def test_cancelled_program_commits_nothing_whose_listeners_have_not_ended(url: str, publish: Publish) -> None:
    program = Program(url)
    begun, was_cancelled = asyncio.Event(), asyncio.Event()

    async def hang(number: int) -> None:
        if number == 10:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                was_cancelled.set()

    program.listener = hang
    await publish(0, 5, 10, 15)
    async with program.runs() as running:
        await begun.wait()
        running.cancel()
        await asyncio.wait([running], timeout=DEADLINE)
        assert running.cancelled()
    assert was_cancelled.is_set()
    assert program.numbers == [0, 5, 10]
    assert await committed(url, program.heard[0].partition) == 2


async def test_offset_is_committed_while_the_program_runs(url: str, publish: Publish) -> None:
    """A process that is killed leaves little to be handled again."""
    program = Program(url)
    async with program.runs():
        await publish(0, 5)
        await until(lambda: len(program.heard) == 2)
        async with asyncio.timeout(DEADLINE):
            while await committed(url, program.heard[0].partition) != 2:
                await asyncio.sleep(0.02)


async def test_record_is_parked_after_its_last_attempt_and_junk_at_once(url: str, publish: Publish) -> None:
    """A park that fails is tried again, and nothing overtakes: what is not parked is not committed."""
    program = Program(url, attempts=3)
    fails = iter([True, True, True, True])

    async def fail(number: int) -> None:
        if number == 0:
            raise OSError("never")

    async def fail_at_first() -> None:
        assert 5 not in program.numbers
        if next(fails, False):
            raise ConnectionError("no dead letters now")

    program.listener, program.parking = fail, fail_at_first
    async with program.runs():
        await publish(b"junk", 0, 5)
        await until(lambda: 5 in program.numbers)
    assert program.numbers == [0, 0, 0, 5]
    assert program.tries == 1 + len(program.numbers)
    (junk, invalid), (_, error) = program.parked
    assert (junk, type(invalid)) == (b"junk", MessageInvalid)
    assert isinstance(error, OSError)
    assert next(fails, None) is None
    assert await committed(url, program.heard[0].partition) == 3


async def test_message_of_a_newer_version_waits_for_the_newer_program(url: str, publish: Publish) -> None:
    """It is never parked; a stop ends its pause and leaves it where it is."""
    program = Program(url, attempts=2, knows_class=True)
    await publish(0, version="2")
    async with program.runs():
        await until(lambda: program.tries > 3)
    assert program.parked == []
    assert await committed(url, 0) is await committed(url, 1) is None


@pytest.mark.long
async def test_partition_that_moves_is_given_away_behind_what_is_finished(mock: KafkaMock) -> None:
    """The first member finishes the record in hand and commits it. Only what Kafka refuses to commit is handled twice."""
    first, second = Program(mock.url), Program(mock.url)

    cut_off: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            cut_off.append(number)
            raise

    first.listener = second.listener = work
    sent = 600  # work for many seconds, so that every partition has a record in hand when it moves
    async with AIOKafkaProducer(bootstrap_servers=mock.url, acks="all") as producer:
        for number in range(sent):
            raw = JSON.encode(message(number), Origin("web", "1"))
            await producer.send("events", raw, partition=number % 4)
    async with first.runs():
        await until(lambda: first.heard)
        async with second.runs():
            await until(lambda: len({*first.numbers, *second.numbers}) == sent)
    assert second.heard
    assert not cut_off
    for partition in range(4):
        one, other = (
            [each.offset for each in member.heard if each.partition == partition] for member in (first, second)
        )
        assert {*one, *other} == set(range(sent // 4))
        assert one == list(range(len(one)))
        assert other == list(range(sent // 4 - len(other), sent // 4))


@pytest.mark.long
async def test_commit_that_failed_is_made_again(mock: KafkaMock) -> None:
    program = Program(mock.url)
    mock.refuse(*[UNKNOWN_SERVER_ERROR] * 3, request=OFFSET_COMMIT)
    async with AIOKafkaProducer(bootstrap_servers=mock.url, acks="all") as producer:
        await producer.send_and_wait("events", b"junk", partition=0)
    async with program.runs():
        async with asyncio.timeout(DEADLINE):
            while await committed(mock.url, 0) != 1:
                await asyncio.sleep(0.02)


async def committed(url: str, partition: int) -> int | None:
    async with AIOKafkaConsumer(bootstrap_servers=url, group_id="billing", enable_auto_commit=False) as group:
        offset: int | None = await group.committed(TopicPartition("events", partition))
        return offset
