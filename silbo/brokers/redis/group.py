"""Reading Redis Streams in a consumer group."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from redis.asyncio import Redis

from silbo.brokers.redis.connection import Connection, Lost, Refused, connect, where
from silbo.errors import BrokerUnavailable, Gap, StartInvalid
from silbo.message import Delivery, instance
from silbo.protocols import Format
from silbo.retry import Backoff

__all__ = ["StreamGroup", "check_start"]

BLOCK: Final = 0.4
"""Seconds that Redis holds a read back for something to come: with the way there and back, half a second."""
RECREATE_EVERY: Final = 1.0
"""Seconds between two attempts to make a group again that was deleted."""
RECONNECT: Final = Backoff(initial=0.02, cap=0.25)

_opened = count(1)
_is_id = re.compile(r"\d+(-\d+)?").fullmatch


def check_start(start: str) -> str:
    """The same start, once it is known to be one.

    Raises:
        StartInvalid: it is none.
    """
    if start in ("new", "oldest") or (_is_id(start) and _order(start) != (0, 0)):
        return start
    raise StartInvalid(start)


def _order(entry_id: str) -> tuple[int, int]:
    """What ids are ordered by."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


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

    async def open(self) -> _Reader:
        """Connect, and make the group where it does not exist.

        Raises:
            BrokerUnavailable: Redis can't be reached, or refuses.
        """
        reader = _Reader(self)
        await reader.open()
        return reader


