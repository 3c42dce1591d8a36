"""The coalescing sender of the brokers outside of this process: many publishes become few calls of a broker.

Calls of ``publish`` put their messages into a queue and wait. A task, which lives while there is something to send, gives up
to 500 messages or 1 MiB at a time to the broker, and the next ones when those are answered. So a queue keeps its order
whatever fails, and the more is published at once, the less each message costs.

A batch that is not answered within its deadline makes its queue *silent*: every waiting publish gets an error, and so does
every further one at once, until the broker answers a probe.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias

from silbo._checks import check_seconds
from silbo._loops import LoopBinding, describe_busy_threads
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.message import Message

__all__ = ["BATCH_BYTES", "BATCH_MESSAGES", "OutgoingMessage", "Sender", "mark_all_sent"]

BATCH_MESSAGES: Final = 500
"""A batch has at most 500 messages."""
BATCH_BYTES: Final = 1 << 20
"""A batch has at most 1 MiB of encoded messages. A larger message goes alone: 500 of 100 kB would block Redis for 141 ms."""
BURST: Final = 32
"""If 32 or more messages wait while nothing is under way, the first batch takes half of them. From then on the broker works
on one half while the other is being encoded (a third faster at 100 publishers than all in one batch)."""
QUEUE_MESSAGES: Final = 10_000
"""A queue is full with 10,000 messages. The call that exceeds the limit goes in whole; a later publish waits for room."""
QUEUE_BYTES: Final = 16 << 20
"""A queue is full with 16 MiB of encoded messages."""
KEPT_QUEUES: Final = 1024
"""With more addresses than these, queues that have nothing to send and are not silent are dropped."""
LATE: Final = 0.05
"""A message is not sent when less than this share of the timeout is left: its result would likely be unknown."""
PROBE_TIMEOUT: Final = 1.0
"""A publish that probes a silent broker is answered within 1 second."""
PROBE_PAUSE: Final = 0.5
"""Between two probes without a message there are 0.5 seconds."""
PROBE_FOR: Final = 60.0
"""A silent broker is probed without a message for 60 seconds after the last publish; then the next publish waits for it itself."""

_Outcome: TypeAlias = Literal["sent", "refused", "unsent", "unknown"]
Send: TypeAlias = "Callable[[str, Sequence[OutgoingMessage]], Awaitable[None]]"
"""``(address, messages)`` sends a batch, in this order. May raise; is cancelled at the deadline of the first message."""


# -- calls and their messages -------------------------------------------------------------------------------


class PublishCall:
    """One call of ``publish``, and the progress of its messages.

    Attributes:
        answered: Done when every message of the call is settled, or when the caller has gone away.
        deadline: The loop's time at which the call is answered at the latest.
        number: The number of the call; greater than that of every call before it.
    """

    __slots__ = ("_failures", "_messages", "_unsettled", "answered", "deadline", "number")

    def __init__(self, answered: asyncio.Future[None], deadline: float, number: int, messages: int) -> None:
        self.answered = answered
        self.deadline = deadline
        self.number = number
        self._messages = messages
        self._unsettled = messages
        self._failures: _Failures | None = None

    def settle(self, messages: int = 1) -> None:
        """Note that the outcome of messages is known; answer the caller after the last one."""
        self._unsettled -= messages
        if self._unsettled or self.answered.done():
            return
        if self._failures is None:
            self.answered.set_result(None)
        else:
            self.answered.set_exception(self._failures.to_error(self._messages))

    def refuse(self, refusal: MessageRefused) -> None:
        """Settle a message that can't be sent: the error gets a note for each further one."""
        failures = self._fail(1)
        if failures.refusal is None:
            failures.refusal = refusal
        else:
            failures.refusal.add_note(f"and in the same call: {refusal}")
        self.settle()

    def fail(self, why: str | BrokerUnavailable, messages: int = 1, *, is_unknown: bool = False) -> None:
        """Settle messages that were not sent; or, if ``is_unknown``, may have been."""
        failures = self._fail(messages)
        if is_unknown:
            failures.unknown = failures.unknown or str(why)
        else:
            failures.unsent = failures.unsent or why
        self.settle(messages)

    def _fail(self, messages: int) -> _Failures:
        failures = self._failures = self._failures or _Failures()
        failures.messages += messages
        return failures


