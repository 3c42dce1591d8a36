"""The event loop to which an object belongs: a second one is told so, instead of waiting for ever. And its busy threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from ipaddress import ip_address
from threading import RLock
from typing import Any

from silbo.errors import LoopConflict

__all__ = ["LoopBinding", "describe_busy_threads", "describe_lookup"]

_binding = RLock()


def _do_nothing() -> None: ...


class LoopBinding:
    """The event loop of one object: the first loop that uses it.

    While that loop runs, and while it stands still with work of the object under way, every other loop gets
    :class:`~silbo.errors.LoopConflict`. After that, :meth:`enter` lets another loop take the object over, and :meth:`check`
    does not. A forked process takes over without the work of its parent.

    Args:
        owner: The name of the object in the error, as ``RedisStreams``.
        is_busy: Returns True if something of the object's is under way.
        forget: Called before another loop takes over: drops everything that belongs to the loop before.

    Attributes:
        loop: The loop; None before the first use. Frequent calls compare it with the running one, and call :meth:`enter` or
            :meth:`check` only if it differs.
    """

    __slots__ = ("_forget", "_is_busy", "_owner", "_process", "loop")

    def __init__(
        self, owner: str, *, is_busy: Callable[[], bool] | None = None, forget: Callable[[], object] = _do_nothing
    ) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._owner = owner
        self._is_busy = is_busy
        self._forget = forget
        self._process = 0

    def enter(self, call: str = "") -> asyncio.AbstractEventLoop:
        """Return the running loop. The object is its own from now on, if no other loop has it.

        Args:
            call: The name of the method that the user has called, for the error; empty if it is not known here.

        Raises:
            LoopConflict: another loop has the object.
        """
        loop = asyncio.get_running_loop()
        if loop is not self.loop:
            with _binding:  # of two threads that begin at the same moment, one gets the error
                other = self.loop
                if other is not None:
                    if self._process == os.getpid() and self._is_held(other):
                        raise self._conflict(call, loop, other)
                    self._forget()
                self.loop = loop
                self._process = os.getpid()
        return loop

    def check(self, call: str = "") -> asyncio.AbstractEventLoop:
        """Return the running loop, if the object is its own, or nobody's; the others get the error for good.

        Raises:
            LoopConflict: the object belongs to another loop, even if that has ended.
            RuntimeError: it was opened before a fork, in the parent process.
        """
        loop = asyncio.get_running_loop()
        if loop is not self.loop and self.loop is not None:
            if self._process != os.getpid():
                raise RuntimeError(f"{self._owner} was opened in another process; make one in each")
            raise self._conflict(call, loop, self.loop)
        return loop

    def _conflict(self, call: str, loop: object, other: object) -> LoopConflict:
        return LoopConflict(f"{self._owner}.{call}()" if call else self._owner, loop, other)

    def _is_held(self, other: asyncio.AbstractEventLoop) -> bool:
        if other.is_closed():
            return False
        return other.is_running() or (self._is_busy is not None and self._is_busy())


def describe_lookup(*hosts: object) -> str:
    """Return the reason why the names of hosts can't be looked up at the moment; empty if none is known."""
    names = [host for host in hosts if isinstance(host, str) and not _is_address(host)]
    busy = describe_busy_threads() if names else ""
    return f"the address of {' or '.join(map(repr, dict.fromkeys(names)))} can't be looked up: {busy}" if busy else ""


def describe_busy_threads() -> str:
    """Return a text that says that all threads of the loop's default pool are busy, and what to do; empty if not so.

    The running loop looks names up in its default thread pool. If hung threads fill the pool, no name is looked up, and no
    connection is made, whatever the server does.
    """
    pool: Any = getattr(asyncio.get_running_loop(), "_default_executor", None)  # asyncio offers no way to ask
    try:
        threads, most, waiting = len(pool._threads), pool._max_workers, pool._work_queue.qsize()  # noqa: SLF001
    except AttributeError:  # another event loop, or another pool
        return ""
    if threads < most or not waiting:
        return ""
    return (
        f"all {most} threads of the event loop's thread pool are busy; give what blocks them (asyncio.to_thread) an "
        "executor of its own"
    )


def _is_address(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
