"""The seams: what an adapter has to offer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from silbo.stored import NOTHING

if TYPE_CHECKING:
    from silbo.errors import Gap, MessageRefused
    from silbo.message import Delivery, Message, Origin
    from silbo.stored import Lead, OutboxStatus, Packed, Quota, Row, State

__all__ = [
    "Container",
    "Format",
    "Inbox",
    "JoiningPublisher",
    "OutboxStore",
    "Promises",
    "Publisher",
    "Receiver",
    "Scope",
    "Sequenced",
    "SequencedPublisher",
    "SessionStore",
    "Subscription",
]

T = TypeVar("T")


class Format(Protocol):
    """How a message looks as bytes."""

    @property
    def names(self) -> Literal["event", "class"]:
        """What ``message_name`` holds on the wire: the event name, or (Diator) the class name."""
        ...

    @property
    def content_type(self) -> str:
        """Its media type, for brokers that carry one beside a message."""
        ...

    def encode(self, message: Message, origin: Origin) -> bytes:
        """The bytes of a message that ``origin`` sends.

        Raises:
            MessageRefused: too large, or something in it can't be written.
        """
        ...

    def decode(self, raw: bytes) -> Message:
        """The message in these bytes.

        Raises:
            MessageInvalid: anything wrong with them; no other error comes out.
        """
        ...

    def channel(self, message: Message, prefix: str) -> str:
        """The Pub/Sub channel of a message: the address that a route chose, under the prefix, else the format's own."""
        ...

    def channels(self, pattern: str, prefix: str) -> Sequence[str]:
        r"""The Redis patterns that together cover an event name or pattern: a few too many match, never too few.

        For PSUBSCRIBE; one without ``*?[\\`` in it is a channel as it is. What a route sent to an address is not
        among them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Promises:
    """What one publisher promises and another can't; a publisher has it as its attribute ``promises``.

    That nothing is lost without an error, and what an error means, is promised by all of them. One that declares
    nothing promises the most.

    Attributes:
        order: Which messages arrive in the order in which they were published: ``"all"``, those of one ``"key"``, or
            ``"none"``.
        keeps: Whether what was published is still there for consumers when the broker went away and came back.
    """

    order: Literal["all", "key", "none"] = "all"
    keeps: bool = True


@runtime_checkable
class Publisher(Protocol):
    """Takes messages: a broker, or an outbox in front of one."""

    @property
    def app(self) -> str:
        """The program's name, as consumers see it in ``event.origin.app``."""
        ...

    async def publish(self, *messages: Message) -> None:
        """Send, in this order; returns when the broker has them all. Calls keep their order, awaited in turn or not.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were.
            BrokerUnavailable: nothing of the call was sent.
            DeliveryUnknown: some or all may have arrived.
        """
        ...

    async def aclose(self) -> None:
        """Finish what is in hand and close what was opened. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Sequenced:
    """What became of a sequenced publish. What is in neither was added.

    Attributes:
        known: Sequences that the broker had already; they were not added again.
        refused: Messages that can't be sent, by their sequence.
        last: The highest sequence that the broker had before this call, 0 for none.
    """

    known: Collection[int] = ()
    refused: Mapping[int, MessageRefused] = field(default_factory=dict)
    last: int = 0


@runtime_checkable
class SequencedPublisher(Publisher, Protocol):
    """A publisher that adds each numbered message once, however often it is given."""

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """Send, in this order, what the broker does not have yet; one call at a time for each source.

        For each source and address the broker keeps ``(epoch, last sequence)``: from an older epoch it takes nothing,
        and what is not above the last sequence it has.

        Args:
            source: Names one partition of one outbox.
            epoch: Of its leader.
            messages: With their sequences, ascending, 1 or more. None at all asks whether the broker answers, and takes
                this epoch.

        Raises:
            Fenced: the broker has seen a newer epoch of this source; nothing was sent.
            BrokerUnavailable: some may have been sent, where there are several addresses. Safe to repeat.
            DeliveryUnknown: some or all may have been sent. Safe to repeat, in this method.
        """
        ...


@runtime_checkable
class JoiningPublisher(Publisher, Protocol):
    """A publisher that can be part of a transaction of its caller's."""

    @property
    def in_transaction(self) -> bool:
        """Whether what this task publishes now is committed, or not, by the caller's own transaction."""
        ...


