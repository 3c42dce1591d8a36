"""The bytes that one read asks for: as many as also a slow link brings in time."""

from __future__ import annotations

from typing import Final

__all__ = ["READ_SIZE", "ReadBudget"]

READ_SIZE: Final = 4 << 20
"""A call to a store reads about 4 MiB of messages at most, or one message."""
LEAST_SIZE: Final = 1 << 14
"""On a slow link a call reads about 16 KiB at least."""
SLOW: Final = 2.0
"""A call that takes longer than 2 seconds makes the next ones smaller."""


class ReadBudget:
    """The size of the next read, adapted to the time that the last ones took.

    Args:
        most: Bytes that a call reads on a quick link.

    Attributes:
        size: Bytes after which the next call reads no more.
    """

    def __init__(self, most: int = READ_SIZE) -> None:
        self.size = most
        self._most = most

    def note(self, seconds: float) -> None:
        """Note the seconds that a call took, also of one that was given up."""
        if seconds > SLOW:
            self.size = max(LEAST_SIZE, int(self.size * SLOW / seconds))
        elif seconds < SLOW / 2:
            self.size = min(self._most, self.size * 2)
