"""Calls of ``publish``, the line in which their messages wait, and the batches in which they go out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from silbo.brokers.redis.connection import Refused
from silbo.errors import BrokerUnavailable, DeliveryUnknown, PublishError

__all__ = ["UNANSWERED", "Batch", "Call", "Line", "Packet"]

FLUSH_MESSAGES: Final = 500
FLUSH_BYTES: Final = 1 << 20
"""A larger message goes alone: 500 of 100 kB would block Redis for 141 ms."""
WAITING_MESSAGES: Final = 10_000
WAITING_BYTES: Final = 16 << 20
"""Encoded and in line at most, plus the one call that goes over it; past it, a publish waits for its turn."""

Packet: TypeAlias = "tuple[bytes, bytes]"
"""One message, ready to send: the stream's key (empty for Pub/Sub), and its packed arguments of the script."""

UNANSWERED: Final = object()


class Call:
    """One call of ``publish``, and how far its messages are."""

    __slots__ = ("answered", "deadline", "failure", "is_unknown", "messages", "sent")

    def __init__(self, messages: int, answered: asyncio.Future[None], deadline: float) -> None:
        self.messages, self.answered, self.deadline = messages, answered, deadline
        self.sent = 0  # that Redis has
        self.failure: str | None = None
        self.is_unknown = False

    def answer(self) -> None:
        """Let the caller go on, unless that was done, or the caller has gone away."""
        if not self.answered.done():
            if self.failure is None:
                self.answered.set_result(None)
            else:
                self.answered.set_exception(self._error(self.failure))

    def _error(self, failure: str) -> PublishError:
        many = self.messages
        if self.is_unknown:
            what = "it" if many == 1 else f"some or all of {many} messages"
            return DeliveryUnknown(f"{failure}; {what} may have arrived")
        if self.sent:
            return DeliveryUnknown(f"{self.sent} of {many} messages were sent, the others were not: {failure}")
        return BrokerUnavailable(f"{failure}; {'not sent' if many == 1 else f'none of {many} messages was sent'}")


class Batch:
    """What goes to one stream in one flush, or to Pub/Sub: the arguments of a script call, and whose they are."""

    __slots__ = ("arguments", "calls", "key", "reply")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.arguments: list[bytes] = []  # of each message
        self.calls: list[Call] = []  # of each message
        self.reply: Any = UNANSWERED

    def settle(self, server: str, unanswered: str) -> bool:
        """Tell the calls what became of their messages, and answer those of which all are sent; False if some failed.

        Args:
            server: Who answered, for the text.
            unanswered: Why there is no answer, where there is none.
        """
        reply = self.reply
        if reply == []:  # nothing failed
            for call in self.calls:
                call.sent += 1
                if call.sent == call.messages:
                    call.answer()
            return True
        # What failed: position, error, position, error, ...
        failures = dict(zip(reply[::2], reply[1::2], strict=True)) if isinstance(reply, list) else {}
        for position, call in enumerate(self.calls, 1):
            if reply is UNANSWERED:
                call.failure, call.is_unknown = unanswered, True
            elif isinstance(reply, Refused):
                call.failure = f"{server} refused it: {reply}"
            elif position in failures:
                call.failure = f"{server} refused it: {failures[position].decode(errors='replace')}"
            else:
                call.sent += 1
                if call.sent == call.messages:
                    call.answer()
        return False

    @property
    def is_forgotten(self) -> bool:
        """Whether Redis does not know the script; nothing of the batch was carried out."""
        return isinstance(self.reply, Refused) and self.reply.code == "NOSCRIPT"

    @property
    def is_demoted(self) -> bool:
        """Whether it went to a server that takes no writes any more."""
        return isinstance(self.reply, Refused) and self.reply.code in ("READONLY", "MASTERDOWN")


class _Turn:
    """A publish that waits for room, and what it needs."""

    __slots__ = ("given", "messages", "size")

    def __init__(self, messages: int, size: int) -> None:
        self.messages, self.size = messages, size
        self.given = asyncio.get_running_loop().create_future()


class Line:
    """What waits to be sent, the oldest first, so that the deadlines are in order too."""

    def __init__(self) -> None:
        self._entries: deque[tuple[Call, bytes, bytes]] = deque()
        self._messages = self._bytes = 0  # in line, or promised to a turn
        self._turns: deque[_Turn] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody waits for room."""
        return bool(self._turns)

    def has_room(self) -> bool:
        """Whether a call can be appended now. Calls may go over the limit by one, or a large one never could."""
        return not self._turns and self._is_open()

    def _is_open(self) -> bool:
        return self._messages < WAITING_MESSAGES and self._bytes < WAITING_BYTES

    async def room(self, messages: int, size: int, deadline: float) -> None:
        """Wait until a call can be appended, first come, first served; then append it at once.

        Raises:
            BrokerUnavailable: there was no room before the deadline, or the line was given up.
        """
        turn = _Turn(messages, size)
        self._turns.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn.given
        except BaseException as error:
            self._leave(turn)
            self._let_in()
            if isinstance(error, TimeoutError):
                waiting = f"{self._messages} messages ({self._bytes} bytes) are in line"
                raise BrokerUnavailable(f"{waiting}, and no room came in time; not sent") from None
            raise
        self._leave(turn)

    def _leave(self, turn: _Turn) -> None:
        self._turns.remove(turn)
        if turn.given.done() and not turn.given.cancelled() and turn.given.exception() is None:
            self._messages -= turn.messages
            self._bytes -= turn.size

    def _let_in(self) -> None:
        for turn in self._turns:
            if turn.given.done():
                continue
            if not self._is_open():
                break
            self._messages += turn.messages
            self._bytes += turn.size
            turn.given.set_result(None)

    def append(self, call: Call, packets: Iterable[Packet]) -> None:
        """Put the messages of a call at the end."""
        for key, arguments in packets:
            self._entries.append((call, key, arguments))
            self._bytes += len(arguments)
        self._messages += call.messages

    def first(self) -> Call | None:
        """Whose message is the oldest; those whose callers have gone away are dropped."""
        while self._entries and self._entries[0][0].answered.done():
            self._drop()
        return self._entries[0][0] if self._entries else None

    def take(self, most: int, latest: float, late: str) -> list[Batch]:
        """The oldest messages, as many as go into one flush, by stream.

        Args:
            most: No more messages than this.
            latest: Calls with a deadline up to this fail.
            late: With this text.
        """
        while (first := self.first()) is not None and first.deadline <= latest:
            first.failure = late
            first.answer()
        batches: dict[bytes, Batch] = {}
        batch: Batch | None = None
        entries, size, room = self._entries, 0, most
        while entries and room:
            call, key, arguments = entries[0]
            if call.answered.done():
                self._drop()
                continue
            if size + len(arguments) > FLUSH_BYTES and batches:
                break
            entries.popleft()
            if batch is None or batch.key is not key:
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = Batch(key)
            batch.arguments.append(arguments)
            batch.calls.append(call)
            size += len(arguments)
            room -= 1
        self._messages -= most - room
        self._bytes -= size
        if self._turns:
            self._let_in()
        return list(batches.values())

    def _drop(self) -> None:
        _, _, arguments = self._entries.popleft()
        self._messages -= 1
        self._bytes -= len(arguments)

    def fail(self, why: str) -> None:
        """Answer whoever is in line, or waits for room, with an error: none of it is sent."""
        while (call := self.first()) is not None:
            call.failure = why
            call.answer()
        for turn in self._turns:
            if not turn.given.done():
                turn.given.set_exception(BrokerUnavailable(f"{why}; not sent"))
