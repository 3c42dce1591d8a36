"""The system of the page on FastAPI, run as the page says, with its programs killed."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.support.app_files import write
from tests.support.snippets import snippets
from tools.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]
WEB = ("uvicorn", "shop.web:app", "--uds", "web.sock")
CONSUMER = ("silbo", "consume", "shop.billing:consumer")


@asynccontextmanager
async def running(folder: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program of the page while it runs; killed at the end."""
    with (folder / f"{command[0]}-{command[1]}.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *command),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def pay(folder: Path, number: int) -> int:
    """Pay an order; again while nobody answers, as a client does."""
    async with asyncio.timeout(30):
        while True:
            transport = httpx.AsyncHTTPTransport(uds=str(folder / "web.sock"))
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
                try:
                    return (await client.post(f"/orders/{number}/paid")).status_code
                except httpx.TransportError:
                    await asyncio.sleep(0.02)


def read(folder: Path, table: str, column: str) -> list[int]:
    database = sqlite3.connect(folder / "shop.db", timeout=20)
    try:
        return [number for (number,) in database.execute(f"SELECT {column} FROM {table} ORDER BY {column}")]
    finally:
        database.close()


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_every_paid_order_has_an_invoice_whatever_is_killed(tmp_path: Path, own_redis: RedisServer) -> None:
    page = ROOT.joinpath("docs/howto/fastapi.md").read_text()
    files = {
        each.file: each.code.replace("Redis()", f"Redis.from_url({own_redis.url!r})")
        for each in snippets(page)
        if each.file
    }
    assert len(files) == 4
    folder = write(tmp_path, files)
    relay = ("silbo", "relay", "--store", "sqlite+aiosqlite:///shop.db", "--redis", own_redis.url, "--lease", "2s")
    async with AsyncExitStack() as stack:
        web = await stack.enter_async_context(running(folder, *WEB))
        assert await pay(folder, 1) == 200
        relaying = await stack.enter_async_context(running(folder, *relay))
        consuming = await stack.enter_async_context(running(folder, *CONSUMER))
        for number in range(2, 40):
            if number in {10, 25}:
                for process in (web, relaying, consuming):
                    process.kill()
                (folder / "web.sock").unlink()
                web = await stack.enter_async_context(running(folder, *WEB))
                relaying = await stack.enter_async_context(running(folder, *relay))
                consuming = await stack.enter_async_context(running(folder, *CONSUMER))
            assert await pay(folder, number) in {200, 409}  # 409: committed, and killed before the answer
        async with asyncio.timeout(60):
            while read(folder, "invoices", '"order"') != list(range(1, 40)):
                await asyncio.sleep(0.1)
    assert read(folder, "orders", "id") == list(range(1, 40))
