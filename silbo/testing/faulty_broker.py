"""A memory broker that fails as a test asks it to."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from silbo._checks import check_count, check_seconds
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, DeliveryUnknown, Gap, MessageRefused
from silbo.message import Delivery, Format, Message
from silbo.names import EventName, compile_pattern
from silbo.protocols import Receiver, Sequenced
from silbo.wire.formats import JSON

__all__ = ["FaultyBroker"]

_Kind: TypeAlias = Literal["refuse", "unknown", "delay", "duplicate", "reorder"]
_Group: TypeAlias = tuple[str, frozenset[str]]
_NO_ANSWER: Final = "the test has lost the broker's answer"


@dataclass(slots=True, eq=False)
class _Fault:
    """A fault of the next messages.

    Attributes:
        kind: The kind.
        pattern: Matches the names of its messages.
        left: The number of messages that it still has.
        seconds: The delay.
        arrives: True if the calls of the messages arrive.
    """

    kind: _Kind
    pattern: re.Pattern[str]
    left: int
    seconds: float = 0.0
    arrives: bool = True


class FaultyBroker(MemoryBroker):
    """A :class:`~silbo.brokers.memory.MemoryBroker` with faults, in whose place a test makes it.

    Each fault is of the next ``times`` messages whose name matches a name or pattern; without a fault left it is a good broker.
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
        super().__init__(app, format=format, limit=limit, overflow=overflow, timeout=timeout)
        self._faults: list[_Fault] = []
        self._overtaken: list[Delivery] = []  # wait for the next message
        self._acknowledged: dict[_Group, dict[str, Delivery]] = {}  # by group, then by the delivery's id
        self._absences = 0

    # -- faults ---------------------------------------------------------------------------------------------

    def refuse(self, name: str | EventName[Any] = "**", *, times: int = 1) -> None:
        """Refuse the next messages: their publish raises MessageRefused, and the others of the call arrive."""
        self._add("refuse", name, times)

    def lose_answers(self, name: str | EventName[Any] = "**", *, times: int = 1, arrives: bool = True) -> None:
        """Answer the calls that publish the next messages with DeliveryUnknown: all of such a call arrives, or nothing."""
        self._add("unknown", name, times, arrives=arrives)

    def delay(self, seconds: float, name: str | EventName[Any] = "**", *, times: int = 1) -> None:
        """Let the next messages arrive later, by the clock of the loop; later ones overtake them."""
        self._add("delay", name, times, seconds=check_seconds("seconds", seconds))

    def duplicate(self, name: str | EventName[Any] = "**", *, times: int = 1) -> None:
        """Let the next messages arrive twice: two deliveries of one publication."""
        self._add("duplicate", name, times)

    def reorder(self, name: str | EventName[Any] = "**", *, times: int = 1) -> None:
        """Let the next messages arrive right behind the first other message that follows them, and not before that."""
        self._add("reorder", name, times)

    def redeliver(self, name: str | EventName[Any] = "**") -> int:
        """Give out again what consumers have acknowledged, as after lost acknowledgements; return the number of deliveries."""
        pattern = compile_pattern(str(name))
        count = 0
        for group, acknowledged in self._acknowledged.items():
            again = [delivery for delivery in acknowledged.values() if _matches(pattern, delivery.message())]
            for delivery in again:
                del acknowledged[delivery.id]
            self._backlogs[group].wait_again(again)
            count += len(again)
        return count

    @contextmanager
    def away(self) -> Generator[None]:
        """Take the broker away in the ``with`` block: every call raises BrokerUnavailable. Messages that it has are kept."""
        self._absences += 1
        for backlog in self._backlogs.values():
            backlog.wake()
        try:
            yield
        finally:
            self._absences -= 1

    def _add(self, kind: _Kind, name: str | EventName[Any], times: int, **more: Any) -> None:
        self._faults.append(_Fault(kind, compile_pattern(str(name)), check_count("times", times), **more))

    def _take(self, kind: _Kind, message: Message) -> _Fault | None:
        """Return the fault of this kind that a message has, and count it; None if it has none."""
        fault = next((each for each in self._faults if each.kind == kind and _matches(each.pattern, message)), None)
        if fault is not None:
            fault.left -= 1
            if not fault.left:
                self._faults.remove(fault)
        return fault

    # -- a publisher ----------------------------------------------------------------------------------------

    async def publish(self, *messages: Message) -> None:
        """See :class:`~silbo.brokers.memory.MemoryBroker`."""
        self._check_here()
        unknown = self._take_unknown(messages)
        await super().publish(*messages)
        if unknown:
            raise DeliveryUnknown(_NO_ANSWER)

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """See :class:`~silbo.brokers.memory.MemoryBroker`."""
        self._check_here()
        unknown = self._take_unknown([message for _, message in messages])
        answer = await super().publish_sequenced(source, epoch, messages)
        if unknown:
            raise DeliveryUnknown(_NO_ANSWER)
        return answer

    def _take_unknown(self, messages: Sequence[Message]) -> bool:
        """Return True if a call arrives and is not answered.

        Raises:
            DeliveryUnknown: it does not arrive, and is not answered.
        """
        faults = [fault for message in messages if (fault := self._take("unknown", message)) is not None]
        if not all(fault.arrives for fault in faults):
            raise DeliveryUnknown(_NO_ANSWER)
        return bool(faults)

    def _encode(self, messages: Sequence[Message]) -> tuple[dict[int, Delivery], dict[int, MessageRefused]]:
        encoded, refused = super()._encode(messages)
        for index in tuple(encoded):
            if self._take("refuse", messages[index]):
                del encoded[index]
                refused[index] = MessageRefused(messages[index].message_name, "the test refuses it")
        return encoded, refused

    def _append(self, encoded: Iterable[Delivery]) -> None:
        now: list[Delivery] = []
        for delivery in encoded:
            message = delivery.message()
            copies = [delivery] * (2 if self._take("duplicate", message) else 1)
            if (fault := self._take("delay", message)) is not None:
                asyncio.get_running_loop().call_later(fault.seconds, super()._append, copies)
            elif self._take("reorder", message):
                self._overtaken += copies
            else:
                now += copies + self._overtaken
                self._overtaken = []
        super()._append(now)

    # -- its groups -----------------------------------------------------------------------------------------

    def _open(self, name: str, start: str, addresses: frozenset[str]) -> Receiver:
        self._check_here()
        acknowledged = self._acknowledged.setdefault((name, addresses), {})
        return _FaultyReceiver(super()._open(name, start, addresses), acknowledged, self._check_here)

    def _check_here(self) -> None:
        if self._absences:
            raise BrokerUnavailable("the test has taken the broker away")


class _FaultyReceiver:
    """A receiver whose broker may be away, and which remembers what it has acknowledged."""

    skips_own_instance = False
    keep_every: float | None = None

    def __init__(self, receiver: Receiver, acknowledged: dict[str, Delivery], check_here: Callable[[], None]) -> None:
        self._receiver = receiver
        self._acknowledged = acknowledged
        self._check_here = check_here

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        self._check_here()
        items = await self._receiver.receive(limit)
        if not items:
            self._check_here()
        return items

    async def ack(self, *deliveries: Delivery) -> None:
        self._check_here()
        await self._receiver.ack(*deliveries)
        self._acknowledged.update({delivery.id: delivery for delivery in deliveries})

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        self._check_here()
        return await self._receiver.keep(*deliveries)

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        self._check_here()
        return await self._receiver.offer(*deliveries)

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        self._check_here()
        return await self._receiver.count(delivery, error=error)

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        self._check_here()
        return await self._receiver.bury(delivery, error=error, attempts=attempts)

    async def aclose(self) -> None:
        await self._receiver.aclose()


def _matches(pattern: re.Pattern[str], message: Message) -> bool:
    return pattern.fullmatch(f"{message.message_name}.") is not None
