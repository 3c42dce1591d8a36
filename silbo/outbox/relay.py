"""What brings stored messages to their broker: one leader for each partition, whoever dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self
from uuid import uuid4

from silbo._checks import check_seconds, describe_object
from silbo._closing import AsyncCloseable
from silbo._reports import ErrorHook, ErrorReporter, Outage
from silbo._retry import Backoff, pause, raise_if_cancelled
from silbo.errors import BrokerUnavailable, DeliveryUnknown, Fenced, LeadLost, MessageRefused, StoreUnavailable
from silbo.message import Message
from silbo.outbox.rows import Lead, OutboxStore, Row
from silbo.protocols import Publisher, Sequenced, SequencedPublisher

__all__ = ["Outcome", "Relay", "RelayStats", "outcome_of", "publish_rows"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a broker has answered for.

    Attributes:
        sent: Rows that it has, by their id.
        dead: Rows that it refused for good, and why.
        known: How many of those that were sent it had already.
        refused: The errors and messages of those that are dead.
    """

    sent: Collection[int] = ()
    dead: Mapping[int, str] = field(default_factory=dict)
    known: int = 0
    refused: Sequence[tuple[MessageRefused, Message]] = ()


def outcome_of(rows: Sequence[Row], answer: Sequenced) -> Outcome:
    """What a publisher's answer means for these rows."""
    refused = {row.id: answer.refused[row.sequence or 0] for row in rows if row.sequence in answer.refused}
    return Outcome(
        sent=[row.id for row in rows if row.id not in refused],
        dead={row: str(error) for row, error in refused.items()},
        known=sum(row.sequence in answer.known for row in rows),
        refused=[(refused[row.id], row.message) for row in rows if row.id in refused],
    )


async def publish_rows(publisher: Publisher, source: str, epoch: int, rows: Sequence[Row]) -> Sequenced:
    """Send rows with their sequences; where the publisher knows none, as they are.

    Raises:
        Fenced, BrokerUnavailable, DeliveryUnknown: as :meth:`~silbo.protocols.SequencedPublisher.publish_sequenced`.
    """
    messages = [(row.sequence or 0, row.message) for row in rows]
    if isinstance(publisher, SequencedPublisher):
        return await publisher.publish_sequenced(source, epoch, messages)
    # A call each, for publishers keep the order of their calls.
    answers = await asyncio.gather(*(publisher.publish(message) for _, message in messages), return_exceptions=True)
    refused: dict[int, MessageRefused] = {}
    for (sequence, _), answer in zip(messages, answers, strict=True):
        if isinstance(answer, MessageRefused):
            refused[sequence] = answer
        elif answer is not None:
            raise answer
    return Sequenced(refused=refused)


BATCH: Final = 500
POLL: Final = 0.25
"""Seconds between two looks at a store in which somebody else may have stored something."""
STANDBY: Final = 0.5
"""Seconds between two tries to lead."""
REST: Final = 3.0
"""How long, in times of what taking took, the store is left to those who publish, unless there is much to send."""
LONGEST_REST: Final = 0.02
FORGET_EVERY: Final = 5.0
"""Seconds between two looks for what was sent long ago."""
AWAY: Final = Backoff(initial=0.1, cap=2.0)
"""Between two tries of a broker or a store that is away."""


_STORE_METHODS: Final = ("open", "add", "take", "settle", "status")
"""The methods by which a store is recognised. Its properties may raise while it is closed, so they are not looked at."""


def check_store_and_publisher(store: Any, publisher: Any) -> None:
    """Refuse arguments of an outbox or a relay that are no store or no publisher, perhaps in the wrong order.

    Raises:
        TypeError: one of them is something else.
    """
    if not all(callable(getattr(store, method, None)) for method in _STORE_METHODS):
        raise TypeError(
            f"an outbox keeps its messages in a store, as SQLiteStore('outbox.db'), not in {describe_object(store)}"
        )
    if not isinstance(publisher, Publisher):
        raise TypeError(
            f"an outbox sends to a broker, as RedisStreams(client, app=...), not to {describe_object(publisher)}"
        )


@dataclass(slots=True)
class RelayStats:
    """What a relay has done so far.

    Attributes:
        sent: Messages that the broker has taken.
        known: Of them, those that it had already: their first sending was not answered.
        dead: Messages that were refused for good.
        postponed: Batches that failed and were tried again.
        fenced: Times that the broker refused this relay as an old leader.
    """

    sent: int = 0
    known: int = 0
    dead: int = 0
    postponed: int = 0
    fenced: int = 0


