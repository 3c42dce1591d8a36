"""A plugin of the host. It knows only the events and the dispatcher that it is given, and uses only `add_listener`."""

import re

from examples.meetings.events import MEETING_JOINED, MEETING_RENAMED, MeetingJoined, MeetingRenamed
from silbo import IAsyncEventDispatcher

BANNED = frozenset({13, 666})


def install(dispatcher: IAsyncEventDispatcher) -> None:
    """Add both listeners before the host's own (lower runs first), so that the host sees their changes."""
    dispatcher.add_listener(MEETING_JOINED, refuse_banned, priority=-10)
    dispatcher.add_listener(MEETING_RENAMED, add_cost_centre, priority=-10)


async def refuse_banned(event: MeetingJoined) -> None:
    """Stop the event of a banned user: neither the host nor another program hears it."""
    if event.user_id in BANNED:
        event.stop_propagation()


async def add_cost_centre(event: MeetingRenamed) -> None:
    """Set the cost centre from the title: `[sales] Weekly numbers` is paid by sales."""
    if found := re.match(r"\[(.+?)\]", event.title):
        event.cost_centre = found[1]
