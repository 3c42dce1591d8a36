"""The queue of messages that wait to be stored."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from silbo.outbox.rows import Packed, Quota
from silbo.stores._group_commit import Addition, GroupCommit

SMALL = Packed(partition=0, raw=b"x", key=None)
LARGE = Packed(partition=0, raw=bytes(2 << 20), key=None)


class Store:
    """Notes the number of messages of each addition, by commit; the first commit waits for the others to come."""

    def __init__(self) -> None:
        self.commits: list[list[int]] = []
        self.begin = asyncio.Event()

    async def commit(self, additions: Sequence[Addition]) -> Sequence[Exception | None]:
        await self.begin.wait()
        self.commits.append([len(addition.messages) for addition in additions])
        return [None] * len(additions)


@pytest.mark.parametrize(
    ("sizes", "message", "commits"),
    [
        ([1] * 1_001, SMALL, [[1] * 1_000, [1]]),
        ([1, 1_005, 1, 1], SMALL, [[1], [1_005], [1, 1]]),
        ([1, 1, 1, 3], LARGE, [[1, 1], [1], [3]]),
    ],
)
async def test_commit_is_bounded_however_many_calls_wait(
    sizes: list[int], message: Packed, commits: list[list[int]]
) -> None:
    """A database has a time limit for each transaction: all calls of a very large one would fail together."""
    store = Store()
    group_commit = GroupCommit(store.commit)
    loop = asyncio.get_running_loop()
    calls = [asyncio.ensure_future(group_commit.add([message] * size, Quota(), loop)) for size in sizes]
    await asyncio.sleep(0)
    store.begin.set()
    async with asyncio.timeout(30):
        await asyncio.gather(*calls)
    assert store.commits == commits
