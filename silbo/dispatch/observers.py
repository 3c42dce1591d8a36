"""Observers: hooks around dispatches and listeners, for traces and metrics."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from silbo.dispatch.on_loop import Stepped
from silbo.dispatch.options import Listener, is_async
from silbo.dispatch.policy_listener import as_coroutine
from silbo.dispatch.running import ConfiguredListener, WrappedListener

__all__ = ["Call", "Dispatch", "Observer", "Outcome", "check_observers", "list_observers", "observe_dispatch"]

logger = logging.getLogger(__name__)

_O = TypeVar("_O")

Outcome: TypeAlias = Literal["running", "completed", "stopped", "failed", "cancelled"]
"""The end of a dispatch or of a call of a listener. A listener is ``stopped`` if it stopped the event, and ``failed`` also
if its error was collected or went to a hook."""


@dataclass(slots=True, eq=False)
class Dispatch:
    """One dispatch: the same object before and after it.

    Attributes:
        name: The dispatched name.
        event: The event.
        listeners: The listeners of the name, in running order.
        heard: True if one of the listeners is meant for the name. Bridges are not, nor are listeners that are registered for
            ``**`` alone: they hear a misspelt name as well.
        duration: Seconds; 0 before the end.
        outcome: ``running`` before the end.
        error: The error that the dispatch raised; None if there was none.
        began: The time of its beginning, on the clock of ``time.perf_counter``; 0 before.
        waited: Seconds of ``duration`` in which its task was suspended: for the rest it held the event loop, in its own code or in
            all that it awaited. None unless an observer has set it to 0.0 in ``before_dispatch``, which asks for the measurement.
    """

    name: Hashable
    event: Any
    listeners: Sequence[Listener]
    duration: float = 0.0
    outcome: Outcome = "running"
    error: BaseException | None = None
    heard: bool = True
    began: float = 0.0
    waited: float | None = None


@dataclass(slots=True, eq=False)
class Call:
    """One call of a listener: the same object before and after it.

    Attributes:
        dispatch: The dispatch of the call.
        listener: The listener as it was registered.
        plugin: The plugin that has added it; empty for the host's.
        duration: Seconds; 0 before the end.
        outcome: ``running`` before the end.
        error: The error that the listener raised, also if the dispatch went on; None if there was none.
        began: The time of its beginning, on the clock of ``time.perf_counter``; 0 before.
        waited: Seconds of ``duration`` in which its task was suspended: see :class:`Dispatch`. None unless an observer has set it to
            0.0 in ``before_listener``.
    """

    dispatch: Dispatch
    listener: Listener
    duration: float = 0.0
    outcome: Outcome = "running"
    error: BaseException | None = None
    plugin: str = ""
    began: float = 0.0
    waited: float | None = None


@runtime_checkable
class Observer(Protocol):
    """An object that is called around every dispatch and listener, in the dispatching task. Its errors are only logged.

    Its methods are sync: nobody would await them. An observer may have more methods, each by itself, which the bridges and
    consumers of the dispatcher call:

    - ``before_publish(publishing)`` and ``after_publish(publishing)`` around each publish of a bridge, with a
      :class:`~silbo.Publishing`;
    - ``after_receive(deliveries, subscription)`` with the deliveries that a consumer has received in one go;
    - ``before_attempt(attempt)`` and ``after_attempt(attempt)`` around each attempt of a delivery, with an
      :class:`~silbo.Attempt`: in the task and the context of its listeners;
    - ``after_retry(delivery, error, delay)`` when an attempt has failed and another one follows in ``delay`` seconds;
    - ``after_dead_letter(delivery, error)`` with each delivery that was given up, and its
      :class:`~silbo.errors.DeliveryGivenUp`.
    """

    def before_dispatch(self, dispatch: Dispatch) -> None:
        """Observe the beginning of a dispatch: the listeners are known, and none has run."""

    def after_dispatch(self, dispatch: Dispatch) -> None:
        """Observe the end of a dispatch: ``duration``, ``outcome`` and ``error`` are set."""

    def before_listener(self, call: Call) -> None:
        """Observe the beginning of a listener's call."""

    def after_listener(self, call: Call) -> None:
        """Observe the end of a listener's call: ``duration``, ``outcome`` and ``error`` are set."""


_DISPATCH: Final = ("before_dispatch", "after_dispatch")
_LISTENER: Final = ("before_listener", "after_listener")


def check_observers(observers: object) -> None:
    """Refuse an object that is not a sequence of observers.

    Raises:
        TypeError: There is one. Or a method of an observer is async. The text names it.
    """
    if not isinstance(observers, Sequence):
        raise TypeError(f"observers is a list of observers, not {observers!r}")
    for observer in observers:
        if isinstance(observer, type) or not isinstance(observer, Observer):
            raise TypeError(f"{observer!r} is no observer: an object with the four methods of silbo.Observer is")
        for hook in (*_DISPATCH, *_LISTENER):
            if is_async(getattr(observer, hook)):
                raise TypeError(
                    f"{hook} of {observer!r} is async, and nobody would await it: write 'def {hook}', and start a task in it "
                    "for what has to wait"
                )


