"""Tasks that silbo runs for as long as a consumer or a relay runs, and the code of the host inside of them.

A host's listeners and hooks run in these tasks, so that a dispatch costs no task of its own. What such code does to its
task ends with it: a cancellation that it left behind, and the context variables that it has set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Generator, Iterator
from contextvars import Context, copy_context
from pathlib import Path
from time import monotonic
from typing import Any, Final, Generic, Protocol, TypeVar

from silbo.errors import CircularWait, StopIncomplete

__all__ = ["Begun", "CountsSlow", "HostCode", "OwnTasks"]

ENDS_WITHIN: Final = 5.0
"""Seconds that the end of a run waits for code that it has cancelled."""
LOOKS: Final = 4
"""Looks for slow code in the time after which code counts as slow."""
PACKAGE: Final = str(Path(__file__).parent)

_T = TypeVar("_T")


class CountsSlow(Protocol):
    """Counts with the number of calls of a host's code that now run for too long."""

    slow: int


class OwnTasks:
    """The tasks of one consumer or relay. They run until they are told to end.

    A task that ends before, for whatever reason, makes :attr:`error`, and ``on_failure`` is called.

    Args:
        owner: The word for the owner, for errors: ``consumer``.
        stopping: Set when tasks may end by themselves.
        on_failure: Called when a task has failed; ``stopping`` is set after it.
        stats: Counts the slow calls of the host's code.

    Attributes:
        error: The first error of a task.
        runner: The task that waits for all of them.
    """

    def __init__(
        self, owner: str, *, stopping: asyncio.Event, on_failure: Callable[[], None], stats: CountsSlow
    ) -> None:
        self.owner: Final = owner
        self.error: BaseException | None = None
        self.runner: asyncio.Task[Any] | None = None
        self.stats: Final = stats
        self.host_code: Final[dict[asyncio.Task[Any], HostCode[Any] | None]] = {}  # that runs now, by its task
        self._stopping = stopping
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()

    # -- tasks ----------------------------------------------------------------------------------------------

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that runs until the stop, or until it is told to end."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def raise_error(self) -> None:
        """Raise the error of a task that has failed."""
        if self.error is not None:
            raise self.error

    def refuse_circle(self, call: str) -> None:
        """Refuse a call that waits for the run's end, if it is made by code that the run waits for.

        Raises:
            CircularWait: One of these tasks makes the call.
        """
        if asyncio.current_task() in self._tasks:
            raise CircularWait(self.owner, call)

    def is_ending(self, task: asyncio.Task[Any] | None) -> bool:
        """Return True if the task was told to end: a cancellation of it is meant."""
        return task in self._ending

    def check_cancelled(self) -> None:
        """Raise a cancellation of this task that an awaited call has swallowed, as ``asyncio.wait_for`` can on Python 3.11.

        A cancellation that is not the owner's was left behind by other code, and is taken back. Call this in every endless loop
        of such a task.
        """
        task = asyncio.current_task()
        if task in self._ending:
            raise asyncio.CancelledError
        if task is not None and task.cancelling():
            _take_back(task)

    async def end(self, tasks: Collection[asyncio.Task[Any]], within: float) -> None:
        """Wait up to ``within`` seconds for tasks to end; cancel those that last longer, and wait for them too.

        Code that goes on all the same is left behind after ENDS_WITHIN seconds: :attr:`error` is then a StopIncomplete.
        """
        late = {task for task in tasks if not task.done()}
        if late and within > 0:
            _, late = await asyncio.wait(late, timeout=within)
        if late:
            await self._cancel(late)

    async def end_all(self) -> None:
        """Cancel the tasks that still run, and wait for them as :meth:`end` does."""
        await self.end(tuple(self._tasks), 0)

    async def _cancel(self, late: set[asyncio.Task[Any]]) -> None:
        runner = asyncio.current_task()
        assert runner is not None
        self._ending |= late
        requests = runner.cancelling()
        for task in late:
            task.cancel()
        in_circle = (
            runner.cancelling() > requests
        )  # a cancelled task waits for this one, and has handed the cancellation on
        cancelled: asyncio.CancelledError | None = None
        until = monotonic() + ENDS_WITHIN
        while late and (left := until - monotonic()) > 0:
            try:
                _, late = await asyncio.wait(late, timeout=left)
            except asyncio.CancelledError as error:
                cancelled = error
                late = {task for task in late if not task.done()}
        if late and self.error is None:
            self.error = StopIncomplete(self.owner, ENDS_WITHIN, tuple(code.place() for code in self._running_code()))
        if in_circle:
            while runner.cancelling() > requests:
                runner.uncancel()
        elif cancelled is not None:
            raise cancelled

    def _running_code(self) -> list[HostCode[Any]]:
        return [code for code in self.host_code.values() if code is not None]

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self.host_code.pop(task, None)
        error: BaseException | None = None
        if not task.cancelled():
            error = task.exception()
            if error is None and not self._stopping.is_set():
                error = RuntimeError(f"a task of the {self.owner} ended before the stop")
        elif task not in self._ending:
            error = RuntimeError(f"a task of the {self.owner} was cancelled, but not by the {self.owner}")
        if error is not None and self.error is None:
            self.error = error
            self._on_failure()

    # -- the host's code ------------------------------------------------------------------------------------

    def isolate(self, work: Coroutine[Any, Any, _T], what: str, about: object = None) -> HostCode[_T]:
        """Run a coroutine of the host's in this task, in a context of its own, and take back the cancellations that it leaves.

        Args:
            work: The coroutine.
            what: The words for it, for errors: ``a listener``.
            about: The delivery or message that it is about.

        Raises:
            RuntimeError: It was cancelled, but not by the owner.
            CircularWait: It awaits the run that waits for it. Raised inside of it.
        """
        return HostCode(self, work, what, about)

    async def watch(self, after: float, report: Callable[[HostCode[Any], float], None]) -> None:
        """Look for code of the host's that has run for ``after`` seconds; report it then, and each time that has doubled."""
        first_seen: dict[HostCode[Any], float] = {}
        report_at: dict[HostCode[Any], float] = {}
        while True:
            await asyncio.sleep(after / LOOKS)
            self.check_cancelled()
            now = monotonic()
            running = self._running_code()
            first_seen = {code: first_seen.get(code, now) for code in running}
            report_at = {code: report_at.get(code, after) for code in running}
            for code, since in first_seen.items():
                if now - since >= report_at[code]:
                    report_at[code] *= 2
                    self.stats.slow += not code.is_slow
                    code.is_slow = True
                    report(code, now - since)


