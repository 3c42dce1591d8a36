"""Consumer groups of Redis Streams: the description that a consumer opens."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from redis.asyncio import Redis

from silbo._reports import RateLimitedLog
from silbo._retry import Backoff
from silbo.brokers.redis.calls import Calls
from silbo.brokers.redis.connection import Connection, Lost, Refused, connect, where
from silbo.brokers.redis.in_hand import Hold, attempts_key
from silbo.brokers.redis.scripts import ACK, CLAIM, CREATE, LOOK, TIDY, call
from silbo.errors import BrokerUnavailable, Gap, StartInvalid
from silbo.message import Delivery, Format, instance

__all__ = ["GroupReader", "StreamGroup", "Upkeep", "check_start", "order"]

logger = logging.getLogger(__name__)

CLAIM_PAGES: Final = 10
"""Pages in which nothing is idle, after which what is new gets its turn."""
FORGET_AFTER: Final = 300.0
"""Seconds that a consumer without entries is silent before the others remove it: ten times ``claim_after``, and not less
than these."""
NEAR: Final = 0.8
"""The share of the retention from which on a group is reported as near to its end."""

_START: Final = b"0-0"


def order(entry_id: str) -> tuple[int, int]:
    """What ids are ordered by."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


class Upkeep:
    """The upkeep of one stream's group, by one of its consumers.

    Args:
        key: The stream's.
        claim_after: Seconds after which a delivery of a silent consumer is taken over.
        retain: Seconds that entries are kept; None for ever.
    """

    def __init__(self, key: bytes, group: bytes, consumer: bytes, *, claim_after: float, retain: float | None) -> None:
        self._key, self._group, self._consumer = key, group, consumer
        self._attempts = attempts_key(key, group)
        self._every, self._retain = claim_after / 3, retain
        self._idle = b"%d" % (claim_after * 1000)
        self._forget_after = max(10 * claim_after, FORGET_AFTER)
        self._cursor = _START
        self._claim_at = self._look_at = self._tidy_at = float("-inf")  # by the loop's clock
        self._at_tip = float("-inf")  # when the group had been given everything
        self._log = RateLimitedLog(logger, every=60.0)

    def read(self, *, all_of_it: bool) -> None:
        """Note that the group was read from, and whether it has been given everything since."""
        if all_of_it:
            self._at_tip = asyncio.get_running_loop().time()

    async def claim(self, connection: Connection, limit: int) -> tuple[list[Any], list[int], int]:
        """Entries that silent consumers had, where it is time to look, at most ``limit``.

        With the attempts of each that are known, and how many other entries were gone.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._claim_at:
            return [], [], 0
        entries: list[Any] = []
        attempts: list[int] = []
        gone = 0
        for _ in range(CLAIM_PAGES):
            page = b"%d" % limit
            arguments = [self._group, self._consumer, self._idle, self._cursor, page]
            answer = await call(connection, CLAIM, [self._key, self._attempts], *arguments)
            self._cursor, entries, attempts, gone = answer
            if self._cursor == _START:
                self._claim_at = loop.time() + self._every
                break
            if entries or gone:
                break
        return entries, attempts, gone

    async def tidy(self, connection: Connection) -> None:
        """Remove consumers that are silent and have nothing in hand, where it is time to."""
        now = asyncio.get_running_loop().time()
        if now >= self._tidy_at:
            self._tidy_at = now + self._forget_after / 10
            idle = b"%d" % (self._forget_after * 1000)
            await call(connection, TIDY, [self._key], self._group, self._consumer, idle)

    async def look(self, connection: Connection, last: str) -> Gap | None:
        """A gap where the stream no longer has what the group was not given; to be asked before each read.

        ``last`` is the id given to it last, as far as known.
        """
        now = asyncio.get_running_loop().time()
        if now < self._look_at and not self._may_miss(now, last):
            return None
        self._look_at = now + self._every
        # Where Redis does not count: who had been given everything that recently has missed nothing.
        certain = self._retain is None or now - self._at_tip < self._retain
        retain = b"" if certain or self._retain is None else b"%d" % (self._retain * 1000)
        missed, age = await call(connection, LOOK, [self._key], self._group, retain)
        address = self._key.decode()
        if missed:
            reason = "the group fell behind the retention, and the stream no longer has what it was not given"
            return Gap(address, reason, count=None if missed < 0 else missed)
        if self._retain is not None and age > self._retain * 1000 * NEAR:
            self._log.write(
                "group %s falls behind at %s: its next message is %.3g s old, and after %.3g s it may be dropped",
                None,
                self._group.decode(),
                address,
                age / 1000,
                self._retain,
                address=address,
                group=self._group.decode(),
                age=age / 1000,
                retain=self._retain,
            )
        return None

    def _may_miss(self, now: float, last: str) -> bool:
        """Whether an entry that came after the last one, and after all had been given, can be as old as the retention.

        By half of it, for the clock is this machine's.
        """
        if self._retain is None:
            return False
        half = self._retain / 2
        return now - self._at_tip > half and time.time() - order(last)[0] / 1000 > half


BLOCK: Final = 0.4
"""Seconds that Redis holds a read back for something to come: with the way there and back, half a second."""
RECREATE_EVERY: Final = 1.0
"""Seconds between two attempts to make a group again that was deleted."""
RECONNECT: Final = Backoff(initial=0.02, cap=0.25)
GOODBYE: Final = 0.5
"""Seconds for a consumer to take its leave."""

_opened = count(1)


class GroupReader:
    """One consumer of a group.

    What the group has given it and it did not acknowledge comes first: after opening, and after every error, for a
    read whose answer was lost has given it entries that it never saw. Then what silent consumers had, then what is new.
    """

    skips_own_instance = False

    def __init__(self, group: StreamGroup) -> None:
        self._description = group
        self._server, self._timeout = where(group.client), group.timeout
        self._block = min(BLOCK, group.claim_after / 4)
        self._group = group.name.encode()
        self._name = (group.consumer or f"{instance()}-{next(_opened)}").encode()
        self.keep_every: float | None = group.claim_after / 3
        calls = Calls(group.client, group.timeout)
        self._hold = Hold(calls, self._group, self._name, group.app, claim_after=group.claim_after)
        self._upkeep = {
            key.encode(): Upkeep(
                key.encode(), self._group, self._name, claim_after=group.claim_after, retain=group.retain
            )
            for key in group.keys
        }
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()  # one read at a time
        self._ready: deque[Delivery | Gap] = deque()
        self._own: dict[bytes, bytes] = {}  # streams with entries given before: the last id that was read again
        self._seen: dict[bytes, str] = {}  # the last id that the group has given out, as far as known
        self._failures = 0  # to connect, one after another
        self._recreated = float("-inf")
        self._closed = False

    # -- what a consumer asks for ---------------------------------------------------------------------------

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """See :class:`~silbo.protocols.Receiver`."""
        async with self._turn:
            if not self._ready:
                async with self._talk("read from") as connection:
                    await self._read(connection, limit)
            items = [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
            # What came again while it was in hand may be done by now.
            return [item for item in items if isinstance(item, Gap) or (item.address, item.id) in self._hold]

    async def ack(self, *deliveries: Delivery) -> None:
        """See :class:`~silbo.protocols.Receiver`."""
        await self._hold.ack(deliveries)

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """See :class:`~silbo.protocols.Receiver`."""
        return await self._hold.keep(deliveries)

    async def count(self, delivery: Delivery) -> int:
        """See :class:`~silbo.protocols.Receiver`. A call that is repeated after an error counts once."""
        return await self._hold.count(delivery)

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """See :class:`~silbo.protocols.Receiver`."""
        return await self._hold.bury(delivery, error, attempts)

    async def aclose(self) -> None:
        """Take leave, and close the connections. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            async with self._turn:  # a read that waits is over soon
                connection, self._connection = self._connection, None
                if connection is not None:
                    await connection.aclose()
            with suppress(BrokerUnavailable, TimeoutError):
                async with asyncio.timeout(GOODBYE):
                    await self._hold.leave(self._upkeep, unnamed=self._description.consumer is None)
        finally:
            await self._hold.aclose()

    # -- the connection -------------------------------------------------------------------------------------

    async def open(self) -> None:
        """See :meth:`~silbo.brokers.redis.group.StreamGroup.open`."""
        start = self._description.start
        async with self._turn, self._talk("open a group at") as connection:
            for key in self._upkeep:
                await self._create(connection, key, "$" if start == "new" else "0" if start == "oldest" else start)
                for row in await connection.ask(b"XINFO", b"GROUPS", key):
                    group = _mapping(row)
                    if group[b"name"] == self._group:
                        self._seen[key] = group[b"last-delivered-id"].decode()

    @asynccontextmanager
    async def _talk(self, what: str) -> AsyncGenerator[Connection]:
        """The connection; whatever goes wrong on it ends it, and no late answer is taken for another's."""
        if self._closed:
            raise BrokerUnavailable("the subscription is closed")
        try:
            async with asyncio.timeout(BLOCK + self._timeout):
                if self._connection is None:
                    await self._connect()
                assert self._connection is not None
                yield self._connection
        except (Lost, Refused, TimeoutError) as error:
            await self._drop()
            why = str(error) or f"no answer within {self._timeout:g} s"
            raise BrokerUnavailable(f"can't {what} {self._server}: {why}") from error
        except BaseException:
            await self._drop()
            raise

    async def _connect(self) -> None:
        if self._failures:
            await asyncio.sleep(RECONNECT.delay(self._failures) or 0)
        self._failures += 1
        self._connection = await connect(self._description.client)
        self._failures = 0
        self._own = dict.fromkeys(self._upkeep, b"0")

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        # What was not handed out is pending like the rest, and is read again.
        self._hold.forget(item for item in self._ready if isinstance(item, Delivery))
        self._ready = deque(item for item in self._ready if isinstance(item, Gap))
        if connection is not None:
            await connection.drop()

    # -- reading --------------------------------------------------------------------------------------------

    async def _read(self, connection: Connection, limit: int) -> None:
        self._hold.read()
        try:
            while self._own and not await self._read_own(connection, limit):
                pass
            for key, upkeep in self._upkeep.items():
                if not self._ready:
                    await self._claim(connection, key, upkeep, limit)
            if not self._ready:
                await self._read_new(connection, limit)
        except Refused as refusal:
            # The third when the stream was deleted while Redis held the read back.
            if not any(text in str(refusal) for text in ("NOGROUP", "no such key", "no longer exists")):
                raise
            await self._recreate(connection)

    async def _read_own(self, connection: Connection, limit: int) -> bool:
        """A page of what one stream has given to this consumer before; whether something was in it."""
        key, after = next(iter(self._own.items()))
        asked = asyncio.get_running_loop().time()
        reply = await self._xreadgroup(connection, limit, b"STREAMS", key, after)
        entries: list[Any] = reply[0][1] if reply else []
        if not entries:
            del self._own[key]
            return False
        address = key.decode()
        # Trimmed or deleted; unless it is in hand, nobody can have it any more.
        empty = [entry_id for entry_id, fields in entries if fields is None]
        gone = [entry_id for entry_id in empty if (address, entry_id.decode()) not in self._hold]
        if gone:
            await call(connection, ACK, [key, attempts_key(key, self._group)], self._group, *gone)
            self._tell_gone(address, len(gone))
        self._own[key] = entries[-1][0]
        if there := [entry for entry in entries if entry[1] is not None]:
            ids = [entry_id for entry_id, _ in there]
            known = await connection.ask(b"HMGET", attempts_key(key, self._group), *ids)
            self._hand_out(key, there, asked, [int(attempts or 0) for attempts in known])
        return any(isinstance(item, Delivery) for item in self._ready)

    async def _claim(self, connection: Connection, key: bytes, upkeep: Upkeep, limit: int) -> None:
        asked = asyncio.get_running_loop().time()
        entries, attempts, gone = await upkeep.claim(connection, limit)
        if gone:
            self._tell_gone(key.decode(), gone)
        if entries:
            self._hand_out(key, entries, asked, attempts)
        await upkeep.tidy(connection)
        if gap := await upkeep.look(connection, self._seen.get(key, "0")):
            self._ready.append(gap)

    def _tell_gone(self, address: str, many: int) -> None:
        """One gap for all of it, not one for each page."""
        if self._ready and isinstance(last := self._ready[-1], Gap) and last.address == address and last.count:
            many += last.count
            self._ready.pop()
        self._ready.append(Gap(address, "deleted from the stream before they were handled", count=many))

    async def _read_new(self, connection: Connection, limit: int) -> None:
        block = b"%d" % max(1, int(self._block * 1000))
        keys = list(self._upkeep)
        asked = asyncio.get_running_loop().time()
        reply = await self._xreadgroup(connection, limit, b"BLOCK", block, b"STREAMS", *keys, *[b">"] * len(keys))
        given = dict(reply or ())
        for key, upkeep in self._upkeep.items():
            entries = given.get(key, [])
            upkeep.read(all_of_it=len(entries) < limit)
            if entries:
                self._seen[key] = entries[-1][0].decode()
                self._hand_out(key, entries, asked)

    async def _xreadgroup(self, connection: Connection, limit: int, *rest: bytes) -> Any:
        return await connection.ask(b"XREADGROUP", b"GROUP", self._group, self._name, b"COUNT", b"%d" % limit, *rest)

    def _hand_out(self, key: bytes, entries: list[Any], asked: float, attempts: Sequence[int] = ()) -> None:
        """Have them ready; with the attempts of each that are known, where they were given out before."""
        address, form = key.decode(), self._description.format
        numbers = [2 + known for known in attempts] or [1] * len(entries)
        for (entry_id, fields), attempt in zip(entries, numbers, strict=True):
            raw = _mapping(fields).get(b"message", b"")  # somebody else's entry is malformed, and told as such
            delivery = Delivery(raw, address, form, entry_id.decode(), attempt)
            if self._hold.take(delivery, asked):
                self._ready.append(delivery)

    # -- groups ---------------------------------------------------------------------------------------------

    async def _create(self, connection: Connection, key: bytes, start: str) -> bool:
        """Make the group, and its stream where there is none; False when somebody else has."""
        try:
            await call(connection, CREATE, [key], self._group, start.encode())
        except Refused as refusal:
            if "BUSYGROUP" not in str(refusal):
                raise
            return False
        return True

    async def _recreate(self, connection: Connection) -> None:
        """Make the groups again after a deletion or FLUSHALL, or Redis's restart without its data."""
        now = asyncio.get_running_loop().time()
        if now - self._recreated < RECREATE_EVERY:
            await asyncio.sleep(self._block)
            return
        self._recreated = now
        for key in self._upkeep:
            start = await self._where_it_was(connection, key)
            if await self._create(connection, key, start):
                reason = f"the stream or its group was deleted; the group was made again, after {start}"
                self._ready.append(Gap(key.decode(), reason))
                await self._hold.take_back(key)

    async def _where_it_was(self, connection: Connection, key: bytes) -> str:
        """The last id seen, in the stream that it is of. A stream begun anew is read from its beginning."""
        try:
            stream = _mapping(await connection.ask(b"XINFO", b"STREAM", key))
        except Refused:  # there is none
            return "0"
        seen = self._seen.get(key, "0")
        return seen if order(seen) <= order(stream[b"last-generated-id"].decode()) else "0"


def _mapping(flat: list[Any]) -> dict[bytes, Any]:
    """RESP2's shape of a mapping: name, value, name, value, ..."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


_is_id = re.compile(r"\d+(-\d+)?").fullmatch


def check_start(start: str) -> str:
    """The same start, once it is known to be one.

    Raises:
        StartInvalid: it is none.
    """
    if start in ("new", "oldest") or (_is_id(start) and order(start) != (0, 0)):
        return start
    raise StartInvalid(start)


@dataclass(frozen=True, slots=True)
class StreamGroup:
    """A place in a consumer group; a consumer opens it."""

    client: Redis
    app: str
    format: Format
    timeout: float
    name: str
    start: str
    consumer: str | None
    keys: tuple[str, ...]
    claim_after: float
    retain: float | None

    async def open(self) -> GroupReader:
        """Connect, and make the group where it does not exist.

        Raises:
            BrokerUnavailable: Redis can't be reached, or refuses.
        """
        reader = GroupReader(self)
        await reader.open()
        return reader
