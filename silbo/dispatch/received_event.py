"""The dispatch of an event that was received: a failure of one of its listeners fails it, whatever policy isolates the listener."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final, NoReturn, Protocol

from silbo._whistle import IAsyncEventDispatcher
from silbo.event import LIMITED, Event, set_mark

__all__ = ["Received", "dispatch_received", "listener_timeout", "received"]


class OnceListener(Protocol):
    """A listener with ``once=True``."""

    def end_once(self, *, done: bool) -> None:
        """End its run as part of a delivery, which is done or has failed."""
        ...


class Received:
    """An event that was received, in its dispatch.

    Attributes:
        event: The event.
        name: The name that it was received under; None when its dispatch is over.
        timeout: Seconds that each listener may run that has no limit of its own; None for no limit.
        isolated: Errors of listeners that went to a callable policy; None if there are none.
        once: Listeners with ``once=True`` that have run; None if there are none.
    """

    __slots__ = ("event", "isolated", "name", "once", "timeout")

    def __init__(self, event: object, name: object, timeout: float | None = None) -> None:
        self.timeout = timeout
        self.begin(event, name)

    def begin(self, event: object, name: object) -> None:
        """Take the next event, if the one before is done."""
        self.event = event
        self.name = name
        self.isolated: list[Exception] | None = None
        self.once: list[OnceListener] | None = None
        if self.timeout is not None and isinstance(event, Event):
            set_mark(event, "__silbo_phase__", LIMITED)  # adispatch then leaves the event to _dispatch

    def has(self, event: object) -> bool:
        """Return True in the event's dispatch under its own name: a listener may dispatch it on, under another."""
        return self.event is event and getattr(event, "name", None) == self.name

    def hold(self, listener: OnceListener) -> None:
        """Let a ``once`` listener be registered until :meth:`end`."""
        self.once = [*(self.once or ()), listener]

    def end(self, *, done: bool) -> None:
        """Unregister the ``once`` listeners that have run; or let them run again, if the delivery is not done."""
        self.name = None  # the event may be dispatched again, by a task that a listener has left behind
        held, self.once = self.once, None
        for listener in held or ():
            listener.end_once(done=done)

    def raise_isolated(self) -> NoReturn:
        """Raise the one isolated error, or all of them.

        Raises:
            ExceptionGroup: There are several.
            Exception: The one.
        """
        errors = self.isolated or []
        if len(errors) == 1:
            raise errors[0]
        raise ExceptionGroup(f"{len(errors)} listeners of {getattr(self.event, 'name', '')!r} failed", errors)


received: Final[ContextVar[Received | None]] = ContextVar("silbo_received", default=None)
"""The received event whose dispatch this code runs in. Events that its listeners dispatch are not received."""


async def dispatch_received(dispatcher: IAsyncEventDispatcher, dispatched: Received) -> Any:
    """Dispatch an event that was received. All listeners run that their dispatcher isolates, then their errors are raised.

    After an error its ``once`` listeners may run again. Else the caller ends the delivery with ``dispatched.end(...)``.

    Args:
        dispatcher: Any dispatcher; the errors that a foreign one isolates are not known.
        dispatched: The event.

    Returns:
        The event.

    Raises:
        ExceptionGroup: Several errors were isolated, or one was and another ended the dispatch.
        Exception: The one error.
    """
    token = received.set(dispatched)
    try:
        try:
            await dispatcher.adispatch(dispatched.name, dispatched.event)
        except Exception as error:
            if not dispatched.isolated:
                raise
            dispatched.isolated.append(error)
        if dispatched.isolated:
            dispatched.raise_isolated()
    except BaseException:
        dispatched.end(done=False)
        raise
    finally:
        received.reset(token)
    return dispatched.event


def listener_timeout(event: object) -> float | None:
    """Return the seconds that each listener of a received event may run; None for no limit."""
    dispatched = received.get()
    return dispatched.timeout if dispatched is not None and dispatched.has(event) else None
