"""The part that the receivers of Pub/Sub and of its sharded channels share: Redis keeps none of their messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Sequence

from silbo._loops import LoopBinding
from silbo.brokers.redis.connection import Client, describe_server
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Batch, Delivery, Format

__all__ = ["PubSubReceiver"]


class PubSubReceiver(ABC):
    """A receiver of messages that Redis does not keep: a :class:`~silbo.protocols.BatchReceiver` that settles nothing.

    Args:
        client: The program's client.
        format: Decodes the messages.
        timeout: Seconds in which a subscription is confirmed, and a PING is answered.
    """

    skips_own_instance = True
    ack_delay = 0.0  # nothing is acknowledged
    keep_every: float | None = None

    def __init__(self, client: Client, format: Format, timeout: float) -> None:  # noqa: A002  # the word of every broker
        self._client = client
        self._server = describe_server(client)
        self._format = format
        self._timeout = timeout
        self._ready: deque[Batch | Gap] = deque()
        self._closed = False
        self._binding = LoopBinding("PubSubSubscription")

    @abstractmethod
    async def _fill(self, limit: int) -> None:
        """Add to ``_ready`` what has come, and wait for it if nothing is there."""

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """See :class:`~silbo.protocols.Receiver`."""
        items = await self.receive_batches(limit)
        return [each for item in items for each in ((item,) if isinstance(item, Gap) else item)]

    async def receive_batches(self, limit: int) -> Sequence[Batch | Gap]:
        """See :class:`~silbo.protocols.BatchReceiver`."""
        self._binding.check("receive")
        if self._closed:
            raise BrokerUnavailable("the subscription is closed")
        await self._fill(limit)
        items: list[Batch | Gap] = []
        while self._ready and limit > 0:
            item = self._ready.popleft()
            many = 1 if isinstance(item, Gap) else len(item)
            if not isinstance(item, Gap) and many > limit:
                self._ready.appendleft(item.cut(limit, many))
                item = item.cut(0, limit)
            limit -= many
            items.append(item)
        return items

    async def ack(self, *deliveries: Delivery | Batch) -> None:  # noqa: B027  # no receiver of Pub/Sub has anything to do
        """Do nothing: Redis keeps no message of Pub/Sub, so the methods below have nothing to do either."""

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """Return nothing: no delivery is another consumer's."""
        return ()

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        """Return None for each: no other consumer can have it."""
        return [None] * len(deliveries)

    async def count(self, delivery: Delivery, *, error: str = "") -> int:
        """Return the attempt: it is the only one."""
        return delivery.attempt

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """Return False: Pub/Sub has no dead letters."""
        return False

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connections. May be called twice."""
