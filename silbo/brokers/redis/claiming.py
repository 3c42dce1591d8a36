"""What a consumer does for its group now and then: claim, remove who is gone, look whether it falls behind."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from silbo._reports import QuietLog
from silbo.brokers.redis.connection import Connection
from silbo.brokers.redis.group_scripts import CLAIM, LOOK, TIDY, call
from silbo.brokers.redis.in_hand import attempts_key
from silbo.errors import Gap

__all__ = ["Upkeep", "order"]

CLAIM_PAGES: Final = 10
"""Pages in which nothing is idle, after which what is new gets its turn."""
FORGET_AFTER: Final = 300.0
"""Seconds that a consumer without entries is silent before the others remove it: ten times ``claim_after``, and not less
than these."""
NEAR: Final = 0.8
"""The share of the retention from which on a group is reported as near to its end."""

logger = logging.getLogger(__name__)
_START: Final = b"0-0"


def order(entry_id: str) -> tuple[int, int]:
    """What ids are ordered by."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


class Upkeep:
    """The upkeep of one stream's group, by one of its consumers.

    Args:
        key: The stream's.
        claim_after: Seconds after which a delivery of a silent consumer is taken over.
        retain: Seconds that entries are kept; None for ever.
    """

    def __init__(self, key: bytes, group: bytes, consumer: bytes, *, claim_after: float, retain: float | None) -> None:
        self._key, self._group, self._consumer = key, group, consumer
        self._attempts = attempts_key(key, group)
        self._every, self._retain = claim_after / 3, retain
        self._idle = b"%d" % (claim_after * 1000)
        self._forget_after = max(10 * claim_after, FORGET_AFTER)
        self._cursor = _START
        self._claim_at = self._look_at = self._tidy_at = float("-inf")  # by the loop's clock
        self._at_tip = float("-inf")  # when the group had been given everything
        self._log = QuietLog(logger, every=60.0)

    def read(self, *, all_of_it: bool) -> None:
        """Note that the group was read from, and whether it has been given everything since."""
        if all_of_it:
            self._at_tip = asyncio.get_running_loop().time()

    async def claim(self, connection: Connection, limit: int) -> tuple[list[Any], list[int], int]:
        """Entries that silent consumers had, where it is time to look, at most ``limit``.

        With the attempts of each that are known, and how many other entries were gone.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._claim_at:
            return [], [], 0
        entries: list[Any] = []
        attempts: list[int] = []
        gone = 0
        for _ in range(CLAIM_PAGES):
            page = b"%d" % limit
            arguments = [self._group, self._consumer, self._idle, self._cursor, page]
            answer = await call(connection, CLAIM, [self._key, self._attempts], *arguments)
            self._cursor, entries, attempts, gone = answer
            if self._cursor == _START:
                self._claim_at = loop.time() + self._every
                break
            if entries or gone:
                break
        return entries, attempts, gone

    async def tidy(self, connection: Connection) -> None:
        """Remove consumers that are silent and have nothing in hand, where it is time to."""
        now = asyncio.get_running_loop().time()
        if now >= self._tidy_at:
            self._tidy_at = now + self._forget_after / 10
            idle = b"%d" % (self._forget_after * 1000)
            await call(connection, TIDY, [self._key], self._group, self._consumer, idle)

    async def look(self, connection: Connection, last: str) -> Gap | None:
        """A gap where the stream no longer has what the group was not given; to be asked before each read.

        ``last`` is the id given to it last, as far as known.
        """
        now = asyncio.get_running_loop().time()
        if now < self._look_at and not self._may_miss(now, last):
            return None
        self._look_at = now + self._every
        # Where Redis does not count: who had been given everything that recently has missed nothing.
        certain = self._retain is None or now - self._at_tip < self._retain
        retain = b"" if certain or self._retain is None else b"%d" % (self._retain * 1000)
        missed, age = await call(connection, LOOK, [self._key], self._group, retain)
        address = self._key.decode()
        if missed:
            reason = "the group fell behind the retention, and the stream no longer has what it was not given"
            return Gap(address, reason, count=None if missed < 0 else missed)
        if self._retain is not None and age > self._retain * 1000 * NEAR:
            self._log.write(
                "group %s falls behind at %s: its next message is %.3g s old, and after %.3g s it may be dropped",
                None,
                self._group.decode(),
                address,
                age / 1000,
                self._retain,
                address=address,
                group=self._group.decode(),
                age=age / 1000,
                retain=self._retain,
            )
        return None

    def _may_miss(self, now: float, last: str) -> bool:
        """Whether an entry that came after the last one, and after all had been given, can be as old as the retention.

        By half of it, for the clock is this machine's.
        """
        if self._retain is None:
            return False
        half = self._retain / 2
        return now - self._at_tip > half and time.time() - order(last)[0] / 1000 > half
