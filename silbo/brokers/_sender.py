"""A sender for a client library that the host brings: Kafka's, RabbitMQ's, Service Bus's.

Every address has a queue. Calls of ``publish`` put their messages into it. A task, which lives while there is something
to send, gives up to 500 messages or 1 MiB at a time to the library, and the next ones when those are answered. So a queue
keeps its order whatever fails, and the more is published at once, the less each message costs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias

from silbo._checks import check_seconds
from silbo._loops import LoopBinding, describe_busy_threads
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.message import Message

__all__ = ["LibrarySender", "OutgoingMessage", "add_refusal", "build_publish_error"]

BATCH_MESSAGES: Final = 500
"""A batch has at most 500 messages."""
BATCH_BYTES: Final = 1 << 20
"""A batch has at most 1 MiB of encoded messages. A larger message goes alone."""
PROBE_TIMEOUT: Final = 1.0
"""A publish that probes a silent broker is answered within 1 second."""
KEPT_QUEUES: Final = 1024
"""With more addresses than these, queues that have nothing to send and are not silent are dropped."""
LATE: Final = 0.05
"""A message is not sent when less than this share of the timeout is left: its result would likely be unknown."""

_Outcome: TypeAlias = Literal["sent", "refused", "unsent", "unknown"]
Send: TypeAlias = "Callable[[str, Sequence[OutgoingMessage]], Awaitable[None]]"
"""``(address, messages)`` sends a batch, in this order. May raise; is cancelled at the deadline of the first message."""


def add_refusal(first: MessageRefused | None, error: MessageRefused) -> MessageRefused:
    """Return the error of a call's first refused message, with a note for each further one."""
    if first is None:
        return error
    first.add_note(f"and in the same call: {error}")
    return first


def build_publish_error(why: str, *, messages: int, sent: int, is_unknown: bool) -> BrokerUnavailable | DeliveryUnknown:
    """Return the error of a call of ``publish`` of which not all messages were sent.

    Args:
        why: The reason why messages failed.
        messages: The number of the call's messages.
        sent: The number of messages that the broker has.
        is_unknown: True if the broker may have messages that failed.
    """
    if is_unknown:
        return DeliveryUnknown(
            f"{why}; {'it' if messages == 1 else f'some or all of {messages} messages'} may have arrived"
        )
    if sent:
        return DeliveryUnknown(f"{sent} of {messages} messages were sent, the others were not: {why}")
    return BrokerUnavailable(f"{why}; {'not sent' if messages == 1 else f'none of {messages} messages was sent'}")


class PublishCall:
    """One call of ``publish``, and the progress of its messages.

    Attributes:
        answered: Done when every message of the call is settled, or when the caller has gone away.
        deadline: The loop's time at which the call is answered at the latest.
        messages: The number of messages on their way, without those that could not be encoded.
        refusal: The error for messages that can't be sent; a note for each further one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.answered: asyncio.Future[None] = loop.create_future()
        self.deadline = 0.0
        self.messages = 0
        self.refusal: MessageRefused | None = None
        self._sent = 0
        self._settled = 0
        self._unsent = ""
        self._unknown = ""

    def settle_message(self, outcome: _Outcome, why: str) -> None:
        """Note the outcome of one message; answer the caller after the last one."""
        self._settled += 1
        self._sent += outcome == "sent"
        if outcome == "unsent":
            self._unsent = self._unsent or why
        elif outcome == "unknown":
            self._unknown = self._unknown or why
        if self._settled < self.messages or self.answered.done():
            return
        if (error := self._error()) is None:
            self.answered.set_result(None)
        else:
            self.answered.set_exception(error)

    def _error(self) -> BrokerUnavailable | DeliveryUnknown | MessageRefused | None:
        if why := self._unknown or self._unsent:
            is_unknown = bool(self._unknown)
            return build_publish_error(why, messages=self.messages, sent=self._sent, is_unknown=is_unknown)
        return self.refusal


class OutgoingMessage:
    """One message on its way. The code that sends it marks its outcome; only the first mark counts.

    Attributes:
        raw: The message, encoded.
        is_handed_over: Set it before the library gets the message. Without a mark, the outcome of a message is unknown
            if it was handed over, and "not sent" if it was not.
    """

    __slots__ = ("_call", "_outcome", "is_handed_over", "message", "raw")

    def __init__(self, call: PublishCall, message: Message, raw: bytes) -> None:
        self._call = call
        self._outcome: _Outcome | None = None
        self.message = message
        self.raw = raw
        self.is_handed_over = False

    @property
    def deadline(self) -> float:
        """The loop's time at which the caller is answered at the latest."""
        return self._call.deadline

    @property
    def is_awaited(self) -> bool:
        """True if the message has no outcome yet and its caller still waits."""
        return self._outcome is None and not self._call.answered.done()

    @property
    def may_be_repeated(self) -> bool:
        """True if the caller may publish the message again: it was neither sent nor refused."""
        return self._outcome not in ("sent", "refused")

    def mark_sent(self) -> None:
        """Note that the broker has the message."""
        self._settle("sent")

    def mark_refused(self, problem: str) -> None:
        """Note that the broker takes the message neither now nor later."""
        if self._outcome is None:
            refusal = MessageRefused(self.message.message_name, problem)
            self._call.refusal = add_refusal(self._call.refusal, refusal)
            self._settle("refused")

    def mark_unsent(self, why: str) -> None:
        """Note that the broker surely does not have the message."""
        self._settle("unsent", why)

    def mark_unknown(self, why: str) -> None:
        """Note that the broker may have the message."""
        self._settle("unknown", why)

    def mark_unanswered(self, why: str) -> None:
        """Note that no answer came: unknown if the message was handed over, else not sent."""
        self._settle("unknown" if self.is_handed_over else "unsent", why)

    def _settle(self, outcome: _Outcome, why: str = "") -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._call.settle_message(outcome, why)


