"""A program that publishes as fast, or as evenly, as it is told: the other process of the Pub/Sub and latency scenarios.

    python -m benchmarks.feeder HOST PORT CHANNEL

Reads lines from its standard input: `COUNT RATE`. Publishes so many messages, RATE a second, or as fast as it can if that is
0; then prints a line. Each message has in `user_id` the nanoseconds of the machine's monotonic clock when it was sent, and is
otherwise what silbo sends. One socket, nothing of redis-py: what is measured is the reader.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic_ns, sleep
from urllib.parse import urlsplit

from benchmarks.redis_publish import by_hand

BATCH = 200
"""Messages in one write, if they are sent as fast as possible."""
STREAM_FIELD = b"message"
MARK = 1234567890123456789
"""The place of the time in a message."""


def main(host: str, port: str, channel: str) -> None:
    """Publish until the standard input ends."""
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        parts = by_hand(MARK).encode().split(str(MARK).encode())  # in the payload, and in the publication
        for line in sys.stdin:
            count, rate = map(int, line.split())
            feed(connection, channel.encode(), parts, count, rate)
            print("fed", flush=True)


def feed(connection: socket.socket, channel: bytes, parts: list[bytes], count: int, rate: int) -> None:
    """Publish so many messages."""
    sent, answers, started = 0, 0, monotonic_ns()
    while sent < count:
        if rate:
            due = started + sent * 1_000_000_000 // rate
            while (left := due - monotonic_ns()) > 0:
                sleep(left / 1e9 if left > 100_000 else 0)
            many = 1
        else:
            many = min(BATCH, count - sent)
        connection.sendall(b"".join([pack(channel, (b"%d" % monotonic_ns()).join(parts)) for _ in range(many)]))
        sent += many
        if not rate or sent % 100 == 0:
            answers += connection.recv(1 << 16).count(b"\n")
    while answers < count:
        answers += connection.recv(1 << 16).count(b"\n")


def pack(channel: bytes, raw: bytes) -> bytes:
    """Return a PUBLISH, or an XADD if the channel is a stream's key."""
    words = [b"PUBLISH", channel, raw]
    if channel.endswith(b"}"):
        words = [b"XADD", channel, b"*", STREAM_FIELD, raw]
    return b"*%d\r\n%b" % (len(words), b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words]))


class Feeder:
    """The program, as the scenario's process sees it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def start(self, count: int, rate: int = 0) -> None:
        """Let it publish."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d %d\n" % (count, rate))

    async def wait(self) -> None:
        """Wait until it has."""
        assert self._process.stdout is not None
        await self._process.stdout.readline()


@asynccontextmanager
async def open_feeder(url: str, channel: str) -> AsyncGenerator[Feeder]:
    """Start the program, and end it."""
    address = urlsplit(url)
    words = [sys.executable, "-m", "benchmarks.feeder", str(address.hostname), str(address.port), channel]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[1])
    try:
        yield Feeder(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
