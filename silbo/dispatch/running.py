"""A listener with options: the wrapper that runs it as its registration asked."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import update_wrapper
from itertools import groupby
from typing import TYPE_CHECKING, Any

from silbo.dispatch.options import ErrorPolicy, Listener, Options
from silbo.errors import ListenerTimeout
from silbo.event import collected_errors
from silbo.work.unit_of_work import call_within_units, unit_of_work

if TYPE_CHECKING:
    from silbo.protocols import Container

__all__ = [
    "Guard",
    "Wrapper",
    "run",
    "settle",
]


class Wrapper:
    """A listener in other clothes: equal to the listener, which is its ``__wrapped__``."""

    concurrent: bool = False
    rank: object = None
    plain: bool = True
    """It asks nothing of the dispatch: it is run in its turn, and keeps or raises its errors itself."""
    container: Container | None = None
    """What makes the object that it runs; its dispatch is a unit of work."""

    def __init__(self, listener: Listener) -> None:
        update_wrapper(self, listener, updated=())
        self.__wrapped__: Listener = listener

    def __eq__(self, other: object) -> bool:
        return bool(self.__wrapped__ == (other.__wrapped__ if isinstance(other, Wrapper) else other))

    def __hash__(self) -> int:
        return hash(self.__wrapped__)

    def __repr__(self) -> str:
        return repr(self.__wrapped__)

    async def __call__(self, event: Any) -> None:
        """Run the listener."""
        raise NotImplementedError


class Guard(Wrapper):
    """A listener with its options applied.

    Attributes:
        target: What it runs inside of them: the listener, or what stands in for its class.
    """

    def __init__(
        self, target: Listener, options: Options, policy: ErrorPolicy, *, rank: object, retire: Callable[[], None]
    ) -> None:
        super().__init__(target)
        self.target = target
        if isinstance(target, Wrapper):
            self.__wrapped__, self.container = target.__wrapped__, target.container
        self.concurrent, self.rank = options.concurrent, rank
        self.plain = not options.concurrent and policy != "collect" and self.container is None
        self._options, self._policy, self._retire, self.spent = options, policy, retire, False

    async def __call__(self, event: Any, *, listener: Listener | None = None) -> None:
        """Run it, or in its place another: what watches it runs inside of the options."""
        if self._options.once:
            if self.spent:
                return
            self.spent = True
            self._retire()
        try:
            await self._run(listener or self.target, event)
        except Exception as error:  # the policy decides; a cancellation passes through
            if self._policy == "raise":
                raise
            await self._settle(error, event)

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
            if scope.expired():
                raise ListenerTimeout(self.__wrapped__, limit) from None
            raise

    async def _settle(self, error: Exception, event: Any) -> None:
        if callable(self._policy):
            answer = self._policy(error, event, self.__wrapped__)
            if inspect.isawaitable(answer):
                await answer
        elif (collected := collected_errors(event)) is not None:
            collected.append(error)
        else:  # run by hand, outside of a dispatch
            raise error


async def settle(
    adispatch: Callable[[Sequence[Listener], Any], Awaitable[object]],
    container: Container | None,
    listeners: Sequence[Listener],
    event: Any,
) -> None:
    """Run them all, then raise what was collected, together with what ended the run.

    In one unit of work, where one of them needs an object of the container.
    """
    if container is not None:
        listeners = tuple(listeners)  # a host's get_listeners may give what can be read once
        if any(isinstance(one, Wrapper) and one.container is container for one in listeners):
            async with unit_of_work(container):
                await settle(adispatch, None, listeners, event)
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


async def run(listeners: Iterable[Listener], event: Any) -> None:
    """Run listeners in turn until one stops the event; neighbours of equal rank that are concurrent share a turn."""
    for turn in _turns(tuple(listeners)):
        if len(turn) == 1:
            await turn[0](event)
        else:
            await _run_together(turn, event)
        if event.propagation_stopped:
            break


def _turns(listeners: Sequence[Listener]) -> Iterator[Sequence[Listener]]:
    if not any(isinstance(listener, Wrapper) and listener.concurrent for listener in listeners):
        yield from zip(listeners, strict=True)
        return
    for (_, concurrent), turn in groupby(listeners, key=_place):
        if concurrent:
            yield tuple(turn)
        else:
            yield from zip(turn, strict=True)


def _place(listener: Listener) -> tuple[object, bool]:
    if isinstance(listener, Wrapper) and listener.concurrent:
        return listener.rank, True
    return None, False


async def _run_together(listeners: Sequence[Listener], event: Any) -> None:
    """Run them at once; all have ended when this returns or raises, also when it is cancelled."""
    results = await asyncio.gather(
        *(call_within_units(listener, event) for listener in listeners), return_exceptions=True
    )
    errors = [result for result in results if isinstance(result, BaseException)]
    if len(errors) > 1:
        raise BaseExceptionGroup(f"{len(errors)} concurrent listeners failed", errors)
    for error in errors:
        raise error
