"""The listener that holds an event loop: policy listeners mark it, the thread of a watchdog reads the mark."""

from __future__ import annotations

from collections.abc import Callable, Generator
from time import perf_counter
from typing import Any

__all__ = ["OnLoop", "Stepped", "Unmarked"]


def _do_nothing(_listener: Any, _coroutine: Any, _began: float, _took: float) -> None: ...


class OnLoop:
    """The listener that holds an event loop now.

    A policy listener marks each step of its coroutine, from one wait to the next::

        coroutine, listener, since = on_loop.coroutine, on_loop.listener, on_loop.since
        started = perf_counter()
        on_loop.coroutine = own_coroutine
        on_loop.listener = self
        on_loop.since = started
        try:
            ...  # the step, in which other listeners may mark theirs
        finally:
            now = perf_counter()
            on_loop.coroutine = coroutine
            on_loop.listener = listener
            if coroutine is not None:
                on_loop.since = since + now - started
                on_loop.forget_ended()

    So ``since`` leaves out the listeners that have run inside of the step: a coroutine that is marked and stands on the stack
    of a thread has held its loop itself for at least that long. If the loops of several threads share the object, it shows the
    last change of any of them.

    Attributes:
        coroutine: The coroutine whose step runs, the innermost; None between the steps.
        listener: The policy listener that runs it. Its ``owner.name`` is the plugin, its ``__wrapped__`` the listener.
        since: The time when it began to hold the loop, later by the time of the listeners inside of it; on the clock of
            ``perf_counter``.
        slow_after: Seconds; infinity if nobody watches.
        on_slow: Called with ``(listener, coroutine, began, took)`` when a step has ended that took ``slow_after`` seconds or
            longer. ``took`` leaves out the listeners inside of it.
    """

    __slots__ = ("coroutine", "listener", "on_slow", "since", "slow_after")

    def __init__(self) -> None:
        self.coroutine: Any = None
        self.listener: Any = None
        self.since = 0.0
        self.slow_after = float("inf")
        self.on_slow: Callable[[Any, Any, float, float], None] = _do_nothing

    def forget_ended(self) -> None:
        """Forget the mark of a listener whose plugin has ended.

        A step in another thread may have put it back, and it would keep the plugin's objects alive.
        """
        owner = getattr(self.listener, "owner", None)
        if owner is not None and owner.has_ended:
            self.coroutine = None
            self.listener = None


class Stepped:
    """A coroutine that runs step by step, from one wait to the next. To be awaited once."""

    __slots__ = ("_coroutine",)

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        coroutine = self._coroutine
        advance, value = coroutine.send, None
        while True:
            try:
                awaited = self._step(advance, value)
            except StopIteration as end:
                return end.value
            try:
                advance, value = coroutine.send, (yield awaited)
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as thrown:  # noqa: BLE001  # the coroutine decides
                advance, value = coroutine.throw, thrown

    def _step(self, advance: Callable[[Any], Any], value: Any) -> Any:
        """Run one step; return the object that the coroutine waits for."""
        return advance(value)


class Unmarked(Stepped):
    """A coroutine whose time on the loop is not that of the listener around it.

    It is a dispatch by a plugin: the host's listeners, which mark nothing, run in it.
    """

    __slots__ = ("_on_loop",)

    def __init__(self, on_loop: OnLoop, coroutine: Any) -> None:
        super().__init__(coroutine)
        self._on_loop = on_loop

    def _step(self, advance: Callable[[Any], Any], value: Any) -> Any:
        on_loop = self._on_loop
        around, listener, since = on_loop.coroutine, on_loop.listener, on_loop.since
        on_loop.coroutine = on_loop.listener = None
        started = perf_counter()
        try:
            return advance(value)
        finally:
            on_loop.coroutine = around
            on_loop.listener = listener
            on_loop.since = since + perf_counter() - started
            on_loop.forget_ended()