@dataclass(slots=True)
class _Failures:
    """The messages of one call that were not sent, or may not have been.

    Attributes:
        messages: Their number.
        refusal: The error for those that can't be sent.
        unsent: The reason why others were surely not sent, or the error that says so.
        unknown: The reason why nobody knows if others were sent.
    """

    messages: int = 0
    refusal: MessageRefused | None = None
    unsent: str | BrokerUnavailable = ""
    unknown: str = ""

    def to_error(self, messages: int) -> BrokerUnavailable | DeliveryUnknown | MessageRefused:
        """Return the error of a call of so many messages."""
        is_one = messages == 1
        if self.unknown:
            return DeliveryUnknown(
                f"{self.unknown}; {'it' if is_one else f'some or all of {messages} messages'} may have arrived"
            )
        if self.unsent:
            if sent := messages - self.messages:
                return DeliveryUnknown(f"{sent} of {messages} messages were sent, the others were not: {self.unsent}")
            if isinstance(self.unsent, BrokerUnavailable):
                return self.unsent
            return BrokerUnavailable(
                f"{self.unsent}; {'not sent' if is_one else f'none of {messages} messages was sent'}"
            )
        assert self.refusal is not None
        return self.refusal


class OutgoingMessage:
    """One message on its way. The code that sends it marks its outcome; only the first mark counts.

    Attributes:
        call: The call that it belongs to.
        message: The message.
        raw: The message, encoded.
        is_handed_over: Set it before the broker gets the message. Without a mark, the outcome of a message is unknown
            if it was handed over, and "not sent" if it was not.
        outcome: None until it is marked.
    """

    __slots__ = ("call", "is_handed_over", "message", "outcome", "raw")

    def __init__(self, call: PublishCall, message: Message, raw: bytes) -> None:
        self.call = call
        self.message = message
        self.raw = raw
        self.outcome: _Outcome | None = None
        self.is_handed_over = False

    @property
    def deadline(self) -> float:
        """The loop's time at which the caller is answered at the latest."""
        return self.call.deadline

    @property
    def may_be_repeated(self) -> bool:
        """True if the caller may publish the message again: it was neither sent nor refused."""
        return self.outcome not in ("sent", "refused")

    def mark_sent(self) -> None:
        """Note that the broker has the message."""
        if self.outcome is None:
            self.outcome = "sent"
            self.call.settle()

    def mark_refused(self, problem: str) -> None:
        """Note that the broker takes the message neither now nor later."""
        if self.outcome is None:
            self.outcome = "refused"
            self.call.refuse(MessageRefused(self.message.message_name, problem))

    def mark_unsent(self, why: str | BrokerUnavailable) -> None:
        """Note that the broker surely does not have the message; an error is what the caller gets."""
        self._fail("unsent", why)

    def mark_unknown(self, why: str) -> None:
        """Note that the broker may have the message."""
        self._fail("unknown", why)

    def mark_unanswered(self, why: str) -> None:
        """Note that no answer came: unknown if the message was handed over, else not sent."""
        self._fail("unknown" if self.is_handed_over else "unsent", why)

    def _fail(self, outcome: _Outcome, why: str | BrokerUnavailable) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.call.fail(why, is_unknown=outcome == "unknown")


def mark_all_sent(messages: Iterable[OutgoingMessage]) -> None:
    """Note that the broker has all these messages."""
    for outgoing in messages:
        if outgoing.outcome is None:
            outgoing.outcome = "sent"
            outgoing.call.settle()


# -- the sender ---------------------------------------------------------------------------------------------


