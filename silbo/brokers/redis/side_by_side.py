"""Receivers that are read side by side as one: each has its own connection, and one in trouble holds up no other.

:class:`SideBySide` is a :class:`~silbo.protocols.BatchReceiver` over parts; a part is a receiver of some streams, as
:class:`~silbo.brokers.redis.group.StreamReceiver`. Parts may come and go while it is read::

    receiver = SideBySide([], group="billing", keep_every=claim_after / 3, ack_delay=ACK_DELAY)
    receiver.add(part)                    # open; from now on it is read
    await receiver.remove(part)           # nothing more is read from it; what is in hand goes on to be settled
    while receiver.count_in_hand(part):   # deliveries that are not settled
        ...
    await part.aclose()                   # its owner's; from now on its deliveries count as taken over
    await receiver.aclose()               # closes the parts that are still there, too
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Coroutine, Iterable, Sequence
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from silbo._reports import Outage, RateLimitedLog
from silbo._retry import Backoff
from silbo.errors import BrokerRefused, BrokerUnavailable, Gap
from silbo.message import Batch, Delivery

__all__ = ["Part", "SideBySide"]

logger = logging.getLogger(__name__)

WAIT: Final = 0.5
"""Seconds that a call of ``receive_batches`` waits for the first items."""
SETTLE_WITHIN: Final = 1.0
"""Seconds that an acknowledgement waits for a part; then the others go on, and it is repeated before the part is read again."""
CLOSE_WITHIN: Final = 0.5
"""Seconds that reads under way, and acknowledgements, get at the end."""
PART_RETRY: Final = Backoff(initial=0.05, cap=0.5)
"""Delays between two reads of a part that is in trouble."""

_Item: TypeAlias = Delivery | Batch | Gap
_D = TypeVar("_D", Delivery, Delivery | Batch)
_T = TypeVar("_T")


class Part(Protocol):
    """A receiver that can be read beside others: its items are fetched by a task, and taken without waiting."""

    @property
    def addresses(self) -> Sequence[str]:
        """The streams that it reads; no other part reads one of them."""
        ...

    @property
    def away(self) -> Sequence[str]:
        """Those of its streams that it can't read at the moment."""
        ...

    @property
    def in_hand(self) -> int:
        """The number of deliveries that were fetched, and are not settled."""
        ...

    @property
    def has_fetched(self) -> bool:
        """True if something waits for :meth:`take`."""
        ...

    @property
    def is_closed(self) -> bool:
        """True from the begin of :meth:`aclose` on."""
        ...

    async def fetch(self, limit: int) -> None:
        """Wait up to half a second for at most ``limit`` items; raises BrokerUnavailable."""
        ...

    def take(self, limit: int) -> list[_Item]:
        """Return at most ``limit`` of the items that were fetched, and that are still this consumer's."""
        ...

    def forget(self, deliveries: Iterable[Delivery | Batch]) -> None:
        """Note that deliveries are not in hand any more; those that wait for :meth:`take` are not given out."""
        ...

    def find_unconfirmed(self, deliveries: Iterable[Delivery], since: float) -> list[Delivery]:
        """Return those that were not surely this consumer's after this loop's time."""
        ...

    async def ack(self, *deliveries: Delivery | Batch) -> None:
        """See :class:`~silbo.protocols.BatchReceiver`."""
        ...

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """See :class:`~silbo.protocols.Receiver`; what waits for :meth:`take` is kept as well."""
        ...

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        """See :class:`~silbo.protocols.Receiver`."""
        ...

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        """See :class:`~silbo.protocols.Receiver`."""
        ...

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """See :class:`~silbo.protocols.Receiver`."""
        ...

    async def aclose(self) -> None:
        """Close it. May be called twice."""
        ...


