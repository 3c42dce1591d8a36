"""A broker inside one process: groups, acknowledgement and redelivery like Redis Streams, without a server.

Messages are encoded to bytes and decoded again, so a program that works here works across processes too. They are gone
when the process ends.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, Literal, NamedTuple

from silbo._checks import check_address, check_seconds
from silbo._closing import AsyncCloseable
from silbo._loops import LoopBinding
from silbo.errors import BrokerUnavailable, Fenced, Gap, MessageRefused, StartInvalid
from silbo.message import Delivery, Format, Message, own_origin
from silbo.protocols import Promises, Receiver, Sequenced
from silbo.wire.formats import JSON

__all__ = ["DeadLetter", "MemoryBroker"]

DEFAULT_ADDRESS: Final = "events"
"""The address of messages for which no route chose one."""
RECEIVE_WAIT: Final = 0.5
"""A receive waits at most 0.5 seconds for a message."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A delivery that a group has given up.

    Attributes:
        delivery: The delivery as its consumer got it last.
        group: The group's name; other groups are not affected.
        error: The error of its last attempt, as text.
        attempts: The number of times its listeners ran; 0 if the message could not be decoded.
    """

    delivery: Delivery
    group: str
    error: str
    attempts: int


# -- the broker ---------------------------------------------------------------------------------------------


class MemoryBroker(AsyncCloseable):
    """A publisher to the groups of its own process; every group gets its messages in the same order.

    For one event loop at a time: a second one gets LoopConflict until the first has ended.

    Args:
        app: The program's name, as consumers see it in ``event.origin.app``.
        format: Encodes messages as bytes.
        limit: The most messages kept for each group until it acknowledges them; as many of the last messages are kept for
            groups that will start at the oldest.
        overflow: The behaviour of a publish when a group has reached the limit. ``"refuse"``: wait for room, and fail
            after ``timeout``. ``"drop"``: the group loses its oldest waiting messages, and its consumer gets a
            :class:`~silbo.errors.Gap` with their number.
        timeout: Seconds that a publish waits for room.

    Attributes:
        dead: The dead letters of all groups, oldest first; the last ``limit`` of them.
    """

    promises: Final = Promises(keeps=False)  # they are gone when the process ends

    def __init__(
        self,
        app: str = "app",
        *,
        format: Format = JSON,  # noqa: A002  # the word of every broker
        limit: int = 10_000,
        overflow: Literal["refuse", "drop"] = "refuse",
        timeout: float = 5.0,
    ) -> None:
        if limit < 1 or overflow not in ("refuse", "drop"):
            raise ValueError(f'limit is 1 or more and overflow "refuse" or "drop", not {limit!r} and {overflow!r}')
        self.app: Final = check_address(app, "an app")
        self.dead: Final[deque[DeadLetter]] = deque(maxlen=limit)
        self.format: Final = format
        self._limit = limit
        self._overflow = overflow
        self._timeout = check_seconds("timeout", timeout, zero=True)
        self._ids = count(1)
        self._kept: deque[Delivery] = deque(maxlen=limit)  # for groups that will start at the oldest
        self._backlogs: dict[tuple[str, frozenset[str]], _Backlog] = {}  # by group and its addresses
        self._room_waiters: OrderedDict[asyncio.Future[None], _RoomWaiter] = OrderedDict()  # oldest first
        self._sequences: dict[tuple[str, str], tuple[int, int]] = {}  # by source and address: epoch and last sequence
        self._binding = LoopBinding("MemoryBroker", is_busy=self._is_busy, forget=self._forget_loop)

    async def publish(self, *messages: Message) -> None:
        """Give the messages to every group, in this order; calls keep their order too.

        Raises:
            MessageRefused: a message can't be encoded; the others of the call were published.
            BrokerUnavailable: a group made no room within the timeout; nothing was published, safe to repeat.
            LoopConflict: another event loop uses this broker.
        """
        if asyncio.get_running_loop() is not self._binding.loop:
            self._binding.enter("publish")
        encoded, refused = self._encode(messages)
        await self._append_with_room(len(encoded), lambda: self._append(encoded.values()))
        if refused:
            raise next(iter(refused.values()))

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """Publish the messages that are new here, in this order: see :class:`~silbo.protocols.SequencedPublisher`.

        Raises:
            Fenced: a newer epoch of this source has published here.
            BrokerUnavailable: a group made no room within the timeout; nothing was published, safe to repeat.
            LoopConflict: another event loop uses this broker.
        """
        self._binding.enter("publish_sequenced")
        sequences = [sequence for sequence, _ in messages]
        encoded, refused = self._encode([message for _, message in messages])
        known: set[int] = set()
        last = 0

        def append_new() -> None:
            nonlocal last
            seen = [record for (of, _), record in self._sequences.items() if of == source]
            newest = max((epoch for epoch, _ in seen), default=0)
            if newest > epoch:
                raise Fenced(source, newest)
            last = max((last for _, last in seen), default=0)
            for index, delivery in encoded.items():
                _, before = self._sequences.get((source, delivery.address), (0, 0))
                self._sequences[source, delivery.address] = epoch, max(before, sequences[index])
                if sequences[index] > before:
                    self._append([delivery])
                else:
                    known.add(sequences[index])

        await self._append_with_room(len(encoded), append_new)
        return Sequenced(known, {sequences[index]: error for index, error in refused.items()}, last)

    def group(
        self,
        name: str,
        *,
        start: Literal["new", "oldest"],
        streams: Iterable[str] | None = None,
    ) -> MemoryGroup:
        """Describe a group; a consumer opens it. Each message goes to one consumer of the group, again until acknowledged.

        Args:
            name: The name of the group. Each group gets every message.
            start: The place where the group begins when it is opened for the first time; later it goes on where it was.
            streams: The addresses whose messages the group gets, as on Redis Streams. By default ``["events"]``, the
                address of all messages for which no route chose another.

        Raises:
            AddressInvalid: the name or an address is not a valid name.
            StartInvalid: ``start`` is neither ``"new"`` nor ``"oldest"``.
        """
        if start not in ("new", "oldest"):
            raise StartInvalid(start)
        if isinstance(streams, str):
            raise TypeError(f"streams is a list of addresses: [{streams!r}]")
        addresses = frozenset(check_address(address) for address in (streams or [DEFAULT_ADDRESS]))
        return MemoryGroup(self, check_address(name, "a group"), start, addresses)

    def address_of(self, message: Message) -> str:
        """Return the address that a message goes to."""
        return message.to or DEFAULT_ADDRESS

    async def aclose(self) -> None:
        """Do nothing, as every published message has arrived. May be called twice."""

    def _encode(self, messages: Sequence[Message]) -> tuple[dict[int, Delivery], dict[int, MessageRefused]]:
        """Return the deliveries, and the errors of messages that can't be encoded; each by its position."""
        encoded: dict[int, Delivery] = {}
        refused: dict[int, MessageRefused] = {}
        origin = own_origin(self.app)
        for index, message in enumerate(messages):
            try:
                raw = self.format.encode(message, origin)
            except MessageRefused as error:
                refused[index] = error
            else:
                encoded[index] = Delivery(raw, message.to or DEFAULT_ADDRESS, self.format)
        return encoded, refused

    async def _append_with_room(self, many: int, append: Callable[[], None]) -> None:
        """Append that many messages, now or when every group has room; calls keep their order."""
        if not self._room_waiters and self._has_room(many):
            append()
            return
        appended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._room_waiters[appended] = _RoomWaiter(many, append)
        try:
            async with asyncio.timeout(self._timeout):
                await appended
        except TimeoutError:
            if not appended.done() or appended.cancelled():
                raise BrokerUnavailable(
                    f"a group has {self._limit} messages that it has not acknowledged, and made no room within "
                    f"{self._timeout:g} s; nothing was published"
                ) from None
            appended.result()
        finally:
            if self._room_waiters.pop(appended, None) is not None:
                self._make_room()  # a smaller call behind it may fit

    def _has_room(self, many: int) -> bool:
        """Return True if every group can take that many messages; a call above the limit fits only into empty groups."""
        return self._overflow == "drop" or all(
            len(backlog) + many <= self._limit or not len(backlog) for backlog in self._backlogs.values()
        )

    def _make_room(self) -> None:
        """Append the messages of waiting calls, as far as there is room for them."""
        while self._room_waiters and self._has_room(next(iter(self._room_waiters.values())).many):
            appended, waiter = self._room_waiters.popitem(last=False)
            if not appended.done():
                try:
                    waiter.append()
                except Fenced as error:
                    appended.set_exception(error)
                else:
                    appended.set_result(None)

    def _append(self, encoded: Iterable[Delivery]) -> None:
        numbered = [replace(delivery, id=str(next(self._ids))) for delivery in encoded]
        self._kept.extend(numbered)
        for backlog in self._backlogs.values():
            backlog.append(numbered, limit=self._limit if self._overflow == "drop" else None)

    def _is_busy(self) -> bool:
        return bool(self._room_waiters) or any(backlog.is_awaited for backlog in self._backlogs.values())

    def _forget_loop(self) -> None:
        """Forget those that waited in the event loop before."""
        self._room_waiters.clear()
        for backlog in self._backlogs.values():
            backlog.forget_sleepers()

    def _count_waiting(self, name: str, addresses: frozenset[str]) -> int:
        backlog = self._backlogs.get((name, addresses))
        return 0 if backlog is None else len(backlog.waiting)

    def _open(self, name: str, start: str, addresses: frozenset[str]) -> Receiver:
        self._binding.enter("group")
        backlog = self._backlogs.get((name, addresses))
        if backlog is None:
            backlog = self._backlogs[name, addresses] = _Backlog(name, addresses)
            if start == "oldest":
                backlog.append(self._kept, limit=None)
        return _MemoryReceiver(backlog, self._make_room, self.dead, self._binding)