class Receiver(Protocol):
    """An open subscription, used by one consumer; it acknowledges while it waits for more."""

    @property
    def skips_own_instance(self) -> bool:
        """Whether what this very process sent is never wanted (true where everybody hears everything)."""
        ...

    @property
    def keep_every(self) -> float | None:
        """Seconds between two calls of :meth:`keep` that are needed; None where nobody else would take over."""
        ...

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """Wait for up to half a second for messages; at most ``limit``, possibly none.

        After an error the next call connects again by itself.

        Raises:
            BrokerUnavailable: the connection was lost or refused.
        """
        ...

    async def ack(self, *deliveries: Delivery) -> None:
        """Tell the broker that these are done. Nothing to do where nothing is kept.

        Raises:
            BrokerUnavailable: not acknowledged, they will come again; safe to repeat.
        """
        ...

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """Tell the broker that these are still in work, so that nobody else takes them over.

        Returns:
            Those that another consumer has taken over; where they are not begun, they should not be.

        Raises:
            BrokerUnavailable: not told; safe to repeat.
        """
        ...

    async def count(self, delivery: Delivery) -> int:
        """Count one attempt of a delivery, durably; for what was received before, or has failed.

        Returns:
            The attempts that are known, this one included.

        Raises:
            BrokerUnavailable: perhaps counted.
        """
        ...

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """Park a delivery as a dead letter and acknowledge it, in one step.

        Returns:
            False where it is another consumer's by now, or done: then nothing happened.

        Raises:
            BrokerUnavailable: perhaps done; safe to repeat.
        """
        ...

    async def aclose(self) -> None:
        """Close the connection; what is not acknowledged stays with the broker. May be called twice."""
        ...


class Subscription(Protocol):
    """A plain description of what to receive: nothing happens until a consumer opens it."""

    @property
    def app(self) -> str:
        """The program's name."""
        ...

    @property
    def name(self) -> str:
        """The group's; empty where there are no groups."""
        ...

    async def open(self) -> Receiver:
        """Connect and subscribe; returns when the broker has confirmed it.

        Raises:
            BrokerUnavailable: the broker can't be reached.
        """
        ...


class Inbox(Protocol):
    """Remembers which publications a group has handled, so that a redelivery has no second effect."""

    def handling(self, group: str, publication: str) -> AbstractAsyncContextManager[bool]:
        """Around the listeners of one delivery.

        Entering gives True where the publication is new, False where it was handled: then nothing is to be done. Leaving
        without an error remembers it; with one, not.
        """
        ...


