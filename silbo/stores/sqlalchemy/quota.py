"""The quota of a store in the host's database: an estimate of what waits, counted from time to time."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from silbo.errors import OutboxFull
from silbo.stores._group_commit import Addition
from silbo.stores.sqlalchemy.status import count_for_quota

__all__ = ["QuotaEstimate"]

COUNT_EVERY: Final = 1.0
"""Seconds between two counts, at least."""
COUNT_SHARE: Final = 20
"""The time between two counts is at least this many times as long as a count takes."""


class QuotaEstimate:
    """Estimates the rows and bytes that wait: the last count, plus the messages that this process has added since.

    So a publish is refused only on a fresh count. It is accepted on a count that is up to a second old or, in a store so
    large that the counting takes long, older. A count that is kept in a row of the database would make all transactions
    that store messages wait for one another.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._size = 0
        self._count_at = 0.0

    async def refresh(self, connection: AsyncConnection, additions: Sequence[Addition]) -> None:
        """Count anew, if the last count is old or if there seems to be no room for all additions."""
        rows = sum(len(addition.messages) for addition in additions)
        size = sum(addition.size for addition in additions)
        if monotonic() >= self._count_at or not all(self._fits(rows, size, each) for each in additions):
            await self._count(connection, additions)

    def reserve(self, addition: Addition) -> None:
        """Count an addition as stored.

        Raises:
            OutboxFull: the addition does not fit in its quota; nothing was counted.
        """
        rows = len(addition.messages)
        size = addition.size
        if not self._fits(rows, size, addition):
            raise OutboxFull(self._rows, self._size, str(addition.quota))
        self._rows += rows
        self._size += size

    def _fits(self, rows: int, size: int, addition: Addition) -> bool:
        return self._rows + rows <= addition.quota.rows and self._size + size <= addition.quota.size

    async def _count(self, connection: AsyncConnection, additions: Sequence[Addition]) -> None:
        began = monotonic()
        self._rows, self._size = await count_for_quota(connection, max(each.quota.rows for each in additions))
        counted_at = monotonic()
        self._count_at = counted_at + max(COUNT_EVERY, COUNT_SHARE * (counted_at - began))
