"""A loop around one of Kafka's own consumer groups, to copy into a program: docs/howto/receive.md.

The records of a partition are handled one after another, in their order; partitions are handled side by side. A record's offset is
committed after its listeners ran. A record that failed is tried again while its partition is paused, and parked after its
last attempt. A partition that goes to another member goes after the record in hand is finished and committed.

Needs confluent-kafka 2.13 or later, whose librdkafka moves only the partitions that have to move.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from confluent_kafka import KafkaException, Message, TopicPartition
from confluent_kafka.aio import AIOConsumer

from silbo import Backoff
from silbo.errors import MessageInvalid, VersionTooNew

__all__ = ["KafkaGroup"]

MOST_WAITING: Final = 100
"""Records of one partition that wait in memory; with more of them the partition is paused."""

POLL: Final = 0.1
"""Seconds between two looks at the partitions: what is finished is committed, what may go on is resumed."""

BACKOFF: Final = Backoff(initial=1.0, cap=60.0, attempts=8)
"""About two minutes of attempts."""

logger = logging.getLogger(__name__)


class KafkaGroup:
    """One member of a consumer group.

    Args:
        settings: librdkafka's: at least ``bootstrap.servers`` and ``group.id``.
        topics: The topics to read.
        handle: Runs the listeners of a record.
        park: Keeps a record that is given up, and returns when it is safe.
        backoff: The pauses between attempts, and the number of attempts after which a record is parked.
        drain: Seconds for the record in hand when its partition goes to another member, or the program stops. Keep it below
            ``max.poll.interval.ms``.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        topics: Iterable[str],
        handle: Callable[[Message], Awaitable[object]],
        park: Callable[[Message, Exception], Awaitable[object]],
        *,
        backoff: Backoff = BACKOFF,
        drain: float = 30.0,
    ) -> None:
        self._settings = settings
        self._topics = list(topics)
        self._handle = handle
        self._park = park
        self._backoff = backoff
        self._drain = drain
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._stopping = False
        self._next_look = 0.0

    def stop(self) -> None:
        """Let `run` finish the records in hand, commit them and return."""
        self._stopping = True

    async def run(self) -> None:
        """Handle records until `stop` is called. If cancelled, leave the records in hand to the other members.

        Only this task calls the consumer. A call from a worker would wait for the end of a poll, and that poll for the
        worker, when a partition is given away.

        Raises:
            KafkaException: Kafka refuses this member for good.
        """
        consumer = AIOConsumer(
            {
                "auto.offset.reset": "earliest",
                **self._settings,
                "enable.auto.commit": False,
                "partition.assignment.strategy": "cooperative-sticky",
            },
            max_workers=2,  # a poll, and what its callback calls
        )
        try:
            await consumer.subscribe(self._topics, on_revoke=self._give_away, on_lost=self._leave)
            while not self._stopping:
                # One record a call: of many, those before a rebalance could belong to another member already.
                record = await consumer.poll(POLL)
                if record is not None:
                    self._take(record)
                await self._look_after(consumer)
            for lane in self._lanes.values():
                lane.leaving.set()
            end = time.monotonic() + self._drain
            while time.monotonic() < end and not all(lane.is_settled for lane in self._lanes.values()):
                await consumer.poll(POLL)  # if a rebalance is under way, Kafka takes the last commits after it
                await self._look_after(consumer)
        finally:
            if not self._stopping:
                for lane in self._lanes.values():
                    lane.cancel()
            await consumer.close()  # gives all partitions away

    def _take(self, record: Message) -> None:
        if error := record.error():
            if error.fatal():
                raise KafkaException(error)
            logger.warning("Kafka: %s", error)
            return
        topic, partition, offset = record.topic(), record.partition(), record.offset()
        assert topic is not None  # only an error comes from nowhere
        assert partition is not None
        assert offset is not None
        lane = self._lanes.setdefault((topic, partition), _Lane())
        lane.waiting.append((offset, record))
        if lane.worker is None or lane.worker.done():
            lane.worker = asyncio.create_task(self._work(lane))

    async def _work(self, lane: _Lane) -> None:
        while lane.waiting and not lane.leaving.is_set():
            offset, record = lane.waiting.popleft()
            if await self._finish(lane, record):
                lane.finished = offset + 1

    async def _finish(self, lane: _Lane, record: Message) -> bool:
        """Handle a record until it succeeds, or park it. False if its partition left before."""
        given_up: Exception | None = None
        attempt = 0
        while True:
            attempt += 1
            try:
                if given_up is None:
                    await self._handle(record)
                else:
                    await self._park(record, given_up)
            except Exception as error:
                logger.exception("%s %s at %s failed", record.topic(), record.partition(), record.offset())
                delay = self._backoff.delay(attempt)
                # A newer program can handle a message of a newer version: the partition waits for it.
                is_last = delay is None and not isinstance(error, VersionTooNew)
                if given_up is None and (is_last or isinstance(error, MessageInvalid)):
                    given_up = error
                    continue
            else:
                lane.is_retrying = False
                return True
            lane.is_retrying = True
            try:
                await asyncio.wait_for(lane.leaving.wait(), delay or self._backoff.cap)
            except TimeoutError:
                pass
            else:
                return False

    async def _look_after(self, consumer: AIOConsumer) -> None:
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + POLL
        for place, lane in self._lanes.items():
            has_to_pause = lane.is_retrying or len(lane.waiting) >= MOST_WAITING
            if has_to_pause != lane.is_paused:
                await (consumer.pause if has_to_pause else consumer.resume)([TopicPartition(*place)])
                lane.is_paused = has_to_pause
        await self._commit(consumer, self._lanes)

    async def _commit(self, consumer: AIOConsumer, lanes: dict[tuple[str, int], _Lane]) -> None:
        offsets = [
            TopicPartition(*place, lane.finished)
            for place, lane in lanes.items()
            if lane.finished is not None and lane.finished != lane.committed
        ]
        if not offsets:
            return
        try:
            answers = await consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:  # the next look tries it again; what is never committed comes again
            logger.warning("Kafka did not commit: %s", error)
            return
        for answer in answers:
            if answer.error:
                logger.warning("Kafka did not commit %s %s: %s", answer.topic, answer.partition, answer.error)
            else:
                lanes[answer.topic, answer.partition].committed = answer.offset

    async def _give_away(self, consumer: AIOConsumer, partitions: list[TopicPartition]) -> None:
        """Finish the records in hand, and commit them; the next member begins behind them."""
        lanes = self._drop(partitions)
        working = [lane.worker for lane in lanes.values() if lane.worker is not None]
        if working:
            _, late = await asyncio.wait(working, timeout=self._drain)
            for worker in late:
                worker.cancel()
        await self._commit(consumer, lanes)

    async def _leave(self, consumer: AIOConsumer, partitions: list[TopicPartition]) -> None:
        """Stop at once: Kafka has given the partitions to other members already."""
        for lane in self._drop(partitions).values():
            lane.cancel()

    def _drop(self, partitions: list[TopicPartition]) -> dict[tuple[str, int], _Lane]:
        places = [(partition.topic, partition.partition) for partition in partitions]
        lanes = {place: self._lanes.pop(place) for place in places if place in self._lanes}
        for lane in lanes.values():
            lane.leaving.set()
        return lanes


class _Lane:
    """One partition, as long as this member has it.

    Attributes:
        waiting: Its records that nobody has begun, each with its offset.
        worker: The task that handles them, if any has come yet.
        leaving: Set when the partition goes to another member.
        is_retrying: True while a record is tried again.
        is_paused: True while Kafka's client fetches no more of its records.
        finished: The offset behind the last finished record.
        committed: The offset that Kafka has confirmed.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Message]] = deque()
        self.worker: asyncio.Task[None] | None = None
        self.leaving = asyncio.Event()
        self.is_retrying = False
        self.is_paused = False
        self.finished: int | None = None
        self.committed: int | None = None

    @property
    def is_settled(self) -> bool:
        """True if no record is in hand, and Kafka knows what is finished."""
        return (self.worker is None or self.worker.done()) and self.finished == self.committed

    def cancel(self) -> None:
        """End its listeners at once."""
        if self.worker is not None:
            self.worker.cancel()
