"""The wait until nothing is running, waiting or due."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from silbo._checks import check_seconds
from silbo.bridge import Bridge
from silbo.consumer.consumer import Consumer
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.observers import Dispatch
from silbo.dispatch.waterfall import draw_listener
from silbo.errors import NotSettled
from silbo.outbox.outbox import Outbox
from silbo.testing.clock import Clock
from silbo.testing.recorded_dispatch import RecordedDispatch

__all__ = ["Watched", "settle"]


@dataclass(slots=True)
class Watched:
    """The objects whose work is waited for, each by its id, and the dispatches that run."""

    open_dispatches: Mapping[Dispatch, RecordedDispatch]
    dispatchers: dict[int, AsyncEventDispatcher] = field(default_factory=dict)
    bridges: dict[int, Bridge] = field(default_factory=dict)
    publishers: dict[int, Any] = field(default_factory=dict)
    consumers: dict[int, Consumer] = field(default_factory=dict)


async def settle(watched: Watched, within: float, clock: Clock | None) -> None:
    """Wait until nothing is running, waiting or due: see :meth:`silbo.testing.EventRecorder.settle`."""
    until = time.monotonic() + check_seconds("within", within)
    loop: Any = asyncio.get_running_loop()
    ready = getattr(loop, "_ready", None)
    if ready is None:
        raise TypeError(f"{loop!r} does not tell if it has something to do: run the test on asyncio's own event loop")
    quiet = 0
    while quiet < 2:  # the work that is looked at by awaiting may have changed meanwhile
        stored = await _find_stored(watched, clock)
        # After this turn everything that was ready has run, and so have the timers that are due. What they, or a socket or a
        # thread, have made ready stands behind this task.
        await asyncio.sleep(0)
        running = [*_find_running(watched), *stored]
        quiet = 0 if ready or running else quiet + 1
        if quiet:
            continue
        if time.monotonic() > until:
            if not running:
                running = ["the event loop, which always has something to do: a task that yields for ever"]
            raise NotSettled(within, (*running, *_describe_clock(clock)))
        if not ready:  # a socket or a thread is waited for; the loop's own time may stand still
            time.sleep(0.001)  # noqa: ASYNC251


def _find_running(watched: Watched) -> list[str]:
    """Return the words for what runs, or waits for its turn."""
    spawned = sum(len(dispatcher._background) for dispatcher in watched.dispatchers.values())  # noqa: SLF001
    return [
        *(_describe_dispatch(recorded) for recorded in watched.open_dispatches.values()),
        *([f"{spawned} spawned tasks"] if spawned else []),
        *(
            f"{bridge.under_way} messages under way from a bridge to {type(bridge.publisher).__name__}"
            for bridge in watched.bridges.values()
            if bridge.under_way
        ),
        *(
            f"{consumer.in_hand} deliveries in the hand of a consumer"
            for consumer in watched.consumers.values()
            if consumer.in_hand
        ),
    ]


async def _find_stored(watched: Watched, clock: Clock | None) -> list[str]:
    """Return the words for messages in outboxes that the relay of this process has to send now."""
    found: list[str] = []
    for outbox in watched.publishers.values():
        if not isinstance(outbox, Outbox) or not outbox.is_relaying:
            continue
        status = await outbox.status()
        waiting = status.counts["pending"] + status.counts["sending"]
        now = time.time() if clock is None else clock()
        is_due = status.counts["sending"] or status.next_attempt_at is None or status.next_attempt_at.timestamp() <= now
        if waiting and is_due:
            found.append(f"{waiting} messages wait in an outbox to be sent")
    return found


def _describe_dispatch(recorded: RecordedDispatch) -> str:
    where = ", ".join(draw_listener(each) for each in recorded.traced.listeners if each.outcome == "running")
    return f"the dispatch of {recorded.dispatch.name!s}" + (f", in {where}" if where else "")


def _describe_clock(clock: Clock | None) -> list[str]:
    if clock is None or clock.next_timer is None:
        return []
    return [f"(the clock stands still, and the next timer is due in {clock.next_timer:g} s: clock.advance(...))"]