def list_observers(registrations: Mapping[object, _O]) -> tuple[_O, ...]:
    """Return each registered observer once, in the order of its first registration."""
    return tuple({id(observer): observer for observer in registrations.values()}.values())


async def observe_dispatch(
    observers: Sequence[Observer],
    dispatch: Dispatch,
    run: Callable[[Sequence[Listener], Any], Awaitable[object]] | None,
) -> None:
    """Run a dispatch, and call the observers around it and around each of its listeners.

    Args:
        observers: The observers.
        dispatch: The dispatch.
        run: Runs listeners on an event. None if they are to run one after another, and none of them is a WrappedListener:
            then they need no wrapper for the observation, and a dispatch takes half the time.
    """

    async def run_all(event: Any) -> None:
        if run is not None:
            await run([_ObservedListener(listener, dispatch, observers) for listener in dispatch.listeners], event)
            return
        for listener in dispatch.listeners:
            call = Call(dispatch, listener)
            await _observe(observers, _LISTENER, call, listener, event)
            if call.outcome == "stopped":
                break

    await _observe(observers, _DISPATCH, dispatch, run_all, dispatch.event)


class _ObservedListener(WrappedListener):
    """A listener under observation. Observers see each error before the listener's policy decides about it.

    The time limit is inside of the observation: past it, observers see a :class:`~silbo.errors.ListenerTimeout`.
    """

    _replacement: Listener | None = None  # in place of the target of a listener with options

    _plugin: str = ""

    def __init__(self, listener: Listener, dispatch: Dispatch, observers: Sequence[Observer]) -> None:
        self._configured = listener if isinstance(listener, ConfiguredListener) else None
        self._target = listener
        self._dispatch = dispatch
        self._observers = observers
        if isinstance(listener, WrappedListener):
            self.concurrent = listener.concurrent
            self.rank = listener.rank
            self.container = listener.container
            if (owner := getattr(listener, "owner", None)) is not None:
                self._plugin = owner.name
            listener = listener.__wrapped__
        self.__wrapped__ = listener
        with suppress(AttributeError):  # of a partial, or an object
            self.__name__ = listener.__name__  # not with super().__init__(), which takes ten times as long
            self.__qualname__ = listener.__qualname__

    async def __call__(self, event: Any) -> None:
        if self._configured is None:
            await self._observe(self._target, event)
        else:
            await self._configured(event, listener=self._replacement, observe=self._observe)

    def replaced_by(self, replacement: Listener) -> _ObservedListener:
        """Return a copy that runs another listener in place of this one, under its options."""
        replaced = copy(self)
        vars(replaced).update(_target=replacement, _replacement=replacement)
        return replaced

    async def _observe(self, run: Listener, event: Any) -> None:
        call = Call(dispatch=self._dispatch, listener=self.__wrapped__, plugin=self._plugin)
        await _observe(self._observers, _LISTENER, call, run, event)


async def _observe(
    observers: Sequence[Observer], hooks: tuple[str, str], span: Dispatch | Call, run: Listener, event: Any
) -> None:
    """Await ``run(event)`` between two hooks of the observers, and write into the span how it ends."""
    before, after = hooks  # called here, not by a function: one observer of 10 listeners takes 12 % less
    for observer in observers:
        try:
            getattr(observer, before)(span)
        except Exception:
            logger.exception("observer failed", extra={"observer": repr(observer), "hook": before})
    started = span.began = perf_counter()
    try:
        if span.waited is None:
            await run(event)
        else:
            await _Timed(as_coroutine(run(event)), span)
    except CancelledError as error:
        span.outcome = "cancelled"
        span.error = error
        raise
    except BaseException as error:
        span.outcome = "failed"
        span.error = error
        raise
    else:
        span.outcome = "stopped" if event.propagation_stopped else "completed"
    finally:
        span.duration = perf_counter() - started
        for observer in observers:
            try:
                getattr(observer, after)(span)
            except Exception:
                logger.exception("observer failed", extra={"observer": repr(observer), "hook": after})


class _Timed(Stepped):
    """The coroutine of a dispatch or a call. The time between its steps is added up as the time in which it waited."""

    __slots__ = ("_left", "_span")

    def __init__(self, coroutine: Any, span: Dispatch | Call) -> None:
        super().__init__(coroutine)
        self._span = span
        self._left = 0.0

    def _step(self, advance: Callable[[Any], Any], value: Any) -> Any:
        if self._left:
            self._span.waited = (self._span.waited or 0.0) + perf_counter() - self._left
        try:
            return advance(value)
        finally:
            self._left = perf_counter()
