"""Plain functions as listeners: they run in threads of their own, so that they don't block the event loop."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial, update_wrapper
from threading import Condition, Thread, current_thread, get_ident
from typing import Any, Final, Generic, ParamSpec, Self, overload

from silbo._checks import check_count
from silbo.dispatch.options import is_async

__all__ = ["InThread", "ThreadPool", "in_thread"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")

MAX_THREADS: Final = 4
"""Threads of one listener of the host, if its ``in_thread`` does not say it."""
IDLE_FOR: Final = 5.0
"""Seconds after which a thread without work ends."""
REPORT_AFTER: Final = 10.0
"""Seconds after which a run that waits for a free thread is told."""


@overload
def in_thread(function: Callable[P, object], /, *, max_threads: int | None = None) -> InThread[P]: ...
@overload
def in_thread(*, max_threads: int | None = None) -> Callable[[Callable[P, object]], InThread[P]]: ...
def in_thread(function: Any = None, /, *, max_threads: int | None = None) -> Any:
    """Return an async listener that runs a plain function in a thread. Also a decorator, with or without ``max_threads``.

    The dispatch waits for the function, as it waits for any listener. The function sees a copy of the dispatch's context variables.
    A thread can't be cancelled: after a time limit or a cancellation the dispatch goes on, and so does the function. Its
    thread counts until it returns.

    Args:
        function: A function of the event, or a method of a subscriber. It may block.
        max_threads: Most runs of this listener at the same time; by default 4. A further run waits for a free thread, and is told in the
            log, or of a plugin's listener as a report, if it waits for long. All listeners of a plugin together have the threads of
            its :class:`~silbo.Budget`, and none has more than its own ``max_threads``, if it gives that.

    Raises:
        TypeError: The function is async, or no function.
    """
    pool = ThreadPool(MAX_THREADS if max_threads is None else max_threads)
    limit = None if max_threads is None else Limit(max_threads)
    return partial(InThread, pool=pool, limit=limit) if function is None else InThread(function, pool, limit)


class Limit:
    """The most runs of one listener at the same time, in a pool that several listeners share."""

    def __init__(self, most: int) -> None:
        self.most: Final = most


class InThread(Generic[P]):
    """A listener that runs a plain function in a thread of a pool. Equal to another one with the same function."""

    def __init__(self, function: Callable[P, object], pool: ThreadPool, limit: Limit | None = None) -> None:
        given: object = function
        if not callable(given) or isinstance(given, type):
            raise TypeError(f"in_thread takes a plain function of the event, not {function!r}")
        if is_async(function):
            raise TypeError(f"{function!r} is async, and needs no in_thread: add it as it is")
        update_wrapper(self, function, updated=())
        self.__wrapped__: Callable[P, object] = function
        self._pool = pool
        self._limit = limit

    async def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> None:
        """Run the function in a thread, and wait for it."""
        answer = await self._pool.run(partial(self.__wrapped__, *arguments, **keywords), self._limit)
        if inspect.isawaitable(answer):
            getattr(answer, "close", bool)()
            raise TypeError(
                f"{self.__wrapped__!r} returned {answer!r}, which nobody awaits: in_thread is for plain functions"
            )

    def with_pool(self, pool: ThreadPool) -> Self:
        """Return the same listener with another pool, which several listeners may share."""
        return type(self)(self.__wrapped__, pool, self._limit)

    def __get__(self, instance: object, owner: type | None = None) -> InThread[...]:
        bind = getattr(self.__wrapped__, "__get__", None)
        if bind is None:
            return self
        function = bind(instance, owner)
        return self if function is self.__wrapped__ else type(self)(function, self._pool, self._limit)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InThread) and bool(self.__wrapped__ == other.__wrapped__)

    def __hash__(self) -> int:
        return hash(self.__wrapped__)

    def __repr__(self) -> str:
        return f"in_thread({self.__wrapped__!r})"


class ThreadPool:
    """Threads for functions that may block. A thread starts when there is work for it, and ends when it has none for a while.

    Other than an executor's, these threads do not hold up the end of the program: a function may hang for ever.

    Args:
        max_threads: Most threads at the same time.
        idle_for: Seconds after which a thread without work ends.
        report: Called with a text if a run waits for a thread for long, once until there is no run; by default it is logged.

    Attributes:
        max_threads: As given.
        threads: The threads that there are now.
    """

    def __init__(
        self, max_threads: int, *, idle_for: float = IDLE_FOR, report: Callable[[str], object] | None = None
    ) -> None:
        self.max_threads: Final = check_count("max_threads", max_threads)
        self._tell: Final = report
        self._idle_for = idle_for
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = Condition()
        self._runs: deque[_Run] = deque()  # that have not begun
        self._begun: dict[int, _Run] = {}  # by the thread that runs it
        self._claims: Counter[Limit] = Counter()  # runs that have begun or wait, of listeners with a limit
        self._idle = 0
        self.threads = 0
        self._reported = False

    async def run(self, function: Callable[[], object], limit: Limit | None = None) -> object:
        """Run a function in a thread, with a copy of the context variables, and return its value.

        A cancellation takes it back if it has not begun; else the function goes on, and its end has no effect.

        Raises:
            Exception: The error of the function.
        """
        loop = asyncio.get_running_loop()
        run = _Run(function, loop, limit)
        waits = self._submit(run)
        report = loop.call_later(REPORT_AFTER, self._report, run) if waits else None
        try:
            answer, error = await run.done
        finally:
            if report is not None:
                report.cancel()
            if not run.done.done() or run.done.cancelled():
                self._take_back(run)
        if error is not None:
            try:
                raise error
            finally:
                del error  # or it would hold itself
        return answer

    def close(self) -> None:
        """Keep no idle thread from now on. Work that is there, or comes, is still done."""
        with self._changed:
            self._idle_for = 0.0
            self._changed.notify_all()

    def busy(self) -> int:
        """Return the number of threads that run a function now."""
        with self._changed:
            return self.threads - self._idle

    def _submit(self, run: _Run) -> bool:
        """Give a run to an idle thread or to a new one. Return True if it has to wait for a free one."""
        if self._process != os.getpid():
            self._begin()  # a forked process has none of its parent's threads
        with self._changed:
            self._runs.append(run)
            if run.limit is not None:
                self._claims[run.limit] += 1
                if self._claims[run.limit] > run.limit.most:
                    return True  # one of the runs before it takes it up at its end
            if len(self._runs) <= self._idle:
                self._changed.notify()
                return False
            if self.threads >= self.max_threads:
                return True
            self.threads += 1
        try:
            Thread(target=self._work, daemon=True).start()
        except RuntimeError:  # the system gives no more threads
            with self._changed:
                self.threads -= 1
            self._take_back(run)
            raise
        return False

    def _take_back(self, run: _Run) -> None:
        with self._changed, suppress(ValueError):  # it has begun
            self._runs.remove(run)
            self._release(run)

    def _release(self, run: _Run) -> None:
        if run.limit is not None:
            self._claims[run.limit] -= 1
            if not self._claims[run.limit]:
                del self._claims[run.limit]

    def _work(self) -> None:
        while (run := self._next()) is not None:
            current_thread().name = f"silbo in_thread {run.name}"
            run.run()
            with self._changed:
                del self._begun[get_ident()]
                self._release(run)
            del run  # an idle thread keeps no event alive

    def _first_free(self) -> _Run | None:
        """Return the run that has waited longest, of those whose listener may have one more."""
        begun = Counter(run.limit for run in self._begun.values() if run.limit is not None)
        return next((run for run in self._runs if run.limit is None or begun[run.limit] < run.limit.most), None)

    def _next(self) -> _Run | None:
        """Return the next run; None if there is none for a while, and the thread has to end."""
        with self._changed:
            self._idle += 1
            try:
                while (run := self._first_free()) is None:
                    self._reported = self._reported and bool(self._runs)
                    if not self._changed.wait(self._idle_for) and self._first_free() is None:
                        self.threads -= 1
                        return None
                self._runs.remove(run)
                self._begun[get_ident()] = run
                return run
            finally:
                self._idle -= 1

    def _report(self, run: _Run) -> None:
        if run not in self._runs or self._reported:
            return
        self._reported = True
        text = self._describe_wait(run)
        if self._tell is not None:
            self._tell(text)
        else:
            extra = {"listener": run.name, "threads": self.max_threads, "seconds": REPORT_AFTER}
            logger.warning("listener waits for a free thread: %s", text, extra=extra)

    def _describe_wait(self, run: _Run) -> str:
        with self._changed:
            begun = dict(self._begun)
        busy = ", ".join(sorted({other.name for other in begun.values()})) or "nothing"
        text = f"{run.name} has waited for a free thread for {REPORT_AFTER:g} s; in the {self.threads} threads: {busy}"
        if waiting := sum(map(_waits_for_dispatch, begun)):
            text += f"; {waiting} of them wait for a dispatch through a portal, and for ever if that is the dispatch that waits here"
        return text


def _waits_for_dispatch(thread: int) -> bool:
    """Return True if a thread waits in a portal."""
    frame = sys._current_frames().get(thread)  # noqa: SLF001  # documented, in spite of its name
    while frame is not None and frame.f_globals.get("__name__") != "silbo.dispatch.sync_callers":
        frame = frame.f_back
    return frame is not None


class _Run:
    """One run of a function in a thread.

    Attributes:
        done: Has the value and the error of the function at its end.
        name: The name of the function.
        limit: The limit of its listener; None if it has none of its own.
    """

    def __init__(self, function: Callable[[], object], loop: asyncio.AbstractEventLoop, limit: Limit | None) -> None:
        self._function = function
        self.limit: Final = limit
        self._context = copy_context()
        self._loop = loop
        # The error is a part of the value: a future takes no StopIteration, and takes other errors for a cancellation.
        self.done: asyncio.Future[tuple[object, BaseException | None]] = loop.create_future()
        called: Any = function.func if isinstance(function, partial) else function
        self.name: Final = getattr(called, "__qualname__", type(called).__qualname__)

    def run(self) -> None:
        """Run the function in this thread, and tell the event loop."""
        answer: object = None
        error: BaseException | None = None
        try:
            answer = self._context.run(self._function)
        except BaseException as raised:  # noqa: BLE001  # raised in the dispatch
            error = raised
        try:
            self._loop.call_soon_threadsafe(self._settle, answer, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass
        finally:
            del error

    def _settle(self, answer: object, error: BaseException | None) -> None:
        if not self.done.done():
            self.done.set_result((answer, error))
