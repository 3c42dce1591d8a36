"""The consumer: dispatches the messages that a subscription receives, from its start to its stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

from silbo._checks import check_count, check_seconds
from silbo._host_code import OwnTasks
from silbo._loops import LoopBinding
from silbo._message_observers import call_observers, find_observers
from silbo._reports import ErrorHook
from silbo._retry import Backoff, pause
from silbo._whistle import IAsyncEventDispatcher
from silbo.bridge import find_bridges
from silbo.consumer.acknowledgements import Acknowledgements
from silbo.consumer.arrivals import list_deliveries, note_arrivals
from silbo.consumer.attempts import Attempts
from silbo.consumer.handling_options import HandlingOptions
from silbo.consumer.heard_names import HeardNames
from silbo.consumer.keyed_queue import KeyedQueue
from silbo.consumer.known_publications import KnownPublications, find_batch_inbox
from silbo.consumer.receive import EventRebuilder, Own, check_own
from silbo.consumer.reports import DeliveryReports
from silbo.consumer.run_state import BROKER_RETRY, RunState, Stopped
from silbo.consumer.stats import ConsumerStats
from silbo.dispatch.dispatcher import AsyncEventDispatcher, count_changes
from silbo.dispatch.extension_points import check_heard_names
from silbo.errors import BrokerUnavailable, Gap, OwnMessagesUndecided, StopIncomplete
from silbo.health import Health, to_moment
from silbo.message import Batch, Delivery
from silbo.names import EventName
from silbo.protocols import BatchReceiver, Inbox, MeasuredSubscription, Receiver, SharedReceiver, Subscription

__all__ = ["Consumer"]

logger = logging.getLogger(__name__)

GRACE: Final = 0.5
"""Seconds that a stop allows the broker to answer."""
AHEAD: Final = 0.1
"""Seconds of work that are read before a worker is free: enough for batches, little enough for the group's other consumers."""
MOST_AHEAD: Final = 500
"""Deliveries read ahead at most: so large batches bring almost all of the speed that batches can bring."""
FIRST_AHEAD: Final = 100
"""Deliveries read ahead before the first is done."""
BYTES_AHEAD: Final = 1 << 22
"""Bytes of deliveries in the queue, 4 MiB, from which on no more are read."""
UNACKED: Final = 1_000
"""Deliveries in hand at most, including those that wait for their next attempt; then no more are read."""
LISTENER_RETRY: Final = Backoff(initial=0.5, factor=3.0, cap=30.0)
"""Delays between two attempts of a delivery whose listeners fail."""
LONGEST_WAIT: Final = 86_400.0
"""The longest ``newer_version_wait``, in seconds."""
UNHEARD_EVERY: Final = 60.0
"""Seconds between two warnings about names in ``events`` whose messages nobody hears."""
BRIDGES_CHECKED_EVERY: Final = 1.0
"""Seconds between two looks for a new bridge on a dispatcher that does not tell when its listeners change."""


