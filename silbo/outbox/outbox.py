"""The outbox: a publisher that stores messages, and sends them on to a broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final, Literal, Self, TypeAlias

from silbo._checks import check_moment, check_seconds
from silbo._closing import AsyncCloseable
from silbo._loops import LoopBinding
from silbo._reports import Availability, ErrorHook
from silbo.dispatch.listeners import Registration
from silbo.errors import CircularWait, MessageRefused, StoreUnavailable
from silbo.health import Health, find_latest
from silbo.message import Message, instance
from silbo.outbox.relay import (
    Relay,
    RelayStats,
    check_store_and_publisher,
    close_publisher_and_store,
    finish_task,
    log_failure,
)
from silbo.outbox.rows import LEASE, OutboxStatus, OutboxStore, Packed, Quota, SessionStore, pack
from silbo.protocols import Promises, Publisher

__all__ = ["STEP", "Outbox", "repeat_step", "retry_in_steps"]

STEP: Final = 1000
"""Rows that one transaction changes at most, in a retry, replay or purge of any size."""
LARGEST_ID: Final = (1 << 63) - 1
"""No store gives a row a greater id."""

Progress: TypeAlias = Callable[[int], object]
"""Called with the number of rows done so far."""


class Outbox(AsyncCloseable):
    """Stores messages, and sends them on to a broker. No committed message is lost while the store survives.

    An outbox is a publisher, so it takes a broker's place in a bridge::

        async with Outbox(SQLiteStore("outbox.db"), RedisStreams(client, app="web")) as outbox:
            dispatcher.add_subscriber(Bridge(outbox))

    Messages of one key reach a stream in the order in which they were committed, each once, whichever process dies.

    Args:
        store: Holds the messages: ``SQLiteStore``, ``SQLAlchemyStore`` or ``MemoryStore``. Opened on entering and
            closed on leaving.
        publisher: The broker; closed on leaving.
        relay: Send from this process. With False the outbox only stores, and another process runs a
            :class:`~silbo.outbox.relay.Relay`, as ``silbo relay`` does.
        partitions: The number of partitions that the keys are divided over; one relay at a time leads each. With more of
            them several processes send side by side; one is enough for 10,000 messages a second and more.
        quota: The most that may wait; past it a publish raises OutboxFull.
        keep_sent: As for :class:`~silbo.outbox.relay.Relay`; :meth:`replay` reaches back so far.
        lease: As for :class:`~silbo.outbox.relay.Relay`.
        drain: As for :class:`~silbo.outbox.relay.Relay`; leaving is the stop.
        on_error: As for :class:`~silbo.outbox.relay.Relay`.

    Attributes:
        outbox_status: As for :class:`~silbo.outbox.relay.Relay`.
    """

    def __init__(
        self,
        store: OutboxStore,
        publisher: Publisher,
        *,
        relay: bool = True,
        partitions: int = 1,
        quota: Quota = Quota(),  # noqa: B008  # immutable
        keep_sent: float = 3600.0,
        lease: float = LEASE,
        drain: float = 5.0,
        on_error: ErrorHook | None = None,
    ) -> None:
        check_store_and_publisher(store, publisher)
        if not isinstance(quota, Quota):
            raise TypeError(f"quota is a Quota, as Quota(rows=100_000), not {quota!r}")
        if partitions < 1:
            raise ValueError(f"partitions is 1 or more, not {partitions!r}")
        self.publisher: Final = publisher
        self.outbox_status: OutboxStatus | None = None
        self._store = store
        self._outage = Availability()  # of the store, for publishes
        self._partitions = partitions
        self._quota = quota
        self._lease = check_seconds("lease", lease)
        self._relay = (
            Relay(store, publisher, keep_sent=keep_sent, lease=lease, drain=drain, on_error=on_error) if relay else None
        )
        self._relaying: asyncio.Task[None] | None = None
        self._entered = False
        self._open = False
        self._binding = LoopBinding("Outbox", is_busy=self._is_busy, forget=self._forget_loop)
        self._storing = 0  # calls of publish() under way
        self._idle = asyncio.Event()  # set if there are none
        self._idle.set()

    def _is_busy(self) -> bool:
        return self._storing > 0 or (self._relaying is not None and not self._relaying.done())

    def _forget_loop(self) -> None:
        """Forget the work of the event loop in which it was entered, and which has ended."""
        self._relaying = None
        self._storing = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def app(self) -> str:
        """The broker's app."""
        return self.publisher.app

    @property
    def promises(self) -> Promises:
        """The broker's promises; with several partitions only the order of each key is kept."""
        promises = getattr(self.publisher, "promises", Promises())
        return replace(promises, order="key") if self._partitions > 1 and promises.order == "all" else promises

    @property
    def in_transaction(self) -> bool:
        """True if a publish of this task would store in a transaction of the host's, which the host commits or not."""
        return isinstance(self._store, SessionStore) and self._store.in_session

    @property
    def is_relaying(self) -> bool:
        """True if stored messages are sent from here: the outbox is entered, and its relay runs."""
        return self._open and self._relaying is not None and not self._relaying.done()

    @property
    def open_store(self) -> OutboxStore | None:
        """Its store, to read from while the outbox is open; None before and afterwards."""
        return self._store if self._open else None

    @property
    def stats(self) -> RelayStats | None:
        """The relay's counts; None without a relay."""
        return self._relay.stats if self._relay else None

    async def __aenter__(self) -> Self:
        """Open the store, and begin to send.

        Raises:
            StoreInvalid: it is not a store, or a newer version's, or has another number of partitions and messages in them.
            StoreUnavailable: it can't be opened.
        """
        if self._entered:
            raise RuntimeError("an outbox is entered once; make another")
        self._binding.enter("__aenter__")
        await self._store.open(self._partitions, lease=self._lease)
        self._entered = True
        self._open = True
        if self._relay is not None:
            if isinstance(self._store, SessionStore):
                self._store.on_commit = self._relay.wake
            self._relaying = asyncio.get_running_loop().create_task(self._relay.run())
            self._relaying.add_done_callback(log_failure)
        return self

    def observe(self, observer: object) -> Registration:
        """Call an observer as :meth:`~silbo.outbox.relay.Relay.observe` does; without a relay it is never called."""
        return Registration(lambda: None) if self._relay is None else self._relay.observe(observer)

    async def aclose(self) -> None:
        """Send waiting messages for at most ``drain`` seconds, then close the broker and the store. May be called twice.

        Raises:
            CircularWait: a hook of this outbox makes the call, and nothing is closed; the relay stops all the same.
            LoopConflict: it was entered in another event loop, which still runs; it stays open.
        """
        self._binding.enter("aclose")
        self._open = False
        if self._relay is not None:
            try:
                self._relay.refuse_circle("aclose()")
            except CircularWait:
                self._relay.stop()
                raise
        try:
            await self._idle.wait()  # the relay must not end before the messages that are just being stored
            if self._relay is not None and self._relaying is not None:
                self._relay.stop()
                await finish_task(self._relaying)
        finally:
            await close_publisher_and_store(self.publisher, self._store)

    async def publish(self, *messages: Message) -> None:
        """Store messages; returns when they are committed. Calls that are awaited in turn keep their order.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were stored.
            OutboxFull: the quota is reached; nothing of the call was stored.
            StoreUnavailable: the store can't be written; nothing of the call was stored. Safe to repeat.
            DeliveryUnknown: the commit was not answered; all of the call, or nothing, is stored. Repeated, it may be
                sent twice.
            RuntimeError: the outbox is not open; or, as LoopConflict, it was entered in another event loop.
        """
        if not self._open:
            raise RuntimeError("the outbox is not open: enter it with 'async with', and publish before it is left")
        self._binding.check("publish")
        packed, refused = self._pack(messages)
        if packed:
            self._storing += 1
            self._idle.clear()
            try:
                await self._store.add(packed, self._quota)
            except StoreUnavailable as error:
                self._outage.failed("publish", error)
                raise
            finally:
                self._storing -= 1
                if not self._storing:
                    self._idle.set()
            if self._outage.is_on:
                self._outage.answered("publish")
            if self._relay is not None:
                self._relay.wake()
        if refused is not None:
            raise refused

    async def add(self, session: Any, *messages: Message) -> None:
        """Store messages in the transaction of the host's session. The host commits it.

        Raises:
            TypeError: the store is not in the host's database.
            MessageRefused: a message can't be sent; nothing of the call was stored.
            OutboxFull: the quota is reached; nothing of the call was stored.
            LoopConflict: the outbox was entered in another event loop.
        """
        self._binding.check("add")
        if not isinstance(self._store, SessionStore):
            raise TypeError(
                f"{type(self._store).__name__} has a transaction of its own and can't store in a session's: publish() "
                "to it, or use silbo.stores.sqlalchemy.SQLAlchemyStore"
            )
        packed, refused = self._pack(messages)
        if refused is not None:
            raise refused
        await self._store.add_in(session, packed, self._quota)

    def _pack(self, messages: Sequence[Message]) -> tuple[list[Packed], MessageRefused | None]:
        packed: list[Packed] = []
        refused: MessageRefused | None = None
        origin = {"app": self.app, "instance": instance()}  # of the process that stores, not of the one that sends
        for message in messages:
            if not isinstance(message, Message):
                raise TypeError(f"an outbox stores Messages, which a Bridge makes of events, not {message!r}")
            try:
                packed.append(pack(replace(message, headers={**origin, **message.headers}), self._store.partitions))
            except MessageRefused as error:
                if refused is None:
                    refused = error
                else:
                    refused.add_note(f"and in the same call: {error}")
        return packed, refused

    # -- health ---------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """Return its state now, from memory: nothing is asked. With a relay, the relay's is in it."""
        status, quota = self.outbox_status, self._quota
        is_full = status is not None and (
            status.unsent + status.counts["dead"] >= quota.rows or status.size >= quota.size
        )
        relay = None if self._relay is None else self._relay.health()
        away_since = [self._outage.since, relay.away_since if relay else None]
        return Health(
            part="outbox",
            name=self.app,
            is_running=self._open and (relay is None or relay.is_running),
            is_stopping=relay is not None and relay.is_stopping,
            is_connected=not self._outage.is_on and (relay is None or relay.is_connected),
            away_since=min((since for since in away_since if since is not None), default=None),
            has_room=not is_full,
            received_at=relay.received_at if relay else None,
            in_hand=relay.in_hand if relay else 0,
            oldest_at=None if status is None else status.oldest_at,
            lag=None if status is None else status.unsent,
            last_error=find_latest(self._outage.last_error, relay.last_error if relay else None),
        )

    async def refresh_health(self) -> None:
        """Read the state of the store, for :meth:`health` and ``outbox_status``."""
        try:
            self.outbox_status = await self.status()  # until then the state of before counts
        except StoreUnavailable:
            self.outbox_status = None

    # -- operation ------------------------------------------------------------------------------------------

    async def status(self) -> OutboxStatus:
        """Return the store's counts, size, ages and leads as they are now."""
        self._binding.check("status")
        return await self._store.status()

    async def retry(self, rows: Collection[int] | None = None, *, progress: Progress | None = None) -> int:
        """Send dead rows again: those with these ids, or all. Return their number.

        Each 1,000 rows are a transaction; after a StoreUnavailable those before it are sent again, and a repeated call goes on.
        ``progress`` is called after each of them, with the number of rows so far. Rows that die meanwhile are left alone.
        """
        if rows is not None and not isinstance(rows, Collection):
            raise TypeError(f"rows is a list of ids: [{rows!r}]")
        self._binding.check("retry")
        return await retry_in_steps(self._store, rows, progress)

    async def replay(self, *, since: datetime, before: datetime | None = None, progress: Progress | None = None) -> int:
        """Send again the messages that were sent from ``since`` on, for a broker that came back from an older state.

        A message that the broker still has arrives a second time, which an inbox recognises. Sent messages are kept for
        ``keep_sent`` seconds, and as long as the quota has room; ``status().oldest_sent_at`` says since when.

        Args:
            since: Aware.
            before: Aware; now by default, and at most, by the store's clock.
            progress: Called after each 1,000 rows at most, with the number of rows so far.

        Returns:
            The number of messages.
        """
        self._binding.check("replay")
        begin = check_moment("since", since)
        # Without an end the replay would go on with the messages that it has caused to be sent.
        latest = None if before is None else check_moment("before", before)
        end = await self._store.read_clock()
        if latest is not None:
            end = min(end, latest)
        return await repeat_step(lambda: self._store.replay(since=begin, before=end, limit=STEP), progress)

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, progress: Progress | None = None) -> int:
        """Delete rows that have been sent, or dead, since before an aware time. Return their number.

        ``progress`` is called after each 1,000 rows at most, with the number of rows so far.
        """
        if state not in ("sent", "dead"):
            raise ValueError(f'rows can be purged that are "sent" or "dead", not {state!r}')
        check_moment("before", before)
        self._binding.check("purge")
        return await repeat_step(lambda: self._store.purge(state, before=before, limit=STEP), progress)


async def retry_in_steps(store: OutboxStore, rows: Collection[int] | None, progress: Progress | None) -> int:
    """Make dead rows pending again, those with these ids or all, :data:`STEP` of them in a transaction. Return their number.

    The steps go up by id, so that a row that dies again meanwhile is not retried without end.
    """
    done = 0

    def count(changed: Sequence[int]) -> None:
        nonlocal done
        done += len(changed)
        if changed and progress is not None:
            progress(done)

    if rows is None:
        last = 0
        while changed := await store.retry(after=last, limit=STEP):
            count(changed)
            if len(changed) < STEP:
                break
            last = changed[-1]
    else:
        ids = sorted({row for row in rows if 0 < row <= LARGEST_ID})
        for first in range(0, len(ids), STEP):
            count(await store.retry(ids[first : first + STEP], limit=STEP))
    return done


async def repeat_step(step: Callable[[], Awaitable[int]], progress: Progress | None) -> int:
    """Repeat a step, a transaction each, until it changes no more rows. Return the number of rows that were changed."""
    done = 0
    while changed := await step():
        done += changed
        if progress is not None:
            progress(done)
    return done