class OutboxStore(Protocol):
    """Where an outbox keeps its messages. Times are the store's own clock's.

    Every method raises :class:`~silbo.errors.StoreUnavailable` when the store can't be used at the moment. One that was
    not opened is a RuntimeError, where there is something to open.
    """

    @property
    def id(self) -> str:
        """Of the store, given when it was made: part of the source's name for the broker. Known once opened."""
        ...

    @property
    def partitions(self) -> int:
        """How many there are. Known once opened."""
        ...

    async def open(self, partitions: int | None = None) -> None:
        """Connect; make the schema where there is none, bring an older one up to date.

        Args:
            partitions: How many it is to have; None takes what is there, or 1.

        Raises:
            StoreInvalid: no store, a newer schema, or other partitions while rows wait or a relay leads.
        """
        ...

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """Store all or none, in this order; returns when they are committed.

        Raises:
            OutboxFull: they would go past the quota; nothing was stored.
            StoreInvalid: it has other partitions by now; nothing was stored.
            DeliveryUnknown: the commit was not answered: they may be stored.
        """
        ...

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """Take or renew the lead of a partition, for ``lease`` seconds.

        Args:
            partition: From 0.
            owner: Names the relay, another in each process.
            lease: Seconds.
            above: The epoch has to be greater than this one: the broker has seen it.

        Returns:
            None while another owner's lease runs. The same epoch for a renewal, a greater one for a take-over.
        """
        ...

    async def resign(self, lead: Lead) -> None:
        """End the lease, so that another relay need not wait for it. Nothing happens where it is lost already."""
        ...

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """Rows to send next: those that have a sequence already, then the oldest pending ones, which get theirs now.

        They are ``sending`` from then on, with one more attempt, under this lead. Empty while the first of them waits
        for its next attempt. A new sequence is above the last one and not below the store's clock in microseconds, so
        that a store that was restored from an older copy gives none for a second time.

        Args:
            lead: Of their partition.
            limit: The most rows; a store may give fewer where they are large.
            sent: What to :meth:`settle` before, in the same transaction.
            dead: The same.

        Raises:
            LeadLost: another relay leads.
        """
        ...

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """Mark rows, by their id, as ``sent``; or as ``dead``, with the error.

        Only those that are ``sending`` and were taken under this very lead.

        Raises:
            LeadLost: another relay leads.
        """
        ...

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """Put rows back to ``pending``, their sequences kept, for another attempt after ``delay`` seconds; as :meth:`settle`.

        Raises:
            LeadLost: another relay leads.
        """
        ...

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """Give rows that were taken once, and all later ones, new sequences above this one: the broker was ahead.

        That is where a store was restored from an older copy and its clock was set back, too.

        Raises:
            LeadLost: another relay leads.
        """
        ...

    async def forget(self, *, retain: float, limit: int = 1000) -> int:
        """Delete the oldest rows that were sent more than ``retain`` seconds ago; how many, at most ``limit``."""
        ...

    async def status(self) -> OutboxStatus:
        """What there is now."""
        ...

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """Rows in a state, by id, above ``after``."""
        ...

    async def retry(self, rows: Collection[int] | None = None) -> int:
        """Make dead rows pending again, as if never taken, all of them or these; how many."""
        ...

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """Make rows pending again that were sent from ``since`` on and before ``before``; how many, at most ``limit``.

        As if never taken: they get new sequences, so that they are sent again, before what has not been taken yet.
        """
        ...

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """Delete rows that have been in a state since before this time; how many, at most ``limit``."""
        ...

    async def aclose(self) -> None:
        """Close what was opened. May be called twice."""
        ...


@runtime_checkable
class SessionStore(OutboxStore, Protocol):
    """A store in the host's own database, which can store in the host's own transaction.

    Attributes:
        on_commit: Called, in the loop's thread, when such a transaction was committed.
    """

    on_commit: Callable[[], object] | None

    @property
    def in_session(self) -> bool:
        """Whether what this task adds now is stored in a session of the host's."""
        ...

    async def add_in(self, session: Any, messages: Sequence[Packed], quota: Quota) -> None:
        """Store in the transaction of a session, which is not committed here.

        Raises:
            OutboxFull: they would go past the quota; nothing was stored.
        """
        ...


class Scope(Protocol):
    """One unit of work in a container: what is registered as scoped is made once in it, and closed with it."""

    async def resolve(self, cls: type[T], /) -> T:
        """An object of this class, with its dependencies; new or shared, as the container was told.

        One call at a time. What a constructor or factory of the host raises comes out as it is.

        Raises:
            Unresolvable: the container has no such class, or misses one of its dependencies.
        """
        ...


@runtime_checkable
class Container(Protocol):
    """A dependency-injection container, as one of the modules in ``silbo.containers`` adapts it."""

    def scope(self) -> AbstractAsyncContextManager[Scope]:
        """A new scope, open while it is entered.

        Leaving closes what was made in it, told of the error that ended it, if one did. Entered and left by the same
        task, unless a ``concurrent`` listener is the first to need it.
        """
        ...
