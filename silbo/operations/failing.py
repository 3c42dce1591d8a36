"""The row that holds back an outbox."""

from __future__ import annotations

from typing import Final

from silbo.outbox.rows import OutboxStore, Row, State

__all__ = ["count_failed", "find_failing"]

UNSENT: Final[tuple[State, ...]] = ("sending", "pending", "sending")
"""The states to look for, one after another: an attempt may begin between two looks."""


async def find_failing(store: OutboxStore) -> Row | None:
    """Return the row whose last attempt failed and which holds back the rows behind it; None if there is none.

    Also while the row is tried again.
    """
    for state in UNSENT:
        for row in await store.rows(state, limit=1):
            if row.error and count_failed(row):
                return row
    return None


def count_failed(row: Row) -> int:
    """Return the number of attempts that are known to have failed."""
    return row.attempts - (row.state == "sending")
