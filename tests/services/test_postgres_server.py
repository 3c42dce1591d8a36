"""The launcher: whatever happens to the owner, no server and no folder stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tools.postgres import PostgresServer
from tools.server import ROOT, ServerFailed

pytestmark = pytest.mark.postgresql


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


async def ask(url: str, *statements: str) -> object:
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            for statement in statements[:-1]:
                await connection.execute(text(statement))
            answer = await connection.scalar(text(statements[-1]))
            await connection.commit()
            return answer
    finally:
        await engine.dispose()


@pytest.mark.parametrize("port", [False, True], ids=["socket", "port"])
async def test_server_runs_inside_its_with_and_leaves_nothing(port: bool) -> None:
    with PostgresServer(port=port, config={"max_connections": 17}) as server:
        assert await ask(server.url, "SHOW max_connections") == "17"
        assert await ask(server.url, "SHOW listen_addresses") == ("127.0.0.1" if port else "")
        assert await ask(server.url, "SHOW fsync") == "on"
        folder = server.folder
    assert not folder.exists()
    assert not is_running(server.pid)
    server.stop()
    with pytest.raises(ServerFailed, match="inside its `with`"):
        server.kill()


async def test_killed_and_started_again_it_has_its_data(own_postgres: PostgresServer) -> None:
    """All of its processes are killed, also the one that is at work for a client."""
    await ask(own_postgres.url, "CREATE TABLE t (n int)", "INSERT INTO t VALUES (7) RETURNING n")
    working = asyncio.create_task(ask(own_postgres.url, "SELECT pg_sleep(60)"))
    while not await ask(own_postgres.url, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"):
        await asyncio.sleep(0.01)
    pid = own_postgres.pid
    own_postgres.kill()
    with pytest.raises(Exception, match="connection"):
        await working
    assert not is_running(pid)
    own_postgres.restart()
    assert own_postgres.pid != pid
    assert await ask(own_postgres.url, "SELECT n FROM t") == 7
    assert "database system was not properly shut down" in own_postgres.log


async def test_killed_it_is_gone_with_all_its_memory(own_postgres: PostgresServer) -> None:
    """A session that holds much of it is gone later than the rest, and PostgreSQL refuses to start over its memory."""
    hold = "SELECT pg_sleep(60), length(much) FROM (SELECT repeat('x', 300000000) AS much OFFSET 0) held"
    working = asyncio.create_task(ask(own_postgres.url, hold))
    while not await ask(own_postgres.url, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"):
        await asyncio.sleep(0.01)
    await asyncio.to_thread(own_postgres.restart)
    with pytest.raises(Exception, match="connection"):
        await working


async def test_paused_it_answers_when_resumed(own_postgres: PostgresServer) -> None:
    """All of its processes: the one that takes clients, and the one of a client that has been there."""
    engine = create_async_engine(own_postgres.url)
    async with engine.connect() as connection:
        await connection.scalar(text("SELECT 1"))
        own_postgres.pause()
        asking = [
            asyncio.create_task(ask(own_postgres.url, "SELECT 7")),
            asyncio.create_task(connection.scalar(text("SELECT 7"))),
        ]
        await asyncio.sleep(0.2)  # it can't be seen frozen: that nothing is answered is what is looked at
        assert not any(task.done() for task in asking)
        own_postgres.resume()
        assert await asyncio.gather(*asking) == [7, 7]
    await engine.dispose()


def test_server_ends_with_a_killed_owner(tmp_path: Path) -> None:
    code = (
        "import time\nfrom tools.postgres import PostgresServer\n"
        "server = PostgresServer(fsync=False)\nserver.start()\nprint(server.pid, server.folder, flush=True)\ntime.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    until(lambda: not is_running(int(pid)) and not Path(folder).exists())


def test_setting_that_it_refuses_is_an_error_with_its_log() -> None:
    with pytest.raises(ServerFailed, match="no_such_setting"):
        PostgresServer(config={"no_such_setting": 1}).start()
