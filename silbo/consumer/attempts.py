"""Attempts of deliveries: done, tried again, or given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

from silbo._causes import cause
from silbo._host_code import HostCode
from silbo._message_observers import call_observers, find_observers, observed
from silbo._reports import describe_plugins
from silbo._retry import Backoff
from silbo.consumer.acknowledgements import Acknowledgements
from silbo.consumer.express_lane import BegunDispatch, ExpressLane
from silbo.consumer.handling_options import HandlingOptions
from silbo.consumer.heard_names import Heard
from silbo.consumer.keyed_queue import KeyedQueue, QueuedDelivery
from silbo.consumer.known_publications import KnownPublications, find_publication
from silbo.consumer.receive import Opened, RebuiltEvent, make_attempt
from silbo.consumer.run_state import RunState, Stopped
from silbo.consumer.shared_lock import SharedLock
from silbo.dispatch.received_event import Received, dispatch_received, received
from silbo.errors import (
    BrokerRefused,
    BrokerUnavailable,
    LoopConflict,
    MessageInvalid,
    PluginOff,
    ShardLost,
    StoreUnavailable,
    VersionTooNew,
)
from silbo.message import Delivery
from silbo.names import EventName
from silbo.protocols import Inbox, Receiver, SharedReceiver

__all__ = ["Attempts"]

INBOX_RETRY: Final = 1.0
"""Seconds between two attempts of a delivery while the inbox is unavailable."""
STORING_RETRY: Final = Backoff(initial=0.5, cap=2.0)
"""Delays between two attempts to store how a delivery has failed, while the broker refuses that."""
OFFER_RETRY: Final = 1.0
"""Seconds between two looks at a delivery that was left to others, if the broker has no interval of its own."""
ERROR_LENGTH: Final = 2_000
"""Characters of an error that go into a dead letter."""


class _InboxUnavailable(Exception):
    """The inbox can't be asked, or could not remember: no failure of the listeners."""


class _Malformed(Exception):
    """The delivery will never be a message; no listener has run."""

    def __init__(self, reason: MessageInvalid) -> None:
        super().__init__(reason)
        self.reason = reason


