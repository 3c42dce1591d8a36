"""The size of a read: as many entries as fit into a reply that also a slow link brings soon."""

from __future__ import annotations

from typing import Final

from silbo._read_budget import ReadBudget

__all__ = ["READ_BYTES", "ReadSize"]

READ_BYTES: Final = 1 << 20
"""The reply to a read has about 1 MiB at most, or one entry."""
ENTRY_OVERHEAD: Final = 64
"""Bytes of an entry beside its fields."""


class ReadSize:
    """The number of entries that a read asks for, adapted to the size of those before and to the speed of the link.

    Redis counts entries and not bytes. So the first read asks for one; a read that follows entries much smaller than those to
    come is too large once.
    """

    def __init__(self) -> None:
        self._entry = 0.0  # bytes of an entry; 0 before the first
        self._budget = ReadBudget(READ_BYTES)

    def count(self, limit: int, streams: int = 1) -> int:
        """Return the number of entries to ask each of so many streams for, from 1 to ``limit``."""
        if not self._entry:
            return 1
        return max(1, min(limit, int(self._budget.size / (self._entry * streams))))

    def note(self, entries: int, size: int, seconds: float) -> None:
        """Note a reply: the number of its entries, the bytes of their fields, and the seconds that it took."""
        if not entries:
            return
        # One large entry among many small ones is remembered for some reads.
        self._entry = max(size / entries + ENTRY_OVERHEAD, self._entry * 0.75)
        self._budget.note(seconds)

    def has_room(self, size: int) -> bool:
        """Return True if a reply of this size leaves room for as much again."""
        return size < self._budget.size / 2
