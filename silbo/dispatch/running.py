"""Running listeners: each under the options of its registration, and all listeners of a dispatch in order."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial, update_wrapper
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from silbo.dispatch.options import ErrorPolicy, Listener, Options
from silbo.dispatch.received_event import received
from silbo.errors import ListenerTimeout
from silbo.event import collected_errors
from silbo.work.unit_of_work import call_within_units, unit_of_work

if TYPE_CHECKING:
    from silbo.protocols import Container

__all__ = [
    "ConfiguredListener",
    "Observe",
    "WrappedListener",
    "fail_delivery",
    "limit_listeners",
    "run_dispatch",
    "run_listeners",
]

Observe: TypeAlias = Callable[[Listener, Any], Awaitable[None]]
"""A callable ``(run, event)`` that awaits ``run(event)``."""


class WrappedListener:
    """A callable in the place of a listener: equal to the listener, which is its ``__wrapped__``.

    Attributes:
        concurrent: True if it runs together with neighbours of the same rank that are concurrent too.
        rank: The priority, as it is compared.
        plain: True if a dispatch may simply call it in its order: it is not concurrent, needs no container, and raises its
            errors or handles them itself.
        container: Makes the object of a listener class: then the dispatch is a unit of work.
    """

    concurrent: bool = False
    rank: object = None
    plain: bool = True
    container: Container | None = None

    def __init__(self, listener: Listener) -> None:
        update_wrapper(self, listener, updated=())
        self.__wrapped__: Listener = listener

    def __eq__(self, other: object) -> bool:
        return bool(self.__wrapped__ == (other.__wrapped__ if isinstance(other, WrappedListener) else other))

    def __hash__(self) -> int:
        return hash(self.__wrapped__)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    async def __call__(self, event: Any) -> None:
        """Run the listener."""
        raise NotImplementedError


class ConfiguredListener(WrappedListener):
    """A listener that runs under its options.

    Attributes:
        target: The callable that is run: the listener, or the wrapper of a listener class.
        spent: True when a ``once`` listener has run, or is running.
        was_long: True if it was reported that the listener runs for long.
    """

    was_long: bool = False
    _registered: ConfiguredListener | None = None  # on a copy with another limit: shares its ``spent``

    def __init__(
        self, target: Listener, options: Options, policy: ErrorPolicy, *, rank: object, unregister: Callable[[], None]
    ) -> None:
        super().__init__(target)
        self.target = target
        if isinstance(target, WrappedListener):
            self.__wrapped__ = target.__wrapped__
            self.container = target.container
        self.concurrent = options.concurrent
        self.rank = rank
        self.plain = not options.concurrent and policy != "collect" and self.container is None
        self.spent = False
        self._options = options
        self._policy = policy
        self._unregister = unregister

    async def __call__(self, event: Any, *, listener: Listener | None = None, observe: Observe | None = None) -> None:
        """Run the target, or another listener in its place, under the options.

        Args:
            event: The event.
            listener: Runs in place of the target.
            observe: Called with the run and the event. It awaits the run and sees how it ends: past its time limit, as
                :class:`~silbo.errors.ListenerTimeout`; and an error that the policy handles, as that error.
        """
        target = self.target if listener is None else listener
        if self._options.once and not self.begin_once(event):
            return
        try:
            if observe is None:
                await self._run(target, event)
            else:
                await observe(partial(self._run, target), event)
        except Exception as error:  # the policy decides; a cancellation passes through
            if self._policy == "raise":
                raise
            if _hides_cancellation(error):
                raise asyncio.CancelledError from error
            await self._apply_policy(error, event)

    def registered(self) -> ConfiguredListener:
        """Return the listener as it was registered, of which this may be a copy under other limits."""
        return self if self._registered is None else self._registered

    def begin_once(self, event: Any) -> bool:
        """Begin the only run of a ``once`` listener, and unregister it. True if it had not run before.

        With a received event it stays registered until the delivery is done: see :meth:`end_once`.
        """
        registered = self.registered()
        if registered.spent:
            return False
        registered.spent = True
        dispatched = received.get()
        if dispatched is not None and dispatched.has(event):
            dispatched.hold(self)
        else:
            self._unregister()
        return True

    def end_once(self, *, done: bool) -> None:
        """Unregister a ``once`` listener whose run was part of a delivery; let it run again if the delivery has failed."""
        if done:
            self._unregister()
        else:
            self.registered().spent = False

    def limited(self, timeout: float) -> ConfiguredListener:
        """Return this listener with a time limit in seconds, unless it has one."""
        if self._options.timeout is not None:
            return self
        limited = copy(self)
        vars(limited).update(_registered=self.registered(), _options=replace(self._options, timeout=timeout))
        return limited

    async def _run(self, listener: Listener, event: Any) -> None:
        limit = self._options.timeout
        if limit is None:
            await listener(event)
            return
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                await listener(event)
        except TimeoutError:
            if not scope.expired():
                raise
        if scope.expired():  # also if the listener has caught the cancellation and returned: its work may be half done
            raise ListenerTimeout(self.__wrapped__, limit)

    async def _apply_policy(self, error: Exception, event: Any) -> None:
        if callable(self._policy):
            answer = self._policy(error, event, self.__wrapped__)
            if inspect.isawaitable(answer):
                await answer
            fail_delivery(error, event)
        elif (collected := collected_errors(event)) is not None:
            collected.append(error)
        else:  # run by hand, outside of a dispatch
            raise error


def _hides_cancellation(error: Exception) -> bool:
    """Return True if the task is being cancelled, and an error has taken the place of that: a clean-up that has failed."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return False
    seen: set[int] = set()  # an error may be its own cause
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, asyncio.CancelledError | TimeoutError):
            return isinstance(cause, asyncio.CancelledError)  # a time limit cancels, too
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


