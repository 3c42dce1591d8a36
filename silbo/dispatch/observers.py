"""Hooks around dispatches and listeners: for traces, metrics and :class:`~silbo.Trace`."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from silbo.dispatch.options import Listener
from silbo.dispatch.running import Guard, Wrapper

__all__ = ["Call", "Dispatch", "Observer", "Outcome", "check_observers", "watch"]

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal["running", "completed", "stopped", "failed", "cancelled"]
"""How a dispatch or a call ended. A listener is ``stopped`` when it stopped the event, ``failed`` also where its error
was isolated or collected."""


@dataclass(slots=True, eq=False)
class Dispatch:
    """One dispatch, the same object before and after it.

    Attributes:
        name: The dispatched name.
        event: The event.
        listeners: What it runs, in order.
        duration: Seconds; 0 before the end.
        outcome: ``running`` before the end.
        error: What it raised, if it did.
    """

    name: Hashable
    event: Any
    listeners: Sequence[Listener]
    duration: float = 0.0
    outcome: Outcome = "running"
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class Call:
    """One run of a listener, the same object before and after it.

    Attributes:
        dispatch: The dispatch it belongs to.
        listener: The listener as it was registered.
        duration: Seconds; 0 before the end.
        outcome: ``running`` before the end.
        error: What the listener raised, also where the dispatch went on.
    """

    dispatch: Dispatch
    listener: Listener
    duration: float = 0.0
    outcome: Outcome = "running"
    error: BaseException | None = None


@runtime_checkable
class Observer(Protocol):
    """Sees every dispatch and listener. Called in the dispatching task; an error of an observer is logged, no more."""

    def before_dispatch(self, dispatch: Dispatch) -> None:
        """The listeners are looked up, none has run."""

    def after_dispatch(self, dispatch: Dispatch) -> None:
        """It has ended: ``duration``, ``outcome`` and ``error`` are set."""

    def before_listener(self, call: Call) -> None:
        """A listener is about to run."""

    def after_listener(self, call: Call) -> None:
        """It has ended: ``duration``, ``outcome`` and ``error`` are set."""


def check_observers(observers: object) -> None:
    """Refuse what is no sequence of observers.

    Raises:
        TypeError: says what was given in its place.
    """
    if not isinstance(observers, Sequence):
        raise TypeError(f"observers is a list of observers, not {observers!r}")
    for observer in observers:
        if isinstance(observer, type) or not isinstance(observer, Observer):
            raise TypeError(f"{observer!r} is no observer: an object with the four methods of silbo.Observer is")


async def watch(
    observers: Sequence[Observer],
    dispatch: Dispatch,
    run: Callable[[Sequence[Listener], Any], Awaitable[object]],
) -> None:
    """Run a dispatch under observation: ``run(listeners, event)`` gets the listeners wrapped."""
    watched = [_Watched(listener, dispatch, observers) for listener in dispatch.listeners]
    with _observed(observers, "dispatch", dispatch, dispatch.event):
        await run(watched, dispatch.event)


class _Watched(Wrapper):
    """A listener under observation, inside of its options: so an isolated error is seen too."""

    def __init__(self, listener: Listener, dispatch: Dispatch, observers: Sequence[Observer]) -> None:
        self._guard = listener if isinstance(listener, Guard) else None
        self._target = listener.target if isinstance(listener, Guard) else listener
        if isinstance(listener, Wrapper):
            self.concurrent, self.rank, self.container = listener.concurrent, listener.rank, listener.container
            listener = listener.__wrapped__
        super().__init__(listener)
        self._dispatch, self._observers = dispatch, observers

    async def __call__(self, event: Any) -> None:
        if self._guard is None:
            await self._watch(event)
        else:
            await self._guard(event, listener=self._watch)

    async def _watch(self, event: Any) -> None:
        call = Call(dispatch=self._dispatch, listener=self.__wrapped__)
        with _observed(self._observers, "listener", call, event):
            await self._target(event)


@contextmanager
def _observed(observers: Sequence[Observer], what: str, span: Dispatch | Call, event: Any) -> Generator[None]:
    _tell(observers, f"before_{what}", span)
    started = perf_counter()
    try:
        yield
    except CancelledError as error:
        span.outcome, span.error = "cancelled", error
        raise
    except BaseException as error:
        span.outcome, span.error = "failed", error
        raise
    else:
        span.outcome = "stopped" if event.propagation_stopped else "completed"
    finally:
        span.duration = perf_counter() - started
        _tell(observers, f"after_{what}", span)


def _tell(observers: Sequence[Observer], hook: str, span: Dispatch | Call) -> None:
    for observer in observers:
        try:
            getattr(observer, hook)(span)
        except Exception:
            logger.exception("observer failed", extra={"observer": repr(observer), "hook": hook})
