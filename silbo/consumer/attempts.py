"""What becomes of a delivery: done, tried again, or given up."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final, TypeVar

from silbo._retry import Backoff, pause, raise_if_cancelled
from silbo._whistle import IAsyncEventDispatcher
from silbo.bridge import Bridge
from silbo.consumer.acknowledgements import BROKER_RETRY, Acks, ConsumerStats
from silbo.consumer.keyed_queue import Floor, Lanes, Turn
from silbo.consumer.receive import Arrival, Incoming
from silbo.consumer.reports import Telling
from silbo.errors import BrokerUnavailable, MessageInvalid, StoreUnavailable
from silbo.message import Delivery
from silbo.protocols import Inbox, Receiver

__all__ = ["Attempts", "Policy"]

INBOX: Final = 1.0
"""Seconds between two tries of an inbox that is away."""
ERROR_LENGTH: Final = 2_000
"""Characters of an error that go into a dead letter."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Policy:
    """How deliveries are handled.

    Attributes:
        max_attempts: After so many a delivery is given up.
        backoff: Between two of them.
        needs_keys: Whether a message that somebody listens to has to have a key.
        inbox: What remembers publications.
        group: Whose they are.
    """

    max_attempts: int
    backoff: Backoff
    needs_keys: bool
    inbox: Inbox | None
    group: str


class _InboxAway(Exception):
    """The inbox can't be asked, or could not remember: that is no failure of the listeners."""


class _Malformed(Exception):
    """The message will never be one; no listener has run."""


