"""The store in an SQLite file, with other processes on it: writers, one that dies, one that holds the lock."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from silbo.errors import StoreUnavailable
from silbo.stores.sqlite import SQLiteStore, connection
from tests.stores.test_sqlite import is_sound
from tests.support.store_conformance import PLENTY, leader, numbers, packed, send

PROGRAM = Path(__file__).resolve().parents[1] / "support/sqlite_process.py"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@asynccontextmanager
async def program(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process; ended at the latest when the test ends."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tests.support.sqlite_process", *map(str, arguments)],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=PROGRAM.parent.parent.parent,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return (await process.stdout.readline()).decode().strip()


async def rest(process: asyncio.subprocess.Process) -> list[str]:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return (await process.stdout.read()).decode().splitlines()


async def everything(path: Path) -> list[tuple[str, int]]:
    """Key and number of each row, as they are stored."""
    store = SQLiteStore(path, create=False)
    await store.open()
    found: list[tuple[str, int]] = []
    for state in ("pending", "sending", "sent"):
        rows = await store.rows(state, limit=1_000_000)
        found += [(row.message.key or "", row.message.payload["n"]) for row in rows]
    await store.aclose()
    return found


def told(lines: list[str]) -> set[tuple[str, int]]:
    words = [text.split() for text in lines]
    return {(key, int(number)) for key, number in (pair for pair in words if len(pair) == 2)}


def inversions(found: list[tuple[str, int]]) -> int:
    last: dict[str, int] = {}
    count = 0
    for key, number in found:
        count += number <= last.get(key, -1)
        last[key] = number
    return count


async def test_writers_and_a_relay_share_a_file(path: Path) -> None:
    """Two processes write, a third (this one) sends: nothing is lost, each key is in order, nobody fails."""
    async with program("write", path, "a") as first, program("write", path, "b") as second:
        assert [await line(first), await line(second)] == ["open", "open"]
        store = SQLiteStore(path)
        await store.open()
        lead = await leader(store)
        sent = []
        async with asyncio.timeout(30):
            while len(sent) < 400:
                sent += await send(store, lead)
        for process in (first, second):
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
        given = told(await rest(first)) | told(await rest(second))
        assert [await first.wait(), await second.wait()] == [0, 0]
        while rows := await store.take(lead, 500):
            await store.settle(lead, [row.id for row in rows], {})
            sent += rows
        await store.aclose()
    found = [(row.message.key or "", row.message.payload["n"]) for row in sent]
    assert {key[0] for key, _ in found} == {"a", "b"}
    assert set(found) == given
    assert len(found) == len(given)
    assert inversions(found) == 0
    assert is_sound(path)


@pytest.mark.parametrize("after", [1, 40, 150])
async def test_killed_writer_has_stored_what_it_was_answered_for(path: Path, after: int) -> None:
    """kill -9 in mid-flight: what the call returned for is there, the file is sound, and it can be used at once."""
    async with program("write", path, "a") as writer:
        assert await line(writer) == "open"
        lines = [await line(writer) for _ in range(after)]
        writer.kill()
        lines += await rest(writer)
    found = await everything(path)
    assert told(lines) <= set(found)
    assert len(found) == len(set(found))
    assert inversions(found) == 0
    assert is_sound(path)
    store = SQLiteStore(path)
    await store.open()
    await store.add(packed(1), PLENTY)
    await store.aclose()


async def test_lock_held_for_too_long_is_a_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is stored then; and all goes on when it is released."""
    monkeypatch.setattr(connection, "LOCK_TIMEOUT", 0.3)  # 10 s
    store = SQLiteStore(path)
    await store.open()
    await store.add(packed(1), PLENTY)
    async with program("lock", path) as other:
        assert await line(other) == "locked"
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=r"another process has held its lock.*[Nn]othing was stored"):
                await store.add(packed(2), PLENTY)
        waiting = asyncio.create_task(store.add(packed(3), PLENTY))
        await asyncio.sleep(0)
        assert other.stdin is not None
        other.stdin.write(b"\n")
        other.stdin.close()
        await waiting
    await store.add(packed(4), PLENTY)
    assert numbers(await store.rows("pending")) == [1, 3, 4]
    await store.aclose()
    assert is_sound(path)


async def test_lock_is_waited_for_while_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LOCK_TIMEOUT", 0.3)
    await everything_of_a_new(path)
    async with program("lock", path) as other:
        assert await line(other) == "locked"
        store = SQLiteStore(path)
        with pytest.raises(StoreUnavailable, match="another process has held its lock"):
            await store.open()
        assert other.stdin is not None
        other.stdin.write(b"\n")
        other.stdin.close()
        await other.wait()
        await store.open()
        await store.aclose()


async def everything_of_a_new(path: Path) -> None:
    store = SQLiteStore(path)
    await store.open()
    await store.aclose()


async def test_disk_that_takes_no_more_is_a_clear_error(path: Path) -> None:
    """A real limit of the system's: writes fail. What was answered for is there; with room again, it goes on."""
    async with program("small", path) as process:
        (answer,) = await rest(process)
    told = json.loads(answer)
    assert told["failed"] > 100
    assert told["stored"] > 10
    assert told["error"].startswith(
        "DeliveryUnknown"
    )  # it fails in the commit, where nobody can say what is on the disk
    assert "outbox.db: its disk failed in the commit" in told["error"]
    assert told["stored"] <= len(await everything(path)) <= told["stored"] + told["failed"]
    assert is_sound(path)


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that another user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="silbo-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["file", "folder", "file that is not there"])
async def test_read_only_file_or_folder_is_a_clear_error(readable: Path, what: str) -> None:
    path = readable / "outbox.db"
    if what != "file that is not there":
        store = SQLiteStore(path)
        await store.open()
        await store.add(packed(1), PLENTY)
        await store.aclose()
        for name in os.listdir(readable):
            (readable / name).chmod(0o444 if what == "file" else 0o666)
    if what == "folder":
        (readable / "outbox.db-journal").unlink()
    readable.chmod(0o777 if what == "file" else 0o555)
    async with program("readonly", path) as process:
        error = json.loads("".join(await rest(process)))
    assert error.startswith("StoreUnavailable")
    assert str(path) in error
    assert "read-only" in error or "can't be opened; its folder" in error
    readable.chmod(0o777)
    if path.exists():
        path.chmod(0o666)
        assert len(await everything(path)) == 1
        assert is_sound(path)
