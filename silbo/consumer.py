"""Delivery -> event -> dispatch -> acknowledge, or try again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Final, Literal, Self

from silbo._whistle import IAsyncEventDispatcher
from silbo.acks import BROKER, Acks
from silbo.bridge import bridges
from silbo.errors import BrokerUnavailable, Gap, MessageInvalid, OwnMessagesUndecided
from silbo.incoming import Incoming, Own
from silbo.lanes import Lane, Lanes
from silbo.message import Delivery
from silbo.names import EventName
from silbo.protocols import Receiver, Subscription
from silbo.reporting import ErrorHook, Report
from silbo.retry import Backoff, leave_if_cancelled, pause

__all__ = ["Consumer", "ConsumerStats"]

logger = logging.getLogger(__name__)

AHEAD: Final = 100
"""Deliveries read before their turn: enough to batch, few enough for the group's others to get theirs."""
UNACKED: Final = 1_000
"""Deliveries in hand, those that wait for another try included; then no more are read."""
GRACE: Final = 0.5
"""Seconds that a stop allows the broker to answer."""
DRAIN: Final = 10.0
"""Seconds in which a stop still begins what was received; within the 30 that most supervisors allow."""
LISTENERS: Final = Backoff(initial=0.1, cap=30.0)
"""Between two attempts of a delivery whose listeners fail."""


@dataclass(slots=True)
class ConsumerStats:
    """What a consumer has done so far.

    Attributes:
        received: Deliveries, each counted once however often it is tried.
        handled: Whose listeners all ran.
        failed: Attempts in which a listener failed.
        retried: Attempts after such a failure.
        malformed: No message, or it doesn't fit its event class: reported, then acknowledged.
        skipped: This program's own, and unwanted.
        gaps: Reports that messages may have been missed.
    """

    received: int = 0
    handled: int = 0
    failed: int = 0
    retried: int = 0
    malformed: int = 0
    skipped: int = 0
    gaps: int = 0