class SideBySide:
    """Several parts, read as one: see the head of this file.

    Args:
        parts: A part that is not open yet is opened by its first read.
        group: The name of the group, for the log.
        keep_every: The most seconds between two calls of :meth:`keep`; a delivery is taken over after three times as many.
        ack_delay: See :class:`~silbo.protocols.BatchReceiver`.
    """

    skips_own_instance = False
    together = 1
    """Parts that have many messages fetch so many times ``limit`` together, and each one at most ``limit``."""

    def __init__(self, parts: Iterable[Part], *, group: str, keep_every: float, ack_delay: float) -> None:
        self.keep_every: float | None = keep_every
        self.ack_delay = ack_delay
        self._group = group
        self._certain = 2 * keep_every  # seconds for which a delivery that was kept is surely this consumer's
        self._readings: list[_Reading] = []  # the next one to be taken from is the first
        self._leaving: list[_Reading] = []  # no more is read from them
        self._by_address: dict[str, _Reading] = {}
        self._gaps: list[Gap] = []  # of parts that were removed
        self._news = asyncio.Event()  # a read has ended, or a part has come
        self._log = RateLimitedLog(logger)
        self._closed = False
        for part in parts:
            self.add(part)

    # -- parts ----------------------------------------------------------------------------------------------

    def add(self, part: Part) -> None:
        """Read this part from now on. It is closed with the others, unless it is removed and closed before."""
        reading = _Reading(part, self._group, self._news)
        self._readings.append(reading)
        self._by_address.update(dict.fromkeys(part.addresses, reading))
        self._news.set()

    async def remove(self, part: Part) -> None:
        """Read no more from this part; returns when the read under way has ended, within about half a second.

        Deliveries that were given out go on to be settled through this object until the part is closed by its owner. What was
        fetched, and not given out, is not given out any more: it stays pending in Redis.
        """
        (reading,) = [each for each in self._readings if each.part is part]
        self._readings.remove(reading)
        self._leaving.append(reading)
        await reading.end_fetch()
        items = part.take(part.in_hand + 1_000)
        self._gaps += [item for item in items if isinstance(item, Gap)]
        part.forget(item for item in items if not isinstance(item, Gap))
        self._news.set()

    def count_in_hand(self, part: Part) -> int:
        """Return the number of a part's deliveries that Redis does not know to be settled."""
        owed = sum(len(reading.owed) for reading in [*self._readings, *self._leaving] if reading.part is part)
        return part.in_hand + owed

    @property
    def away(self) -> tuple[str, ...]:
        """See :class:`~silbo.protocols.Receiver`."""
        return tuple(
            address
            for reading in self._readings
            for address in (reading.part.away if reading.error is None else reading.part.addresses)
        )

    def _find(self, address: str) -> _Reading | None:
        """Return the reading that settles an address; None if its part is closed, or was never here."""
        reading = self._by_address.get(address)
        return None if reading is None or reading.part.is_closed else reading

    def _group_by_reading(self, deliveries: Iterable[_D]) -> dict[_Reading | None, list[_D]]:
        grouped: dict[_Reading | None, list[_D]] = defaultdict(list)
        for delivery in deliveries:
            grouped[self._find(delivery.address)].append(delivery)
        return grouped

    # -- reading --------------------------------------------------------------------------------------------

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """See :class:`~silbo.protocols.Receiver`."""
        items = await self.receive_batches(limit)
        return [each for item in items for each in (item if isinstance(item, Batch) else (item,))]

    async def receive_batches(self, limit: int) -> Sequence[_Item]:
        """Return what any part has, in turn; see :class:`~silbo.protocols.BatchReceiver`.

        All parts together fetch about ``together`` + 1 times ``limit`` at most. A call that is cancelled loses nothing: the reads go on.

        Raises:
            BrokerUnavailable: no part can be read.
        """
        if self._closed:
            raise BrokerUnavailable("the subscription is closed")
        ends_at = asyncio.get_running_loop().time() + WAIT
        while True:
            self._news.clear()
            self._start_fetching(limit)
            if items := self._take(limit):
                return items
            try:
                async with asyncio.timeout_at(ends_at):
                    await self._news.wait()
            except TimeoutError:
                self._check_readable()
                return []
            self._check_readable()

    def _start_fetching(self, limit: int) -> None:
        """Let all parts be read of which nothing waits to be taken. Those that had something the last time share what is fetched."""
        busy = sum(reading.is_busy for reading in self._readings)
        for reading in self._readings:
            if reading.fetching is None and not reading.part.has_fetched:
                share = self.together * limit // busy if reading.is_busy else limit // len(self._readings)
                reading.start_fetching(max(1, min(limit, share)))

    def _check_readable(self) -> None:
        """Report the parts that can't be read, or can be read again.

        Raises:
            BrokerUnavailable: none can be read, which is an outage of the consumer's.
        """
        for reading in self._readings:
            if reading.defect is not None:
                raise reading.defect
        errors = [reading.error for reading in self._readings if reading.error is not None]
        if errors and len(errors) == len(self._readings):
            raise BrokerUnavailable(str(errors[0])) from errors[0]
        for reading in self._readings:
            reading.report()

    def _take(self, limit: int) -> list[_Item]:
        """Return what was fetched, from one part after another; the next call begins with the part after the last."""
        items: list[_Item] = []
        while self._gaps and limit > 0:
            items.append(self._gaps.pop(0))
            limit -= 1
        for reading in tuple(self._readings):
            if limit <= 0:
                break
            if reading.fetching is None and reading.part.has_fetched:
                taken = reading.part.take(limit)
                limit -= sum(len(item) if isinstance(item, Batch) else 1 for item in taken)
                items += taken
                self._readings.remove(reading)
                self._readings.append(reading)
        return items

    # -- settling -------------------------------------------------------------------------------------------

    async def ack(self, *deliveries: Delivery | Batch) -> None:
        """Acknowledge deliveries; those of a part that is in trouble are acknowledged before it is read again.

        So it raises nothing: whoever waits for the others need not wait for these. If the process ends before, they come again.
        """
        grouped = self._group_by_reading(deliveries)
        await _run_all([reading.ack(own) for reading, own in grouped.items() if reading is not None])

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """Keep deliveries, and return those that are another consumer's.

        Of a part in trouble also those that may be another's by now. If they are not, they come again when it can be read.
        """
        self._leaving = [reading for reading in self._leaving if not reading.part.is_closed]
        grouped = self._group_by_reading(deliveries)
        lost = list(grouped.pop(None, []))
        readings = [*self._readings, *self._leaving]
        for found in await _run_all([reading.keep(grouped.get(reading, ()), self._certain) for reading in readings]):
            lost += found
        return lost

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        """See :class:`~silbo.protocols.Receiver`."""
        grouped = self._group_by_reading(deliveries)
        own = {reading: found for reading, found in grouped.items() if reading is not None}
        offered = await _run_all([reading.offer(found) for reading, found in own.items()])
        seconds = {
            (delivery.address, delivery.id): each
            for found, replies in zip(own.values(), offered, strict=True)
            for delivery, each in zip(found, replies, strict=True)
        }
        return [seconds.get((delivery.address, delivery.id)) for delivery in deliveries]

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        """See :class:`~silbo.protocols.Receiver`. BrokerRefused also while this part is in trouble and another is not."""
        reading = self._find(delivery.address)
        if reading is None:  # the next call of keep() tells that it is lost
            raise BrokerRefused(f"{delivery.address} is read here no longer, so no attempt can be counted")
        return await self._run_alone(reading, reading.part.count(delivery, error=error))

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """See :class:`~silbo.protocols.Receiver`. BrokerRefused as in :meth:`count`."""
        reading = self._find(delivery.address)
        if reading is None:
            return False
        return await self._run_alone(reading, reading.part.bury(delivery, error=error, attempts=attempts))

    async def _run_alone(self, reading: _Reading, call: Coroutine[Any, Any, _T]) -> _T:
        """Run a call about one delivery, which waits if only its part is in trouble: the worker has others to do."""
        try:
            return await reading.run(call)
        except BrokerRefused:
            raise
        except BrokerUnavailable as error:
            if all(each.error is not None for each in self._readings):
                raise
            raise BrokerRefused(str(error)) from error

    # -- the end --------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Acknowledge what is owed, as far as that is soon done, and close all parts. May be called twice."""
        if self._closed:
            return
        self._closed = True
        readings = [*self._readings, *self._leaving]
        try:
            await _run_all([reading.finish() for reading in readings])
            if owed := sum(len(reading.owed) for reading in readings if not reading.part.is_closed):
                self._log.write("%d parts not acknowledged at the end, they will come again", None, owed)
        finally:
            await _run_all([reading.part.aclose() for reading in readings])


