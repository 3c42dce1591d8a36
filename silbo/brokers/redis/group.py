"""Consumer groups of Redis Streams: the description that a consumer opens, its receiver, and the upkeep of the group."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final, Protocol

from redis.asyncio import RedisCluster

from silbo._loops import LoopBinding
from silbo._process import name_process
from silbo._reports import Outage, RateLimitedLog
from silbo._retry import Backoff
from silbo.brokers.redis.calls import CallConnection, MakeCall, ScriptCall, run_call, run_calls
from silbo.brokers.redis.connection import (
    Client,
    Connection,
    Lost,
    Refused,
    describe_server,
    find_trouble,
    to_unavailable,
)
from silbo.brokers.redis.in_hand import DeliveriesInHand, build_attempts_key, build_given_key
from silbo.brokers.redis.key_types import WrongType, find_wrong_types
from silbo.brokers.redis.lag import read_lag
from silbo.brokers.redis.nodes import connect_to, doubt_node
from silbo.brokers.redis.read_size import ReadSize
from silbo.brokers.redis.retention import RetentionPolicy, build_retention_key, build_trim
from silbo.brokers.redis.scripts import ACK, CLAIM, COUNTS, CREATE, LOOK, OFFER, REDATE, TIDY, Script
from silbo.brokers.redis.side_by_side import SideBySide
from silbo.brokers.redis.signs_of_life import SignsOfLife, build_signs_key
from silbo.errors import BrokerUnavailable, Gap, StartInvalid
from silbo.message import Batch, Delivery, Format, instance

__all__ = ["GOODBYE", "Sharding", "StreamGroup", "StreamReceiver", "check_start", "name_consumer"]

logger = logging.getLogger(__name__)

ACK_DELAY: Final = 0.005
"""Seconds that an acknowledgement waits for others when nothing is in work. At 5,000 messages a second each read brings a few: a call
for each would double what a read costs, and the time until a listener runs is 1.4 times as long."""
BLOCK: Final = 0.4
"""Redis holds a read back for at most 0.4 seconds: with the time on the network, half a second."""
CLAIM_PAGES: Final = 10
"""After 10 pages without an idle entry, new entries get their turn."""
FORGET_AFTER: Final = 300.0
"""A consumer without entries is removed after ten times ``claim_after`` of silence, and at least 300 seconds."""
NEAR: Final = 0.8
"""A group is reported as falling behind from this share of the retention on."""
IDLE_LOOK_EVERY: Final = 1.0
"""A group without new entries is looked at again after at least 1 second."""
SET_BACK: Final = 1.0
"""Redis's clock counts as set back if it has lost more than 1 second to the consumer's."""
RECREATE_EVERY: Final = 1.0
"""There is at least 1 second between two attempts to make a deleted group again."""
LOOK_ASIDE_EVERY: Final = 1.0
"""A stream whose key is of another type is looked at once a second."""
RECONNECT: Final = Backoff(initial=0.02, cap=0.25)
"""The delays between two attempts to connect."""
GOODBYE: Final = 0.5
"""A consumer that closes tells Redis within 0.5 seconds."""

_START: Final = b"0-0"  # XAUTOCLAIM's cursor at the beginning and at the end
_opened = count(1)
_is_id = re.compile(r"\d+(-\d+)?").fullmatch


# -- the description ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamGroup:
    """A subscription to a consumer group; a consumer opens it."""

    client: Client
    app: str
    format: Format
    timeout: float
    name: str
    start: str
    consumer: str | None
    keys: tuple[str, ...]
    claim_after: float
    retain: float | None
    sharding: Sharding | None = None

    async def open(self) -> StreamReceiver | SideBySide:
        """Connect, and make the group if it does not exist.

        Raises:
            BrokerUnavailable: Redis can't be reached, or refuses; safe to repeat.
            ShardsMismatch: an address has another number of shards than this program says.
        """
        if self.sharding is not None and (shared := await self.sharding.open(self)) is not None:
            return shared
        if len(self.keys) > 1 and isinstance(self.client, RedisCluster):  # a read names keys of one slot
            return await self.open_side_by_side()
        receiver = StreamReceiver(self)
        await receiver.open()
        return receiver

    async def open_side_by_side(self) -> SideBySide:
        """Do as :meth:`open` does, with a connection for each stream: one in trouble holds up no other.

        Raises:
            BrokerUnavailable: as in :meth:`open`.
        """
        who = name_consumer()
        receivers = [StreamReceiver(replace(self, keys=(key,)), who=who) for key in self.keys]
        side_by_side = SideBySide(
            receivers, group=self.name, keep_every=self.claim_after / 3, ack_delay=StreamReceiver.ack_delay
        )
        try:
            opened = await asyncio.gather(*[receiver.open() for receiver in receivers], return_exceptions=True)
            errors = [error for error in opened if error is not None]
            for error in errors:  # a stream that can't be reached is opened by its first read
                if not isinstance(error, BrokerUnavailable) or len(errors) == len(receivers):
                    raise error
        except BaseException:
            await side_by_side.aclose()
            raise
        return side_by_side

    async def read_lag(self) -> int:
        """See :class:`~silbo.protocols.MeasuredSubscription`."""
        keys = self.keys if self.sharding is None else await self.sharding.list_keys(self)
        return await read_lag(self.client, keys, self.name, self.timeout)


class Sharding(Protocol):
    """The part of a group that knows addresses which are spread over shards."""

    async def open(self, group: StreamGroup) -> SideBySide | None:
        """Open a receiver that reads the shards that are its own; None if no address of the group has shards."""
        ...

    async def list_keys(self, group: StreamGroup) -> Sequence[str]:
        """Return the keys of the streams, those of all shards among them."""
        ...


def name_consumer() -> bytes:
    """Return a new name for a consumer, which nobody has had."""
    return name_process(f"{instance()[:12]}-{next(_opened)}").encode()


def check_start(start: str) -> str:
    """Return the start of a group if it is ``"new"``, ``"oldest"`` or an entry's id.

    Raises:
        StartInvalid: it is none of these.
    """
    if start in ("new", "oldest") or (_is_id(start) and _parse_id(start) != (0, 0)):
        return start
    raise StartInvalid(start)


def _parse_id(entry_id: str) -> tuple[int, int]:
    """Return an entry's id as milliseconds and number, the order of ids."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


