"""The relay: sends stored messages to their broker. Each partition has one leader at a time, whichever relay dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Self
from uuid import uuid4

from silbo._checks import check_seconds, describe_object
from silbo._closing import AsyncCloseable
from silbo._host_code import HostCode, OwnTasks
from silbo._loops import LoopBinding
from silbo._message_observers import RelayedBatch, observed
from silbo._process import name_process
from silbo._reports import ErrorHook, ErrorReporter, Outage
from silbo._retry import Backoff, pause
from silbo.dispatch.listeners import Registration
from silbo.dispatch.observers import list_observers
from silbo.errors import (
    BrokerUnavailable,
    DeliveryUnknown,
    Fenced,
    LeadLost,
    MessageInvalid,
    MessageRefused,
    StopIncomplete,
    StoreUnavailable,
)
from silbo.health import Health, find_latest, to_moment
from silbo.message import Message
from silbo.outbox.division import Division
from silbo.outbox.rows import (
    LARGEST_NUMBER,
    LEASE,
    Lead,
    OutboxStatus,
    OutboxStore,
    Row,
    SharedStore,
    UnreadableMessage,
)
from silbo.protocols import Publisher, Sequenced, SequencedPublisher

__all__ = [
    "Relay",
    "RelayStats",
    "check_store_and_publisher",
    "close_publisher_and_store",
    "finish_task",
    "log_failure",
]

logger = logging.getLogger(__name__)

BATCH: Final = 500
"""Rows sent in one call to the broker, at most."""
LONG_TAKING: Final = 2000
"""Rows taken at once, at most, after a broker with a record of what it has has answered; they are settled when all are sent. If
the relay is killed before, the broker refuses to take them twice. Each taking waits for the disk: with 500 rows at a time the
drain of a backlog took a quarter longer."""
POLL: Final = 0.25
"""Seconds between two looks at a store in which another process may have stored something; a store that relays share has its
own times, in ``division.py``."""
STANDBY: Final = 0.5
"""Seconds between two tries to lead."""
REST: Final = 3.0
"""Pause after a batch, as a multiple of the time that taking it took: the store is left to those who publish. A full batch,
which means that more rows wait, is followed by the next at once."""
LONGEST_REST: Final = 0.02
"""Seconds that such a pause lasts at most."""
FORGET_EVERY: Final = 5.0
"""Seconds between two deletions of rows that were sent long ago."""
OUTAGE_RETRY: Final = Backoff(initial=0.1, cap=2.0)
"""Delays between two tries of a broker or a store that is unavailable."""
SLOW_AFTER: Final = 10.0
"""Seconds after which an error hook that still runs is a warning in the log: its partition waits for it."""
_STORE_METHODS: Final = ("open", "add", "take", "settle", "status")
"""The methods by which a store is recognised. Its properties may raise while it is closed, so they are not looked at."""


@dataclass(slots=True)
class RelayStats:
    """Counts of a relay since it was made.

    Attributes:
        sent: Messages that the broker has taken.
        known: Sent messages that the broker had already: their first sending was not answered.
        dead: Messages that were refused for good.
        postponed: Batches that failed and were tried again.
        fenced: Times that the broker refused this relay as an old leader.
        slow: Error hooks that run now, and have run for longer than 10 seconds.
    """

    sent: int = 0
    known: int = 0
    dead: int = 0
    postponed: int = 0
    fenced: int = 0
    slow: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows that the broker has answered for; they are settled with the next taking.

    Attributes:
        sent: Ids of the rows that the broker has.
        dead: Errors of the rows that it refused for good, by id.
        known: The number of sent rows that it had already.
        refused: The errors and messages of the dead rows.
    """

    sent: Collection[int] = ()
    dead: Mapping[int, str] = field(default_factory=dict)
    known: int = 0
    refused: Sequence[tuple[MessageRefused | MessageInvalid, Message]] = ()

    def join(self, other: Outcome) -> Outcome:
        """Return the outcome of the rows of both."""
        if not self.sent and not self.dead:
            return other
        return Outcome(
            sent=[*self.sent, *other.sent],
            dead={**self.dead, **other.dead},
            known=self.known + other.known,
            refused=[*self.refused, *other.refused],
        )