class Sender:
    """Takes the calls of a publisher. For one event loop at a time.

    Args:
        broker: The broker's name in errors; with ``default``, its name and kind of address, as ``Kafka topic``.
        send: Gives a batch to the broker, and marks the outcome of each message.
        encode: Returns a message as bytes; may raise MessageRefused.
        timeout: Seconds in which a publish is answered.
        owner: The name of the broker's class, for errors.
        default: The address of messages for which no route chose one: every address has a queue and a task of its own, and
            is silent for itself. None if all messages share one queue, whatever their address.
        connect: Called before each batch; returns as soon as the broker answers. It also probes a silent broker; without it
            one publish at a time does so, for a second. An error goes to every waiting publish.
        explain: Returns a reason why the broker may be silent; empty if none is known.
        order_of: Returns that by which the messages are known that must keep their order. If one of them misses, those that
            wait are not sent either: they would overtake its repeat. By default the key.
        forget: Called before another event loop takes over: drops what belongs to the loop before.
    """

    def __init__(
        self,
        broker: str,
        send: Send,
        encode: Callable[[Message], bytes],
        *,
        timeout: float,
        owner: str = "Sender",
        default: str | None = None,
        connect: Callable[[], Awaitable[None]] | None = None,
        explain: Callable[[], str] | None = None,
        order_of: Callable[[OutgoingMessage], Hashable] | None = None,
        forget: Callable[[], None] | None = None,
    ) -> None:
        self.send: Final = send
        self.encode: Final = encode
        self.timeout: Final = check_seconds("timeout", timeout)
        self.connect: Final = connect
        self.explain: Final = explain or _explain_by_threads
        self.order_of: Final = order_of or _key_of
        self.closed = False
        self.calls = 0
        self._broker = broker
        self._default = default
        self._forget = forget
        self._binding = LoopBinding(
            owner,
            is_busy=lambda: any(queue.is_busy for queue in self._queues.values()),
            forget=self._forget_queues,
        )
        self._forget_queues()

    def _forget_queues(self) -> None:
        self._queues: dict[str, _SendQueue] = {}
        self._tidy_at = KEPT_QUEUES
        if self._forget is not None:
            self._forget()

    async def publish(self, messages: Sequence[Message]) -> None:
        """Send the messages, in this order: see :class:`~silbo.protocols.Publisher`."""
        loop = asyncio.get_running_loop()
        if loop is not self._binding.loop:
            self._binding.enter("publish")
        if self.closed:
            raise BrokerUnavailable("the broker is closed: nothing can be published after aclose()")
        if not messages:
            return
        default = self._default
        if default is None or len(messages) == 1:  # as the bridge publishes
            queue = self._queue("" if default is None else self.address_of(messages[0]))
            call = self._begin(loop, messages, is_silent=queue.is_silent)
            queue.put(call, messages, loop)
        else:
            by_address: dict[str, list[Message]] = {}
            for message in messages:
                by_address.setdefault(self.address_of(message), []).append(message)
            parts = [(self._queue(address), part) for address, part in by_address.items()]
            call = self._begin(loop, messages, is_silent=any(queue.is_silent for queue, _ in parts))
            for queue, part in parts:
                queue.put(call, part, loop)
        await call.answered

    def address_of(self, message: Message) -> str:
        """Return the address whose queue takes the message, if there is a queue for each."""
        return message.to or self._default or ""

    def _begin(self, loop: asyncio.AbstractEventLoop, messages: Sequence[Message], *, is_silent: bool) -> PublishCall:
        timeout = min(PROBE_TIMEOUT, self.timeout) if is_silent else self.timeout
        self.calls += 1
        return PublishCall(loop.create_future(), loop.time() + timeout, self.calls, len(messages))

    def check_loop(self, call: str) -> None:
        """Raise LoopConflict if another event loop uses it."""
        self._binding.enter(call)

    def _queue(self, address: str) -> _SendQueue:
        queue = self._queues.get(address)
        if queue is None:
            if len(self._queues) >= self._tidy_at:
                self._queues = {of: queue for of, queue in self._queues.items() if queue.is_busy or queue.is_silent}
                self._tidy_at = max(KEPT_QUEUES, 2 * len(self._queues))
            label = self._broker if self._default is None else f"{self._broker} {address!r}"
            queue = self._queues[address] = _SendQueue(self, label, address)
        return queue

    async def aclose(self) -> None:
        """Answer every waiting publish, within its deadline. May be called twice.

        Raises:
            LoopConflict: another event loop uses it; it stays open.
        """
        self._binding.enter("aclose")
        self.closed = True
        tasks = [task for queue in self._queues.values() if (task := queue.begin_to_close()) is not None]
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()


def _key_of(outgoing: OutgoingMessage) -> str | None:
    return outgoing.message.key


def _explain_by_threads() -> str:
    busy = describe_busy_threads()
    return f"no new connection can look up the name of its host: {busy}" if busy else ""


