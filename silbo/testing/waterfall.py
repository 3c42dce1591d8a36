"""The text of recorded dispatches: each with its listeners, those that were called and those that were not, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from silbo.dispatch.listeners import ListenerRow
from silbo.dispatch.observers import Call, Dispatch
from silbo.dispatch.options import Listener
from silbo.dispatch.source import describe_listener

__all__ = ["RecordedDispatch", "draw_dispatch", "draw_listener", "shorten"]

SHOWN: Final = 200
"""The most characters of an event, a payload or an error in one line."""

_REASONS: Final = {
    "stopped": "the event was stopped before",
    "failed": "the dispatch failed before",
    "cancelled": "the dispatch was cancelled before",
    "spent": "once=True, and spent",
    "off": "its plugin is switched off",
    "skipped": "left out by _adispatch",
    "muted": "muted by the test",
}


@dataclass(slots=True, eq=False)
class RecordedDispatch:
    """A dispatch and its calls, as an observer saw them.

    Attributes:
        dispatch: The dispatch.
        rows: The rows of ``describe()`` for its listeners, by the id of the listener.
        within: The call of a listener in which it was dispatched; None if there is none.
        calls: The calls that began, in order.
        not_called: The listeners that did not run, each with the reason, once the dispatch has ended.
        refusal: The reason why a policy has stopped the event; empty if none has.
    """

    dispatch: Dispatch
    rows: Mapping[int, ListenerRow]
    within: Call | None
    calls: list[Call] = field(default_factory=list)
    not_called: Sequence[tuple[Listener, str]] = ()
    refusal: str = ""


def shorten(value: object) -> str:
    """Return the ``repr`` of a value on one line, cut after SHOWN characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # noqa: BLE001  # the host's class may fail in __repr__
        text = f"<{type(value).__qualname__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def draw_listener(listener: Any, rows: Mapping[int, ListenerRow]) -> str:
    """Return the name of a listener, its plugin, file and line, as far as they are known."""
    row = rows.get(id(listener))
    if row is None:
        return describe_listener(listener)
    name = getattr(listener, "__qualname__", None) or type(listener).__qualname__
    place, _, line = row.defined_at.rpartition(":")
    return " ".join(part for part in (name, f"[{row.plugin}]" * bool(row.plugin), _shorten_path(place, line)) if part)


def draw_dispatch(recorded: RecordedDispatch) -> list[str]:
    """Return the lines of a dispatch: its outcome, then a line for each listener."""
    dispatch = recorded.dispatch
    outcome = f"{dispatch.outcome}, {dispatch.duration * 1000:.1f} ms" if dispatch.outcome != "running" else "running"
    if recorded.refusal:
        outcome += f", refused: {recorded.refusal}"
    caller = ""
    if recorded.within is not None:
        name = getattr(recorded.within.listener, "__qualname__", type(recorded.within.listener).__qualname__)
        caller = f" (by {name}, a listener of {_show_name(recorded.within.dispatch.name)})"
    lines = [f"{_show_name(dispatch.name)} {shorten(dispatch.event)}{caller}: {outcome}"]
    for call in recorded.calls:
        state = {"completed": "called", "stopped": "stopped by"}.get(call.outcome, call.outcome)
        error = "" if call.error is None else f": {type(call.error).__name__}: {shorten(str(call.error))[1:-1]}"
        took = f"  {call.duration * 1000:.1f} ms" if call.outcome != "running" else ""
        lines.append(f"    {state:<10}  {draw_listener(call.listener, recorded.rows)}{took}{error}")
    lines += [
        f"    not called  {draw_listener(listener, recorded.rows)}: {_REASONS[reason]}"
        for listener, reason in recorded.not_called
    ]
    if not dispatch.listeners:
        lines.append("    nobody listens")
    return lines


def _show_name(name: object) -> str:
    return repr(str(name)) if isinstance(name, str) else repr(name)


def _shorten_path(place: str, line: str) -> str:
    if not place:
        return ""
    path = Path(place)
    here = Path.cwd()
    return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{line}"