class _RoomWaiter(NamedTuple):
    """A publish that waits until every group has room for its messages."""

    many: int
    append: Callable[[], None]


# -- groups -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A subscription to a group of a :class:`MemoryBroker`; a consumer opens it."""

    _broker: MemoryBroker
    name: str
    _start: str
    _addresses: frozenset[str]

    @property
    def app(self) -> str:
        """The program's name."""
        return self._broker.app

    async def open(self) -> Receiver:
        """Join the group; make it if no consumer has opened it before."""
        return self._broker._open(self.name, self._start, self._addresses)  # noqa: SLF001  # the other half of the broker

    async def read_lag(self) -> int:
        """See :class:`~silbo.protocols.MeasuredSubscription`."""
        return self._broker._count_waiting(self.name, self._addresses)  # noqa: SLF001  # as above


class _MemoryReceiver:
    """One consumer of a group. Closing it returns its pending deliveries to the group's other consumers."""

    skips_own_instance = False
    keep_every: float | None = None  # no other consumer takes over from an open one

    def __init__(
        self, backlog: _Backlog, make_room: Callable[[], None], dead: deque[DeadLetter], binding: LoopBinding
    ) -> None:
        self._binding = binding
        self._backlog = backlog
        self._make_room = make_room
        self._dead = dead

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """See :class:`~silbo.protocols.Receiver`."""
        self._binding.enter("group")
        backlog = self._backlog
        await backlog.wait_for_message(self)
        items: list[Delivery | Gap] = [*backlog.take_offered(self, limit)]
        if backlog.dropped:
            reason = "the group fell behind, and its oldest messages were dropped"
            items.append(Gap(backlog.group, reason, count=backlog.dropped))
            backlog.dropped = 0
        for _ in range(min(limit - len(items), len(backlog.waiting))):
            delivery = backlog.waiting.popleft()
            backlog.pending[delivery.id] = delivery, self
            items.append(delivery)
        return items

    async def ack(self, *deliveries: Delivery) -> None:
        """See :class:`~silbo.protocols.Receiver`."""
        self._binding.enter("group")
        for delivery in deliveries:
            self._backlog.pending.pop(delivery.id, None)
            self._backlog.attempts.pop(delivery.id, None)
            self._backlog.offers.pop(delivery.id, None)
        self._make_room()

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """See :class:`~silbo.protocols.Receiver`."""
        kept = [delivery for delivery in deliveries if self._has_pending(delivery)]
        for delivery in kept:
            self._backlog.end_offer(delivery)
        return [delivery for delivery in deliveries if delivery not in kept]

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        """See :class:`~silbo.protocols.Receiver`."""
        self._binding.enter("group")
        return [self._backlog.offer(delivery, self) if self._has_pending(delivery) else None for delivery in deliveries]

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        """See :class:`~silbo.protocols.Receiver`."""
        attempts = self._backlog.attempts[delivery.id] = self._backlog.attempts.get(delivery.id, 0) + 1
        return attempts

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """See :class:`~silbo.protocols.Receiver`."""
        if not self._has_pending(delivery):
            return False
        self._dead.append(DeadLetter(delivery, self._backlog.group, error, attempts))
        await self.ack(delivery)
        return True

    async def aclose(self) -> None:
        """See :class:`~silbo.protocols.Receiver`."""
        self._binding.enter("group")
        self._backlog.return_pending(self)

    def _has_pending(self, delivery: Delivery) -> bool:
        _, holder = self._backlog.pending.get(delivery.id, (None, None))
        return holder is self


