"""The interfaces between silbo and its adapters: publishers, subscriptions, inboxes and containers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from silbo.errors import Gap, MessageRefused
    from silbo.message import Batch, Delivery, Message

__all__ = [
    "BatchInbox",
    "BatchReceiver",
    "Container",
    "Inbox",
    "JoiningPublisher",
    "MeasuredSubscription",
    "Promises",
    "Publisher",
    "Receiver",
    "Scope",
    "Sequenced",
    "SequencedPublisher",
    "SharedReceiver",
    "Subscription",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Promises:
    """The promises that publishers differ in; a publisher declares them as its attribute ``promises``.

    All publishers promise that no message is lost without an error, and the meaning of each error. A publisher that declares
    nothing promises the most: the defaults.

    Attributes:
        order: The messages that arrive in the order of their publishing: ``"all"``, those of one ``"key"``, or ``"none"``.
        keeps: True if published messages still reach consumers after the broker went away and came back.
    """

    order: Literal["all", "key", "none"] = "all"
    keeps: bool = True


@runtime_checkable
class Publisher(Protocol):
    """A broker that takes messages, or an outbox in front of a broker.

    It may also have a method ``address_of(message)``, which returns the stream, channel or topic that a message goes to: traces
    tell it. And an attribute ``format``, its :class:`~silbo.message.Format`: a bridge refuses routes with headers that the format can't
    carry. And an attribute ``has_shards``, True if a message of a :class:`~silbo.bridge.Route` with ``shards`` goes to one of them: its
    ``to`` is then the shard's address.
    """

    @property
    def app(self) -> str:
        """The name of the program, which consumers see as ``event.origin.app``."""
        ...

    async def publish(self, *messages: Message) -> None:
        """Send messages in this order, and return when the broker has all of them.

        Calls keep the order in which they were made, also if they are not awaited one after another.

        Raises:
            MessageRefused: a message can't be sent; the other messages of the call were sent.
            BrokerUnavailable: no message of the call was sent; safe to repeat.
            DeliveryUnknown: some or all may have arrived; repeating may double them.
        """
        ...

    async def aclose(self) -> None:
        """Finish the publishes in hand, and close the connections that this publisher opened. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Sequenced:
    """The result of :meth:`SequencedPublisher.publish_sequenced`. A sequence in none of the collections was added.

    Attributes:
        known: The sequences that the broker had already; they were not added again.
        refused: The error of each message that can't be sent, by its sequence.
        last: The highest sequence that the broker had before this call; 0 if it had none.
        unsent: The error of each message that did not go, or may not have gone, by its sequence: its address failed while
            others did not. Safe to repeat.
    """

    known: Collection[int] = ()
    refused: Mapping[int, MessageRefused] = field(default_factory=dict)
    last: int = 0
    unsent: Mapping[int, Exception] = field(default_factory=dict)


@runtime_checkable
class SequencedPublisher(Publisher, Protocol):
    """A publisher that adds each numbered message once, also if it is given several times."""

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """Send, in this order, the messages that the broker does not have yet. One call at a time for each source.

        For each source and address the broker keeps ``(epoch, last sequence)``. It takes nothing from an older epoch, and no
        sequence that is not above the last.

        Args:
            source: The name of one partition of one outbox.
            epoch: The epoch of the partition's leader.
            messages: Pairs of a sequence, 1 or more, and its message; sequences ascend. An empty list checks that the broker
                answers, and registers the epoch.

        Raises:
            Fenced: the broker has seen a newer epoch of this source; nothing was sent.
            BrokerUnavailable: nothing was sent. Safe to repeat. Where only some addresses failed, the result says which
                messages are ``unsent``.
            DeliveryUnknown: some or all may have been sent. Safe to repeat with this method.
        """
        ...


@runtime_checkable
class JoiningPublisher(Publisher, Protocol):
    """A publisher that can store messages in a transaction of its caller."""

    @property
    def in_transaction(self) -> bool:
        """True if a message that this task publishes now is committed or rolled back by the caller's transaction."""
        ...


