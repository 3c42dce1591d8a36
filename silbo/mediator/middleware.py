"""What is around the handling of every request: the first middleware is the outermost."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from silbo._checks import check_list
from silbo.dispatch.options import is_async
from silbo.work.unit_of_work import Unit

__all__ = ["AnyMiddleware", "Handle", "LoggingMiddleware", "Middleware", "check_middlewares", "through"]

logger = logging.getLogger(__name__)

Handle: TypeAlias = Callable[[Any], Awaitable[Any]]
"""What a middleware is around: takes the request, gives the response."""


class Around(Protocol):
    """Takes the request and what handles it, and gives the response."""

    def __call__(self, request: Any, handle: Handle, /) -> Awaitable[Any]:
        """Call ``await handle(request)``, or answer in its place."""
        ...


class Before(Protocol):
    """The older style."""

    def process_request(self, request: Any, /) -> Awaitable[object]:
        """Before the handler."""
        ...


class After(Protocol):
    """The older style."""

    def process_response(self, response: Any, /) -> Awaitable[object]:
        """After it, where it succeeded."""
        ...


AnyMiddleware: TypeAlias = Around | Before | After | type[Around] | type[Before] | type[After]
"""An async callable ``(request, handle)``; an object with ``process_request`` or ``process_response``; a class of either,
of which the container makes an object for each request."""

HOOKS: Final = ("process_request", "process_response")


class Middleware:
    """A base class for both ways: override :meth:`__call__`, or what is to be done before and after."""

    async def __call__(self, request: Any, handle: Handle, /) -> Any:
        """Around the handler **and the events that it has collected**: when ``handle`` returns, they have been dispatched.

        So a transaction that is committed after ``handle`` has their effects in it, and their messages where an outbox
        stores them in it. Other messages leave when all middlewares have returned.
        """
        return await _before_and_after(self, request, handle)

    async def process_request(self, request: Any, /) -> None:
        """Before the handler."""

    async def process_response(self, response: Any, /) -> None:
        """After it, where it succeeded."""


class LoggingMiddleware:
    """Logs each request: its class, how long it took, and whether it failed; never what is in it.

    Args:
        logger: Where to; by default silbo's own.
        level: Of its lines; that of a request that failed is a warning at least.
    """

    def __init__(self, logger: logging.Logger = logger, *, level: int = logging.DEBUG) -> None:
        self._logger, self._level = logger, level

    async def __call__(self, request: Any, handle: Handle, /) -> Any:
        """Log, and handle."""
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
    """These, or an error where one can't be called around a request.

    Raises:
        TypeError: says what a middleware is; or they are no list.
    """
    given = check_list("middlewares", middlewares)
    for one in given:
        cls = one if isinstance(one, type) else type(one)
        if is_async(one) or is_async(getattr(cls, "__call__", None)):  # noqa: B004  # its type, not whether it is there
            continue
        hooks = [hook for name in HOOKS if (hook := getattr(cls, name, None)) is not None]
        if not hooks or not all(map(is_async, hooks)):
            raise TypeError(
                "a middleware is an async callable (request, handle), or an object with an async process_request(request) "
                f"or process_response(response), or a class of such objects; not {one!r}"
            )
    return given


def through(middlewares: Sequence[Any], unit: Unit, handle: Handle) -> Handle:
    """What handles a request with these around it."""
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
    return await _before_and_after(middleware, request, handle)


async def _before_and_after(middleware: Any, request: Any, handle: Handle) -> Any:
    before, after = (_hook(middleware, name) for name in HOOKS)
    if before is not None:
        await before(request)
    response = await handle(request)
    if after is not None:
        await after(response)
    return response


def _hook(middleware: Any, name: str) -> Callable[[Any], Awaitable[object]] | None:
    written = inspect.getattr_static(type(middleware), name, None)
    if inspect.isfunction(written) and len(inspect.signature(written).parameters) == 1:
        return written  # without self, as on Diator's page
    found: Callable[[Any], Awaitable[object]] | None = getattr(middleware, name, None)
    return found
