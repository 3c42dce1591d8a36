"""Listeners and their options: the arguments of ``add_listener``."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from inspect import CO_COROUTINE
from types import FunctionType
from typing import Any, Final, Literal, TypeAlias, TypedDict

from silbo._checks import check_seconds

__all__ = [
    "DEFAULTS",
    "ErrorHandler",
    "ErrorPolicy",
    "Listener",
    "ListenerOptions",
    "Options",
    "check_policy",
    "is_async",
]

Listener: TypeAlias = Callable[[Any], Awaitable[object]]
"""An async callable that takes the event."""

ErrorHandler: TypeAlias = Callable[[Exception, Any, Listener], object]
"""A hook ``(error, event, listener)``, sync or async. The dispatch goes on after it."""

ErrorPolicy: TypeAlias = Literal["raise", "collect"] | ErrorHandler
"""An error ends the dispatch (``"raise"``), or is raised with others at its end (``"collect"``), or goes to a hook."""


class ListenerOptions(TypedDict, total=False):
    """The keywords of ``add_listener``, ``listen`` and ``on``."""

    priority: float
    once: bool
    timeout: float | None
    concurrent: bool
    on_error: ErrorPolicy | None


@dataclass(frozen=True, slots=True)
class Options:
    """The options under which a listener runs; ``timeout`` in seconds. The defaults are Whistle's behaviour."""

    once: bool = False
    timeout: float | None = None
    concurrent: bool = False
    on_error: ErrorPolicy | None = None

    def __post_init__(self) -> None:
        if self.timeout is not None:
            check_seconds("timeout", self.timeout)
        check_policy(self.on_error, or_none=True)


def check_policy(policy: object, *, or_none: bool = False) -> None:
    """Refuse an object that is not an error policy.

    Raises:
        TypeError: The object is neither ``"raise"`` nor ``"collect"`` nor callable.
    """
    if policy in ("raise", "collect") or callable(policy) or (or_none and policy is None):
        return
    raise TypeError(f'on_error is "raise", "collect" or a callable (error, event, listener), not {policy!r}')


DEFAULTS: Final = Options()


def is_async(listener: object) -> bool:
    """Return True if a call gives a coroutine: of functions, methods, partials, mocks, objects with an async ``__call__``."""
    if type(listener) is FunctionType and listener.__code__.co_flags & CO_COROUTINE:
        return True
    while isinstance(listener, partial):
        listener = listener.func
    test = inspect.iscoroutinefunction if sys.version_info >= (3, 14) else asyncio.iscoroutinefunction
    return test(listener) or (not isinstance(listener, type) and test(getattr(type(listener), "__call__", None)))  # noqa: B004
