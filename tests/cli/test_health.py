"""`silbo consume` and `silbo relay` show their health: alive means that the loop turns, ready that they are connected."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Consumer
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisStreams
from silbo.operations.health import show_health
from tests.cli.conftest import Run
from tests.support.app_files import write
from tests.support.command_line import SILBO, environment, fill, silbo, without
from tests.support.consumer import Running
from tests.support.redis_streams import eventually, message
from tools.redis_server import RedisServer

WORKER = """
import asyncio
import os
import time
from pathlib import Path

from redis.asyncio import Redis, RedisCluster
from silbo import AsyncEventDispatcher, Consumer
from silbo.brokers.redis import RedisStreams

dispatcher = AsyncEventDispatcher()
client = (RedisCluster if os.environ.get("SILBO_CLUSTER") else Redis).from_url(os.environ["SILBO_REDIS_URL"])
streams = RedisStreams(client, app="worker", prefix=os.environ["SILBO_PREFIX"])
consumer = Consumer(dispatcher, streams.group("billing", start="oldest"))


@dispatcher.listen("takes.long")
async def wait(event) -> None:
    while not Path("go on").exists():
        await asyncio.sleep(0.01)


@dispatcher.listen("holds.loop")
async def hold(event) -> None:
    Path("held").touch()
    while not Path("let go").exists():
        time.sleep(0.01)
"""


class Watched:
    """A command, and its health as a probe sees it."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, metrics_port: int, file: Path) -> None:
        self.process = process
        self.metrics = f"http://127.0.0.1:{metrics_port}/metrics"
        self.file = file
        self._base = f"http://127.0.0.1:{port}"

    async def get(self, path: str, *, within: float = 30.0) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self._base, timeout=within, trust_env=False, verify=False) as client:
            return await client.get(path)

    async def is_ready(self) -> bool:
        answer = await self.get("/readyz")
        lines = self.file.read_text().splitlines()
        assert lines[0] in {"ready", "not ready"}
        return answer.status_code == 200 and answer.text == "ready\n" and lines == ["ready"]

    async def is_unready(self) -> bool:
        answer = await self.get("/readyz")
        return answer.status_code == 503 and self.file.read_text() == answer.text != "ready\n"

    async def is_alive(self) -> bool:
        return (await self.get("/livez")).status_code == 200


@asynccontextmanager
async def watched(folder: Path, url: str, prefix: str, *arguments: object) -> AsyncGenerator[Watched]:
    """A command that shows its health, at a free port and in a file; killed at the end."""
    file = folder / "health"
    process = await asyncio.create_subprocess_exec(
        *(*SILBO, *map(str, arguments), "--health-port", "0", "--health-file", str(file), "--metrics-port", "0"),
        cwd=folder,
        stderr=asyncio.subprocess.PIPE,
        env=environment({"SILBO_REDIS_URL": url, "SILBO_PREFIX": prefix}),
    )
    try:
        assert process.stderr is not None
        told = ""
        async with asyncio.timeout(30):
            while len(ports := re.findall(r'(?:health is|metrics are) shown host="127.0.0.1" port=(\d+)', told)) < 2:
                line = (await process.stderr.readline()).decode()
                assert line, told
                told += line
        metrics_port, port = map(int, ports)
        yield Watched(process, port, metrics_port, file)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def publish(redis: Redis, prefix: str, name: str) -> None:
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(message(name=name))


async def check_endpoint_of_metrics(url: str) -> None:
    """Other paths and methods are refused, as at the port of the health; each figure is there once."""
    async with httpx.AsyncClient(timeout=30, trust_env=False, verify=False) as client:
        shown = await client.get(url)
        assert shown.status_code == 200 and shown.text.count("silbo_ready{") == 1
        head = await client.head(url)
        assert (head.status_code, head.content) == (200, b"")
        assert (await client.get(url.replace("/metrics", "/health"))).status_code == 404
        assert (await client.post(url)).status_code == 405


