"""Processes that publish and are killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis

from silbo.wire.formats import JSON


@pytest.mark.one_server
@pytest.mark.every_redis
@pytest.mark.parametrize("after", [1, 100])
async def test_killed_producer_has_sent_what_it_was_answered_for(
    redis: Redis, redis_url: str, prefix: str, after: int
) -> None:
    """kill -9 in mid-flight: every publish that returned is in the stream, once."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tests.support.publisher_process", redis_url, prefix],
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            answered = [await process.stdout.readline() for _ in range(after)]
    finally:
        process.kill()
        rest, _ = await process.communicate()
    answered += [line for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]
    entries = await redis.xrange(f"{prefix}:{{events}}")
    sent = [JSON.decode(fields[b"message"]).payload["n"] for _, fields in entries]
    assert {int(line) for line in answered} <= set(sent)
    assert len(sent) == len(set(sent))
