"""What a consumer has in hand: kept while it is in work, acknowledged in batches when it is done."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Final

from silbo._retry import Backoff, pause, raise_if_cancelled
from silbo.consumer.reports import Telling
from silbo.errors import BrokerUnavailable
from silbo.message import Delivery
from silbo.protocols import Receiver

__all__ = ["Acks", "ConsumerStats"]

BROKER_RETRY: Final = Backoff(initial=0.05, cap=1.0)
"""Between two tries of a broker that is away."""


@dataclass(slots=True)
class ConsumerStats:
    """What a consumer has done so far.

    Attributes:
        received: Deliveries, each counted once however often it is tried.
        claimed: Of these, what had been given out before: to a consumer that is gone, or to this one.
        handled: Whose listeners all ran.
        failed: Attempts in which a listener failed.
        retried: Attempts after such a failure.
        malformed: No message, or it doesn't fit its event class, or has no key where one is needed.
        dead: Became dead letters, after their last attempt or because they are malformed.
        duplicates: Were handled before, as the inbox says: nothing was run.
        skipped: This program's own, and unwanted.
        lost: Taken over by another consumer while they waited for their turn, or were in work.
        gaps: Reports that messages may have been missed.
    """

    received: int = 0
    claimed: int = 0
    handled: int = 0
    failed: int = 0
    retried: int = 0
    malformed: int = 0
    dead: int = 0
    duplicates: int = 0
    skipped: int = 0
    lost: int = 0
    gaps: int = 0


ACK_WITHIN: Final = 0.2
"""Seconds that an acknowledgement waits for others to go with it."""
ACK_BATCH: Final = 100
"""So many go without waiting for more."""


class Acks:
    """Deliveries from their arrival until the broker knows that they are done; its length is how many those are.

    What can't be acknowledged (an empty ``id``) is not among them.
    """

    def __init__(
        self,
        receiver: Receiver,
        stats: ConsumerStats,
        telling: Telling,
        *,
        stopping: asyncio.Event,
        freed: asyncio.Event,
    ) -> None:
        self._receiver, self._stats, self._telling = receiver, stats, telling
        self._stopping, self._freed = stopping, freed
        self._in_hand: dict[tuple[str, str], Delivery] = {}  # by address and id
        self._settled: set[tuple[str, str]] = set()  # of these, what is in work no more
        self._done: list[Delivery] = []
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._flushing, self._keeping = asyncio.Lock(), asyncio.Lock()
        self._closed = False
        self._every = receiver.keep_every
        self._kept = monotonic()  # since then all that is in hand is surely ours

    def __len__(self) -> int:
        return len(self._in_hand)

    # -- in hand --------------------------------------------------------------------------------------------

    def take(self, delivery: Delivery) -> bool:
        """Note that it arrived; False when it is in hand: a broker repeats what it had no answer for."""
        return not delivery.id or self._in_hand.setdefault(_place(delivery), delivery) is delivery

    def has(self, delivery: Delivery) -> bool:
        """Whether it is still in hand, and not another consumer's."""
        return not delivery.id or self._in_hand.get(_place(delivery)) is delivery

    def settle(self, delivery: Delivery) -> None:
        """It is in work no more, and the broker need not keep it."""
        if delivery.id and self.has(delivery):
            self._settled.add(_place(delivery))

    def drop(self, delivery: Delivery) -> None:
        """It is not in hand any more."""
        if delivery.id and self.has(delivery):
            del self._in_hand[_place(delivery)]
            self._settled.discard(_place(delivery))
            self.freed()

    def freed(self) -> None:
        """Let those go on who wait for room."""
        self._freed.set()

    # -- keep -----------------------------------------------------------------------------------------------

    def is_sure(self) -> bool:
        """Whether what is in hand can't have been taken over: it was kept a short while ago."""
        return self._every is None or monotonic() - self._kept <= 2 * self._every  # it is ours a third longer

    async def check(self) -> bool:
        """Ask the broker what is still in hand; False when the stop comes before it answers."""
        outages = 0
        while not self.is_sure():
            async with self._keeping:  # one asks for all
                if self.is_sure():
                    break
                try:
                    await self._keep()
                    break
                except BrokerUnavailable:
                    outages += 1
            if self._stopping.is_set():
                return False
            await pause(BROKER_RETRY.delay(outages), self._stopping)
        return True

    def doubt(self, since: float) -> None:
        """Something has arrived that was asked for at this time; that may be long ago."""
        self._kept = min(self._kept, since)

    async def keep_on(self) -> None:
        """Tell the broker again and again what is in work."""
        outages = 0
        while self._every is not None:
            await asyncio.sleep((BROKER_RETRY.delay(outages) or 0) if outages else self._every)
            raise_if_cancelled()
            try:
                async with self._keeping:
                    await self._keep()
                outages = 0
            except BrokerUnavailable:
                outages += 1

    async def _keep(self) -> None:
        began = monotonic()
        kept = [delivery for place, delivery in self._in_hand.items() if place not in self._settled]
        with self._telling.broker.watched("keep"):
            lost = await self._receiver.keep(*kept)
        for delivery in lost:
            if self.has(delivery) and _place(delivery) not in self._settled:
                self.drop(delivery)
                self._stats.lost += 1
        self._kept = began

    # -- acknowledge ----------------------------------------------------------------------------------------

    def done(self, delivery: Delivery) -> None:
        """Acknowledge it with one of the next batches."""
        if delivery.id:
            place = delivery.address, delivery.id
            self._in_hand[place] = delivery  # also where it was lost, and perhaps has come back since
            self._settled.add(place)
            self._done.append(delivery)
            self._some.set()
            if len(self._done) >= ACK_BATCH:
                self._enough.set()

    def no_more(self) -> None:
        """Nothing is being worked on that a batch could wait for."""
        self._enough.set()

    def close(self) -> None:
        """Nothing more will be done: let :meth:`run` acknowledge the rest and end."""
        self._closed = True
        self._some.set()
        self._enough.set()

    async def run(self) -> None:
        """Acknowledge what is done: at once when nothing is worked on that could go with it, else after a moment."""
        outages = 0
        while self._done or not self._closed:
            raise_if_cancelled()
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(ACK_WITHIN):
                    await self._enough.wait()
            try:
                with self._telling.broker.watched("ack"):
                    await self.flush()
                outages = 0
            except BrokerUnavailable:
                outages += 1
                await pause(BROKER_RETRY.delay(outages), self._stopping)

    async def flush(self) -> None:
        """Acknowledge what is done now; what fails, or is cancelled, stays for the next time.

        Raises:
            BrokerUnavailable: it was not acknowledged.
        """
        async with self._flushing:
            self._enough.clear()
            batch = tuple(self._done)
            if batch:
                await self._receiver.ack(*batch)
            del self._done[: len(batch)]
            for delivery in batch:
                place = delivery.address, delivery.id
                if self._in_hand.get(place) is delivery:
                    del self._in_hand[place]
                    self._settled.discard(place)
            if not self._done:
                self._some.clear()
            self.freed()

    async def finish(self, timeout: float) -> None:
        """Acknowledge what is left, within so many seconds; what fails is logged, and will come again."""
        try:
            async with asyncio.timeout(timeout):
                await self.flush()
        except (BrokerUnavailable, TimeoutError) as error:
            self._telling.log.write("not acknowledged at the end, they will come again", error)


def _place(delivery: Delivery) -> tuple[str, str]:
    return delivery.address, delivery.id
