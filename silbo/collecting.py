"""What a handler puts into its ``events`` while it is at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from silbo.errors import HandlerShared

__all__ = ["at_work"]


@dataclass(slots=True, eq=False)
class _Work:
    """A handler that collects events, while it is at work: in how many places, and what it had before."""

    stale: list[Any]
    places: int = 0
    shared: bool = False


_working: dict[int, _Work] = {}
"""By ``id``: a handler need not be hashable."""


@contextmanager
def at_work(handler: Any) -> Generator[list[Any]]:
    """Gives the list in which the handler's new events are afterwards; in the handler itself none are left."""
    work = _working.get(id(handler))
    if work is None:  # what it has now is of a run that failed, or was sent: the container reuses it
        _clear(handler)
        work = _working[id(handler)] = _Work(stale=list(handler.events or ()))
    work.places += 1
    work.shared |= work.places > 1
    fresh: list[Any] = []
    try:
        yield fresh
        counted = Counter(map(id, work.stale))
        for event in handler.events or ():
            if counted[id(event)]:
                counted[id(event)] -= 1  # a property that gives copies can't be cleared
            else:
                fresh.append(event)
    finally:
        work.places -= 1
        if not work.places:
            del _working[id(handler)]
            _clear(handler)
    if fresh and work.shared:
        raise HandlerShared(type(handler))


def _clear(handler: Any) -> None:
    events = handler.events
    if isinstance(events, list):
        events.clear()
