"""`silbo consume` as a process of its own: it runs a program's consumers, and ends in good order."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.message import Message, new_publication
from tests.cli.conftest import Run
from tests.support.app_files import imports_undone, write
from tests.support.command_line import SILBO, environment, silbo

WORKER = """
import asyncio
import logging
import os
from contextlib import asynccontextmanager

from redis.asyncio import Redis, RedisCluster
from silbo import AsyncEventDispatcher, Bridge, Consumer, _host_code
from silbo.brokers.redis import RedisStreams

dispatcher = AsyncEventDispatcher()
client = (RedisCluster if os.environ.get("SILBO_CLUSTER") else Redis).from_url(os.environ["SILBO_REDIS_URL"])
streams = RedisStreams(client, app="worker", prefix=os.environ["SILBO_PREFIX"])
consumer = Consumer(dispatcher, streams.group("billing", start="oldest"))


@dispatcher.listen("order.*")
async def handle(event) -> None:
    print("begun", event.payload["order"], flush=True)
    await asyncio.sleep(event.payload.get("seconds", 0))
    print("done", event.payload["order"], flush=True)


@asynccontextmanager
async def opened():
    print("opened", flush=True)
    yield {"one": consumer, "two": Consumer(dispatcher, streams.group("mailing", start="oldest"))}
    print("closed", flush=True)


@dispatcher.listen("stuck.listener")
async def stuck(event) -> None:
    print("stuck", flush=True)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass


@asynccontextmanager
async def undrained():
    _host_code.ENDS_WITHIN = 0.1
    try:
        yield Consumer(dispatcher, streams.group("billing", start="oldest"), drain=0)
    finally:
        print("closed", flush=True)


def logs():
    logging.basicConfig(format="own: %(message)s")
    logging.getLogger("silbo").setLevel("ERROR")
    return consumer


def undecided():
    bridging = AsyncEventDispatcher()
    bridging.add_subscriber(Bridge(streams))
    return [consumer, Consumer(bridging, streams.group("own", start="new"))]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, {"worker.py": WORKER})


@asynccontextmanager
async def consuming(
    folder: Path, url: str, prefix: str, *arguments: str, until: str = "consumer connected"
) -> AsyncGenerator[asyncio.subprocess.Process]:
    """``silbo consume`` in the folder, from a line of its log on; killed where the test leaves it running."""
    process = await asyncio.create_subprocess_exec(
        *(*SILBO, "consume", *arguments),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment({"SILBO_REDIS_URL": url, "SILBO_PREFIX": prefix}),
    )
    assert process.stderr is not None
    told = ""
    try:
        async with asyncio.timeout(30):
            while until not in told:
                line = (await process.stderr.readline()).decode()
                assert line, told
                told += line
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def stopped(process: asyncio.subprocess.Process, sign: signal.Signals = signal.SIGTERM) -> tuple[list[str], str]:
    """End it with 0; what it has printed and logged meanwhile."""
    process.send_signal(sign)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode().splitlines(), err.decode()


async def publish(redis: Redis, prefix: str, *payloads: dict[str, Any], name: str = "order.paid") -> None:
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        for payload in payloads:
            headers = {"publication": new_publication(), "version": "1"}
            identity = "9f62e977-73f7-462b-92cb-8ea658d3bcb5"
            await streams.publish(Message("notification_event", name, identity, payload, headers))


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return (await process.stdout.readline()).decode().rstrip("\n")


async def test_stop_finishes_what_is_in_work(redis: Redis, redis_url: str, prefix: str, folder: Path) -> None:
    """SIGTERM in the middle of a listener: it ends, and its message is acknowledged."""
    async with consuming(folder, redis_url, prefix, "worker:consumer") as process:
        await publish(redis, prefix, {"order": 1}, {"order": 2, "seconds": 0.3})
        assert [await line(process) for _ in range(3)] == ["begun 1", "done 1", "begun 2"]
        out, told = await stopped(process)
    assert out == ["done 2"]
    assert re.search(r'Z INFO consumer stopped group="billing" received=2 claimed=0 handled=2 ', told), told
    pending: Any = await redis.xpending(f"{prefix}:{{events}}", "billing")
    assert pending["pending"] == 0


@pytest.mark.long
async def test_all_consumers_of_a_context_manager_run_within_it(
    redis: Redis, redis_url: str, prefix: str, folder: Path
) -> None:
    """Ctrl-C ends them; the first line of each says what it reads; figures where they are wanted."""
    await publish(redis, prefix, {"order": 1})
    arguments = ("worker:opened", "--figures", "0.05s")
    async with consuming(folder, redis_url, prefix, *arguments, until="consumer figures") as process:
        found = [await line(process) for _ in range(5)]
        assert found[0] == "opened" and sorted(found[1:]) == ["begun 1", "begun 1", "done 1", "done 1"]
        out, told = await stopped(process, signal.SIGINT)
    assert out == ["closed"]
    assert set(re.findall(r'consumer stopped group="(\w+)"', told)) == {"billing", "mailing"}


async def test_start_waits_for_redis_and_a_stop_ends_the_wait(folder: Path, prefix: str) -> None:
    async with consuming(
        folder, "redis://127.0.0.1:1", prefix, "worker:consumer", until="broker unavailable"
    ) as process:
        out, told = await stopped(process)
    assert out == [] and "consumer stopped" in told and "connected" not in told


async def test_consumer_that_fails_stops_the_others_and_the_command(redis_url: str, prefix: str, folder: Path) -> None:
    """The error is one line, and the exit code 1: a supervisor starts it again."""
    env = {"SILBO_REDIS_URL": redis_url, "SILBO_PREFIX": prefix}
    done = await silbo("consume", "worker:undecided", "--app-dir", folder, env=env, command=SILBO)
    assert done.code == 1 and done.out == ""
    assert done.err.splitlines()[-1].startswith("silbo: ") and "own=" in done.err.splitlines()[-1]
    assert set(re.findall(r'consumer stopped group="(\w+)"', done.err)) == {"billing", "own"}


async def test_listener_that_never_ends_does_not_keep_the_command(
    redis: Redis, redis_url: str, prefix: str, folder: Path
) -> None:
    """It ends, with 1 and the listener's line; what the context manager holds is closed, and the message comes again."""
    await publish(redis, prefix, {}, name="stuck.listener")
    async with consuming(folder, redis_url, prefix, "worker:undrained") as process:
        assert await line(process) == "stuck"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            out, err = await process.communicate()
    assert (process.returncode, out) == (1, b"closed\n")
    assert f"silbo: stuck ({folder}/worker.py:" in err.decode().splitlines()[-1]
    pending: Any = await redis.xpending(f"{prefix}:{{events}}", "billing")
    assert pending["pending"] == 1


async def test_program_that_sets_up_logging_keeps_it(redis: Redis, redis_url: str, prefix: str, folder: Path) -> None:
    env = {"SILBO_REDIS_URL": redis_url, "SILBO_PREFIX": prefix}
    process = await asyncio.create_subprocess_exec(
        *(*SILBO, "consume", "worker:logs"),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(env),
    )
    try:
        await publish(redis, prefix, {"order": 1})
        assert [await line(process) for _ in range(2)] == ["begun 1", "done 1"]
        _, told = await stopped(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert told == ""


def test_app_without_consumers_is_an_error(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILBO_REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("SILBO_PREFIX", "x")
    with imports_undone(folder):
        done = run("consume", "worker:dispatcher", "--app-dir", str(folder))
    assert (done.code, done.out) == (1, "")
    assert done.err == "silbo: 'worker:dispatcher': it has no consumer: name a silbo.Consumer, or what gives one\n"
