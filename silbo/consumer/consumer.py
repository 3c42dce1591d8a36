"""What a subscription receives, dispatched: the consumer's life, from its entering to its stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

from silbo._checks import check_count, check_seconds
from silbo._reports import ErrorHook, Outage
from silbo._retry import Backoff, end_tasks, pause, raise_if_cancelled
from silbo._whistle import IAsyncEventDispatcher
from silbo.bridge import find_bridges
from silbo.consumer.acknowledgements import BROKER_RETRY, Acks, ConsumerStats
from silbo.consumer.attempts import Attempts, Policy
from silbo.consumer.keyed_queue import Lanes
from silbo.consumer.receive import Incoming, Own
from silbo.consumer.reports import Telling
from silbo.errors import BrokerUnavailable, Gap, MessageInvalid, OwnMessagesUndecided
from silbo.message import Delivery
from silbo.names import EventName
from silbo.protocols import Inbox, Receiver, Subscription

__all__ = ["GRACE", "Consumer", "ConsumerStats", "Opening"]

logger = logging.getLogger(__name__)

GRACE: Final = 0.5
"""Seconds that a stop allows the broker to answer."""


class Opening:
    """A subscription from its description to its receiver.

    Attributes:
        receiver: Once it is open.
    """

    def __init__(self, subscription: Subscription, broker: Outage) -> None:
        self.receiver: Receiver | None = None
        self._subscription, self._broker = subscription, broker
        self._stopping, self._over = asyncio.Event(), asyncio.Event()

    async def at_once(self) -> None:
        """Open it.

        Raises:
            BrokerUnavailable: the broker can't be reached.
        """
        try:
            self.receiver = await self._subscription.open()
        finally:
            self.stop()

    async def at_last(self) -> None:
        """Open it however long the broker is away; not at all where :meth:`stop` comes first."""
        trying = asyncio.create_task(self._try())
        try:
            await self._over.wait()
            await end_tasks([trying], GRACE)
        finally:
            await end_tasks([trying], 0)
        if not trying.cancelled():
            trying.result()

    async def _try(self) -> None:
        outages = 0
        try:
            while self.receiver is None and not self._stopping.is_set():
                raise_if_cancelled()
                try:
                    with self._broker.watched("open"):
                        self.receiver = await self._subscription.open()
                except BrokerUnavailable:
                    outages += 1
                    await pause(BROKER_RETRY.delay(outages), self._stopping)
        finally:
            self.stop()

    def stop(self) -> None:
        """Try no more: who waits learns what came of it."""
        self._stopping.set()
        self._over.set()

    async def wait(self) -> None:
        """Wait until it is open.

        Raises:
            BrokerUnavailable: that failed, or was stopped before.
        """
        await self._over.wait()
        if self.receiver is None:
            raise BrokerUnavailable("the consumer was not connected")

    async def aclose(self) -> None:
        """Close the receiver, where there is one."""
        if self.receiver is not None:
            await self.receiver.aclose()


AHEAD: Final = 100
"""Deliveries read before their turn: enough to batch, few enough for the group's others to get theirs."""
UNACKED: Final = 1_000
"""Deliveries in hand, those that wait for another try included; then no more are read."""
SMALL: Final = 16_384
"""Bytes of a message up to which it is decoded but once, and waits so for its turn."""
LISTENERS: Final = Backoff(initial=0.5, factor=3.0, cap=30.0)
"""Between two attempts of a delivery whose listeners fail."""


