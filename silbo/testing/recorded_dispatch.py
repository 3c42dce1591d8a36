"""A dispatch that a recorder watches, also while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from silbo.dispatch.observers import Call, Dispatch
from silbo.dispatch.options import Listener
from silbo.dispatch.traced import Traced, describe_event, trace_dispatch
from silbo.dispatch.waterfall import draw_waterfall, show_name

__all__ = ["RecordedDispatch"]


@dataclass(slots=True, eq=False)
class RecordedDispatch:
    """A dispatch and its calls, as an observer saw them.

    Attributes:
        dispatch: The dispatch.
        within: The call of a listener in which it was dispatched; None if there is none.
        calls: The calls that began, in order.
    """

    dispatch: Dispatch
    within: Call | None
    calls: list[Call] = field(default_factory=list)
    _ended: Traced | None = None

    @property
    def traced(self) -> Traced:
        """The record of the dispatch; of one that runs, as far as it has come."""
        return self._ended or trace_dispatch(self.dispatch, self.calls)

    def end(self, is_muted: Callable[[Listener], bool]) -> None:
        """Note the end: the reasons why listeners were not called may be others later."""
        traced = trace_dispatch(self.dispatch, self.calls)
        listeners = (
            each._replace(reason="muted") if each.reason and is_muted(each.listener) else each
            for each in traced.listeners
        )
        self._ended = replace(traced, listeners=tuple(listeners))

    def draw(self) -> str:
        """Return its waterfall as text."""
        caller = ""
        if self.within is not None:
            listener = self.within.listener
            name = getattr(listener, "__qualname__", type(listener).__qualname__)
            caller = f"{name}, a listener of {show_name(self.within.dispatch.name)}"
        return draw_waterfall(self.traced, event=describe_event(self.dispatch.event), caller=caller)