class Consumer:
    """Dispatches what a subscription receives, each at least once, under the name it was sent with.

    Entering connects; :meth:`run` goes on until :meth:`stop`; leaving waits for what is in hand and disconnects::

        async with Consumer(dispatcher, streams.group("billing", start="new"), events=[USER_JOINED]) as consumer:
            loop.add_signal_handler(signal.SIGTERM, consumer.stop)
            await consumer.run()

    A delivery is acknowledged after its listeners ran. When one fails, all run again later, on an event rebuilt from
    bytes, while later deliveries go on. A malformed one is reported and acknowledged: it would never get better. What
    arrives has its ``event.origin`` and is not bridged again. A broker that is away is waited for.

    Args:
        dispatcher: Any dispatcher of silbo's or Whistle's.
        subscription: What to receive: a broker's ``group(...)`` or ``subscribe(...)``.
        events: The names whose events are rebuilt as their class. Others arrive as a notification or ECST event whose
            data is its ``payload``.
        own: What to do with messages of this program's own app: ``"skip"`` or ``"handle"``. It has to be said where the
            dispatcher bridges the app that it consumes.
        concurrency: Deliveries handled side by side, over different keys; those of one key stay in order. Those without
            a key all take one line, and the first of them is reported.
        on_error: ``(error, delivery)``, sync or async: gets the errors of listeners, malformed messages, and each
            :class:`~silbo.errors.Gap` with None; else they are logged.

    Attributes:
        stats: Counts, kept up to date.
    """

    def __init__(
        self,
        dispatcher: IAsyncEventDispatcher,
        subscription: Subscription,
        *,
        events: Iterable[EventName[Any]] = (),
        own: Own | None = None,
        concurrency: int = 1,
        on_error: ErrorHook | None = None,
    ) -> None:
        if not hasattr(subscription, "open"):
            raise TypeError(
                f"a consumer takes a dispatcher and a subscription, not {subscription!r}; "
                "a broker's group(...) or subscribe(...) is one"
            )
        if own not in ("skip", "handle", None):
            raise ValueError(f'own is "skip", "handle" or None, not {own!r}')
        if concurrency < 1:
            raise ValueError(f"concurrency is 1 or more, not {concurrency!r}")
        self.stats: Final = ConsumerStats()
        self._dispatcher, self._subscription, self._own = dispatcher, subscription, own
        self._incoming = Incoming(events, app=subscription.app, own=own)
        self._report = Report(on_error, logger)
        self._lanes = Lanes(concurrency, self._report)
        self._ahead = max(AHEAD, 2 * concurrency)
        self._entered = False
        self._running: asyncio.Task[Any] | None = None
        self._opened, self._stopping, self._ended, self._freed = (asyncio.Event() for _ in range(4))
        self._receiver: Receiver | None = None
        self._begin_until = inf

    # -- lifecycle ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            OwnMessagesUndecided: the dispatcher bridges the same app, and ``own`` is not given.
            BrokerUnavailable: it can't be reached; later outages are waited for.
        """
        if self._entered:
            raise RuntimeError("a consumer is entered once; make another")
        self._entered = True
        try:
            self._check_own()
            self._receiver = await self._subscription.open()
        finally:
            self._opened.set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        try:
            if self._running is not None:
                if isinstance(error, asyncio.CancelledError):
                    self._leave()
                await self._ended.wait()
        finally:
            self._leave()  # where the wait was cancelled
            if self._receiver is not None:
                await self._receiver.aclose()

    async def ready(self) -> None:
        """Wait until the consumer is entered: the broker has confirmed the subscription.

        Raises:
            BrokerUnavailable: entering failed.
        """
        await self._opened.wait()
        if self._receiver is None:
            raise BrokerUnavailable("the consumer could not be entered")

    def stop(self) -> None:
        """Let :meth:`run` end with what it has received; to be called in the loop's thread, as from a signal.

        Nothing is received any more. What waits for its turn is begun within 10 seconds; what is left then, or waits for
        another try, stays with the broker.
        """
        if not self._stopping.is_set():
            self._begin_until = monotonic() + DRAIN
        self._stopping.set()
        self._freed.set()

    async def run(self) -> None:
        """Receive and dispatch until :meth:`stop`. A cancellation leaves at once; what was in hand comes again.

        Raises:
            OwnMessagesUndecided: a bridge for the same app was added to the dispatcher.
            RuntimeError: the consumer is not entered, or has run already.
        """
        if self._receiver is None or self._running is not None:
            raise RuntimeError("enter the consumer with 'async with', then run it once")
        self._running = asyncio.current_task()
        acks = Acks(self._receiver, self._report.log, stopping=self._stopping, freed=self._freed)
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(self._read(self._receiver, acks))
                working = [tasks.create_task(self._work(lane, acks)) for lane in self._lanes]
                acknowledging = tasks.create_task(acks.run())
                await self._stopping.wait()
                await asyncio.wait([reading], timeout=GRACE)
                if reading.cancel():  # a broker that does not answer
                    await asyncio.wait([reading])
                self._lanes.close()
                await asyncio.wait(working)
                acks.close()
                await asyncio.wait([acknowledging], timeout=GRACE)
                acknowledging.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self.stop()
            try:
                await acks.finish(GRACE)
            finally:
                self._ended.set()

    def _leave(self) -> None:
        if self._running is not None and not self._ended.is_set():
            self._running.cancel()

    # -- receive --------------------------------------------------------------------------------------------

    async def _read(self, receiver: Receiver, acks: Acks) -> None:
        outages = 0
        while not self._stopping.is_set():
            leave_if_cancelled()
            room = min(self._ahead - len(self._lanes), UNACKED - len(acks))
            if room <= 0 or len(self._lanes) > self._ahead // 2:  # half of it is done first: so they come in batches
                self._freed.clear()
                await self._freed.wait()
                continue
            try:
                items = await receiver.receive(room)
            except BrokerUnavailable as error:
                outages += 1
                self._report.log.write("broker unavailable, trying again", error)
                await pause(BROKER.delay(outages), self._stopping)
                continue
            outages = 0
            self._check_own()
            await self._accept(items, acks)

    async def _accept(self, items: Sequence[Delivery | Gap], acks: Acks) -> None:
        for item in items:
            if isinstance(item, Gap):
                self.stats.gaps += 1
                await self._report("messages may have been missed", item, None, address=item.address)
            elif acks.take(item):
                self.stats.received += 1
                self._lanes.put(await self._lanes.choose(item), item)

    def _check_own(self) -> None:
        app = self._subscription.app
        if self._own is None and any(bridge.publisher.app == app for bridge in bridges(self._dispatcher)):
            raise OwnMessagesUndecided(app)

    # -- dispatch -------------------------------------------------------------------------------------------

    async def _work(self, lane: Lane, acks: Acks) -> None:
        while (delivery := await lane.get()) is not None and monotonic() < self._begin_until:
            leave_if_cancelled()
            if await self._handle(delivery) or not self._retry(delivery, lane):
                acks.done(delivery)
            self._lanes.done()
            if not len(self._lanes):
                acks.no_more()
            self._freed.set()

    async def _handle(self, delivery: Delivery) -> bool:
        """Dispatch one; False when that failed."""
        everybody = self._receiver is not None and self._receiver.skips_own_instance
        try:
            arrival = self._incoming.arrival(delivery, skips_own_instance=everybody)
        except MessageInvalid as error:
            self.stats.malformed += 1
            await self._report("malformed message", error, delivery, **_where(delivery))
            return True
        except Exception as error:  # noqa: BLE001  # a class of the host's that can't be an event
            return await self._failed(error, delivery)
        if arrival is None:
            self.stats.skipped += 1
            return True
        try:
            await self._dispatcher.adispatch(arrival.name, arrival.event)
        except asyncio.CancelledError:
            leave_if_cancelled()
            return await self._failed(RuntimeError("a listener was cancelled, but not by its consumer"), delivery)
        except Exception as error:  # noqa: BLE001  # a cancellation passes through: the delivery stays with the broker
            return await self._failed(error, delivery)
        self.stats.handled += 1
        return True

    async def _failed(self, error: Exception, delivery: Delivery) -> Literal[False]:
        self.stats.failed += 1
        await self._report("listener failed", error, delivery, **_where(delivery))
        return False

    def _retry(self, delivery: Delivery, lane: Lane) -> bool:
        """Plan another attempt; False when there is none."""
        delay = LISTENERS.delay(delivery.attempt) if delivery.id else None  # what is not kept can't be tried again
        if delay is None:
            return False
        again = replace(delivery, attempt=delivery.attempt + 1)
        asyncio.get_running_loop().call_later(delay, self._try_again, lane, again)
        return True

    def _try_again(self, lane: Lane, delivery: Delivery) -> None:
        if not self._stopping.is_set():
            self.stats.retried += 1
            self._lanes.put(lane, delivery)


def _where(delivery: Delivery) -> dict[str, object]:
    return {"address": delivery.address, "delivery_id": delivery.id, "attempt": delivery.attempt}
