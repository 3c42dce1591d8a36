"""A Sentinel of a test's own."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlparse

from redis.asyncio.sentinel import Sentinel

from tests.support.redis_streams import eventually
from tools.redis_server import RedisServer


def port_of(server: RedisServer) -> int:
    port = urlparse(server.url).port
    assert port
    return port


@asynccontextmanager
async def sentinel(master: RedisServer, folder: Path) -> AsyncIterator[Sentinel]:
    """One that watches the master, and knows its replica."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder / 'sentinel.log'}\n"
        f"sentinel monitor main 127.0.0.1 {port_of(master)} 1\n"
    )
    process = subprocess.Popen([master.binary.path, config, "--sentinel"])
    manager = Sentinel([("127.0.0.1", port)])
    try:
        await eventually(lambda: manager.discover_slaves("main"), 15)
        yield manager
    finally:
        for client in manager.sentinels:
            await client.aclose()
        process.kill()
        process.wait()