@pytest.mark.long
async def test_long_listener_is_no_reason_to_restart_and_a_held_loop_is(
    redis: Redis, redis_url: str, prefix: str, tmp_path: Path
) -> None:
    """A listener that awaits leaves the program alive and ready; one that holds the event loop is seen in both places."""
    folder = write(tmp_path, {"worker.py": WORKER})
    async with watched(folder, redis_url, prefix, "consume", "worker:consumer") as command:
        await eventually(command.is_ready)
        await publish(redis, prefix, "takes.long")

        async def has_it_in_hand() -> Any:
            return (await command.get("/health")).json()["parts"][0]["in_hand"]

        await eventually(has_it_in_hand)
        assert await command.is_alive() and await command.is_ready()
        touched = command.file.stat().st_mtime_ns

        async def is_touched() -> bool:
            return command.file.stat().st_mtime_ns > touched

        await eventually(is_touched)
        (folder / "go on").touch()
        listened = 'silbo_listener_duration_seconds_count{.*silbo_outcome="completed".*} 1.0'

        async def is_measured() -> Any:
            text = (await command.get(command.metrics)).text
            return re.search(listened, text) and re.search(r'silbo_consumer_handled_total\{.*"billing"\} 1.0', text)

        await eventually(is_measured)
        await check_endpoint_of_metrics(command.metrics)
        await publish(redis, prefix, "holds.loop")

        async def is_held() -> bool:
            return (folder / "held").exists()

        await eventually(is_held)
        touched = command.file.stat().st_mtime_ns
        with pytest.raises(httpx.TimeoutException):
            await command.get("/livez", within=1.5)
        assert not await is_touched()
        (folder / "let go").touch()
        await eventually(command.is_alive)
        await eventually(is_touched)


@pytest.mark.long
async def test_outage_of_redis_ends_readiness_and_not_liveness(own_redis: RedisServer, tmp_path: Path) -> None:
    folder = write(tmp_path, {"worker.py": WORKER})
    async with watched(folder, own_redis.url, "shop", "consume", "worker:consumer") as command:
        await eventually(command.is_ready)
        own_redis.kill()
        await eventually(command.is_unready)
        assert await command.is_alive()
        reason = (await command.get("/readyz")).text
        assert re.fullmatch(
            r"not ready\nconsumer billing: not connected since 20[\d-]+T[\d:]+Z; last error: can't read from Redis at .+\n",
            reason,
        ), reason
        parts = (await command.get("/health")).json()["parts"]
        assert (parts[0]["is_connected"], parts[0]["is_ready"]) == (False, False)
        assert parts[0]["away_since"].endswith("Z") and parts[0]["last_error"]["text"]
        touched = command.file.stat().st_mtime_ns

        async def is_touched() -> bool:
            return command.file.stat().st_mtime_ns > touched

        await eventually(is_touched)
        own_redis.restart()
        await eventually(command.is_ready)
        command.process.terminate()
        async with asyncio.timeout(30):
            await command.process.wait()
        assert not command.file.exists()


@pytest.mark.long
async def test_relay_is_ready_while_redis_answers(own_redis: RedisServer, tmp_path: Path) -> None:
    await fill(tmp_path / "outbox.db", 1)
    async with watched(tmp_path, own_redis.url, "shop", "relay", "--store", tmp_path / "outbox.db") as command:
        await eventually(command.is_ready)
        own_redis.kill()
        await fill(tmp_path / "outbox.db", 1)
        await eventually(command.is_unready)
        assert await command.is_alive()
        assert (await command.get("/readyz")).text.startswith("not ready\nrelay relay: not connected since 20")
        own_redis.restart()
        await eventually(command.is_ready)


@pytest.mark.parametrize("measuring", ["AsyncEventDispatcher(observers=[metrics])", "AsyncEventDispatcher()"])
async def test_app_with_its_own_metrics_is_refused(tmp_path: Path, measuring: str) -> None:
    """Prometheus would read each figure twice."""
    own = """
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from silbo.instrumentation.metrics import Metrics

metrics = Metrics(meter_provider=MeterProvider([PrometheusMetricReader()]))
"""
    code = own + WORKER.replace("AsyncEventDispatcher()", measuring) + "\nmetrics.watch(consumer)\n"
    folder = write(tmp_path, {"worker.py": code})
    arguments = ("consume", "worker:consumer", "--app-dir", folder, "--metrics-port", "0")
    env = {"SILBO_REDIS_URL": "redis://localhost:1", "SILBO_PREFIX": "shop"}
    done = await silbo(*arguments, env=env, command=SILBO)
    assert done.code == 2 and "has silbo's Metrics already" in done.err


@pytest.mark.parametrize("option", ["--health-port", "--metrics-port"])
async def test_port_that_is_taken_is_named_with_its_option(tmp_path: Path, option: str) -> None:
    await fill(tmp_path / "outbox.db", 0)
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as taken:
        port = str(taken.sockets[0].getsockname()[1])
        relay = ("relay", "--store", tmp_path / "outbox.db", "--redis", "redis://localhost:1")
        done = await silbo(*relay, option, port, command=SILBO)
    assert done.code == 1 and done.err.splitlines()[-1].endswith(f"{option} {port}: Address already in use"), done.err


