"""An outbox: a publisher that stores. What it has taken goes to the broker, now or later."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Literal, Self

from silbo._checks import check_moment
from silbo._closing import AsyncCloseable
from silbo._reports import ErrorHook
from silbo.errors import MessageRefused
from silbo.message import Message, instance
from silbo.outbox.relay import Relay, RelayStats, check_store_and_publisher, close, finish
from silbo.outbox.rows import OutboxStatus, OutboxStore, Packed, Quota, SessionStore, pack
from silbo.protocols import Promises, Publisher

__all__ = ["Outbox"]

STEP: Final = 1000
"""Rows of one transaction, where many are changed."""

Progress = Callable[[int], object]
"""Is told how many rows are done so far."""


class Outbox(AsyncCloseable):
    """Stores messages, and sends them on to a broker: nothing that was committed is lost while its store survives.

    A publisher, so it takes a broker's place in a bridge::

        async with Outbox(SQLiteStore("outbox.db"), RedisStreams(client, app="web")) as outbox:
            dispatcher.add_subscriber(Bridge(outbox))

    Messages of one key reach a stream in the order in which they were committed, each once, whatever dies meanwhile.

    Args:
        store: Where the messages are: ``SQLiteStore``, ``SQLAlchemyStore`` or ``MemoryStore``. Opened on entering and
            closed on leaving.
        publisher: The broker; closed on leaving.
        relay: Whether this process sends. With False it only stores, and another one runs a
            :class:`~silbo.outbox.relay.Relay`, as ``silbo relay`` does.
        partitions: Into how many lines the keys are divided, each led by one relay. More of them let several processes
            send side by side; one is enough for 10,000 messages a second and more.
        quota: How much may wait; past it a publish raises OutboxFull.
        retain: Seconds that sent messages are kept, for :meth:`replay`.
        lease: Seconds after which another process's relay takes over from one that is silent.
        drain: Seconds in which leaving still sends what waits. The rest stays in the store.
        on_error: As for :class:`~silbo.outbox.relay.Relay`.
    """

    def __init__(
        self,
        store: OutboxStore,
        publisher: Publisher,
        *,
        relay: bool = True,
        partitions: int = 1,
        quota: Quota = Quota(),  # noqa: B008  # immutable
        retain: float = 3600.0,
        lease: float = 10.0,
        drain: float = 5.0,
        on_error: ErrorHook | None = None,
    ) -> None:
        check_store_and_publisher(store, publisher)
        if not isinstance(quota, Quota):
            raise TypeError(f"quota is a Quota, as Quota(rows=100_000), not {quota!r}")
        if partitions < 1:
            raise ValueError(f"partitions is 1 or more, not {partitions!r}")
        self.publisher: Final = publisher
        self._store, self._partitions, self._quota = store, partitions, quota
        self._relay = (
            Relay(store, publisher, retain=retain, lease=lease, drain=drain, on_error=on_error) if relay else None
        )
        self._relaying: asyncio.Task[None] | None = None
        self._entered = self._open = False
        self._storing, self._idle = 0, asyncio.Event()
        self._idle.set()

    @property
    def app(self) -> str:
        """The broker's."""
        return self.publisher.app

    @property
    def promises(self) -> Promises:
        """The broker's; with several partitions the order of each key at most."""
        promises = getattr(self.publisher, "promises", Promises())
        return replace(promises, order="key") if self._partitions > 1 and promises.order == "all" else promises

    @property
    def in_transaction(self) -> bool:
        """Whether a publish of this task would now store in a transaction of the host's, which commits it or not."""
        return isinstance(self._store, SessionStore) and self._store.in_session

    @property
    def stats(self) -> RelayStats | None:
        """What its relay has done; None without one."""
        return self._relay.stats if self._relay else None

    async def __aenter__(self) -> Self:
        """Open the store, and begin to send.

        Raises:
            StoreInvalid: it is no store, a newer version's, or has other partitions with messages in them.
            StoreUnavailable: it can't be opened.
        """
        if self._entered:
            raise RuntimeError("an outbox is entered once; make another")
        await self._store.open(self._partitions)
        self._entered = self._open = True
        if self._relay is not None:
            if isinstance(self._store, SessionStore):
                self._store.on_commit = self._relay.wake
            self._relaying = asyncio.get_running_loop().create_task(self._relay.run())
        return self

    async def aclose(self) -> None:
        """Send what waits, for at most ``drain`` seconds, then close store and broker. May be called twice."""
        self._open = False
        try:
            await self._idle.wait()  # or the relay would end before what is just being stored
            if self._relay is not None and self._relaying is not None:
                self._relay.stop()
                await finish(self._relaying)
        finally:
            await close(self.publisher, self._store)

    async def publish(self, *messages: Message) -> None:
        """Store; returns when they are committed. Calls keep their order where they are awaited in turn.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were stored.
            OutboxFull: the quota is reached; nothing of the call was stored.
            StoreUnavailable: the store can't be written; nothing of the call was stored.
            DeliveryUnknown: the commit was not answered; all of the call, or nothing, is stored.
            RuntimeError: the outbox is not open.
        """
        if not self._open:
            raise RuntimeError("the outbox is not open: enter it with 'async with', and publish before it is left")
        packed, refused = self._pack(messages)
        if packed:
            self._storing += 1
            self._idle.clear()
            try:
                await self._store.add(packed, self._quota)
            finally:
                self._storing -= 1
                if not self._storing:
                    self._idle.set()
            if self._relay is not None:
                self._relay.wake()
        if refused is not None:
            raise refused

    async def add(self, session: Any, *messages: Message) -> None:
        """Store in the transaction of a session of the host's, which is the host's to commit.

        Raises:
            TypeError: the store is not in the host's database.
            MessageRefused, OutboxFull: nothing of the call was stored.
        """
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
        origin = {"app": self.app, "instance": instance()}  # of where it was stored, not of what sends it
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

    # -- to look at and to mend -----------------------------------------------------------------------------

    async def status(self) -> OutboxStatus:
        """What the store holds now."""
        return await self._store.status()

    async def retry(self, rows: Collection[int] | None = None) -> int:
        """Send dead rows again, all of them or these; how many."""
        if rows is not None and not isinstance(rows, Collection):
            raise TypeError(f"rows is a list of ids: [{rows!r}]")
        return await self._store.retry(rows)

    async def replay(self, *, since: datetime, before: datetime | None = None, progress: Progress | None = None) -> int:
        """Send again what was sent from a time on, for a broker that came back from an older state; how many.

        What the broker still has comes a second time, which an inbox recognises. Only what is still kept can be sent
        again: for ``retain``, and as long as the quota has room; ``status().oldest_sent_at`` says since when.
        """
        begin = check_moment("since", since)
        # Without an end it would go on with what it has itself caused to be sent.
        end = datetime.now(UTC) if before is None else check_moment("before", before)
        return await in_steps(lambda: self._store.replay(since=begin, before=end, limit=STEP), progress)

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, progress: Progress | None = None) -> int:
        """Delete rows that have been sent, or dead, since before a time; how many."""
        if state not in ("sent", "dead"):
            raise ValueError(f'rows can be purged that are "sent" or "dead", not {state!r}')
        check_moment("before", before)
        return await in_steps(lambda: self._store.purge(state, before=before, limit=STEP), progress)


async def in_steps(step: Callable[[], Awaitable[int]], progress: Progress | None) -> int:
    """Repeat a step, a transaction each, until it has nothing left to do; how many rows it was."""
    done = 0
    while many := await step():
        done += many
        if progress is not None:
            progress(done)
    return done
