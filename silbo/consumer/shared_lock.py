"""A lock that many attempts hold side by side, or one attempt alone."""

from __future__ import annotations

import asyncio

__all__ = ["SharedLock"]


class SharedLock:
    """A lock that many attempts hold side by side, or one attempt alone."""

    def __init__(self) -> None:
        self._holders = 0
        self._alone = asyncio.Lock()
        self._released = asyncio.Event()

    def is_held_alone(self) -> bool:
        """Return True if an attempt holds the lock alone or waits for that."""
        return self._alone.locked()

    def acquire_now(self) -> bool:
        """Acquire beside the other holders. False, and not acquired, if an attempt holds the lock alone or waits for that."""
        if self._alone.locked():
            return False
        self._holders += 1
        return True

    async def acquire(self, *, alone: bool) -> None:
        """Wait and acquire. An attempt that waits to be alone goes before all that come later."""
        if not alone:
            while not self.acquire_now():
                async with self._alone:
                    pass
            return
        await self._alone.acquire()
        try:
            while self._holders:
                self._released.clear()
                await self._released.wait()
        except BaseException:
            self._alone.release()
            raise
        self._holders += 1

    def release(self, *, alone: bool) -> None:
        """Release, with the same ``alone`` as acquired."""
        self._holders -= 1
        if not self._holders:
            self._released.set()
        if alone:
            self._alone.release()