class Begun(Generator[Any, Any, Any]):
    """A coroutine that has made its first step, in this task; to be awaited once, for the rest.

    Args:
        coroutine: The coroutine.
        context: The context that it runs in.
        awaited: What it waits for since its first step.
        error: The error that its first step has ended with; a StopIteration if it is done.

    Attributes:
        context: The context that it runs in.
        cr_await: The coroutine: whoever looks for the code that runs now finds it here, as in a coroutine.
    """

    __slots__ = ("_awaited", "_error", "_is_told", "context", "cr_await")

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], context: Context, awaited: object, error: BaseException | None
    ) -> None:
        self.context = context
        self.cr_await = coroutine
        self._awaited = awaited
        self._error = error
        self._is_told = False

    def __await__(self) -> Generator[Any, Any, Any]:
        return self

    def send(self, value: Any) -> Any:
        """Return what the coroutine waits for: since its first step at the first call, then after a further step."""
        if self._is_told:
            return self.cr_await.send(value)
        self._is_told = True
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or it would hold itself
        return self._awaited

    def throw(self, typ: Any, val: Any = None, tb: Any = None) -> Any:
        """Raise an error in the coroutine."""
        return self.cr_await.throw(typ if val is None else val)


class HostCode(Generic[_T]):
    """A coroutine of the host's that runs in a task of silbo's; to be awaited once.

    Args:
        tasks: The owner's tasks.
        coroutine: The coroutine.
        what: The words for it.
        about: The delivery or message that it is about; None if there is none.
        context: The context that it runs in; None for a new one.

    Attributes:
        what: The words for it.
        about: The delivery or message that it is about; None if there is none.
        is_slow: True if it has run for too long.
    """

    __slots__ = ("_context", "_coroutine", "_tasks", "about", "is_slow", "what")

    def __init__(
        self,
        tasks: OwnTasks,
        coroutine: Coroutine[Any, Any, _T],
        what: str,
        about: object,
        context: Context | None = None,
    ) -> None:
        self._tasks = tasks
        self._coroutine = coroutine
        self._context = context
        self.what = what
        self.about = about
        self.is_slow = False

    def __await__(self) -> Generator[Any, Any, _T]:
        # A task's cancellation reaches the coroutine through throw(), as everything else does: so each step can be run in
        # the context, and what is left over is seen at the end. A task of its own costs twenty times as much.
        tasks = self._tasks
        task = asyncio.current_task()
        assert task is not None
        run = (copy_context() if self._context is None else self._context).run
        send = self._coroutine.send
        tasks.host_code[task] = self
        result: Any = None
        error: BaseException | None = None
        try:
            awaited: Any = run(send, None)
            while True:
                try:
                    if awaited is tasks.runner and awaited is not None:
                        # As the task would reset it: the coroutine may await it again.
                        future: Any = awaited
                        future._asyncio_future_blocking = False  # noqa: SLF001  # the protocol of tasks and futures
                        raise CircularWait(tasks.owner, "run()")
                    answer = yield awaited
                except BaseException as thrown:  # noqa: BLE001  # the coroutine decides
                    awaited = run(self._coroutine.throw, thrown)
                else:
                    awaited = run(send, answer)
        except StopIteration as ended:
            result = ended.value
        except GeneratorExit:  # the loop is gone
            raise
        except BaseException as raised:  # noqa: BLE001  # raised again below
            error = raised
        finally:
            tasks.host_code[task] = None
            if self.is_slow:
                tasks.stats.slow -= 1
        if task.cancelling() or getattr(task, "_must_cancel", False) or (error is not None and _is_cancellation(error)):
            yield from self._end_cancelled(task, error)
        if error is not None:
            try:
                raise error
            finally:
                del error  # or it would hold itself
        return result  # type: ignore[no-any-return]  # StopIteration has no type

    def _end_cancelled(self, task: asyncio.Task[Any], error: BaseException | None) -> Generator[None, None, None]:
        """Take back the cancellations that are left, unless the task is told to end: then the owner's next check finds it.

        Raises:
            CancelledError: The task is told to end, and the coroutine was cancelled.
            RuntimeError: It is not, and the coroutine was cancelled.
        """
        tasks = self._tasks
        if not tasks.is_ending(task):
            _take_back(task)
            try:
                # Python 3.11 and 3.12 raise a cancellation that was taken back all the same. And if all tasks of the loop are
                # cancelled, this lets the owner hear of it first.
                yield
            except asyncio.CancelledError:
                _take_back(task)
        if error is not None and _is_cancellation(error):
            if tasks.is_ending(task):
                raise asyncio.CancelledError
            raise RuntimeError(f"{self.what} was cancelled, but not by its {tasks.owner}") from error

    def place(self) -> str:
        """Return the function that runs, its file and line, and the line that it waits in; else the words for the code."""
        for frame in _frames(self._coroutine):
            code = frame.f_code
            if not code.co_filename.startswith(PACKAGE) and code.co_name not in ("adispatch", "_adispatch"):
                name = f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"
                return f"{name}, now in line {frame.f_lineno}"
        return self.what


def _frames(awaitable: Any) -> Iterator[Any]:
    """Yield the frames of a coroutine that waits, from the outermost in."""
    while awaitable is not None:
        frame = getattr(awaitable, "cr_frame", None) or getattr(awaitable, "gi_frame", None)
        if frame is not None:
            yield frame
        awaitable = getattr(awaitable, "cr_await", None) or getattr(awaitable, "gi_yieldfrom", None)


def _take_back(task: asyncio.Task[Any]) -> None:
    while task.cancelling():
        task.uncancel()


def _is_cancellation(error: BaseException) -> bool:
    """Return True if an error is a cancellation, or a group of errors with cancellations, as of concurrent listeners."""
    if isinstance(error, BaseExceptionGroup):
        return not isinstance(error, ExceptionGroup) and error.split((Exception, asyncio.CancelledError))[1] is None
    return isinstance(error, asyncio.CancelledError)
