"""Real consumers, killed and frozen, on a real Redis."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import DeadLetters, RedisStreams
from silbo.wire.encode import to_message
from tests.support.consumer_process import TASK, Task

pytestmark = pytest.mark.every_redis
ROOT = Path(__file__).resolve().parents[2]


class Workers:
    """Processes of the group, and what they have done."""

    def __init__(self, redis: Redis, url: str, prefix: str) -> None:
        self._redis, self._url, self._prefix = redis, url, prefix
        self.stream = f"{prefix}:{{events}}"
        self._processes: list[Process] = []

    async def start(self, name: str, *, claim_after: float = 0.4, concurrency: int = 1) -> Process:
        process = await asyncio.create_subprocess_exec(
            *[
                sys.executable,
                "-m",
                "tests.support.consumer_process",
                self._url,
                self._prefix,
                name,
                str(claim_after),
                str(concurrency),
            ],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=ROOT,
        )
        self._processes.append(process)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        return process

    async def publish(self, *tasks: Task) -> None:
        async with RedisStreams(self._redis, app="web", prefix=self._prefix) as streams:
            await streams.publish(*[to_message(task, name=TASK, kind="ecst", key=str(task.number)) for task in tasks])

    async def effects(self, what: str = "done") -> list[tuple[str, int]]:
        """Who has begun or done which, in order."""
        lines = [line.decode().split() for line in await self._redis.lrange(f"{self._prefix}:effects", 0, -1)]
        return [(name, int(number)) for name, verb, number in lines if verb == what]

    async def until(self, check: Callable[[list[tuple[str, int]]], bool], what: str = "done") -> None:
        async with asyncio.timeout(30):
            while not check(await self.effects(what)):
                await asyncio.sleep(0.02)

    async def until_nothing_is_pending(self) -> None:
        async with asyncio.timeout(30):
            while True:
                (group,) = await self._redis.xinfo_groups(self.stream)
                last = (await self._redis.xinfo_stream(self.stream))["last-generated-id"]
                if group["pending"] == 0 and group["last-delivered-id"] == last:
                    return
                await asyncio.sleep(0.02)

    async def end(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.fixture
async def workers(redis: Redis, redis_url: str, prefix: str) -> AsyncIterator[Workers]:
    workers = Workers(redis, redis_url, prefix)
    try:
        yield workers
    finally:
        await workers.end()


@pytest.mark.long
async def test_what_a_killed_consumer_had_in_hand_another_does(workers: Workers) -> None:
    """kill -9 in the middle of a listener, with more received: all of it is done, and what was done is not repeated."""
    one = await workers.start("one")
    await workers.publish(*[Task(number, sleep=3600 if number == 5 else 0) for number in range(20)])
    await workers.until(lambda begun: ("one", 5) in begun, "begin")
    await asyncio.sleep(0.5)  # what was done before is acknowledged by then
    one.kill()
    await one.wait()
    await workers.publish(Task(99))
    await workers.start("two", concurrency=4)
    await workers.until(lambda done: len(done) == 20)  # but for the one that sleeps
    done = Counter(number for _, number in await workers.effects())
    assert done == Counter([*range(5), *range(6, 20), 99])


@pytest.mark.long
async def test_message_that_kills_its_process_becomes_a_dead_letter_and_no_other_does(
    workers: Workers, redis: Redis, prefix: str
) -> None:
    """However often the process is restarted, its neighbours are done, and none is taken for it."""
    await workers.publish(*[Task(number, sleep=0.02, kill=number in (3, 11)) for number in range(20)])
    kills = 0
    async with DeadLetters(redis, prefix=prefix) as dead, asyncio.timeout(50):
        while await dead.count() < 2:
            process = await workers.start("one", concurrency=4)
            waiting = asyncio.ensure_future(process.wait())
            while not waiting.done() and await dead.count() < 2:
                await asyncio.sleep(0.02)
            kills += waiting.done()
            if not waiting.done():
                await workers.until_nothing_is_pending()
                process.send_signal(signal.SIGTERM)
                assert await waiting == 0
        letters = await dead.list()
    assert sorted(letter.message().payload["number"] for letter in letters) == [3, 11]
    assert {(letter.attempts, "did not end" in letter.error) for letter in letters} == {(3, True)}
    assert 2 < kills <= 8  # once uncounted and three times counted, each
    assert {number for _, number in await workers.effects()} == set(range(20)) - {3, 11}


@pytest.mark.long
async def test_healthy_work_is_not_taken_over_however_long_it_takes(workers: Workers) -> None:
    """Three times as long as a silent consumer is waited for, with another consumer that looks out for such."""
    await workers.start("one")
    await workers.publish(Task(1, sleep=1.2))
    await workers.until(lambda begun: bool(begun), "begin")
    await workers.start("two")
    await workers.until(lambda done: bool(done))
    await workers.until_nothing_is_pending()
    assert await workers.effects("begin") == [("one", 1)]


@pytest.mark.long
async def test_frozen_consumer_that_wakes_up_begins_nothing_that_another_has_taken(workers: Workers) -> None:
    """The one thing that it was at is done twice, for nobody can know; of the others none."""
    one = await workers.start("one")
    await workers.publish(*[Task(number, sleep=0.6 if number == 3 else 0.0) for number in range(60)])
    await workers.until(lambda begun: ("one", 3) in begun, "begin")
    one.send_signal(signal.SIGSTOP)
    await workers.start("two")
    await workers.until(lambda done: len({number for _, number in done}) == 60)
    one.send_signal(signal.SIGCONT)
    await workers.publish(*map(Task, range(100, 110)))
    await workers.until(lambda done: len({number for _, number in done}) == 70 and ("one", 3) in done)
    await workers.until_nothing_is_pending()
    times = Counter(number for _, number in await workers.effects("begin"))
    assert {number for number, many in times.items() if many > 1} <= {0, 1, 2, 3}  # 0 to 2: not acknowledged yet
    assert times[3] == 2


@pytest.mark.long
async def test_sigterm_finishes_what_it_can_and_leaves_the_rest_to_others_at_once(workers: Workers) -> None:
    """Within its drain; the others don't wait for what it leaves."""
    one = await workers.start("one", claim_after=60)
    await workers.publish(*[Task(number, sleep=3600 if number == 3 else 0) for number in range(10)])
    await workers.until(lambda begun: ("one", 3) in begun, "begin")
    one.send_signal(signal.SIGTERM)
    async with asyncio.timeout(5):
        assert await one.wait() == 0
    await workers.start("two", claim_after=60, concurrency=2)
    async with asyncio.timeout(10):
        await workers.until(lambda done: len(done) == 9)
    assert Counter(number for _, number in await workers.effects()) == Counter([*range(3), *range(4, 10)])