class _Reader:
    """One consumer of a group.

    What the group has given it and it did not acknowledge comes first: after opening, and after every error, for a
    read whose answer was lost has given it entries that it never saw.
    """

    skips_own_instance = False
    keep_every: float | None = None

    def __init__(self, group: StreamGroup) -> None:
        self._client, self._server, self._timeout = group.client, where(group.client), group.timeout
        self._format, self._start = group.format, group.start
        self._group = group.name.encode()
        self._name = (group.consumer or f"{instance()}-{next(_opened)}").encode()
        self._keys = [key.encode() for key in group.keys]
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()  # one command at a time
        self._ready: deque[Delivery | Gap] = deque()
        self._own: dict[bytes, bytes] = {}  # streams with entries given before: the last id that was read again
        self._seen: dict[bytes, str] = {}  # the last id that the group has given out, as far as known
        self._failures = 0  # to connect, one after another
        self._recreated = float("-inf")
        self._closed = False

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        async with self._turn:
            if not self._ready:
                async with self._talk("read from") as connection:
                    await self._read(connection, limit)
            return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]

    async def ack(self, *deliveries: Delivery) -> None:
        ids: dict[str, list[bytes]] = defaultdict(list)
        for delivery in deliveries:
            ids[delivery.address].append(delivery.id.encode())
        if not ids:
            return
        async with self._turn, self._talk("acknowledge at") as connection:
            for key, done in ids.items():
                await connection.ask(b"XACK", key.encode(), self._group, *done)

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        return ()

    async def count(self, delivery: Delivery) -> int:
        return delivery.attempt

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        await self.ack(delivery)
        return True

    async def aclose(self) -> None:
        self._closed = True
        async with self._turn:  # a read that waits is over soon
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.aclose()

    # -- the connection -------------------------------------------------------------------------------------

    async def open(self) -> None:
        """See :meth:`StreamGroup.open`."""
        start = {"new": "$", "oldest": "0"}.get(self._start, self._start)
        async with self._turn, self._talk("open a group at") as connection:
            for key in self._keys:
                await self._create(connection, key, start)
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
        self._connection = await connect(self._client)
        self._failures = 0
        self._own = dict.fromkeys(self._keys, b"0")

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        # What was not handed out is pending like the rest, and is read again.
        self._ready = deque(item for item in self._ready if isinstance(item, Gap))
        if connection is not None:
            await connection.drop()

    # -- reading --------------------------------------------------------------------------------------------

    async def _read(self, connection: Connection, limit: int) -> None:
        try:
            while self._own and not await self._read_own(connection, limit):
                pass
            if not self._ready:
                await self._read_new(connection, limit)
        except Refused as refusal:
            # The second when the stream was deleted while Redis held the read back.
            if refusal.code != "NOGROUP" and "no longer exists" not in str(refusal):
                raise
            await self._recreate(connection)

    async def _read_own(self, connection: Connection, limit: int) -> bool:
        """A page of what one stream has given to this consumer before; whether something was in it."""
        key, after = next(iter(self._own.items()))
        reply = await self._xreadgroup(connection, limit, b"STREAMS", key, after)
        entries: list[Any] = reply[0][1] if reply else []
        if not entries:
            del self._own[key]
            return False
        if gone := [entry_id for entry_id, fields in entries if fields is None]:
            await connection.ask(b"XACK", key, self._group, *gone)  # trimmed or deleted; nobody can have them any more
            self._tell_gone(key.decode(), len(gone))
        self._own[key] = entries[-1][0]
        self._hand_out(key, [entry for entry in entries if entry[1] is not None], attempt=2)
        return len(gone) < len(entries)

    def _tell_gone(self, address: str, many: int) -> None:
        """One gap for all of it, not one for each page."""
        if self._ready and isinstance(last := self._ready[-1], Gap) and last.address == address and last.count:
            many += last.count
            self._ready.pop()
        self._ready.append(Gap(address, "deleted from the stream before they were handled", count=many))

    async def _read_new(self, connection: Connection, limit: int) -> None:
        block = b"%d" % (BLOCK * 1000)
        everything = [b">"] * len(self._keys)
        reply = await self._xreadgroup(connection, limit, b"BLOCK", block, b"STREAMS", *self._keys, *everything)
        for key, entries in reply or ():
            self._seen[key] = entries[-1][0].decode()
            self._hand_out(key, entries, attempt=1)

    async def _xreadgroup(self, connection: Connection, limit: int, *rest: bytes) -> Any:
        return await connection.ask(b"XREADGROUP", b"GROUP", self._group, self._name, b"COUNT", b"%d" % limit, *rest)

    def _hand_out(self, key: bytes, entries: list[Any], *, attempt: int) -> None:
        address = key.decode()
        for entry_id, fields in entries:
            raw = _mapping(fields).get(b"message", b"")  # somebody else's entry is malformed, and told as such
            self._ready.append(Delivery(raw, address, self._format, entry_id.decode(), attempt))

    # -- groups ---------------------------------------------------------------------------------------------

    async def _create(self, connection: Connection, key: bytes, start: str) -> bool:
        """Make the group, and its stream where there is none; False when somebody else has."""
        try:
            await connection.ask(b"XGROUP", b"CREATE", key, self._group, start.encode(), b"MKSTREAM")
        except Refused as refusal:
            if refusal.code != "BUSYGROUP":
                raise
            return False
        return True

    async def _recreate(self, connection: Connection) -> None:
        """Make the groups again after a deletion or FLUSHALL, or Redis's restart without its data."""
        now = asyncio.get_running_loop().time()
        if now - self._recreated < RECREATE_EVERY:
            await asyncio.sleep(BLOCK)
            return
        self._recreated = now
        for key in self._keys:
            start = await self._where_it_was(connection, key)
            if await self._create(connection, key, start):
                reason = f"the stream or its group was deleted; the group was made again, after {start}"
                self._ready.append(Gap(key.decode(), reason))

    async def _where_it_was(self, connection: Connection, key: bytes) -> str:
        """The last id seen, in the stream that it is of. A stream begun anew is read from its beginning."""
        try:
            stream = _mapping(await connection.ask(b"XINFO", b"STREAM", key))
        except Refused:  # there is none
            return "0"
        seen = self._seen.get(key, "0")
        return seen if _order(seen) <= _order(stream[b"last-generated-id"].decode()) else "0"


def _mapping(flat: list[Any]) -> dict[bytes, Any]:
    """RESP2's shape of a mapping: name, value, name, value, ..."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