class LibrarySender:
    """Takes the calls of a publisher; has a queue for each address. For one event loop at a time.

    A batch that is not answered within its deadline makes its queue *silent*: every message in the queue gets an error,
    and so does every further publish at once. Only one publish at a time probes, for a second, if the broker answers
    again.

    Args:
        broker: The broker's name and kind of address in errors, as ``Kafka topic``.
        send: Gives a batch to the library.
        encode: Returns a message as bytes; may raise MessageRefused.
        default: The address of messages for which no route chose one.
        timeout: Seconds in which a publish is answered.
        owner: The name of the broker's class, for errors.
    """

    def __init__(
        self,
        broker: str,
        send: Send,
        encode: Callable[[Message], bytes],
        *,
        default: str,
        timeout: float,
        owner: str = "LibrarySender",
    ) -> None:
        self._broker = broker
        self._send = send
        self._encode = encode
        self._default = default
        self._timeout = check_seconds("timeout", timeout)
        self._queues: dict[str, _AddressQueue] = {}
        self._tidy_at = KEPT_QUEUES
        self._binding = LoopBinding(
            owner,
            is_busy=lambda: any(queue.is_busy for queue in self._queues.values()),
            forget=lambda: self._queues.clear(),  # the dict of that moment
        )
        self._closed = False

    async def publish(self, messages: Sequence[Message]) -> None:
        """Send the messages, in this order: see :class:`~silbo.protocols.Publisher`."""
        loop = asyncio.get_running_loop()
        if loop is not self._binding.loop:
            self._binding.enter("publish")
        if self._closed:
            raise BrokerUnavailable("the broker is closed: nothing can be published after aclose()")
        call = PublishCall(loop)
        by_address: dict[str, list[OutgoingMessage]] = {}
        for message in messages:
            try:
                outgoing = OutgoingMessage(call, message, self._encode(message))
            except MessageRefused as error:
                call.refusal = add_refusal(call.refusal, error)
            else:
                call.messages += 1
                by_address.setdefault(message.to or self._default, []).append(outgoing)
        is_silent = any(self._queue(address).is_silent for address in by_address)
        timeout = min(PROBE_TIMEOUT, self._timeout) if is_silent else self._timeout
        call.deadline = loop.time() + timeout
        for address, its_messages in by_address.items():
            self._queue(address).put(its_messages, loop)
        if by_address:
            await call.answered
        elif call.refusal is not None:
            raise call.refusal

    def check_loop(self, call: str) -> None:
        """Raise LoopConflict if another event loop uses it."""
        self._binding.enter(call)

    def _queue(self, address: str) -> _AddressQueue:
        if address not in self._queues:
            if len(self._queues) >= self._tidy_at:
                self._queues = {of: queue for of, queue in self._queues.items() if queue.is_busy or queue.is_silent}
                self._tidy_at = max(KEPT_QUEUES, 2 * len(self._queues))
            self._queues[address] = _AddressQueue(f"{self._broker} {address!r}", address, self._send, self._timeout)
        return self._queues[address]

    async def aclose(self) -> None:
        """Answer every waiting publish, within its deadline. May be called twice.

        Raises:
            LoopConflict: another event loop uses it; it stays open.
        """
        self._binding.enter("aclose")
        self._closed = True
        tasks = [queue.task for queue in self._queues.values() if queue.task is not None and not queue.task.done()]
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()


