"""Health: the state of a consumer, a relay, an outbox or a bridge at one moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final, Literal, Protocol

__all__ = ["LOOKED_EVERY", "HasHealth", "Health", "LastError", "find_latest", "keep_refreshing", "to_moment"]

LOOKED_EVERY: Final = 1.0
"""Seconds between two looks at what is in memory."""


@dataclass(frozen=True, slots=True)
class LastError:
    """The last error of one part of a program.

    Attributes:
        text: Its type and text, on one line.
        at: The time: aware, UTC.
    """

    text: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The state of a consumer, a relay, an outbox or a bridge at one moment. All times are aware, UTC.

    Attributes:
        part: The kind of object.
        name: The consumer's group, or the program's app.
        is_running: True from the start of its work until it is stopped.
        is_stopping: True from its stop until its work has ended: it finishes what it has in hand.
        is_connected: True if it has connected, and the broker and the store have answered its last call.
        away_since: The time since which the broker or the store does not answer; None while both do.
        away: The addresses that a consumer can't read at the moment while it reads others: their node is down, say. It counts
            as connected.
        has_room: False if it takes nothing more: nearly all that a consumer may have in hand waits for another attempt; an
            outbox has reached its quota; 10,000 messages of a bridge are under way.
        received_at: The time at which a consumer last received something, or a relay last took rows; None before the first.
        in_hand: A consumer's deliveries that wait for their turn or are in work; messages that a relay is sending, or that a
            bridge with ``wait=False`` has under way.
        oldest_at: The time since which the oldest of a consumer's deliveries in hand is known to be there: each call looks, so
            it is as exact as the calls are frequent. Of a relay and an outbox the time at which the oldest message was
            stored that is not sent yet, as of the last ``refresh_health()``. None if there is none.
        waiting_for_retry: A consumer's deliveries that wait for their next attempt; None for the others.
        waiting_for_newer: A consumer's deliveries of a newer version than it knows: they wait for another consumer of the group.
            None for the others.
        slow: A consumer's listeners that run now, and have run for longer than ``slow_after``; None for the others.
        lag: Messages that a consumer's group was not given yet, or that an outbox has not sent yet, as of the last
            ``refresh_health()``; None if they were not counted.
        unheard: A consumer's deliveries that no listener is meant for, since it was made: they were acknowledged. None for the
            others.
        leads: The shards that a consumer reads, by the keys of their streams; None if its subscription has none.
        last_error: The last error; None if there was none.
    """

    part: Literal["consumer", "relay", "outbox", "bridge"]
    name: str
    is_running: bool = True
    is_stopping: bool = False
    is_connected: bool
    away_since: datetime | None
    away: tuple[str, ...] = ()
    has_room: bool = True
    received_at: datetime | None = None
    in_hand: int = 0
    oldest_at: datetime | None = None
    waiting_for_retry: int | None = None
    waiting_for_newer: int | None = None
    slow: int | None = None
    lag: int | None = None
    unheard: int | None = None
    leads: tuple[str, ...] | None = None
    last_error: LastError | None

    @property
    def is_ready(self) -> bool:
        """True if it runs, is connected and has room."""
        return self.is_running and self.is_connected and self.has_room

    def explain(self) -> str:
        """Return the reason why it is not ready; ``ready`` if it is."""
        if not self.is_running:
            return "stopping" if self.is_stopping else "not running"
        if not self.is_connected:
            return f"not connected since {self.away_since:%Y-%m-%dT%H:%M:%SZ}" if self.away_since else "not connected"
        if self.has_room:
            return "ready"
        if self.waiting_for_newer:
            return f"no room: {self.waiting_for_newer} in hand wait for a consumer that knows their newer version"
        return "no room"


class HasHealth(Protocol):
    """A consumer, a relay, an outbox or a bridge."""

    def health(self) -> Health:
        """Return the state now, from memory: nothing is asked, so the call does not wait."""
        ...

    async def refresh_health(self) -> None:
        """Read the figures that only the broker or the store knows, for :meth:`health`."""
        ...


async def keep_refreshing(
    list_parts: Callable[[], Iterable[HasHealth]], every: float, report: Callable[[Exception], object]
) -> None:
    """Refresh the health of parts, each once in ``every`` seconds, and soon after it has connected; does not end by itself.

    A consumer's group is made when it connects: before, there is no lag to read, and an outage has left none.

    Args:
        list_parts: Returns the parts; they may become more.
        every: Seconds.
        report: Is given an error of a part; the others go on.
    """
    loop = asyncio.get_running_loop()
    seen: dict[int, tuple[float, bool]] = {}  # by id: the time of the last refresh, and if it was connected
    while True:
        for part in list_parts():
            try:
                refreshed_at, was_connected = seen.get(id(part), (-every, False))
                is_connected = part.health().is_connected
                if is_due := loop.time() - refreshed_at >= every or (is_connected and not was_connected):
                    refreshed_at = loop.time()
                seen[id(part)] = refreshed_at, is_connected
                if is_due:
                    await part.refresh_health()
            except Exception as error:  # noqa: BLE001  # these figures are missing, and the program goes on
                report(error)
        await asyncio.sleep(min(every, LOOKED_EVERY))


def to_moment(at: float | None) -> datetime | None:
    """Return the time of a ``monotonic()`` time; None of None."""
    return None if at is None else datetime.now(UTC) - timedelta(seconds=monotonic() - at)


def find_latest(*errors: LastError | None) -> LastError | None:
    """Return the latest of some errors; None if there is none."""
    return max((error for error in errors if error is not None), key=lambda error: error.at, default=None)
