"""A trace: an observer that remembers which listeners were called, which were not and why, and which names nobody heard."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from silbo.dispatch.running import WrappedListener

if TYPE_CHECKING:
    from silbo.dispatch.dispatcher import AsyncEventDispatcher
    from silbo.dispatch.listeners import ListenerRow
    from silbo.dispatch.observers import Call, Dispatch, Outcome
    from silbo.dispatch.options import Listener

__all__ = ["Trace", "Traced", "find_not_called"]

REMEMBERED: Final = 10_000
"""Most unheard names, and most called listeners, that a trace counts: a program can make new ones without end."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A dispatch that has ended.

    Attributes:
        name: The dispatched name.
        outcome: ``completed``, ``stopped``, ``failed`` or ``cancelled``.
        duration: Seconds.
        called: The listeners that ran, in order, each with its outcome.
        not_called: The listeners that did not run, each with the reason: ``stopped``, ``failed`` or ``cancelled`` if the
            dispatch ended before; ``spent`` for a ``once`` listener that another dispatch had run already; ``off`` if its plugin is
            switched off; ``skipped`` for a listener that the host's own ``_adispatch`` left out.
    """

    name: Hashable
    outcome: Outcome
    duration: float
    called: tuple[tuple[Listener, Outcome], ...]
    not_called: tuple[tuple[Listener, str], ...]


class Trace:
    """An observer that remembers dispatches: ``AsyncEventDispatcher(observers=[trace := Trace()])``.

    Args:
        limit: Most dispatches that are kept, the last ones; the totals go on.

    Attributes:
        dispatches: The last dispatches, in the order in which they ended, the oldest first.
        unheard: For each name that no listener is meant for, the number of its dispatches. Bridges, and listeners that are
            registered for ``**`` alone, hear a misspelt name as well, so they don't count.
    """

    def __init__(self, *, limit: int = 1000) -> None:
        self.dispatches: deque[Traced] = deque(maxlen=limit)
        self.unheard: dict[Hashable, int] = {}
        self._open: dict[Dispatch, list[Call]] = {}
        self._totals: dict[int, tuple[Listener, int]] = {}  # by id: a listener need not be hashable

    @property
    def calls(self) -> list[tuple[Listener, int]]:
        """Each listener that was called with the number of its calls, the highest number first."""
        return sorted(self._totals.values(), key=lambda total: -total[1])

    def never_called(self, dispatcher: AsyncEventDispatcher) -> list[ListenerRow]:
        """Return the listeners registered now that no dispatch has called since the trace began."""
        return [row for row in dispatcher.describe() if id(row.listener) not in self._totals]

    def before_dispatch(self, dispatch: Dispatch) -> None:
        """Begin to note the calls of a dispatch."""
        self._open[dispatch] = []

    def before_listener(self, call: Call) -> None:
        """Do nothing: a call is noted at its end."""

    def after_listener(self, call: Call) -> None:
        """Note a call."""
        self._open[call.dispatch].append(call)
        key = id(call.listener)
        if key in self._totals or len(self._totals) < REMEMBERED:
            self._totals[key] = call.listener, self._totals.get(key, (None, 0))[1] + 1

    def after_dispatch(self, dispatch: Dispatch) -> None:
        """Remember a dispatch, with the listeners that were called and not called."""
        calls = self._open.pop(dispatch)
        self.dispatches.append(
            Traced(
                name=dispatch.name,
                outcome=dispatch.outcome,
                duration=dispatch.duration,
                called=tuple((call.listener, call.outcome) for call in calls),
                not_called=find_not_called(dispatch, calls),
            )
        )
        if not dispatch.heard and (dispatch.name in self.unheard or len(self.unheard) < REMEMBERED):
            self.unheard[dispatch.name] = self.unheard.get(dispatch.name, 0) + 1


def find_not_called(dispatch: Dispatch, calls: Iterable[Call]) -> tuple[tuple[Listener, str], ...]:
    """Return the listeners of an ended dispatch that these calls leave out, each with the reason: see :class:`Traced`."""
    called = Counter(id(call.listener) for call in calls)
    left: list[Listener] = []
    for listener in dispatch.listeners:
        if called[key := id(_unwrapped(listener))]:
            called[key] -= 1
        else:
            left.append(listener)
    why = dispatch.outcome if dispatch.outcome in ("stopped", "failed", "cancelled") else None
    return tuple((_unwrapped(listener), _left_out(listener, why)) for listener in left)


def _unwrapped(listener: Listener) -> Listener:
    return listener.__wrapped__ if isinstance(listener, WrappedListener) else listener


def _left_out(listener: Listener, why: str | None) -> str:
    owner = getattr(listener, "owner", None)
    if owner is not None and owner.off:
        return "off"
    return why or ("spent" if getattr(listener, "spent", False) else "skipped")
