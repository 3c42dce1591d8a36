"""The event classes, and the names they are dispatched under.

The host, its plugins and the other programs share only this module.
"""

from dataclasses import dataclass
from typing import Any

from silbo import ECSTEvent, EventName, NotificationEvent


@dataclass
class MeetingJoined(NotificationEvent):
    """Somebody wants to join; a listener that stops it keeps them out."""

    meeting_id: int
    user_id: int


@dataclass
class MeetingLeft(NotificationEvent):
    """Somebody left."""

    meeting_id: int
    user_id: int


@dataclass
class MeetingRenamed(ECSTEvent):
    """A meeting has another title; this event carries the new state itself."""

    meeting_id: int
    title: str
    cost_centre: str | None = None  # for plugins to fill in


MEETING_JOINED = EventName("meeting.joined", MeetingJoined, key="meeting_id")
MEETING_LEFT = EventName("meeting.left", MeetingLeft, key="meeting_id")
MEETING_RENAMED = EventName("meeting.renamed", MeetingRenamed, key="meeting_id")

EVENTS: tuple[EventName[Any], ...] = (MEETING_JOINED, MEETING_LEFT, MEETING_RENAMED)