# -- the receiver -------------------------------------------------------------------------------------------


class StreamReceiver:
    """One consumer of a group.

    ``who`` tells it from another of the same name; receivers of one consumer may share it.

    After opening and after every error it first reads the entries that Redis gave it and that it did not acknowledge: if a
    reply was lost, it never saw them. Then it claims the entries of silent consumers. Then it reads new ones.
    """

    skips_own_instance = False
    ack_delay = ACK_DELAY
    _claim_script = CLAIM
    _epoch: int | None = None

    def __init__(self, group: StreamGroup, *, who: bytes | None = None, signed: bytes | None = None) -> None:
        self._description = group
        self._server = describe_server(group.client)
        self._timeout = group.timeout
        self._block = min(BLOCK, group.claim_after / 4)
        self._group = group.name.encode()
        who = who or name_consumer()
        self._consumer = who if group.consumer is None else group.consumer.encode()
        self.keep_every: float | None = group.claim_after / 3
        self._in_hand = DeliveriesInHand(
            CallConnection(group.client, group.timeout, owner="StreamGroup"),
            self._group,
            self._consumer,
            group.app,
            claim_after=group.claim_after,
            who=who,
            signed=signed or self._consumer,
            make_call=self._make_call,
        )
        self._signs = SignsOfLife(
            [key.encode() for key in group.keys],
            self._group,
            self._consumer,
            who=who,
            is_named=group.consumer is not None,
            keep=max(10 * group.claim_after, FORGET_AFTER),
        )
        self._upkeep = {
            key.encode(): GroupUpkeep(
                key.encode(),
                self._group,
                self._consumer,
                claim_after=group.claim_after,
                retain=group.retain,
                make_call=self._make_call,
                claim_script=self._claim_script,
            )
            for key in group.keys
        }
        self._connection: Connection | None = None
        self._size = ReadSize()
        self._read_lock = asyncio.Lock()
        self._ready: deque[Delivery | Batch | Gap] = deque()
        self._reread_after: dict[bytes, bytes] = {}  # streams whose pending entries are read again: the last id read
        self._last_given: dict[bytes, str] = {}  # by stream: the last id that the group was given, as far as known
        self._aside: dict[bytes, WrongType] = {}  # streams whose key is of another type; the others go on
        self._aside_outages = {
            key: Outage(
                logger,
                f"stream {key.decode()} of group {group.name}",
                "can't be read; its other streams go on",
                address=key.decode(),
                group=group.name,
            )
            for key in self._upkeep
        }
        self._looked_aside_at = float("-inf")
        self._is_open = False
        self._failures = 0  # to connect, one after another
        self._recreated_at = float("-inf")
        self._closed = False
        self._binding = LoopBinding("StreamGroup")

    @property
    def addresses(self) -> tuple[str, ...]:
        """The streams that it reads."""
        return self._description.keys

    @property
    def away(self) -> tuple[str, ...]:
        """See :class:`~silbo.protocols.Receiver`: streams whose keys are of another type."""
        return tuple(key.decode() for key in self._aside)

    @property
    def in_hand(self) -> int:
        """The number of deliveries that were fetched, and are not settled."""
        return len(self._in_hand)

    @property
    def has_fetched(self) -> bool:
        """True if something waits for :meth:`take`."""
        return bool(self._ready)

    @property
    def is_closed(self) -> bool:
        """True from the begin of :meth:`aclose` on."""
        return self._closed

    # -- the protocol ---------------------------------------------------------------------------------------

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """See :class:`~silbo.protocols.Receiver`."""
        items = await self.receive_batches(limit)
        return _flatten(items)

    async def receive_batches(self, limit: int) -> Sequence[Delivery | Batch | Gap]:
        """See :class:`~silbo.protocols.BatchReceiver`."""
        self._binding.check("receive")
        async with self._read_lock:
            await self._fetch(limit)
            return self.take(limit)

    async def fetch(self, limit: int) -> None:
        """Wait up to half a second for at most ``limit`` items, unless some wait for :meth:`take` already.

        Raises:
            BrokerUnavailable: the connection was lost or refused; the next call connects again.
        """
        self._binding.check("receive")
        async with self._read_lock:
            await self._fetch(limit)

    async def _fetch(self, limit: int) -> None:
        if not self._is_open:
            await self._open()
        if not self._ready:
            await self._follow(lambda: self._fetch_new(limit))

    async def _fetch_new(self, limit: int) -> None:
        async with self._connected("read from") as connection:
            await self._read(connection, limit)

    def take(self, limit: int) -> list[Delivery | Batch | Gap]:
        """Return at most ``limit`` of the items that were fetched, and that are still this consumer's."""
        items: list[Delivery | Batch | Gap] = []
        while self._ready and limit > 0:
            item = self._ready.popleft()
            if isinstance(item, Batch):
                if len(item) > limit:
                    self._ready.appendleft(item.cut(limit, len(item)))
                    item = item.cut(0, limit)
                limit -= len(item)
                # An entry that was read again while it was in hand may be acknowledged by now.
                if not self._in_hand.has_all(item):
                    items += [each for each in item if (each.address, each.id) in self._in_hand]
                    continue
            else:
                limit -= 1
                if not isinstance(item, Gap) and (item.address, item.id) not in self._in_hand:
                    continue
            items.append(item)
        return items

    async def ack(self, *deliveries: Delivery | Batch) -> None:
        """See :class:`~silbo.protocols.BatchReceiver`."""
        await self._in_hand.ack(deliveries)

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """See :class:`~silbo.protocols.Receiver`."""
        # Fetched deliveries may wait for long to be taken, and must be nobody else's then.
        waiting = [each for each in _flatten(self._ready) if not isinstance(each, Gap)]
        taken_over = await self._in_hand.keep([*deliveries, *waiting])
        if self._signs.is_due():  # nothing is read while there is no room
            calls = self._signs.calls()
            await self._in_hand.run(calls)
            self._signs.note(calls)
        return taken_over

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        """See :class:`~silbo.protocols.Receiver`."""
        return await self._in_hand.offer(deliveries)

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        """See :class:`~silbo.protocols.Receiver`; a call that is repeated after an error counts once."""
        return await self._in_hand.count(delivery, error)

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """See :class:`~silbo.protocols.Receiver`."""
        return await self._in_hand.bury(delivery, error, attempts)

    def forget(self, deliveries: Iterable[Delivery | Batch]) -> None:
        """Note that deliveries are not in hand any more. If Redis gives them to this consumer again, they are new."""
        self._in_hand.remove(deliveries)

    def find_unconfirmed(self, deliveries: Iterable[Delivery], since: float) -> list[Delivery]:
        """Return those that were not surely this consumer's after this loop's time."""
        return self._in_hand.find_unconfirmed(deliveries, since)

    async def aclose(self) -> None:
        """Let other consumers claim what is in hand, and close the connections. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            async with self._read_lock:  # a read under way ends soon
                connection, self._connection = self._connection, None
                if connection is not None:
                    await connection.aclose()
            await self._take_leave()
        finally:
            await self._in_hand.aclose()

    async def _take_leave(self) -> None:
        with suppress(BrokerUnavailable, TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await self._in_hand.leave(self._upkeep, unnamed=self._description.consumer is None)

    def _make_call(self, script: Script, keys: Sequence[bytes], *arguments: bytes) -> ScriptCall:
        return ScriptCall.of(script, keys, *arguments)

    # -- the connection -------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and make the groups that do not exist: see :meth:`StreamGroup.open`."""
        self._binding.enter("open")
        async with self._read_lock:
            await self._open()

    async def _open(self) -> None:
        await self._follow(self._make_groups)
        self._is_open = True

    async def _make_groups(self) -> None:
        start = self._description.start
        async with self._connected("open a group at") as connection:
            for key in self._upkeep:
                if key in self._aside:
                    continue
                try:
                    await self._create(connection, key, "$" if start == "new" else "0" if start == "oldest" else start)
                    groups = await connection.execute(b"XINFO", b"GROUPS", key)
                except Refused as refusal:
                    await self._put_aside(connection, refusal)
                    continue
                for row in groups:
                    group = _to_mapping(row)
                    if group[b"name"] == self._group:
                        self._last_given[key] = group[b"last-delivered-id"].decode()

    async def _follow(self, call: Callable[[], Awaitable[None]]) -> None:
        """Call; in a cluster again, for at most ``timeout`` seconds, while the stream is on its way to another node.

        Raises:
            BrokerUnavailable: as the call does.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeout
        attempt = 0
        while True:
            try:
                await call()
                return
            except BrokerUnavailable as error:
                attempt += 1
                delay = RECONNECT.delay(attempt) or 0
                is_elsewhere = isinstance(error.__cause__, Refused) and error.__cause__.is_elsewhere
                is_followed = is_elsewhere and isinstance(self._description.client, RedisCluster)
                if not is_followed or loop.time() + delay >= until:
                    raise
            await asyncio.sleep(delay)

    @asynccontextmanager
    async def _connected(self, what: str) -> AsyncGenerator[Connection]:
        """Lend the connection; after any trouble it is dropped, so that no command gets the late reply to another.

        Raises:
            BrokerUnavailable: the connection broke, or Redis refused or did not answer in time; ``what`` names the act.
        """
        if self._closed:
            raise BrokerUnavailable("the subscription is closed")
        try:
            async with asyncio.timeout(BLOCK + self._timeout) as limit:
                if self._connection is None:
                    await self._connect()
                assert self._connection is not None
                if self._connection.may_have_to_renew:
                    await self._connection.renew()
                with self._connection.extending(limit, BLOCK + self._timeout):
                    yield self._connection
        except (Lost, Refused, TimeoutError) as error:
            trouble = find_trouble(self._description.client) if self._connection is None else ""
            await self._drop()
            doubt_node(self._description.client, self._description.keys[0].encode())
            why = str(error) or trouble or f"no answer within {self._timeout:g} s"
            raise to_unavailable(error, self._server, f"can't {what} {self._server}: {why}") from error
        except BaseException:
            await self._drop()
            raise

    async def _connect(self) -> None:
        if self._failures:
            await asyncio.sleep(RECONNECT.delay(self._failures) or 0)
        self._failures += 1
        self._connection = await connect_to(self._description.client, self._description.keys[0].encode())
        self._connection.watch_progress()
        self._failures = 0
        self._reread_after = {key: b"0" for key in self._upkeep if key not in self._aside}
        for upkeep in self._upkeep.values():
            upkeep.note_connected()

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        # Deliveries that were not handed out are pending like the others, and are read again.
        self._in_hand.remove(item for item in self._ready if not isinstance(item, Gap))
        self._ready = deque(item for item in self._ready if isinstance(item, Gap))
        if connection is not None:
            await connection.drop()

    # -- reading --------------------------------------------------------------------------------------------

    async def _read(self, connection: Connection, limit: int) -> None:
        self._in_hand.begin_read()
        if self._aside:
            await self._look_aside(connection)
        try:
            if self._signs.is_due():
                calls = self._signs.calls()
                await run_calls(connection, calls)
                self._signs.note(calls)
            size = 0
            while self._reread_after and (not self._has_deliveries() or self._has_room(limit, size)):
                size += await self._read_again(connection, limit - self._count_ready())
            for key, upkeep in self._upkeep.items():
                if not self._ready and key not in self._aside:
                    await self._claim(connection, key, upkeep, limit)
            if not self._ready:
                await self._read_new(connection, limit)
        except Refused as refusal:
            # The third text comes when the stream was deleted while Redis held the read back.
            if any(text in str(refusal) for text in ("NOGROUP", "no such key", "no longer exists")):
                await self._recreate(connection)
            else:
                await self._put_aside(connection, refusal)

    async def _put_aside(self, connection: Connection, refusal: Refused) -> None:
        """Read from now on without the streams whose keys are of another type.

        Raises:
            Refused: that is not why Redis refused; or it is so with all streams, and the error names one.
        """
        wrong = await find_wrong_types(connection, self._upkeep) if refusal.code == "WRONGTYPE" else {}
        if not wrong:
            raise refusal
        self._looked_aside_at = asyncio.get_running_loop().time()
        self._aside = wrong
        for key in wrong:
            self._reread_after.pop(key, None)
        self._report_aside()

    async def _look_aside(self, connection: Connection) -> None:
        """Read the streams again whose keys were deleted or renamed, if it is time to look.

        Raises:
            WrongType: no stream can be read.
        """
        now = asyncio.get_running_loop().time()
        if now - self._looked_aside_at >= LOOK_ASIDE_EVERY:
            self._looked_aside_at = now
            was_aside, self._aside = self._aside, await find_wrong_types(connection, self._aside)
            for key in was_aside.keys() - self._aside.keys():
                self._aside_outages[key].answered("read")
                self._reread_after[key] = b"0"
        self._report_aside()

    def _report_aside(self) -> None:
        if len(self._aside) == len(self._upkeep):  # an outage of the consumer's
            raise next(iter(self._aside.values()))
        for key, error in self._aside.items():
            self._aside_outages[key].failed("read", error)

    def _has_deliveries(self) -> bool:
        return any(not isinstance(item, Gap) for item in self._ready)

    def _count_ready(self) -> int:
        return sum(len(item) if isinstance(item, Batch) else 1 for item in self._ready)

    def _has_room(self, limit: int, size: int) -> bool:
        """Return True if a read of at most so many items may go on, after so many bytes."""
        return self._count_ready() < limit and self._size.has_room(size)

    async def _read_again(self, connection: Connection, limit: int) -> int:
        """Read a page of one stream's entries that this consumer was given before; return its size in bytes."""
        key, after = next(iter(self._reread_after.items()))
        asked_at = asyncio.get_running_loop().time()
        reply = await self._xreadgroup(connection, self._size.count(max(1, limit)), b"STREAMS", key, after)
        entries: list[Any] = reply[0][1] if reply else []
        if not entries:
            del self._reread_after[key]
            return 0
        address = key.decode()
        attempts_key = build_attempts_key(key, self._group)
        # Trimmed or deleted; unless it is in hand, nobody can get the message any more.
        empty = [entry_id for entry_id, fields in entries if fields is None]
        gone = [entry_id for entry_id in empty if (address, entry_id.decode()) not in self._in_hand]
        if gone:
            await run_call(connection, self._make_call(ACK, [key, attempts_key], self._group, *gone))
            self._report_gone(address, len(gone))
        self._reread_after[key] = entries[-1][0]
        if existing := [entry for entry in entries if entry[1] is not None]:
            attempts = await run_call(
                connection, self._make_call(COUNTS, [attempts_key], *[entry_id for entry_id, _ in existing])
            )
            size = self._add_ready(key, existing, asked_at, attempts)
            await self._offer_again(connection, key, existing)
            return size
        return 0

    async def _claim(self, connection: Connection, key: bytes, upkeep: GroupUpkeep, limit: int) -> None:
        """Claim entries of silent consumers, and look after the group, as far as it is time to."""
        size = 0
        while self._has_room(limit, size):
            asked_at = asyncio.get_running_loop().time()
            count = self._size.count(limit - self._count_ready())
            entries, attempts, gone = await upkeep.claim(connection, count)
            if gone:
                self._report_gone(key.decode(), gone)
            if entries:
                size += self._add_ready(key, entries, asked_at, attempts)
                await self._offer_again(connection, key, entries)
            elif not gone:
                break
        await upkeep.redate(connection)
        await upkeep.remove_silent_consumers(connection)
        await upkeep.trim(connection)
        if gap := await upkeep.find_gap(connection, self._last_given.get(key, "0")):
            self._ready.append(gap)

    async def _offer_again(self, connection: Connection, key: bytes, entries: list[Any]) -> None:
        """Leave to the others what this consumer offers them: that it was read or claimed made it look like work."""
        if offered := self._in_hand.find_offered(key, [entry_id for entry_id, _ in entries]):
            keys, arguments = self._in_hand.offer_arguments(key, offered)
            try:
                await run_call(connection, self._make_call(OFFER, keys, *arguments))
            except Refused as refusal:  # no room, or the key of the offered is of another type: reading goes on
                if refusal.is_of_server or refusal.code == "NOGROUP":
                    raise

    def _report_gone(self, address: str, many: int) -> None:
        """Put a gap for deleted entries in front, or add their number to the gap of a page before."""
        if self._ready and isinstance(first := self._ready[0], Gap) and first.address == address and first.count:
            many += first.count
            self._ready.popleft()
        self._ready.appendleft(Gap(address, "deleted from the stream before they were handled", count=many))

    async def _read_new(self, connection: Connection, limit: int) -> None:
        block = [b"BLOCK", b"%d" % max(1, int(self._block * 1000))]
        keys = [key for key in self._upkeep if key not in self._aside]
        streams = [b"STREAMS", *keys, *[b">"] * len(keys)]
        size = 0
        while True:
            room = limit - self._count_ready()
            asked_at = asyncio.get_running_loop().time()
            count = self._size.count(room, len(keys))
            reply = await self._xreadgroup(connection, count, *block, *streams)
            given = dict(reply or ())
            has_more = False
            for key in keys:
                upkeep = self._upkeep[key]
                entries = given.get(key, [])
                if len(entries) < count:
                    upkeep.note_all_given()
                else:
                    has_more = True
                if entries:
                    self._last_given[key] = entries[-1][0].decode()
                    size += self._add_batch(key, entries, asked_at)
                elif not given and block:
                    upkeep.note_idle(self._last_given.get(key, "0"))
            # It asked for few, of unknown or of larger entries, and they were small: what there is now fits as well.
            if not has_more or count >= room or not self._has_room(limit, size):
                return
            block = []

    async def _xreadgroup(self, connection: Connection, limit: int, *rest: bytes) -> Any:
        return await connection.execute(
            b"XREADGROUP", b"GROUP", self._group, self._consumer, b"COUNT", b"%d" % limit, *rest
        )

    def _add_ready(self, key: bytes, entries: list[Any], asked_at: float, attempts: Sequence[int]) -> int:
        """Make deliveries of entries that were given out before, and return their size in bytes.

        Args:
            key: The stream's key.
            entries: Of a reply.
            asked_at: The loop's time when the read was sent.
            attempts: The attempts counted of each.
        """
        raws = list(map(_find_message, entries))
        size = self._note_size(raws, asked_at)
        address, form = key.decode(), self._description.format
        for (entry_id, _), raw, counted in zip(entries, raws, attempts, strict=True):
            delivery = Delivery(raw, address, form, entry_id.decode(), 2 + counted, self._epoch)
            if self._in_hand.add(delivery, asked_at):
                self._ready.append(delivery)
        return size

    def _add_batch(self, key: bytes, entries: list[Any], asked_at: float) -> int:
        """Make a batch of new entries; arguments and result are those of :meth:`_add_ready`."""
        raws = list(map(_find_message, entries))
        ids = [entry_id.decode() for entry_id, _ in entries]
        batch = Batch(key.decode(), self._description.format, raws, ids, epoch=self._epoch)
        added = self._in_hand.add_batch(batch, asked_at)
        if added is not None:
            self._ready.append(added)
        return self._note_size(raws, asked_at)

    def _note_size(self, raws: Sequence[bytes], asked_at: float) -> int:
        size = sum(map(len, raws))
        self._size.note(len(raws), size, asyncio.get_running_loop().time() - asked_at)
        return size

    # -- groups ---------------------------------------------------------------------------------------------

    async def _create(self, connection: Connection, key: bytes, start: str) -> bool:
        """Make the group, and its stream if there is none; False if the group exists.

        Raises:
            BrokerUnavailable: the address has shards by now, which this receiver does not read.
        """
        if self._epoch is None and (
            shards := int(await connection.execute(b"HGET", b"%b:shards" % key, b"shards") or 0)
        ):
            raise BrokerUnavailable(
                f"{key.decode()} has {shards} shards by now, and this consumer reads it as one stream: start the consumer again"
            )
        keys = [key, build_given_key(key)]
        return bool(await run_call(connection, self._make_call(CREATE, keys, self._group, start.encode())))

    async def _recreate(self, connection: Connection) -> None:
        """Make the groups again after a deletion, FLUSHALL, or a restart of Redis without its data."""
        now = asyncio.get_running_loop().time()
        if now - self._recreated_at < RECREATE_EVERY:
            await asyncio.sleep(self._block)
            return
        self._recreated_at = now
        for key in self._upkeep:
            if key in self._aside:
                continue
            start = await self._find_restart(connection, key)
            if await self._create(connection, key, start):
                reason = f"the stream or its group was deleted; the group was made again, after {start}"
                self._ready.append(Gap(key.decode(), reason))
                await self._in_hand.take_back(key)

    async def _find_restart(self, connection: Connection, key: bytes) -> str:
        """Return the id after which the group goes on: the last one given, or 0 if the stream is another one by now."""
        try:
            stream = _to_mapping(await connection.execute(b"XINFO", b"STREAM", key))
        except Refused:  # there is none
            return "0"
        last = self._last_given.get(key, "0")
        return last if _parse_id(last) <= _parse_id(stream[b"last-generated-id"].decode()) else "0"


