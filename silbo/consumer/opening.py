"""How a consumer comes by its receiver: at once, or as soon as the broker is there."""

from __future__ import annotations

import asyncio
from typing import Final

from silbo._reports import Outage
from silbo._retry import Backoff, end, leave_if_cancelled, pause
from silbo.errors import BrokerUnavailable
from silbo.protocols import Receiver, Subscription

__all__ = ["BROKER", "GRACE", "Opening"]

BROKER: Final = Backoff(initial=0.05, cap=1.0)
"""Between two tries of a broker that is away."""
GRACE: Final = 0.5
"""Seconds that a stop allows the broker to answer."""


class Opening:
    """A subscription from its description to its receiver.

    Attributes:
        receiver: Once it is open.
    """

    def __init__(self, subscription: Subscription, broker: Outage) -> None:
        self.receiver: Receiver | None = None
        self._subscription, self._broker = subscription, broker
        self._stopping, self._over = asyncio.Event(), asyncio.Event()

    async def at_once(self) -> None:
        """Open it.

        Raises:
            BrokerUnavailable: the broker can't be reached.
        """
        try:
            self.receiver = await self._subscription.open()
        finally:
            self.stop()

    async def at_last(self) -> None:
        """Open it however long the broker is away; not at all where :meth:`stop` comes first."""
        trying = asyncio.create_task(self._try())
        try:
            await self._over.wait()
            await end([trying], GRACE)
        finally:
            await end([trying], 0)
        if not trying.cancelled():
            trying.result()

    async def _try(self) -> None:
        outages = 0
        try:
            while self.receiver is None and not self._stopping.is_set():
                leave_if_cancelled()
                try:
                    with self._broker.watched("open"):
                        self.receiver = await self._subscription.open()
                except BrokerUnavailable:
                    outages += 1
                    await pause(BROKER.delay(outages), self._stopping)
        finally:
            self.stop()

    def stop(self) -> None:
        """Try no more: who waits learns what came of it."""
        self._stopping.set()
        self._over.set()

    async def wait(self) -> None:
        """Wait until it is open.

        Raises:
            BrokerUnavailable: that failed, or was stopped before.
        """
        await self._over.wait()
        if self.receiver is None:
            raise BrokerUnavailable("the consumer was not connected")

    async def aclose(self) -> None:
        """Close the receiver, where there is one."""
        if self.receiver is not None:
            await self.receiver.aclose()