@dataclass(slots=True, eq=False)
class _Offer:
    """A delivery that its holder leaves to the group's other consumers.

    Attributes:
        since: The time, by the loop's clock, of the first offer.
        refused_by: The receivers that have offered it, so that it does not go to and fro.
        is_open: True if another receiver may take it.
    """

    since: float
    refused_by: set[_MemoryReceiver]
    is_open: bool


class _Backlog:
    """The messages that a group has not acknowledged.

    Attributes:
        waiting: Deliveries that no consumer has, oldest first.
        pending: Deliveries that a consumer has in hand, by the delivery's id, each with the consumer's receiver.
        attempts: Attempts counted so far, by the delivery's id.
        offers: Deliveries that were left to other consumers, by the delivery's id, until they are acknowledged.
        dropped: The number of messages dropped since a consumer last got a Gap.
    """

    def __init__(self, group: str, addresses: frozenset[str]) -> None:
        self.group: Final = group
        self._addresses = addresses
        self.waiting: deque[Delivery] = deque()
        self.pending: dict[str, tuple[Delivery, _MemoryReceiver]] = {}
        self.attempts: dict[str, int] = {}
        self.offers: dict[str, _Offer] = {}
        self.dropped = 0
        self._sleepers: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.pending)

    def append(self, deliveries: Iterable[Delivery], *, limit: int | None) -> None:
        """Append the deliveries for this group's addresses; drop the oldest waiting ones above ``limit``."""
        self.waiting.extend(delivery for delivery in deliveries if delivery.address in self._addresses)
        while limit is not None and self.waiting and len(self) > limit:
            self.waiting.popleft()
            self.dropped += 1
        self.wake()

    def return_pending(self, receiver: _MemoryReceiver) -> None:
        """Put the pending deliveries of a receiver back to their old places among the waiting ones."""
        returned = [delivery for delivery, holder in self.pending.values() if holder is receiver]
        for delivery in returned:
            del self.pending[delivery.id]
            self.end_offer(delivery)
        self.wait_again(returned)

    def wait_again(self, deliveries: Iterable[Delivery]) -> None:
        """Put deliveries that were given out before to their old places among the waiting ones."""
        again = [replace(delivery, attempt=2 + self.attempts.get(delivery.id, 0)) for delivery in deliveries]
        self.waiting = deque(sorted([*again, *self.waiting], key=lambda delivery: int(delivery.id)))
        self.wake()

    @property
    def is_awaited(self) -> bool:
        """True if a receive waits for a message."""
        return bool(self._sleepers)

    def forget_sleepers(self) -> None:
        """Forget those that wait for a message, in an event loop that has ended."""
        self._sleepers.clear()

    def offer(self, delivery: Delivery, receiver: _MemoryReceiver) -> float:
        """Let other receivers take a pending delivery; return the seconds since the first offer."""
        now = asyncio.get_running_loop().time()
        offer = self.offers.setdefault(delivery.id, _Offer(since=now, refused_by=set(), is_open=False))
        offer.refused_by.add(receiver)
        if not offer.is_open:
            offer.is_open = True
            self.wake()
        return now - offer.since

    def end_offer(self, delivery: Delivery) -> None:
        """Let nobody take a delivery any more."""
        if delivery.id in self.offers:
            self.offers[delivery.id].is_open = False

    def take_offered(self, receiver: _MemoryReceiver, limit: int) -> list[Delivery]:
        """Give a receiver the deliveries that others offer, the oldest first."""
        ids = [entry_id for entry_id, offer in self.offers.items() if self._may_take(offer, receiver)]
        taken: list[Delivery] = []
        for entry_id in sorted(ids, key=int)[:limit]:
            delivery = replace(self.pending[entry_id][0], attempt=2 + self.attempts.get(entry_id, 0))
            self.pending[entry_id] = delivery, receiver
            self.end_offer(delivery)
            taken.append(delivery)
        return taken

    def _may_take(self, offer: _Offer, receiver: _MemoryReceiver) -> bool:
        return offer.is_open and receiver not in offer.refused_by

    async def wait_for_message(self, receiver: _MemoryReceiver) -> None:
        """Return when there is a message for a receiver or a gap, or after half a second."""
        if self.waiting or self.dropped or any(self._may_take(offer, receiver) for offer in self.offers.values()):
            return
        woken = asyncio.get_running_loop().create_future()
        self._sleepers.add(woken)
        try:
            await asyncio.wait([woken], timeout=RECEIVE_WAIT)
        finally:
            self._sleepers.discard(woken)

    def wake(self) -> None:
        """Let each receiver that waits look again."""
        for woken in self._sleepers:
            if not woken.done():
                woken.set_result(None)
