"""The lines in which messages wait for a client library that the host brings: Kafka's, RabbitMQ's, Service Bus's.

Calls of ``publish`` put their messages in the line of an address. A task, which lives while there is something to send,
gives up to 500 messages or 1 MiB at a time to the library, and the next ones when those are answered: so a line keeps
its order whatever fails, and the more is published at once, the less each message costs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias

from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.message import Message, instance

__all__ = ["Call", "Parcel", "Send", "Sender", "close_all", "labels"]


def labels(message: Message, app: str) -> dict[str, str]:
    """What stands beside a message, to be filtered by without decoding it."""
    return {
        "message_type": message.message_type,
        "message_name": message.message_name,
        "message_id": message.message_id,
        "app": app,
        "instance": instance(),
        **message.headers,
    }


_Answer: TypeAlias = Literal["sent", "refused", "unsent", "unknown"]


class Parcel:
    """One message on its way. Whoever sends it says what became of it; the first answer counts.

    Attributes:
        raw: The message, encoded.
        is_handed: To be set before the library gets it. What is not answered for is unknown where it was handed, and not
            sent where it was not.
    """

    __slots__ = ("_answer", "_call", "is_handed", "message", "raw")

    def __init__(self, call: Call, message: Message, raw: bytes) -> None:
        self._call, self.message, self.raw = call, message, raw
        self.is_handed = False
        self._answer: _Answer | None = None

    @property
    def deadline(self) -> float:
        """When its caller is answered at the latest, by the loop's clock."""
        return self._call.deadline

    @property
    def is_open(self) -> bool:
        """Whether it is not answered, and its caller still waits."""
        return self._answer is None and not self._call.answer.done()

    @property
    def has_missed(self) -> bool:
        """Whether it may have to be sent again."""
        return self._answer not in ("sent", "refused")

    def sent(self) -> None:
        """The broker has it."""
        self._settle("sent")

    def refused(self, problem: str) -> None:
        """The broker takes it neither now nor later."""
        if self._answer is None:
            self._call.refuse(MessageRefused(self.message.message_name, problem))
            self._settle("refused")

    def unsent(self, why: str) -> None:
        """The broker surely does not have it."""
        self._settle("unsent", why)

    def unknown(self, why: str) -> None:
        """The broker may have it."""
        self._settle("unknown", why)

    def lost(self, why: str) -> None:
        """It is not answered for."""
        self._settle("unknown" if self.is_handed else "unsent", why)

    def _settle(self, answer: _Answer, why: str = "") -> None:
        if self._answer is None:
            self._answer = answer
            self._call.settle(answer, why)


class Call:
    """One call of ``publish``, and how far its messages are.

    Attributes:
        deadline: When it is answered at the latest, by the loop's clock.
        answer: Of the call, when each of its messages has one.
        refusal: Why messages can't be sent; they don't count among its ``messages``.
        messages: How many are on their way.
    """

    def __init__(self) -> None:
        self.deadline = 0.0
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.refusal: MessageRefused | None = None
        self.messages = self._sent = self._settled = 0
        self._unsent = self._unknown = ""

    def refuse(self, error: MessageRefused) -> None:
        """One more message can't be sent."""
        if self.refusal is None:
            self.refusal = error
        else:
            self.refusal.add_note(f"and in the same call: {error}")

    def settle(self, answer: _Answer, why: str) -> None:
        """One more of its messages has an answer."""
        self._settled += 1
        self._sent += answer == "sent"
        if answer == "unsent":
            self._unsent = self._unsent or why
        elif answer == "unknown":
            self._unknown = self._unknown or why
        if self._settled < self.messages or self.answer.done():
            return
        if (error := self._error()) is None:
            self.answer.set_result(None)
        else:
            self.answer.set_exception(error)

    def _error(self) -> BrokerUnavailable | DeliveryUnknown | MessageRefused | None:
        many = self.messages
        if self._unknown:
            what = "it" if many == 1 else f"some or all of {many} messages"
            return DeliveryUnknown(f"{self._unknown}; {what} may have arrived")
        if self._unsent and self._sent:
            return DeliveryUnknown(f"{self._sent} of {many} messages were sent, the others were not: {self._unsent}")
        if self._unsent:
            return BrokerUnavailable(
                f"{self._unsent}; {'not sent' if many == 1 else f'none of {many} messages was sent'}"
            )
        return self.refusal


BATCH_MESSAGES: Final = 500
BATCH_BYTES: Final = 1 << 20
TRY: Final = 1.0
"""Seconds at most in which a publish is answered that tries whether a silent broker answers again."""
LATE: Final = 0.05
"""The share of the timeout that must be left of a message's time: one sent later would likely end unknown."""

Send: TypeAlias = Callable[[str, Sequence[Parcel]], Awaitable[None]]
"""Sends a batch to an address, in this order. It may raise, and is cancelled at the deadline of the first."""


