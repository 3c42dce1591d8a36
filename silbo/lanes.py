"""The lines in which deliveries wait for their turn: one key, one line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TypeAlias
from zlib import crc32

from silbo.errors import MessageInvalid
from silbo.message import Delivery
from silbo.reporting import Report

__all__ = ["Lane", "Lanes"]

Lane: TypeAlias = "asyncio.Queue[Delivery | None]"
"""None is its end."""


class Lanes:
    """Deliveries that wait or are in work; its length is how many those are.

    Messages without a key all take the first lane: side by side they could overtake one another.
    """

    def __init__(self, many: int, report: Report) -> None:
        self._lanes: list[Lane] = [asyncio.Queue() for _ in range(many)]
        self._report = report
        self._turns = 0
        self._keyless = False  # one has been reported

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return self._turns

    async def choose(self, delivery: Delivery) -> Lane:
        """The lane of its key; the first delivery that should have a key and has none is reported."""
        first = self._lanes[0]
        if len(self._lanes) == 1:
            return first
        try:
            key = delivery.message().key
        except MessageInvalid:  # reported in its turn
            return first
        if key is not None:
            return self._lanes[crc32(key.encode()) % len(self._lanes)]
        if not self._keyless:
            self._keyless = True
            problem = "no key, so it takes one line with all such, whatever the concurrency"
            error = MessageInvalid(f"{problem}; give its EventName or Route a key", field="headers.key")
            await self._report("message without a key", error, delivery, address=delivery.address)
        return first

    def put(self, lane: Lane, delivery: Delivery) -> None:
        """Let it wait for its turn, behind the others."""
        self._turns += 1
        lane.put_nowait(delivery)

    def done(self) -> None:
        """One has had its turn."""
        self._turns -= 1

    def close(self) -> None:
        """Put an end to every lane."""
        for lane in self._lanes:
            lane.put_nowait(None)
