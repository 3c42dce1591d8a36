"""The seams: what an adapter has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from silbo.errors import Gap
    from silbo.message import Delivery, Message, Origin

__all__ = ["Format", "Publisher", "Receiver", "Subscription"]


class Format(Protocol):
    """How a message looks as bytes."""

    @property
    def names(self) -> Literal["event", "class"]:
        """What ``message_name`` holds on the wire: the event name, or (Diator) the class name."""
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


class Receiver(Protocol):
    """An open subscription, used by one consumer; it acknowledges while it waits for more."""

    @property
    def skips_own_instance(self) -> bool:
        """Whether what this very process sent is never wanted (true where everybody hears everything)."""
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

    async def aclose(self) -> None:
        """Close the connection; what is not acknowledged stays with the broker. May be called twice."""
        ...


class Subscription(Protocol):
    """A plain description of what to receive: nothing happens until a consumer opens it."""

    @property
    def app(self) -> str:
        """The program's name."""
        ...

    async def open(self) -> Receiver:
        """Connect and subscribe; returns when the broker has confirmed it.

        Raises:
            BrokerUnavailable: the broker can't be reached.
        """
        ...
