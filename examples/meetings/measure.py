"""What the demo counts and times. Nothing of it is needed in an application."""

from datetime import UTC, datetime
from typing import Any

from silbo import FIRST, ECSTEvent, Message, NotificationEvent, on


class Heard:
    """A subscriber that notes every event that comes to a dispatcher, before any other listener sees it."""

    def __init__(self) -> None:
        self.event_ids: list[str] = []
        self.milliseconds: list[float] = []
        """Since the event was dispatched, here or in another process of this machine."""

    @on("**", priority=FIRST)
    async def note(self, event: NotificationEvent | ECSTEvent) -> None:
        """Both kinds carry their id and the time of their dispatch."""
        self.event_ids.append(str(event.event_id))
        self.milliseconds.append((datetime.now(UTC) - event.event_timestamp).total_seconds() * 1000)


class Counting:
    """A publisher around another one: anything with this shape can be given to a `Bridge`."""

    def __init__(self, publisher: Any) -> None:
        self._publisher = publisher
        self.app: str = publisher.app
        self.sent = 0
        """Messages that the broker has confirmed."""

    async def publish(self, *messages: Message) -> None:
        """Send and count."""
        await self._publisher.publish(*messages)
        self.sent += len(messages)

    async def aclose(self) -> None:
        """Close the other one."""
        await self._publisher.aclose()
