"""Events that handlers collect in their ``events``: each is taken once, when its handler has succeeded."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from silbo.errors import HandlerShared

__all__ = ["CollectedEvents", "declares_events"]


class _Place:
    """A handler, or a list that it gives, while at least one run of a handler uses it.

    Attributes:
        of: The handler or the list. Kept here, so that its ``id`` is not given to another object.
        runs: Number of the runs.
        shared: True from the moment when there were two runs.
        taken: True when a run took events while the place was shared: nobody knows whose they were.
    """

    def __init__(self, of: Any) -> None:
        self.of = of
        self.runs = 0
        self.shared = False
        self.taken = False


_places: dict[int, _Place] = {}
"""The handlers and lists in use, by their ``id``: they need not be hashable."""


class CollectedEvents:
    """The events that the handlers of one scope collect."""

    def __init__(self) -> None:
        self._lists: dict[int, tuple[list[Any], object]] = {}  # by id, each with the dispatcher of its events
        self._shown: dict[int, object] = {}  # by id, events that were taken and that a tuple or a copy still shows

    @contextmanager
    def collect(self, handler: object, dispatcher: object) -> Generator[list[Any]]:
        """Yield a list that holds the handler's events after the block, in the order of its ``events``.

        If the block fails, the events that came in it are dropped; events that were there before stay for another try.

        Args:
            handler: Collects while the block runs.
            dispatcher: Gets events that are added to the handler's list after the block: see :meth:`take_late`.

        Raises:
            HandlerShared: There are events, and another run had the same handler or list at the same time.
            TypeError: ``events`` is not a list or tuple, has something else than events in it, or shows events of an earlier
                run in a tuple or a copy.
        """
        run = _Run(handler)
        events: list[Any] = []
        try:
            yield events
            events += run.take(self._shown)
        except BaseException:
            run.drop(self._shown)
            raise
        finally:
            run.end()
            self._lists.update((id(given), (given, dispatcher)) for given in run.lists)

    def may_grow(self) -> bool:
        """Return True if a handler has given a list: events may be added to it later."""
        return bool(self._lists)

    def take_late(self) -> list[tuple[Any, Any]]:
        """Return the events that were added to lists after their handlers had ended, each behind its dispatcher.

        The lists are empty then. A list that a handler uses at the moment is left alone.
        """
        late = []
        for key, (events, dispatcher) in self._lists.items():
            if key not in _places:
                late += [(dispatcher, event) for event in events]
                events.clear()
        return late

    def close(self) -> None:
        """Empty the lists, so that a handler that is used again never sends an old event."""
        self.take_late()
        self._lists.clear()
        self._shown.clear()


class _Run:
    """One handler at work.

    Attributes:
        lists: The lists that the handler gave: a second one if it has replaced the first.
    """

    def __init__(self, handler: object) -> None:
        self.lists: list[list[Any]] = []
        self._handler = handler
        self._places: dict[int, _Place] = {}
        begun = _read(handler)
        self._before = [*begun]
        if begun and not (isinstance(begun, list) and _read(handler) is begun):
            name = type(handler).__qualname__
            raise TypeError(
                f"{name}.events is not empty when {name} begins, and events can't be removed from a tuple or a copy: give "
                f"the list itself, 'return self._events', or register {name} as transient, so that each run has a new one"
            )
        self._use(handler)
        self._use(begun)

    def take(self, shown: dict[int, object]) -> list[Any]:
        """Return the events of the handler, and empty its list. Events that it still shows are added to ``shown``."""
        given = _read(self._handler)
        events = [*given]
        self._use(given)
        if isinstance(given, list):
            given.clear()
        again = any(id(event) in shown for event in events)
        if events and _read(self._handler):
            shown.update((id(event), event) for event in events)
        for place in self._places.values():
            place.taken |= place.shared and bool(events)
        for place in self._places.values():
            if again or place.taken:
                raise HandlerShared(
                    type(self._handler), "object" if place.of is self._handler and not again else "list"
                )
        for event in events:
            _check_event(self._handler, event)
        return events

    def drop(self, shown: dict[int, object]) -> None:
        """Remove the events that came since the run began."""
        with suppress(Exception):  # the error of the handler is the one to be raised
            self.take(shown)
        for given in self.lists[:1]:
            given[:] = self._before

    def end(self) -> None:
        """Free the handler and its lists for other runs."""
        for key, place in self._places.items():
            place.runs -= 1
            if not place.runs:
                del _places[key]

    def _use(self, of: object) -> None:
        if id(of) in self._places or isinstance(of, tuple):  # a tuple is never emptied: handlers may well share it
            return
        place = self._places[id(of)] = _places.setdefault(id(of), _Place(of))
        place.runs += 1
        place.shared |= place.runs > 1
        if isinstance(of, list):
            self.lists.append(of)


def declares_events(cls: type) -> bool:
    """Return True if a class has ``events``: more than an attribute that each of its objects has on its own."""
    return hasattr(cls, "events") and not inspect.ismemberdescriptor(getattr(cls, "events", None))


def _read(handler: Any) -> Sequence[Any]:
    declared = declares_events(type(handler))
    events = handler.events if declared else getattr(handler, "events", None)
    if isinstance(events, list | tuple):
        return events
    # A mere attribute of this name that is not a sequence of objects is the host's own.
    if events is None or not (declared or (isinstance(events, Sequence) and not isinstance(events, str | bytes))):
        return ()
    if inspect.iscoroutine(events):
        events.close()
    raise TypeError(
        f"{type(handler).__qualname__}.events gives {events!r:.80}, neither a list nor a tuple: make it a property, no "
        "method, not async and without 'yield', that returns a list of events: 'return self._events'"
    )


def _check_event(handler: object, event: object) -> None:
    cls = type(event)
    if cls.__module__ == "builtins" and not isinstance(event, BaseException):  # plain objects may be events
        raise TypeError(
            f"{type(handler).__qualname__}.events has {event!r:.80} in it, which is no event: put objects of event classes there"
        )
