"""A real Redis for every test that asks for one, and nothing left behind by any of them.

    redis_url, redis, prefix    a server shared by the tests of one worker, a client on it, a fresh key prefix
    own_redis                   a server that this test alone may kill, freeze and start again
    cluster, cluster_client     three masters shared by the tests of one worker, and a client on them
    own_cluster                 three masters with a replica each that this test alone may kill, freeze and reshard

A test marked `@pytest.mark.every_redis` runs with the first Redis that can be had; if pytest got `--every-redis`, once with each of
the others.

With `--cluster` pytest runs what needs no server of its own kind: the tests whose clients come from these fixtures, on 3 masters
with a replica each, `redis_url` being a node's. Left out is what takes a server itself, to kill or to configure it, and what is
marked `@pytest.mark.one_server`.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from tools.redis_binary import CACHE, PACKAGE, WHEELS, Binary, RedisNotFound, find_binaries, find_binary
from tools.redis_cluster import ClusterServers, make_client
from tools.redis_server import ExternalRedis, RedisServer, external_url, open_redis

pytest_plugins = ["pytester", "silbo_pytest"]  # the second also where silbo was installed before it had an entry point
pytest.register_assert_rewrite("tests.support")

SESSION = f"{os.getpid()}-{uuid.uuid4().hex}"
SESSION_VARIABLE = "SILBO_TEST_SESSION"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-redis", action="store_true", help="run what is marked every_redis with each further Redis server found"
    )
    parser.addoption(
        "--cluster", action="store_true", help="run what takes its Redis client from a fixture on a cluster"
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        find_binaries() if config.getoption("every_redis") else find_binary()
    except RedisNotFound as error:
        if not external_url():  # with one, only the tests that kill a server fail
            raise pytest.UsageError(str(error)) from error


CLIENTS = frozenset({"admin", "pubsub", "pubsub_client", "redis", "redis_url", "streams", "streams_client"})
"""Fixtures that give a client, or the address for one: of one server, or of a cluster."""
SERVERS = frozenset({"own_redis", "redis_binary", "redis_server"})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("cluster"):
        left_out = [item for item in items if not _runs_on_cluster(item)]
        items[:] = [item for item in items if _runs_on_cluster(item)]
        config.hook.pytest_deselected(items=left_out)


def _runs_on_cluster(item: pytest.Item) -> bool:
    if item.get_closest_marker("one_server") or item.get_closest_marker("cluster"):  # these run with the others
        return False
    function: Callable[..., object] | None = getattr(item, "function", None)
    if function is None or SERVERS & inspect.signature(function).parameters.keys():
        return False
    return not CLIENTS.isdisjoint(getattr(item, "fixturenames", ()))


def pytest_xdist_auto_num_workers() -> int:
    """Twice as many as cores: many a test waits for a server, or for a time to pass."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return 2 * cores


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell. Ignored signals are inherited, and then no test could send a Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> list[str]:
    url, every = external_url(), config.getoption("every_redis")
    header = [f"redis: {f'SILBO_REDIS_URL={url}; for faults, ' if url else ''}{', '.join(map(str, binaries(every)))}"]
    if every and (absent := [wheel.server for wheel in WHEELS if not wheel.runs_here]):
        header.append(f"redis: no build for this machine of {', '.join(absent)}")
    if every and not (CACHE / PACKAGE).exists():
        header.append("redis: without 7.0; `python -m tools.redis_package` fetches it, or says why not")
    return header


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("every_redis") and metafunc.definition.get_closest_marker("every_redis"):
        for fixture in {"redis_server", "own_redis", "redis_binary", "cluster", "own_cluster"} & set(
            metafunc.fixturenames
        ):
            found = [None] if external_url() and fixture == "redis_server" else binaries(every=True)
            metafunc.parametrize(fixture, found, indirect=True, ids=str)


def binaries(every: bool) -> Sequence[Binary | None]:
    """The one to use, or all that can be had; or one None, with which a server's start says what is missing."""
    try:
        first = find_binary()
        if not every:
            return [first]
        return [binary for binary in find_binaries() if binary != first] or [
            first
        ]  # on the first one all tests run anyway
    except RedisNotFound:
        return [None]


@pytest.fixture
def redis_binary(request: pytest.FixtureRequest) -> Binary | None:
    """The program for a test that starts servers by itself."""
    return getattr(request, "param", None)