class _SendQueue:
    """The messages that wait to be sent, oldest first, so that their deadlines are in order too.

    Bounded in messages and bytes. A call that finds it full waits for room behind it, its messages not encoded.
    """

    def __init__(self, sender: Sender, label: str, address: str) -> None:
        self._sender = sender
        self._label = label
        self._address = address
        self._waiting: deque[OutgoingMessage] = deque()
        self._bytes = 0  # of the waiting messages
        self._without_room: deque[tuple[PublishCall, Sequence[Message]]] = deque()
        self._batch: Sequence[OutgoingMessage] = ()  # given to the broker, not answered
        self._begun = False  # true from the task's second batch on
        self._missed: dict[Hashable, tuple[int, str]] = {}  # by order_of: the last call of which none goes, and why
        self._missed_until = 0  # the greatest of those calls
        self._silent_since: datetime | None = None
        self._last_asked = 0.0  # the loop's time when a publish last met the silence
        self.task: asyncio.Task[None] | None = None

    @property
    def is_silent(self) -> bool:
        """True if the last batch was not answered, and the batch under way has no answer yet either."""
        return self._silent_since is not None and all(outgoing.may_be_repeated for outgoing in self._batch)

    @property
    def is_busy(self) -> bool:
        """True if its task runs."""
        return self.task is not None and not self.task.done()

    def begin_to_close(self) -> asyncio.Task[None] | None:
        """End a probe without a message; return the task if it runs."""
        if not self.is_busy:
            return None
        assert self.task is not None
        if self.is_silent and not self._batch:
            self.task.cancel()
        return self.task

    # -- in ---------------------------------------------------------------------------------------------------

    def put(self, call: PublishCall, messages: Sequence[Message], loop: asyncio.AbstractEventLoop) -> None:
        """Append the messages; if the queue is silent and a probe is under way, they are not sent."""
        is_busy = self.is_busy
        if self._silent_since is not None and is_busy and self.is_silent:
            self._last_asked = loop.time()
            call.fail(self._silence(), len(messages))
            return
        if self._has_room():  # then nobody waits for it
            self._encode(call, messages)
        else:
            self._without_room.append((call, messages))
        if not is_busy and self._waiting:
            # Not in the caller's context: the task goes on for other callers and would keep its values alive.
            self.task = loop.create_task(self._run(), context=Context())

    def _has_room(self) -> bool:
        """Return True if a call can be appended, however large: else one above the limits never could."""
        return len(self._waiting) < QUEUE_MESSAGES and self._bytes < QUEUE_BYTES

    def _encode(self, call: PublishCall, messages: Sequence[Message]) -> None:
        encode = self._sender.encode
        try:
            for message in messages:
                try:
                    raw = encode(message)
                except MessageRefused as refusal:
                    call.refuse(refusal)
                else:
                    self._waiting.append(OutgoingMessage(call, message, raw))
                    self._bytes += len(raw)
        except Exception as error:  # noqa: BLE001  # of a host's own format: for its caller; nothing of the call is sent
            if not call.answered.done():
                call.answered.set_exception(error)

    def _give_room(self) -> None:
        """Encode the messages of calls that wait for room, oldest first, as long as there is some."""
        while self._without_room and self._has_room():
            call, messages = self._without_room.popleft()
            if not call.answered.done():
                self._encode(call, messages)

    # -- out --------------------------------------------------------------------------------------------------

    def _first(self) -> OutgoingMessage | None:
        """Return the oldest message; drop messages whose callers have gone away."""
        while self._waiting:
            first = self._waiting[0]
            if not first.call.answered.done():
                return first
            self._drop_first()
        return None

    def _drop_first(self) -> OutgoingMessage:
        outgoing = self._waiting.popleft()
        self._bytes -= len(outgoing.raw)
        if self._without_room:
            self._give_room()
        return outgoing

    def _take(self) -> list[OutgoingMessage]:
        """Remove the oldest messages, as many as fit into one batch, and return those whose callers wait."""
        self._fail_late()
        most = BATCH_MESSAGES
        if not self._begun and len(self._waiting) >= BURST:
            most = min(most, len(self._waiting) // 2)
        self._begun = True
        waiting = self._waiting
        batch: list[OutgoingMessage] = []
        size = 0
        while waiting and len(batch) < most:
            outgoing = waiting[0]
            length = len(outgoing.raw)
            if size + length > BATCH_BYTES and batch:
                break
            waiting.popleft()
            self._bytes -= length
            if self._missed:
                self._mark_if_missed(outgoing)
            if outgoing.outcome is None and not outgoing.call.answered.done():
                batch.append(outgoing)
                size += length
        if self._without_room:
            self._give_room()
        return batch

    def _fail_late(self) -> None:
        """Answer the calls for which it is too late to begin."""
        latest = asyncio.get_running_loop().time()
        if self._silent_since is None:  # a message that probes has less than the whole timeout
            latest += LATE * self._sender.timeout
        while (first := self._first()) is not None and first.deadline <= latest:
            why = f"{self._label} took longer than {self._sender.timeout:g} s for the messages before it"
            self._drop_first().mark_unsent(why)

    def _mark_if_missed(self, outgoing: OutgoingMessage) -> None:
        """Mark a message as not sent if one that it must not overtake was not."""
        if outgoing.call.number > self._missed_until:
            self._missed.clear()
            return
        until, why = self._missed.get(self._sender.order_of(outgoing), (0, ""))
        if outgoing.call.number <= until:
            outgoing.mark_unsent(why)

    def _fail_waiting(self, why: str) -> None:
        """Answer every call that waits with an error: none of it is sent."""
        while self._without_room:  # first: they must not get the room of those that fail
            call, messages = self._without_room.popleft()
            call.fail(why, len(messages))
        while self._waiting:
            self._drop_first().mark_unsent(why)

    # -- the task ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Send batches until the queue is empty; while the broker is silent, probe it."""
        self._begun = False
        try:
            while True:
                if (first := self._first()) is not None:
                    await self._send_batch(first)
                elif self._silent_since is not None and self._sender.connect is not None and not self._sender.closed:
                    await self._probe(self._sender.connect)
                else:
                    return
        except BaseException as error:  # cancelled, or a defect: every waiting caller gets the error
            why = f"the sender was ended by {error!r}"
            for outgoing in self._batch:
                outgoing.mark_unanswered(why)
            self._fail_waiting(why)
            raise
        finally:
            self._batch = ()

    async def _send_batch(self, first: OutgoingMessage) -> None:
        """Send the next batch, and settle its messages."""
        sender = self._sender
        self._batch = ()
        why = f"{self._label} did not say if it has the message"
        limit = asyncio.timeout_at(first.deadline)
        try:
            async with limit:
                if sender.connect is not None:
                    await sender.connect()
                batch = self._batch = self._take()
                if not batch:
                    return
                if batch[0].deadline != first.deadline:
                    limit.reschedule(batch[0].deadline)
                await sender.send(self._address, batch)
            self._silent_since = None
        except Exception as error:  # noqa: BLE001  # whatever a library raises, every caller gets an answer
            why = f"{self._label}: {str(error) or repr(error)}"
            if not self._batch and limit.expired() and not self._is_due():
                return  # those that have waited until then have gone away
            if limit.expired() or (self._batch and self._is_late(self._batch[0])):
                self._become_silent()  # if late, the library gave up just before the deadline
                why = self._silence()
            if not self._batch:
                self._fail_waiting(why)
                return
        missed = [outgoing for outgoing in self._batch if outgoing.outcome != "sent" and outgoing.may_be_repeated]
        if missed:
            self._settle_missed(missed, why)

    def _is_due(self) -> bool:
        first = self._first()
        return first is not None and first.deadline <= asyncio.get_running_loop().time()

    def _is_late(self, outgoing: OutgoingMessage) -> bool:
        return outgoing.deadline - asyncio.get_running_loop().time() <= LATE * self._sender.timeout

    def _settle_missed(self, missed: Sequence[OutgoingMessage], why: str) -> None:
        for outgoing in missed:
            outgoing.mark_unanswered(why)
        if self._silent_since is not None:
            self._fail_waiting(why)
            return
        # Sent now, a waiting message would overtake the repeat of one that missed before it. They are marked when they are
        # taken: a walk through the queue for each batch would be quadratic.
        self._missed_until = self._sender.calls
        held_back = self._missed_until, f"a message before it was not sent: {why}"
        for outgoing in missed:
            self._missed[self._sender.order_of(outgoing)] = held_back

    # -- silence ----------------------------------------------------------------------------------------------

    def _become_silent(self) -> None:
        if self._silent_since is None:
            self._silent_since = datetime.now(UTC) - timedelta(seconds=self._sender.timeout)
            self._last_asked = asyncio.get_running_loop().time()

    def _silence(self) -> str:
        reason = self._sender.explain()
        return f"{self._label} has not answered since {self._silent_since:%H:%M:%S} UTC{reason and f' ({reason})'}"

    async def _probe(self, connect: Callable[[], Awaitable[None]]) -> None:
        """End the silence if the broker answers, or if no publish has asked for a minute."""
        try:
            async with asyncio.timeout(self._sender.timeout):
                await connect()
        except TimeoutError:
            await asyncio.sleep(PROBE_PAUSE)
            if asyncio.get_running_loop().time() - self._last_asked < PROBE_FOR:
                return
        except Exception:  # noqa: BLE001  # an answer: the next publish brings it to its caller
            pass
        self._silent_since = None
