"""The record of a dispatch: which of its listeners were called, when and how they ended; which were not, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from silbo.dispatch.running import WrappedListener
from silbo.dispatch.source import find_source
from silbo.event import ENVELOPE, Refusal

if TYPE_CHECKING:
    from silbo.dispatch.observers import Call, Dispatch, Outcome
    from silbo.dispatch.options import Listener

__all__ = ["NotCalled", "Traced", "TracedListener", "describe_event", "shorten", "trace_dispatch"]

SHOWN: Final = 200
"""The most characters of an event, a payload or an error in one line."""

NotCalled: TypeAlias = Literal["stopped", "failed", "cancelled", "spent", "off", "skipped", "muted"]
"""The reason why a listener did not run. ``stopped``, ``failed`` or ``cancelled``: the dispatch ended before. ``spent``: another dispatch had
run the ``once`` listener already. ``off``: its plugin is switched off. ``skipped``: the host's own ``_adispatch`` left it out. ``muted``: a
test did."""


class TracedListener(NamedTuple):  # a frozen dataclass takes five times as long to make
    """A listener of a dispatch that has ended.

    Attributes:
        listener: As it was registered.
        plugin: The plugin that has added it; empty for the host's.
        outcome: The end of its call; ``running`` if it has not ended; None if it was not called.
        reason: The reason why it was not called; None if it was.
        began: Seconds from the beginning of the dispatch to that of the call.
        duration: Seconds.
        waited: Seconds of ``duration`` in which it waited; for the rest it held the event loop, in its own code or in all that
            it awaited. None where that was not measured.
        error: Its error, as ``ValueError: no such order``; empty if there was none.
    """

    listener: Listener
    plugin: str = ""
    outcome: Outcome | None = None
    reason: NotCalled | None = None
    began: float = 0.0
    duration: float = 0.0
    waited: float | None = None
    error: str = ""

    @property
    def owner(self) -> str:
        """The plugin that has added it, else the module that defines it."""
        return self.plugin or find_source(self.listener).module


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A dispatch that has ended.

    Attributes:
        name: The dispatched name.
        outcome: ``completed``, ``stopped``, ``failed`` or ``cancelled``.
        duration: Seconds.
        waited: Seconds of ``duration`` in which it waited: see :class:`TracedListener`.
        ended_at: The time of its end: aware, UTC.
        listeners: Those that were called, in the order in which their calls began; then those that were not, in running order.
        event: The event as text, cut after 200 characters; empty unless the trace keeps payloads.
        refusal: The reason why a policy has stopped the event; empty if none has.
    """

    name: Hashable
    outcome: Outcome
    duration: float
    waited: float | None
    ended_at: datetime
    listeners: tuple[TracedListener, ...]
    event: str = ""
    refusal: str = ""

    @property
    def called(self) -> tuple[tuple[Listener, Outcome], ...]:
        """The listeners that ran, each with its outcome."""
        return tuple((each.listener, each.outcome) for each in self.listeners if each.outcome is not None)

    @property
    def not_called(self) -> tuple[tuple[Listener, NotCalled], ...]:
        """The listeners that did not run, each with the reason."""
        return tuple((each.listener, each.reason) for each in self.listeners if each.reason is not None)


def trace_dispatch(dispatch: Dispatch, calls: Iterable[Call], *, event: str = "") -> Traced:
    """Return the record of a dispatch that has ended, or of what has happened so far.

    Args:
        dispatch: The dispatch.
        calls: Its calls.
        event: Its event as text.
    """
    calls = sorted(calls, key=lambda call: call.began)
    refusal = getattr(dispatch.event, "propagation_stopped", None)
    return Traced(
        name=dispatch.name,
        outcome=dispatch.outcome,
        duration=dispatch.duration,
        waited=dispatch.waited,
        ended_at=datetime.now(UTC),
        listeners=(*(_trace_call(call) for call in calls), *_find_not_called(dispatch, calls)),
        event=event,
        refusal=shorten(refusal, str) if isinstance(refusal, Refusal) else "",
    )


def _trace_call(call: Call) -> TracedListener:
    return TracedListener(
        listener=call.listener,
        plugin=call.plugin,
        outcome=call.outcome,
        began=call.began - call.dispatch.began,
        duration=call.duration,
        waited=call.waited,
        error="" if call.error is None else _describe_error(call.error),
    )


def _find_not_called(dispatch: Dispatch, calls: Iterable[Call]) -> Iterable[TracedListener]:
    """Return the listeners of a dispatch that these calls leave out, each with the reason; none before its end."""
    if dispatch.outcome == "running":
        return
    called = Counter(id(call.listener) for call in calls)
    for listener in dispatch.listeners:
        original = listener.__wrapped__ if isinstance(listener, WrappedListener) else listener
        if called[key := id(original)]:
            called[key] -= 1
        else:
            owner = getattr(listener, "owner", None)
            yield TracedListener(
                listener=original,
                plugin="" if owner is None else owner.name,
                reason=_find_reason(listener, owner, dispatch.outcome),
            )


def _find_reason(listener: Listener, owner: Any, outcome: Outcome) -> NotCalled:
    if owner is not None and owner.off:
        return "off"
    if outcome in ("stopped", "failed", "cancelled"):
        return outcome
    return "spent" if getattr(listener, "spent", False) else "skipped"


# -- as text ------------------------------------------------------------------------------------------------


def shorten(value: object, text_of: Any = repr) -> str:
    """Return the text of a value on one line, cut after 200 characters.

    Args:
        value: The value.
        text_of: ``repr``, ``str``, or another function that makes a text of it. The value's class may fail in it.
    """
    try:
        text = " ".join(text_of(value).split())
    except Exception as error:  # noqa: BLE001  # the host's class may fail in __repr__
        text = f"<{type(value).__qualname__} whose {text_of.__name__} raises {type(error).__name__}>"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def describe_event(event: object) -> str:
    """Return an event on one line, cut after 200 characters: its ``repr``; of a class without one, its public attributes."""
    return shorten(event, _list_attributes if type(event).__repr__ is object.__repr__ else repr)


def _list_attributes(event: object) -> str:
    given = vars(event) if hasattr(event, "__dict__") else {}
    shown = (f"{name}={value!r}" for name, value in given.items() if name not in ENVELOPE and not name.startswith("_"))
    return f"{type(event).__qualname__}({', '.join(shown)})"


def _describe_error(error: BaseException) -> str:
    """Return the class and the text of an error, on one line."""
    text = shorten(error, str)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