def _flatten(items: Iterable[Delivery | Batch | Gap]) -> list[Delivery | Gap]:
    """Return the items, with the deliveries of each batch in its place."""
    return [each for item in items for each in (item if isinstance(item, Batch) else (item,))]


def _find_message(entry: Sequence[Any]) -> bytes:
    """Return the message of an entry; another program's entry without one is empty, and reported as malformed."""
    fields: list[bytes] = entry[1]
    if len(fields) == 2 and fields[0] == b"message":  # a name and its value
        return fields[1]
    message: bytes = _to_mapping(fields).get(b"message", b"")
    return message


def _to_mapping(flat: list[Any]) -> dict[bytes, Any]:
    """Return name, value, name, value, ..., RESP2's shape of a mapping, as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


# -- the upkeep ---------------------------------------------------------------------------------------------


class GroupUpkeep:
    """The upkeep of one stream's group, by one of its consumers.

    Args:
        key: The stream's key.
        group: The group's name.
        consumer: The consumer's name in the group.
        claim_after: Seconds after which a delivery of a silent consumer is taken over.
        retain: Seconds that entries are kept; None for ever.
        make_call: Makes its calls.
        claim_script: Takes over entries.
    """

    def __init__(
        self,
        key: bytes,
        group: bytes,
        consumer: bytes,
        *,
        claim_after: float,
        retain: float | None,
        make_call: MakeCall,
        claim_script: Script,
    ) -> None:
        self._make_call = make_call
        self._claim_script = claim_script
        self._key = key
        self._group = group
        self._consumer = consumer
        self._attempts_key = build_attempts_key(key, group)
        self._every = claim_after / 3
        self._retain = retain
        self._idle = b"%d" % (claim_after * 1000)
        self._forget_after = max(10 * claim_after, FORGET_AFTER)
        self._cursor = _START
        self._redate_from = b"-"  # an id, or nothing if no entry is left to be looked at
        self._ahead = float("-inf")  # seconds that Redis's clock was ahead of the loop's, at most
        # By the loop's clock: the next times, and the last one.
        self._claim_at = float("-inf")
        self._find_gap_at = float("-inf")
        self._remove_at = float("-inf")
        self._trim_at = float("-inf")
        self._all_given_at = float("-inf")
        self._looked_at = float("-inf")
        self._looked_after = ""  # the last id given, as far as this consumer knew
        self._told_after = b""  # the last id that the group had been given at the last gap
        self._is_counted = True  # False while Redis's count of what the group was given is in doubt
        self._log = RateLimitedLog(logger, every=60.0)

    def note_connected(self) -> None:
        """Note a new connection: Redis may have been away with wrong counts, and this may be one whose clock is behind."""
        self.look_soon()
        self._redate_from = b"-"
        self._ahead = float("-inf")

    def note_all_given(self) -> None:
        """Note that a read has just given the group everything that the stream has."""
        self._all_given_at = asyncio.get_running_loop().time()
        if not self._is_counted:  # now the number is known
            self.look_soon()

    def note_idle(self, last: str) -> None:
        """Note that nothing came, and that this id was given last: a look, at most once a second, notes where the group is."""
        now = asyncio.get_running_loop().time()
        if last != self._looked_after and now - self._looked_at >= IDLE_LOOK_EVERY:
            self.look_soon()

    def look_soon(self) -> None:
        """Look for a gap before the next read."""
        self._find_gap_at = float("-inf")

    async def claim(self, connection: Connection, limit: int) -> tuple[list[Any], list[int], int]:
        """Take over entries of silent consumers, at most ``limit``; none if it is not time to.

        Returns:
            The entries, the attempts counted of each, and the number of other entries that were gone from the stream.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._claim_at:
            return [], [], 0
        entries: list[Any] = []
        attempts: list[int] = []
        gone = 0
        for _ in range(CLAIM_PAGES):
            arguments = [self._group, self._consumer, self._idle, self._cursor, b"%d" % limit]
            reply = await run_call(
                connection, self._make_call(self._claim_script, [self._key, self._attempts_key], *arguments)
            )
            self._cursor, entries, attempts, gone, milliseconds = reply
            self._note_clock(milliseconds / 1000 - loop.time())
            if self._cursor == _START:
                self._claim_at = loop.time() + self._every
                break
            if entries or gone:
                break
        return entries, attempts, gone

    def _note_clock(self, ahead: float) -> None:
        if ahead < self._ahead - SET_BACK:
            self._redate_from = b"-"
            self._ahead = ahead
        self._ahead = max(self._ahead, ahead)

    async def redate(self, connection: Connection) -> None:
        """Let entries be idle from now on that Redis gave out before its clock was set back.

        Nobody could claim them before the clock has caught up. All entries are looked at after connecting, and when the clock
        has lost time since.
        """
        for _ in range(CLAIM_PAGES):
            if not self._redate_from:
                break
            self._redate_from = await run_call(
                connection, self._make_call(REDATE, [self._key], self._group, self._redate_from)
            )

    async def remove_silent_consumers(self, connection: Connection) -> None:
        """Remove consumers that are silent and have nothing in hand, if it is time to."""
        now = asyncio.get_running_loop().time()
        if now >= self._remove_at:
            self._remove_at = now + self._forget_after / 10
            idle = b"%d" % (self._forget_after * 1000)
            keys = [self._key, build_signs_key(self._key, self._group)]
            await run_call(connection, self._make_call(TIDY, keys, self._group, self._consumer, idle))

    async def trim(self, connection: Connection) -> None:
        """Trim the stream by the policy beside it, and follow that policy, if it is time to.

        Publishers do so more often, unless they are of an older version.
        """
        now = asyncio.get_running_loop().time()
        if now < self._trim_at:
            return
        self._trim_at = now + self._every
        call = build_trim(self._key)
        await run_calls(connection, [call])
        reply: Any = call.reply
        if isinstance(reply, list):
            with suppress(ValueError):  # another program wrote there: publishers tell
                if reply[1]:
                    self._retain = RetentionPolicy.of_text(reply[1]).retain
        elif reply.is_of_server:
            raise reply

    async def find_gap(self, connection: Connection, last: str) -> Gap | None:
        """Return a gap if the stream has lost entries that the group was not given; call it before each read.

        Args:
            connection: Runs the script.
            last: The id that the group was given last, as far as known.
        """
        now = asyncio.get_running_loop().time()
        if now < self._find_gap_at and not self._may_have_missed(now, last):
            return None
        self._find_gap_at = now + self._every
        self._looked_at = now
        self._looked_after = last
        # For a Redis that does not count: a group that was given everything within the retention has missed nothing.
        certain = self._retain is None or now - self._all_given_at < self._retain
        retain = b"" if certain or self._retain is None else b"%d" % (self._retain * 1000)
        keys = [self._key, build_given_key(self._key), build_retention_key(self._key)]
        missed, age, after, counted = await run_call(connection, self._make_call(LOOK, keys, self._group, retain))
        self._is_counted = bool(counted)
        address = self._key.decode()
        if missed and self._told_after != after:
            self._told_after = after
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

    def _may_have_missed(self, now: float, last: str) -> bool:
        """Return True if an entry that came after the last one can be older than half of the retention.

        Half of it is the margin for this machine's clock, which may differ from Redis's. Entries that came before
        everything had been given do not count.
        """
        if self._retain is None:
            return False
        half = self._retain / 2
        return now - self._all_given_at > half and time.time() - _parse_id(last)[0] / 1000 > half