class Attempts:
    """Takes deliveries from the lanes and sees each of them through.

    An attempt is counted at the broker when it fails; where the delivery was given out before, it is counted before it
    begins, for what kills the process can't be counted afterwards. A second such beginning has the process to itself, so
    that nobody else is there when it is killed again.
    """

    def __init__(
        self,
        dispatcher: IAsyncEventDispatcher,
        incoming: Incoming,
        policy: Policy,
        receiver: Receiver,
        lanes: Lanes,
        acks: Acks,
        stats: ConsumerStats,
        telling: Telling,
        stopping: asyncio.Event,
    ) -> None:
        self._dispatcher, self._incoming, self._policy, self._receiver = dispatcher, incoming, policy, receiver
        self._lanes, self._acks, self._stats, self._telling, self._stopping = lanes, acks, stats, telling, stopping
        self._floor = Floor()

    async def work(self) -> None:
        """Handle one after another until the lanes end. Any number of these run side by side."""
        while (turn := await self._lanes.get()) is not None:
            raise_if_cancelled()
            if (delay := await self._serve(turn)) is None:
                self._lanes.done(turn)
            else:
                self._lanes.park(turn, delay)
            if not len(self._lanes):
                self._acks.no_more()
            self._acks.freed()

    async def _serve(self, turn: Turn) -> float | None:
        """One turn of a delivery; the seconds until it needs another, None where it needs none here."""
        delivery = turn.delivery
        is_suspect = delivery.attempt > 1 and not turn.tries and not turn.counted
        alone = is_suspect and delivery.attempt > 2
        if alone or not self._floor.enter_now():
            await self._floor.enter(alone=alone)
        try:
            # What is done must not come again, and be suspected, because of this one.
            if alone and await self._insist("ack", self._acks.flush) is _STOPPED:
                return None
            if not self._acks.is_sure() and not await self._acks.check():
                return None
            if not self._acks.has(delivery) or (is_suspect and not await self._suspect(turn)):
                return None
            error = await self._attempt(turn)
        finally:
            self._floor.leave(alone=alone)
        if error is None:
            self._acks.done(delivery)
            return None
        return await self._after(turn, error)

    async def _suspect(self, turn: Turn) -> bool:
        """Count the beginning of what may have begun before, right before it; False where it must not begin here."""
        if not await self._count(turn):
            return False
        if turn.attempts <= self._policy.max_attempts:
            return True
        killed = RuntimeError("its last attempt did not end: its consumer was killed, or left it")
        await self._bury(turn, killed, turn.attempts - 1)
        return False

    async def _after(self, turn: Turn, error: Exception) -> float | None:
        """What follows from an attempt that failed."""
        delivery = turn.delivery
        if isinstance(error, _InboxAway):
            return INBOX
        if not delivery.id or not self._acks.has(delivery):  # not kept at all, or another's by now
            return None
        if isinstance(error, _Malformed):
            await self._bury(turn, error.__cause__ or error, 0)
            return None
        if not turn.counted and not await self._count(turn):
            return None
        turn.counted = False
        turn.tries += 1
        if turn.attempts >= self._policy.max_attempts:
            await self._bury(turn, error, turn.attempts)
            return None
        return turn.delay

    async def _count(self, turn: Turn) -> bool:
        """Count an attempt; False when the stop comes before the broker answers."""
        known = await self._insist("count", lambda: self._receiver.count(turn.delivery))
        if known is _STOPPED:
            return False
        turn.attempts, turn.counted = known, True
        return True

    async def _bury(self, turn: Turn, error: BaseException, attempts: int) -> None:
        delivery, text = turn.delivery, _written(error)
        self._acks.settle(delivery)
        buried = await self._insist("bury", lambda: self._receiver.bury(delivery, error=text, attempts=attempts))
        if buried is not _STOPPED:
            self._stats.dead += bool(buried)
            self._acks.drop(delivery)
            if buried:
                last = replace(delivery, attempt=delivery.attempt + max(0, turn.tries - 1))
                await self._telling.given_up(last, error, attempts)

    async def _insist(self, what: str, call: Callable[[], Awaitable[_T]]) -> _T | Any:
        """The broker's answer, however often it takes; ``_STOPPED`` when the stop comes first."""
        for outages in count(1):
            raise_if_cancelled()
            try:
                with self._telling.broker.watched(what):
                    return await call()
            except BrokerUnavailable:
                pass
            if self._stopping.is_set():
                break
            await pause(BROKER_RETRY.delay(outages), self._stopping)
        return _STOPPED

    # -- one attempt ----------------------------------------------------------------------------------------

    async def _attempt(self, turn: Turn) -> Exception | None:
        """Run the listeners; the error where that failed."""
        delivery, message = turn.delivery, turn.message
        turn.message = None
        if turn.tries:
            self._stats.retried += 1
            delivery = replace(delivery, attempt=delivery.attempt + turn.tries)
        try:
            arrival = self._incoming.arrival(delivery, message, skips_own_instance=self._receiver.skips_own_instance)
            if arrival is None:
                self._stats.skipped += 1
                return None
            if self._policy.needs_keys and turn.key is None and self._is_heard(arrival.name):
                problem = (
                    "no key, which concurrency needs: give one to its EventName, here in events=, or to a Route there"
                )
                raise MessageInvalid(problem, field="headers.key")
        except MessageInvalid as error:
            self._stats.malformed += 1
            await self._telling.malformed(delivery, error)
            malformed = _Malformed()
            malformed.__cause__ = error
            return malformed
        except Exception as error:  # noqa: BLE001  # a class of the host's that can't be an event
            return await self._failed(turn, delivery, error)
        try:
            if self._policy.inbox is None or not self._is_heard(arrival.name):  # then there is nothing to remember
                await self._dispatcher.adispatch(arrival.name, arrival.event)
                self._stats.handled += 1
            else:
                await self._run_once(self._policy.inbox, arrival, delivery)
        except asyncio.CancelledError:
            raise_if_cancelled()
            cancelled = RuntimeError("a listener was cancelled, but not by its consumer")
            return await self._failed(turn, delivery, cancelled)
        except _InboxAway as error:
            self._telling.inbox.failed("handling", error.__cause__ or error)
            return error
        except Exception as error:  # noqa: BLE001  # a cancellation passes through: the delivery stays with the broker
            return await self._failed(turn, delivery, error)
        return None

    async def _run_once(self, inbox: Inbox, arrival: Arrival, delivery: Delivery) -> None:
        """Run the listeners, if the inbox does not know the publication.

        Raises:
            _InboxAway: it can't be asked, or could not remember; whether anything is done is for the inbox to undo.
        """
        publication = arrival.message.headers.get("publication") or f"{delivery.address}/{delivery.id}"
        failed = False
        try:
            async with inbox.handling(self._policy.group, publication) as is_new:
                try:
                    if is_new:
                        await self._dispatcher.adispatch(arrival.name, arrival.event)
                except BaseException:
                    failed = True
                    raise
        except (BrokerUnavailable, StoreUnavailable) as error:
            if failed:  # the listeners' own
                raise
            raise _InboxAway from error
        self._telling.inbox.answered("handling")
        self._stats.handled += is_new
        self._stats.duplicates += not is_new

    async def _failed(self, turn: Turn, delivery: Delivery, error: Exception) -> Exception:
        """Tell of it, and of what follows; ``delivery`` has the attempt as a hook is to see it."""
        self._stats.failed += 1
        attempt = turn.attempts + (not turn.counted)
        turn.delay = self._policy.backoff.delay(attempt) or 0.0
        if not self._acks.has(turn.delivery):
            then = "and another consumer has it now"
        elif attempt >= self._policy.max_attempts:
            then = "the last one"
        elif self._stopping.is_set():
            then = "left to the group's other consumers"
        else:
            then = f"again in {turn.delay:.2g} s"
        await self._telling.failed(delivery, error, attempt=attempt, then=then)
        return error

    def _is_heard(self, name: Any) -> bool:
        """Whether somebody listens who is no bridge: those leave alone what came from outside."""
        return any(
            not isinstance(getattr(inspect.unwrap(listener), "__self__", None), Bridge)
            for listener in self._dispatcher.get_listeners(name)
        )


_STOPPED: Final = object()


def _written(error: BaseException) -> str:
    """An error as a dead letter has it."""
    try:
        return f"{type(error).__name__}: {error}"[:ERROR_LENGTH]
    except Exception:  # noqa: BLE001  # an error of the host's whose text is an error, too
        return type(error).__name__
