"""An event of this process as the cause of what its listeners send: only where a bridge hears its name, so others pay nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from silbo._causes import CAUSATION, CORRELATION, Cause, cause
from silbo.dispatch.options import Listener
from silbo.event import kind_of

__all__ = ["EventCause", "is_cause", "may_leave", "run_as_cause"]


class EventCause:
    """An event that may leave the process, and whose listeners run.

    Attributes:
        event: The event.
        outer: The cause of the event; None if there is none.
    """

    __slots__ = ("event", "outer")

    def __init__(self, event: Any, outer: Cause | None) -> None:
        self.event = event
        self.outer = outer

    def follow(self) -> dict[str, str]:
        """Return the headers of a message that this event has caused: its correlation id and its causation id."""
        identity = str(self.event.event_id)
        own: Any = getattr(self.event, "__silbo_headers__", None)  # the host's correlation id goes before all others
        correlation: str | None = own.get(CORRELATION) if type(own) is dict else None
        if correlation is None:
            correlation = identity if self.outer is None else self.outer.follow()[CORRELATION]
        return {CORRELATION: correlation, CAUSATION: identity}


def may_leave(event: object) -> bool:
    """Return True for an event of a kind that leaves."""
    return kind_of(type(event)) in ("notification", "ecst")


def is_cause(event: object) -> bool:
    """Return True for an event that may leave. Of a received one, its message is the cause."""
    return getattr(event, "origin", None) is None and may_leave(event)


def run_as_cause(listeners: Sequence[Listener]) -> Listener:
    """Return a listener that runs others in order, as a direct dispatch does; what they send has the event as its cause."""

    async def run(event: Any) -> None:
        token = cause.set(EventCause(event, cause.get())) if is_cause(event) else None
        try:
            for listener in listeners:
                await listener(event)
                if event.__silbo_stopped__:
                    break
        finally:
            if token is not None:
                cause.reset(token)

    return run
