"""A trace: an observer that remembers which listeners were called, which were not and why, and which names nobody heard."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from itertools import islice
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Final

from silbo.dispatch.traced import Traced, describe_event, trace_dispatch
from silbo.dispatch.waterfall import draw_waterfall

if TYPE_CHECKING:
    from silbo.dispatch.dispatcher import AsyncEventDispatcher
    from silbo.dispatch.listeners import ListenerRow
    from silbo.dispatch.observers import Call, Dispatch
    from silbo.dispatch.options import Listener

__all__ = ["Trace", "Traced"]

REMEMBERED: Final = 10_000
"""Most unheard names, and most called listeners, that a trace counts: a program can make new ones without end."""


class Trace:
    """An observer that remembers dispatches: ``AsyncEventDispatcher(observers=[trace := Trace()])``.

    Args:
        limit: Most dispatches that are kept, the last ones; the totals go on.
        payloads: If true, each event is kept as text. By default it is not: a waterfall may be shown to others.

    Attributes:
        dispatches: The last dispatches, in the order in which they ended, the oldest first.
        unheard: For each name that no listener is meant for, the number of its dispatches. Bridges, and listeners that are
            registered for ``**`` alone, hear a misspelt name as well, so they don't count.
    """

    def __init__(self, *, limit: int = 1000, payloads: bool = False) -> None:
        self.dispatches: deque[Traced] = deque(maxlen=limit)
        self.unheard: dict[Hashable, int] = {}
        self._payloads = payloads
        self._open: dict[Dispatch, list[Call]] = {}
        self._totals: dict[int, tuple[Listener, int]] = {}  # by id: a listener need not be hashable

    @property
    def calls(self) -> list[tuple[Listener, int]]:
        """Each listener that was called with the number of its calls, the highest number first."""
        return sorted(self._totals.values(), key=lambda total: -total[1])

    def never_called(self, dispatcher: AsyncEventDispatcher) -> list[ListenerRow]:
        """Return the listeners registered now that no dispatch has called since the trace began."""
        return [row for row in dispatcher.describe() if id(row.listener) not in self._totals]

    def draw(self, last: int = 10, *, width: int | None = None) -> str:
        """Return the last dispatches as text, the newest first, each with its waterfall: a line and a bar for each listener.

        Args:
            last: The most dispatches.
            width: Characters of a line; a longer one is continued on the next, indented. By default as many as the terminal has,
                and 100 without a terminal. Less than 40 is taken as 40.

        Raises:
            ValueError: ``last`` is negative.
        """
        if last < 0:
            raise ValueError(f"last is the number of dispatches to draw, 0 or more, not {last}")
        if width is None:
            width = get_terminal_size((100, 24)).columns
        return "\n".join(draw_waterfall(each, width=width) for each in islice(reversed(self.dispatches), last))

    def before_dispatch(self, dispatch: Dispatch) -> None:
        """Begin to note the calls of a dispatch."""
        dispatch.waited = 0.0  # asks for the measurement
        self._open[dispatch] = []

    def before_listener(self, call: Call) -> None:
        """Ask for the measurement of a call, which is noted at its end."""
        call.waited = 0.0

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
            trace_dispatch(dispatch, calls, event=describe_event(dispatch.event) if self._payloads else "")
        )
        if not dispatch.heard and (dispatch.name in self.unheard or len(self.unheard) < REMEMBERED):
            self.unheard[dispatch.name] = self.unheard.get(dispatch.name, 0) + 1