class Relay(AsyncCloseable):
    """Sends the messages of a store, those of each partition in their order. Any number of relays may run on one store.

    One relay leads each partition; in a :class:`~silbo.outbox.rows.SharedStore` the relays divide the partitions evenly. It leads
    for ``lease`` seconds by the store's clock, and renews the lease after a third of them. A leader that was frozen, and wakes up
    after another has taken over, changes nothing: the broker refuses its epoch.

    To run it in a process of its own, apart from those that publish with ``Outbox(..., relay=False)``::

        async with Relay(SQLiteStore("outbox.db"), RedisStreams(client, app="web")) as relay:
            loop.add_signal_handler(signal.SIGTERM, relay.stop)
            await relay.run()

    Args:
        store: Holds the messages; opened on entering and closed on leaving.
        publisher: The broker; closed on leaving. One that is no :class:`~silbo.protocols.SequencedPublisher` may get a
            message twice if an answer was lost.
        keep_sent: Seconds that sent messages are kept, for a replay.
        lease: Seconds after which another process's relay takes over from a silent one.
        drain: Seconds in which a stop still sends waiting messages. The rest stays in the store.
        on_error: ``(error, message)``, sync or async: gets each message that was refused for good, and errors of the broker or
            the store with None; without it they are logged.

    Attributes:
        stats: Counts, kept up to date.
        outbox_status: The state of its store, as of the last :meth:`refresh_health`; None before, and if the store did not
            answer.
    """

    def __init__(
        self,
        store: OutboxStore,
        publisher: Publisher,
        *,
        keep_sent: float = 3600.0,
        lease: float = LEASE,
        drain: float = 5.0,
        on_error: ErrorHook | None = None,
    ) -> None:
        check_store_and_publisher(store, publisher)
        self.stats: Final = RelayStats()
        self.outbox_status: OutboxStatus | None = None
        self._store = store
        self._publisher = publisher
        self._keep_sent = check_seconds("keep_sent", keep_sent, zero=True)
        self._lease = check_seconds("lease", lease)
        self._drain = check_seconds("drain", drain, zero=True)
        self._owner = name_process(uuid4().hex[:12])
        self._stopping = asyncio.Event()
        self._tasks = OwnTasks("relay", stopping=self._stopping, on_failure=self.stop, stats=self.stats)
        self._report = ErrorReporter(on_error, logger, isolate=self._tasks.isolate)
        self._broker_outage = Outage(logger, "broker")
        self._store_outage = Outage(logger, "outbox store")
        self._relay_outage = Outage(logger, "relay", "failed")
        self._notify_outage = Outage(logger, "notifications of commits")  # no part of the health: it looks as well
        self._wake_events: list[asyncio.Event] = []  # by partition; its task clears it
        self._division: Division | None = None
        self._taken_at: float | None = None  # monotonic()
        self._sending: dict[int, int] = {}  # by partition: the number of rows taken last, and not answered yet
        self._observations: dict[object, object] = {}  # observers, by registration
        self._observers: tuple[object, ...] = ()
        self._begun = False
        self._running: asyncio.Task[Any] | None = None
        self._binding = LoopBinding("Relay", is_busy=lambda: self._running is not None, forget=self._forget_loop)

    def _forget_loop(self) -> None:
        self._running = None
        self._wake_events = []
        self._division = None

    async def __aenter__(self) -> Self:
        """Open the store.

        Raises:
            StoreInvalid: it is not a store, or another version's.
            StoreUnavailable: it can't be opened.
        """
        self._binding.enter("__aenter__")
        await self._store.open()
        return self

    async def aclose(self) -> None:
        """Stop, and close the store and the broker when :meth:`run` has ended. May be called twice.

        Raises:
            CircularWait: a hook of this relay makes the call, and nothing is closed; the relay stops all the same.
            LoopConflict: it runs in another event loop; it goes on.
        """
        self._binding.enter("aclose")
        self.stop()
        self.refuse_circle("aclose()")
        try:
            if self._running is not None:
                await finish_task(self._running)
        finally:
            await close_publisher_and_store(self._publisher, self._store)

    def health(self) -> Health:
        """Return its state now, from memory: nothing is asked."""
        outages = self._broker_outage, self._store_outage, self._relay_outage
        return Health(
            part="relay",
            name=self._publisher.app,
            is_running=self._running is not None and not self._stopping.is_set(),
            is_stopping=self._running is not None and self._stopping.is_set(),
            is_connected=not any(outage.is_on for outage in outages),
            away_since=min((since for outage in outages if (since := outage.since) is not None), default=None),
            received_at=to_moment(self._taken_at),
            in_hand=sum(self._sending.values()),
            oldest_at=None if self.outbox_status is None else self.outbox_status.oldest_at,
            lag=None if self.outbox_status is None else self.outbox_status.unsent,
            last_error=find_latest(self._report.last_error, *(outage.last_error for outage in outages)),
        )

    async def refresh_health(self) -> None:
        """Read the state of the store, for :meth:`health` and ``outbox_status``."""
        try:
            self.outbox_status = await self._store.status()  # until then the state of before counts
        except StoreUnavailable:
            self.outbox_status = None

    def wake(self) -> None:
        """Tell the relay that something was stored; to be called in the loop's thread."""
        for woken in self._wake_events:
            woken.set()

    def observe(self, observer: object) -> Registration:
        """Call ``before_relay(batch)`` and ``after_relay(batch)`` of an observer around each sending of messages from now on.

        Its errors are only logged. The batch is a :class:`~silbo.RelayedBatch`. An observer that is given twice is called once,
        until each of its registrations is removed.

        Returns:
            The registration; its ``remove()`` ends the observation.
        """
        registered = object()
        self._observations[registered] = observer
        self._observers = list_observers(self._observations)

        def remove() -> None:
            self._observations.pop(registered, None)
            self._observers = list_observers(self._observations)

        return Registration(remove)

    def stop(self) -> None:
        """Let :meth:`run` end, after what can be sent within ``drain`` seconds; to be called in the loop's thread."""
        self._stopping.set()
        if self._division is not None:
            self._division.look_now.set()
        self.wake()

    def refuse_circle(self, call: str) -> None:
        """Refuse a call that waits for the end of :meth:`run`, if a hook of this relay makes it.

        Raises:
            CircularWait: one does.
        """
        self._tasks.refuse_circle(call)

    async def run(self) -> None:
        """Send until :meth:`stop`. A cancellation leaves at once; the batch under way is sent again, and is not doubled.

        Raises:
            StopIncomplete: a hook did not end when it was cancelled, and was left behind.
            RuntimeError: it has run before, or one of its tasks ended before the stop; or, as LoopConflict, it was entered in
                another event loop.
        """
        self._binding.check("run")
        if self._begun:
            raise RuntimeError("a relay runs once; make another")
        self._begun = True
        self._binding.enter("run")
        tasks = self._tasks
        self._running = tasks.runner = asyncio.current_task()
        self._wake_events = [asyncio.Event() for _ in range(self._store.partitions)]
        try:
            if isinstance(self._store, SharedStore):
                self._division = Division(self._store, self._owner, self._lease)
                if self._store.notifies:
                    _ = tasks.start(self._hear_of_commits(self._store, self._division))
            partitions = [
                tasks.start(self._serve_partition(number, woken)) for number, woken in enumerate(self._wake_events)
            ]
            if self._division is not None:
                partitions.append(tasks.start(self._keep_share(self._division)))
            _ = tasks.start(self._forget_sent_rows())
            _ = tasks.start(tasks.watch(SLOW_AFTER, self._report_slow))
            await self._stopping.wait()
            tasks.raise_error()
            await tasks.end(partitions, self._drain)
            await tasks.end_all()
            tasks.raise_error()
        finally:
            self.stop()
            try:
                await tasks.end_all()
            finally:
                if isinstance(tasks.error, StopIncomplete):
                    self._report.log.write("ended early", tasks.error, level=logging.ERROR)
                self._running = None
                self._report.log.flush()

    def _report_slow(self, code: HostCode[Any], seconds: float) -> None:
        text = "%s still runs after %.3g s, and its partition waits: %s"
        where = code.place()
        self._report.log.write(text, None, code.what, seconds, where, place=where, seconds=round(seconds, 1))

    async def _keep_share(self, division: Division) -> None:
        """Take part in the division of the partitions, and wake those in which rows wait, until the stop."""
        failures = 0
        try:
            while True:
                self._tasks.check_cancelled()
                try:
                    for partition in await division.look():
                        self._wake_events[partition].set()
                    failures = 0
                    wait: float | None = division.interval
                    self._store_outage.answered("look")
                    self._relay_outage.answered("look")
                except Exception as error:  # noqa: BLE001  # as in _serve_partition
                    failures += 1
                    wait = OUTAGE_RETRY.delay(failures)
                    outage = self._store_outage if isinstance(error, StoreUnavailable) else self._relay_outage
                    await self._report.report_outage(outage, "look", error)
                if self._stopping.is_set():
                    return
                await pause(wait, self._stopping if failures else division.look_now)
        finally:
            division.is_over = True
            self.wake()
            with suppress(StoreUnavailable, TimeoutError):  # then the lease ends by itself
                async with asyncio.timeout(1.0):
                    await division.leave()

    async def _hear_of_commits(self, store: SharedStore, division: Division) -> None:
        """Look whenever something was committed. Without it the relay looks at its intervals."""
        failures = 0

        def heard() -> None:
            nonlocal failures
            failures = 0
            self._notify_outage.answered("listen")
            division.look_soon()

        while not self._stopping.is_set():
            self._tasks.check_cancelled()
            try:
                await store.listen(heard)
            except Exception as error:  # noqa: BLE001  # as in _serve_partition
                failures += 1
                await self._report.report_outage(self._notify_outage, "listen", error)
            await pause(OUTAGE_RETRY.delay(failures), self._stopping)

    # -- one partition --------------------------------------------------------------------------------------

    def _is_wanted(self, partition: int) -> bool:
        """Return True if this relay should lead a partition."""
        return self._division is None or partition in self._division.wanted

    async def _wait_for_share(self, partition: int, woken: asyncio.Event) -> bool:
        """Wait until this relay should lead a partition. True if it should, and False at the stop."""
        while not self._is_wanted(partition):
            if self._division is not None and self._division.is_over:
                return False
            woken.clear()
            await woken.wait()
        return True

    async def _serve_partition(self, partition: int, woken: asyncio.Event) -> None:
        """Lead whenever no other relay does, until the stop."""
        above = 0
        failures = 0
        stands_by = False
        while True:  # once at least: waiting messages are sent even if the stop came first
            self._tasks.check_cancelled()
            if not await self._wait_for_share(partition, woken):
                return
            wait: float | None = min(STANDBY, self._lease / 3)
            try:
                lead = await self._store.lead(partition, self._owner, lease=self._lease, above=above)
                failures = 0
                if (lead is None) != stands_by:
                    stands_by = lead is None
                    self._broker_outage.forget(partition)  # it asks the broker while it leads
                    does = "another relay leads, standing by until its lease ends" if stands_by else "leading now"
                    logger.info(does, extra={"partition": partition})
                if lead is not None:
                    await self._send_while_leading(lead, woken)
                self._store_outage.answered(partition)
            except (Fenced, LeadLost) as error:
                if isinstance(error, Fenced):  # if this relay leads all the same, the store is older than the broker
                    self.stats.fenced += 1
                    if error.epoch < LARGEST_NUMBER:  # else the record is damaged; the store must not copy it
                        above = error.epoch
                        wait = 0
                await self._report("another relay has taken over", error, None, partition=partition)
            except Exception as error:  # noqa: BLE001  # an outbox without a relay fills up: go on after any error
                failures += 1
                wait = OUTAGE_RETRY.delay(failures)
                outage = self._store_outage if isinstance(error, StoreUnavailable) else self._relay_outage
                await self._report.report_outage(outage, partition, error)
            if self._stopping.is_set():
                return
            await pause(wait, self._stopping)

    async def _send_while_leading(self, lead: Lead, woken: asyncio.Event) -> None:
        """Send until the stop, or until another relay leads or should lead."""
        now = asyncio.get_running_loop().time
        renew_at = now() + self._lease / 3
        failures = 0
        outcome = Outcome()
        has_asked = False  # the broker answered once: empty batches need not be sent to it any more
        has_sent = False  # since the last rest
        owes_attempt = False  # rows were postponed; a stop waits for their next attempt
        division = self._division

        async def renew() -> None:
            nonlocal renew_at
            self._tasks.check_cancelled()
            if division is not None:
                renew_at = max(renew_at, division.renewed_at(lead.partition) + self._lease / 3)
            if now() >= renew_at:
                # If that fails, so does the next step, with LeadLost or Fenced.
                await self._store.lead(lead.partition, self._owner, lease=self._lease)
                renew_at = now() + self._lease / 3

        try:
            while True:
                await renew()
                woken.clear()
                if not self._is_wanted(lead.partition):
                    await self._settle(lead, outcome)
                    return
                begun_at = now()
                stopping = self._stopping.is_set()  # asked before taking: messages stored before a stop are sent
                is_known = has_asked and not failures and isinstance(self._publisher, SequencedPublisher)
                limit = LONG_TAKING if is_known else BATCH
                rows = await self._store.take(lead, limit, sent=outcome.sent, dead=outcome.dead)
                busy = now() - begun_at
                self._sending[lead.partition] = len(rows)
                if rows:
                    self._taken_at = monotonic()
                self._store_outage.answered(lead.partition)
                await self._report_settled(outcome)
                outcome = Outcome()
                if not rows and (has_asked or stopping or owes_attempt):
                    self._relay_outage.answered(lead.partition)
                    if stopping and not owes_attempt:
                        return
                    if stopping:  # postponed rows get their next attempt still
                        await asyncio.sleep(LONGEST_REST)
                    elif division is not None:
                        await division.rest(lead, woken, has_sent=has_sent)
                        has_sent = False
                    else:
                        await pause(min(POLL, max(0.0, renew_at - now())), woken)
                    continue
                delay = OUTAGE_RETRY.delay(failures + 1) or OUTAGE_RETRY.cap
                # The first batch may be empty: so an unavailable broker is noticed at the start.
                answered = await self._send(lead, rows, delay, renew)
                self._sending[lead.partition] = 0
                if answered is not None:
                    failures = 0
                    outcome = answered
                    has_asked = True
                    has_sent = has_sent or bool(rows)
                    owes_attempt = False
                    # With store and broker in memory no other await lets other tasks run.
                    await asyncio.sleep(0 if stopping or len(rows) >= BATCH else min(REST * busy, LONGEST_REST))
                elif stopping:
                    return
                else:  # more stored rows don't make the broker answer sooner: not woken by them
                    failures += 1
                    owes_attempt = owes_attempt or bool(rows)
                    await pause(min(delay, max(0.0, renew_at - now())), self._stopping)
        finally:
            self._sending.pop(lead.partition, None)
            await self._resign(lead)

    async def _send(
        self, lead: Lead, rows: Sequence[Row], delay: float, renew: Callable[[], Awaitable[None]]
    ) -> Outcome | None:
        """Send rows, :data:`BATCH` in a call. Return the rows to settle.

        None if the broker did not answer, and the rows that were not sent wait at least ``delay`` seconds; the others are settled.

        Args:
            lead: Of their partition.
            rows: The rows; none to ask the broker only.
            delay: Seconds.
            renew: Renews the lead between two calls.
        """
        outcome = Outcome()
        for start in range(0, max(1, len(rows)), BATCH):
            batch = rows[start : start + BATCH]
            later = rows[start + BATCH :]
            if start:
                await asyncio.sleep(0)  # with store and broker in memory no other await lets other tasks run
                await renew()
            try:
                publish = self._observe_publish if self._observers and batch else self._publish
                answer = await self._tasks.isolate(publish(lead, batch), "a publisher")
            except (BrokerUnavailable, DeliveryUnknown) as error:
                await self._report.report_outage(self._broker_outage, lead.partition, error)
                if rows:
                    self.stats.postponed += 1
                    await self._settle(lead, outcome)
                    waiting = [row.id for row in (*batch, *later)]
                    await self._store.postpone(lead, waiting, error=_to_text(error), delay=delay)
                return None
            if not answer.unsent and (batch or isinstance(self._publisher, SequencedPublisher)):
                self._broker_outage.answered(lead.partition)
                self._relay_outage.answered(lead.partition)
            # Known at their first attempt: the sequence was given once before, and these rows were never sent.
            behind: set[int] = set()
            answered = batch
            if answer.known or answer.unsent:
                behind = {row.id for row in batch if row.attempts == 1 and row.sequence in answer.known}
                answered = [row for row in batch if row.id not in behind and row.sequence not in answer.unsent]
            outcome = outcome.join(_outcome_of(answered, answer))
            if (
                behind or answer.unsent
            ):  # before later ones are renumbered or postponed: what was sent keeps its sequence
                await self._settle(lead, outcome)
                outcome = Outcome()
            if behind:
                logger.warning(
                    "outbox is older than its broker, restored from a copy: giving new sequences",
                    extra={"partition": lead.partition, "sequence": answer.last},
                )
                await self._store.renumber(lead, above=answer.last)
            if answer.unsent:
                await self._postpone_unsent(lead, batch, () if behind else later, answer.unsent, delay)
                return None
            if behind:  # the later rows have no sequences any more, and are taken anew
                break
        return outcome

    async def _settle(self, lead: Lead, outcome: Outcome) -> None:
        """Settle rows at once, not with the next taking."""
        if outcome.sent or outcome.dead:
            await self._store.settle(lead, outcome.sent, outcome.dead)
            await self._report_settled(outcome)

    async def _postpone_unsent(
        self, lead: Lead, rows: Sequence[Row], later: Sequence[Row], unsent: Mapping[int, Exception], delay: float
    ) -> None:
        """Postpone the rows that were not sent, and ``later`` ones. Raise the first error that is no outage of the broker."""
        for error in unsent.values():
            if not isinstance(error, (BrokerUnavailable, DeliveryUnknown)):
                raise error
        await self._report.report_outage(self._broker_outage, lead.partition, next(iter(unsent.values())))
        self.stats.postponed += 1
        by_text: dict[str, list[int]] = {}
        for row in rows:
            if (failure := unsent.get(row.sequence or 0)) is not None:
                by_text.setdefault(_to_text(failure), []).append(row.id)
        if later:
            by_text.setdefault(next(iter(by_text)), []).extend(row.id for row in later)
        for text, its_rows in by_text.items():
            await self._store.postpone(lead, its_rows, error=text, delay=delay)

    async def _publish(self, lead: Lead, rows: Sequence[Row]) -> Sequenced:
        """Publish rows with their sequences; without them if the publisher takes none.

        Raises:
            Fenced, BrokerUnavailable, DeliveryUnknown: as :meth:`~silbo.protocols.SequencedPublisher.publish_sequenced`.
        """
        publisher = self._publisher
        rows = [row for row in rows if not isinstance(row.message, UnreadableMessage)]
        if isinstance(publisher, SequencedPublisher):
            messages = [(row.sequence or 0, row.message) for row in rows]
            return await publisher.publish_sequenced(f"{self._store.id}/{lead.partition}", lead.epoch, messages)
        return await self._publish_each(rows)

    async def _observe_publish(self, lead: Lead, rows: Sequence[Row]) -> Sequenced:
        """Publish rows as :meth:`_publish` does, between the hooks of the observers."""
        with observed(
            self._observers,
            "relay",
            RelayedBatch(messages=[row.message for row in rows], publisher=self._publisher),
        ):
            return await self._publish(lead, rows)

    async def _publish_each(self, rows: Sequence[Row]) -> Sequenced:
        """Publish rows by one call each, to see which failed: publishers keep the order of their calls.

        Rows of one address and key keep their order: what was sent behind a row that failed is unsent as well, and goes once
        more after it. A row that was tried before goes ahead of those behind it, so that they are not sent at each attempt.
        """
        refused: dict[int, MessageRefused] = {}
        unsent: dict[int, Exception] = {}
        failures: dict[tuple[str | None, str | None], Exception] = {}  # by address and key
        for turn in _split_into_turns(rows):
            going = [row for row in turn if _line_of(row) not in failures]
            calls = [self._publisher.publish(row.message) for row in going]
            results = await asyncio.gather(*calls, return_exceptions=True)
            answers = {row.id: result for row, result in zip(going, results, strict=True)}
            for row in turn:
                answer: object = answers.get(row.id)
                line = _line_of(row)
                if isinstance(answer, MessageRefused):
                    refused[row.sequence or 0] = answer
                    continue
                if isinstance(answer, asyncio.CancelledError):  # of its own call; a cancelled relay has left by now
                    answer = RuntimeError("a publisher was cancelled, but not by its relay")
                if isinstance(answer, Exception):
                    failures.setdefault(line, answer)
                elif isinstance(answer, BaseException):
                    raise answer
                if line in failures:
                    unsent[row.sequence or 0] = failures[line]
        return Sequenced(refused=refused, unsent=unsent)

    async def _report_settled(self, outcome: Outcome) -> None:
        """Count settled rows, and report the dead ones."""
        self.stats.sent += len(outcome.sent)
        self.stats.known += outcome.known
        self.stats.dead += len(outcome.dead)
        for error, message in outcome.refused:
            await self._report("message refused, it is dead", error, message, event_name=message.message_name)

    async def _resign(self, lead: Lead) -> None:
        with suppress(StoreUnavailable, TimeoutError):  # then the lease ends by itself
            async with asyncio.timeout(1.0):
                await self._store.resign(lead)

    async def _forget_sent_rows(self) -> None:
        now = asyncio.get_running_loop().time
        while not self._stopping.is_set():
            self._tasks.check_cancelled()
            try:
                begun_at = now()
                # One relay cleans for all, and leaves the store to the others for half of the time.
                while self._is_wanted(0) and await self._store.forget(keep_sent=self._keep_sent):
                    self._tasks.check_cancelled()
                    await pause(now() - begun_at, self._stopping)
                    begun_at = now()
                self._store_outage.answered("forget")
            except Exception as error:  # noqa: BLE001  # as in _serve_partition
                await self._report.report_outage(self._store_outage, "forget", error)
            await pause(FORGET_EVERY, self._stopping)