class Consumer:
    """Dispatches what a subscription receives, each at least once, under the name it was sent with.

    Entering connects; :meth:`run` goes on until :meth:`stop`; leaving waits for what is in hand and disconnects. Where it is
    not entered, :meth:`run` connects and disconnects by itself, and waits for a broker that is away at its start::

        async with Consumer(dispatcher, streams.group("billing", start="new"), events=[USER_JOINED]) as consumer:
            loop.add_signal_handler(signal.SIGTERM, consumer.stop)
            await consumer.run()

    A delivery is acknowledged after its listeners ran. When one fails, all run again later, on an event rebuilt from
    bytes; meanwhile later deliveries of the same key wait, and others go on. After the last attempt the delivery becomes
    a dead letter, as a malformed one does at once: it would never get better. What arrives has its ``event.origin`` and
    is not bridged again. A broker that is away is waited for.

    Args:
        dispatcher: Any dispatcher of silbo's or Whistle's.
        subscription: What to receive: a broker's ``group(...)`` or ``subscribe(...)``.
        events: The names whose events are rebuilt as their class. Others arrive as a notification or ECST event whose
            data is its ``payload``.
        own: What to do with messages of this program's own app: ``"skip"`` or ``"handle"``. It has to be said where the
            dispatcher bridges the app that it consumes.
        concurrency: Deliveries handled side by side, over different keys; those of one key stay in order. With more
            than 1, a message that has a listener and no key is malformed.
        max_attempts: How often the listeners of one delivery run, all consumers of its group taken together. One that
            kills its process may run once more: its first beginning is not counted.
        backoff: Between two attempts; from 0.5 to 30 seconds by default.
        inbox: Remembers what the group has handled, so that what comes again has no second effect.
        drain: Seconds in which a stop finishes what was received; then listeners that still run are cancelled.
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
        max_attempts: int = 5,
        backoff: Backoff = LISTENERS,
        inbox: Inbox | None = None,
        drain: float = 10.0,
        on_error: ErrorHook | None = None,
    ) -> None:
        for given, method in ((dispatcher, "adispatch"), (subscription, "open")):
            if isinstance(given, type) or not hasattr(given, method):
                raise TypeError(
                    f"a consumer takes a dispatcher and a subscription, not {dispatcher!r} and {subscription!r}; "
                    "a broker's group(...) or subscribe(...) is one"
                )
        if own not in ("skip", "handle", None):
            raise ValueError(f'own is "skip", "handle" or None, not {own!r}')
        if not isinstance(backoff, Backoff):
            raise TypeError(f"backoff is a Backoff(initial=..., factor=..., cap=...), not {backoff!r}")
        if inbox is not None and not subscription.name:
            raise ValueError("an inbox remembers what a group has handled, and this subscription has no group")
        if inbox is not None and (isinstance(inbox, type) or not hasattr(inbox, "handling")):
            raise TypeError(f"inbox is an Inbox, as RedisInbox(client) or SQLAlchemyInbox(sessions), not {inbox!r}")
        concurrency = check_count("concurrency", concurrency)
        max_attempts = check_count("max_attempts", max_attempts)
        self.stats: Final = ConsumerStats()
        self._dispatcher, self._subscription, self._own = dispatcher, subscription, own
        self._incoming = Incoming(events, app=subscription.app, own=own)
        self._policy = Policy(
            max_attempts=max_attempts,
            backoff=backoff,
            needs_keys=concurrency > 1,
            inbox=inbox,
            group=subscription.name,
        )
        self._telling = Telling(on_error, logger, group=subscription.name, max_attempts=max_attempts)
        self._concurrency, self._drain = concurrency, check_seconds("drain", drain, zero=True)
        self._lanes = Lanes()
        self._ahead = max(AHEAD, 2 * concurrency)
        self._entered = False
        self._running: asyncio.Task[Any] | None = None
        self._stopping, self._ended, self._freed = (asyncio.Event() for _ in range(3))
        self._opening = Opening(subscription, self._telling.broker)
        self._drain_until = inf

    # -- lifecycle ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            OwnMessagesUndecided: the dispatcher bridges the same app, and ``own`` is not given.
            BrokerUnavailable: it can't be reached; later outages are waited for.
        """
        if self._entered:
            raise RuntimeError("a consumer is entered once, and before it runs; make another")
        self._entered = True
        try:
            self._check_own()
            await self._opening.at_once()
        finally:
            self._opening.stop()
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
            await self._opening.aclose()

    async def ready(self) -> None:
        """Wait until the consumer is connected: the broker has confirmed the subscription.

        Raises:
            BrokerUnavailable: that failed, or was stopped before.
        """
        await self._opening.wait()

    def stop(self) -> None:
        """Let :meth:`run` end with what it has received; to be called in the loop's thread, as from a signal.

        Nothing is received any more. What is not done within ``drain`` seconds is cancelled or not begun; that, and what
        waits for another try, is left to the group's other consumers.
        """
        if not self._stopping.is_set():
            self._drain_until = monotonic() + self._drain
            self._lanes.end_retries()
        self._stopping.set()
        self._freed.set()
        self._opening.stop()

    async def run(self) -> None:
        """Receive and dispatch until :meth:`stop`. A cancellation leaves at once; what was in hand comes again.

        A consumer that is not entered connects first, and waits for a broker that can't be reached, with a line in the
        log; at its end it disconnects. One that was stopped or left before it began, as by a task that came too late, is done.

        Raises:
            OwnMessagesUndecided: the dispatcher bridges the same app, and ``own`` is not given.
            RuntimeError: the consumer has run already, or could not be entered.
        """
        if self._running is not None or (self._entered and self._opening.receiver is None):
            raise RuntimeError("a consumer runs once; make another")
        self._running = asyncio.current_task()
        was_entered, self._entered = self._entered, True
        try:
            if not was_entered:
                self._check_own()
                await self._opening.at_last()
            if self._opening.receiver is not None:
                await self._consume(self._opening.receiver)
        finally:
            if not was_entered:
                self._opening.stop()
                await self._opening.aclose()

    async def _consume(self, receiver: Receiver) -> None:
        stopping, telling = self._stopping, self._telling
        acks = Acks(receiver, self.stats, telling, stopping=stopping, freed=self._freed)
        attempts = Attempts(
            self._dispatcher,
            self._incoming,
            self._policy,
            receiver,
            self._lanes,
            acks,
            self.stats,
            telling,
            stopping,
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(self._read(receiver, acks))
                working = [tasks.create_task(attempts.work()) for _ in range(self._concurrency)]
                keeping = tasks.create_task(acks.keep_on())
                acknowledging = tasks.create_task(acks.run())
                await stopping.wait()
                await end_tasks([reading], GRACE)  # longer is a broker that does not answer
                self._lanes.close(self._concurrency)
                await end_tasks(working, self._drain_until - monotonic())
                keeping.cancel()
                acks.close()
                await end_tasks([acknowledging], GRACE)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self.stop()
            try:
                await acks.finish(GRACE)
            finally:
                telling.log.flush()
                self._ended.set()

    def _leave(self) -> None:
        if self._running is not None and not self._ended.is_set():
            self._running.cancel()

    # -- receive --------------------------------------------------------------------------------------------

    async def _read(self, receiver: Receiver, acks: Acks) -> None:
        outages = 0
        while not self._stopping.is_set():
            raise_if_cancelled()
            room = min(self._ahead - len(self._lanes), UNACKED - len(acks))
            if room <= 0 or len(self._lanes) > self._ahead // 2:  # half of it is done first: so they come in batches
                self._freed.clear()
                await self._freed.wait()
                continue
            asked = monotonic()
            try:
                with self._telling.broker.watched("read"):
                    items = await receiver.receive(room)
            except BrokerUnavailable:
                outages += 1
                await pause(BROKER_RETRY.delay(outages), self._stopping)
                continue
            outages = 0
            acks.doubt(asked)
            self._check_own()
            await self._accept(items, acks)

    async def _accept(self, items: Sequence[Delivery | Gap], acks: Acks) -> None:
        for item in items:
            if isinstance(item, Gap):
                self.stats.gaps += 1
                await self._telling.gap(item)
            elif acks.take(item):
                self.stats.received += 1
                self.stats.claimed += item.attempt > 1
                self._put(item)

    def _put(self, delivery: Delivery) -> None:
        try:
            message = delivery.message()
        except MessageInvalid:  # reported in its turn
            self._lanes.put(delivery, None, None)
        else:
            key = self._incoming.key(delivery, message)
            self._lanes.put(delivery, message if len(delivery.raw) <= SMALL else None, key)

    def _check_own(self) -> None:
        app = self._subscription.app
        if self._own is None and any(bridge.publisher.app == app for bridge in find_bridges(self._dispatcher)):
            raise OwnMessagesUndecided(app)