class Receiver(Protocol):
    """An open subscription of one consumer; deliveries may be acknowledged while :meth:`receive` waits.

    It may also have an attribute ``away``, the addresses that can't be read at the moment while others can: the consumer's
    health shows them.
    """

    @property
    def skips_own_instance(self) -> bool:
        """True if messages of this process are always dropped, because every process receives every message."""
        ...

    @property
    def keep_every(self) -> float | None:
        """The most seconds between two calls of :meth:`keep`; None if no other consumer takes deliveries over."""
        ...

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """Wait up to half a second for messages, and return at most ``limit`` of them, possibly none.

        Raises:
            BrokerUnavailable: the connection was lost or refused; the next call connects again.
        """
        ...

    async def ack(self, *deliveries: Delivery) -> None:
        """Tell the broker that these deliveries are done. Does nothing if the broker keeps no deliveries.

        Raises:
            BrokerUnavailable: they are not acknowledged and will come again; safe to repeat.
        """
        ...

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """Tell the broker that these deliveries are still in work, so that no other consumer takes them over.

        Returns:
            The deliveries that another consumer has taken over; don't begin them.

        Raises:
            BrokerUnavailable: the broker was not told; safe to repeat.
        """
        ...

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        """Let the group's other consumers take these deliveries over now, and not this one; :meth:`keep` ends that.

        Until another consumer takes one it stays in hand here, and can be buried.

        Returns:
            For each delivery the seconds since a consumer of the group first offered it, remembered for a day; None if
            another consumer has taken it over, or it is done.

        Raises:
            BrokerUnavailable: some may be offered; safe to repeat.
        """
        ...

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        """Count one attempt of a delivery durably: an attempt that failed, or that a redelivery begins.

        Args:
            delivery: In hand.
            error: Its type and text, for whoever looks for the message, if the attempt has failed; a broker may leave it out.

        Returns:
            The attempts counted so far, this one included.

        Raises:
            BrokerUnavailable: the attempt may have been counted.
            BrokerRefused: it was not counted, while other steps may pass: the broker's memory is full.
        """
        ...

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """Store a delivery as a dead letter and acknowledge it, in one step.

        Returns:
            False if another consumer has it by now, or it is done; then nothing was changed.

        Raises:
            BrokerUnavailable: it may have been stored; safe to repeat.
            BrokerRefused: it was not stored, while other steps may pass: the broker's memory is full.
        """
        ...

    async def aclose(self) -> None:
        """Close the connection; unacknowledged deliveries stay with the broker. May be called twice."""
        ...


@runtime_checkable
class BatchReceiver(Receiver, Protocol):
    """A receiver that gives out batches: a consumer then makes a :class:`~silbo.message.Delivery` only of what fails or waits.

    Attributes:
        ack_delay: Seconds that an acknowledgement may wait for others when nothing is in work.
    """

    ack_delay: float

    async def receive_batches(self, limit: int) -> Sequence[Delivery | Batch | Gap]:
        """Do as :meth:`receive` does. What comes for the first time may come as batches, with ``limit`` deliveries in all.

        Raises:
            BrokerUnavailable: the connection was lost or refused; the next call connects again.
        """
        ...

    async def ack(self, *deliveries: Delivery | Batch) -> None:
        """Tell the broker that these deliveries, and those of these parts of batches, are done.

        Raises:
            BrokerUnavailable: they are not acknowledged and will come again; safe to repeat.
        """
        ...


@runtime_checkable
class SharedReceiver(Receiver, Protocol):
    """A receiver whose addresses come and go while it is open, as the members of a group share them out.

    Attributes:
        on_drop: A consumer sets it: called with an address of which nothing that was received is this consumer's any more. What
            is in work goes on, and nothing of the rest is begun.
        on_give: A consumer sets it: called with an address that is to be given away, again and again until nothing of it is in hand.
            It drops and returns the deliveries that wait for another attempt, with those of their keys behind them.
    """

    on_drop: Callable[[str], object]
    on_give: Callable[[str], Sequence[Delivery]]

    @property
    def leads(self) -> tuple[str, ...]:
        """The addresses that this consumer reads now."""
        ...

    def doubt(self, address: str, epoch: int) -> None:
        """Note that somebody else knows of a later epoch of an address: drop it, and ask for it anew."""
        ...

    def leave(self) -> None:
        """Receive nothing more, and give each address away as soon as nothing of it is in hand."""
        ...