class _AddressQueue:
    """The messages that wait to be sent to one address, oldest first, so that their deadlines are in order too."""

    def __init__(self, label: str, address: str, send: Send, timeout: float) -> None:
        self._label = label
        self._address = address
        self._send = send
        self._timeout = timeout
        self._waiting: deque[OutgoingMessage] = deque()
        self._batch: Sequence[OutgoingMessage] = ()  # given to the library, not answered
        self._taken = 0  # messages taken out of the queue so far
        self._missed: dict[str | None, tuple[int, str]] = {}  # by key: up to which message none goes, and why
        self._missed_until = 0  # the greatest of those places
        self._silent_since: datetime | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def is_silent(self) -> bool:
        """True if the last batch was not answered, and the batch under way has no answer yet either."""
        return self._silent_since is not None and all(message.may_be_repeated for message in self._batch)

    @property
    def is_busy(self) -> bool:
        """True if its task runs."""
        return self.task is not None and not self.task.done()

    def put(self, messages: Iterable[OutgoingMessage], loop: asyncio.AbstractEventLoop) -> None:
        """Append the messages; mark them as not sent if the queue is silent and a probe is under way."""
        is_busy = self.is_busy
        if is_busy and self.is_silent:
            for message in messages:
                message.mark_unsent(self._silence())
            return
        self._waiting.extend(messages)
        if not is_busy:
            # Not in the caller's context: the task goes on for other callers and would keep its values alive.
            self.task = loop.create_task(self._run(), context=Context())

    def _silence(self) -> str:
        busy = describe_busy_threads()
        perhaps = f" (no new connection can look up the name of its host: {busy})" if busy else ""
        return f"{self._label} has not answered since {self._silent_since:%H:%M:%S} UTC{perhaps}"

    async def _run(self) -> None:
        """Send batches until the queue is empty."""
        try:
            while batch := self._take():
                self._batch = batch
                await self._send_batch(batch)
        except BaseException as error:  # cancelled, or a defect: every waiting caller gets the error
            for message in (*self._batch, *self._waiting):
                message.mark_unanswered(f"the sender was ended by {error!r}")
            self._waiting.clear()
            raise
        finally:
            self._batch = ()

    async def _send_batch(self, batch: list[OutgoingMessage]) -> None:
        why = f"{self._label} did not say if it has the message"
        limit = asyncio.timeout_at(batch[0].deadline)
        try:
            async with limit:
                await self._send(self._address, batch)
            self._silent_since = None
        except Exception as error:  # noqa: BLE001  # whatever a library raises, every caller gets an answer
            why = f"{self._label}: {str(error) or repr(error)}"
            if limit.expired() or self._is_late(batch[0]):  # late: the library gave up just before the deadline
                if self._silent_since is None:
                    self._silent_since = datetime.now(UTC) - timedelta(seconds=self._timeout)
                why = self._silence()
        missed = [message for message in batch if message.may_be_repeated]
        if not missed:
            return
        for message in missed:
            message.mark_unanswered(why)
        # Sent now, a waiting message would overtake the repeat of one that missed before it.
        why = f"a message before it was not sent: {why}"
        if self._silent_since is not None:
            for waiting in self._waiting:
                waiting.mark_unsent(why)
            self._taken += len(self._waiting)
            self._waiting.clear()
        else:  # marked when they are taken: a walk through the queue for each batch would be quadratic
            self._missed_until = self._taken + len(self._waiting)
            for message in missed:
                self._missed[message.message.key] = self._missed_until, why

    def _take(self) -> list[OutgoingMessage]:
        """Remove the oldest messages from the queue, as many as fit into one batch; drop those without a caller."""
        batch: list[OutgoingMessage] = []
        size = 0
        while self._waiting and len(batch) < BATCH_MESSAGES:
            message = self._waiting[0]
            if batch and size + len(message.raw) > BATCH_BYTES:
                break
            self._waiting.popleft()
            self._taken += 1
            if self._missed:
                self._mark_if_missed(message)
            if message.is_awaited and self._is_late(message):
                message.mark_unsent(f"{self._label} took longer than {self._timeout:g} s for the messages before it")
            if message.is_awaited:
                batch.append(message)
                size += len(message.raw)
        return batch

    def _mark_if_missed(self, message: OutgoingMessage) -> None:
        """Mark the message just taken as not sent if one of its key, before it, was not."""
        if self._taken > self._missed_until:
            self._missed.clear()
            return
        until, why = self._missed.get(message.message.key, (0, ""))
        if self._taken <= until:
            message.mark_unsent(why)

    def _is_late(self, message: OutgoingMessage) -> bool:
        return message.deadline - asyncio.get_running_loop().time() <= LATE * self._timeout
