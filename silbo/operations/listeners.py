"""The listeners of a dispatcher, as answers: what runs for a name, in which order, from where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from silbo.dispatch.dispatcher import AsyncEventDispatcher, is_heard
from silbo.dispatch.listeners import ListenerRow
from silbo.dispatch.source import find_source
from silbo.names import compile_pattern, is_pattern
from silbo.plugins.plugins import plugins_of

__all__ = ["ListenerInfo", "ListenerSearch", "NameListeners", "find_listeners", "list_listeners", "to_listener_info"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerInfo:
    """One listener under one name or pattern.

    Attributes:
        name: The name or pattern under which it is registered.
        listener: The qualified name of the function, method or class.
        priority: Lower runs first; ``FIRST`` and ``LAST`` before and after every number.
        options: The options that have an effect and differ from the defaults.
        plugin: The plugin that has added it; else the module that defines it.
        place: ``file:line`` of its code; empty if it has none.
        off: The reason why its plugin is switched off, so that it does not run; else empty.
        is_meant: True if it is meant for the name that was asked for. A bridge and a listener for ``**`` hear every name, a
            misspelt one as well, so they are not. Without a name that was asked for, True.
    """

    name: str
    listener: str
    priority: float | str
    options: Mapping[str, Any]
    plugin: str
    place: str
    off: str
    is_meant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NameListeners:
    """The listeners that a dispatch of a name runs.

    Attributes:
        name: The name.
        listeners: In running order.
        is_declared: True if the dispatcher declares the name.
        similar: For a name that is not declared, a similar one that is. For a declared name for which no listener is meant, a
            similar one that is not declared and has listeners. Where nothing is declared, for a name without listeners a similar
            one that has some. Else None.
    """

    name: str
    listeners: tuple[ListenerInfo, ...]
    is_declared: bool
    similar: str | None

    @property
    def is_heard(self) -> bool:
        """True if a listener is meant for the name, and its plugin is on."""
        return any(listener.is_meant and not listener.off for listener in self.listeners)


def list_listeners(dispatcher: AsyncEventDispatcher, pattern: str | None = None) -> list[ListenerInfo]:
    """Return all listeners, by name; or those whose name or pattern a pattern matches. Of one name, in running order.

    Raises:
        NameInvalid: The pattern has a ``*`` that is not a whole segment.
    """
    rows = sorted(dispatcher.describe(), key=lambda row: str(row.name))
    if pattern is not None:
        matches = compile_pattern(pattern).fullmatch
        rows = [row for row in rows if isinstance(row.name, str) and (row.name == pattern or matches(f"{row.name!s}."))]
    off = _find_off(dispatcher)
    return [to_listener_info(row, off=_reason(row, off)) for row in rows]


def find_listeners(dispatcher: AsyncEventDispatcher, name: str) -> NameListeners:
    """Return the listeners that a dispatch of a name runs.

    Args:
        dispatcher: The dispatcher.
        name: A name, not a pattern.
    """
    return ListenerSearch(dispatcher).find(name)


class ListenerSearch:
    """Finds the listeners of many names, for as long as the dispatcher's listeners don't change."""

    def __init__(self, dispatcher: AsyncEventDispatcher) -> None:
        self._dispatcher = dispatcher
        self._off = _find_off(dispatcher)
        self._declared = {str(name) for name in dispatcher.names}
        self._registered = {
            str(row.name) for row in dispatcher.describe() if isinstance(row.name, str) and not is_pattern(row.name)
        }

    def find(self, name: str) -> NameListeners:
        """Return the listeners that a dispatch of a name runs."""
        rows = self._dispatcher.describe(name)
        runs = self._dispatcher.get_listeners(name)
        # describe() and get_listeners() have the same order; a host's own get_listeners() may have more or fewer.
        is_same = len(runs) == len(rows)
        meant = [is_heard(self._dispatcher, name, (run,)) for run in runs] if is_same else [True] * len(rows)
        found = tuple(
            to_listener_info(row, off=_reason(row, self._off), is_meant=is_meant)
            for row, is_meant in zip(rows, meant, strict=True)
        )
        return NameListeners(
            name=name,
            listeners=found,
            is_declared=name in self._declared,
            similar=self._find_similar(name, is_heard=any(meant)),
        )

    def _find_similar(self, name: str, *, is_heard: bool) -> str | None:
        """Return the name that is meant by a misspelt one; or the misspelt one of listeners that don't run for a name."""
        if name not in self._declared:
            if self._declared:
                return _most_similar(name, self._declared) or _most_similar(name, self._registered)
            return None if is_heard else _most_similar(name, self._registered)
        return None if is_heard else _most_similar(name, self._registered - self._declared)


def _find_off(dispatcher: AsyncEventDispatcher) -> list[tuple[ListenerRow, str]]:
    """Return the listeners of plugins that are switched off, with the reason."""
    return [
        (row, state.reason)
        for plugins in plugins_of(dispatcher)
        for state in plugins.describe()
        if state.state == "off"
        for row in plugins[state.name].listeners()
    ]


def _most_similar(name: str, known: Iterable[str]) -> str | None:
    return next(iter(get_close_matches(name, sorted(set(known) - {name}), 1)), None)


def _reason(row: ListenerRow, off: Iterable[tuple[ListenerRow, str]]) -> str:
    return next((reason for other, reason in off if other == row), "")


def to_listener_info(row: ListenerRow, *, off: str = "", is_meant: bool = True) -> ListenerInfo:
    """Return a row of ``describe()`` as an answer.

    Args:
        row: The row.
        off: The reason why its plugin is switched off; empty if it is on.
        is_meant: True if the listener is meant for the name that was asked for.
    """
    priority = row.priority
    return ListenerInfo(
        name=str(row.name),
        listener=find_source(row.listener).name,
        priority=float(priority) if math.isfinite(priority) else repr(priority),
        options={option: _describe_option(value) for option, value in row.options.items()},
        plugin=row.plugin,
        place=row.defined_at,
        off=off,
        is_meant=is_meant,
    )


def _describe_option(value: Any) -> Any:
    return find_source(value).name if callable(value) else value
