"""The order in which deliveries have their turn: one line for each key, as they came."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from math import inf

from silbo.message import Delivery, Message

__all__ = ["Floor", "Lanes", "Turn"]


@dataclass(slots=True, eq=False)
class Turn:
    """A delivery and how far it is.

    Attributes:
        order: Its place among all that came.
        message: It, decoded, where that is done already; for the first try alone, which may change it.
        tries: How often its listeners have run here.
        attempts: How many are counted at the broker, as far as known.
        counted: Whether the next try is among them already.
        delay: Seconds until the next one, once a try has failed.
    """

    order: int
    delivery: Delivery
    message: Message | None
    key: str | None
    tries: int = 0
    attempts: int = 0
    counted: bool = False
    delay: float = 0.0


class Lanes:
    """Deliveries that wait for their turn or have it; its length is how many those are.

    They have it in the order in which they came, and those of one key one after another: what waits for another try
    holds back its key, and no other. Without a key nothing is held back.
    """

    def __init__(self) -> None:
        self._ready: asyncio.PriorityQueue[tuple[float, Turn | None]] = asyncio.PriorityQueue()
        self._lines: dict[str, deque[Turn] | None] = {}  # what waits behind the first of its key
        self._turns = self._came = 0
        self._parked: dict[Turn, asyncio.TimerHandle] = {}
        self._held: set[str] = set()  # keys of those
        self._ending = False

    def __len__(self) -> int:
        return self._turns

    def put(self, delivery: Delivery, message: Message | None, key: str | None) -> None:
        """Let it wait for its turn, behind the others."""
        self._came += 1
        self._turns += 1
        turn = Turn(self._came, delivery, message, key)
        if key is not None:
            if key in self._lines:
                line = self._lines[key]
                if line is None:
                    line = self._lines[key] = deque()
                line.append(turn)
                self._turns -= key in self._held
                return
            self._lines[key] = None
        self._ready.put_nowait((turn.order, turn))

    async def get(self) -> Turn | None:
        """The next one; None at the end."""
        return (await self._ready.get())[1]

    def done(self, turn: Turn) -> None:
        """It needs no further turn here."""
        self._turns -= 1
        if turn.key is None:
            return
        line = self._lines[turn.key]
        if line:
            following = line.popleft()
            self._ready.put_nowait((following.order, following))
        else:
            del self._lines[turn.key]

    def park(self, turn: Turn, delay: float) -> None:
        """It has another turn after so many seconds, unless the end comes first."""
        self._turns -= 1 + self._behind(turn)
        if turn.key is not None:
            self._held.add(turn.key)
        self._parked[turn] = asyncio.get_running_loop().call_later(delay, self._resume, turn)

    def end_retries(self) -> None:
        """What is parked, or will be, has no further turn."""
        self._ending = True
        for timer in self._parked.values():
            timer.cancel()

    def close(self, workers: int) -> None:
        """Nothing more is put: let so many workers end, each when nothing is left."""
        for _ in range(workers):
            self._ready.put_nowait((inf, None))

    def _resume(self, turn: Turn) -> None:
        del self._parked[turn]
        if not self._ending:
            self._held.discard(turn.key or "")
            self._turns += 1 + self._behind(turn)
            self._ready.put_nowait((turn.order, turn))

    def _behind(self, turn: Turn) -> int:
        line = None if turn.key is None else self._lines[turn.key]
        return 0 if line is None else len(line)


class Floor:
    """Where deliveries are worked on: many side by side, or one alone."""

    def __init__(self) -> None:
        self._busy = 0
        self._alone = asyncio.Lock()
        self._left = asyncio.Event()

    def enter_now(self) -> bool:
        """Come in beside the others, where nobody is alone or waits for it."""
        if self._alone.locked():
            return False
        self._busy += 1
        return True

    async def enter(self, *, alone: bool) -> None:
        """Come in when that is possible; nobody comes in past somebody who waits to be alone."""
        if not alone:
            while not self.enter_now():
                async with self._alone:
                    pass
            return
        await self._alone.acquire()
        try:
            while self._busy:
                self._left.clear()
                await self._left.wait()
        except BaseException:
            self._alone.release()
            raise
        self._busy += 1

    def leave(self, *, alone: bool) -> None:
        """Go."""
        self._busy -= 1
        if not self._busy:
            self._left.set()
        if alone:
            self._alone.release()
