"""The waterfall of a dispatch as text: a line for each listener, those that were called and those that were not, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any, Final

from silbo._control_characters import escape_controls
from silbo.dispatch.source import find_source
from silbo.dispatch.traced import NotCalled, Traced, TracedListener

__all__ = [
    "REASONS",
    "describe_outcome",
    "describe_state",
    "draw_listener",
    "draw_waterfall",
    "find_bar",
    "format_duration",
    "show_name",
]

WIDTH: Final = 20
"""Characters of a bar that is as long as its dispatch."""

HARD_SPACE: Final = "\N{NO-BREAK SPACE}"
"""A space at which no line is broken."""

REASONS: Final[Mapping[NotCalled, str]] = {
    "stopped": "the event was stopped before",
    "failed": "the dispatch failed before",
    "cancelled": "the dispatch was cancelled before",
    "spent": "once=True, and spent",
    "off": "its plugin is switched off",
    "skipped": "left out by _adispatch",
    "muted": "muted by the test",
}
"""The words for each reason why a listener was not called."""


def draw_waterfall(traced: Traced, *, event: str = "", caller: str = "", width: int | None = None) -> str:
    """Return a dispatch as text, its first line for the dispatch, then one for each listener.

    A bar shows when a listener ran, from the beginning of the dispatch to its end: dark for the time in which it held the event
    loop, light for the time in which it waited. Both are sums: the dark part comes first even if the listener waited first.

    Args:
        traced: The dispatch.
        event: The event as text, in place of the one that was kept.
        caller: The listener that has dispatched the event, if it was one.
        width: Characters of a line, 40 or more; a longer one is continued on the next, and below 100 bars are shorter. None for
            lines as long as they are.
    """
    bar = WIDTH if width is None or width >= 100 else WIDTH // 2
    what = " ".join(part for part in (show_name(traced.name), event or traced.event) if part)
    by = f" (by {caller})" if caller else ""
    lines = [f"{what}{by}: {describe_outcome(traced)}"]
    lines += [f"    {_draw_line(each, traced, bar)}" for each in traced.listeners]
    if not traced.listeners:
        lines.append("    nobody listens")
    lines = [escape_controls(line) for line in lines]  # names, errors and events may be of another host
    return "\n".join(lines if width is None else [part for line in lines for part in _fold(line, max(width, 40))])


def _fold(line: str, width: int) -> list[str]:
    """Return a line in parts of ``width`` characters at most, all but the first indented. A number keeps its unit."""
    line = re.sub(r"(?<=\d) (?=(?:ms|waiting)\b)", HARD_SPACE, line)
    parts = wrap(line, width, subsequent_indent=" " * 8, break_on_hyphens=False)
    return [part.replace(HARD_SPACE, " ") for part in parts]


def describe_outcome(traced: Traced) -> str:
    """Return the end of a dispatch and its time: ``stopped, 12.5 ms, 12.1 waiting, refused: ...``."""
    took = f", {format_duration(traced.duration, traced.waited)}" if traced.outcome != "running" else ""
    return f"{traced.outcome}{took}{f', refused: {traced.refusal}' if traced.refusal else ''}"


def describe_state(each: TracedListener) -> str:
    """Return ``called``, ``stopped by``, ``failed``, ``cancelled``, ``running`` or ``not called``."""
    if each.outcome is None:
        return "not called"
    return {"completed": "called", "stopped": "stopped by"}.get(each.outcome, each.outcome)


def format_duration(duration: float, waited: float | None) -> str:
    """Return seconds as ``12.5 ms``, or as ``12.5 ms, 12.1 waiting``."""
    return f"{_format_milliseconds(duration)} ms{f', {_format_milliseconds(waited)} waiting' if waited else ''}"


def _format_milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.{1 if seconds >= 0.001 else 2}f}"


def find_bar(each: TracedListener, traced: Traced) -> tuple[float, float, float]:
    """Return the place of a call within its dispatch, from 0 to 1: its beginning, its part on the loop, and its waiting."""
    if not each.duration or not traced.duration:
        return 0.0, 0.0, 0.0
    begin = min(1.0, max(0.0, each.began / traced.duration))
    length = min(1.0 - begin, each.duration / traced.duration)
    waiting = length * min(1.0, (each.waited or 0.0) / each.duration)
    return begin, length - waiting, waiting


def draw_listener(each: TracedListener) -> str:
    """Return the name of a listener without ``<locals>``, its plugin or module, and its file and line, as far as they are known."""
    source = find_source(each.listener)
    owner = each.plugin or source.module
    parts = (source.name.replace("<locals>.", ""), f"[{owner}]" if owner else "", _shorten_place(source.place))
    return " ".join(part for part in parts if part)


def show_name(name: Any) -> str:
    """Return a name in quotes; another object than a text as its ``repr``."""
    return repr(str(name)) if isinstance(name, str) else repr(name)


def _draw_line(each: TracedListener, traced: Traced, width: int) -> str:
    line = f"{describe_state(each):<10}"
    if traced.outcome != "running":
        line += f"  {_draw_bar(*find_bar(each, traced), width)}"
    line += f"  {draw_listener(each)}"
    if each.reason is not None:
        return f"{line}: {REASONS[each.reason]}"
    if each.outcome != "running":
        line += f"  {format_duration(each.duration, each.waited)}"
    return f"{line}: {each.error}" if each.error else line


def _draw_bar(begin: float, on_loop: float, waiting: float, width: int) -> str:
    """Return a bar of ``width`` characters; a call that took any time has at least one."""
    if not on_loop + waiting:
        return " " * width
    first = min(width - 1, int(begin * width))
    end = max(first + 1, min(width, round((begin + on_loop + waiting) * width)))
    dark = round((end - first) * on_loop / (on_loop + waiting))
    return f"{' ' * first}{'█' * dark}{'░' * (end - first - dark)}".ljust(width)


def _shorten_place(place: str) -> str:
    """Return ``file:line``, relative to the current folder if the file is in it."""
    path, _, line = place.rpartition(":")
    if not path:
        return ""
    here = Path.cwd()
    return f"{Path(path).relative_to(here) if Path(path).is_relative_to(here) else path}:{line}"
