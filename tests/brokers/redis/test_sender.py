"""The line of waiting messages: bounded in messages and in bytes, and taken in flushes of either."""

from __future__ import annotations

import asyncio

import pytest

from silbo.brokers.redis.sender import (
    FLUSH_BYTES,
    FLUSH_MESSAGES,
    WAITING_BYTES,
    WAITING_MESSAGES,
    Call,
    Line,
)
from silbo.errors import BrokerUnavailable


def enter(line: Line, *sizes: int, key: bytes = b"key") -> Call:
    """A call with one message of each size, at the end of the line."""
    loop = asyncio.get_running_loop()
    call = Call(len(sizes), loop.create_future(), loop.time() + 5)
    line.append(call, [(key, bytes(size)) for size in sizes])
    return call


def take(line: Line) -> list[list[int]]:
    """The sizes of the messages of the next flush, by batch."""
    return [[len(arguments) for arguments in batch.arguments] for batch in line.take(FLUSH_MESSAGES, 0, "late")]


async def test_line_is_bounded_in_messages() -> None:
    line = Line()
    while line.has_room():
        enter(line, 1)
    assert len(line) == WAITING_MESSAGES
    take(line)
    assert line.has_room()


async def test_line_is_bounded_in_bytes() -> None:
    line = Line()
    while line.has_room():
        enter(line, 1 << 19)
    assert len(line) == WAITING_BYTES // (1 << 19)
    take(line)
    assert line.has_room()


async def test_flush_is_bounded_in_messages_and_in_bytes() -> None:
    """A message that is larger than a flush goes alone, and is not passed by others."""
    line = Line()
    enter(line, *[1] * (FLUSH_MESSAGES + 1))
    enter(line, FLUSH_BYTES - 1, 1, FLUSH_BYTES + 1, 1)
    assert take(line) == [[1] * FLUSH_MESSAGES]
    assert take(line) == [[1, FLUSH_BYTES - 1]]
    assert take(line) == [[1]]
    assert take(line) == [[FLUSH_BYTES + 1]]
    assert take(line) == [[1]]
    assert take(line) == []


async def test_withdrawn_messages_make_room() -> None:
    line = Line()
    calls = [enter(line, 1) for _ in range(WAITING_MESSAGES)]
    assert not line.has_room()
    for call in calls:
        call.answered.cancel()
    assert line.first() is None
    assert line.has_room()


async def test_room_is_given_in_turn_and_not_twice() -> None:
    """Who comes while others wait is behind them; who goes away, even with room given, leaves it to the next."""
    line = Line()
    full = enter(line, *[1] * WAITING_MESSAGES)
    order: list[int] = []

    async def come(number: int) -> None:
        await line.room(WAITING_MESSAGES, 1, asyncio.get_running_loop().time() + 5)
        enter(line, *[1] * WAITING_MESSAGES)
        order.append(number)

    async def all_others() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    tasks = [asyncio.ensure_future(come(number)) for number in range(5)]
    await all_others()
    assert not line.has_room()
    tasks[0].cancel()
    await all_others()
    assert order == []
    full.answered.cancel()
    take(line)  # gives room to the next, who does not get to it
    tasks[1].cancel()
    await all_others()
    assert order == [2]
    for expected in ([2, 3], [2, 3, 4]):
        while take(line):
            pass
        await all_others()
        assert order == expected
    assert not line.has_room()


async def test_line_that_is_given_up_answers_everybody() -> None:
    line = Line()
    call = enter(line, *[1] * WAITING_MESSAGES)
    waiting = asyncio.ensure_future(line.room(1, 1, asyncio.get_running_loop().time() + 5))
    await asyncio.sleep(0)
    line.fail("no Redis")
    with pytest.raises(BrokerUnavailable, match="no Redis; none of 10000 messages was sent"):
        await call.answered
    with pytest.raises(BrokerUnavailable, match="no Redis; not sent"):
        await waiting
    assert line.has_room()


async def test_no_room_in_time_is_told() -> None:
    line = Line()
    enter(line, *[1] * WAITING_MESSAGES)
    with pytest.raises(
        BrokerUnavailable, match=r"10000 messages \(10000 bytes\) are in line, and no room came in time"
    ):
        await line.room(1, 1, asyncio.get_running_loop().time() + 0.02)
    assert not line.is_waited_for
