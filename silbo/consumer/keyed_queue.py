"""A queue of deliveries that keeps the order of each key."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Final

from silbo.consumer.receive import Opened
from silbo.errors import VersionTooNew
from silbo.message import Batch, Delivery

__all__ = ["KeyedQueue", "QueuedBatch", "QueuedDelivery"]


@dataclass(slots=True, eq=False)
class QueuedDelivery:
    """A delivery with its place in the queue and its attempts.

    Attributes:
        order: The number of its arrival, from 1.
        delivery: As it was received.
        message: The opened message, for the first attempt only: listeners may change it. None if it is not kept.
        key: The routing key; None if the delivery waits for no other.
        too_new: The error if the message is of a newer version than this consumer knows.
        tries: Attempts made by this consumer.
        attempts: Attempts counted by the broker, as far as known.
        is_counted: True if the next attempt is among ``attempts`` already.
        delay: Seconds until the next attempt, once an attempt has failed.
        refusals: Times that the broker refused to store how the last attempt ended.
        failure: The error of that attempt; None if it did not begin.
        burial: The error and the attempts of the dead letter that the delivery becomes; None as long as it does not.
    """

    order: int
    delivery: Delivery
    message: Opened | None
    key: str | None
    too_new: VersionTooNew | None = None
    tries: int = 0
    attempts: int = 0
    is_counted: bool = False
    delay: float = 0.0
    refusals: int = 0
    failure: Exception | None = None
    burial: tuple[BaseException, int] | None = None

    @property
    def number(self) -> int:
        """The number of the attempt that runs or comes next, from 1, as the broker counts attempts."""
        return self.attempts + (not self.is_counted)


@dataclass(slots=True, eq=False)
class QueuedBatch:
    """A batch in the queue.

    Attributes:
        batch: The batch.
        position: The place of its next delivery.
    """

    batch: Batch
    position: int = 0


class KeyedQueue:
    """Deliveries in order of arrival; those of one key are given out one after another.

    A delivery that waits for its next attempt holds back its key, and no other. Without a key nothing is held back. The
    length is the number of deliveries that wait for a worker or are in work; those held back by a retry are not counted.

    A batch is worked through from its first delivery on, by one worker after another. Its keys are unknown, so a single
    delivery can't be put behind one.

    Attributes:
        size: The bytes of all its deliveries, also of those held back.
        blocked: The number of deliveries that wait behind another of their key, without those held back.
        batches: Batches, as they arrived; all deliveries that are ready come before them.
        keys: The keys whose deliveries have to wait behind others.
    """

    def __init__(self) -> None:
        self.size = 0
        self.blocked = 0
        self.batches: Final[deque[QueuedBatch]] = deque()
        self._ready: deque[QueuedDelivery] = deque()  # as they arrived
        self._ready_again: list[
            tuple[int, QueuedDelivery]
        ] = []  # a heap of those that were behind others, by their order
        self._waiting: deque[asyncio.Future[None]] = deque()  # workers
        self._closed = False
        self._behind: dict[str, deque[QueuedDelivery] | None] = {}  # by key: deliveries behind the first
        self.keys: Final[Any] = self._behind  # a Container[str]; but to look into a dict is faster
        self._length = 0
        self._arrived = 0
        self._parked: dict[QueuedDelivery, asyncio.TimerHandle] = {}  # waiting for their next attempt
        self._held_keys: set[str] = set()  # keys of those
        self._retries_ended = False

    def __len__(self) -> int:
        return self._length

    def has_few(self, most: int) -> bool:
        """Return True if at most so many deliveries are in work or wait for a worker alone, and not for others of their key."""
        return self._length - self.blocked <= most

    @property
    def parked(self) -> int:
        """The number of deliveries that wait for their next attempt, or for a consumer that knows their version."""
        return len(self._parked)

    def count_too_new(self) -> int:
        """Return the number of deliveries that wait for a consumer that knows their version."""
        return sum(queued.too_new is not None for queued in self._parked)

    def put(
        self, delivery: Delivery, message: Opened | None, key: str | None, too_new: VersionTooNew | None = None
    ) -> None:
        """Add a delivery behind all others of its key.

        Args:
            delivery: The delivery.
            message: Its message, if it is opened already.
            key: Its routing key; None if it has none.
            too_new: The error if this consumer does not know its version.
        """
        queued = self.put_in_work(delivery, message, key, too_new)
        if queued is not None:
            self._ready.append(queued)
            self._wake_worker()

    def put_in_work(
        self, delivery: Delivery, message: Opened | None, key: str | None, too_new: VersionTooNew | None = None
    ) -> QueuedDelivery | None:
        """Add a delivery as :meth:`put` does, and return it at once; None if it has to wait behind others of its key."""
        self._arrived += 1
        self._length += 1
        self.size += len(delivery.raw)
        queued = QueuedDelivery(order=self._arrived, delivery=delivery, message=message, key=key, too_new=too_new)
        if key is not None:
            if key in self._behind:
                behind = self._behind[key]
                if behind is None:
                    behind = self._behind[key] = deque()
                behind.append(queued)
                if key in self._held_keys:
                    self._length -= 1
                else:
                    self.blocked += 1
                return None
            self._behind[key] = None
        return queued

    def put_batch(self, batch: Batch) -> None:
        """Add a batch behind all that is there."""
        self._length += len(batch)
        self.size += sum(map(len, batch.raws))
        self.batches.append(QueuedBatch(batch))
        self._wake_worker()

    def leave(self, queued: QueuedBatch, many: int) -> None:
        """Remove the next deliveries of the first batch, so many."""
        first = queued.position
        queued.position += many
        self._length -= many
        self.size -= sum(map(len, queued.batch.raws[first : queued.position]))
        if queued.position == len(queued.batch):
            self.batches.popleft()

    def call_worker(self) -> None:
        """Let a worker that waits go on if there is something to get."""
        if self.batches or self._ready or self._ready_again:
            self._wake_worker()

    def get(self) -> QueuedDelivery | None:
        """Return the next delivery; None if there is none before the first batch: see :attr:`batches` and :meth:`wait`."""
        again = self._ready_again
        if again and (not self._ready or again[0][0] < self._ready[0].order):
            return heappop(again)[1]
        return self._ready.popleft() if self._ready else None

    async def wait(self) -> bool:
        """Wait until there is a delivery or batch to get. False once the queue is closed and empty."""
        while not (self._ready or self._ready_again or self.batches):
            if self._closed:
                return False
            woken = asyncio.get_running_loop().create_future()
            self._waiting.append(woken)
            try:
                await woken
            except BaseException:
                if woken.done() and not woken.cancelled():
                    self._wake_worker()  # another one, in this one's place
                raise
        return True

    def finish(self, queued: QueuedDelivery) -> None:
        """Remove a delivery that needs no further attempt here, and let the next one of its key go on."""
        self._length -= 1
        self.size -= len(queued.delivery.raw)
        if queued.key is None:
            return
        behind = self._behind[queued.key]
        if behind:
            following = behind.popleft()
            self.blocked -= 1
            self._put_again(following)
        else:
            del self._behind[queued.key]

    def park(self, queued: QueuedDelivery, delay: float) -> None:
        """Give out a delivery again after ``delay`` seconds, unless retries have ended by then."""
        behind = self._count_behind(queued)
        self._length -= 1 + behind
        self.blocked -= behind
        if queued.key is not None:
            self._held_keys.add(queued.key)
        self._parked[queued] = asyncio.get_running_loop().call_later(delay, self._resume, queued)

    def list_behind(self, queued: QueuedDelivery) -> list[Delivery]:
        """Return the deliveries of the same key that wait for this one, in their order."""
        behind = None if queued.key is None else self._behind[queued.key]
        return [other.delivery for other in behind or ()]

    def list_parked(self, address: str) -> list[Delivery]:
        """Return the deliveries of an address that wait for their next attempt, each with those of its key behind it."""
        return [
            delivery
            for queued in self._parked
            if queued.delivery.address == address
            for delivery in (queued.delivery, *self.list_behind(queued))
        ]

    def end_retries(self) -> None:
        """Give out no delivery again: neither those parked now nor those parked later."""
        self._retries_ended = True
        for timer in self._parked.values():
            timer.cancel()

    def close(self) -> None:
        """Let the workers no longer wait when the queue is empty. Nothing may be put afterwards."""
        self._closed = True
        while self._waiting:
            self._wake_worker()

    def _resume(self, queued: QueuedDelivery) -> None:
        del self._parked[queued]
        if not self._retries_ended:
            self._held_keys.discard(queued.key or "")
            behind = self._count_behind(queued)
            self._length += 1 + behind
            self.blocked += behind
            self._put_again(queued)

    def _put_again(self, queued: QueuedDelivery) -> None:
        heappush(self._ready_again, (queued.order, queued))
        self._wake_worker()

    def _wake_worker(self) -> None:
        while self._waiting:
            woken = self._waiting.popleft()
            if not woken.done():  # it was cancelled
                woken.set_result(None)
                return

    def _count_behind(self, queued: QueuedDelivery) -> int:
        behind = None if queued.key is None else self._behind[queued.key]
        return 0 if behind is None else len(behind)
