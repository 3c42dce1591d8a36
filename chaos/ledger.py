"""What a program can swear to: lines that are on the disk before anybody counts on them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Ledger", "Reading", "read"]


class Ledger:
    """An append-only file. `write` returns when the line is on the disk; lines written at once share one fsync."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        os.truncate(path, _whole(path))  # a line that was torn by a kill was never counted
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None

    async def write(self, line: str) -> None:
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((line, written))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        await written

    async def _flush(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._append, "".join(f"{line}\n" for line, _ in waiting).encode())
            except OSError as error:
                for _, written in waiting:
                    if not written.done():
                        written.set_exception(error)
                continue
            for _, written in waiting:
                if not written.done():
                    written.set_result(None)

    def _append(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    async def close(self) -> None:
        if self._flushing is not None:
            await self._flushing
        self._file.close()


def _whole(path: Path) -> int:
    """How many bytes of it are whole lines."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read(path: Path) -> Iterator[list[str]]:
    """The words of each whole line."""
    return Reading(path).more()


class Reading:
    """A ledger that is read while it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.lines = 0

    def more(self) -> Iterator[list[str]]:
        """The words of each line that has come since."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self.lines += 1
                yield line.decode().split()

    def count(self) -> int:
        """How many lines there are."""
        for _ in self.more():
            pass
        return self.lines
