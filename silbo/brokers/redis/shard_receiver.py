"""The receiver of one shard, for its leader: every call checks the lease."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from silbo.brokers.redis.calls import ScriptCall, run_call
from silbo.brokers.redis.connection import Connection
from silbo.brokers.redis.group import StreamGroup, StreamReceiver
from silbo.brokers.redis.leases import Lease, is_fenced
from silbo.brokers.redis.scripts import ADOPT, READ, Script
from silbo.errors import BrokerRefused, BrokerUnavailable
from silbo.message import Batch, Delivery

__all__ = ["LEADER", "ShardReceiver"]

LEADER: Final = b"leader"
"""The name of a shard's only consumer in Redis's group, whichever process it is: what the last leader had in hand, the next one finds
in its own hand, in the order of the stream, and nothing has to change hands. The lease says which process may use the name."""


class ShardReceiver(StreamReceiver):
    """A receiver of one shard, as long as its lease is the last one taken.

    When it is not any more, ``on_fenced`` is called, and from then on nothing is read or settled: an acknowledgement is dropped,
    :meth:`bury` returns False, and :meth:`keep` returns everything as taken over.

    XREADGROUP can check no lease, and in a script it can't wait. So an XREAD, which gives nothing to anybody, waits for the next
    entry; then a script reads. It costs a round trip where there was nothing to read.

    Args:
        group: The description of the group, with the shard as its only key.
        lease: The lease.
        is_led: Returns True if the lease was renewed so lately that nobody else can have it.
        on_fenced: Called once, when the lease is another's, or may be.
    """

    _claim_script = ADOPT

    def __init__(
        self, group: StreamGroup, lease: Lease, *, is_led: Callable[[], bool], on_fenced: Callable[[], object]
    ) -> None:
        self._is_led = is_led
        self._lease = lease
        self._epoch = lease.epoch
        self._on_fenced = on_fenced
        self._is_fenced = False
        self._is_stopped = False
        self._is_waiting = False  # for entries, and nothing is given out
        self._given = b""  # the last id that the group was given, as this reader knows
        self._seen = "0"  # the last id that ended a wait
        self._is_exhausted = False  # true if the last read gave all that there was: then it waits first, which saves a third of the calls
        super().__init__(replace(group, consumer=None), who=LEADER, signed=lease.member)

    @property
    def epoch(self) -> int:
        """The epoch of the lease."""
        return self._lease.epoch

    async def _fetch(self, limit: int) -> None:
        if self._has_ended():
            return
        if self._is_fenced:
            await asyncio.sleep(self._block)  # until it is removed
            return
        try:
            await super()._fetch(limit)
        except BrokerUnavailable as error:
            if not (self._find_fenced(error) or self._has_ended()):
                raise

    async def stop(self) -> None:
        """Let a read that waits for entries end at once, and read nothing more."""
        self._is_stopped = True
        if self._is_waiting and self._connection is not None:
            await self._connection.drop()

    async def ack(self, *deliveries: Delivery | Batch) -> None:
        """See :class:`~silbo.protocols.BatchReceiver`. What was received in another epoch is not acknowledged: it comes again."""
        deliveries = tuple(each for each in deliveries if each.epoch == self._epoch)
        try:
            await super().ack(*deliveries)
        except BrokerUnavailable as error:
            if not self._find_fenced(error):
                raise
            self.forget(deliveries)

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """See :class:`~silbo.protocols.Receiver`: all are kept by the lease."""
        if not self._is_fenced:
            call = self._lease.make_renew_call(self._description.claim_after)
            if await self._in_hand.keep_by(call, deliveries):
                return ()
            self._note_fenced()
        self.forget(deliveries)
        return deliveries

    def find_unconfirmed(self, deliveries: Iterable[Delivery], since: float) -> list[Delivery]:
        """Return all, or none if the lease is certain: a part that was given up alone would be read by nobody in this epoch."""
        if self._is_led() and not self._is_fenced:
            return []
        self._note_fenced()
        return list(deliveries)

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        """See :class:`~silbo.protocols.Receiver`. Nobody else reads the shard, so nobody takes them meanwhile."""
        try:
            return await super().offer(*deliveries)
        except BrokerUnavailable as error:
            if not self._find_fenced(error):
                raise
            return [None] * len(deliveries)

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        """See :class:`~silbo.protocols.Receiver`. BrokerRefused also if another process leads the shard."""
        try:
            return await super().count(delivery, error=error)
        except BrokerUnavailable as failure:
            if not self._find_fenced(failure):
                raise
            raise BrokerRefused(
                f"another process leads {delivery.address} by now: its attempt is not counted"
            ) from failure

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """See :class:`~silbo.protocols.Receiver`."""
        try:
            return await super().bury(delivery, error=error, attempts=attempts)
        except BrokerUnavailable as failure:
            if not self._find_fenced(failure):
                raise
            return False

    async def _make_groups(self) -> None:
        """Make no group: the members have, before they took part. If it is gone, it was deleted, and the first read makes it again.

        Made here it would begin at the group's ``start``, and with ``"new"`` miss what came since it was deleted.
        """

    async def _take_leave(self) -> None:
        """Leave everything as it is: the next leader finds it in its hand."""

    def _make_call(self, script: Script, keys: Sequence[bytes], *arguments: bytes) -> ScriptCall:
        return self._lease.make_call(script, keys, *arguments)

    async def _xreadgroup(self, connection: Connection, limit: int, *rest: bytes) -> Any:
        *block, _, key, after = rest
        if after != b">":
            call = self._make_call(READ, [key], self._group, self._consumer, b"%d" % limit, after)
            given, reply = await run_call(connection, call)
            if after == b"0":
                self._given = given
                self._last_given[key] = given.decode()
            return reply
        if not (self._is_exhausted and block):
            reply = await self._read_next(connection, key, limit)
            if reply or not block:
                return reply
        last = max(self._given.decode() or "0", self._seen, key=_order)
        self._is_waiting = True
        try:
            found = await connection.execute(b"XREAD", b"COUNT", b"1", *block, b"STREAMS", key, last.encode())
        finally:
            self._is_waiting = False
        if not found:
            self._is_exhausted = False  # the group may have been set back
            return None
        self._seen = found[0][1][0][0].decode()  # if the group was given it already, the next wait is for later ones
        return await self._read_next(connection, key, limit)

    async def _read_next(self, connection: Connection, key: bytes, limit: int) -> Any:
        """Read new entries; if the group was given some that were not seen here, they are read first, the next time."""
        words = self._group, self._consumer, b"%d" % limit, b">", self._given
        given, reply = await run_call(connection, self._make_call(READ, [key], *words))
        entries = reply[0][1] if reply else ()
        self._is_exhausted = 0 < len(entries) < limit
        if entries:
            self._given = entries[-1][0]
        elif given != self._given:
            self._reread_after[key] = b"0"
        return reply

    def _has_ended(self) -> bool:  # also while a read was under way
        return self._is_stopped

    def _find_fenced(self, error: BaseException) -> bool:
        """Return True if an error says that another process leads the shard."""
        if not is_fenced(error):
            return False
        self._note_fenced()
        return True

    def _note_fenced(self) -> None:
        if not self._is_fenced:
            self._is_fenced = True
            self._on_fenced()


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)