class Sender:
    """Takes the calls of a publisher; a line for each address, for one event loop.

    A batch that is not answered within its deadline makes a line *silent*: whoever waits in it gets an error, and so does
    every further publish at once, but for one at a time that tries, for a second, whether the broker answers again.

    Args:
        broker: What to call it in errors.
        send: Gives a batch to the library.
        encode: A message as bytes; may raise MessageRefused.
        to: The address of messages for which no route chose one.
        timeout: Seconds in which a publish is answered.
    """

    def __init__(self, broker: str, send: Send, encode: Callable[[Message], bytes], *, to: str, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is seconds, more than 0, not {timeout!r}")
        self._broker, self._send, self._encode, self._to, self._timeout = broker, send, encode, to, timeout
        self._lines: dict[str, _Line] = {}
        self._closed = False

    async def publish(self, messages: Sequence[Message]) -> None:
        """See :class:`~silbo.protocols.Publisher`."""
        if self._closed:
            raise BrokerUnavailable("the broker is closed: nothing can be published after aclose()")
        call = Call()
        parcels: dict[str, list[Parcel]] = {}
        for message in messages:
            try:
                parcel = Parcel(call, message, self._encode(message))
            except MessageRefused as error:
                call.refuse(error)
            else:
                call.messages += 1
                parcels.setdefault(message.to or self._to, []).append(parcel)
        is_silent = any(self._line(address).is_silent for address in parcels)
        call.deadline = asyncio.get_running_loop().time() + (min(TRY, self._timeout) if is_silent else self._timeout)
        for address, its in parcels.items():
            self._line(address).put(its)
        if parcels:
            await call.answer
        elif call.refusal is not None:
            raise call.refusal

    def _line(self, address: str) -> _Line:
        if address not in self._lines:
            self._lines[address] = _Line(f"{self._broker} {address!r}", address, self._send, self._timeout)
        return self._lines[address]

    async def aclose(self) -> None:
        """Answer what waits, within its deadlines."""
        self._closed = True
        tasks = [line.task for line in self._lines.values() if line.task is not None and not line.task.done()]
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()


class _Line:
    """What waits to be sent to one address, the oldest first, so that the deadlines are in order too."""

    def __init__(self, where: str, address: str, send: Send, timeout: float) -> None:
        self._where, self._address, self._send, self._timeout = where, address, send, timeout
        self._waiting: deque[Parcel] = deque()
        self._batch: Sequence[Parcel] = ()  # under way
        self._silent_since: datetime | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def is_silent(self) -> bool:
        """Whether the last batch was not answered, and this one neither, up to now."""
        return self._silent_since is not None and all(parcel.has_missed for parcel in self._batch)

    def put(self, parcels: Iterable[Parcel]) -> None:
        is_busy = self.task is not None and not self.task.done()
        if is_busy and self.is_silent:
            for parcel in parcels:
                parcel.unsent(self._silence())
            return
        self._waiting.extend(parcels)
        if not is_busy:
            # Not in the caller's context: it would live on in a task of others.
            self.task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    def _silence(self) -> str:
        return f"{self._where} has not answered since {self._silent_since:%H:%M:%S} UTC"

    async def _run(self) -> None:
        """Send what is in line until nothing is."""
        try:
            while batch := self._take():
                self._batch = batch
                await self._send_batch(batch)
        except BaseException as error:  # cancelled, or a defect: whoever waits gets to know
            for parcel in (*self._batch, *self._waiting):
                parcel.lost(f"the sender was ended by {error!r}")
            self._waiting.clear()
            raise
        finally:
            self._batch = ()

    async def _send_batch(self, batch: list[Parcel]) -> None:
        why = f"{self._where} did not say what became of it"
        limit = asyncio.timeout_at(batch[0].deadline)
        try:
            async with limit:
                await self._send(self._address, batch)
            self._silent_since = None
        except Exception as error:  # noqa: BLE001  # whatever a library raises, every caller gets an answer
            why = f"{self._where}: {str(error) or repr(error)}"
            if limit.expired() or self._is_late(batch[0]):  # the library has given up just before
                if self._silent_since is None:
                    self._silent_since = datetime.now(UTC) - timedelta(seconds=self._timeout)
                why = self._silence()
        missed = [parcel for parcel in batch if parcel.has_missed]
        for parcel in missed:
            parcel.lost(why)
        keys = {parcel.message.key for parcel in missed}
        for parcel in self._waiting:  # sent now, one behind it would come before the repeat of a message that missed
            if missed and (self._silent_since is not None or parcel.message.key in keys):
                parcel.unsent(f"a message before it was not sent: {why}")

    def _take(self) -> list[Parcel]:
        """The oldest messages, as many as go into one batch. Those whose callers have gone away are dropped."""
        batch: list[Parcel] = []
        size = 0
        while self._waiting and len(batch) < BATCH_MESSAGES:
            parcel = self._waiting[0]
            if batch and size + len(parcel.raw) > BATCH_BYTES:
                break
            self._waiting.popleft()
            if parcel.is_open and self._is_late(parcel):
                parcel.unsent(f"{self._where} did not come to it within {self._timeout:g} s")
            if parcel.is_open:
                batch.append(parcel)
                size += len(parcel.raw)
        return batch

    def _is_late(self, parcel: Parcel) -> bool:
        return parcel.deadline - asyncio.get_running_loop().time() <= LATE * self._timeout


async def close_all(closes: Iterable[Callable[[], Awaitable[object]]], timeout: float) -> None:
    """Close what a library has opened, for so many seconds at most; what can't be closed is gone already."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await asyncio.gather(*(close() for close in closes), return_exceptions=True)
