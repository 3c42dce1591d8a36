"""Middlewares: callables around the handling of every request. The first is the outermost."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from silbo._checks import check_list
from silbo.dispatch.options import is_async
from silbo.mediator.requests import check_method
from silbo.work.unit_of_work import Unit

__all__ = ["AnyMiddleware", "Handle", "LoggingMiddleware", "Middleware", "check_middlewares", "wrap_handle"]

logger = logging.getLogger(__name__)

Handle: TypeAlias = Callable[[Any], Awaitable[Any]]
"""Takes a request and returns the response: the next middleware, or the handler with its events."""


class Around(Protocol):
    """A middleware in one method."""

    def __call__(self, request: Any, handle: Handle, /) -> Awaitable[Any]:
        """Return ``await handle(request)``, or answer in its place."""
        ...


class Before(Protocol):
    """A middleware in the older style of Diator: the part before the handler."""

    def process_request(self, request: Any, /) -> Awaitable[object]:
        """Do what has to be done before the handler."""
        ...


class After(Protocol):
    """A middleware in the older style of Diator: the part after the handler."""

    def process_response(self, response: Any, /) -> Awaitable[object]:
        """Do what has to be done after a handler that has succeeded."""
        ...


AnyMiddleware: TypeAlias = Around | Before | After | type[Around] | type[Before] | type[After]
"""An async callable ``(request, handle)``; an object with ``process_request`` or ``process_response``; a class of either,
of which the container makes an object for each request."""

HOOKS: Final = ("process_request", "process_response")


class Middleware:
    """A base class for both styles: override :meth:`__call__`, or :meth:`process_request` and :meth:`process_response`."""

    async def __call__(self, request: Any, handle: Handle, /) -> Any:
        """Handle a request, with what is to be done before and after.

        When ``handle`` returns, the handler has run **and the events that it collected have been dispatched**. So a
        transaction that is committed after ``handle`` holds the effects of these events, and their messages if an outbox
        stores them in it. Other messages leave when all middlewares have returned.
        """
        return await _call_hooks(self, request, handle)

    async def process_request(self, request: Any, /) -> None:
        """Do what has to be done before the handler."""

    async def process_response(self, response: Any, /) -> None:
        """Do what has to be done after a handler that has succeeded."""


class LoggingMiddleware:
    """A log of requests: class, milliseconds and class of the error of each request, never its data.

    Args:
        logger: Gets the records; by default silbo's own.
        level: Level of the records; for a request that failed, ``WARNING`` or higher.
    """

    def __init__(self, logger: logging.Logger = logger, *, level: int = logging.DEBUG) -> None:
        self._logger = logger
        self._level = level

    async def __call__(self, request: Any, handle: Handle, /) -> Any:
        """Handle a request, and log its beginning and its end."""
        name = type(request).__qualname__
        self._logger.log(self._level, "request begins: %s", name, extra={"request": name})
        begin = time.perf_counter()
        try:
            response = await handle(request)
        except Exception as error:
            level = max(self._level, logging.WARNING)
            self._end("request failed: %s in %.1f ms: %s", name, begin, level, error=type(error).__qualname__)
            raise
        except BaseException as error:
            self._end("request ended: %s in %.1f ms: %s", name, begin, self._level, error=type(error).__qualname__)
            raise
        self._end("request done: %s in %.1f ms", name, begin, self._level)
        return response

    def _end(self, text: str, name: str, begin: float, level: int, **more: str) -> None:
        seconds = time.perf_counter() - begin
        extra = {"request": name, "seconds": seconds, **more}
        self._logger.log(level, text, name, seconds * 1000, *more.values(), extra=extra)


def check_middlewares(middlewares: Iterable[AnyMiddleware]) -> tuple[AnyMiddleware, ...]:
    """Return the middlewares as a tuple.

    Raises:
        TypeError: The argument is not a list, or something in it can't be called around a request; the text says what can.
    """
    given = check_list("middlewares", middlewares)
    for one in given:
        cls = one if isinstance(one, type) else type(one)
        hooks = {name: hook for name in HOOKS if (hook := getattr(cls, name, None)) is not None}
        for name in hooks:
            check_method(cls, name, name.removeprefix("process_"))
        if is_async(one) or is_async(getattr(cls, "__call__", None)):  # noqa: B004  # its type, not whether it is there
            continue
        if not hooks or not all(map(is_async, hooks.values())):
            raise TypeError(
                "a middleware is an async callable (request, handle), or an object with an async process_request(request) "
                f"or process_response(response), or a class of such objects; not {one!r}"
            )
    return given


def wrap_handle(handle: Handle, middlewares: Sequence[Any], unit: Unit) -> Handle:
    """Return a callable that handles a request with the middlewares around it; the unit makes objects of classes among them."""
    for one in reversed(middlewares):
        handle = partial(_call, one, unit, handle)
    return handle


async def _call(middleware: Any, unit: Unit, handle: Handle, request: Any) -> Any:
    if isinstance(middleware, type):
        middleware = await unit.resolve(middleware)
    if is_async(middleware):
        response = await middleware(request, handle)
        if inspect.iscoroutine(response):
            response.close()
            raise TypeError(
                f"{middleware!r} returned a coroutine that nobody awaited: write 'return await handle(request)'"
            )
        return response
    return await _call_hooks(middleware, request, handle)


async def _call_hooks(middleware: Any, request: Any, handle: Handle) -> Any:
    before, after = (getattr(middleware, name, None) for name in HOOKS)
    if before is not None:
        await before(request)
    response = await handle(request)
    if after is not None:
        await after(response)
    return response
