"""The scope of a loaded plugin: what it has added, its tasks, and what has to be undone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import ref

from silbo._reports import describe_error, note_plugin
from silbo.dispatch.listeners import registry_of
from silbo.dispatch.owner import Owner, awaits
from silbo.dispatch.tasks import background_of
from silbo.errors import PluginInvalid, PluginUnloaded
from silbo.plugins.plugin import Plugin, open_plugin
from silbo.plugins.under_way import wait_for_dispatches

if TYPE_CHECKING:
    from silbo.dispatch.dispatcher import AsyncEventDispatcher
    from silbo.dispatch.listeners import ListenerRow

__all__ = ["PluginScope"]

logger = logging.getLogger(__name__)

THREADS_END_WITHIN: Final = 1.0
"""Seconds that an unloading waits for threads whose function is about to return."""
ENDS_WITHIN: Final = 5.0
"""Seconds that an unloading waits for code that it has cancelled, and for a tear-down."""

_T = TypeVar("_T")

_around: ContextVar[tuple[ref[PluginScope], ...]] = ContextVar("silbo_plugins_around", default=())
"""The plugins in whose set-up or tear-down this code runs, or in a task that one of these has started."""


class PluginScope:
    """Everything that one loaded plugin has: its view of the dispatcher, its listeners and tasks, and its tear-down.

    Attributes:
        name: The name of the plugin.
        plugin: Its record.
        view: The dispatcher, as the plugin sees it.
        stack: Undone in reverse order when the plugin is unloaded, before its own tear-down:
            ``await scope.stack.enter_async_context(...)``.
        instance: The object of the plugin; None if it has none.
        settings: Its settings; None if it states none.
        is_closed: True from the beginning of the unloading on.
        has_successor: True if another generation of the plugin has taken over: dispatches under way then still have this one.
        left: What is left behind, or went wrong at the end, each in words.
    """

    def __init__(
        self,
        plugin: Plugin,
        dispatcher: AsyncEventDispatcher,
        owner: Owner,
        make_view: Callable[[AsyncEventDispatcher, PluginScope], AsyncEventDispatcher],
    ) -> None:
        self.name: Final = plugin.name
        self.plugin: Final = plugin
        self.owner: Final = owner
        self.stack: Final = AsyncExitStack()
        self.instance: object = None
        self.settings: object = None
        self.is_closed = False
        self.has_successor = False
        self.left: Final[list[str]] = []
        self.view: Final = make_view(dispatcher, self)
        self._dispatcher = dispatcher
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()
        self._given_up: asyncio.Future[None] | None = None  # while the set-up runs
        self._is_held_up = False  # by the task that closes it
        self._has_ended = True
        self._life: asyncio.Task[None] | None = None  # runs from the set-up to the tear-down
        self._is_open = False  # its set-up has ended, and nothing was told of its end yet

    def __repr__(self) -> str:
        return f"<scope of plugin {self.name!r}>"

    # -- for the plugin -------------------------------------------------------------------------------------

    def create_task(self, work: Coroutine[Any, Any, _T], *, name: str | None = None) -> asyncio.Task[_T]:
        """Start a task of the plugin. It is held, its error is logged, and it is cancelled when the plugin is unloaded.

        Raises:
            PluginUnloaded: The plugin was unloaded.
        """
        if self.is_closed:
            work.close()
            raise PluginUnloaded(self.name, "it is unloaded")
        task = self.hold(asyncio.get_running_loop().create_task(work, name=name))
        task.add_done_callback(self._log_error)
        return task

    def hold(self, task: asyncio.Task[_T]) -> asyncio.Task[_T]:
        """Cancel a task when the plugin is unloaded."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def listeners(self) -> list[ListenerRow]:
        """Return the plugin's listeners, as ``describe()`` shows them."""
        return registry_of(self._dispatcher).entries_of(self.owner)

    def tasks(self) -> frozenset[asyncio.Task[Any]]:
        """Return the tasks of the plugin that run."""
        return frozenset(self._tasks)

    # -- for the host ---------------------------------------------------------------------------------------

    async def open(self, settings: object) -> None:
        """Run the set-up, in a task of its own: the tear-down runs there, too, as a TaskGroup of the plugin demands.

        If it fails, everything is undone.

        Raises:
            PluginUnloaded: :meth:`give_up` was called before the set-up had ended.
            Exception: The error of the set-up, with a note that names the plugin.
        """
        self.settings = settings
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        given_up = self._given_up = loop.create_future()
        self._life = loop.create_task(self._live(settings, ready), name=f"plugin {self.name}")
        self._has_ended = False
        try:
            await asyncio.wait((self._life, ready, given_up), return_when=asyncio.FIRST_COMPLETED)
            if given_up.done():
                raise PluginUnloaded(self.name, "all plugins are being unloaded, and its set-up was ended")
            if not ready.done():
                await self._life  # raises
        except BaseException as error:
            self._life.cancel()
            await self.close(0.0)
            note_plugin(error, self.name, "its set-up")
            raise
        finally:
            self._given_up = None
        self._is_open = True
        self._life.add_done_callback(self._life_ended)

    def give_up(self) -> None:
        """End the set-up, if it runs."""
        if self._given_up is not None and not self._given_up.done():
            self._given_up.set_result(None)

    def is_around(self) -> bool:
        """Return True if the code that calls this is a part of the set-up or tear-down, or runs in a task that one of these started."""
        return any(scope() is self for scope in _around.get())

    async def _live(self, settings: object, ready: asyncio.Future[None]) -> None:
        others = [scope for scope in _around.get() if (one := scope()) is not None and not one.is_closed]
        _around.set((*others, ref(self)))  # the task's own context
        try:
            async with open_plugin(self.plugin, self.view, settings) as self.instance, self.stack:
                if not ready.done():
                    ready.set_result(None)
                await self._closing.wait()
        except SystemExit as error:  # it would end the event loop
            raise PluginInvalid(
                self.name, f"its code has called for the end of the program: {describe_error(error)}"
            ) from error
        finally:
            await self.stack.aclose()  # after a set-up that failed

    def _life_ended(self, life: asyncio.Task[None]) -> None:
        """Switch the plugin off if its set-up was ended by itself: by a TaskGroup of its own, whose task has failed."""
        if self.is_closed or life.cancelled():  # asyncio.run cancels all tasks at its end
            return
        error = life.exception()
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]  # of a TaskGroup
        cause = "without an error" if error is None else describe_error(error)
        self._is_open = False
        self.owner.switch_off(f"what its set-up holds has ended by itself: {cause}")

    async def close(self, timeout: float) -> None:
        """Remove the plugin's listeners, wait for those that run, cancel its tasks, and run its tear-down. See :attr:`left`.

        A call from inside of one of its listeners or tasks does not wait for that one. After a call from a task that may hold up
        the tear-down, :meth:`finish` has the rest of the work.

        Args:
            timeout: Seconds to wait for listeners that run; then they are cancelled.
        """
        cancelled: asyncio.CancelledError | None = None
        self.is_closed = True
        gone = registry_of(self._dispatcher).remove_all(self.owner)
        background_of(self._dispatcher).end_waits(self.view, PluginUnloaded(self.name, "it is unloaded"))
        self._is_held_up = self.is_called_by_child()
        for step in (partial(self._end_runs, gone, timeout), self._end_tasks, self._tear_down, self._end_threads):
            try:
                await step()
            except asyncio.CancelledError as error:  # what comes next must be undone all the same
                cancelled = error
        self._end()
        if cancelled is not None:
            raise cancelled

    def is_called_by_child(self) -> bool:
        """Return True in a task that the set-up has started past ``create_task``: the tear-down may wait for it, as a TaskGroup does."""
        task = asyncio.current_task()
        return self.is_around() and task is not self._life and task not in self._tasks

    def has_ended(self) -> bool:
        """Return True if nothing is left to do for :meth:`finish`."""
        return self._has_ended

    async def finish(self) -> None:
        """Wait for the tear-down, and remove what it has added."""
        await self._end_life()
        registry_of(self._dispatcher).remove_all(self.owner)

    def _end(self) -> None:
        registry_of(self._dispatcher).remove_all(self.owner)  # what the tear-down has added
        self.owner.is_active = False
        self.owner.has_ended = True
        self.owner.on_loop.forget_ended()
        self.instance = None

    async def _end_threads(self) -> None:
        until = asyncio.get_running_loop().time() + THREADS_END_WITHIN
        while (busy := self.owner.end_threads()) and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110  # no thread tells that it is idle
            await asyncio.sleep(THREADS_END_WITHIN / 100)
        if busy:
            self.left.append(f"{busy} of its threads still run: each ends when its function does")

    async def _end_runs(self, gone: list[ref[Any]], timeout: float) -> None:
        cancelled: asyncio.CancelledError | None = None
        try:
            if self.has_successor:  # else a dispatch under way goes on without the plugin
                await wait_for_dispatches(gone, timeout)
            self.owner.has_ended = True
            late = await self.owner.wait_for_runs(timeout) if self.owner.runs else []
        except asyncio.CancelledError as error:  # the runs must end all the same
            cancelled = error
            self.owner.has_ended = True
            late = await self.owner.wait_for_runs(0.0)
        for run in late:
            run.expire()
        if late:
            late = await self.owner.wait_for_runs(ENDS_WITHIN)
        self.left.extend(f"{run.describe()} goes on after its cancellation" for run in late)
        if cancelled is not None:
            raise cancelled

    async def _end_tasks(self) -> None:
        own = asyncio.current_task()
        loop = asyncio.get_running_loop()
        tasks = []
        for task in tuple(self._tasks):
            if task is own or task.done() or awaits(task, own):
                continue
            if task.get_loop() is loop:
                task.cancel()
                tasks.append(task)
            else:  # nobody here can wait for it
                with suppress(RuntimeError):  # its loop is closed
                    task.get_loop().call_soon_threadsafe(task.cancel)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=ENDS_WITHIN)
            self.left.extend(f"its task {task.get_name()!r} goes on after its cancellation" for task in late)

    async def _tear_down(self) -> None:
        self._closing.set()
        if not self._is_held_up:
            await self._end_life()

    async def _end_life(self) -> None:
        life = self._life
        if life is None:
            return
        if not life.done():  # a loop that has ended has ended it, too
            await asyncio.wait((life,), timeout=ENDS_WITHIN)
        if not life.done():
            self.left.append(f"its tear-down had not ended within {ENDS_WITHIN:g} s, and was cancelled")
            life.cancel()
            await asyncio.wait((life,), timeout=ENDS_WITHIN)
            if not life.done():
                self.left.append("its tear-down goes on after its cancellation")
        self._has_ended = True
        error = life.exception() if life.done() and not life.cancelled() else None
        if error is not None and self._is_open:
            logger.error("plugin %s failed at its end", self.name, exc_info=error, extra={"plugin": self.name})
            self.left.append(f"its tear-down failed: {describe_error(error)}")

    def _log_error(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not (self.is_closed and isinstance(error, PluginUnloaded)):
            note_plugin(error, self.name, f"its task {task.get_name()}")
            self.owner.report("failed", f"its task {task.get_name()!r}", listener=None, error=_as_exception(error))


def _as_exception(error: BaseException) -> Exception | None:
    return error if isinstance(error, Exception) else None
