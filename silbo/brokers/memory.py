"""A broker inside one process: groups, acknowledgement and redelivery like Redis Streams, and no server.

What is published crosses bytes, so a program that works here works across processes too. It is gone with the process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, Literal, NamedTuple

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo.errors import BrokerUnavailable, Fenced, Gap, MessageRefused, StartInvalid
from silbo.message import Delivery, Format, Message, Origin, instance
from silbo.protocols import Promises, Receiver, Sequenced
from silbo.wire.formats import JSON

__all__ = ["DeadLetter", "MemoryBroker"]

RECEIVE_WAIT: Final = 0.5
"""Seconds that a receive waits for something to come."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A delivery that a group has given up.

    Attributes:
        group: The group's name; others are not concerned.
        error: Why, of its last attempt.
        attempts: How often its listeners ran; 0 for what could not be read.
    """

    delivery: Delivery
    group: str
    error: str
    attempts: int


class Group:
    """What a group has not acknowledged: messages that wait, and those that a receiver has in hand."""

    def __init__(self, name: str, addresses: frozenset[str]) -> None:
        self.name: Final = name
        self._addresses = addresses
        self.waiting: deque[Delivery] = deque()
        self.pending: dict[str, tuple[Delivery, GroupReceiver]] = {}
        self.attempts: dict[str, int] = {}
        self.dropped = 0
        self._sleeping: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.pending)

    def append(self, deliveries: Iterable[Delivery], *, keep: int | None) -> None:
        """Take in what is for this group; drop the oldest of what waits when that is more than ``keep``."""
        self.waiting.extend(delivery for delivery in deliveries if delivery.address in self._addresses)
        while keep is not None and self.waiting and len(self) > keep:
            self.waiting.popleft()
            self.dropped += 1
        self._wake()

    def give_back(self, receiver: GroupReceiver) -> None:
        """What a receiver had in hand waits again, in its old place."""
        returned = [delivery for delivery, holder in self.pending.values() if holder is receiver]
        for delivery in returned:
            del self.pending[delivery.id]
        again = [replace(delivery, attempt=2 + self.attempts.get(delivery.id, 0)) for delivery in returned]
        self.waiting = deque(sorted([*again, *self.waiting], key=lambda delivery: int(delivery.id)))
        self._wake()

    async def something(self) -> None:
        """Return when something waits, or after half a second."""
        if self.waiting or self.dropped:
            return
        woken = asyncio.get_running_loop().create_future()
        self._sleeping.add(woken)
        try:
            await asyncio.wait([woken], timeout=RECEIVE_WAIT)
        finally:
            self._sleeping.discard(woken)

    def _wake(self) -> None:
        for woken in self._sleeping:
            if not woken.done():
                woken.set_result(None)


class GroupReceiver:
    """One consumer of a group. What it has in hand when it is closed goes to the others."""

    skips_own_instance = False
    keep_every: float | None = None  # nobody takes over from a consumer that is open

    def __init__(self, group: Group, make_room: Callable[[], None], dead: deque[DeadLetter]) -> None:
        self._group, self._make_room, self._dead = group, make_room, dead

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """See :class:`~silbo.protocols.Receiver`."""
        group = self._group
        await group.something()
        taken: list[Delivery | Gap] = []
        if group.dropped:
            reason = "the group fell behind, and its oldest messages were dropped"
            taken.append(Gap(group.name, reason, count=group.dropped))
            group.dropped = 0
        for _ in range(min(limit, len(group.waiting))):
            delivery = group.waiting.popleft()
            group.pending[delivery.id] = delivery, self
            taken.append(delivery)
        return taken

    async def ack(self, *deliveries: Delivery) -> None:
        """See :class:`~silbo.protocols.Receiver`."""
        for delivery in deliveries:
            self._group.pending.pop(delivery.id, None)
            self._group.attempts.pop(delivery.id, None)
        self._make_room()

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """See :class:`~silbo.protocols.Receiver`."""
        return [delivery for delivery in deliveries if not self._holds(delivery)]

    async def count(self, delivery: Delivery) -> int:
        """See :class:`~silbo.protocols.Receiver`."""
        attempts = self._group.attempts[delivery.id] = self._group.attempts.get(delivery.id, 0) + 1
        return attempts

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """See :class:`~silbo.protocols.Receiver`."""
        if not self._holds(delivery):
            return False
        self._dead.append(DeadLetter(delivery, self._group.name, error, attempts))
        await self.ack(delivery)
        return True

    async def aclose(self) -> None:
        """See :class:`~silbo.protocols.Receiver`."""
        self._group.give_back(self)

    def _holds(self, delivery: Delivery) -> bool:
        _, holder = self._group.pending.get(delivery.id, (None, None))
        return holder is self


class MemoryBroker(AsyncCloseable):
    """Publishes to the groups of its own process, in one order.

    For one event loop at a time, in its thread; loops may follow one another.

    Args:
        app: The program's name, as consumers see it in ``event.origin.app``.
        format: How messages look as bytes.
        limit: Messages kept for each group that has not acknowledged them, and for groups that will start at the oldest.
        overflow: What a publish does when a group has fallen that far behind. ``"refuse"``: wait for room, and fail
            after ``timeout``. ``"drop"``: the group loses its oldest messages, and its consumer gets a
            :class:`~silbo.errors.Gap` with their number.
        timeout: Seconds that a publish waits for room.

    Attributes:
        dead: What groups have given up, oldest first; the last ``limit`` of them.
    """

    promises: Final = Promises(keeps=False)  # it goes away with its process

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
        self._format, self._limit, self._overflow, self._timeout = format, limit, overflow, timeout
        self._ids = count(1)
        self.dead: Final[deque[DeadLetter]] = deque(maxlen=limit)
        self._kept: deque[Delivery] = deque(maxlen=limit)
        self._groups: dict[tuple[str, frozenset[str]], Group] = {}
        self._publishing: deque[_Call] = deque()
        self._sequences: dict[tuple[str, str], tuple[int, int]] = {}  # source and address: epoch and last sequence

    async def publish(self, *messages: Message) -> None:
        """Give the messages to every group, in this order; calls keep their order too.

        Raises:
            MessageRefused: a message can't be encoded; the others of the call were published.
            BrokerUnavailable: a group has no room, and made none within the timeout; nothing was published.
        """
        encoded, refused = self._encode(messages)
        await self._in_turn(len(encoded), lambda: self._append(encoded.values()))
        if refused:
            raise next(iter(refused.values()))

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """Publish what is new of it: see :class:`~silbo.protocols.SequencedPublisher`.

        Raises:
            Fenced: a newer epoch of this source has published here.
            BrokerUnavailable: a group has no room, and made none within the timeout; nothing was published.
        """
        sequences = [sequence for sequence, _ in messages]
        encoded, refused = self._encode([message for _, message in messages])
        known: set[int] = set()
        last = 0

        def append() -> None:
            nonlocal last
            seen = {address: at for (of, address), at in self._sequences.items() if of == source}
            newest = max((epoch for epoch, _ in seen.values()), default=0)
            if newest > epoch:
                raise Fenced(source, newest)
            last = max((last for _, last in seen.values()), default=0)
            for index, delivery in encoded.items():
                _, before = self._sequences.get((source, delivery.address), (0, 0))
                self._sequences[source, delivery.address] = epoch, max(before, sequences[index])
                if sequences[index] > before:
                    self._append([delivery])
                else:
                    known.add(sequences[index])

        await self._in_turn(len(encoded), append)
        return Sequenced(known, {sequences[index]: error for index, error in refused.items()}, last)

    def group(
        self,
        name: str,
        *,
        start: Literal["new", "oldest"],
        consumer: str | None = None,
        streams: Iterable[str] | None = None,
    ) -> MemoryGroup:
        """What the consumers of one group share: each message goes to one of them, and again until one acknowledged it.

        Args:
            name: Groups of different names each get every message.
            start: Where the group begins when it is opened for the first time; later it goes on where it was.
            consumer: As on Redis Streams, and without effect: what a consumer leaves goes to the group's others.
            streams: The addresses it hears, as on Redis Streams: ``["events"]`` by default, where everything goes that no
                route sends elsewhere.
        """
        if start not in ("new", "oldest"):
            raise StartInvalid(start)
        if isinstance(streams, str):
            raise TypeError(f"streams is a list of addresses: [{streams!r}]")
        addresses = frozenset(check_address(address) for address in (streams or ["events"]))
        return MemoryGroup(self, check_address(name, "a group"), start, addresses)

    async def aclose(self) -> None:
        """Nothing to do: whatever was published has arrived. Here so that another broker can take its place."""

    def _encode(self, messages: Sequence[Message]) -> tuple[dict[int, Delivery], dict[int, MessageRefused]]:
        """By their positions: those that can be sent, and what is wrong with the others."""
        encoded: dict[int, Delivery] = {}
        refused: dict[int, MessageRefused] = {}
        origin = Origin(self.app, instance())
        for index, message in enumerate(messages):
            try:
                raw = self._format.encode(message, origin)
            except MessageRefused as error:
                refused[index] = error
            else:
                encoded[index] = Delivery(raw, message.to or "events", self._format)
        return encoded, refused

    async def _in_turn(self, many: int, append: Callable[[], None]) -> None:
        """Append so many, now or when there is room; calls keep their order."""
        if not self._publishing and self._has_room(many):
            append()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call = _Call(many, append, turn)
        self._publishing.append(call)
        try:
            async with asyncio.timeout(self._timeout):
                await turn
        except TimeoutError:
            if not turn.done() or turn.cancelled():
                raise BrokerUnavailable(
                    f"a group has {self._limit} messages that it has not acknowledged, and made no room within "
                    f"{self._timeout:g} s; nothing was published"
                ) from None
            turn.result()
        finally:
            if call in self._publishing:
                self._publishing.remove(call)
                self._make_room()  # a smaller call behind it may fit

    def _has_room(self, many: int) -> bool:
        """Whether every group can take so many; a call above the limit is taken when a group is empty."""
        return self._overflow == "drop" or all(
            len(group) + many <= self._limit or not len(group) for group in self._groups.values()
        )

    def _make_room(self) -> None:
        while self._publishing and self._has_room(self._publishing[0].many):
            call = self._publishing.popleft()
            if not call.turn.done():
                try:
                    call.append()
                except Fenced as error:
                    call.turn.set_exception(error)
                else:
                    call.turn.set_result(None)

    def _append(self, encoded: Iterable[Delivery]) -> None:
        numbered = [replace(delivery, id=str(next(self._ids))) for delivery in encoded]
        self._kept.extend(numbered)
        for group in self._groups.values():
            group.append(numbered, keep=self._limit if self._overflow == "drop" else None)

    def _open(self, name: str, start: str, addresses: frozenset[str]) -> GroupReceiver:
        group = self._groups.get((name, addresses))
        if group is None:
            group = self._groups[name, addresses] = Group(name, addresses)
            if start == "oldest":
                group.append(self._kept, keep=None)
        return GroupReceiver(group, self._make_room, self.dead)


class _Call(NamedTuple):
    """A publish that waits for room."""

    many: int
    append: Callable[[], None]
    turn: asyncio.Future[None]


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
        """Join the group; the first to do so makes it."""
        return self._broker._open(self.name, self._start, self._addresses)  # noqa: SLF001  # its other half