class _Reading:
    """One part, the read of it that is under way, and what it owes.

    Attributes:
        part: The part.
        fetching: The task of the read under way; None if there is none.
        is_busy: True if the last read brought something.
        error: The reason why the part can't be read; None if it can.
        defect: An error of a read that is no failure of the broker's.
        owed: Deliveries that are done, and that Redis was not told of yet.
    """

    def __init__(self, part: Part, group: str, news: asyncio.Event) -> None:
        self.part = part
        self.fetching: asyncio.Task[None] | None = None
        self.is_busy = False
        self.error: BrokerUnavailable | None = None
        self.defect: BaseException | None = None
        self.owed: list[Delivery | Batch] = []
        self._news = news
        self._settling = asyncio.Lock()
        self._failures = 0
        self._is_reported = True
        addresses = ", ".join(part.addresses)
        self._outage = Outage(
            logger,
            f"{addresses} in group {group}",
            "can't be read; the others go on",
            address=addresses,
            group=group,
        )

    # -- reading --------------------------------------------------------------------------------------------

    def start_fetching(self, limit: int) -> None:
        """Begin a read of at most so many items; there is none under way."""
        self.fetching = asyncio.create_task(self._fetch(limit))
        self.fetching.add_done_callback(self._note_end)

    async def _fetch(self, limit: int) -> None:
        if self._failures:
            await asyncio.sleep(PART_RETRY.delay(self._failures) or 0)
        try:
            # First: what is done and not acknowledged would be read again, and handled again.
            await self._settle()
            await self.part.fetch(limit)
        except BrokerUnavailable as error:
            self._failures += 1
            self.fail(error)
        else:
            self._failures = 0
            self.error = None
            self._is_reported = False

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self.fetching = None
        self.is_busy = self.part.has_fetched
        if not task.cancelled():
            self.defect = task.exception() or self.defect
        self._news.set()

    async def end_fetch(self, within: float | None = None) -> None:
        """Wait for the end of the read under way; cancel it after so many seconds."""
        if (task := self.fetching) is not None:
            try:
                _ = await asyncio.wait([task], timeout=within)
            finally:
                task.cancel()
                _ = await asyncio.wait([task])

    def fail(self, error: BrokerUnavailable) -> None:
        """Note that the part is in trouble."""
        self.error = error
        self._is_reported = False

    def report(self) -> None:
        """Log that the part is in trouble, or is not any more, if that is news."""
        if self._is_reported:
            return
        self._is_reported = True
        if self.error is not None:
            self._outage.failed("read", self.error)
        else:
            self._outage.answered("read")

    # -- settling -------------------------------------------------------------------------------------------

    async def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Run a call to the part, or raise at once the error that it is in trouble with if a read is trying again.

        Raises:
            BrokerUnavailable: the error of the call, or the one before.
        """
        if self.error is not None and self.fetching is not None:
            call.close()
            raise self.error
        try:
            return await call
        except BrokerRefused:
            raise
        except BrokerUnavailable as error:
            self.fail(error)
            raise

    async def ack(self, deliveries: Sequence[Delivery | Batch]) -> None:
        """Acknowledge deliveries now, or owe it."""
        self.owed += deliveries
        try:
            async with asyncio.timeout(SETTLE_WITHIN):
                await self.run(self._settle())
        except (BrokerUnavailable, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self.fail(self._time_out("acknowledge"))
            self.part.forget(deliveries)  # a second copy that waits to be taken is not given out

    async def _settle(self) -> None:
        """Acknowledge all that is owed."""
        async with self._settling:
            while self.owed:
                going = tuple(self.owed)
                await self.part.ack(*going)
                del self.owed[: len(going)]

    async def keep(self, deliveries: Sequence[Delivery], certain: float) -> Collection[Delivery]:
        """Keep deliveries. Return those that are another consumer's, or may be: not confirmed for ``certain`` seconds."""
        try:
            async with asyncio.timeout(SETTLE_WITHIN):
                if self.fetching is None and self.owed:  # nobody reads it: it is leaving, or there is no room
                    await self.run(self._settle())
                return await self.run(self.part.keep(*deliveries))
        except (BrokerUnavailable, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self.fail(self._time_out("keep deliveries at"))
            lost = self.part.find_unconfirmed(deliveries, asyncio.get_running_loop().time() - certain)
            self.part.forget(lost)
            return lost

    async def offer(self, deliveries: Sequence[Delivery]) -> Sequence[float | None]:
        """Offer deliveries."""
        return await self.run(self.part.offer(*deliveries))

    async def finish(self) -> None:
        """End the read under way, and acknowledge what is owed, as far as that is soon done."""
        await self.end_fetch(CLOSE_WITHIN)
        if self.owed and not self.part.is_closed:
            try:
                async with asyncio.timeout(CLOSE_WITHIN):
                    await self._settle()
            except (BrokerUnavailable, TimeoutError) as error:
                logger.debug("not acknowledged at the end: %s", error)

    def _time_out(self, what: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"can't {what} {', '.join(self.part.addresses)}: no answer within {SETTLE_WITHIN:g} s")


async def _run_all(calls: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run calls side by side, and return their results when all have ended.

    Raises:
        Exception: the first error.
    """
    if len(calls) == 1:
        return [await calls[0]]
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
