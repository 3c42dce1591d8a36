"""Group commit: messages that wait at the same time are stored in one transaction, in the order of their calls."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from silbo.errors import MessageRefused, OutboxFull, SilboError
from silbo.outbox.rows import Packed, Quota

__all__ = ["Addition", "GroupCommit"]

COMMIT_MESSAGES: Final = 1_000
"""A commit has at most 1,000 messages. Then a database has time enough for each, however many calls wait."""
COMMIT_BYTES: Final = 4 << 20
"""A commit has at most 4 MiB of messages. A call that exceeds a limit is committed alone."""


@dataclass(frozen=True, slots=True)
class Addition:
    """The messages of one call of ``add``, stored all or none."""

    messages: Sequence[Packed]
    quota: Quota

    @property
    def size(self) -> int:
        """Bytes of the messages."""
        return sum([len(message.raw) for message in self.messages])


class GroupCommit:
    """Gathers additions while a commit runs, and commits them together afterwards.

    Args:
        commit: Stores the additions in one transaction, in their order. Returns for each of them None, or the error
            because of which it was not stored. Raises an error that concerns all of them.

    Attributes:
        is_busy: True if a commit runs.
    """

    def __init__(self, commit: Callable[[Sequence[Addition]], Awaitable[Sequence[Exception | None]]]) -> None:
        self._commit = commit
        self._waiting: deque[tuple[Addition, asyncio.Future[None]]] = deque()
        self._committing: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        return self._committing is not None and not self._committing.done()

    def forget(self) -> None:
        """Forget what waits in an event loop that has ended."""
        self._waiting.clear()
        self._committing = None

    async def add(self, messages: Sequence[Packed], quota: Quota, loop: asyncio.AbstractEventLoop) -> None:
        """Store messages; return when they are committed. If this call is cancelled, they may have been stored.

        Args:
            messages: The messages, all or none of which are stored.
            quota: The most that may wait.
            loop: The running loop. It is the only one, as the store has checked.
        """
        committed: asyncio.Future[None] = loop.create_future()
        self._waiting.append((Addition(messages, quota), committed))
        if not self.is_busy:
            self._committing = loop.create_task(self._commit_waiting())
        await committed

    async def finish(self) -> None:
        """Wait until every addition is committed."""
        while self._committing is not None and not self._committing.done():
            await asyncio.wait([self._committing])

    async def _commit_waiting(self) -> None:
        while self._waiting:
            if not (group := self._take()):
                continue
            errors: Sequence[Exception | None]
            try:
                errors = await self._commit([addition for addition, _ in group])
            except Exception as error:  # noqa: BLE001  # goes to each caller
                errors = [error] * len(group)
            except BaseException:
                for _, future in [*group, *self._waiting]:
                    future.cancel()
                raise
            for (_, future), failure in zip(group, errors, strict=True):
                if future.done():
                    continue
                if failure is None:
                    future.set_result(None)
                else:
                    future.set_exception(_copy_error(failure))

    def _take(self) -> Sequence[tuple[Addition, asyncio.Future[None]]]:
        """Remove the oldest additions, as many as one transaction may have; drop those whose calls were cancelled."""
        group: list[tuple[Addition, asyncio.Future[None]]] = []
        messages = size = 0
        while self._waiting:
            addition, future = self._waiting[0]
            if not future.done():
                messages += len(addition.messages)
                size += addition.size
                if group and (messages > COMMIT_MESSAGES or size > COMMIT_BYTES):
                    break
                group.append((addition, future))
            self._waiting.popleft()
        return group


def _copy_error(error: Exception) -> Exception:
    """Return a copy of an error that several callers get: each raise adds a traceback to its exception."""
    if isinstance(error, OutboxFull | MessageRefused) or not isinstance(error, SilboError):
        return error
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
