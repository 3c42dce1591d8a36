"""What handlers put into their ``events``: each event is taken once, by one that succeeds, or at the end of the scope."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

from silbo.errors import HandlerShared

__all__ = ["Collecting", "declares_events"]


class _Source:
    """Where events are recorded: a list, perhaps of several handlers; else a handler, from which none can be removed.

    Attributes:
        of: The list, or the handler.
        listed: Whether it is a list: then nobody else shows the same events.
        shown: The list; or what the handler showed when it was last looked at.
        old: Of these, what was taken, or dropped, or there before this scope.
        scopes: Those that know it and are open.
    """

    def __init__(self, of: object) -> None:
        self.of, self.listed = of, isinstance(of, list)
        self.shown: list[Any] = of if isinstance(of, list) else []
        self.old: list[Any] = []
        self.scopes: set[Collecting] = set()

    def waiting(self) -> list[Any]:
        """What nobody has taken yet."""
        self.old = _without(self.shown, _without(self.shown, self.old))  # what is gone may come again
        return _without(self.shown, self.old)

    def remove(self, events: Sequence[Any]) -> None:
        """Nobody is to have these."""
        if self.listed:
            self.shown[:] = _without(self.shown, events)
        else:
            self.old += events


class _Work:
    """A handler at work.

    Attributes:
        before: What waited where it collects when it began.
        shared: What another unit of work has at the same time: "object", the handler, or the "list" that it has; or empty.
        over: Whether it has ended.
    """

    def __init__(self, scope: Collecting, handler: object, source: _Source) -> None:
        self.scope, self.handler, self.source = scope, handler, source
        self.before = source.waiting()
        self.shared = ""
        self.over = False


class _Place:
    """A handler or list, while handlers are at work there: of one unit of work, unless it is contested."""

    def __init__(self) -> None:
        self.works: set[_Work] = set()
        self.contested = False

    def enter(self, work: _Work, what: str) -> None:
        self.works.add(work)
        if self.contested:  # the others know it
            work.shared = what
        elif any(other.scope is not work.scope for other in self.works):
            self.contested = True
            for one in self.works:
                one.shared = what


_sources: dict[int, _Source] = {}
"""By the ``id`` of what they are of, which they hold: neither lists nor handlers need be hashable."""

_places: dict[int, _Place] = {}
"""By the ``id`` of the handler, and of its list."""

_removing: WeakSet[type] = WeakSet()
"""Classes whose ``events`` were seen to remove what is read: others at work may find nothing there any more."""

_around: ContextVar[tuple[_Work, ...]] = ContextVar("silbo_works", default=())
"""The handlers that wait for this code, the outermost first."""


class Collecting:
    """The events that are recorded in one scope."""

    def __init__(self) -> None:
        self._known: dict[_Source, object] = {}
        self._gone: list[Any] = []  # what was taken or dropped where it may still be shown
        self._works: set[_Work] = set()

    @contextmanager
    def at_work(self, handler: object, dispatcher: object) -> Generator[list[Any]]:
        """Around the work of a handler; gives the list in which the events are afterwards that it may send.

        All that wait there are, whoever recorded them in this scope; but where a handler around it collects in the same
        place, only those that came meanwhile. One that fails leaves none that came meanwhile: others beside it, of which
        some may be, have them all.

        Raises:
            HandlerShared: it collected while another unit of work was at it, too.
            TypeError: its ``events`` are none, or one of them.
        """
        source = self._meet(handler, dispatcher, begins=True)
        around = tuple(one for one in _around.get() if not one.over)  # a task may have inherited others
        if all(one.source is not source for one in around):
            self._leave(source, around)
        work = _Work(self, handler, source)
        places = {id(source.of): "list", id(handler): "object"}
        self._works.add(work)
        for place, what in places.items():
            _places.setdefault(place, _Place()).enter(work, what)
        _around.set((*around, work))
        taken: list[Any] = []
        try:
            yield taken
            taken += self._take(work, dispatcher)
        except BaseException:
            self._drop(work, dispatcher)
            raise
        finally:
            _around.set(around)
            self._works.remove(work)
            work.over = True
            for place in places:
                _places[place].works.remove(work)
                if not _places[place].works:
                    del _places[place]

    def left(self) -> list[tuple[Any, Any]]:
        """Take what waits while no handler is at work, each event with the dispatcher that is to have it."""
        found = []
        for source, dispatcher in self._known.items():
            if source.scopes == {self}:
                events = source.waiting()
                source.remove(events)
                found += [(dispatcher, event) for event in events]
        return found

    def close(self) -> None:
        """The scope is over: a list that is used again is empty, unless another scope uses it already."""
        for source in self._known:
            source.scopes.remove(self)
            if not source.scopes:
                del _sources[id(source.of)]
                if source.listed:
                    source.shown.clear()
        self._known.clear()
        self._gone.clear()

    def _meet(self, handler: object, dispatcher: object, *, begins: bool = False) -> _Source:
        of, shown = _read(handler)
        source = _sources.get(id(of))
        if source is None:
            source = _sources[id(of)] = _Source(of)
            if begins and not source.listed:
                source.old = [*shown]
        source.shown = shown
        if source not in self._known:
            source.old = source.old + self._gone
        source.scopes.add(self)
        self._known[source] = dispatcher
        return source

    def _leave(self, source: _Source, around: Sequence[_Work]) -> None:
        """What handlers around it show elsewhere, as in a copy of this list, is theirs."""
        for one in around:
            if one.scope is self and not (source.listed and one.source.listed):
                with suppress(Exception):  # an error of its own is not for this handler
                    source.old = source.old + _read(one.handler)[1]

    def _take(self, work: _Work, dispatcher: object) -> list[Any]:
        source = self._meet(work.handler, dispatcher)  # it may have another list by now
        events = source.waiting()
        if work.shared or any(one.source is source and one is not work for one in _around.get()):
            events = _without(events, work.before)
        if work.shared and (events or source is not work.source):
            raise HandlerShared(type(work.handler), work.shared)
        for event in events:
            _check_event(work.handler, event)
        self._remove(source, events, work)
        return events

    def _drop(self, work: _Work, dispatcher: object) -> None:
        sources = {work.source}
        with suppress(Exception):  # its own error is the one that counts
            sources.add(self._meet(work.handler, dispatcher))
        for source in sources:
            events = _without(source.waiting(), work.before)
            place = _places.get(id(source.of))
            beside = place.works.copy() if place else set()
            beside |= {one for one in self._works if not (source.listed and one.source.listed)}
            beside.difference_update(_around.get())
            if not beside:
                self._remove(source, events, work)
            elif not source.listed:
                source.remove(events)
            for other in beside:
                other.before = _without(other.before, events)
                other.source.old = _without(other.source.old, events)

    def _remove(self, source: _Source, events: Sequence[Any], work: _Work) -> None:
        source.remove(events)
        if not source.listed:
            self._gone += events
        if source is not work.source or not source.listed:  # others may show the same ones
            for other in self._known:
                if other is not source:
                    other.old += events


def declares_events(cls: type) -> bool:
    """Whether a class says that its objects collect: more than an attribute that they have each on its own."""
    return hasattr(cls, "events") and not inspect.ismemberdescriptor(getattr(cls, "events", None))


def _read(handler: object) -> tuple[object, list[Any]]:
    """The list that a handler gives, each time the same one; else the handler, and what it shows."""
    first, again = _events(handler), _events(handler)
    if isinstance(first, list) and again is first:
        return first, first
    shown = list(first)
    if len(list(again)) < len(shown) or (again is first and isinstance(first, Iterator)):
        _removing.add(type(handler))
    if type(handler) in _removing:
        raise TypeError(
            f"{type(handler).__qualname__}.events gives fewer when it is read again; reading events must not remove them: "
            "give the list itself, or a copy"
        )
    return handler, shown


def _events(handler: Any) -> Iterable[Any]:
    if not declares_events(type(handler)):  # something else of this name is the host's own
        events = getattr(handler, "events", None)
        return events if isinstance(events, Sequence) and not isinstance(events, str | bytes) else ()
    events = handler.events
    if events is None:
        return ()
    if isinstance(events, Iterable) and not isinstance(events, str | bytes):
        return events
    if inspect.iscoroutine(events):
        events.close()
    raise TypeError(
        f"{type(handler).__qualname__}.events gives {events!r:.80}, which is no list of events: make it a property, neither "
        "a method nor async, that returns one"
    )


def _check_event(handler: object, event: object) -> None:
    cls = type(event)
    if cls.__module__ == "builtins" and not isinstance(event, BaseException):  # plain objects may be events
        raise TypeError(
            f"{type(handler).__qualname__}.events has {event!r:.80} in it, which is no event: put objects of event classes there"
        )


def _without(events: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The same objects, but for these: as often as they are there."""
    counted, rest = Counter(map(id, others)), []
    for event in events:
        if counted[id(event)]:
            counted[id(event)] -= 1
        else:
            rest.append(event)
    return rest