async def test_missing_folder_of_the_file_is_told_by_both_commands(tmp_path: Path) -> None:
    await fill(tmp_path / "outbox.db", 0)
    file = tmp_path / "run" / "health"
    folder = write(tmp_path, {"worker.py": WORKER})
    env = {"SILBO_REDIS_URL": "redis://localhost:1", "SILBO_PREFIX": "shop"}
    relay, consume = await asyncio.gather(
        silbo("relay", "--store", tmp_path / "outbox.db", "--health-file", file, env=env, command=SILBO),
        silbo("consume", "worker:consumer", "--app-dir", folder, "--health-file", file, env=env, command=SILBO),
    )
    for done in (relay, consume):
        assert done.code == 1
        assert done.err.splitlines()[-1].endswith(
            f"--health-file {file}: there is no folder {file.parent}: make it first"
        )


async def test_host_that_has_no_address_is_named(tmp_path: Path) -> None:
    await fill(tmp_path / "outbox.db", 0)
    relay = ("relay", "--store", tmp_path / "outbox.db", "--redis", "redis://localhost:1")
    done = await silbo(*relay, "--metrics-port", "0", "--health-host", "192.0.2.1", command=SILBO)
    assert done.code == 1 and "--health-host 192.0.2.1: Cannot assign requested address" in done.err


def test_address_without_a_port_is_refused(run: Run) -> None:
    done = run("relay", "--store", "missing.db", "--health-host", "0.0.0.0")
    assert done.code == 2 and "give --health-port or --metrics-port" in done.err


async def test_part_without_health_is_refused() -> None:
    with pytest.raises(TypeError, match="not 5"):
        async with show_health([5], port=0):  # type: ignore[list-item]
            pass


@pytest.mark.parametrize("port", ["no", "70000", "-1"])
def test_port_that_is_none_is_refused(run: Run, port: str) -> None:
    done = run("consume", "worker:consumer", f"--health-port={port}")
    assert done.code == 2 and "is no port" in done.err


async def raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()


async def test_other_requests_are_refused_and_none_does_harm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("silbo.operations.health.REQUEST_WITHIN", 0.2)
    async with show_health([], port=0) as port:
        assert port is not None
        assert (await raw(port, b"GET /livez HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
        assert (await raw(port, b"HEAD /health HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")
        assert (await raw(port, b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
        assert (await raw(port, b"POST /livez HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
        for nonsense in (b"GET /livez", b"x" * 100_000):  # an end that never comes, and far too much
            assert await raw(port, nonsense) == b""
        monkeypatch.setattr("silbo.operations.health.REQUEST_WITHIN", 60)
        _, silent = await asyncio.open_connection("127.0.0.1", port)
        assert await raw(port, b"GET /livez HTTP/1.1\r\n\r\n")
    silent.close()
    assert not caplog.records, "a connection that is still open at the end is closed without a word"


async def test_nobody_reads_a_half_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replaced as a whole: a probe that has opened it reads the state of that moment."""
    monkeypatch.setattr("silbo.operations.health.TOUCHED_EVERY", 0.01)
    path = tmp_path / "health"
    consumer = Consumer(AsyncEventDispatcher(), MemoryBroker("web").group("billing", start="new"))

    async def is_ready() -> bool:
        return path.read_text() == "ready\n"

    async with show_health([consumer], file=path):
        with path.open() as opened:
            async with Running(consumer):
                await eventually(is_ready)
                assert opened.read() == "not ready\nconsumer billing: not running\n"
    assert not list(tmp_path.iterdir())


async def test_file_that_cannot_be_written_is_an_error_at_the_start_and_none_later(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "health"
    with pytest.raises(FileNotFoundError, match=f"there is no folder {missing.parent}: make it first") as error:
        async with show_health([], file=missing):
            pass
    assert error.value.filename == str(missing), "none that is written first, and renamed"
    (file := tmp_path / "health").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        async with show_health([], file=file):
            pass
    assert error.value.filename == str(file)
    file.rmdir()
    async with show_health([], file=file):
        file.unlink()

        async def is_back() -> bool:
            return file.read_text() == "ready\n"

        await eventually(is_back)
    assert not list(tmp_path.iterdir())


async def test_metrics_need_an_extra(tmp_path: Path) -> None:
    await fill(tmp_path / "outbox.db", 0)
    arguments = ("relay", "--store", tmp_path / "outbox.db", "--redis", "redis://localhost:1", "--metrics-port", "0")
    done = await silbo(*arguments, command=without("opentelemetry"))
    assert done.code == 1 and "pip install 'silbo[prometheus]'" in done.err.splitlines()[-1]
