"""A listener with options: the wrapper that runs it as its registration asked."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, Literal, TypeAlias

from silbo.errors import ListenerTimeout
from silbo.event import running

__all__ = ["ErrorHandler", "ErrorPolicy", "Guard", "Listener", "Options", "failures", "Wrapper", "check_policy", "is_async"]

Listener: TypeAlias = Callable[[Any], Awaitable[object]]

ErrorHandler: TypeAlias = Callable[[Exception, Any, Listener], object]
"""``(error, event, listener)``, sync or async: isolates, so the dispatch goes on."""

ErrorPolicy: TypeAlias = Literal["raise", "collect"] | ErrorHandler

@dataclass(frozen=True, slots=True)
class Options:
    """How one listener is to be run; the defaults are Whistle's behaviour."""

    once: bool = False
    timeout: float | None = None
    concurrent: bool = False
    on_error: ErrorPolicy | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout is in seconds and above 0, not {self.timeout!r}")
        check_policy(self.on_error, or_none=True)


def check_policy(policy: object, *, or_none: bool = False) -> None:
    """Refuse what is no error policy.

    Raises:
        TypeError: it is neither ``"raise"`` nor ``"collect"`` nor callable.
    """
    if policy in ("raise", "collect") or callable(policy) or (or_none and policy is None):
        return
    raise TypeError(f'on_error is "raise", "collect" or a callable (error, event, listener), not {policy!r}')


def is_async(listener: object) -> bool:
    """Whether calling it gives a coroutine: functions, methods, partials, mocks, objects with an async ``__call__``."""
    while isinstance(listener, partial):
        listener = listener.func
    test = inspect.iscoroutinefunction if sys.version_info >= (3, 14) else asyncio.iscoroutinefunction
    return test(listener) or (not isinstance(listener, type) and test(getattr(type(listener), "__call__", None)))


class Wrapper:
    """A listener in other clothes: equal to the listener, which is its ``__wrapped__``."""

    concurrent: bool = False
    rank: object = None
    plain: bool = True
    """It asks nothing of the dispatch: it is run in its turn, and keeps or raises its errors itself."""

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
        raise NotImplementedError


class Guard(Wrapper):
    """A listener with its options applied."""

    def __init__(
        self, listener: Listener, options: Options, policy: ErrorPolicy, *, rank: object, retire: Callable[[], None]
    ) -> None:
        super().__init__(listener)
        self.concurrent, self.rank = options.concurrent, rank
        self.plain = not options.concurrent and policy != "collect"
        self._options, self._policy, self._retire, self._spent = options, policy, retire, False

    async def __call__(self, event: Any, *, listener: Listener | None = None) -> None:
        """Run it, or in its place another: what watches it runs inside of the options."""
        if self._options.once:
            if self._spent:
                return
            self._spent = True
            self._retire()
        try:
            await self._run(listener or self.__wrapped__, event)
        except Exception as error:  # the policy decides; a cancellation passes through
            if self._policy == "raise":
                raise
            await self._settle(error, event)

    async def _run(self, listener: Listener, event: Any) -> None:
        limit = self._options.timeout
        if limit is None:
            await listener(event)
            return
        try:
            async with asyncio.timeout(limit) as scope:
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
        elif isinstance(collected := running(event), list):
            collected.append(error)
        else:  # run by hand, outside of a dispatch
            raise error
