"""A plugin of the host. All it knows is the events and the dispatcher it is given: `add_listener` is its whole interface."""

import re

from examples.meetings.events import MEETING_JOINED, MEETING_RENAMED, MeetingJoined, MeetingRenamed
from silbo import IAsyncEventDispatcher

BANNED = frozenset({13, 666})


def install(dispatcher: IAsyncEventDispatcher) -> None:
    """Both run before the host's own listeners (lower runs first), so that those see what these made of the event."""
    dispatcher.add_listener(MEETING_JOINED, refuse_banned, priority=-10)
    dispatcher.add_listener(MEETING_RENAMED, add_cost_centre, priority=-10)


async def refuse_banned(event: MeetingJoined) -> None:
    """Nobody after this listener hears of it: neither the host nor another program."""
    if event.user_id in BANNED:
        event.stop_propagation()


async def add_cost_centre(event: MeetingRenamed) -> None:
    """`[sales] Weekly numbers` is paid for by sales."""
    if found := re.match(r"\[(.+?)\]", event.title):
        event.cost_centre = found[1]