def _line_of(row: Row) -> tuple[str | None, str | None]:
    """Return the address and the key of a row: rows that have both in common keep their order."""
    return row.message.to, row.message.key


def _split_into_turns(rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
    """Return the rows to publish at once, then those behind a row of their address and key that was tried before."""
    if all(row.attempts == 1 for row in rows):
        return [rows]
    held_back: set[int] = set()
    firsts: dict[tuple[str | None, str | None], Row] = {}
    for row in rows:
        first = firsts.setdefault(_line_of(row), row)
        if first is not row and first.attempts > 1:
            held_back.add(row.id)
    return [[row for row in rows if row.id not in held_back], [row for row in rows if row.id in held_back]]


def _outcome_of(rows: Sequence[Row], answer: Sequenced) -> Outcome:
    """Return the outcome of a publisher's answer for these rows."""
    unreadable = [(row.id, row.message) for row in rows if isinstance(row.message, UnreadableMessage)]
    if not (unreadable or answer.known or answer.refused):
        return Outcome(sent=[row.id for row in rows])
    refused: dict[int, MessageRefused | MessageInvalid] = {
        row.id: answer.refused[row.sequence or 0] for row in rows if row.sequence in answer.refused
    }
    for number, message in unreadable:
        refused[number] = MessageInvalid(f"row {number} can't be read: {message.problem}")
    return Outcome(
        sent=[row.id for row in rows if row.id not in refused],
        dead={row: _to_text(error) for row, error in refused.items()},
        known=sum(row.sequence in answer.known for row in rows),
        refused=[(refused[row.id], row.message) for row in rows if row.id in refused],
    )


def _to_text(error: Exception) -> str:
    """Return an error's text without what databases refuse in a text: NUL, and half of a surrogate pair."""
    return str(error).replace("\0", "\\0").encode(errors="backslashreplace").decode()


def check_store_and_publisher(store: Any, publisher: Any) -> None:
    """Refuse arguments of an outbox or a relay that are not a store and a publisher, perhaps in the wrong order.

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


async def finish_task(running: asyncio.Task[Any]) -> None:
    """Wait for a task that has been told to end. If the wait is cancelled, the task is cancelled too."""
    try:
        await asyncio.wait([running])
    finally:
        running.cancel()
        await asyncio.wait([running])


def log_failure(running: asyncio.Task[None]) -> None:
    """Log that a relay has ended with an error: nothing is sent any more."""
    if not running.cancelled() and (error := running.exception()) is not None:
        logger.error("relay ended: stored messages wait for another relay", exc_info=error)


async def close_publisher_and_store(publisher: Publisher, store: OutboxStore) -> None:
    """Close the publisher, then the store, even if the first raises."""
    try:
        await publisher.aclose()
    finally:
        await store.aclose()