class Subscription(Protocol):
    """A plain description of the messages to receive: it does no I/O until a consumer opens it."""

    @property
    def app(self) -> str:
        """The name of the program."""
        ...

    @property
    def name(self) -> str:
        """The name of the group; empty if the broker has no groups."""
        ...

    async def open(self) -> Receiver:
        """Connect and subscribe, and return when the broker has confirmed the subscription.

        Raises:
            BrokerUnavailable: the broker can't be reached; safe to repeat.
        """
        ...


@runtime_checkable
class MeasuredSubscription(Subscription, Protocol):
    """A subscription that can tell how far its group is behind."""

    async def read_lag(self) -> int:
        """Return the number of messages that the group was not given yet, from a connection of its own.

        Raises:
            BrokerUnavailable: the broker can't be reached, or refuses; safe to repeat.
        """
        ...


class Inbox(Protocol):
    """A store of the publications that a group has handled, so that a redelivery has no second effect."""

    def handling(self, group: str, publication: str) -> AbstractAsyncContextManager[bool]:
        """Return a context manager to enter around the listeners of one delivery.

        Entering gives True if the publication is new, and False if the group has handled it: then run no listener. Leaving
        without an error stores the publication as handled; leaving with an error does not.

        An error of its block has to pass; a consumer takes the delivery for failed also if it does not.

        Raises:
            MessageInvalid: On entering: this publication can never be stored. The delivery becomes a dead letter at once.
            BrokerUnavailable, StoreUnavailable: It can't be asked, or can't store: the consumer waits, and no attempt is used up.
            Exception: On entering, the same. On leaving, the attempt has failed.
        """
        ...


class BatchInbox(Inbox, Protocol):
    """An inbox that a consumer asks about many publications at once, and tells of many, instead of entering ``handling``.

    For one whose memory is no part of the listeners' own transaction. A consumer uses these methods if the inbox's class has
    both; a subclass that overrides ``handling`` has to override them as well, or it is asked by ``handling``.

    If it has a true attribute ``checks_epochs``, publications that came from a shard are each a
    :class:`~silbo.message.LedPublication`. It raises :class:`~silbo.errors.ShardLost` about one whose shard another process leads by now.
    """

    async def find_handled(self, group: str, publications: Sequence[str]) -> Collection[str]:
        """Return those of the publications that the group has handled.

        Raises:
            MessageInvalid: One of them can never be stored. If it is the only one, its delivery becomes a dead letter at once.
            Exception: It can't be asked: the consumer waits, and no attempt is used up.
        """
        ...

    async def remember(self, group: str, publications: Sequence[str]) -> None:
        """Store publications as handled: their listeners have run. It may be called again with the same ones.

        The deliveries are acknowledged afterwards, also after an error: to try them again would double their effects.

        Raises:
            Exception: They are not stored, which is logged.
        """
        ...


class Scope(Protocol):
    """One unit of work in a container: each scoped object is made once in it, and closed with it."""

    async def resolve(self, cls: type[T], /) -> T:
        """Return an object of this class with its dependencies, new or shared as it is registered.

        One call at a time.

        Raises:
            Unresolvable: the container has no such class, or lacks one of its dependencies.
            Exception: whatever a constructor or factory of the host raised, unchanged.
        """
        ...


@runtime_checkable
class Container(Protocol):
    """An adapter of a dependency-injection container; the modules in ``silbo.containers`` have one for each library."""

    def scope(self) -> AbstractAsyncContextManager[Scope]:
        """Return a context manager whose entering opens a new scope.

        Leaving closes the objects made in the scope, and passes them the error that ended it, if any. The same task enters
        and leaves it, unless a ``concurrent`` listener is the first to need it.
        """
        ...
