"""The seams: what an adapter has to offer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from silbo.errors import Gap, MessageRefused
    from silbo.message import Delivery, Message

__all__ = [
    "Container",
    "Inbox",
    "JoiningPublisher",
    "Promises",
    "Publisher",
    "Receiver",
    "Scope",
    "Sequenced",
    "SequencedPublisher",
    "Subscription",
]

T = TypeVar("T")


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