@pytest.fixture(scope="session")
def redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer | ExternalRedis | ClusterServers]:
    """Shared by this worker's tests: keep to `prefix`, and flush, kill or configure only `own_redis`."""
    if request.config.getoption("cluster"):
        yield request.getfixturevalue("cluster")
        return
    binary: Binary | None = getattr(request, "param", None)
    with RedisServer(binary=binary) if binary else open_redis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer | ExternalRedis | ClusterServers, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's, or that of a cluster's node, for commands and clients of every kind."""
    if isinstance(redis_server, ClusterServers):
        monkeypatch.setenv("SILBO_CLUSTER", "1")
    return redis_server.url


@pytest.fixture
async def redis(redis_server: RedisServer | ExternalRedis | ClusterServers) -> AsyncIterator[Any]:
    """A client with redis-py's defaults, as a user would make it."""
    async with make_client(redis_server) as client:
        yield client


@pytest.fixture
async def prefix(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """For keys and channels, different in every test; what it left in `redis_server` is deleted afterwards."""
    fresh = f"test-{uuid.uuid4().hex[:12]}"
    names = {"redis_server", "cluster"} & set(request.fixturenames)
    servers: list[Any] = [request.getfixturevalue(name) for name in names]
    yield fresh
    for server in servers:
        if isinstance(server, ClusterServers):
            for node in server.find_masters():
                for key in node.run("KEYS", f"*{fresh}*"):
                    node.run("UNLINK", key)
        else:
            async with Redis.from_url(server.url) as client:
                keys = [key async for key in client.scan_iter(match=f"*{fresh}*", count=1000)]
                if keys:
                    await client.unlink(*keys)


@pytest.fixture
def own_redis(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server of this test's own on a unix socket, every write on disk before it is answered."""
    with RedisServer(appendonly="always", binary=getattr(request, "param", None)) as server:
        yield server


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[ClusterServers]:
    """Shared by this worker's tests: keep to `prefix`, and kill, freeze or reshard only `own_cluster`."""
    replicas = bool(request.config.getoption("cluster"))
    with ClusterServers(replicas=replicas, binary=getattr(request, "param", None)) as servers:
        yield servers


@pytest.fixture
async def cluster_client(cluster: ClusterServers) -> AsyncIterator[RedisCluster]:
    """A client with redis-py's defaults, as a user would make it."""
    async with cluster.client() as client:
        yield client


@pytest.fixture
def own_cluster(request: pytest.FixtureRequest) -> Iterator[ClusterServers]:
    """A cluster of this test's own; a replica is promoted about 2 seconds after its master is gone."""
    binary = getattr(request, "param", None)
    with ClusterServers(replicas=True, node_timeout=1.0, binary=binary) as servers:
        yield servers


@pytest.fixture
async def busy_pool() -> AsyncIterator[None]:
    """All threads of the loop's pool are hung, as by plugins."""
    loop = asyncio.get_running_loop()
    end = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        loop.set_default_executor(pool)
        hung = [loop.run_in_executor(None, end.wait) for _ in range(2)]
        yield
        end.set()
        await asyncio.gather(*hung)


@pytest.fixture(autouse=True)
def _no_task_left(request: pytest.FixtureRequest) -> None:
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("_tasks_of_the_test")


@pytest.fixture
async def _tasks_of_the_test() -> AsyncIterator[None]:
    """Set up before every other fixture of the test, so looked at when they are gone."""
    yield
    for _ in range(10):  # a task cancelled last takes a turn or two of the loop to end
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0)
    names = "\n".join(f"  {task!r}" for task in left)
    pytest.fail(f"the test left tasks pending:\n{names}", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    """Every process started by a test carries a mark in its environment, also when its parent is gone."""
    os.environ[SESSION_VARIABLE] = SESSION
    yield
    deadline = time.monotonic() + 5  # a supervisor whose owner was killed needs a moment
    while (left := _descendants()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if left:
        pytest.fail(f"the tests left processes running: {left}", pytrace=False)


def _descendants() -> dict[int, str]:
    """Those that carry the mark of this session; on Linux alone, where it can be read."""
    if sys.platform != "linux":
        return {}
    mark = f"{SESSION_VARIABLE}={SESSION}".encode()
    found: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # ended meanwhile, or another user's
            continue
    found.pop(os.getpid(), None)
    return found