class Relay(AsyncCloseable):
    """Sends what is in a store, each partition's messages in their order; any number of relays may run on one store.

    Of each partition one relay is the leader, for ``lease`` seconds by the store's clock, renewed at a third of them. A
    leader that was frozen, and wakes up after another has taken over, changes nothing: the broker refuses its epoch.

    To run it in a process of its own, apart from those that publish with ``Outbox(..., relay=False)``::

        async with Relay(SQLiteStore("outbox.db"), RedisStreams(client, app="web")) as relay:
            loop.add_signal_handler(signal.SIGTERM, relay.stop)
            await relay.run()

    Args:
        store: Where the messages are; opened on entering and closed on leaving.
        publisher: The broker; closed on leaving. One that is no :class:`~silbo.protocols.SequencedPublisher` may get a
            message twice, where an answer was lost.
        retain: Seconds that sent messages are kept, for a replay.
        lease: Seconds after which another relay takes over from one that is silent.
        drain: Seconds in which a stop still sends what waits.
        on_error: ``(error, message)``, sync or async: gets what was refused for good, and what is wrong with the broker or
            the store with None; else it is logged.

    Attributes:
        stats: Counts, kept up to date.
    """

    def __init__(
        self,
        store: OutboxStore,
        publisher: Publisher,
        *,
        retain: float = 3600.0,
        lease: float = 10.0,
        drain: float = 5.0,
        on_error: ErrorHook | None = None,
    ) -> None:
        check_store_and_publisher(store, publisher)
        self.stats: Final = RelayStats()
        self._store, self._publisher = store, publisher
        self._retain = check_seconds("retain", retain, zero=True)
        self._lease, self._drain = check_seconds("lease", lease), check_seconds("drain", drain, zero=True)
        self._owner = uuid4().hex
        self._report = ErrorReporter(on_error, logger)
        self._broker, self._storing = Outage(logger, "broker"), Outage(logger, "outbox store")
        self._working = Outage(logger, "relay", "failed")
        self._stopping = asyncio.Event()
        self._waking: list[asyncio.Event] = []  # one for each partition: whoever has seen it clears it
        self._begun = False
        self._running: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Self:
        """Open the store.

        Raises:
            StoreInvalid: it is none, or another version's.
            StoreUnavailable: it can't be opened.
        """
        await self._store.open()
        return self

    async def aclose(self) -> None:
        """Stop, and close the store and the broker when :meth:`run` has ended. May be called twice."""
        self.stop()
        try:
            if self._running is not None:
                await finish(self._running)
        finally:
            await close(self._publisher, self._store)

    def wake(self) -> None:
        """Tell that something was stored; to be called in the loop's thread."""
        for woken in self._waking:
            woken.set()

    def stop(self) -> None:
        """Let :meth:`run` end, with what can be sent within ``drain`` seconds; to be called in the loop's thread."""
        self._stopping.set()
        self.wake()

    async def run(self) -> None:
        """Send until :meth:`stop`. A cancellation leaves at once; what was under way is sent again, and is not doubled."""
        if self._begun:
            raise RuntimeError("a relay runs once; make another")
        self._begun, self._running = True, asyncio.current_task()
        self._waking = [asyncio.Event() for _ in range(self._store.partitions)]
        try:
            async with asyncio.TaskGroup() as tasks:
                leading = [tasks.create_task(self._serve(number, woken)) for number, woken in enumerate(self._waking)]
                forgetting = tasks.create_task(self._forget())
                await self._stopping.wait()
                await asyncio.wait(leading, timeout=self._drain)
                for task in [*leading, forgetting]:
                    task.cancel()
        finally:
            self._running = None
            self._report.log.flush()

    # -- one partition --------------------------------------------------------------------------------------

    async def _serve(self, partition: int, woken: asyncio.Event) -> None:
        """Lead whenever nobody else does, until the stop."""
        above, failures, stands_by = 0, 0, False
        while True:  # once at least: what waits is sent also where the stop came first
            raise_if_cancelled()
            wait: float | None = min(STANDBY, self._lease / 3)
            try:
                lead = await self._store.lead(partition, self._owner, lease=self._lease, above=above)
                failures = 0
                if (lead is None) != stands_by:
                    stands_by = lead is None
                    does = "another relay leads, standing by until its lease ends" if stands_by else "leading now"
                    logger.info(does, extra={"partition": partition})
                if lead is not None:
                    await self._lead(lead, woken)
                self._storing.answered(partition)
            except (Fenced, LeadLost) as error:
                if isinstance(error, Fenced):  # if we are to lead all the same, the store is older than the broker
                    above, wait = error.epoch, 0
                    self.stats.fenced += 1
                await self._report("another relay has taken over", error, None, partition=partition)
            except Exception as error:  # noqa: BLE001  # an outbox without a relay fills up: it goes on, whatever it is
                failures += 1
                wait = AWAY.delay(failures)
                what = self._storing if isinstance(error, StoreUnavailable) else self._working
                await self._report.report_outage(what, partition, error)
            if self._stopping.is_set():
                return
            await pause(wait, self._stopping)

    async def _lead(self, lead: Lead, woken: asyncio.Event) -> None:
        """Send until the stop, or until somebody else leads."""
        now = asyncio.get_running_loop().time
        renew_at, failures, outcome = now() + self._lease / 3, 0, Outcome()
        looked = owes = False
        try:
            while True:
                raise_if_cancelled()
                if now() >= renew_at:
                    # Where that fails, so does the next step, with LeadLost.
                    await self._store.lead(lead.partition, self._owner, lease=self._lease)
                    renew_at = now() + self._lease / 3
                woken.clear()
                begun, stopping = now(), self._stopping.is_set()  # asked first: what was stored before a stop is sent
                rows = await self._store.take(lead, BATCH, sent=outcome.sent, dead=outcome.dead)
                busy = now() - begun
                self._storing.answered(lead.partition)
                await self._count(outcome)
                outcome = Outcome()
                if not rows and (looked or stopping):
                    self._working.answered(lead.partition)
                    if stopping and not owes:
                        return
                    if stopping:  # what waits for its next attempt gets that one still
                        await asyncio.sleep(LONGEST_REST)
                    else:
                        await pause(min(POLL, max(0.0, renew_at - now())), woken)
                    continue
                delay = AWAY.delay(failures + 1) or AWAY.cap
                answered = await self._send(lead, rows, delay)  # none at first: a broker that is away is told at once
                if answered is not None:
                    failures, outcome, looked, owes = 0, answered, True, False
                    # Where all is in memory nothing else would let others run.
                    await asyncio.sleep(0 if stopping or len(rows) >= BATCH else min(REST * busy, LONGEST_REST))
                elif stopping:
                    return
                else:  # it is not asked sooner because more was stored
                    failures, owes = failures + 1, owes or bool(rows)
                    await pause(min(delay, max(0.0, renew_at - now())), self._stopping)
        finally:
            await self._resign(lead)

    async def _send(self, lead: Lead, rows: Sequence[Row], delay: float) -> Outcome | None:
        """Send rows; what is to be settled, or None when they have to wait, for ``delay`` seconds at least."""
        try:
            answer = await publish_rows(self._publisher, f"{self._store.id}/{lead.partition}", lead.epoch, rows)
        except (BrokerUnavailable, DeliveryUnknown) as error:
            await self._report.report_outage(self._broker, lead.partition, error)
            if rows:
                self.stats.postponed += 1
                await self._store.postpone(lead, [row.id for row in rows], error=str(error), delay=delay)
            return None
        self._broker.answered(lead.partition)
        self._working.answered(lead.partition)
        behind = {row.id for row in rows if row.attempts == 1 and row.sequence in answer.known}
        outcome = outcome_of([row for row in rows if row.id not in behind], answer)
        if behind:  # nobody has ever sent them
            logger.warning(
                "outbox is older than its broker, restored from a copy: giving new sequences",
                extra={"partition": lead.partition, "sequence": answer.last},
            )
            await self._store.settle(lead, outcome.sent, outcome.dead)
            await self._store.renumber(lead, above=answer.last)
        return outcome

    async def _count(self, outcome: Outcome) -> None:
        """Tell of what is settled."""
        self.stats.sent += len(outcome.sent)
        self.stats.known += outcome.known
        self.stats.dead += len(outcome.dead)
        for error, message in outcome.refused:
            await self._report("message refused, it is dead", error, message, event_name=message.message_name)

    async def _resign(self, lead: Lead) -> None:
        with suppress(StoreUnavailable, TimeoutError):  # then the lease ends by itself
            async with asyncio.timeout(1.0):
                await self._store.resign(lead)

    async def _forget(self) -> None:
        while not self._stopping.is_set():
            raise_if_cancelled()
            try:
                while await self._store.forget(retain=self._retain):
                    raise_if_cancelled()
                self._storing.answered("forget")
            except Exception as error:  # noqa: BLE001  # as in _serve
                await self._report.report_outage(self._storing, "forget", error)
            await pause(FORGET_EVERY, self._stopping)


async def finish(running: asyncio.Task[Any]) -> None:
    """Wait for a task that has been told to end; where the wait is cancelled, the task is, too."""
    try:
        await asyncio.wait([running])
    finally:
        running.cancel()
        await asyncio.wait([running])


async def close(publisher: Publisher, store: OutboxStore) -> None:
    """Both, whatever becomes of the first."""
    try:
        await publisher.aclose()
    finally:
        await store.aclose()
