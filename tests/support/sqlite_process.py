"""A process on an SQLite store. Run by the tests: ``python -m tests.support.sqlite_process WHAT PATH [ARGUMENT]``.

write PATH NAME   publishes until it is killed or gets a line on stdin, prints each number after its publish returned
lock PATH         holds the file's lock until it gets a line on stdin
small PATH        with a limit to the size of its files
readonly PATH     as a user who may not write the file
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sqlite3
import sys
from contextlib import suppress
from itertools import count

from silbo.errors import PublishError
from silbo.message import Message
from silbo.outbox.rows import Quota, pack
from silbo.stores.sqlite import SQLiteStore


def packed(number: int, key: str) -> list:
    return [pack(Message("ecst_event", "counted", f"{key}-{number}", {"n": number}, {"key": key}), 1)]


async def write(path: str, name: str) -> None:
    store = SQLiteStore(path)
    await store.open()
    print("open", flush=True)
    numbers, told = count(), asyncio.create_task(asyncio.to_thread(sys.stdin.readline))

    async def publish(lane: int) -> None:
        for number in numbers:
            if told.done():
                return
            await store.add(packed(number, f"{name}{lane}"), Quota())
            print(f"{name}{lane}", number, flush=True)

    await asyncio.gather(*(publish(lane) for lane in range(8)))
    await store.aclose()


def lock(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    print("locked", flush=True)
    sys.stdin.readline()
    connection.execute("ROLLBACK")


async def small(path: str) -> None:
    """Its disk ends at 256 KB: writes beyond fail."""
    store = SQLiteStore(path)
    await store.open()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, most))
    stored, error = [], None
    message = Message("ecst_event", "counted", "id", {"n": 0, "text": 5000 * "x"})
    for number in range(200):
        try:
            await store.add([pack(message, 1)], Quota())
            stored.append(number)
        except PublishError as failure:
            error = error or f"{type(failure).__name__}: {failure}"
    failed = 200 - len(stored)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    await store.add([pack(message, 1)], Quota())
    await store.aclose()
    print(json.dumps({"stored": len(stored) + 1, "failed": failed, "error": error}))


async def readonly(path: str) -> None:
    if os.geteuid() == 0:  # whom no permission stops
        os.setuid(65534)
    store, error = SQLiteStore(path), None
    try:
        await store.open()
        await store.add(packed(1, "a"), Quota())
    except PublishError as failure:
        error = f"{type(failure).__name__}: {failure}"
    with suppress(PublishError):
        await store.aclose()
    print(json.dumps(error))


if __name__ == "__main__":
    what = {"write": write, "lock": lock, "small": small, "readonly": readonly}[sys.argv[1]](*sys.argv[2:])
    if what is not None:
        asyncio.run(what)
