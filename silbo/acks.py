"""What a consumer has in hand, and the batches in which it is acknowledged."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from silbo.errors import BrokerUnavailable
from silbo.message import Delivery
from silbo.protocols import Receiver
from silbo.reporting import QuietLog
from silbo.retry import Backoff, leave_if_cancelled, pause

__all__ = ["BROKER", "Acks"]

ACK_WITHIN: Final = 0.2
"""Seconds that an acknowledgement waits for others to go with it."""
ACK_BATCH: Final = 100
"""So many go without waiting for more."""
BROKER: Final = Backoff(initial=0.05, cap=1.0)
"""Between two tries of a broker that is away."""


class Acks:
    """Deliveries from their arrival until the broker knows that they are done; its length is how many those are.

    What can't be acknowledged (an empty ``id``) is not among them.
    """

    def __init__(self, receiver: Receiver, log: QuietLog, *, stopping: asyncio.Event, freed: asyncio.Event) -> None:
        self._receiver, self._log, self._stopping, self._freed = receiver, log, stopping, freed
        self._in_hand: set[tuple[str, str]] = set()  # address and id
        self._done: list[Delivery] = []
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._in_hand)

    def take(self, delivery: Delivery) -> bool:
        """Note that it arrived; False when it is in hand: a broker repeats what it had no answer for."""
        place = (delivery.address, delivery.id)
        if delivery.id:
            if place in self._in_hand:
                return False
            self._in_hand.add(place)
        return True

    def done(self, delivery: Delivery) -> None:
        """Acknowledge it with one of the next batches."""
        if delivery.id:
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
            leave_if_cancelled()
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(ACK_WITHIN):
                    await self._enough.wait()
            try:
                await self.flush()
                outages = 0
            except BrokerUnavailable as error:
                outages += 1
                self._log.write("not acknowledged, trying again", error)
                await pause(BROKER.delay(outages), self._stopping)

    async def flush(self) -> None:
        """Acknowledge what is done now; what fails, or is cancelled, stays for the next time.

        Raises:
            BrokerUnavailable: it was not acknowledged.
        """
        self._enough.clear()
        batch = tuple(self._done)
        if batch:
            await self._receiver.ack(*batch)
        del self._done[: len(batch)]
        self._in_hand.difference_update((delivery.address, delivery.id) for delivery in batch)
        if not self._done:
            self._some.clear()
        self._freed.set()

    async def finish(self, timeout: float) -> None:
        """Acknowledge what is left, within so many seconds; what fails is logged, and will come again."""
        try:
            async with asyncio.timeout(timeout):
                await self.flush()
        except (BrokerUnavailable, TimeoutError) as error:
            self._log.write("not acknowledged at the end, they will come again", error)