class Consumer:
    """Dispatches what a subscription receives, each message at least once, under the name it was sent with.

    Entering connects; :meth:`run` goes on until :meth:`stop`; leaving waits for the deliveries in hand and disconnects. A
    consumer that is not entered connects and disconnects in :meth:`run`, and waits for a broker that is unavailable at its
    start::

        async with Consumer(dispatcher, streams.group("billing", start="new"), events=[USER_JOINED]) as consumer:
            loop.add_signal_handler(signal.SIGTERM, consumer.stop)
            await consumer.run()

    A delivery is acknowledged after its listeners ran. If one fails, all run again later, on an event rebuilt from the
    bytes; meanwhile later deliveries of the same key wait, and others go on. After the last attempt the delivery becomes a
    dead letter; a malformed one becomes a dead letter at once, for it fails every time. A listener fails its delivery also if
    the dispatcher isolates it with a callable ``on_error``: the other listeners run, then the delivery counts as failed. The
    events have their ``event.origin`` and are not bridged again. The consumer waits for a broker that becomes unavailable.

    Each delivery is handled in a context of its own (:mod:`contextvars`), and a cancellation that a listener or hook leaves
    behind on its task is taken back. A name in ``events`` that nobody hears is a warning in the log when :meth:`run` begins, and once
    a minute while its messages are acknowledged unheard.

    Args:
        dispatcher: Any dispatcher of silbo's or Whistle's.
        subscription: The description of what to receive: a broker's ``group(...)`` or ``subscribe(...)``.
        events: The names whose events are rebuilt as their class. Others arrive as a notification or ECST event whose
            data is its ``payload``. If the dispatcher declares names, each must be declared, with the same class, else the
            consumer is refused with its :class:`~silbo.errors.NameUnknown` or :class:`~silbo.errors.EventMismatch`.
        own: ``"skip"`` or ``"handle"`` messages of this program's own app. Has to be given if the dispatcher bridges the
            app that it consumes.
        concurrency: Deliveries handled side by side, over different keys; those of one key stay in order. With more
            than 1, each name in ``events`` needs a key, and a message that has a listener and no key is malformed.
        listener_timeout: Seconds that each listener may run that has no ``timeout`` of its own; then it is cancelled, and the
            attempt has failed with a :class:`~silbo.errors.ListenerTimeout`. Needs one of silbo's dispatchers.
        max_attempts: Attempts of one delivery, by all consumers of its group taken together. A delivery that kills its
            process may be attempted once more: its first attempt is not counted.
        give_up_on: Errors that trying again can't help: the delivery becomes a dead letter at once. Of a group of errors all
            have to be among them.
        backoff: Delays between two attempts; 0.5 to 30 seconds by default.
        inbox: Remembers the publications that the group has handled, so that a repeated one has no second effect.
        newer_version_wait: Seconds for which a message of a newer version than ``events`` has is left to the group's other
            consumers, at most a day; meanwhile its key waits. Then it becomes a dead letter. Give it more than a rolling
            deploy takes.
        drain: Seconds in which a stop finishes the deliveries in hand; then listeners that still run are cancelled. One that
            does not end then is left behind after 5 more, and :meth:`run` raises a :class:`~silbo.errors.StopIncomplete`.
        slow_after: Seconds after which a listener or hook that still runs is a warning in the log, with its file and line, and
            counted in ``stats.slow``. The warning comes again each time that the time has doubled. None for no warning.
        on_error: ``(error, delivery)``, sync or async: gets the errors of listeners, malformed messages, and each
            :class:`~silbo.errors.Gap` with None; without it they are logged.

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
        listener_timeout: float | None = None,
        max_attempts: int = 5,
        give_up_on: Sequence[type[Exception]] = (),
        backoff: Backoff = LISTENER_RETRY,
        inbox: Inbox | None = None,
        newer_version_wait: float = 300.0,
        drain: float = 10.0,
        slow_after: float | None = 10.0,
        on_error: ErrorHook | None = None,
    ) -> None:
        for given, method in ((dispatcher, "adispatch"), (subscription, "open")):
            if isinstance(given, type) or not hasattr(given, method):
                raise TypeError(
                    f"a consumer takes a dispatcher and a subscription, not {dispatcher!r} and {subscription!r}; "
                    "a broker's group(...) or subscribe(...) is one"
                )
        check_own(own)
        if not isinstance(backoff, Backoff):
            raise TypeError(f"backoff is a Backoff(initial=..., factor=..., cap=...), not {backoff!r}")
        if inbox is not None and not subscription.name:
            raise ValueError("an inbox remembers what a group has handled, and this subscription has no group")
        if inbox is not None and (isinstance(inbox, type) or not hasattr(inbox, "handling")):
            raise TypeError(f"inbox is an Inbox, as RedisInbox(client) or SQLAlchemyInbox(sessions), not {inbox!r}")
        concurrency = check_count("concurrency", concurrency)
        max_attempts = check_count("max_attempts", max_attempts)
        if check_seconds("newer_version_wait", newer_version_wait, zero=True) > LONGEST_WAIT:
            raise ValueError(
                f"newer_version_wait is at most a day, {LONGEST_WAIT:g} seconds: brokers remember no longer since when a "
                f"message is waited for; not {newer_version_wait!r}"
            )
        if listener_timeout is not None:
            check_seconds("listener_timeout", listener_timeout)
            if not isinstance(dispatcher, AsyncEventDispatcher):
                raise TypeError(f"listener_timeout needs one of silbo's dispatchers, and {dispatcher!r} is none")
        rebuilder = EventRebuilder(events, app=subscription.app, own=own)
        check_heard_names(dispatcher, rebuilder.names)
        if concurrency > 1:
            _check_keys(rebuilder.names)
        self.stats: Final = ConsumerStats()
        self._subscription = subscription
        self._own = own
        self._concurrency = concurrency
        self._drain = check_seconds("drain", drain, zero=True)
        self._slow_after = None if slow_after is None else check_seconds("slow_after", slow_after)
        self._options = HandlingOptions(
            dispatcher=dispatcher,
            heard=HeardNames(dispatcher),
            rebuilder=rebuilder,
            listener_timeout=listener_timeout,
            max_attempts=max_attempts,
            give_up_on=_check_errors(give_up_on),
            backoff=backoff,
            needs_keys=concurrency > 1,
            inbox=inbox,
            subscription=subscription,
            newer_version_wait=newer_version_wait,
        )
        stopping = asyncio.Event()
        tasks = OwnTasks("consumer", stopping=stopping, on_failure=self.stop, stats=self.stats)
        reports = DeliveryReports(
            on_error,
            logger,
            dispatcher=dispatcher,
            tasks=tasks,
            group=subscription.name,
            max_attempts=max_attempts,
        )
        self._run_state = RunState(tasks=tasks, reports=reports, stats=self.stats, stopping=stopping)
        if (asked := find_batch_inbox(inbox)) is not None:
            self._run_state.known = KnownPublications(
                asked, subscription.name, heard=self._options.heard, reports=reports, tasks=tasks
            )
        self._queue = KeyedQueue()
        self._entered = False
        self._receiver: Receiver | None = None  # once the subscription is open
        self._acks: Acknowledgements | None = None  # since it runs
        self._received_at: float | None = None  # monotonic()
        self._first_seen: dict[tuple[str, str], float] = {}  # deliveries in work that health() saw, and since when
        self._lag: int | None = None
        self._missed_told = 0  # of the missed deliveries, those that a warning has counted
        self._missed_told_at = -inf  # monotonic()
        self._opened = asyncio.Event()  # the subscription is open, or will never be
        self._running: asyncio.Task[Any] | None = None
        self._ended = asyncio.Event()
        self._drain_until = inf
        self._changes_checked: float | None = None  # of the dispatcher's listeners
        self._binding = LoopBinding("Consumer")

    @property
    def dispatcher(self) -> IAsyncEventDispatcher:
        """The dispatcher that runs the listeners."""
        return self._options.dispatcher

    @property
    def events(self) -> Collection[EventName[Any]]:
        """The names whose events are rebuilt as their class, in all their versions."""
        return self._options.rebuilder.names

    @property
    def subscription(self) -> Subscription:
        """The description of what it receives."""
        return self._subscription

    @property
    def in_hand(self) -> int:
        """The number of deliveries that wait for their turn or are in work; not those that wait for another attempt."""
        return len(self._queue)

    # -- health ---------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """Return its state now, from memory: nothing is asked."""
        reports = self._run_state.reports
        oldest_seen = self._look_at_work()
        newer = self._queue.count_too_new()
        return Health(
            part="consumer",
            name=self._subscription.name or self._subscription.app,
            is_running=self._running is not None and not self._run_state.stopping.is_set(),
            is_stopping=self._running is not None and self._run_state.stopping.is_set() and not self._ended.is_set(),
            is_connected=self._receiver is not None and not reports.broker_outage.is_on,
            away_since=reports.broker_outage.since,
            away=getattr(self._receiver, "away", ()),
            has_room=self._has_room(),
            received_at=to_moment(self._received_at),
            in_hand=len(self._queue),
            oldest_at=to_moment(oldest_seen),
            waiting_for_retry=self._queue.parked - newer,
            waiting_for_newer=newer,
            slow=self.stats.slow,
            lag=self._lag,
            unheard=self.stats.unheard,
            leads=self._receiver.leads if isinstance(self._receiver, SharedReceiver) else None,
            last_error=reports.last_error,
        )

    async def refresh_health(self) -> None:
        """Ask the broker for the group's lag, for :meth:`health`. There is none if the broker can't tell or can't be reached."""
        if isinstance(self._subscription, MeasuredSubscription):
            try:
                self._lag = await self._subscription.read_lag()  # until then the lag of before counts
            except BrokerUnavailable:
                self._lag = None

    def _look_at_work(self) -> float | None:
        """Return the ``monotonic()`` time since which the oldest delivery in work was seen by such a look."""
        now = monotonic()
        in_work = () if self._acks is None else self._acks.list_in_work()
        places = [(delivery.address, delivery.id) for delivery in in_work]
        self._first_seen = {place: self._first_seen.get(place, now) for place in places}
        return min(self._first_seen.values(), default=None)

    def _has_room(self) -> bool:
        """Return False if no more is read, and not because the workers have enough to do: the rest waits for its next attempt."""
        held = 0 if self._acks is None else len(self._acks)
        is_full = held >= UNACKED or self._queue.size >= BYTES_AHEAD
        return not is_full or 2 * len(self._queue) >= held

    # -- lifecycle ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            OwnMessagesUndecided: the dispatcher bridges the same app, and ``own`` is not given.
            BrokerUnavailable: the broker can't be reached; later outages are waited for.
        """
        if self._entered:
            raise RuntimeError("a consumer is entered once, and before it runs; make another")
        self._binding.enter("__aenter__")
        self._entered = True
        try:
            self._check_bridges()
            self._receiver = await self._subscription.open()
        finally:
            self._opened.set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._binding.check("__aexit__")
        self.stop()
        self._run_state.tasks.refuse_circle("the end of the `async with`")
        try:
            if self._running is not None:
                if isinstance(error, asyncio.CancelledError):
                    self._cancel_run()
                await self._ended.wait()
        finally:
            self._cancel_run()  # if the wait was cancelled
            await self._disconnect()

    async def ready(self) -> None:
        """Wait until the consumer is connected: the broker has confirmed the subscription.

        Raises:
            BrokerUnavailable: connecting failed, or was stopped before.
            LoopConflict: the consumer was entered, or runs, in another event loop.
        """
        self._binding.check("ready")
        await self._opened.wait()
        if self._receiver is None:
            raise BrokerUnavailable("the consumer was not connected")

    def stop(self) -> None:
        """Let :meth:`run` end with the deliveries it has; to be called in the loop's thread, as from a signal.

        No more are received. A delivery that is not done within ``drain`` seconds is cancelled or not begun; it and those
        that wait for their next attempt are left to the group's other consumers.
        """
        if not self._run_state.stopping.is_set():
            self._drain_until = monotonic() + self._drain
            self._queue.end_retries()
        self._run_state.stopping.set()
        self._run_state.has_room.set()
        self._opened.set()

    async def run(self) -> None:
        """Receive and dispatch until :meth:`stop`. A cancellation leaves at once; the deliveries in hand come again.

        A consumer that is not entered connects first, and waits for a broker that is unavailable, with a line in the log; at
        its end it disconnects. Returns at once if the consumer was stopped or left before it ran, as by a task that came
        too late.

        Raises:
            OwnMessagesUndecided: the dispatcher bridges the same app, and ``own`` is not given.
            StopIncomplete: a listener did not end when it was cancelled, and was left behind.
            RuntimeError: the consumer has run already, or could not be entered; or one of its tasks ended before the stop; or, as
                LoopConflict, it was entered in another event loop.
        """
        self._binding.check("run")
        if self._running is not None or (self._entered and self._receiver is None):
            raise RuntimeError("a consumer runs once; make another")
        self._binding.enter("run")
        self._running = self._run_state.tasks.runner = asyncio.current_task()
        was_entered = self._entered
        self._entered = True
        try:
            if not was_entered:
                self._check_bridges()
                await self._connect()
            if self._receiver is not None:
                await self._consume(self._receiver)
        finally:
            if not was_entered:
                self._opened.set()
                await self._disconnect()

    async def _connect(self) -> None:
        """Open the subscription. Try again while the broker is unavailable, until :meth:`stop`."""
        opening = asyncio.create_task(self._open_when_answered())
        try:
            await self._opened.wait()
            await self._run_state.tasks.end([opening], GRACE)
        finally:
            await self._run_state.tasks.end([opening], 0)
        if not opening.cancelled():
            opening.result()

    async def _open_when_answered(self) -> None:
        try:
            with suppress(Stopped):
                self._receiver = await self._run_state.until_answered("open", self._open_unless_stopped)
        finally:
            self._opened.set()

    async def _open_unless_stopped(self) -> Receiver:
        if self._run_state.stopping.is_set():
            raise Stopped
        return await self._subscription.open()

    async def _disconnect(self) -> None:
        if self._receiver is not None:
            await self._receiver.aclose()

    async def _consume(self, receiver: Receiver) -> None:
        run = self._run_state
        acks = self._acks = Acknowledgements(receiver, run)
        if isinstance(receiver, SharedReceiver):
            receiver.on_drop = acks.drop
            receiver.on_give = self._drop_parked
        attempts = Attempts(self._options, receiver=receiver, queue=self._queue, acks=acks, run=run)
        tasks = run.tasks
        self._warn_of_unheard()
        try:
            reading = tasks.start(self._read(receiver, acks, attempts))
            working = [tasks.start(attempts.work()) for _ in range(self._concurrency)]
            if receiver.keep_every is not None:
                _ = tasks.start(acks.run_keeping(receiver.keep_every))
            if self._slow_after is not None:
                _ = tasks.start(tasks.watch(self._slow_after, run.reports.report_slow))
            acknowledging = tasks.start(acks.run_acknowledging())
            if run.known is not None:
                _ = tasks.start(run.known.run_remembering())
            await run.stopping.wait()
            if isinstance(receiver, SharedReceiver):
                receiver.leave()
            tasks.raise_error()
            await tasks.end([reading], GRACE)  # a read takes longer only if the broker does not answer
            self._queue.close()
            await tasks.end(working, self._drain_until - monotonic())
            acks.close()
            await tasks.end([acknowledging], GRACE)
            await tasks.end_all()
            tasks.raise_error()
        finally:
            self.stop()
            if isinstance(
                receiver, SharedReceiver
            ):  # also after an error or a cancellation: it may be closed much later
                receiver.leave()
            try:
                await tasks.end_all()
                await acks.finish(GRACE)
            finally:
                if isinstance(tasks.error, StopIncomplete):
                    run.reports.log.write("ended early", tasks.error, level=logging.ERROR)
                run.reports.log.flush()
                self._ended.set()

    def _drop_parked(self, address: str) -> list[Delivery]:
        """Drop what is in hand of an address and waits for another attempt, and what waits behind it; return it."""
        assert self._acks is not None
        found = self._queue.list_parked(address)
        for delivery in found:
            self._acks.remove(delivery)
        return found

    def _cancel_run(self) -> None:
        if self._running is not None and not self._ended.is_set():
            self._running.cancel()

    # -- receive --------------------------------------------------------------------------------------------

    async def _read(self, receiver: Receiver, acks: Acknowledgements, attempts: Attempts) -> None:
        run = self._run_state
        loop = asyncio.get_running_loop()
        outages = 0
        receive = receiver.receive_batches if isinstance(receiver, BatchReceiver) else receiver.receive
        while not run.stopping.is_set():
            run.tasks.check_cancelled()
            ahead = self._count_ahead(run.pace.seconds_each)
            # Those that wait behind a slow one of their key don't count, or it would keep all other keys from being read.
            room = min(ahead - (len(self._queue) - self._queue.blocked), UNACKED - len(acks))
            run.low_water = ahead // 2  # half of them are done first, so that batches are read
            if room <= 0 or not self._queue.has_few(run.low_water) or self._queue.size >= BYTES_AHEAD:
                run.has_room.clear()
                await run.has_room.wait()
                continue
            asked_at = monotonic()
            try:
                with run.reports.broker_outage.watched("read"):
                    items = await receive(room)
            except BrokerUnavailable:
                outages += 1
                await pause(BROKER_RETRY.delay(outages), run.stopping)
                continue
            outages = 0
            acks.doubt(asked_at)
            if items:
                self._received_at = monotonic()
            # Before any other task runs: one that was read again could be acknowledged meanwhile, and would look new.
            arrived = note_arrivals(items, acks)
            if (observers := find_observers(self.dispatcher)) and (deliveries := list_deliveries(items)):
                call_observers(observers, "after_receive", deliveries, self._subscription)
            while run.turns.is_over(loop.time()):  # the reply was read in one go, and so will these be
                await run.turns.next()
            self._options.heard.refresh()
            self._check_bridges()
            if run.missed != self._missed_told and monotonic() - self._missed_told_at >= UNHEARD_EVERY:
                self._warn_of_unheard()
            if run.known is not None:
                await run.known.ask(arrived)
            await self._accept(arrived, attempts)

    def _count_ahead(self, seconds_each: float) -> int:
        """Return the number of deliveries to read ahead if each takes so many seconds."""
        if not seconds_each:
            return max(FIRST_AHEAD, 4 * self._concurrency)
        # With fewer, a few messages of one slow key would leave the other workers without work.
        least = 4 * self._concurrency
        return max(least, min(MOST_AHEAD, int(AHEAD * self._concurrency / seconds_each)))

    async def _accept(self, items: Sequence[Delivery | Batch | Gap], attempts: Attempts) -> None:
        for item in items:
            if isinstance(item, Gap):
                self.stats.gaps += 1
                await self._run_state.reports.report_gap(item)
            elif isinstance(item, Batch):
                self.stats.received += len(item)
                self._queue.put_batch(item)
            else:
                self.stats.received += 1
                self.stats.claimed += item.attempt > 1
                attempts.put(item)

    def _warn_of_unheard(self) -> None:
        """Log the names in ``events`` that nobody hears, if there are any, with the number of their messages since the last time."""
        missed = self._run_state.missed
        if unheard := self._options.heard.find_unheard(self._options.rebuilder.names):
            self._run_state.reports.report_unheard(unheard, missed - self._missed_told)
        self._missed_told = missed
        self._missed_told_at = monotonic()

    def _check_bridges(self) -> None:
        """Refuse a dispatcher that bridges the consumed app if ``own`` is not given.

        All listeners are looked at, so this is done only if some have changed since the last time; for a dispatcher that
        does not tell, once in BRIDGES_CHECKED_EVERY seconds.

        Raises:
            OwnMessagesUndecided: it does.
        """
        if self._own is not None:
            return
        dispatcher = self._options.dispatcher
        changes: float | None = count_changes(dispatcher)
        if changes is None:
            changes = monotonic() // BRIDGES_CHECKED_EVERY
        if changes != self._changes_checked:
            app = self._subscription.app
            if any(bridge.publisher.app == app for bridge in find_bridges(dispatcher)):
                raise OwnMessagesUndecided(app)
            self._changes_checked = changes


def _check_keys(names: Iterable[EventName[Any]]) -> None:
    """Refuse names without a key.

    Raises:
        ValueError: with the names, and what to write.
    """
    keyless = [str(name) for name in names if name.key is None]
    if keyless:
        raise ValueError(
            f"with concurrency each name in events= needs a key, which says whose order is kept: {', '.join(keyless)} "
            f'{"has" if len(keyless) == 1 else "have"} none. Write EventName({keyless[0]!r}, ..., key="order_id"), or '
            "concurrency=1"
        )


def _check_errors(give_up_on: object) -> tuple[type[Exception], ...]:
    """Return the errors of ``give_up_on``.

    Raises:
        TypeError: it is no sequence of classes of exceptions.
    """
    classes: tuple[Any, ...] = tuple(give_up_on) if isinstance(give_up_on, Sequence) else (None,)
    if not all(isinstance(cls, type) and issubclass(cls, Exception) for cls in classes):
        raise TypeError(f"give_up_on is a tuple of classes of exceptions, as (ValueError,), not {give_up_on!r}")
    return classes
