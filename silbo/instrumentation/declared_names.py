"""Names for spans and metrics: those that are declared, and one word for all others, which can be without number."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

from silbo.dispatch.dispatcher import AsyncEventDispatcher, count_changes
from silbo.names import EventName

__all__ = ["OTHER", "DeclaredNames"]

OTHER: Final = "other"
"""Stands for every name that is not declared."""
MOST: Final = 1_000
"""Names that are told apart at most: a program can make an ``EventName`` of any text."""
LOOK_EVERY: Final = 1.0
"""Seconds between two looks at the listeners of a dispatcher whose listeners change."""


@dataclass(slots=True)
class _Look:
    names: frozenset[str]
    changes: int | None
    at: float


class DeclaredNames:
    """Gives a name as it is if it is declared, else :data:`OTHER`.

    Declared are an :class:`~silbo.EventName`; a text that equals one which the dispatcher declares (``names=``) or has a listener
    for; and the names given here.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._known = {str(name): _make_writable(name) for name in names}
        self._looks: WeakKeyDictionary[AsyncEventDispatcher, _Look] = WeakKeyDictionary()

    def label(self, name: object, dispatcher: object = None) -> str:
        """Return the name of a dispatch or a message as text, or :data:`OTHER`."""
        if not isinstance(name, str):
            return OTHER
        known = self._known.get(name)
        if known is not None:
            return known
        is_declared = isinstance(name, EventName) or name in self._look_at(dispatcher)
        if not is_declared or len(self._known) >= MOST:
            return OTHER
        return self._known.setdefault(str(name), _make_writable(name))

    def _look_at(self, dispatcher: Any) -> frozenset[str]:
        """Return the declared names of a dispatcher: looked for again if its listeners have changed, once a second."""
        if not isinstance(dispatcher, AsyncEventDispatcher):
            return frozenset()
        look, changes, now = self._looks.get(dispatcher), count_changes(dispatcher), time.monotonic()
        if look is None or (look.changes != changes and now - look.at >= LOOK_EVERY):
            names = [*dispatcher.names, *(row.name for row in dispatcher.describe() if isinstance(row.name, EventName))]
            look = self._looks[dispatcher] = _Look(frozenset(map(str, names)), changes, now)
        return look.names


def _make_writable(name: str) -> str:
    """Return a name with ``?`` for each half of a surrogate pair: an exporter that can't write one name writes none."""
    return str(name).encode("utf-8", "replace").decode()