def fail_delivery(error: Exception, event: Any) -> None:
    """Let an error that the dispatch does not raise fail the delivery, if the event was received."""
    dispatched = received.get()
    if dispatched is not None and dispatched.has(event):
        dispatched.isolated = [*(dispatched.isolated or ()), error]


def limit_listeners(listeners: Iterable[Listener], timeout: float) -> tuple[Listener, ...]:
    """Return listeners of which each has a time limit, its own or this one, in seconds."""
    options = Options(timeout=timeout)
    return tuple(
        listener.limited(timeout)
        if isinstance(listener, ConfiguredListener)
        else ConfiguredListener(listener, options, "raise", rank=None, unregister=_keep_registered)
        for listener in listeners
    )


def _keep_registered() -> None:
    """Do nothing, as the listener runs more than once."""


async def run_dispatch(
    adispatch: Callable[[Sequence[Listener], Any], Awaitable[object]],
    container: Container | None,
    listeners: Sequence[Listener],
    event: Any,
) -> None:
    """Run the listeners of a dispatch with ``adispatch``, in a unit of work if a listener is made by the container.

    Raises:
        ExceptionGroup: The errors that were collected, and last the error that ended the run.
        Exception: The error that ended the run, where no error was collected.
    """
    if container is not None:
        listeners = tuple(listeners)  # a host's get_listeners may give an iterator
        if any(isinstance(listener, WrappedListener) and listener.container is container for listener in listeners):
            async with unit_of_work(container):
                await run_dispatch(adispatch, None, listeners, event)
            return
    errors = collected_errors(event)
    assert errors is not None
    try:
        await adispatch(listeners, event)
    except Exception as error:
        if not errors:
            raise
        errors.append(error)
    if errors:
        raise ExceptionGroup(f"{len(errors)} listeners of {event.name!r} failed", errors)


async def run_listeners(listeners: Iterable[Listener], event: Any) -> None:
    """Run listeners in order until one stops the event. Concurrent neighbours of equal rank run together."""
    listeners = tuple(listeners)
    for listener in listeners:
        if isinstance(listener, WrappedListener) and listener.concurrent:
            await _run_steps(listeners, event)
            return
    for listener in listeners:
        await listener(event)
        if event.propagation_stopped:
            break


async def _run_steps(listeners: Sequence[Listener], event: Any) -> None:
    for (_, concurrent), neighbours in groupby(listeners, key=_step_key):
        together = tuple(neighbours)
        steps: Sequence[Sequence[Listener]] = [together] if concurrent else list(zip(together, strict=True))
        for step in steps:
            if len(step) == 1:
                await step[0](event)
            else:
                await _run_together(step, event)
            if event.propagation_stopped:
                return


def _step_key(listener: Listener) -> tuple[object, bool]:
    if isinstance(listener, WrappedListener) and listener.concurrent:
        return listener.rank, True
    return None, False


async def _run_together(listeners: Sequence[Listener], event: Any) -> None:
    """Run listeners at once. All have ended when this returns or raises, also when it is cancelled."""
    results = await asyncio.gather(
        *(call_within_units(listener, event) for listener in listeners), return_exceptions=True
    )
    errors = [result for result in results if isinstance(result, BaseException)]
    if len(errors) > 1:
        raise BaseExceptionGroup(f"{len(errors)} concurrent listeners failed", errors)
    for error in errors:
        raise error
