"""Group commit: calls that wait at the same time are stored in one transaction, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from silbo.errors import OutboxFull, SilboError
from silbo.outbox.rows import Packed, Quota

__all__ = ["Call", "GroupCommit"]


class Call:
    """One call of ``add``, while it waits for its commit."""

    __slots__ = ("committed", "messages", "quota")

    def __init__(self, messages: Sequence[Packed], quota: Quota) -> None:
        self.messages, self.quota = messages, quota
        self.committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class GroupCommit:
    """Gathers calls while a commit is under way.

    Args:
        store: Commits the calls; answers each with None, or with why it was not stored. Raises what concerns them all.
    """

    def __init__(self, store: Callable[[Sequence[Call]], Awaitable[Sequence[Exception | None]]]) -> None:
        self._store = store
        self._waiting: list[Call] = []
        self._committing: asyncio.Task[None] | None = None

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """Store; returns when it is committed. A cancelled call may have been stored."""
        call = Call(messages, quota)
        self._waiting.append(call)
        if self._committing is None or self._committing.done():
            self._committing = asyncio.get_running_loop().create_task(self._commit())
        await call.committed

    async def finish(self) -> None:
        """Wait until nothing is under way."""
        while self._committing is not None and not self._committing.done():
            await asyncio.wait([self._committing])

    async def _commit(self) -> None:
        while self._waiting:
            calls = [call for call in self._waiting if not call.committed.done()]  # of the others the caller has gone
            self._waiting = []
            answers: Sequence[Exception | None]
            try:
                answers = await self._store(calls)
            except Exception as error:  # noqa: BLE001  # to each caller
                answers = [error] * len(calls)
            except BaseException:
                for call in [*calls, *self._waiting]:
                    call.committed.cancel()
                raise
            for call, answer in zip(calls, answers, strict=True):
                if call.committed.done():
                    continue
                if answer is None:
                    call.committed.set_result(None)
                else:
                    call.committed.set_exception(_own(answer))


def _own(answer: Exception) -> Exception:
    """An exception of each caller's own, for it gets a traceback."""
    if isinstance(answer, OutboxFull) or not isinstance(answer, SilboError):
        return answer
    copy = type(answer)(*answer.args)
    copy.__cause__ = answer.__cause__
    return copy
