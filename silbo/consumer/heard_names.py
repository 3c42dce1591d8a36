"""The names that somebody hears on a consumer's dispatcher."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable
from difflib import get_close_matches
from enum import IntEnum
from typing import Any, Final

from silbo._whistle import IAsyncEventDispatcher
from silbo.bridge import Bridge
from silbo.dispatch.dispatcher import count_changes, is_heard
from silbo.names import EventName, is_pattern

__all__ = ["Heard", "HeardNames"]

CACHED_NAMES: Final = 1024
"""Most names that are remembered; then all are forgotten, for a sender may make new ones without end."""


class Heard(IntEnum):
    """Answers to the question if somebody hears a name.

    Attributes:
        BY_NOBODY: No listener, or bridges only: they ignore events that came from outside.
        BY_CHANCE: Only listeners for ``**``, beside listeners for other names: they hear a misspelt name as well.
        ON_PURPOSE: A listener for the name or for a pattern; or one for ``**`` on a dispatcher that has no others.
    """

    BY_NOBODY = 0
    BY_CHANCE = 1
    ON_PURPOSE = 2


class HeardNames:
    """Tells of each name if a dispatcher's listeners hear it. Answers are remembered until the listeners change.

    Attributes:
        recent: Returns the last answer for a name, without a look if the listeners have changed; None if there is none.
    """

    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None:
        self._dispatcher: Any = dispatcher
        self._changes: int | None = None
        self._answers: dict[Hashable, Heard] = {}
        self._hears_all_only: bool | None = None  # True if all listeners but bridges are for **; None if not known
        self.recent: Final = self._answers.get

    def __getitem__(self, name: Any) -> Heard:
        self.refresh()
        answer = self._answers.get(name)
        if answer is None:
            answer = self._answers[name] = self._find(name)
        return answer

    def refresh(self) -> None:
        """Forget the answers if the listeners have changed."""
        changes = count_changes(self._dispatcher)
        if changes is None or changes != self._changes or len(self._answers) >= CACHED_NAMES:
            self._answers.clear()
            self._hears_all_only = None
            self._changes = changes

    def find_unheard(self, names: Iterable[EventName[Any]]) -> dict[str, str | None]:
        """Return the names that nobody hears on purpose, each with the most similar name that somebody does hear."""
        unheard = [name for name in names if self[name] is not Heard.ON_PURPOSE]
        if not unheard:
            return {}
        known = [name for name in self._listened() if isinstance(name, str) and not is_pattern(name)]
        return {str(name): next(iter(get_close_matches(str(name), known, 1, 0.75)), None) for name in unheard}

    def _find(self, name: Any) -> Heard:
        listeners = tuple(self._dispatcher.get_listeners(name))
        if all(map(_is_bridge, listeners)):
            return Heard.BY_NOBODY
        if is_heard(self._dispatcher, name, listeners):
            return Heard.ON_PURPOSE
        if self._hears_all_only is None:
            self._hears_all_only = all(other == "**" for other in self._listened())
        if self._hears_all_only:
            return Heard.ON_PURPOSE
        return Heard.BY_CHANCE

    def _listened(self) -> list[Hashable]:
        """Return the names and patterns with a listener that is no bridge."""
        found = self._dispatcher.get_listeners().items()
        return [name for name, listeners in found if not all(map(_is_bridge, listeners))]


def _is_bridge(listener: Any) -> bool:
    return isinstance(getattr(inspect.unwrap(listener), "__self__", None), Bridge)
