"""A broker inside one process: groups, acknowledgement and redelivery like Redis Streams, and no server.

What is published crosses bytes, so a program that works here works across processes too. It is gone with the process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import Final, Literal, Self

from silbo.errors import BrokerUnavailable, Gap, MessageRefused, StartInvalid
from silbo.formats import JSON
from silbo.message import Delivery, Message, Origin, instance
from silbo.protocols import Format, Receiver
from silbo.routing import check_address

__all__ = ["MemoryBroker"]

RECEIVE_WAIT: Final = 0.5
"""Seconds that a receive waits for something to come."""


class MemoryBroker:
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
    """

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
        self._kept: deque[Delivery] = deque(maxlen=limit)
        self._groups: dict[tuple[str, frozenset[str]], _Group] = {}
        self._publishing: deque[tuple[list[Delivery], asyncio.Future[None]]] = deque()

    async def publish(self, *messages: Message) -> None:
        """Give the messages to every group, in this order; calls keep their order too.

        Raises:
            MessageRefused: a message can't be encoded; the others of the call were published.
            BrokerUnavailable: a group has no room, and made none within the timeout; nothing was published.
        """
        encoded, refused = self._encode(messages)
        if self._publishing or not self._has_room(len(encoded)):
            await self._wait_for_room(encoded)
        else:
            self._append(encoded)
        if refused is not None:
            raise refused

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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _encode(self, messages: Sequence[Message]) -> tuple[list[Delivery], MessageRefused | None]:
        encoded: list[Delivery] = []
        refused = None
        origin = Origin(self.app, instance())
        for message in messages:
            try:
                raw = self._format.encode(message, origin)
            except MessageRefused as error:
                refused = refused or error
            else:
                encoded.append(Delivery(raw, message.to or "events", self._format))
        return encoded, refused

    async def _wait_for_room(self, encoded: list[Delivery]) -> None:
        """In turn with the others who wait, so that calls keep their order; ``_make_room`` appends."""
        turn = asyncio.get_running_loop().create_future()
        call = (encoded, turn)
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
        while self._publishing and self._has_room(len(self._publishing[0][0])):
            encoded, turn = self._publishing.popleft()
            if not turn.done():
                self._append(encoded)
                turn.set_result(None)

    def _append(self, encoded: Iterable[Delivery]) -> None:
        numbered = [replace(delivery, id=str(next(self._ids))) for delivery in encoded]
        self._kept.extend(numbered)
        for group in self._groups.values():
            group.append(numbered, keep=self._limit if self._overflow == "drop" else None)

    def _open(self, name: str, start: str, addresses: frozenset[str]) -> _Receiver:
        group = self._groups.get((name, addresses))
        if group is None:
            group = self._groups[name, addresses] = _Group(addresses)
            if start == "oldest":
                group.append(self._kept, keep=None)
        return _Receiver(name, group, self._make_room)


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A subscription to a group of a :class:`MemoryBroker`; a consumer opens it."""

    _broker: MemoryBroker
    _name: str
    _start: str
    _addresses: frozenset[str]

    @property
    def app(self) -> str:
        """The program's name."""
        return self._broker.app

    async def open(self) -> Receiver:
        """Join the group; the first to do so makes it."""
        return self._broker._open(self._name, self._start, self._addresses)  # noqa: SLF001  # its other half


class _Group:
    """What a group has not acknowledged: messages that wait, and those that a receiver has in hand."""

    def __init__(self, addresses: frozenset[str]) -> None:
        self._addresses = addresses
        self.waiting: deque[Delivery] = deque()
        self.pending: dict[str, tuple[Delivery, _Receiver]] = {}
        self.dropped = 0
        self._sleeping: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.pending)

    def append(self, deliveries: Iterable[Delivery], *, keep: int | None) -> None:
        self.waiting.extend(delivery for delivery in deliveries if delivery.address in self._addresses)
        while keep is not None and self.waiting and len(self) > keep:
            self.waiting.popleft()
            self.dropped += 1
        self._wake()

    def give_back(self, receiver: _Receiver) -> None:
        """What a receiver had in hand waits again, in its old place."""
        returned = [delivery for delivery, holder in self.pending.values() if holder is receiver]
        for delivery in returned:
            del self.pending[delivery.id]
        again = [replace(delivery, attempt=delivery.attempt + 1) for delivery in returned]
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


class _Receiver:
    skips_own_instance = False

    def __init__(self, name: str, group: _Group, make_room: Callable[[], None]) -> None:
        self._name, self._group, self._make_room = name, group, make_room

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        group = self._group
        await group.something()
        taken: list[Delivery | Gap] = []
        if group.dropped:
            reason = "the group fell behind, and its oldest messages were dropped"
            taken.append(Gap(self._name, reason, count=group.dropped))
            group.dropped = 0
        for _ in range(min(limit, len(group.waiting))):
            delivery = group.waiting.popleft()
            group.pending[delivery.id] = delivery, self
            taken.append(delivery)
        return taken

    async def ack(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            self._group.pending.pop(delivery.id, None)
        self._make_room()

    async def aclose(self) -> None:
        self._group.give_back(self)
