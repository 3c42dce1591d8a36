"""Stand-ins: listeners that are muted, or replaced by others, for the length of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from silbo.dispatch.class_listeners import HandlerClass
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.dispatch.listeners import Registration
from silbo.dispatch.options import Listener, is_async

__all__ = ["StandIns"]


class StandIns:
    """The stand-ins of one dispatcher. The listeners stay registered; what runs in their place is decided at each dispatch.

    It overrides ``_adispatch`` of this one object, as a host may, while there are stand-ins.
    """

    def __init__(self, dispatcher: AsyncEventDispatcher) -> None:
        self._dispatcher: Any = dispatcher
        self._entries: list[tuple[Listener | HandlerClass, Listener | None]] = []
        self._undo: Callable[[], None] | None = None

    def add(self, listener: Listener | HandlerClass, replacement: Listener | None) -> Registration:
        """Run another listener in the place of one, compared by ``==``; None runs nothing. The newest stand-in counts.

        Raises:
            TypeError: The replacement is not async.
        """
        if replacement is not None and not is_async(replacement):
            raise TypeError(f"a listener is replaced by an async function, not by {replacement!r}; write 'async def'")
        entry = listener, replacement
        self._entries.append(entry)
        if self._undo is None:
            self._undo = self._override()
        return Registration(partial(self._remove, entry))

    def is_muted(self, listener: Listener | HandlerClass) -> bool:
        """Return True if nothing runs in the place of a listener."""
        entry = self._find(listener)
        return entry is not None and entry[1] is None

    def clear(self) -> None:
        """Remove all stand-ins: the dispatcher is as it was."""
        self._entries.clear()
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _remove(self, entry: tuple[Listener | HandlerClass, Listener | None]) -> None:
        self._entries = [other for other in self._entries if other is not entry]
        if not self._entries:
            self.clear()

    def _find(self, listener: object) -> tuple[Listener | HandlerClass, Listener | None] | None:
        return next((entry for entry in reversed(self._entries) if entry[0] == listener), None)

    def _override(self) -> Callable[[], None]:
        dispatcher = self._dispatcher
        own = vars(dispatcher).get("_adispatch")  # of a host that has overridden it on this object already
        run = dispatcher._adispatch  # noqa: SLF001  # a host may override it

        async def run_stand_ins(listeners: Iterable[Any], event: Any) -> None:
            chosen: list[Any] = []
            for listener in listeners:  # each under observation, for the recorder watches the dispatcher
                entry = self._find(listener)
                if entry is None:
                    chosen.append(listener)
                elif entry[1] is not None:
                    chosen.append(listener.replaced_by(entry[1]))
            await run(chosen, event)

        dispatcher._adispatch = run_stand_ins  # noqa: SLF001

        def undo() -> None:
            if own is None:
                del dispatcher._adispatch  # noqa: SLF001
            else:
                dispatcher._adispatch = own  # noqa: SLF001

        return undo