class Attempts:
    """Workers that take deliveries from the queue and attempt each until it is done or given up.

    An attempt is counted at the broker when it fails. For a delivery that was given out before, an attempt is counted before
    it begins, for what kills the process can't be counted afterwards. From the second such count on the attempt runs alone
    in this process, so that no other delivery is in work when the process is killed again.
    """

    def __init__(
        self,
        options: HandlingOptions,
        *,
        receiver: Receiver,
        queue: KeyedQueue,
        acks: Acknowledgements,
        run: RunState,
    ) -> None:
        self._options = options
        self._receiver = receiver
        self._queue = queue
        self._acks = acks
        self._run = run
        self._lock = SharedLock()

    async def work(self) -> None:
        """Attempt one delivery after another until the queue ends. Any number of these run side by side."""
        lane = ExpressLane(
            self._options, receiver=self._receiver, queue=self._queue, acks=self._acks, run=self._run, lock=self._lock
        )
        received.set(lane.received)  # the contexts of its deliveries are copies of this one
        turns = self._run.turns
        now = asyncio.get_running_loop().time
        while True:
            began_at = now()
            begun = None
            try:
                while turns.is_over(began_at):
                    await turns.next()
                    began_at = now()
                queued = self._queue.get()
                if queued is None:
                    if not self._queue.batches:
                        if not await self._queue.wait():
                            return
                        turns.begin(now())
                        continue
                    left = lane.run(self._queue.batches[0], began_at)
                    if left is None:
                        self._make_room()
                        continue
                    queued, begun, began_at = left
                    self._queue.call_worker()
            except asyncio.CancelledError:  # perhaps of a timer that a listener has left behind
                self._run.tasks.check_cancelled()
                continue
            if begun is None:  # else its listener may have cancelled this task, and is to be told so
                self._run.tasks.check_cancelled()
            try:
                delay = await (self._handle(queued) if begun is None else self._go_on(queued, begun))
            except Stopped:  # the delivery stays with the broker
                delay = None
            except BrokerRefused as error:  # this delivery waits, and others go on
                self._run.reports.storing_outage.failed("store", error)
                queued.refusals += 1
                delay = STORING_RETRY.delay(queued.refusals) or 0.0
            if delay is None:
                self._queue.finish(queued)
            else:
                self._queue.park(queued, delay)
            self._make_room()
            self._run.pace.note(now() - began_at)

    def _make_room(self) -> None:
        """Let the acknowledgements go if nothing is in work, and the reading go on if little is left."""
        if not len(self._queue):
            self._acks.flush_soon()
        if self._queue.has_few(self._run.low_water):
            self._run.has_room.set()

    async def _handle(self, queued: QueuedDelivery) -> float | None:
        """Attempt a delivery once. Return the seconds until its next attempt; None if it needs none here.

        Raises:
            Stopped: the consumer is stopped, and the broker did not answer.
            BrokerRefused: the broker does not store that or how the attempt failed; to be called again after a while.
        """
        delivery = queued.delivery
        if queued.too_new is not None:
            return await self._leave_to_others(queued, queued.too_new)
        if queued.refusals:
            if queued.burial is not None:
                await self._bury(queued, *queued.burial)
                return None
            if queued.failure is not None:
                return await self._retry_or_bury(queued, queued.failure)
        is_suspect = delivery.attempt > 1 and not queued.tries and not queued.is_counted
        alone = is_suspect and delivery.attempt > 2
        if alone or not self._lock.acquire_now():
            await self._lock.acquire(alone=alone)
        try:
            if alone:  # deliveries that are done must not come again, as suspects, because this one kills the process
                await self._run.until_answered("ack", self._acks.flush)
            if not self._acks.is_certain():
                await self._acks.confirm()
            if not self._acks.holds(delivery) or (is_suspect and not await self._count_start(queued)):
                return None
            error = await self._attempt(queued)
        finally:
            self._lock.release(alone=alone)
        return await self._settle(queued, error)

    async def _go_on(self, queued: QueuedDelivery, begun: BegunDispatch) -> float | None:
        """Go on with a first attempt that the express lane has begun. Returns and raises as :meth:`_handle` does."""
        self._lock.acquire_now()  # nobody has it alone: the lane has looked a moment ago
        try:
            error = await self._attempt(queued, begun)
        finally:
            self._lock.release(alone=False)
        return await self._settle(queued, error)

    async def _settle(self, queued: QueuedDelivery, error: Exception | None) -> float | None:
        """Acknowledge a delivery whose attempt has no error; else act on that. Return the seconds until the next attempt."""
        if error is None:
            self._acks.acknowledge(queued.delivery)
            return None
        return await self._retry_or_bury(queued, error)

    async def _leave_to_others(self, queued: QueuedDelivery, error: VersionTooNew) -> float | None:
        """Leave a message of an unknown version, and those of its key behind it, to the group's other consumers.

        Return the seconds until the next look; None if another consumer has it by now, or it is given up.
        """
        delivery = queued.delivery
        first, queued.tries = not queued.tries, 1
        self._run.stats.newer += first
        if not delivery.id:
            await self._run.reports.report_too_new(delivery, error)
            return None
        if not self._acks.holds(delivery):
            return None
        wait = self._options.newer_version_wait
        if first:
            self._run.reports.note_left(delivery, error, wait)
        self.unpack_batches()  # for those of its key
        behind = [other for other in self._queue.list_behind(queued) if self._acks.holds(other)]
        again = self._receiver.keep_every or OFFER_RETRY
        try:
            offered_for = await self._acks.offer([delivery, *behind])
        except BrokerUnavailable:  # or it refuses, as a full Redis does: other keys go on
            return again
        if offered_for is not None and offered_for < wait:
            return min(again, wait - offered_for)
        if offered_for is not None:
            await self._bury(queued, error, 0)
        await self._acks.take_back(behind)
        return None

    async def _count_start(self, queued: QueuedDelivery) -> bool:
        """Count the attempt of a suspect right before it begins. False if the delivery is given up instead."""
        await self._count(queued)
        if queued.attempts <= self._options.max_attempts:
            return True
        killed = RuntimeError("its last attempt did not end: its consumer was killed, or left it")
        await self._bury(queued, killed, queued.attempts - 1)
        return False

    async def _retry_or_bury(self, queued: QueuedDelivery, error: Exception) -> float | None:
        """Act on a failed attempt. Return the seconds until the next attempt; None if there is none here."""
        delivery = queued.delivery
        if isinstance(error, _InboxUnavailable):
            return INBOX_RETRY
        if not delivery.id or not self._acks.holds(delivery):  # the broker does not keep it, or another consumer has it
            return None
        if isinstance(error, _Malformed):
            await self._bury(queued, error.reason, 0)
            return None
        if (pause := _seconds_off(error)) is not None:
            return pause  # it is no attempt while a plugin is away
        if _is_one_of(error, self._options.give_up_on):
            await self._bury(queued, error, queued.number)
            return None
        if not queued.is_counted:
            queued.failure = error  # the listeners don't run again before it is counted
            await self._count(queued, _describe_error(error))
            queued.failure = None
        queued.is_counted = False
        queued.tries += 1
        if queued.attempts >= self._options.max_attempts:
            await self._bury(queued, error, queued.attempts)
            return None
        if observers := find_observers(self._options.dispatcher):
            call_observers(observers, "after_retry", delivery, error, queued.delay)
        return queued.delay

    async def _count(self, queued: QueuedDelivery, error: str = "") -> None:
        """Count an attempt at the broker, with its error if it has failed."""
        queued.attempts = await self._run.until_answered(
            "count", lambda: self._receiver.count(queued.delivery, error=error)
        )
        self._run.reports.storing_outage.answered("store")
        queued.refusals = 0
        queued.is_counted = True

    async def _bury(self, queued: QueuedDelivery, error: BaseException, attempts: int) -> None:
        """Make a delivery a dead letter, unless another consumer has it."""
        delivery = queued.delivery
        if not self._acks.holds(delivery):  # since the broker refused it
            return
        text = _describe_error(error)
        self._acks.stop_keeping(delivery)
        queued.burial = error, attempts
        try:
            buried = await self._run.until_answered(
                "bury", lambda: self._receiver.bury(delivery, error=text, attempts=attempts)
            )
        except BrokerRefused:
            self._acks.keep_again(delivery)
            raise
        self._run.reports.storing_outage.answered("store")
        self._acks.remove(delivery)
        if buried:
            self._run.stats.dead += 1
            last = replace(delivery, attempt=delivery.attempt + max(0, queued.tries - 1))
            await self._run.reports.report_dead_letter(last, error, attempts)

    def put(self, delivery: Delivery) -> None:
        """Put a single delivery into the queue; it is in hand."""
        self.unpack_batches()  # whose keys are not known
        message, key, too_new = self._examine(delivery)
        self._queue.put(delivery, message, key, too_new)

    def unpack_batches(self) -> None:
        """Put the deliveries of the waiting batches into the queue one by one, in their places."""
        queue = self._queue
        while queue.batches:
            first = queue.batches[0]
            delivery = self._acks.single_out(first.batch, first.position)
            queue.leave(first, 1)
            queue.put(delivery, *self._examine(delivery))

    def _examine(self, delivery: Delivery) -> tuple[Opened | None, str | None, VersionTooNew | None]:
        return self._options.rebuilder.examine(delivery, skips_own_instance=self._receiver.skips_own_instance)

    # -- one attempt ----------------------------------------------------------------------------------------

    async def _attempt(self, queued: QueuedDelivery, begun: BegunDispatch | None = None) -> Exception | None:
        """Run the listeners, or go on with them. Return the error if that failed."""
        stats = self._run.stats
        delivery = queued.delivery
        message = queued.message
        queued.message = None
        if queued.tries:
            stats.retried += 1
            delivery = replace(delivery, attempt=delivery.attempt + queued.tries)
        handling = (
            self._complete(begun.dispatch, begun.heard, begun.publication)
            if begun is not None
            else self._observe(observers, queued, delivery, message)
            if (observers := find_observers(self._options.dispatcher))
            else self._handle_event(queued, delivery, message)
        )
        context = None if begun is None else begun.dispatch.context
        try:
            await HostCode(self._run.tasks, handling, "a listener", delivery, context)
        except _Malformed as error:
            stats.malformed += 1
            await self._run.reports.report_malformed(delivery, error.reason)
            return error
        except _InboxUnavailable as error:
            if isinstance(error.__cause__, LoopConflict):  # no outage that will end: the consumer ends with it
                raise error.__cause__ from None
            self._run.reports.inbox_outage.failed("handling", error.__cause__ or error)
            return error
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001  # a cancellation passes through: the delivery stays with the broker
            return await self._note_failure(queued, delivery, error)
        return None

    async def _observe(
        self, observers: Sequence[Any], queued: QueuedDelivery, delivery: Delivery, message: Opened | None
    ) -> None:
        """Handle an event as :meth:`_handle_event` does, its listeners between the hooks of observers."""
        with ExitStack() as hooks:

            def begin(rebuilt: RebuiltEvent) -> None:
                pause = queued.delay if queued.tries else None
                attempt = make_attempt(rebuilt, delivery, queued.number, self._options.subscription, pause)
                hooks.enter_context(observed(observers, "attempt", attempt))

            await self._handle_event(queued, delivery, message, begin)

    async def _handle_event(
        self,
        queued: QueuedDelivery,
        delivery: Delivery,
        message: Opened | None,
        begin: Callable[[RebuiltEvent], None] | None = None,
    ) -> None:
        """Rebuild the event and run its listeners; before that, call ``begin`` with the event.

        Raises:
            _Malformed: the delivery can't be rebuilt.
            _InboxUnavailable: the inbox can't be asked, or could not remember.
            Exception: of a listener, or of the host's class when an event is made of it.
        """
        options = self._options
        stats = self._run.stats
        try:
            rebuilt = options.rebuilder.rebuild(delivery, message, skips_own_instance=self._receiver.skips_own_instance)
            if rebuilt is None:
                stats.skipped += 1
                return
            lacks_key = options.needs_keys and queued.key is None
            # Where nothing but the counts depends on it, the listeners as they were at the last read will do.
            heard = None if lacks_key or options.inbox is not None else options.heard.recent(rebuilt.name)
            if heard is None:
                heard = options.heard[rebuilt.name]
            if heard and lacks_key:
                problem = (
                    "no key, which concurrency needs: give one to its EventName, here in events=, or to a Route there"
                )
                raise MessageInvalid(problem, field="headers.key")
        except MessageInvalid as error:
            raise _Malformed(error) from error
        cause.set(rebuilt.message)  # in the context of this delivery alone
        if begin is not None:
            begin(rebuilt)
        publication = ""
        if heard and options.inbox is not None:  # without a listener nothing is remembered
            publication = find_publication(delivery, rebuilt.message)
            if self._run.known is None:
                await self._dispatch_once(options.inbox, rebuilt, publication, heard)
                return
            publication = self._run.known.label(publication, delivery.address, delivery.epoch)
            if not await self._is_new(self._run.known, publication):
                stats.duplicates += 1
                return
        dispatched = received.get()
        assert dispatched is not None
        dispatched.begin(rebuilt.event, rebuilt.name)
        await self._complete(options.dispatcher.adispatch(rebuilt.name, rebuilt.event), heard, publication)

    async def _complete(self, dispatch: Awaitable[Any], heard: Heard, publication: str) -> None:
        """Await a dispatch as dispatch_received() does, with the worker's own object, and count the delivery as handled.

        ``publication`` is remembered then; an empty one is not.
        """
        dispatched = received.get()
        assert dispatched is not None
        try:
            try:
                await dispatch
            except Exception as error:
                if not dispatched.isolated:
                    raise
                dispatched.isolated.append(error)
            if dispatched.isolated:
                dispatched.raise_isolated()
        except BaseException:
            dispatched.end(done=False)
            raise
        self._count_handled(heard, dispatched.name)
        dispatched.end(done=True)
        if publication and self._run.known is not None:
            self._run.known.note_handled(publication)

    def _count_handled(self, heard: Heard, name: object) -> None:
        self._run.stats.count_handled(heard)
        if heard is not Heard.ON_PURPOSE and isinstance(name, EventName):  # others are not in events=
            self._run.missed += 1

    async def _is_new(self, known: KnownPublications, publication: str) -> bool:
        """Return True if the inbox does not know the publication.

        Raises:
            _Malformed: the inbox can never remember this publication.
            _InboxUnavailable: the inbox can't be asked.
        """
        try:
            is_new = await known.is_new(publication)
        except MessageInvalid as error:
            raise _Malformed(error) from error
        except ShardLost as error:
            if isinstance(self._receiver, SharedReceiver):
                self._receiver.doubt(error.address, error.epoch)
            raise Stopped from error
        except Exception as error:
            raise _InboxUnavailable from error
        self._run.reports.inbox_outage.answered("handling")
        return is_new

    async def _dispatch_once(self, inbox: Inbox, rebuilt: RebuiltEvent, publication: str, heard: Heard) -> None:
        """Run the listeners if the inbox does not know the publication.

        Raises:
            _Malformed: the inbox can never remember this publication.
            _InboxUnavailable: the inbox can't be asked, or could not remember. Listeners may have run: the inbox undoes what
                shares its transaction.
        """
        options = self._options
        entered = False
        failure: BaseException | None = None
        dispatched = Received(rebuilt.event, rebuilt.name, options.listener_timeout)
        is_done = False
        try:
            async with inbox.handling(options.subscription.name, publication) as is_new:
                entered = True
                try:
                    if is_new:
                        await dispatch_received(options.dispatcher, dispatched)
                except BaseException as error:
                    failure = error
                    raise
            is_done = True
        except Exception as error:
            if failure is not None:  # a listener raised it
                failure = None  # or it would hold itself
                raise
            if isinstance(error, MessageInvalid):
                raise _Malformed(error) from error
            if entered and not isinstance(error, BrokerUnavailable | StoreUnavailable | LoopConflict):
                raise  # of the transaction that the listeners share with the inbox
            raise _InboxUnavailable from error
        finally:
            dispatched.end(done=is_done)
        if failure is not None:  # the inbox has swallowed it
            try:
                raise failure
            finally:
                failure = None
        self._run.reports.inbox_outage.answered("handling")
        if is_new:
            self._count_handled(heard, rebuilt.name)
        else:
            self._run.stats.duplicates += 1

    async def _note_failure(self, queued: QueuedDelivery, delivery: Delivery, error: Exception) -> Exception:
        """Count and report a failed attempt, and choose the delay until the next; return the error.

        ``delivery`` has the number of the attempt as a hook is to see it.
        """
        self._run.stats.failed += 1
        attempt = queued.number
        queued.delay = self._options.backoff.delay(attempt) or 0.0
        if not self._acks.holds(queued.delivery):
            then = "and another consumer has it now"
        elif (pause := _seconds_off(error)) is not None:
            then = f"not counted, again in {pause:.2g} s"
        elif attempt >= self._options.max_attempts or _is_one_of(error, self._options.give_up_on):
            then = "the last one"
        elif self._run.stopping.is_set():
            then = "left to the group's other consumers"
        else:
            then = f"again in {queued.delay:.2g} s"
        await self._run.reports.report_failure(delivery, error, attempt=attempt, then=then)
        return error


def _describe_error(error: BaseException) -> str:
    """Return an error's type and text for the broker; the type alone if its text can't be made."""
    try:
        return f"{type(error).__name__}: {error}"[:ERROR_LENGTH] + describe_plugins(error)[:ERROR_LENGTH]
    except Exception:  # noqa: BLE001  # the host's error class may fail in __str__
        return type(error).__name__


def _seconds_off(error: Exception) -> float | None:
    """Return the seconds until the plugins are back that were left out; None if one is not, or something else has failed."""
    errors = [error]
    pauses: list[float | None] = []
    for one in errors:
        if isinstance(one, ExceptionGroup):
            errors += one.exceptions
        else:
            pauses.append(one.pause if isinstance(one, PluginOff) else None)
    return max((pause for pause in pauses if pause is not None), default=0.0) if None not in pauses else None


def _is_one_of(error: Exception, classes: tuple[type[Exception], ...]) -> bool:
    """Return True if an error is of one of the classes; of a group, if all of its errors are."""
    if isinstance(error, ExceptionGroup):
        return bool(classes) and error.split(classes)[1] is None
    return isinstance(error, classes)
