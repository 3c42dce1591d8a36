"""Deliveries in hand: kept while they are in work, acknowledged in batches when they are done."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from time import monotonic
from typing import Any, Final

from silbo.consumer.run_state import BROKER_RETRY, RunState, Stopped
from silbo.errors import BrokerUnavailable
from silbo.message import Batch, Delivery
from silbo.protocols import BatchReceiver, Receiver

__all__ = ["Acknowledgements"]

ACK_WITHIN: Final = 0.2
"""Seconds that an acknowledgement waits for others to go with it."""
ACK_BATCH: Final = 250
"""Acknowledgements that go without waiting for more."""


@dataclass(slots=True, eq=False)
class _Done:
    """A part of a batch that is done."""

    batch: Batch


class Acknowledgements:
    """Deliveries in hand: from their arrival until the broker has acknowledged them. The length is their number.

    Deliveries that can't be acknowledged (an empty ``id``) are not among them.
    """

    def __init__(self, receiver: Receiver, run: RunState) -> None:
        self._receiver = receiver
        self._run = run
        self._takes_batches = isinstance(receiver, BatchReceiver)
        # By address and id, with the delivery, the batch that it is in, or the batch that it was done in.
        self._in_hand: dict[str, dict[str, Delivery | Batch | _Done]] = {}
        self._finished: set[tuple[str, str]] = set()  # deliveries no longer in work
        self._done: list[Delivery | _Done] = []  # to be acknowledged
        self._done_count = 0
        self._has_some = asyncio.Event()
        self._has_enough = asyncio.Event()
        self._ack_delay = receiver.ack_delay if isinstance(receiver, BatchReceiver) else 0.0
        self._soon: asyncio.TimerHandle | None = None
        self._arrived: set[tuple[str, str]] | None = None  # while the broker is asked for what is still in hand
        self._flushing = asyncio.Lock()
        self._keeping = asyncio.Lock()
        self._closed = False
        self._keep_every = receiver.keep_every
        self._kept_at = monotonic()  # at that time all deliveries in hand were surely this consumer's

    def __len__(self) -> int:
        return sum(map(len, self._in_hand.values()))

    # -- in hand --------------------------------------------------------------------------------------------

    def add(self, delivery: Delivery) -> bool:
        """Note an arrival. False if the delivery is in hand already: a broker repeats what it had no answer for."""
        if not delivery.id:
            return True
        is_new = self.list_at(delivery.address).setdefault(delivery.id, delivery) is delivery
        if is_new and self._arrived is not None:
            self._arrived.add((delivery.address, delivery.id))
        return is_new

    def add_batch(self, batch: Batch) -> Batch | None:
        """Note the arrival of a batch. Return those that are not in hand already, if any."""
        if not batch.ids:
            return batch
        at_address = self.list_at(batch.address)
        if not at_address.keys().isdisjoint(batch.ids):
            fresh = [delivery for delivery in batch if delivery.id not in at_address]
            if not fresh:
                return None
            batch = Batch.of(fresh)
        at_address.update(dict.fromkeys(batch.ids, batch))
        if self._arrived is not None:
            self._arrived.update((batch.address, entry_id) for entry_id in batch.ids)
        return batch

    def join(self, batch: Batch) -> None:
        """Make a batch of deliveries that were added one by one."""
        if batch.ids:
            self.list_at(batch.address).update(dict.fromkeys(batch.ids, batch))

    def list_at(self, address: str) -> dict[str, Delivery | Batch | _Done]:
        """Return what is in hand of an address, by the delivery's id."""
        return self._in_hand.setdefault(address, {})

    def single_out(self, batch: Batch, index: int) -> Delivery:
        """Return a delivery of a batch, which is in hand by itself from now on."""
        delivery = batch[index]
        if batch.ids:
            at_address = self.list_at(batch.address)
            if at_address.get(delivery.id) is batch:
                at_address[delivery.id] = delivery
        return delivery

    def holds(self, delivery: Delivery) -> bool:
        """Return True if the delivery is still in hand, and no other consumer is known to have it."""
        return not delivery.id or self.list_at(delivery.address).get(delivery.id) is delivery

    def stop_keeping(self, delivery: Delivery) -> None:
        """Tell the broker no longer that this delivery is in work."""
        if delivery.id and self.holds(delivery):
            self._finished.add((delivery.address, delivery.id))

    def keep_again(self, delivery: Delivery) -> None:
        """Tell the broker again that this delivery is in work: see :meth:`stop_keeping`."""
        self._finished.discard((delivery.address, delivery.id))

    def remove(self, delivery: Delivery) -> None:
        """Remove a delivery that is not to be acknowledged."""
        if delivery.id and self.holds(delivery):
            del self._in_hand[delivery.address][delivery.id]
            self._finished.discard((delivery.address, delivery.id))
            self._run.has_room.set()

    def drop(self, address: str) -> None:
        """Remove what is in hand of an address: another consumer reads it. What is in work goes on.

        Also what is done, and can't be acknowledged any more: if it comes again, it is no repetition.
        """
        at_address = self.list_at(address)
        finished = {place for place in self._finished if place[0] == address}
        self._finished -= finished
        self._run.stats.lost += sum(not isinstance(held, _Done) for held in at_address.values()) - len(finished)
        at_address.clear()
        self._run.has_room.set()

    # -- offer ----------------------------------------------------------------------------------------------

    async def offer(self, deliveries: Sequence[Delivery]) -> float | None:
        """Let the group's other consumers take over deliveries that are in hand here; remove those that one has taken.

        Args:
            deliveries: The first is waited for by the others.

        Returns:
            Seconds since the first was offered to the group for the first time; None if another consumer has taken it.

        Raises:
            BrokerUnavailable: they are not in work here; safe to repeat.
        """
        for delivery in deliveries:
            self.stop_keeping(delivery)
        with self._run.reports.broker_outage.watched("offer"):
            offered = await self._receiver.offer(*deliveries)
        for delivery, seconds in zip(deliveries, offered, strict=True):
            if seconds is None:
                self.remove(delivery)
        return offered[0]

    async def take_back(self, deliveries: Iterable[Delivery]) -> None:
        """Keep deliveries in hand that were offered; remove those that another consumer has taken meanwhile.

        Raises:
            Stopped: the consumer is stopped, and the broker did not answer; they are removed.
        """
        held = [delivery for delivery in deliveries if self.holds(delivery)]
        if not held:
            return
        lost: Collection[Delivery] = held
        try:
            async with self._keeping:
                lost = await self._run.until_answered("keep", lambda: self._receiver.keep(*held))
        finally:
            for delivery in held:
                self._finished.discard((delivery.address, delivery.id))
            for delivery in lost:
                self.remove(delivery)

    # -- keep -----------------------------------------------------------------------------------------------

    def is_certain(self, now: float | None = None) -> bool:
        """Return True if no delivery in hand can have been taken over: the broker was told of them a short while ago.

        Args:
            now: The ``monotonic()`` time, if it is known.
        """
        # A broker leaves a delivery to its consumer for three times keep_every.
        return self._keep_every is None or (monotonic() if now is None else now) - self._kept_at <= 2 * self._keep_every

    async def confirm(self) -> None:
        """Ask the broker which deliveries are still in hand, unless :meth:`is_certain`; remove the others.

        Raises:
            Stopped: the consumer is stopped, and the broker did not answer.
        """
        await self._run.until_answered("keep", self._keep_unless_certain)

    def doubt(self, since: float) -> None:
        """Note an arrival that was asked for at this ``monotonic()`` time, maybe long ago: since then it may be lost."""
        self._kept_at = min(self._kept_at, since)

    async def run_keeping(self, every: float) -> None:
        """Tell the broker every so many seconds which deliveries are in work, so that no other consumer takes them over."""
        outages = 0
        while True:
            await asyncio.sleep((BROKER_RETRY.delay(outages) or 0) if outages else every)
            self._run.tasks.check_cancelled()
            try:
                async with self._keeping:
                    with self._run.reports.broker_outage.watched("keep"):
                        await self._keep()
                outages = 0
            except BrokerUnavailable:
                outages += 1

    async def _keep_unless_certain(self) -> None:
        async with self._keeping:  # one worker asks for all
            if not self.is_certain():
                await self._keep()

    async def _keep(self) -> None:
        began_at = monotonic()
        arrived = self._arrived = set()
        try:
            lost = await self._receiver.keep(*self.list_in_work())
        finally:
            self._arrived = None
        for delivery in lost:
            place = delivery.address, delivery.id
            at_address = self.list_at(delivery.address)
            held = at_address.get(delivery.id)
            # Not if it is done by now, or was lost before and has come back. It may have left its batch meanwhile.
            if held is not None and not isinstance(held, _Done) and place not in self._finished | arrived:
                del at_address[delivery.id]
                self._run.has_room.set()
                self._run.stats.lost += 1
        self._kept_at = began_at

    def list_in_work(self) -> list[Delivery]:
        """Return what is in hand and not done, in the order of arrival."""
        found: list[Delivery] = []
        for at_address in self._in_hand.values():
            places: dict[Batch, dict[str, int]] = {}
            for entry_id, held in at_address.items():
                if isinstance(held, Delivery):
                    if (held.address, entry_id) not in self._finished:
                        found.append(held)
                elif isinstance(held, Batch):
                    if held not in places:
                        places[held] = {known: index for index, known in enumerate(held.ids)}
                    found.append(held[places[held][entry_id]])
        return found

    # -- acknowledge ----------------------------------------------------------------------------------------

    def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledge a delivery with one of the next calls; not one of an epoch that is over: it comes again, or has come."""
        if delivery.id:
            if delivery.epoch is not None and not self.holds(delivery):
                return
            # Also if it was lost, and perhaps has come back since.
            self.list_at(delivery.address)[delivery.id] = delivery
            self._finished.add((delivery.address, delivery.id))
            self._add_done(delivery, 1)

    def acknowledge_part(self, batch: Batch, first: int, end: int) -> None:
        """Acknowledge a batch's deliveries from the place ``first`` to the one before ``end`` with one of the next calls."""
        if batch.ids:
            done = _Done(batch.cut(first, end))
            self.list_at(batch.address).update(dict.fromkeys(done.batch.ids, done))
            self._add_done(done, end - first)

    def _add_done(self, done: Delivery | _Done, many: int) -> None:
        self._done.append(done)
        self._done_count += many
        self._has_some.set()
        if self._done_count >= ACK_BATCH:
            self._has_enough.set()

    def flush_soon(self) -> None:
        """Let the next batch go, within the receiver's ``ack_delay``: no delivery is in work that it could wait for."""
        if not self._ack_delay:
            self._has_enough.set()
        elif self._soon is None and self._done:
            self._soon = asyncio.get_running_loop().call_later(self._ack_delay, self._has_enough.set)

    def close(self) -> None:
        """Let :meth:`run_acknowledging` acknowledge the rest and end."""
        self._closed = True
        self._has_some.set()
        self._has_enough.set()

    async def run_acknowledging(self) -> None:
        """Acknowledge in batches: a full one or one that :meth:`flush_soon` asks for at once, others after a while."""
        while self._done or not self._closed:
            await self._has_some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(ACK_WITHIN):
                    await self._has_enough.wait()
            with suppress(Stopped):  # go on: the broker may answer while listeners still run
                await self._run.until_answered("ack", self.flush)

    async def flush(self) -> None:
        """Acknowledge everything that is done now. After an error or a cancellation it is done by the next flush.

        Raises:
            BrokerUnavailable: not acknowledged; safe to repeat.
        """
        async with self._flushing:
            self._has_enough.clear()
            if self._soon is not None:
                self._soon.cancel()
                self._soon = None
            going = tuple(self._done)
            if going:
                if self._run.known is not None:
                    await self._run.known.flush()
                await self._send(going)
            del self._done[: len(going)]
            for done in going:
                self._forget(done)
            if not self._done:
                self._has_some.clear()
            self._run.has_room.set()

    async def _send(self, going: Iterable[Delivery | _Done]) -> None:
        parts = [done if isinstance(done, Delivery) else done.batch for done in going]
        if self._takes_batches:
            receiver: Any = self._receiver
            await receiver.ack(*parts)
        else:
            await self._receiver.ack(
                *chain.from_iterable((part,) if isinstance(part, Delivery) else part for part in parts)
            )

    def _forget(self, done: Delivery | _Done) -> None:
        if isinstance(done, Delivery):
            self._done_count -= 1
            if self.holds(done):
                del self._in_hand[done.address][done.id]
                self._finished.discard((done.address, done.id))
            return
        self._done_count -= len(done.batch)
        at_address = self._in_hand[done.batch.address]
        for entry_id in done.batch.ids:
            if at_address.get(entry_id) is done:
                del at_address[entry_id]

    async def finish(self, timeout: float) -> None:
        """Acknowledge the rest within ``timeout`` seconds. A failure is logged: those deliveries will come again."""
        try:
            async with asyncio.timeout(timeout):
                await self.flush()
        except (BrokerUnavailable, TimeoutError) as error:
            self._run.reports.log.write("not acknowledged at the end, they will come again", error)
